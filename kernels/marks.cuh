// marks.cuh: the bytes and bits that say of each element whether it counts, and whether ReLU let it pass.
//
//   Constants  WHERE  0, or 1: a byte of `where` for each element, dense; 0 leaves it out
//              KEPT   0, or how `active` keeps what ReLU let pass: 1 one byte for each element, dense;
//                     2 packed: one byte for 16 bytes of x, a bit for each of its elements
//
// A thread holds the marks of a window as bits: bit i is element i.  Those of elements that do not exist are 0.

#pragma once

#include "tiles.cuh"

constexpr int PACKED = 16 / sizeof(X_T);  // elements to a byte
constexpr bool ALL = !WHERE && !RAGGED;   // every element of every window exists and counts

__device__ inline unsigned existing(const Window &w)
{
    return RAGGED ? (1u << w.last) - (1u << w.first) : (1u << VEC) - 1;
}

__device__ inline unsigned bits_of(const Bytes &bytes)
{
    unsigned bits = 0;
#pragma unroll
    for (int i = 0; i < VEC; ++i) bits |= bytes.at[i] ? 1u << i : 0;
    return bits;
}

// Which elements of a window exist and count.  `at` is the index of its first element, had x no gaps.
__device__ inline unsigned admitted(const unsigned char *where, index_t at, const Window &w)
{
    return WHERE ? bits_of(load(where + at, w)) & existing(w) : existing(w);
}

// Which elements of a window ReLU has let pass.  Packed marks can be read by windows of any kind.
__device__ inline unsigned passed(const unsigned char *active, index_t at, const Window &w)
{
    if (KEPT == 1) return bits_of(load(active + at, w));
    if (VEC == PACKED && !RAGGED) return active[at / PACKED];
    unsigned bits = 0;
    for (int i = 0; i < VEC; ++i)
        if (w.holds(i)) bits |= (active[(at + i) / PACKED] >> (at + i) % PACKED & 1u) << i;
    return bits;
}

// Keeps for the backward pass what `passed` reads.  Only whole windows of 16 bytes can be packed.
__device__ inline void keep(unsigned char *active, index_t at, const Window &w, unsigned bits)
{
    if (KEPT == 2) {
        active[at / PACKED] = bits;
    } else {
        Bytes bytes;
#pragma unroll
        for (int i = 0; i < VEC; ++i) bytes.at[i] = bits >> i & 1;
        store(active + at, w, bytes);
    }
}
