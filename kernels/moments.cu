// moments.cu: count, mean and sum of squared distances of each channel, and what divides by its deviation.
//
//     mean[c] = sum x / M,    m2[c] = sum (x - mean)^2,    rstd[c] = (m2 / M + eps)^-1/2
//
//   Shapes     x (outer, channels, inner) X_T, `x_stride` elements from row to row      where  the same, dense, bytes
//              mean, m2, rstd (channels,) double; rstd may be null      count (channels,), with WHERE only
//   Launch     moments_plan: 1-D grid of any size, each block takes whole tiles
//   Traffic    one read of x, one of where; partials only where a channel is spread over several tiles; for double,
//              a first sample of the channel once more for every lane of every thread
//   Rounding   a thread sums x - pivot and its square in ACC_T, at most 32 at a time, then in double; the pivot is
//              the mean of its own first samples, so that a constant leaves exact zeros and a large mean costs no
//              digit; threads and blocks are merged by unite()
//   Range      float: squares of x - pivot must stay in float's range, so distances between 1e-18 and 1e18
//   Constants  X_TYPE, and those of tiles.cuh;  WHERE (0/1): leave out elements whose byte is 0

#define KEPT 0

#include "samples.cuh"
#include "union.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
moments(const X_T *x, index_t x_stride, const unsigned char *where, double eps,
        index_t rows, index_t channels, index_t inner, index_t windows, index_t tail, index_t part,
        int groups, int splits, int width, int fold,
        Moments *partials, unsigned *arrivals, double *mean, double *m2, double *rstd, index_t *count)
{
    __shared__ __align__(16) Moments sets[BLOCK * LANES];
    const Tiles tiles = {rows, channels, inner, windows, tail, part, groups, splits, width, fold};

    for (int tile = blockIdx.x; tile < tiles.count(); tile += gridDim.x) {
        Walk<FORTH> walk(tiles, tile, x, x_stride);
        Source from(x, x_stride, tiles, walk);
        Index index = dense_index(tiles, walk);
        Samples samples[LANES] = {};

        in_chunks(walk.steps, [&](int first, auto &chunk) {
#pragma unroll
            for (int u = 0; u < chunk.WINDOWS; ++u) {
                const Window w = walk.here();
                chunk.x[u] = load(from.at, w);
                chunk.admitted[u] = admitted(where, index.at, w);
                walk.next(from, index);
            }
            take_in(samples, chunk, first, true);
        });
        settle(samples);

        Channels channel(tiles, walk.group);
        for (int l = 0; l < LANES; ++l) {
            const index_t c = channel.next(tiles);
            if (ALL) samples[l].count = walk.steps * OF_A_LANE;
            sets[l * BLOCK + threadIdx.x] =
                samples[l].count ? samples[l].moments(origin(x, where, c * inner)) : Moments{};
        }
        merge(tiles, walk, sets, partials, arrivals, [&](index_t c, const Moments &all) {
            mean[c] = origin(x, where, c * inner) + all.mean;
            m2[c] = all.m2;
            if (rstd) rstd[c] = reciprocal_deviation(all, eps);
            if (WHERE) count[c] = all.count;
        });
    }
}
