// held.cuh: where a thread keeps the windows of its tile between their first use and their last.
//
//   Constants  HELD     windows in registers
//              TENSORS  tensors of which a window is held
//
// The first `kept` windows of a thread go to shared memory, the last HELD to registers, and those in between are
// read again.  The second time they are taken in the opposite order, so that the second-level cache still has what
// was read last.  A thread reads back from shared memory what it has itself put there: that takes no barrier.

#pragma once

#include "chunk.cuh"

extern __shared__ __align__(16) unsigned char dynamic_shared[];

static_assert(HELD % UNROLL == 0, "registers are emptied UNROLL windows at a time");

// How many windows of a thread are where.
struct Places {
    int kept, streamed, held;

    __device__ Places(int steps, int room)
    {
        held = min(HELD, steps);
        kept = min(room, steps - held);
        streamed = steps - held - kept;
    }
};

// Lets the compiler forget what it has computed from a vector.  It would rather keep 16-bit elements in registers
// twice, as they are and widened, than widen them again.
template <int N>
__device__ void forget(Vector (&vectors)[N])
{
    if constexpr (PAIRS) {
#pragma unroll
        for (int u = 0; u < N; ++u)
#pragma unroll
            for (int i = 0; i < VEC / 2; ++i) asm volatile("" : "+r"(vectors[u].word[i]));
    }
}

// The shared memory of a block: `room` windows of each tensor for each thread, then the marks of these windows.
struct Shelf {
    unsigned char *start;
    int room;

    static constexpr int MARKS = (ALL ? 0 : 1) + (TENSORS == 2 && KEPT ? 1 : 0);

    __device__ Vector &at(int k, int tensor) const
    {
        return reinterpret_cast<Vector *>(start)[(k * TENSORS + tensor) * BLOCK + threadIdx.x];
    }

    __device__ unsigned char &mark(int k, int which) const
    {
        return start[room * TENSORS * BLOCK * int(sizeof(Vector)) + (k * MARKS + which) * BLOCK + threadIdx.x];
    }

    // Starts a copy of a window that arrived() waits for.
    __device__ void fetch(int k, int tensor, const X_T *from, const Window &w) const
    {
#if __CUDA_ARCH__ >= 800
        if (sizeof(Vector) == 16 && w.whole()) {
            const unsigned to = unsigned(__cvta_generic_to_shared(&at(k, tensor)));
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
            return;
        }
#endif
        at(k, tensor) = load(from, w);
    }

    __device__ static void arrived()
    {
#if __CUDA_ARCH__ >= 800
        asm volatile("cp.async.wait_all;" ::: "memory");
#endif
    }
};
