// forward.cu: moments and normalize in one launch, which reads x once where a team of blocks can hold it.
//
//     mean[c] = sum x / M,    m2[c] = sum (x - mean)^2,    rstd[c] = (m2 / M + eps)^-1/2
//     y[o,c,i] = act( gamma[c] * rstd[c] * (x[o,c,i] - mean[c]) + beta[c] + z[o,c,i] )
//
//   Shapes     x, z, y (outer, channels, inner) X_T, each with a stride of its own from row to row
//              where  the shape of x, dense, bytes      active  as in marks.cuh
//              mean, m2, rstd (channels,) double      count (channels,), with WHERE only
//              gamma, beta (channels,) ACC_T, or null for 1 and 0
//              running_mean, running_var, new_mean, new_var (channels,) ACC_T, or all null
//   Launch     forward_plan: team.cuh says how many blocks share a group of channels; such a team takes group after group
//   Traffic    one read of x for what is held, two for what is streamed; one of z when ADD; of where as of x; one
//              write of y, of active when KEPT.  Partial results of a GRID_TEAM go through global memory
//   In flight  a block asks for all that it will hold before it uses any: for 256 threads with 16 windows 64 KB from
//              registers alone, where some 26 KB for each processor keep the memory of an H100 busy
//   Rounding   a thread's pivot is the mean of some of the first windows that it has at a time; it sums x - pivot and
//              its square in ACC_T, at most 32 at a time, then in double: a second pass over resident samples.  A
//              constant leaves exact zeros, a large mean costs no digit.  Threads, blocks and their teams are merged
//              by unite(), in the order of their indices
//   Range      float: squares of x - pivot must stay in float's range, so distances between 1e-18 and 1e18
//   Aliasing   y may be z: each element is read, then written, by the same thread
//   Constants  X_TYPE, and those of tiles.cuh, marks.cuh, held.cuh and team.cuh;  ADD, RELU (0/1)

#define TENSORS 1

#include "held.cuh"
#include "output.cuh"
#include "samples.cuh"
#include "team.cuh"

