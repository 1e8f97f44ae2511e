// union.cuh: what the threads of a block, and the blocks of a grid, have found out about a channel, as one value.
//
// A Set is a struct of 4-byte words with a function unite(Set, Set) and Set{} as its empty set.  Sets are always
// merged in the order of their indices, so that equal inputs give equal bits: no atomics on floats.

#pragma once

#include "tiles.cuh"

constexpr unsigned WARP = 32;

// The value that the lane `distance` further up holds.
template <class Set>
__device__ Set from_above(const Set &own, int distance)
{
    constexpr int WORDS = sizeof(Set) / 4;
    union Raw {
        Set set;
        unsigned word[WORDS];
        __device__ Raw() {}
    } raw;
    raw.set = own;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) raw.word[i] = __shfl_down_sync(0xffffffffu, raw.word[i], distance);
    return raw.set;
}

// The union of entry(0), …, entry(length - 1), taken by `team` neighbouring lanes, a power of two up to a warp.
// The first lane of the team receives it.  Every lane of the warp must call, with a length of 0 if need be.
template <class Set, class Entry>
__device__ Set gather(int team, int length, Entry entry)
{
    Set all = {};
    for (int i = threadIdx.x % team; i < length; i += team) all = unite(all, entry(i));
    for (int distance = team / 2; distance > 0; distance /= 2) all = unite(all, from_above(all, distance));
    return all;
}

// Lanes for each of `jobs` lists of `length` sets, so that a block is busy and no lane is without a set.
__device__ inline int team_for(index_t jobs, int length)
{
    int team = 1;
    while (team < WARP && team < length && 2 * team * jobs <= BLOCK) team *= 2;
    return team;
}

// Another block's words, past this processor's first-level cache, which may hold what was there before.
template <class Set>
__device__ Set read_shared_out(const Set *from)
{
    constexpr int WORDS = sizeof(Set) / 8;
    union Raw {
        Set set;
        long long word[WORDS];
        __device__ Raw() {}
    } raw;
#pragma unroll
    for (int i = 0; i < WORDS; ++i) raw.word[i] = __ldcg(reinterpret_cast<const long long *>(from) + i);
    return raw.set;
}

// Merges what the threads of a tile hold and calls publish(run, set) once for each run of the tile that exists.
// Called by all threads of the block, with sets as merge() takes them.
template <class Set, class Publish>
__device__ void gather_runs(const Tiles &tiles, int group, Set *sets, Publish publish)
{
    const int run_length = COLUMN ? int(tiles.inner) : 1;
    const int runs = COLUMN ? tiles.runs() : 1;
    const int sets_of_a_run = run_length * tiles.high();
    const index_t all_runs = tiles.channels * tiles.fold;

    __syncthreads();
    const int team = team_for(runs, sets_of_a_run);
    for (int first = 0; first < runs; first += BLOCK / team) {
        const int here = first + threadIdx.x / team;
        const bool exists = here < runs && index_t(group) * runs + here < all_runs;
        const Set all = gather<Set>(team, exists ? sets_of_a_run : 0, [&](int i) {
            const int down = i / run_length;
            const int column = here * run_length + i - down * run_length;
            return sets[column % LANES * BLOCK + down * tiles.width + column / LANES];
        });
        if (exists && threadIdx.x % team == 0) publish(here, all);
    }
}

// Merges what the threads of this tile hold, and what the tiles of its channels hold, and calls
// finish(channel, set) exactly once for each channel in the whole grid, in one thread.
//
//   sets      shared, BLOCK * LANES: lane l of thread t at [l * BLOCK + t], written by all before the call
//   partials  splits * fold * channels sets; left unread and unwritten where one tile holds all of a channel
//   arrivals  one counter per group of tiles, zero before the launch and after it, so that it can be replayed
//
// Called by all threads of the block.  On return the sets may be written again.
template <class Set, class Finish>
__device__ void merge(const Tiles &tiles, const Walk<FORTH> &walk, Set *sets, Set *partials, unsigned *arrivals, Finish finish)
{
    const bool alone = tiles.splits == 1 && tiles.fold == 1;
    const int runs = COLUMN ? tiles.runs() : 1;
    const index_t begin_of_runs = index_t(walk.group) * runs;
    gather_runs(tiles, walk.group, sets, [&](int here, const Set &all) {
        if (alone) finish(begin_of_runs + here, all);
        else partials[walk.split * tiles.channels * tiles.fold + begin_of_runs + here] = all;
    });
    __syncthreads();
    if (alone) return;

    // Rows of several outer rows spread a channel over all groups.
    const unsigned tiles_together = unsigned(tiles.fold == 1 ? tiles.splits : tiles.count());
    __shared__ bool last;
    if (threadIdx.x == 0) {  // one thread's fences do for what the barriers order before and after it
        unsigned *counter = arrivals + (tiles.fold == 1 ? walk.group : 0);
        __threadfence();
        last = atomicInc(counter, tiles_together - 1) == tiles_together - 1;  // the last one sets it back to 0
        __threadfence();
    }
    __syncthreads();
    if (!last) return;

    const index_t begin = tiles.fold == 1 ? begin_of_runs : 0;
    const index_t end = tiles.fold == 1 ? min(begin + runs, tiles.channels) : tiles.channels;
    const int length = tiles.splits * tiles.fold;
    const int crew = team_for(end - begin, length);
    for (index_t first = begin; first < end; first += BLOCK / crew) {
        const index_t channel = first + threadIdx.x / crew;
        const Set all = gather<Set>(crew, channel < end ? length : 0, [&](int i) {
            return read_shared_out(partials + i * tiles.channels + channel);
        });
        if (channel < end && threadIdx.x % crew == 0) finish(channel, all);
    }
}
