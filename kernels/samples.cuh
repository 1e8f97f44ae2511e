// samples.cuh: the samples of one channel as one thread collects them, and the moments that they make.

#pragma once

#include "moments.cuh"

struct Samples {
    int count;
    ACC_T pivot, sum, squares;           // of x - pivot, since the last settle()
    double settled_sum, settled_squares; // of all before that

    __device__ void take(ACC_T x, bool first)
    {
        if (first) pivot = x;
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
