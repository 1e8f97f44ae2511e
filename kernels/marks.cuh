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

// Which elements of a window exist and count.
__device__ inline unsigned admitted(const unsigned char *where, const Tiles &tiles, const Window &w)
{
    return WHERE ? bits_of(load(where, tiles, w)) & existing(w) : existing(w);
}

// Which elements of a window ReLU has let pass.  Packed marks can be read by windows of any kind.
__device__ inline unsigned passed(const unsigned char *active, const Tiles &tiles, const Window &w)
{
    const index_t first = w.row * tiles.row_length() + w.offset;
    unsigned bits = 0;
    if (KEPT == 1) bits = bits_of(load(active, tiles, w));
    else if (VEC == PACKED && !RAGGED) bits = active[first / PACKED];
    else
        for (int i = 0; i < VEC; ++i)
            if (w.holds(i)) bits |= (active[(first + i) / PACKED] >> (first + i) % PACKED & 1u) << i;
    return bits;
}

// Keeps for the backward pass what `passed` reads.  Only whole windows of 16 bytes can be packed.
__device__ inline void keep(unsigned char *active, const Tiles &tiles, const Window &w, unsigned bits)
{
    if (KEPT == 2) {
        active[(w.row * tiles.row_length() + w.offset) / PACKED] = bits;
    } else {
        Bytes bytes;
#pragma unroll
        for (int i = 0; i < VEC; ++i) bytes.at[i] = bits >> i & 1;
        store(active, tiles, w, bytes);
    }
}
