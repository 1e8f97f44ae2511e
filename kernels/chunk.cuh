// chunk.cuh: windows that a thread takes at a time, all of them asked for before the first is used.
//
//   Constants  those of marks.cuh

#pragma once

#include "marks.cuh"

constexpr int OF_A_LANE = COLUMN ? 1 : VEC;                      // elements of a window in one lane
constexpr int AT_A_TIME = OF_A_LANE < 32 ? 32 / OF_A_LANE : 1;   // windows that are summed in ACC_T, then in double

// N windows and what is known of them.
template <int N>
struct Chunk {
    static constexpr int WINDOWS = N;

    Window window[N];
    Move move[N];             // on from each
    Vector x[N];
    Vector other[N];          // the residual, or dy and then dz
    unsigned admitted[N];     // which elements exist and count; without a meaning where ALL
    unsigned open[N];         // which of them ReLU lets pass, where that is known from `active`
};

// Brings what all lanes have summed in ACC_T, Samples or Terms, to double.
template <class Lane>
__device__ void settle(Lane (&lanes)[LANES])
{
#pragma unroll
    for (int l = 0; l < LANES; ++l) lanes[l].settle();
}

// For windows of which all exist.
constexpr auto always = [](int) { return true; };

// Calls f(first, chunk) for chunks of UNROLL windows, then of one, until there were `count` windows.
template <class F>
__device__ void in_chunks(int count, F f)
{
    int first = 0;
#pragma unroll 1
    for (; first + UNROLL <= count; first += UNROLL) {
        Chunk<UNROLL> chunk;
        f(first, chunk);
    }
#pragma unroll 1
    for (; UNROLL > 1 && first < count; ++first) {
        Chunk<1> chunk;
        f(first, chunk);
    }
}
