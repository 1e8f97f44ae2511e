// clusters.cu: blocks of a cluster that use each other's shared memory.  Each is right when BUG is 0.  Clusters of
// two blocks of 128 threads; y has 256 floats.

#define KERNEL(name) extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(128) name(float *y)

template <class T> __device__ T *of_peer(T *pointer, unsigned rank)
{
    return static_cast<T *>(__cluster_map_shared_rank(pointer, rank));
}

__device__ void cluster_barrier()
{
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
}

KERNEL(read_too_early)
{
    __shared__ float s[128];
    s[threadIdx.x] = threadIdx.x;
    if (!BUG) cluster_barrier();
    else __syncthreads();
    y[blockIdx.x * 128 + threadIdx.x] = *of_peer(s + 127 - threadIdx.x, __clusterRelativeBlockRank() ^ 1);
    cluster_barrier();
}

KERNEL(exit_too_early)
{
    __shared__ float s[128];
    s[threadIdx.x] = 1;
    cluster_barrier();
    y[blockIdx.x * 128 + threadIdx.x] = *of_peer(s + threadIdx.x, __clusterRelativeBlockRank() ^ 1);
    if (!BUG) cluster_barrier();
}

KERNEL(no_such_rank)
{
    __shared__ float s[1];
    if (threadIdx.x == 0) s[0] = 1;
    cluster_barrier();
    y[blockIdx.x * 128 + threadIdx.x] = *of_peer(s, 1 + BUG);
    cluster_barrier();
}

KERNEL(beyond_the_peers_array)
{
    __shared__ float s[128];
    s[threadIdx.x] = 1;
    cluster_barrier();
    y[blockIdx.x * 128 + threadIdx.x] = *of_peer(s + threadIdx.x + BUG, __clusterRelativeBlockRank() ^ 1);
    cluster_barrier();
}

KERNEL(write_after_arriving)  // too late for the others to see
{
    __shared__ float s[128];
    if (!BUG) s[threadIdx.x] = 1;
    __cluster_barrier_arrive();
    if (BUG) s[threadIdx.x] = 1;
    __cluster_barrier_wait();
    y[blockIdx.x * 128 + threadIdx.x] = *of_peer(s + 127 - threadIdx.x, __clusterRelativeBlockRank() ^ 1);
    cluster_barrier();
}

KERNEL(relaxed_arrival)
{
    __shared__ float s[128];
    s[threadIdx.x] = 1;
    if (BUG) __cluster_barrier_arrive_relaxed();
    else __cluster_barrier_arrive();
    __cluster_barrier_wait();
    y[blockIdx.x * 128 + threadIdx.x] = *of_peer(s + 127 - threadIdx.x, __clusterRelativeBlockRank() ^ 1);
    cluster_barrier();
}

KERNEL(second_arrival)
{
    __cluster_barrier_arrive();
    if (BUG) __cluster_barrier_arrive();
    __cluster_barrier_wait();
    y[blockIdx.x * 128 + threadIdx.x] = 0;
}
