// values.cu: right kernels, whose results NumPy knows, for as many instructions as a batch norm may come to use.

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define GLOBAL_INDEX (blockIdx.x * blockDim.x + threadIdx.x)

// Sum of each block's elements: shuffles within warps, shared memory between them.
extern "C" __global__ void __launch_bounds__(256) block_sums(const float *x, float *sums, long long n)
{
    __shared__ float partial[8];
    float v = 0;
    for (long long i = GLOBAL_INDEX; i < n; i += (long long)gridDim.x * blockDim.x) v += x[i];
    for (int o = 16; o > 0; o /= 2) v += __shfl_down_sync(~0u, v, o);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < blockDim.x / 32; ++w) v += partial[w];
        sums[blockIdx.x] = v;
    }
}

extern "C" __global__ void scale(const float *x, float *y, float factor, double shift, int n)
{
    const int i = GLOBAL_INDEX;
    if (i < n) y[i] = float(double(x[i]) * factor + shift);
}

extern "C" __global__ void copy_vectors(const float4 *x, float4 *y, long long n)
{
    const long long i = GLOBAL_INDEX;
    if (i < n) y[i] = x[i];
}

// Conversions between formats, by the intrinsics that kernels use.
extern "C" __global__ void widen_half(const __half *x, float *y, int n)
{
    const int i = GLOBAL_INDEX;
    if (i < n) y[i] = __half2float(x[i]);
}
extern "C" __global__ void widen_bfloat16(const __nv_bfloat16 *x, float *y, int n)
{
    const int i = GLOBAL_INDEX;
    if (i < n) y[i] = __bfloat162float(x[i]);
}
extern "C" __global__ void round_to_half(const float *x, __half *y, int n)
{
    const int i = GLOBAL_INDEX;
    if (i < n) y[i] = __float2half_rn(x[i]);
}
extern "C" __global__ void round_to_bfloat16(const float *x, __nv_bfloat16 *y, int n)
{
    const int i = GLOBAL_INDEX;
    if (i < n) y[i] = __float2bfloat16_rn(x[i]);
}
extern "C" __global__ void double_to_half(const double *x, __half *y, int n)
{
    const int i = GLOBAL_INDEX;
    if (i < n) y[i] = __double2half(x[i]);
}
extern "C" __global__ void half_pairs(const float2 *x, __half2 *y, int n)
{
    const int i = GLOBAL_INDEX;
    if (i < n) y[i] = __float22half2_rn(x[i]);
}
extern "C" __global__ void bfloat16_pairs(const float2 *x, __nv_bfloat162 *y, int n)
{
    const int i = GLOBAL_INDEX;
    if (i < n) y[i] = __float22bfloat162_rn(x[i]);
}

// Arithmetic in 16 bits: sum, product and fma of a, b and c, one after another.
extern "C" __global__ void half_arithmetic(const __half *a, const __half *b, const __half *c, __half *y, int n)
{
    const int i = GLOBAL_INDEX;
    if (i >= n) return;
    y[3 * i] = __hadd_rn(a[i], b[i]);
    y[3 * i + 1] = __hmul_rn(a[i], b[i]);
    y[3 * i + 2] = __hfma(a[i], b[i], c[i]);
}
extern "C" __global__ void half_pair_arithmetic(const __half2 *a, const __half2 *b, const __half2 *c, __half2 *y, int n)
{
    const int i = GLOBAL_INDEX;
    if (i >= n) return;
    y[3 * i] = __hadd2_rn(a[i], b[i]);
    y[3 * i + 1] = __hmul2_rn(a[i], b[i]);
    y[3 * i + 2] = __hfma2(a[i], b[i], c[i]);
}
#if __CUDA_ARCH__ >= 900
extern "C" __global__ void bfloat16_arithmetic(const __nv_bfloat16 *a, const __nv_bfloat16 *b, const __nv_bfloat16 *c,
                                               __nv_bfloat16 *y, int n)
{
    const int i = GLOBAL_INDEX;
    if (i >= n) return;
    y[3 * i] = __hadd_rn(a[i], b[i]);
    y[3 * i + 1] = __hmul_rn(a[i], b[i]);
    y[3 * i + 2] = __hfma(a[i], b[i], c[i]);
}
#endif

// Denormal numbers: -ftz=true flushes them in float, never in double.
extern "C" __global__ void denormals(const float *x, const double *d, float *y, double *e, int n)
{
    const int i = GLOBAL_INDEX;
    if (i >= n) return;
    y[5 * i] = x[i] * 1.5f;
    y[5 * i + 1] = x[i] + 0.f;
    y[5 * i + 2] = x[i];                      // a copy is no arithmetic
    y[5 * i + 3] = x[i] > 0.f ? 1.f : 0.f;
    y[5 * i + 4] = fmaxf(x[i], -1.f);
    e[2 * i] = d[i] * 0.5;
    e[2 * i + 1] = double(x[i]);              // reading a float is
}

extern "C" __global__ void integers(const int *a, const int *b, long long *y, int n)
{
    const int i = GLOBAL_INDEX;
    if (i >= n) return;
    const unsigned u = a[i], w = b[i];
    const int divisor = b[i] ? b[i] : 1;
    long long s = (long long)a[i] * b[i] + a[i] / divisor - (long long)(a[i] % divisor) * 7;
    s += (u >> (w & 31)) + (a[i] >> 3) + __popc(u) * 11 + __clz(a[i]) + __ffs(b[i]) + __umulhi(u, w) + u / 7 + a[i] / 13;
    s ^= (long long)(signed char)a[i] << 20;
    s += (unsigned short)b[i] + (long long)min(a[i], b[i]) - max(u, w) + (a[i] < b[i] ? 3 : u > w ? 5 : 9);
    s += __byte_perm(u, w, 0x4163) ^ __funnelshift_l(u, w, 9) ^ __brev(u);
    y[i] = s + abs(a[i]);
}

