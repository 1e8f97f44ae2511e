// pull.cuh: dx of one channel from dz and x, once its sums are known.
//
//   Constants  TRAIN  1, or 0 where the statistics are constants: dx = gamma * rstd * dz

#pragma once

#include "affine.cuh"

// What the statistics' own dependence on x takes away from dz, and what scales the rest.
struct Pull {
    ACC_T mean, slope, offset, scale;

    __device__ ACC_T operator()(ACC_T dz, ACC_T x) const
    {
        return TRAIN ? scale * (dz + fma(x - mean, slope, offset)) : scale * dz;
    }
};

// `share` is one sample's, 1 / M.  gamma may be null: 1.
__device__ inline Pull pull(index_t c, const double *mean, const double *rstd, const ACC_T *gamma, double sum_dy,
                            double sum_dy_xhat, double share)
{
    Pull p = {};
    p.scale = narrow(rstd[c] * (gamma ? gamma[c] : ACC_T(1)));
    if (TRAIN) {
        const Affine towards = affine(mean[c], -rstd[c] * sum_dy_xhat * share, -sum_dy * share);
        p.mean = towards.mean;
        p.slope = towards.scale;
        p.offset = towards.shift;
    }
    return p;
}
