// input_gradient.cu: the last step of the backward pass.
//
//     dx[o,c,i] = gamma[c] * rstd[c] * (dz - sum_dy[c] / M - xhat * sum_dy_xhat[c] / M),    dz as in gradient_sums.cu
//
//   Shapes     dy, x, dx, dresidual (outer, channels, inner) X_T, each with a stride of its own from row to row
//              mean, rstd (channels,) double      gamma, beta (channels,) ACC_T, or null for 1 and 0
//              where  the shape of x, dense, bytes      active  as in marks.cuh
//              sum_dy, sum_dy_xhat (channels,) ACC_T
//              counts (channels,), or null where every channel has `count` samples
//   Launch     input_gradient_plan: 1-D grid of any size, each block takes whole tiles, the last ones first, because
//              they are what the second-level cache still holds of the dy and x that gradient_sums has read
//   Traffic    one read of dy, of x when TRAIN or when ReLU's gate is computed from it, of where when WHERE, of
//              active when KEPT; one write of dx, of dresidual when SPLIT
//   Rounding   x - mean, one fma, one add, one product in ACC_T, then one rounding to X_T; dresidual is exact
//   Aliasing   dx may be dy: each element is read, then written, by the same thread
//   Constants  X_TYPE, and those of tiles.cuh;  TRAIN (0/1): 0 takes the statistics as constants, so that
//              dx = gamma * rstd * dz;  RELU, KEPT, WHERE as in gradient_sums.cu;  SPLIT (0/1): write dz too, which
//              is the gradient of the residual

#include "marks.cuh"
#include "pull.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
input_gradient(const X_T *dy, index_t dy_stride, const X_T *x, index_t x_stride, const unsigned char *where,
               const unsigned char *active, const double *mean, const double *rstd, const ACC_T *gamma,
               const ACC_T *beta, const ACC_T *sum_dy, const ACC_T *sum_dy_xhat, const index_t *counts, index_t count,
               index_t rows, index_t channels, index_t inner, index_t windows, index_t tail, index_t part,
               int groups, int splits, int width, int fold,
               X_T *dx, index_t dx_stride, X_T *dresidual, index_t dresidual_stride)
{
    constexpr bool GATE = RELU && !KEPT;
    const Tiles tiles = {rows, channels, inner, windows, tail, part, groups, splits, width, fold};

    for (int tile = tiles.count() - 1 - blockIdx.x; tile >= 0; tile -= gridDim.x) {
        Walk walk(tiles, tile);
        Affine maps[LANES];
        Pull pulls[LANES];
        Channels channel(tiles, walk);
        for (int l = 0; walk.steps > 0 && l < LANES; ++l) {
            const index_t c = channel.next(tiles);
            if (GATE) maps[l] = normalizing(c, mean, rstd, gamma, beta);
            const double share = 1.0 / max(counts ? counts[c] : count, index_t(1));
            const ACC_T all_dy = TRAIN ? sum_dy[c] : ACC_T(0), all_dy_xhat = TRAIN ? sum_dy_xhat[c] : ACC_T(0);
            pulls[l] = pull(c, mean, rstd, gamma, all_dy, all_dy_xhat, share);
        }

        while (walk.step < walk.steps) {
            Window window[UNROLL];
            Vector slopes[UNROLL], values[UNROLL];
            Bytes mask[UNROLL];
            unsigned kept[UNROLL];
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                window[u] = walk.next(tiles, dy, dy_stride);
                if (!window[u].any()) continue;
                slopes[u] = load(dy, dy_stride, window[u]);
                if (TRAIN || GATE) values[u] = load(x, x_stride, window[u]);
                if (WHERE) mask[u] = load(where, tiles, window[u]);
                if (KEPT) kept[u] = passed(active, tiles, window[u]);
            }
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                if (!window[u].any()) continue;
                Vector residual;
#pragma unroll
                for (int i = 0; i < VEC; ++i) {
                    const int l = COLUMN ? i : 0;
                    const ACC_T v = TRAIN || GATE ? to_acc(values[u].at[i]) : ACC_T(0);
                    const bool counts_in = !WHERE || mask[u].at[i];
                    const bool open = counts_in && (!RELU || (KEPT ? kept[u] >> i & 1 : passes(maps[l](v))));
                    const ACC_T dz = open ? to_acc(slopes[u].at[i]) : ACC_T(0);
                    residual.at[i] = from_acc(dz);
                    slopes[u].at[i] = from_acc(counts_in ? pulls[l](dz, v) : ACC_T(0));
                }
                store(dx, dx_stride, window[u], slopes[u]);
                if (SPLIT) store(dresidual, dresidual_stride, window[u], residual);
            }
        }
    }
}
