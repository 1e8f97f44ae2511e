// normalize.cu: the last step of the forward pass, and the whole of inference.
//
//     y[o,c,i] = act( gamma[c] * rstd[c] * (x[o,c,i] - mean[c]) + beta[c] + z[o,c,i] )
//
//   Shapes     x, z, y (outer, channels, inner) X_T, each with a stride of its own from row to row
//              mean, rstd (channels,) double      gamma, beta (channels,) ACC_T, or null for 1 and 0
//              where  the shape of x, dense, bytes      active  as in marks.cuh
//   Launch     normalize_plan: 1-D grid of any size, each block takes whole tiles, the last ones first, because
//              they are what the second-level cache still holds of the x that moments has read
//   Traffic    one read of x, of z when ADD, of where when WHERE; one write of y, of active when KEPT
//   Rounding   x - mean once, then one fma and at most one add in ACC_T, then one rounding to X_T
//   Aliasing   y may be x or z: each element is read, then written, by the same thread
//   Constants  X_TYPE, and those of tiles.cuh;  ADD, RELU, WHERE (0/1): y is 0 where the byte of where is 0;
//              KEPT (0, 1, 2): active keeps where the activation let z pass; marks.cuh

#include "output.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
normalize(const X_T *x, index_t x_stride, const X_T *z, index_t z_stride, const unsigned char *where,
          const double *mean, const double *rstd, const ACC_T *gamma, const ACC_T *beta,
          index_t rows, index_t channels, index_t inner, index_t windows, index_t tail, index_t part,
          int groups, int splits, int width, int fold,
          X_T *y, index_t y_stride, unsigned char *active)
{
    const Tiles tiles = {rows, channels, inner, windows, tail, part, groups, splits, width, fold};

    for (int tile = tiles.count() - 1 - blockIdx.x; tile >= 0; tile -= gridDim.x) {
        Walk<FORTH> walk(tiles, tile, x, x_stride);
        Source from(x, x_stride, tiles, walk), residual(z, z_stride, tiles, walk);
        Target to(y, y_stride, tiles, walk);
        Index read = dense_index(tiles, walk), written = read;
        Affine maps[LANES];
        Channels channel(tiles, walk.group);
        for (int l = 0; l < LANES; ++l)
            maps[l] = normalizing(walk.steps > 0 ? channel.next(tiles) : 0, mean, rstd, gamma, beta);

        in_chunks(walk.steps, [&](int, auto &chunk) {
#pragma unroll
            for (int u = 0; u < chunk.WINDOWS; ++u) {
                const Window w = chunk.window[u] = walk.here();
                chunk.x[u] = load(from.at, w);
                if (ADD) chunk.other[u] = load(residual.at, w);
                chunk.admitted[u] = admitted(where, read.at, w);
                chunk.move[u] = walk.next(from, residual, read);
            }
            give_out(maps, chunk, always, to, active, written);
        });
    }
}