extern "C" __global__ void roots(const float *x, float *y, double *d, int n)
{
    const int i = GLOBAL_INDEX;
    if (i >= n) return;
    const float v = fabsf(x[i]) + 0.1f;
    y[8 * i] = __expf(-v);
    y[8 * i + 1] = __logf(v);
    y[8 * i + 2] = sqrtf(v);
    y[8 * i + 3] = rsqrtf(v);
    y[8 * i + 4] = 1.f / v;
    y[8 * i + 5] = floorf(x[i]) + truncf(x[i]) + rintf(x[i] * 10) + ceilf(x[i]);
    y[8 * i + 6] = float(int(x[i] * 100)) + __saturatef(x[i]) + copysignf(1.f, x[i]);
    y[8 * i + 7] = fmaxf(x[i], 0.25f) - fminf(x[i], 0.5f);
    d[4 * i] = sqrt(double(v));
    d[4 * i + 1] = rsqrt(double(v));
    d[4 * i + 2] = fma(double(v), 3.0, 1.0 / v);
    d[4 * i + 3] = __dadd_rn(__dmul_rn(v * 0.1, v * 0.1), -0.5);  // never fused
}

extern "C" __global__ void comparisons(const float *a, const float *b, int *y, int n)
{
    const int i = GLOBAL_INDEX;
    if (i >= n) return;
    const float p = a[i], q = b[i];
    y[i] = (p < q) | (p <= q) << 1 | (p > q) << 2 | (p >= q) << 3 | (p == q) << 4 | (p != q) << 5 | !(p < q) << 6 |
           !(p > q) << 7 | (isnan(p) || isnan(q)) << 8 | (p < 0 ? 0 : 1) << 9;
}

extern "C" __global__ void __launch_bounds__(128) lanes(const float *x, float *y, unsigned *votes)
{
    const int t = threadIdx.x;
    const float v = x[t];
    y[t] = __shfl_down_sync(~0u, v, 3) + 2 * __shfl_up_sync(~0u, v, 5) + 4 * __shfl_sync(~0u, v, 7) +
           8 * __shfl_xor_sync(~0u, v, 9) + 16 * __shfl_down_sync(~0u, v, 1, 8) + 32 * __shfl_sync(~0u, v, 2, 4);
    votes[4 * t] = __ballot_sync(~0u, v > 0.f);
    votes[4 * t + 1] = __any_sync(~0u, v > 2.f) + 2 * __all_sync(~0u, v > -9.f);
    votes[4 * t + 2] = __syncthreads_count(v > 0.5f) * 4 + __syncthreads_or(v > 9.f) + 2 * __syncthreads_and(v < 9.f);
#if __CUDA_ARCH__ >= 800
    votes[4 * t + 3] = __reduce_add_sync(~0u, t) + __reduce_max_sync(~0u, unsigned(t)) + __reduce_min_sync(~0u, -t);
#else
    votes[4 * t + 3] = 0;
#endif
}

extern "C" __global__ void atomics(const int *a, int *y, float *f, unsigned long long *count, int n)
{
    __shared__ int histogram[16];
    if (threadIdx.x < 16) histogram[threadIdx.x] = 0;
    __syncthreads();
    const int i = GLOBAL_INDEX;
    if (i < n) {
        atomicAdd(histogram + (a[i] & 15), 1);
        atomicMax(y + 16, a[i]);
        atomicMin(y + 17, a[i]);
        atomicXor(y + 18, a[i]);
        atomicAdd(f, float(a[i] & 3));
        atomicAdd(count, 3ull);
        int seen = atomicAdd(y + 19, 0);
        while (true) {
            const int old = atomicCAS(y + 19, seen, seen + a[i]);
            if (old == seen) break;
            seen = old;
        }
    }
    __syncthreads();
    if (threadIdx.x < 16) atomicAdd(y + threadIdx.x, histogram[threadIdx.x]);
}

struct Arguments {
    int n;
    float factor;
    long long shift;
};
extern "C" __global__ void struct_argument(Arguments p, const float *x, float *y)
{
    const int i = threadIdx.x;
    if (i < p.n) y[i] = x[i] * p.factor + p.shift;
}

__constant__ float table[5] = {1.f, 3.f, 9.f, 27.f, 81.f};
extern "C" __global__ void choose(const int *x, float *y, int n)
{
    const int i = GLOBAL_INDEX;
    if (i >= n) return;
    float v;
    switch (x[i] % 8) {
        case 0: v = y[i] * 2; break;
        case 1: v = y[i] + 7; break;
        case 2: v = 1 / y[i]; break;
        case 3: v = y[i] - 3; break;
        case 4: v = -y[i]; break;
        case 5: v = y[i] * y[i]; break;
        case 6: v = sqrtf(y[i]); break;
        default: v = 0;
    }
    y[i] = v + table[(x[i] / 8) % 5];
}

extern "C" __global__ void block_and_thread(int3 *y)
{
    const int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    const int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    const int threads = blockDim.x * blockDim.y * blockDim.z;
    y[block * threads + thread] = {int(blockIdx.x + 10 * threadIdx.x), int(blockIdx.y + 10 * threadIdx.y),
                                   int(blockIdx.z + 10 * threadIdx.z)};
}

__device__ __noinline__ float outside(float v) { return v * 2; }
extern "C" __global__ void calls(float *y) { y[0] = outside(y[0]); }
