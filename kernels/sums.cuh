// sums.cuh: the two sums over a channel that its gradients need, as one thread collects them.
//
//   Constants  those of marks.cuh;  RELU (0/1)
//
// With distances from the mean rather than xhat, which takes an operation less for every element: sum dz * xhat is
// rstd * sum dz * (x - mean).

#pragma once

#include "affine.cuh"
#include "chunk.cuh"

constexpr bool GATE = RELU && !KEPT;  // where ReLU let z pass is computed again from x

struct Sums {
    double dy;
    double dy_xhat;
};

__device__ inline Sums unite(Sums p, Sums q) { return {p.dy + q.dy, p.dy_xhat + q.dy_xhat}; }

// Terms of one channel, as one thread collects them.
struct Terms {
    ACC_T dy, dy_distance;                  // since the last settle()
    double settled_dy, settled_dy_distance; // of all before that

    __device__ void take(ACC_T dz, ACC_T distance)
    {
        dy += dz;
        dy_distance = fma(dz, distance, dy_distance);
    }

    __device__ void settle()
    {
        settled_dy += dy;
        settled_dy_distance += dy_distance;
        dy = dy_distance = 0;
    }

    // Distances were taken from the mean as ACC_T has it, which is what it lost away from the mean.  Without samples
    // rstd is NaN, and the sum is 0 all the same.
    __device__ Sums sums(double mean, double rstd) const
    {
        const double exact = settled_dy_distance - lost_by(mean) * settled_dy;
        return {settled_dy, exact == 0 ? 0 : rstd * exact};
    }
};

// What a thread needs of each of its channels before the sums are known.
struct Maps {
    ACC_T mean[LANES];
    Affine gate[LANES];

    __device__ Maps(const Tiles &tiles, int group, int steps, const double *means, const double *rstd,
                    const ACC_T *gamma, const ACC_T *beta)
    {
        Channels channel(tiles, group);
        for (int l = 0; l < LANES; ++l) {
            const index_t c = steps > 0 ? channel.next(tiles) : 0;
            mean[l] = ACC_T(means[c]);
            if (GATE) gate[l] = normalizing(c, means, rstd, gamma, beta);
        }
    }
};

// Makes dz of dy: 0 where the element does not count or ReLU did not let it pass.
template <int N>
__device__ void open(const Maps &maps, Chunk<N> &chunk, int count)
{
#pragma unroll
    for (int u = 0; (RELU || WHERE) && u < N; ++u) {
        if (u >= count) continue;
        unsigned bits = WHERE ? chunk.admitted[u] : ~0u;
        if (KEPT) bits &= chunk.open[u];
#pragma unroll
        for (int i = 0; GATE && i < VEC; ++i)
            if (!passes(maps.gate[COLUMN ? i : 0](element(chunk.x[u], i)))) bits &= ~(1u << i);
        clear_but(chunk.other[u], bits);
    }
}

// Adds the first `count` windows, and settles whenever AT_A_TIME of them are added.
template <int N>
__device__ void add(Terms (&lanes)[LANES], const Maps &maps, const Chunk<N> &chunk, int count)
{
#pragma unroll
    for (int u = 0; u < N; ++u) {
        if (u < count) {
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                const int l = COLUMN ? i : 0;
                if (!ALL && !(chunk.admitted[u] >> i & 1)) continue;
                lanes[l].take(element(chunk.other[u], i), element(chunk.x[u], i) - maps.mean[l]);
            }
        }
        if ((u + 1) % AT_A_TIME == 0) settle(lanes);
    }
}

// The same of any number of chunks.
template <int N>
__device__ void take_in(Terms (&lanes)[LANES], const Maps &maps, const Chunk<N> &chunk, int first)
{
    add(lanes, maps, chunk, N);
    if ((first + N) % AT_A_TIME == 0) settle(lanes);
}
