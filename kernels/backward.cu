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
//   Rounding   a thread sums in ACC_T, at most 32 terms at a time, then in double; threads, blocks and their teams
//              are added in double, in the order of their indices; dx as in input_gradient.cu; dresidual is exact
//   Aliasing   dx may be dy: each element is written by the thread that reads it, after it has read it last
//   Constants  X_TYPE, and those of tiles.cuh, marks.cuh, held.cuh and team.cuh;  TRAIN as in pull.cuh;  RELU (0/1);
//              SPLIT (0/1): write dz too, which is the gradient of the residual

#define TENSORS 2

#include "held.cuh"
#include "pull.cuh"
#include "sums.cuh"
#include "team.cuh"

constexpr bool GATE = RELU && !KEPT;                                    // computed again from x
constexpr int OF_A_LANE = COLUMN ? 1 : VEC;                             // terms of a window in one lane
constexpr int AT_A_TIME = OF_A_LANE < 32 ? 32 / OF_A_LANE : 1;          // windows that are summed in ACC_T

// What a thread needs of each of its channels before the sums are known.
struct Maps {
    Affine hat[LANES] = {}, gate[LANES] = {};

    __device__ Maps(const Tiles &tiles, const Walk &walk, const double *mean, const double *rstd, const ACC_T *gamma,
                    const ACC_T *beta)
    {
        Channels channel(tiles, walk);
        for (int l = 0; walk.steps > 0 && l < LANES; ++l) {
            const index_t c = channel.next(tiles);
            hat[l] = standardizing(c, mean, rstd);
            if (GATE) gate[l] = normalizing(c, mean, rstd, gamma, beta);
        }
    }
};

__device__ inline void settle(Terms (&lanes)[LANES])
{
#pragma unroll
    for (int l = 0; l < LANES; ++l) lanes[l].settle();
}

// Makes dz of dy, element by element.
template <int N>
__device__ void open(const Maps &maps, const Chunk<N> &chunk, Slopes<N> &slopes)
{
#pragma unroll
    for (int u = 0; u < N; ++u) {
        const bool exists = u < chunk.count;
#pragma unroll
        for (int i = 0; i < VEC; ++i) {
            const bool counts = !WHERE || chunk.admitted[u] >> i & 1;
            const bool passed = !RELU || (KEPT ? slopes.passed[u] >> i & 1
                                               : passes(maps.gate[COLUMN ? i : 0](to_acc(chunk.x[u].at[i]))));
            if (exists && !(counts && passed)) slopes.dy[u].at[i] = X_T(0);
        }
    }
}

template <int N>
__device__ void add(Terms (&lanes)[LANES], const Maps &maps, const Chunk<N> &chunk, const Slopes<N> &slopes)
{
#pragma unroll
    for (int u = 0; u < N; ++u) {
        if (u < chunk.count) {
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                const int l = COLUMN ? i : 0;
                if (!ALL && !(chunk.admitted[u] >> i & 1)) continue;
                lanes[l].take(to_acc(slopes.dy[u].at[i]), maps.hat[l](to_acc(chunk.x[u].at[i])));
            }
        }
        if ((u + 1) % AT_A_TIME == 0) settle(lanes);
    }
}

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
        Walk walk(tiles, group, team.rank);
        const Places places(walk, room);
        Terms terms[LANES] = {};
        Chunk<HELD> held = {};
        Slopes<HELD> held_slopes = {};

        // Everything that tells of a window, from global memory.
        const auto take_up = [&](const Window &w, Vector &values, unsigned &counted, Vector &slopes, unsigned &kept) {
            values = load(x, x_stride, w);
            slopes = load(dy, dy_stride, w);
            counted = admitted(where, tiles, w);
            if (KEPT) kept = passed(active, tiles, w);
        };

        for (int k = 0; k < places.kept; ++k) {
            const Window w = walk.next(tiles, x, x_stride);
            shelf.fetch(k, 0, x, x_stride, w);
            shelf.fetch(k, 1, dy, dy_stride, w);
            if (!ALL) shelf.mark(k, 0) = admitted(where, tiles, w);
            if (KEPT) shelf.mark(k, ALL ? 0 : 1) = passed(active, tiles, w);
        }
        {
            const Maps maps(tiles, walk, mean, rstd, gamma, beta);
            for (int left = places.streamed, turn = 0; left > 0; left -= UNROLL) {
                Chunk<UNROLL> chunk = {};
                Slopes<UNROLL> slopes = {};
                chunk.count = min(UNROLL, left);
#pragma unroll
                for (int u = 0; u < UNROLL; ++u)
                    if (u < chunk.count)
                        take_up(walk.next(tiles, x, x_stride), chunk.x[u], chunk.admitted[u], slopes.dy[u],
                                slopes.passed[u]);
                open(maps, chunk, slopes);
                add(terms, maps, chunk, slopes);
                if ((turn += UNROLL) % AT_A_TIME == 0) settle(terms);
            }
            settle(terms);

            held.count = places.held;
#pragma unroll
            for (int u = 0; u < HELD; ++u)
                if (u < held.count)
                    take_up(walk.next(tiles, x, x_stride), held.x[u], held.admitted[u], held_slopes.dy[u],
                            held_slopes.passed[u]);
            open(maps, held, held_slopes);
            add(terms, maps, held, held_slopes);
            settle(terms);
            forget(held.x);
            forget(held_slopes.dy);

            shelf.arrived();
            for (int k = 0, turn = 0; k < places.kept; k += UNROLL) {
                Chunk<UNROLL> chunk = {};
                Slopes<UNROLL> slopes = {};
                chunk.count = min(UNROLL, places.kept - k);
#pragma unroll
                for (int u = 0; u < UNROLL; ++u) {
                    if (u >= chunk.count) continue;
                    chunk.x[u] = shelf.at(k + u, 0);
                    slopes.dy[u] = shelf.at(k + u, 1);
                    if (!ALL) chunk.admitted[u] = shelf.mark(k + u, 0);
                    if (KEPT) slopes.passed[u] = shelf.mark(k + u, ALL ? 0 : 1);
                }
                open(maps, chunk, slopes);
                add(terms, maps, chunk, slopes);
                if ((turn += UNROLL) % AT_A_TIME == 0) settle(terms);
#pragma unroll
                for (int u = 0; u < UNROLL; ++u)
                    if ((RELU || WHERE) && u < chunk.count) shelf.at(k + u, 1) = slopes.dy[u];
            }
            settle(terms);
        }

        Sums own[LANES];
