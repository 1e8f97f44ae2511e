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

// What a mean loses when it is rounded to ACC_T.  Below float's normal numbers x counts as zero, and so must the mean,
// or a constant would leave a trace.
__device__ inline double lost_by(double mean)
{
    return sizeof(ACC_T) == 4 && fabs(mean) < 0x1p-126 ? 0 : mean - ACC_T(mean);
}

__device__ inline Affine affine(double mean, double scale, double shift)
{
    return {ACC_T(mean), narrow(scale), narrow(shift - lost_by(mean) * scale)};
}

// z before the residual and the activation.  gamma and beta may be null: 1 and 0.
__device__ inline Affine normalizing(index_t channel, double mean, double rstd, const ACC_T *gamma, const ACC_T *beta)
{
    return affine(mean, rstd * (gamma ? gamma[channel] : ACC_T(1)), beta ? beta[channel] : ACC_T(0));
}

__device__ inline Affine normalizing(index_t channel, const double *mean, const double *rstd, const ACC_T *gamma,
                                     const ACC_T *beta)
{
    return normalizing(channel, mean[channel], rstd[channel], gamma, beta);
}

// NaN passes, because what comes of it must show.
__device__ inline bool passes(ACC_T z) { return !(z <= ACC_T(0)); }
