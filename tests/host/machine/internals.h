// internals.h: the parts of the machine, as its own files see them.
//
//   launch.cpp    one launch: the blocks, one after another or resident together
//   threads.cpp   every CUDA thread is a fiber; who runs next, and who waits for whom
//   warps.cpp     what lanes receive from each other
//   checker.cpp   what every access to memory goes through: bounds, races, initialisation, traffic
//   memory.cpp    global memory between guard pages, shared windows, stacks

#pragma once

#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "machine.h"

namespace machine {

// The machine's clock ticks at every synchronisation.  An access carries the time at which it happened, and a
// synchronisation at time T orders it before what follows if its time is less than T.
using Time = uint32_t;
using ThreadId = uint32_t;  // 1 + number of the thread in the grid; 0 is nobody

// How far somebody has seen into what whole blocks, and single threads beyond that, have done.
struct Clock {
    std::vector<Time> blocks;  // by number of the block in the grid; empty when nothing was seen
    std::unordered_map<uint32_t, std::vector<Time>> threads;  // by number of the block, then of the thread in it

    bool empty() const { return blocks.empty() && threads.empty(); }
    void clear();
    void join(const Clock &other);
    void see_block(uint32_t block, Time until);
    void see_thread(uint32_t block, uint32_t thread, Time until);
    bool covers(uint32_t block, uint32_t thread, Time when) const;
};

// What the checker knows about a few bytes of memory.
struct Cell {
    struct Reader {
        ThreadId who;
        Time when;
    };
    ThreadId writer;        // the last one, with `atomic_flag` when it was an atomic operation
    Time written;
    Reader readers[2];      // since then, and not ordered before each other; of many, the lowest and the highest
};
constexpr ThreadId atomic_flag = ThreadId(1) << 31;

// One array in global memory.
struct Region {
    uintptr_t start;
    size_t size, granule;      // bytes; a cell for every `granule` bytes
    bool initialised, guarded;
    std::vector<Cell> cells;   // made when the first checked launch touches the array
    std::string name;
    char *mapping;
    size_t mapping_size;
    uint64_t read, written;    // bytes, in this launch
};

enum class State : uint8_t { fresh, ready, at_warp, at_block, at_cluster, done };

struct Copy {  // an asynchronous one that has not been waited for
    char *to;
    const char *from;
    uint32_t size, source_size, group;
};

struct Block;
struct Thread {
    void *stack_pointer;
    char *stack;
    Block *block;
    uint32_t number;  // in its block
    ThreadId id;
    Index index;
    State state;

    Site site;        // of the operation that it waits in, and that operation's operands
    WarpOperation operation;
    uint32_t mask, argument, segment;
    uint64_t value, result;
    bool in_range;

    uint32_t arrivals, waits;  // at cluster barriers
    uint32_t copy_group;
    std::vector<Copy> copies;

    Time synced[32];           // when it last synchronised with each lane of its warp
    Time arrived_at[2];        // at the last two cluster barriers
    Clock seen;                // through atomics, since the block's last barrier
    Clock fenced;              // what its fences since then let later atomics publish
};

struct Cluster;
struct Block {
    uint32_t number, rank;  // in the grid, in its cluster
    Index index;
    Cluster *cluster;
    std::vector<Thread> threads;
    std::vector<Thread *> ready;  // a stack
    char *window;
    uint32_t alive;

    uint32_t arrived, votes;      // at the current barrier
    BlockOperation operation;
    Site site;

    Time born, synced;
    Clock seen, fenced;           // what its threads had seen and fenced at the last barrier
    std::vector<Cell> cells;      // of its shared memory
};

struct Cluster {
    std::vector<Block *> blocks;
    uint32_t phase, pending;      // barriers completed; threads that have not arrived at the next
    bool anybody_arrived;
    Time opened;
};

struct SharedVariable {
    uint32_t offset, size;
};

struct Launch {  // mirrored by ctypes in executor.py
    void (*run)(void **arguments);
    void **arguments;
    const char *const *sites;
    const SharedVariable *shared;
    uint32_t shared_count, shared_bytes, shared_granule;
    uint32_t grid[3], block[3], cluster, cooperative, checked;
    uint64_t seed, steps;
    uint64_t switches, barriers, accesses;  // out
};

extern Launch launch;
extern std::vector<Block> blocks;  // those resident now
extern std::vector<Cluster> clusters;
extern Thread *running;
extern Time now, launched;
extern uint32_t threads_per_block, block_count, threads_alive;
extern std::vector<std::unique_ptr<Region>> regions;
extern std::unordered_map<uintptr_t, Clock> published;  // by address of the atomic variable

// threads.cpp
Thread *next_thread();
void run_until_fault_or_done();
void start_schedule(uint64_t seed);
uint64_t random_bits();
void make_ready(Thread &thread);
template <class Range, class Action> void in_schedule_order(Range &range, Action action)
{
    // `ready` is a stack: what is pushed last runs first.
    if (launch.seed == 0)
        for (size_t i = range.size(); i-- > 0;) action(range[i]);
    else
        for (auto &item : range) action(item);
}
void enter(Block *block);
void forget_stacks();
extern char *fault_message;
extern size_t fault_message_size;

// warps.cpp
void give_warp_results(Thread *warp, uint32_t lanes);

// checker.cpp
void start_checking();
bool valid_shared(size_t offset, uint32_t size);
void block_synchronised(Block &block);
void warp_synchronised(Thread *first, uint32_t lanes);
void cluster_synchronised(Cluster &cluster);

// memory.cpp
constexpr size_t stack_size = 64 << 10;
char *new_window();
char *new_stack();
Region *find_region(uintptr_t address);
std::string describe_address(uintptr_t address);

}  // namespace machine
