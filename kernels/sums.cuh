// sums.cuh: the two sums over a channel that its gradients need, as one thread collects them.

#pragma once

#include "affine.cuh"

struct Sums {
    double dy;
    double dy_xhat;
};

__device__ inline Sums unite(Sums p, Sums q) { return {p.dy + q.dy, p.dy_xhat + q.dy_xhat}; }

// Terms of one channel, as one thread collects them.
struct Terms {
    ACC_T dy, dy_xhat;  // since the last settle()
    Sums settled;

    __device__ void take(ACC_T dz, ACC_T xhat)
    {
        dy += dz;
        dy_xhat = fma(dz, xhat, dy_xhat);
    }

    __device__ void settle()
    {
        settled = unite(settled, Sums{dy, dy_xhat});
        dy = dy_xhat = 0;
    }
};
