// bounds.cu: accesses beside an array, to the wrong alignment, and to what nobody has written.  Each is right when
// BUG is 0.  One block of 128 threads, 512 bytes of dynamic shared memory; x has 100 floats, y has 256, n is 100.

#define KERNEL(name) extern "C" __global__ void __launch_bounds__(128) name(const float *x, float *y, int n)

KERNEL(global_overrun)
{
    const int i = threadIdx.x;
    if (i < n + BUG) y[i] = x[i];
}

KERNEL(global_underrun)
{
    const int i = threadIdx.x;
    if (i < n) y[i] = x[i - (i == 0 && BUG)];
}

KERNEL(index_wrong_by_millions)
{
    const int i = threadIdx.x;
    if (i < n) y[i + (BUG ? 1 << 22 : 0)] = x[i];
}

KERNEL(null_pointer)
{
    const long long address = BUG ? n - 100 : reinterpret_cast<long long>(y);
    reinterpret_cast<float *>(address)[threadIdx.x] = 1;
}

KERNEL(static_shared)
{
    __shared__ float s[32];
    if (threadIdx.x < 32 + BUG) s[threadIdx.x] = 1;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x % 32];
}

__device__ void put(float *s, int i) { s[i] = 1; }

KERNEL(neighbour_in_shared)
{
    __shared__ float s[32], t[32];
    if (threadIdx.x < 32) t[threadIdx.x] = 0;
    if (threadIdx.x < 32) put(s, threadIdx.x);
    if (BUG && threadIdx.x == n % 32) put(s, 40);
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x % 32] + t[threadIdx.x % 32];
}

KERNEL(before_shared)
{
    __shared__ float s[128];
    s[threadIdx.x] = 1;
    __syncthreads();
    y[threadIdx.x] = s[int(threadIdx.x) - 8 * BUG];
}

KERNEL(dynamic_shared)
{
    extern __shared__ float d[];
    d[threadIdx.x + BUG] = 1;
    __syncthreads();
    y[threadIdx.x] = d[127 - threadIdx.x / 2];
}

KERNEL(misaligned_vector)
{
    const float4 v = *reinterpret_cast<const float4 *>(x + 4 * (threadIdx.x % 8) + BUG);
    y[threadIdx.x] = v.x + v.w;
}

KERNEL(misaligned_shared_vector)
{
#if BUG
    __shared__ float s[128];
#else
    __shared__ __align__(16) float s[128];
#endif
    s[threadIdx.x] = 1;
    __syncthreads();
    const float4 v = *reinterpret_cast<float4 *>(s + 4 * (threadIdx.x % 32));
    y[threadIdx.x] = v.x + v.w;
}

KERNEL(uninitialised_shared)
{
    __shared__ float s[128];
    if (!BUG || threadIdx.x) s[threadIdx.x] = 1;
    __syncthreads();
    y[threadIdx.x] = s[127 - threadIdx.x];
}

KERNEL(uninitialised_global)  // y is empty
{
    if (!BUG) y[threadIdx.x] = 0;
    y[threadIdx.x] += x[threadIdx.x % n];
}

KERNEL(unwritten_output)  // y is empty; a fault nowhere, but unwritten(y) tells
{
    if (threadIdx.x != 77 || !BUG) y[threadIdx.x] = x[threadIdx.x % n];
    y[128 + threadIdx.x] = 0;
}

KERNEL(local_array)  // never wrong: an array in a thread's own memory
{
    int kept[8];
    for (int k = 0; k < 8; ++k) kept[k] = int(x[(threadIdx.x + k) % n]) + k;
    y[threadIdx.x] = float(kept[(threadIdx.x + n) & 7]);
}
