// samples.cuh: the samples of one channel as one thread collects them, and the moments that they make.

#pragma once

#include "chunk.cuh"
#include "moments.cuh"

struct Samples {
    int count;
    ACC_T pivot, sum, squares;           // of x - pivot, since the last settle()
    double settled_sum, settled_squares; // of all before that

    __device__ void take(ACC_T x)
    {
        const ACC_T distance = x - pivot;
        sum += distance;
        squares = fma(distance, distance, squares);
    }

    __device__ void settle()
    {
        settled_sum += sum;
        settled_squares += squares;
        sum = squares = 0;
    }

    // The mean counts from `origin`.
    __device__ Moments moments(double origin) const
    {
        const double shift = settled_sum * (1.0 / count);
        const double m2 = settled_squares - settled_sum * shift;
        return {count, widen(pivot) - origin + shift, m2 < 0 ? 0 : m2};  // NaN stays
    }
};

// Gives every lane that has no sample yet the mean of some that the first `count` windows have for it as its pivot.
// Where all elements exist a call before the first add() is enough, and 16 of a lane are.
template <int N>
__device__ void choose_pivots(Samples (&lanes)[LANES], const Chunk<N> &chunk, int count)
{
#pragma unroll
    for (int l = 0; l < LANES; ++l) {
        ACC_T first = 0, sum = 0;
        int found = 0;
#pragma unroll
        for (int u = 0; u < N; ++u) {
            if (u >= count || (ALL && u * OF_A_LANE >= 16)) continue;
#pragma unroll
            for (int i = 0; i < OF_A_LANE; ++i) {
                const int at = COLUMN ? l : i;
                if (!ALL && !(chunk.admitted[u] >> at & 1)) continue;
                const ACC_T v = element(chunk.x[u], at);
                if (ALL ? u + i == 0 : found == 0) first = v;
                sum += v - first;
                ++found;
            }
        }
        if (ALL || lanes[l].count == 0) lanes[l].pivot = sum == 0 ? first : first + sum / ACC_T(found);
    }
}

// True if a lane has no sample yet, so that it has no pivot that anything depends on.
__device__ inline bool without_pivot(const Samples (&lanes)[LANES])
{
    bool without = false;
#pragma unroll
    for (int l = 0; l < LANES; ++l) without |= lanes[l].count == 0;
    return without;
}

// Adds the first `count` windows, and settles whenever AT_A_TIME of them are added.
template <int N>
__device__ void add(Samples (&lanes)[LANES], const Chunk<N> &chunk, int count)
{
#pragma unroll
    for (int u = 0; u < N; ++u) {
        if (u < count) {
#pragma unroll
            for (int i = 0; i < VEC; ++i) {
                Samples &lane = lanes[COLUMN ? i : 0];
                if (!ALL && !(chunk.admitted[u] >> i & 1)) continue;
                lane.take(element(chunk.x[u], i));
                if (!ALL) ++lane.count;
            }
        }
        if ((u + 1) % AT_A_TIME == 0) settle(lanes);
    }
}

// The same of any number of chunks; the first of all chooses the pivots, wherever `fresh` says that none are chosen.
template <int N>
__device__ void take_in(Samples (&lanes)[LANES], const Chunk<N> &chunk, int first, bool fresh)
{
    if (ALL ? fresh && first == 0 : without_pivot(lanes)) choose_pivots(lanes, chunk, N);
    add(lanes, chunk, N);
    if ((first + N) % AT_A_TIME == 0) settle(lanes);
}

// What the means of a channel count from while they are merged: one of its samples, so that a large mean costs the
// gaps between them no digit.  Where x is narrower than double, double has those digits anyway.
__device__ inline double origin(const X_T *x, const unsigned char *where, index_t first)
{
    if (X_TYPE != 3 || (WHERE && !where[first])) return 0;
    const double sample = to_acc(x[first]);
    return isfinite(sample) ? sample : 0;
}

// (m2 / count + eps)^-1/2; 0 where that would divide by zero, NaN for a channel without samples.
__device__ inline double reciprocal_deviation(const Moments &all, double eps)
{
    const double total = all.m2 / all.count + eps;
    return total == 0 ? 0 : 1 / sqrt(total);
}
