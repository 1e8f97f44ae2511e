// grids.cu: blocks that exchange data through global memory.  Each is right when BUG is 0.  128 threads per block;
// y has 128 floats for each block and as many more, counters are zeros, n is a number of rounds.

#define KERNEL(name) extern "C" __global__ void __launch_bounds__(128) name(unsigned *counters, float *y, int n)

KERNEL(blocks_collide)
{
    if (BUG) y[threadIdx.x] = 1;
    else atomicAdd(y + threadIdx.x, 1.f);
}

KERNEL(atomic_and_plain)
{
    __shared__ int s;
    if (threadIdx.x == 0) s = 0;
    __syncthreads();
    if (BUG && threadIdx.x == 5) s = 7;
    else atomicAdd(&s, 1);
}

// The last block to arrive adds up what the others have written.  BUG 1: no fence; 2: thread 0 counts its block as
// arrived although others may still be writing; 3: threads read what only thread 0 knows to be there.
KERNEL(last_block)
{
    __shared__ bool last;
    y[blockIdx.x * 128 + threadIdx.x] = 1;
    if (BUG != 2) __syncthreads();
    if (threadIdx.x == 0) {
        if (BUG != 1) __threadfence();
        last = atomicAdd(counters, 1u) == gridDim.x - 1;
    }
    if (BUG != 3) __syncthreads();
    if (BUG == 3 ? gridDim.x == blockIdx.x + 1 : last) {
        float sum = 0;
        for (int b = 0; b < gridDim.x; ++b) sum += y[b * 128 + 127 - threadIdx.x];
        y[gridDim.x * 128 + threadIdx.x] = sum;
    }
}

// The same, as it is often written: every thread fences, then one counts.
KERNEL(everybody_fences)
{
    __shared__ bool last;
    y[blockIdx.x * 128 + threadIdx.x] = 1;
    if (!BUG) __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) last = atomicAdd(counters, 1u) == gridDim.x - 1;
    __syncthreads();
    if (last) y[gridDim.x * 128 + threadIdx.x] = y[(blockIdx.x + 1) % gridDim.x * 128 + 127 - threadIdx.x];
}

// A barrier of the whole grid, several times over; launched cooperatively.  BUG 1: no fence; 2: the block does not
// wait for its threads before it arrives; 3: nor after; 4: nobody waits in the second round.
__device__ void grid_barrier(unsigned *counter, unsigned round)
{
    if (BUG != 2) __syncthreads();
    if (threadIdx.x == 0) {
        if (BUG != 1) __threadfence();
        atomicAdd(counter, 1u);
        volatile unsigned *seen = counter;
        while (!(BUG == 4 && round == 1) && *seen < (round + 1) * gridDim.x) __nanosleep(20);
        __threadfence();
    }
    if (BUG != 3) __syncthreads();
}

KERNEL(grid_barrier_rounds)
{
    for (int round = 0; round < n; ++round) {
        float *target = y + round * gridDim.x * 128;
        target[blockIdx.x * 128 + threadIdx.x] = round + blockIdx.x;
        grid_barrier(counters, round);
        const int next = (blockIdx.x + 1) % gridDim.x;
        if (target[next * 128 + threadIdx.x] != round + next) __trap();
    }
}

// One block waits for a flag that another sets with a volatile write.
KERNEL(flag)
{
    volatile unsigned *ready = counters;
    if (blockIdx.x == 0) {
        y[threadIdx.x] = 5;
        __syncthreads();
        if (threadIdx.x == 0) {
            if (!BUG) __threadfence();
            *ready = 1;
        }
    } else {
        if (threadIdx.x == 0) while (*ready == 0) {}
        __syncthreads();
        y[blockIdx.x * 128 + threadIdx.x] = y[127 - threadIdx.x];
    }
}

// cp.async through inline PTX.  BUG 1: the thread does not wait for its copy; 2: it does not wait for the others.
KERNEL(asynchronous_copy)
{
    __shared__ __align__(16) unsigned s[512];
    const unsigned target = __cvta_generic_to_shared(s + 4 * threadIdx.x);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(counters + 4 * (threadIdx.x % 2)));
    asm volatile("cp.async.commit_group;");
    if (BUG != 1) asm volatile("cp.async.wait_group 0;");
    if (BUG != 2) __syncthreads();
    y[blockIdx.x * 128 + threadIdx.x] = s[(4 * threadIdx.x + 37) % 512];
    asm volatile("cp.async.wait_all;");
}

KERNEL(own_asynchronous_copy)
{
    __shared__ __align__(16) unsigned s[512];
    const unsigned target = __cvta_generic_to_shared(s + 4 * threadIdx.x);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, 4;" ::"r"(target), "l"(counters));
    asm volatile("cp.async.commit_group;");
    if (!BUG) asm volatile("cp.async.wait_group 0;");
    y[blockIdx.x * 128 + threadIdx.x] = s[4 * threadIdx.x + 1];  // the second four bytes, which are filled with zeros
    asm volatile("cp.async.wait_all;");
}
