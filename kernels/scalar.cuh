// scalar.cuh: the element type of x and the type that is computed in.  The only file that knows dtypes.
//
//   Constants  X_TYPE  0 float16, 1 bfloat16, 2 float32, 3 float64: the element type of x, y, dy, dx
//
//   X_T        storage: 2, 2, 4, 8 bytes
//   ACC_T      arithmetic, gamma, beta and their gradients: float, or double for double
//   low_of, high_of, pair_of   of 16-bit floats: the two in a 32-bit register, in ACC_T, and back
//   index_t    every offset and count: 64-bit, because a tensor may have more than 2^31 elements
//
// Mean, rstd and whatever is merged are double for every X_T.  16-bit floats are plain bits here, converted by
// instructions of their own: no header of the toolkit is needed, so there is none to miss.  Two neighbours lie in one
// 32-bit register, of which the converting instructions can take either half, and which one instruction can fill; what
// takes halves apart by shifts costs as much as the arithmetic.

#pragma once

typedef long long index_t;

#if X_TYPE == 0
typedef unsigned short X_T;
typedef float ACC_T;
__device__ inline ACC_T to_acc(X_T bits)
{
    float v;
    asm("cvt.f32.f16 %0, %1;" : "=f"(v) : "h"(bits));
    return v;
}
__device__ inline X_T from_acc(ACC_T v)
{
    unsigned short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
}
__device__ inline ACC_T low_of(unsigned pair)
{
    float v;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(v) : "r"(pair));
    return v;
}
__device__ inline ACC_T high_of(unsigned pair)
{
    float v;
    asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high; }" : "=f"(v) : "r"(pair));
    return v;
}
__device__ inline unsigned pair_of(ACC_T low, ACC_T high)
{
#if __CUDA_ARCH__ >= 800
    unsigned pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return from_acc(low) | unsigned(from_acc(high)) << 16;
#endif
}
#elif X_TYPE == 1
typedef unsigned short X_T;
typedef float ACC_T;
__device__ inline ACC_T to_acc(X_T bits) { return __uint_as_float((unsigned)bits << 16); }
__device__ inline X_T from_acc(ACC_T v)
{
#if __CUDA_ARCH__ >= 800
    unsigned short rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded) : "f"(v));
    return rounded;
#else
    const unsigned bits = __float_as_uint(v);
    if (v != v) return 0x7fff;                               // as the instruction does
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;       // to nearest, ties to even
#endif
}
__device__ inline ACC_T low_of(unsigned pair) { return __uint_as_float(pair << 16); }
__device__ inline ACC_T high_of(unsigned pair) { return __uint_as_float(pair & 0xffff0000u); }
__device__ inline unsigned pair_of(ACC_T low, ACC_T high)
{
#if __CUDA_ARCH__ >= 800
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return from_acc(low) | unsigned(from_acc(high)) << 16;
#endif
}
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

// Exact, where a plain conversion would flush a subnormal float to zero: CuPy compiles with -ftz=true.
__device__ inline double widen(double v) { return v; }
#ifdef __CUDA_ARCH__
__device__ inline double widen(float v)
{
    const unsigned bits = __float_as_uint(v);
    if (bits & 0x7f800000u) return v;
    const double size = (bits & 0x007fffffu) * 0x1p-149;
    return bits >> 31 ? -size : size;
}

// Rounded once.  A finite number beyond float's range stays finite, so that 0 times it is 0.
__device__ inline ACC_T narrow(double v)
{
    const ACC_T near = ACC_T(v);
    return isinf(near) && !isinf(v) ? ACC_T(v < 0 ? -3.402823466e38 : 3.402823466e38) : near;
}
#endif

// NaN fails the comparison and so passes through; fmax(v, 0) would turn it into 0 and hide it.
__device__ inline ACC_T relu(ACC_T v) { return v <= ACC_T(0) ? ACC_T(0) : v; }
