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
//   Rounding   a thread's pivot is the mean of the first windows that it has at a time; it sums x - pivot and its
//              square in ACC_T, at most 32 at a time, then in double.  Of a thread that holds all of its windows in
//              registers these are two passes over its samples.  A constant leaves exact zeros, a large mean costs
//              no digit.  Threads, blocks and their teams are merged by unite(), in the order of their indices
//   Range      float: squares of x - pivot must stay in float's range, so distances between 1e-18 and 1e18
//   Aliasing   y may be z: each element is read, then written, by the same thread
//   Constants  X_TYPE, and those of tiles.cuh, marks.cuh, held.cuh and team.cuh;  ADD, RELU (0/1)

#define TENSORS 1

#include "affine.cuh"
#include "held.cuh"
#include "samples.cuh"
#include "team.cuh"

constexpr int OF_A_LANE = COLUMN ? 1 : VEC;                             // samples of a window in one lane
constexpr int AT_A_TIME = OF_A_LANE < 32 ? 32 / OF_A_LANE : 1;          // windows that are summed in ACC_T

__device__ inline void settle(Samples (&lanes)[LANES])
{
#pragma unroll
    for (int l = 0; l < LANES; ++l) lanes[l].settle();
}

// Gives every lane that has no sample yet the mean of what this chunk has for it as its pivot.
template <int N>
__device__ void choose_pivots(Samples (&lanes)[LANES], const Chunk<N> &chunk)
{
#pragma unroll
    for (int l = 0; l < LANES; ++l) {
        ACC_T first = 0, sum = 0;
        int found = 0;
#pragma unroll
        for (int u = 0; u < N; ++u) {
            if (u >= chunk.count) continue;
#pragma unroll
            for (int i = 0; i < OF_A_LANE; ++i) {
                const int at = COLUMN ? l : i;
                if (!ALL && !(chunk.admitted[u] >> at & 1)) continue;
                const ACC_T v = to_acc(chunk.x[u].at[at]);
                if (ALL ? u + i == 0 : found == 0) first = v;
                sum += v - first;
                ++found;
            }
        }
        if (ALL || lanes[l].count == 0) lanes[l].pivot = sum == 0 ? first : first + sum / ACC_T(found);
    }
}

template <int N>
__device__ void add(Samples (&lanes)[LANES], const Chunk<N> &chunk)
{
#pragma unroll
    for (int u = 0; u < N; ++u) {
        if (u < chunk.count) {
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                Samples &lane = lanes[COLUMN ? i : 0];
                if (!ALL && !(chunk.admitted[u] >> i & 1)) continue;
                lane.take(to_acc(chunk.x[u].at[i]), false);
                if (!ALL) ++lane.count;
            }
        }
        if ((u + 1) % AT_A_TIME == 0) settle(lanes);
    }
}

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
        Walk walk(tiles, group, team.rank);
        const Places places(walk, room);
        Samples samples[LANES] = {};

        for (int k = 0; k < places.kept; ++k) {
            const Window w = walk.next(tiles, x, x_stride);
            shelf.fetch(k, 0, x, x_stride, w);
            if (!ALL) shelf.mark(k, 0) = admitted(where, tiles, w);
        }
#pragma unroll 1
        for (int left = places.streamed, turn = 0; left > 0; left -= UNROLL) {
            Chunk<UNROLL> chunk = {};
            chunk.count = min(UNROLL, left);
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                if (u >= chunk.count) continue;
                const Window w = walk.next(tiles, x, x_stride);
                chunk.x[u] = load(x, x_stride, w);
                chunk.admitted[u] = admitted(where, tiles, w);
            }
            if (!ALL || left == places.streamed) choose_pivots(samples, chunk);
            add(samples, chunk);
            if ((turn += UNROLL) % AT_A_TIME == 0) settle(samples);
        }
        settle(samples);

        Chunk<HELD> held = {};
        held.count = places.held;
