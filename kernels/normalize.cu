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

#include "affine.cuh"
#include "marks.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK, 2)
normalize(const X_T *x, index_t x_stride, const X_T *z, index_t z_stride, const unsigned char *where,
          const double *mean, const double *rstd, const ACC_T *gamma, const ACC_T *beta,
          index_t rows, index_t channels, index_t inner, index_t windows, index_t tail, index_t part,
          int groups, int splits, int width, int fold,
          X_T *y, index_t y_stride, unsigned char *active)
{
    const Tiles tiles = {rows, channels, inner, windows, tail, part, groups, splits, width, fold};

    for (int tile = tiles.count() - 1 - blockIdx.x; tile >= 0; tile -= gridDim.x) {
        Walk walk(tiles, tile);
        Affine maps[LANES];
        Channels channel(tiles, walk);
        for (int l = 0; walk.steps > 0 && l < LANES; ++l)
            maps[l] = normalizing(channel.next(tiles), mean, rstd, gamma, beta);

        while (walk.step < walk.steps) {
            Window window[UNROLL];
            Vector values[UNROLL], added[UNROLL];
            Bytes mask[UNROLL];
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                window[u] = walk.next(tiles, x, x_stride);
                if (!window[u].any()) continue;
                values[u] = load(x, x_stride, window[u]);
                if (ADD) added[u] = load(z, z_stride, window[u]);
                if (WHERE) mask[u] = load(where, tiles, window[u]);
            }
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                if (!window[u].any()) continue;
                unsigned bits = 0;
#pragma unroll
                for (int i = 0; i < VEC; ++i) {
                    ACC_T v = maps[COLUMN ? i : 0](to_acc(values[u].at[i]));
                    if (ADD) v += to_acc(added[u].at[i]);
                    bits |= passes(v) ? 1u << i : 0;
                    if (RELU) v = relu(v);
                    if (WHERE && !mask[u].at[i]) v = 0;
                    values[u].at[i] = from_acc(v);
                }
                store(y, y_stride, window[u], values[u]);
                if (KEPT) keep(active, tiles, window[u], bits);
            }
        }
    }
}