extern "C" __global__ void CLUSTERED __launch_bounds__(BLOCK, 2)
forward(const X_T *x, index_t x_stride, const X_T *z, index_t z_stride, const unsigned char *where,
        const ACC_T *gamma, const ACC_T *beta, double eps,
        const ACC_T *running_mean, const ACC_T *running_var, double weight,
        index_t rows, index_t channels, index_t inner, index_t windows, index_t tail, index_t part,
        int groups, int splits, int width, int fold, int room,
        Moments *partials, unsigned *barriers,
        X_T *y, index_t y_stride, unsigned char *active, double *mean, double *m2, double *rstd, index_t *count,
        ACC_T *new_mean, ACC_T *new_var)
{
    __shared__ __align__(16) Moments scratch[COLUMN ? BLOCK * LANES : BLOCK / WARP];
    const Tiles tiles = {rows, channels, inner, windows, tail, part, groups, splits, width, fold};
    const Board<Moments, Affine> board(tiles);
    const Shelf shelf = {board.end, room};
    Team team(tiles, barriers);

    for (int group = team.number; group < tiles.groups; group += team.count) {
        Walk<FORTH> walk(tiles, group, team.rank, x, x_stride);
        Source from(x, x_stride, tiles, walk);
        Index index = dense_index(tiles, walk);
        const Places places(walk.steps, room);
        Samples samples[LANES] = {};

        for (int k = 0; k < places.kept; ++k) {
            shelf.fetch(k, 0, from.at, walk.here());
            if (!ALL) shelf.mark(k, 0) = admitted(where, index.at, walk.here());
            walk.next(from, index);
        }
        const auto read = [&](auto &chunk, int count) {
#pragma unroll
            for (int u = 0; u < chunk.WINDOWS; ++u) {
                if (u >= count) continue;
                chunk.x[u] = load(from.at, walk.here());
                chunk.admitted[u] = admitted(where, index.at, walk.here());
                walk.next(from, index);
            }
        };
        in_chunks(places.streamed, [&](int first, auto &chunk) {
            read(chunk, chunk.WINDOWS);
            take_in(samples, chunk, first, true);
        });
        settle(samples);

        Chunk<HELD> held = {};
        read(held, places.held);
        if (ALL ? places.streamed == 0 : without_pivot(samples)) choose_pivots(samples, held, places.held);
        forget(held.x);
        add(samples, held, places.held);
        settle(samples);
        forget(held.x);

        shelf.arrived();
        in_chunks(places.kept, [&](int first, auto &chunk) {
#pragma unroll
            for (int u = 0; u < chunk.WINDOWS; ++u) {
                chunk.x[u] = shelf.at(first + u, 0);
                if (!ALL) chunk.admitted[u] = shelf.mark(first + u, 0);
            }
            take_in(samples, chunk, first, false);
        });
        settle(samples);

        Moments own[LANES];
        Channels channel(tiles, group);
#pragma unroll
        for (int l = 0; l < LANES; ++l) {
            const index_t c = channel.next(tiles);
            if (ALL) samples[l].count = walk.steps * OF_A_LANE;
            own[l] = samples[l].count ? samples[l].moments(origin(x, where, c * inner)) : Moments{};
        }
        const index_t first = board.first(tiles, group);
        consult(tiles, team, group, own, scratch, board.sets, partials, [&](int i, const Moments &all) {
            const index_t c = first + i;
            const double centre = origin(x, where, c * inner) + all.mean;
            const double deviation = reciprocal_deviation(all, eps);
            board.maps[i] = normalizing(c, centre, deviation, gamma, beta);
            if (team.rank > 0) return;
            mean[c] = centre;
            m2[c] = all.m2;
            rstd[c] = deviation;
            if (WHERE) count[c] = all.count;
            if (!new_mean) return;
            const bool enough = all.count > 1;  // else there is no unbiased variance
            const ACC_T share = enough ? ACC_T(weight) : ACC_T(0), rest = enough ? ACC_T(1 - weight) : ACC_T(1);
            new_mean[c] = rest * running_mean[c] + (enough ? share * ACC_T(centre) : ACC_T(0));
            new_var[c] = rest * running_var[c] + (enough ? share * ACC_T(all.m2 / (all.count - 1)) : ACC_T(0));
        });

        Affine maps[LANES] = {};
        Channels again(tiles, group);
        for (int l = 0; walk.steps > 0 && l < LANES; ++l) maps[l] = board.maps[again.next(tiles) - first];

        // Back from the last window to the first; refill() gets window u of a chunk from where it is.
        Walk<BACK> back(tiles, group, team.rank, x, x_stride);
        Source source(x, x_stride, tiles, back), residual(z, z_stride, tiles, back);
        Target to(y, y_stride, tiles, back);
        Index read_back = dense_index(tiles, back), written = read_back;
        const auto go_back = [&](auto &chunk, auto exists, auto refill) {
#pragma unroll
            for (int u = 0; u < chunk.WINDOWS; ++u) {
                if (!exists(u)) continue;
                chunk.window[u] = back.here();
                refill(chunk, u);
                if (ADD) chunk.other[u] = load(residual.at, chunk.window[u]);
                chunk.move[u] = back.next(source, residual, read_back);
            }
            give_out(maps, chunk, exists, to, active, written);
        };
#pragma unroll
        for (int end = HELD; end > 0; end -= UNROLL) {
            Chunk<UNROLL> chunk;
            go_back(chunk, [&](int u) { return end - 1 - u < places.held; }, [&](auto &chunk, int u) {
                chunk.x[u] = held.x[end - 1 - u];
                chunk.admitted[u] = held.admitted[end - 1 - u];
            });
        }
        in_chunks(places.streamed, [&](int, auto &chunk) {
            go_back(chunk, always, [&](auto &chunk, int u) {
                chunk.x[u] = load(source.at, chunk.window[u]);
                chunk.admitted[u] = admitted(where, read_back.at, chunk.window[u]);
            });
        });
        in_chunks(places.kept, [&](int first, auto &chunk) {
            go_back(chunk, always, [&](auto &chunk, int u) {
                const int k = places.kept - 1 - first - u;
                chunk.x[u] = shelf.at(k, 0);
                if (!ALL) chunk.admitted[u] = shelf.mark(k, 0);
            });
        });
        ++team.round;
    }
    team.part();
}
