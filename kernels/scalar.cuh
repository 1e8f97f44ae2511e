// scalar.cuh: the element type of x and the type that is summed in.  The only file that knows dtypes.
//
//   Constants  X_TYPE  0 float16, 1 bfloat16, 2 float32, 3 float64: the element type of x, y, dy, dx
//
//   X_T        storage: 2, 2, 4, 8 bytes
//   ACC_T      arithmetic, statistics, gamma, beta: float, or double for double
//   index_t    every offset and count: 64-bit, because a tensor may have more than 2^31 elements

#pragma once

typedef long long index_t;

#if X_TYPE == 0
#include <cuda_fp16.h>
typedef __half X_T;
typedef float ACC_T;
__device__ inline ACC_T to_acc(X_T v) { return __half2float(v); }
__device__ inline X_T from_acc(ACC_T v) { return __float2half_rn(v); }
#elif X_TYPE == 1
#include <cuda_bf16.h>
typedef __nv_bfloat16 X_T;
typedef float ACC_T;
__device__ inline ACC_T to_acc(X_T v) { return __bfloat162float(v); }
__device__ inline X_T from_acc(ACC_T v) { return __float2bfloat16_rn(v); }
#elif X_TYPE == 2
typedef float X_T;
typedef float ACC_T;
__device__ inline ACC_T to_acc(X_T v) { return v; }
__device__ inline X_T from_acc(ACC_T v) { return v; }
#elif X_TYPE == 3
typedef double X_T;
typedef double ACC_T;
__device__ inline ACC_T to_acc(X_T v) { return v; }
__device__ inline X_T from_acc(ACC_T v) { return v; }
#else
#error "X_TYPE must be 0 (float16), 1 (bfloat16), 2 (float32) or 3 (float64)"
#endif

// NaN fails the comparison and so passes through; fmax(v, 0) would turn it into 0 and hide it.
__device__ inline ACC_T relu(ACC_T v) { return v < ACC_T(0) ? ACC_T(0) : v; }
