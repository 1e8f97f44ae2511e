// widening.cu: given statistics as the other kernels read statistics, for inference.
//
//     wide[c] = mean[c],    rstd[c] = (var[c] + eps)^-1/2, or 0 where that would divide by zero
//
//   Shapes     mean, var (channels,) ACC_T      wide, rstd (channels,) double
//   Launch     1-D grid, a thread for each channel
//   Traffic    one read of mean and var, one write of wide and rstd
//   Rounding   as cubn.moments.reciprocal_std: an add, a root and a division in double
//   Constants  X_TYPE

#include "scalar.cuh"

extern "C" __global__ void widening(const ACC_T *mean, const ACC_T *var, double *wide, double *rstd, index_t channels,
                                    double eps)
{
    const index_t c = blockIdx.x * index_t(blockDim.x) + threadIdx.x;
    if (c >= channels) return;
    const double total = widen(var[c]) + eps;
    wide[c] = widen(mean[c]);
    rstd[c] = total == 0 ? 0 : 1 / sqrt(total);
}
