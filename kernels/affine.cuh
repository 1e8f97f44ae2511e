// affine.cuh: the map of one channel, z = scale * (x - mean) + shift, and where ReLU lets z pass.
//
// The mean is double, its distance from x is not: what the mean loses when it is rounded to ACC_T goes into the
// shift, so that z has ACC_T's digits of x - mean and not of x.  Never scale * x + shift, which has none of them
// left at a large mean.

#pragma once

#include "scalar.cuh"

struct Affine {
    ACC_T mean;
    ACC_T scale;
    ACC_T shift;

    // The forward and the backward pass must round alike, or ReLU's gradient would not be that of its output.
    __device__ ACC_T operator()(ACC_T x) const { return fma(x - mean, scale, shift); }
};

__device__ inline Affine affine(double mean, double scale, double shift)
{
    Affine map;
    map.mean = ACC_T(mean);
    map.scale = narrow(scale);
    map.shift = narrow(shift - (mean - map.mean) * scale);
    return map;
}

// z before the residual and the activation.  gamma and beta may be null: 1 and 0.
__device__ inline Affine normalizing(index_t channel, const double *mean, const double *rstd, const ACC_T *gamma,
                                     const ACC_T *beta)
{
    const double scale = rstd[channel] * (gamma ? gamma[channel] : ACC_T(1));
    return affine(mean[channel], scale, beta ? beta[channel] : ACC_T(0));
}

// xhat = (x - mean) * rstd.
__device__ inline Affine standardizing(index_t channel, const double *mean, const double *rstd)
{
    return affine(mean[channel], rstd[channel], 0);
}

// NaN passes, because what comes of it must show.
__device__ inline bool passes(ACC_T z) { return !(z <= ACC_T(0)); }
