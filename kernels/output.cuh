// output.cuh: y of one channel from x, once its statistics are known.
//
//   Constants  ADD, RELU (0/1), and those of marks.cuh

#pragma once

#include "affine.cuh"
#include "chunk.cuh"

// Writes y of the windows that exist, and their marks; `other` is the residual.
template <int N, class Exists>
__device__ void give_out(const Affine (&maps)[LANES], const Chunk<N> &chunk, Exists exists, Target &to,
                         unsigned char *active, Index &index)
{
#pragma unroll
    for (int u = 0; u < N; ++u) {
        if (!exists(u)) continue;
        unsigned open = 0;
        ACC_T y[VEC];
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            ACC_T v = maps[COLUMN ? i : 0](element(chunk.x[u], i));
            if (ADD) v += element(chunk.other[u], i);
            open |= passes(v) ? 1u << i : 0;
            if (RELU) v = relu(v);
            if (WHERE && !(chunk.admitted[u] >> i & 1)) v = 0;
            y[i] = v;
        }
        store(to.at, chunk.window[u], pack(y));
        if (KEPT) keep(active, index.at, chunk.window[u], open);
        to.go(chunk.move[u]);
        index.go(chunk.move[u]);
    }
}
