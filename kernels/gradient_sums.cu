// gradient_sums.cu: the two sums over each channel that its gradients need; they are dbeta and dgamma.
//
//     sum_dy[c] = sum dz,    sum_dy_xhat[c] = sum dz * xhat,    xhat = (x - mean) * rstd,
//     dz = dy where the activation let it pass, else 0
//
//   Shapes     dy, x (outer, channels, inner) X_T, each with a stride of its own from row to row
//              mean, rstd (channels,) double      gamma, beta (channels,) ACC_T, or null for 1 and 0
//              where  the shape of x, dense, bytes      active  as in marks.cuh
//              sum_dy, sum_dy_xhat (channels,) ACC_T
//   Launch     gradient_sums_plan: 1-D grid of any size, each block takes whole tiles
//   Traffic    one read of dy and of x, of where when WHERE, of active when KEPT; partials only where a channel is
//              spread over several tiles
//   Rounding   a thread sums dz and dz * (x - mean) in ACC_T, at most 32 terms at a time, then in double; threads and
//              blocks are added in double, in the order of their indices
//   Range      float: dz * (x - mean) must stay in float's range
//   Constants  X_TYPE, and those of tiles.cuh;  WHERE (0/1): leave out elements whose byte is 0;  RELU (0/1);
//              KEPT (0, 1, 2): read from active where ReLU let z pass, rather than compute it again from x; marks.cuh

#include "sums.cuh"
#include "union.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
gradient_sums(const X_T *dy, index_t dy_stride, const X_T *x, index_t x_stride, const unsigned char *where,
              const unsigned char *active, const double *mean, const double *rstd, const ACC_T *gamma,
              const ACC_T *beta,
              index_t rows, index_t channels, index_t inner, index_t windows, index_t tail, index_t part,
              int groups, int splits, int width, int fold,
              Sums *partials, unsigned *arrivals, ACC_T *sum_dy, ACC_T *sum_dy_xhat)
{
    __shared__ __align__(16) Sums sets[BLOCK * LANES];
    const Tiles tiles = {rows, channels, inner, windows, tail, part, groups, splits, width, fold};

    for (int tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
        Walk<FORTH> walk(tiles, tile, x, x_stride);
        Source values(x, x_stride, tiles, walk), slopes(dy, dy_stride, tiles, walk);
        Index index = dense_index(tiles, walk);
        Terms terms[LANES] = {};
        const Maps maps(tiles, walk.group, walk.steps, mean, rstd, gamma, beta);

        in_chunks(walk.steps, [&](int first, auto &chunk) {
#pragma unroll
            for (int u = 0; u < chunk.WINDOWS; ++u) {
                const Window w = walk.here();
                chunk.x[u] = load(values.at, w);
                chunk.other[u] = load(slopes.at, w);
                chunk.admitted[u] = admitted(where, index.at, w);
                if (KEPT) chunk.open[u] = passed(active, index.at, w);
                walk.next(values, slopes, index);
            }
            open(maps, chunk, chunk.WINDOWS);
            take_in(terms, maps, chunk, first);
        });
        settle(terms);

        Channels channel(tiles, walk.group);
        for (int l = 0; l < LANES; ++l) {
            const index_t c = channel.next(tiles);
            sets[l * BLOCK + threadIdx.x] = terms[l].sums(mean[c], rstd[c]);
        }
        merge(tiles, walk, sets, partials, arrivals, [&](index_t c, const Sums &all) {
            sum_dy[c] = narrow(all.dy);
            sum_dy_xhat[c] = narrow(all.dy_xhat);
        });
    }
}
