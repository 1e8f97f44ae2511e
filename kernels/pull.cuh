// pull.cuh: dx of one channel from dz and x, once its sums are known.
//
//   Constants  TRAIN  1, or 0 where the statistics are constants: dx = gamma * rstd * dz
//              SPLIT  (0/1) write dz too, which is the gradient of the residual

#pragma once

#include "affine.cuh"
#include "chunk.cuh"

// What the statistics' own dependence on x takes away, and what scales dz.
struct Pull {
    Affine towards;
    ACC_T scale;

    __device__ ACC_T operator()(ACC_T dz, ACC_T x) const { return TRAIN ? fma(dz, scale, towards(x)) : scale * dz; }
};

// `share` is one sample's, 1 / M.  gamma may be null: 1.
__device__ inline Pull pull(index_t c, const double *mean, const double *rstd, const ACC_T *gamma, double sum_dy,
                            double sum_dy_xhat, double share)
{
    const double scale = rstd[c] * (gamma ? gamma[c] : ACC_T(1));
    Pull p = {};
    p.scale = narrow(scale);
    if (TRAIN) p.towards = affine(mean[c], -scale * rstd[c] * sum_dy_xhat * share, -scale * sum_dy * share);
    return p;
}

// Writes dx, and dz where it is asked for, of the windows that exist; `other` is dz by now.
template <int N, class Exists>
__device__ void give_out(const Pull (&pulls)[LANES], const Chunk<N> &chunk, Exists exists, Target &to,
                         Target &split)
{
#pragma unroll
    for (int u = 0; u < N; ++u) {
        if (!exists(u)) continue;
        ACC_T dx[VEC];
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            const ACC_T v = pulls[COLUMN ? i : 0](element(chunk.other[u], i), element(chunk.x[u], i));
            dx[i] = !WHERE || chunk.admitted[u] >> i & 1 ? v : ACC_T(0);
        }
        store(to.at, chunk.window[u], pack(dx));
        if (SPLIT) store(split.at, chunk.window[u], chunk.other[u]);
        to.go(chunk.move[u]);
        split.go(chunk.move[u]);
    }
}
