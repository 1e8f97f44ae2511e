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
//   Rounding   x - mean and two fmas in ACC_T, then one rounding to X_T; dresidual is exact
//   Aliasing   dx may be dy: each element is read, then written, by the same thread
//   Constants  X_TYPE, and those of tiles.cuh;  TRAIN (0/1): 0 takes the statistics as constants, so that
//              dx = gamma * rstd * dz;  RELU, KEPT, WHERE as in gradient_sums.cu;  SPLIT (0/1): write dz too, which
//              is the gradient of the residual

#include "pull.cuh"
#include "sums.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
input_gradient(const X_T *dy, index_t dy_stride, const X_T *x, index_t x_stride, const unsigned char *where,
               const unsigned char *active, const double *mean, const double *rstd, const ACC_T *gamma,
               const ACC_T *beta, const ACC_T *sum_dy, const ACC_T *sum_dy_xhat, const index_t *counts, index_t count,
               index_t rows, index_t channels, index_t inner, index_t windows, index_t tail, index_t part,
               int groups, int splits, int width, int fold,
               X_T *dx, index_t dx_stride, X_T *dresidual, index_t dresidual_stride)
{
    const Tiles tiles = {rows, channels, inner, windows, tail, part, groups, splits, width, fold};

    for (int tile = tiles.count() - 1 - blockIdx.x; tile >= 0; tile -= gridDim.x) {
        Walk<FORTH> walk(tiles, tile, dy, dy_stride);
        Source values(x, x_stride, tiles, walk), slopes(dy, dy_stride, tiles, walk);
        Target to(dx, dx_stride, tiles, walk), split(dresidual, dresidual_stride, tiles, walk);
        Index index = dense_index(tiles, walk);
        const Maps maps(tiles, walk.group, walk.steps, mean, rstd, gamma, beta);
        Pull pulls[LANES];
        Channels channel(tiles, walk.group);
        for (int l = 0; l < LANES; ++l) {
            const index_t c = walk.steps > 0 ? channel.next(tiles) : 0;
            const double share = 1.0 / max(counts ? counts[c] : count, index_t(1));
            const ACC_T all_dy = TRAIN ? sum_dy[c] : ACC_T(0), all_dy_xhat = TRAIN ? sum_dy_xhat[c] : ACC_T(0);
            pulls[l] = pull(c, mean, rstd, gamma, all_dy, all_dy_xhat, share);
        }

        in_chunks(walk.steps, [&](int, auto &chunk) {
#pragma unroll
            for (int u = 0; u < chunk.WINDOWS; ++u) {
                const Window w = chunk.window[u] = walk.here();
                chunk.other[u] = load(slopes.at, w);
                if (TRAIN || GATE) chunk.x[u] = load(values.at, w);
                chunk.admitted[u] = admitted(where, index.at, w);
                if (KEPT) chunk.open[u] = passed(active, index.at, w);
                chunk.move[u] = walk.next(values, slopes, index);
            }
            open(maps, chunk, chunk.WINDOWS);
            give_out(pulls, chunk, always, to, split);
        });
    }
}
