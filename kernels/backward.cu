// backward.cu: gradient_sums and input_gradient in one launch, which reads x and dy once where a team of blocks can
// hold them.
//
//     sum_dy[c] = sum dz,    sum_dy_xhat[c] = sum dz * xhat,    xhat = (x - mean) * rstd,
//     dx[o,c,i] = gamma[c] * rstd[c] * (dz - sum_dy[c] / M - xhat * sum_dy_xhat[c] / M),
//     dz = dy where the activation let it pass, else 0
//
//   Shapes     dy, x, dx, dresidual (outer, channels, inner) X_T, each with a stride of its own from row to row
//              mean, rstd (channels,) double      gamma, beta (channels,) ACC_T, or null for 1 and 0
//              where  the shape of x, dense, bytes      active  as in marks.cuh
//              sum_dy, sum_dy_xhat (channels,) ACC_T
//              counts (channels,), or null where every channel has `count` samples
//   Launch     backward_plan: team.cuh says how many blocks share a group of channels; such a team takes group after group
//   Traffic    one read of dy and of x for what is held, two for what is streamed; of where and of active likewise;
//              one write of dx, of dresidual when SPLIT.  Partial results of a GRID_TEAM go through global memory
//   In flight  as in forward.cu, two tensors at a time
//   Rounding   as in gradient_sums.cu and input_gradient.cu; the sums of blocks and their teams are added in double, in
//              the order of their indices; dresidual is exact
//   Range      as in gradient_sums.cu
//   Aliasing   dx may be dy: each element is written by the thread that reads it, after it has read it last
//   Constants  X_TYPE, and those of tiles.cuh, marks.cuh, held.cuh and team.cuh;  TRAIN as in pull.cuh;  RELU (0/1);
//              SPLIT (0/1): write dz too, which is the gradient of the residual

#define TENSORS 2

#include "held.cuh"
#include "pull.cuh"
#include "sums.cuh"
#include "team.cuh"

