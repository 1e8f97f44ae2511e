// barriers.cu: threads of one block that do not wait for each other as they must.  Each is right when BUG is 0.
// One block of 128 threads; x has 100 floats, y has 256, n is 100.

#define KERNEL(name) extern "C" __global__ void __launch_bounds__(128) name(float *x, float *y, int n)

KERNEL(missing_barrier)
{
    __shared__ float s[128];
    s[threadIdx.x] = 1;
    if (!BUG) __syncthreads();
    y[threadIdx.x] = s[(threadIdx.x + 32) % 128];
}

KERNEL(write_after_read)
{
    __shared__ float s[128];
    for (int j = 0; j < 3; ++j) {
        s[threadIdx.x] = j;
        __syncthreads();
        y[threadIdx.x] = s[127 - threadIdx.x];
        if (!BUG) __syncthreads();
    }
}

KERNEL(missing_syncwarp)
{
    __shared__ float s[128];
    s[threadIdx.x] = 1;
    if (!BUG) __syncwarp();
    y[threadIdx.x] = s[threadIdx.x ^ 1];
}

KERNEL(partial_syncwarp)
{
    __shared__ float s[128];
    const int half = threadIdx.x & 16;
    s[threadIdx.x] = 1;
    __syncwarp(BUG ? 0xffffu << half : ~0u);
    y[threadIdx.x] = s[threadIdx.x ^ 16];
}

KERNEL(shuffle_orders_nothing)
{
    __shared__ float s[128];
    s[threadIdx.x] = 1;
    y[threadIdx.x] = __shfl_xor_sync(~0u, 1.f, 1);
    if (!BUG) __syncwarp();
    y[threadIdx.x] += s[threadIdx.x ^ 1];
}

KERNEL(warp_reduction)  // in shared memory, the classic way; lanes read what other lanes wrote one step before
{
    __shared__ float s[128];
    float *w = s + threadIdx.x / 32 * 32;
    const int lane = threadIdx.x % 32;
    w[lane] = lane;
    __syncwarp();
    for (int o = 16; o > 0; o /= 2) {
        const float other = lane < o ? w[lane + o] : 0.f;
        if (!BUG) __syncwarp();
        if (lane < 2 * o) w[lane] += other;
        __syncwarp();
    }
    y[threadIdx.x] = w[0];
}

KERNEL(middle_reader)  // others have read the same, but a barrier ago
{
    __shared__ float s;
    if (threadIdx.x == 0) s = 1;
    __syncthreads();
    if (threadIdx.x == 0 || threadIdx.x == 127) y[threadIdx.x] = s;
    __syncthreads();
    if (threadIdx.x == 64) y[threadIdx.x] = s;
    if (!BUG) __syncthreads();
    if (threadIdx.x == 32) s = 2;
}

KERNEL(early_exit)
{
    if (BUG && threadIdx.x >= n) return;
    __syncthreads();
    y[threadIdx.x] = 0;
}

KERNEL(two_barriers)
{
    if (!BUG) __syncthreads();
    else if (threadIdx.x < 64)
        __syncthreads();
    else
        __syncthreads();
    y[threadIdx.x] = 0;
}

KERNEL(barrier_against_shuffle)
{
    if (!BUG || threadIdx.x % 32 < 16) __syncthreads();
    if (!BUG || threadIdx.x % 32 >= 16) y[threadIdx.x] = __shfl_xor_sync(~0u, 1.f, 1);
}

KERNEL(half_a_warp)
{
    if (!BUG || threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_xor_sync(~0u, 1.f, 1);
    __syncthreads();
}

KERNEL(not_in_its_mask) { y[threadIdx.x] = __shfl_xor_sync(BUG ? 0xffffu : ~0u, 1.f, 1); }

KERNEL(absent_source)
{
    const unsigned low = 0xffffu;
    if (threadIdx.x % 32 < 16) y[threadIdx.x] = __shfl_xor_sync(low, 1.f, BUG ? 16 : 1);
}

KERNEL(livelock)
{
    int *flag = reinterpret_cast<int *>(x);
    if (BUG) while (atomicAdd(flag, 0) >= 0) {}
}

KERNEL(spin_without_nap)
{
    volatile int *flag = reinterpret_cast<volatile int *>(x);
    if (threadIdx.x == 0) *flag = !BUG;
    while (*flag == 0) {}
}

KERNEL(endless_loop)
{
    float v = x[0];
    for (int i = 0; i != 7; i += BUG ? 2 : 1) v = v * 0.5f + 1.f;
    y[threadIdx.x] = v;
}

KERNEL(trap)
{
    if (BUG && threadIdx.x == 9) __trap();
    y[threadIdx.x] = 0;
}
