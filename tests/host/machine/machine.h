// machine.h: what a translated kernel asks of the machine that runs it.
//
// Included by the machine and by the C++ that translate.py makes of a kernel's PTX.

#pragma once

#include <cstddef>
#include <cstdint>

namespace machine {

using Site = uint32_t;  // which source line: an index into the kernel's table of "file(line)"

struct Index {
    uint32_t x, y, z;
};

// What the running thread sees: its special registers and the shared memory of its block.
struct View {
    Index thread, block, block_size, grid_size;
    uint32_t lane, warp, cluster_rank, cluster_size;
    char *shared;          // where the block's shared window starts
    bool checked;          // whether shared memory goes through access(), too
    uint64_t steps_left;   // how much longer the launch may take, in branches
};
extern View view;

enum class Access : uint8_t { read, write, atomic_read, atomic_write, read_modify_write };
enum class WarpOperation : uint8_t {
    sync, shuffle_index, shuffle_up, shuffle_down, shuffle_xor, ballot, any, all, match_any, add, min, max, umin, umax,
    bit_and, bit_or, bit_xor
};
enum class BlockOperation : uint8_t { sync, count, all, any };

constexpr uint64_t window_bits = 24;  // a shared address is an offset into a window of 16 MiB
constexpr uint64_t window_size = uint64_t(1) << window_bits;

// Called before every access to memory that another thread could see.  Checks bounds and alignment and counts
// traffic; when the launch is checked, also looks for races and for reads of what nobody wrote.
void access(const void *pointer, uint32_t size, Access kind, Site site);

uint64_t warp(WarpOperation operation, uint32_t mask, uint64_t value, uint32_t argument, uint32_t segment, Site site);
bool source_in_range();  // the predicate of the running thread's last shuffle
uint32_t active_lanes();

uint32_t block_barrier(BlockOperation operation, bool predicate, Site site);
void cluster_arrive(bool relaxed, Site site);
void cluster_wait(Site site);
void fence();                // __threadfence: later atomics of this thread publish what it has done and seen
void let_others_run(Site);   // before whatever a thread may spin on

char *peer_window(uint32_t rank, Site site);        // the shared window of another block of the cluster
uint64_t cluster_address(uint64_t generic, Site site);

void copy_async(char *to, const char *from, uint32_t size, uint32_t source_size, Site site);
void copy_commit();
void copy_wait(uint32_t newest_groups_left_alone, Site site);

[[noreturn]] void fault(Site site, const char *format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace machine