extern "C" __global__ void CLUSTERED __launch_bounds__(BLOCK, 2)
backward(const X_T *dy, index_t dy_stride, const X_T *x, index_t x_stride, const unsigned char *where,
         const unsigned char *active, const double *mean, const double *rstd, const ACC_T *gamma, const ACC_T *beta,
         const index_t *counts, index_t count,
         index_t rows, index_t channels, index_t inner, index_t windows, index_t tail, index_t part,
         int groups, int splits, int width, int fold, int room,
         Sums *partials, unsigned *barriers,
         X_T *dx, index_t dx_stride, X_T *dresidual, index_t dresidual_stride, ACC_T *sum_dy, ACC_T *sum_dy_xhat)
{
    __shared__ __align__(16) Sums scratch[COLUMN ? BLOCK * LANES : BLOCK / WARP];
    const Tiles tiles = {rows, channels, inner, windows, tail, part, groups, splits, width, fold};
    const Board<Sums, Pull> board(tiles);
    const Shelf shelf = {board.end, room};
    Team team(tiles, barriers);

    for (int group = team.number; group < tiles.groups; group += team.count) {
        Walk<FORTH> walk(tiles, group, team.rank, x, x_stride);
        Source values(x, x_stride, tiles, walk), slopes(dy, dy_stride, tiles, walk);
        Index index = dense_index(tiles, walk);
        const Places places(walk.steps, room);
        Terms terms[LANES] = {};
        Chunk<HELD> held = {};

        for (int k = 0; k < places.kept; ++k) {
            const Window w = walk.here();
            shelf.fetch(k, 0, values.at, w);
            shelf.fetch(k, 1, slopes.at, w);
            if (!ALL) shelf.mark(k, 0) = admitted(where, index.at, w);
            if (KEPT) shelf.mark(k, ALL ? 0 : 1) = passed(active, index.at, w);
            walk.next(values, slopes, index);
        }
        // Everything that tells of a window, from global memory.
        const auto read = [&](auto &chunk, int u, const Window &w, const Source &values, const Source &slopes,
                              const Index &index) {
            chunk.x[u] = load(values.at, w);
            chunk.other[u] = load(slopes.at, w);
            chunk.admitted[u] = admitted(where, index.at, w);
            if (KEPT) chunk.open[u] = passed(active, index.at, w);
        };
        const auto read_on = [&](auto &chunk, int count) {
#pragma unroll
            for (int u = 0; u < chunk.WINDOWS; ++u) {
                if (u >= count) continue;
                read(chunk, u, walk.here(), values, slopes, index);
                walk.next(values, slopes, index);
            }
        };
        {
            const Maps maps(tiles, group, walk.steps, mean, rstd, gamma, beta);
            in_chunks(places.streamed, [&](int first, auto &chunk) {
                read_on(chunk, chunk.WINDOWS);
                open(maps, chunk, chunk.WINDOWS);
                take_in(terms, maps, chunk, first);
            });
            settle(terms);

            read_on(held, places.held);
            open(maps, held, places.held);
            add(terms, maps, held, places.held);
            settle(terms);
            forget(held.x);
            forget(held.other);

            shelf.arrived();
            in_chunks(places.kept, [&](int first, auto &chunk) {
#pragma unroll
                for (int u = 0; u < chunk.WINDOWS; ++u) {
                    chunk.x[u] = shelf.at(first + u, 0);
                    chunk.other[u] = shelf.at(first + u, 1);
                    if (!ALL) chunk.admitted[u] = shelf.mark(first + u, 0);
                    if (KEPT) chunk.open[u] = shelf.mark(first + u, ALL ? 0 : 1);
                }
                open(maps, chunk, chunk.WINDOWS);
                take_in(terms, maps, chunk, first);
#pragma unroll
                for (int u = 0; u < chunk.WINDOWS; ++u)
                    if (RELU || WHERE) shelf.at(first + u, 1) = chunk.other[u];
            });
            settle(terms);
        }

        Sums own[LANES];
        Channels channel(tiles, group);
#pragma unroll
        for (int l = 0; l < LANES; ++l) {
            const index_t c = channel.next(tiles);
            own[l] = terms[l].sums(mean[c], rstd[c]);
        }
        const index_t first = board.first(tiles, group);
        consult(tiles, team, group, own, scratch, board.sets, partials, [&](int i, const Sums &all) {
            const index_t c = first + i;
            const double share = 1.0 / max(counts ? counts[c] : count, index_t(1));
            board.maps[i] = pull(c, mean, rstd, gamma, all.dy, all.dy_xhat, share);
            if (team.rank > 0) return;
            sum_dy[c] = narrow(all.dy);
            sum_dy_xhat[c] = narrow(all.dy_xhat);
        });

        Pull pulls[LANES] = {};
        Channels again(tiles, group);
        for (int l = 0; walk.steps > 0 && l < LANES; ++l) pulls[l] = board.maps[again.next(tiles) - first];

        // Back from the last window to the first; refill() gets window u of a chunk, with dz, from where it is.
        Walk<BACK> back(tiles, group, team.rank, x, x_stride);
        Source values_back(x, x_stride, tiles, back), slopes_back(dy, dy_stride, tiles, back);
        Target to(dx, dx_stride, tiles, back), split(dresidual, dresidual_stride, tiles, back);
        Index index_back = dense_index(tiles, back);
        const auto go_back = [&](auto &chunk, auto exists, auto refill) {
#pragma unroll
            for (int u = 0; u < chunk.WINDOWS; ++u) {
                if (!exists(u)) continue;
                chunk.window[u] = back.here();
                refill(chunk, u);
                chunk.move[u] = back.next(values_back, slopes_back, index_back);
            }
        };
#pragma unroll
        for (int end = HELD; end > 0; end -= UNROLL) {
            Chunk<UNROLL> chunk;
            const auto exists = [&](int u) { return end - 1 - u < places.held; };
            go_back(chunk, exists, [&](auto &chunk, int u) {
                chunk.x[u] = held.x[end - 1 - u];
                chunk.other[u] = held.other[end - 1 - u];
                chunk.admitted[u] = held.admitted[end - 1 - u];
            });
            give_out(pulls, chunk, exists, to, split);
        }
        if (places.streamed > 0) {
            const Maps maps(tiles, group, walk.steps, mean, rstd, gamma, beta);
            in_chunks(places.streamed, [&](int, auto &chunk) {
                go_back(chunk, always, [&](auto &chunk, int u) {
                    read(chunk, u, chunk.window[u], values_back, slopes_back, index_back);
                });
                open(maps, chunk, chunk.WINDOWS);
                give_out(pulls, chunk, always, to, split);
            });
        }
        in_chunks(places.kept, [&](int first, auto &chunk) {
            go_back(chunk, always, [&](auto &chunk, int u) {
                const int k = places.kept - 1 - first - u;
                chunk.x[u] = shelf.at(k, 0);
                chunk.other[u] = shelf.at(k, 1);
                if (!ALL) chunk.admitted[u] = shelf.mark(k, 0);
            });
            give_out(pulls, chunk, always, to, split);
        });
        ++team.round;
    }
    team.part();
}