#pragma unroll
        for (int u = 0; u < HELD; ++u) {
            if (u >= held.count) continue;
            const Window w = walk.next(tiles, x, x_stride);
            held.x[u] = load(x, x_stride, w);
            held.admitted[u] = admitted(where, tiles, w);
        }
        if (!ALL || places.streamed == 0) choose_pivots(samples, held);
        forget(held.x);
        add(samples, held);
        settle(samples);
        forget(held.x);

        shelf.arrived();
#pragma unroll 1
        for (int k = 0, turn = 0; k < places.kept; k += UNROLL) {
            Chunk<UNROLL> chunk = {};
            chunk.count = min(UNROLL, places.kept - k);
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                if (u >= chunk.count) continue;
                chunk.x[u] = shelf.at(k + u, 0);
                if (!ALL) chunk.admitted[u] = shelf.mark(k + u, 0);
            }
            if (!ALL) choose_pivots(samples, chunk);
            add(samples, chunk);
            if ((turn += UNROLL) % AT_A_TIME == 0) settle(samples);
        }
        settle(samples);

        Moments own[LANES];
        Channels channel(tiles, walk);
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
        Channels again(tiles, walk);
        for (int l = 0; walk.steps > 0 && l < LANES; ++l) maps[l] = board.maps[again.next(tiles) - first];

        // Back from the last window to the first.
        const auto give_out = [&](const Window (&window)[UNROLL], Chunk<UNROLL> &chunk) {
            Vector added[UNROLL] = {};
#pragma unroll
            for (int u = 0; u < UNROLL; ++u)
                if (ADD && window[u].any()) added[u] = load(z, z_stride, window[u]);
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                if (!window[u].any()) continue;
                unsigned open = 0;
#pragma unroll
                for (int i = 0; i < VEC; ++i) {
                    ACC_T v = maps[COLUMN ? i : 0](to_acc(chunk.x[u].at[i]));
                    if (ADD) v += to_acc(added[u].at[i]);
                    open |= passes(v) ? 1u << i : 0;
                    if (RELU) v = relu(v);
                    if (WHERE && !(chunk.admitted[u] >> i & 1)) v = 0;
                    chunk.x[u].at[i] = from_acc(v);
                }
                store(y, y_stride, window[u], chunk.x[u]);
                if (KEPT) keep(active, tiles, window[u], open);
            }
        };
#pragma unroll
        for (int base = HELD - UNROLL; base >= 0; base -= UNROLL) {
            Window window[UNROLL];
            Chunk<UNROLL> chunk = {};
#pragma unroll
            for (int u = UNROLL - 1; u >= 0; --u) {
                window[u] = Window{};
                if (base + u >= places.held) continue;
                window[u] = walk.back(tiles, x, x_stride);
                chunk.x[u] = held.x[base + u];
                chunk.admitted[u] = held.admitted[base + u];
            }
            give_out(window, chunk);
        }
#pragma unroll 1
        for (int left = places.streamed; left > 0; left -= UNROLL) {
            Window window[UNROLL];
            Chunk<UNROLL> chunk = {};
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                window[u] = Window{};
                if (u >= left) continue;
                window[u] = walk.back(tiles, x, x_stride);
                chunk.x[u] = load(x, x_stride, window[u]);
                chunk.admitted[u] = admitted(where, tiles, window[u]);
            }
            give_out(window, chunk);
        }
#pragma unroll 1
        for (int k = places.kept; k > 0; k -= UNROLL) {
            Window window[UNROLL];
            Chunk<UNROLL> chunk = {};
#pragma unroll
            for (int u = 0; u < UNROLL; ++u) {
                window[u] = Window{};
                if (u >= k) continue;
                window[u] = walk.back(tiles, x, x_stride);
                chunk.x[u] = shelf.at(k - 1 - u, 0);
                if (!ALL) chunk.admitted[u] = shelf.mark(k - 1 - u, 0);
            }
            give_out(window, chunk);
        }
        ++team.round;
    }
    team.part();
}
