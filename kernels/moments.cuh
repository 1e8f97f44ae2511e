// moments.cuh: moments of a set of samples, and the one function that merges two of them.

#pragma once

#include "scalar.cuh"

struct Moments {
    index_t count;  // number of samples; an integer, because float stops counting at 2^24
    double mean;    // unit of x
    double m2;      // sum of (x - mean)^2, unit of x squared; never negative
};

// Moments of the union of two disjoint sets (Chan, Golub & LeVeque 1979).
// Either side may be empty: the other comes back bit for bit, and two empty sets give an empty set.
// Called by any thread at any time; touches registers only, needs no barrier.
__device__ inline Moments unite(Moments p, Moments q)
{
    if (q.count == 0) return p;
    if (p.count == 0) return q;

    const index_t count = p.count + q.count;
    const ACC_T share = ACC_T(q.count) / ACC_T(count);  // in (0, 1); as exact as x, and so is what it weighs
    const double gap = q.mean - p.mean;
    Moments both;
    both.count = count;
    both.mean = p.mean + gap * share;
    both.m2 = p.m2 + q.m2 + gap * gap * (p.count * double(share));
    return both;
}
