// team.cuh: blocks that share the samples of a group of channels, and tell each other what they have found.
//
//   Constants  TEAM   0 a block alone
//                     1 a cluster of RANKS blocks, which read each other's shared memory (sm_90 and above)
//                     2 any number of blocks of a cooperative launch, which meet at a counter in global memory
//              RANKS  blocks of a cluster
//
// The blocks of a team take the tiles of one group, each the split of its rank; then those of the next group of the
// team.  Sets are merged in the order of ranks by every block for itself, so that all of them find the same bits.

#pragma once

#include "union.cuh"

#define BLOCK_TEAM 0
#define CLUSTER_TEAM 1
#define GRID_TEAM 2

#if TEAM == CLUSTER_TEAM
#define CLUSTERED __cluster_dims__(RANKS, 1, 1)
#else
#define CLUSTERED
#endif

struct Team {
    int number, count;    // of the team, of all teams
    int rank, ranks;      // of the block, of all blocks of the team
    int round;            // groups that the team has done
    unsigned *barrier;    // of a GRID_TEAM

    __device__ Team(const Tiles &tiles, unsigned *barriers)
    {
        ranks = TEAM == BLOCK_TEAM ? 1 : TEAM == CLUSTER_TEAM ? RANKS : tiles.splits;
        number = blockIdx.x / ranks;
        count = gridDim.x / ranks;
        rank = blockIdx.x - number * ranks;
        round = 0;
        barrier = barriers + number;
    }

    // Every thread of every block of the team waits for all of them, and sees what they wrote before.
    __device__ void meet() const
    {
#if TEAM == BLOCK_TEAM
        __syncthreads();
#elif TEAM == CLUSTER_TEAM
        __cluster_barrier_arrive();
        __cluster_barrier_wait();
#else
        // The low bits count arrivals and are zero again when all have come; that flips the sign, and the next time
        // flips it back.  So the counter needs no reset, and a launch that is replayed finds it fit for use.
        __syncthreads();
        if (threadIdx.x == 0) {
            __threadfence();
            const unsigned before = atomicAdd(barrier, rank == 0 ? 0x80000000u - (ranks - 1) : 1u);
            unsigned now;
            do {
                asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(barrier) : "memory");
            } while (((before ^ now) & 0x80000000u) == 0);
            __threadfence();
        }
        __syncthreads();
#endif
    }

    // Before a block ends: its shared memory may still be read.
    __device__ void part() const
    {
        if (TEAM == CLUSTER_TEAM) meet();
    }
};

// The shared memory in which a team's sets are read by others, and what comes of them by the block itself.
template <class Set, class Map>
struct Board {
    Set *sets;             // runs of a tile, for a CLUSTER_TEAM twice
    Map *maps;             // channels of a group: no more than runs
    unsigned char *end;    // of both, at a boundary of 16 bytes

    __device__ explicit Board(const Tiles &tiles)
    {
        const int runs = COLUMN ? tiles.runs() : 1;
        sets = reinterpret_cast<Set *>(dynamic_shared);
        maps = reinterpret_cast<Map *>(sets + (TEAM == GRID_TEAM ? 0 : TEAM == CLUSTER_TEAM ? 2 * runs : runs));
        const int bytes = int(reinterpret_cast<unsigned char *>(maps + runs) - dynamic_shared);
        end = dynamic_shared + (bytes + 15) / 16 * 16;
    }

    // The channel that maps[0] is of.
    __device__ static index_t first(const Tiles &tiles, int group)
    {
        return !COLUMN ? group : tiles.fold == 1 ? index_t(group) * tiles.runs() : 0;
    }
};

// Merges what all threads of the team hold and calls finish(i, set) in every block, once for channel i of the group.
//
//   own       the set of each lane of this thread
//   scratch   shared, BLOCK * LANES sets (column map) or one for each warp (plane map)
//   mine      shared, for a BLOCK_TEAM the runs of a tile, for a CLUSTER_TEAM twice as many; others read it
//   partials  of a GRID_TEAM: 2 * teams * ranks * runs sets, and in the column map 2 * teams * runs for totals
//
// Called by all threads of the team.  Two places are written in turn: when a block comes to the first of them again,
// all others have been to the second, and so have read the first.
template <class Set, class Finish>
__device__ void consult(const Tiles &tiles, const Team &team, int group, const Set (&own)[LANES], Set *scratch,
                        Set *mine, Set *partials, Finish finish)
{
    const int runs = COLUMN ? tiles.runs() : 1;
    const int turn = team.round % 2;
    const index_t of_a_team = index_t(team.ranks) * runs;
    Set *board = TEAM == GRID_TEAM ? partials + (turn * team.count + team.number) * of_a_team
                                   : mine + (TEAM == CLUSTER_TEAM ? turn * runs : 0);
    Set *notice = TEAM == GRID_TEAM ? board + index_t(team.rank) * runs : board;
    if (COLUMN) {
#pragma unroll
        for (int l = 0; l < LANES; ++l) scratch[l * BLOCK + threadIdx.x] = own[l];
        gather_runs(tiles, group, scratch, [&](int run, const Set &all) { notice[run] = all; });
    } else {
        constexpr int WARPS = BLOCK / WARP;
        const Set of_warp = gather<Set>(WARP, WARP, [&](int) { return own[0]; });
        if (threadIdx.x % WARP == 0) scratch[threadIdx.x / WARP] = of_warp;
        __syncthreads();
        if (threadIdx.x < WARP) {
            const Set all = gather<Set>(WARP, WARPS, [&](int i) { return scratch[i]; });
            if (threadIdx.x == 0) *notice = all;
        }
    }
    team.meet();

    // Entry i of a channel: its run number i % fold of the block with rank i / fold.
    const int channels = tiles.fold == 1 ? int(min(index_t(runs), tiles.channels - index_t(group) * runs))
                                         : int(tiles.channels);
    const int length = team.ranks * tiles.fold;
    const auto entry = [&](int i, int channel) -> Set {
        const int rank = i / tiles.fold;
        const int run = (i - rank * tiles.fold) * channels + channel;
        if (TEAM == BLOCK_TEAM) return board[run];
        if (TEAM == GRID_TEAM) return read_shared_out(board + index_t(rank) * runs + run);
#if TEAM == CLUSTER_TEAM
        return *static_cast<const Set *>(__cluster_map_shared_rank(board + run, rank));
#else
        return Set{};
#endif
    };

    // With many channels and many blocks it is too much for each to merge everything: each takes a share of the
    // channels, and they meet once more.
    constexpr bool SHARED_OUT = TEAM == GRID_TEAM && COLUMN;
    Set *totals = partials + 2 * team.count * of_a_team + index_t(turn * team.count + team.number) * runs;
    const int mine_of = SHARED_OUT ? (channels - team.rank + team.ranks - 1) / team.ranks : channels;
    const int crew = team_for(max(mine_of, 1), length);
    for (int first = 0; first < mine_of; first += BLOCK / crew) {
        const int job = first + threadIdx.x / crew;
        const int channel = SHARED_OUT ? team.rank + job * team.ranks : job;
        const Set all = gather<Set>(crew, job < mine_of ? length : 0, [&](int i) { return entry(i, channel); });
        if (job < mine_of && threadIdx.x % crew == 0) {
            if (SHARED_OUT) totals[channel] = all;
            else finish(channel, all);
        }
    }
    if (SHARED_OUT) {
        team.meet();
        for (int channel = threadIdx.x; channel < channels; channel += BLOCK)
            finish(channel, read_shared_out(totals + channel));
    }
    __syncthreads();
}