#pragma unroll
        for (int l = 0; l < LANES; ++l) own[l] = terms[l].settled;
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
        Channels channel(tiles, walk);
        for (int l = 0; walk.steps > 0 && l < LANES; ++l) pulls[l] = board.maps[channel.next(tiles) - first];

        // Back from the last window to the first; dy is dz by now.
        const auto give_out = [&](const Window (&window)[UNROLL], Chunk<UNROLL> &chunk, const Slopes<UNROLL> &slopes) {
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                if (!window[u].any()) continue;
#pragma unroll
                for (int i = 0; i < VEC; ++i) {
                    const bool counts = !WHERE || chunk.admitted[u] >> i & 1;
                    const ACC_T v = pulls[COLUMN ? i : 0](to_acc(slopes.dy[u].at[i]), to_acc(chunk.x[u].at[i]));
                    chunk.x[u].at[i] = from_acc(counts ? v : ACC_T(0));
                }
                store(dx, dx_stride, window[u], chunk.x[u]);
                if (SPLIT) store(dresidual, dresidual_stride, window[u], slopes.dy[u]);
            }
        };
#pragma unroll
        for (int base = HELD - UNROLL; base >= 0; base -= UNROLL) {
            Window window[UNROLL];
            Chunk<UNROLL> chunk = {};
            Slopes<UNROLL> slopes = {};
#pragma unroll
            for (int u = UNROLL - 1; u >= 0; --u) {
                window[u] = Window{};
                if (base + u >= places.held) continue;
                window[u] = walk.back(tiles, x, x_stride);
                chunk.x[u] = held.x[base + u];
                chunk.admitted[u] = held.admitted[base + u];
                slopes.dy[u] = held_slopes.dy[base + u];
            }
            give_out(window, chunk, slopes);
        }
        if (places.streamed > 0) {
            const Maps maps(tiles, walk, mean, rstd, gamma, beta);
            for (int left = places.streamed; left > 0; left -= UNROLL) {
                Window window[UNROLL];
                Chunk<UNROLL> chunk = {};
                Slopes<UNROLL> slopes = {};
                chunk.count = min(UNROLL, left);
#pragma unroll
                for (int u = 0; u < UNROLL; ++u) {
                    window[u] = Window{};
                    if (u >= left) continue;
                    window[u] = walk.back(tiles, x, x_stride);
                    take_up(window[u], chunk.x[u], chunk.admitted[u], slopes.dy[u], slopes.passed[u]);
                }
                open(maps, chunk, slopes);
                give_out(window, chunk, slopes);
            }
        }
        for (int k = places.kept; k > 0; k -= UNROLL) {
            Window window[UNROLL];
            Chunk<UNROLL> chunk = {};
            Slopes<UNROLL> slopes = {};
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                window[u] = Window{};
                if (u >= k) continue;
                window[u] = walk.back(tiles, x, x_stride);
                chunk.x[u] = shelf.at(k - 1 - u, 0);
                slopes.dy[u] = shelf.at(k - 1 - u, 1);
                if (!ALL) chunk.admitted[u] = shelf.mark(k - 1 - u, 0);
            }
            give_out(window, chunk, slopes);
        }
        ++team.round;
    }
    team.part();
}
