// launch.cpp: one launch of a kernel, from Python and back.

#include <csignal>
#include <cstdio>
#include <cstring>
#include <utility>

#include "internals.h"

namespace machine {

Launch launch;
std::vector<Block> blocks;
std::vector<Cluster> clusters;
uint32_t threads_per_block, block_count, threads_alive;

namespace {

std::vector<char *> windows;

Index unravel(uint32_t number, const uint32_t *extent)
{
    return {number % extent[0], number / extent[0] % extent[1], number / extent[0] / extent[1]};
}

uint32_t product(const uint32_t *extent) { return extent[0] * extent[1] * extent[2]; }

void start_thread(Thread &thread, Block &block, uint32_t number)
{
    thread.block = &block;
    thread.number = number;
    thread.id = block.number * threads_per_block + number + 1;
    thread.index = unravel(number, launch.block);
    thread.state = State::fresh;
    thread.site = 0;
    thread.arrivals = thread.waits = thread.copy_group = 0;
    thread.copies.clear();
    thread.seen.clear();
    thread.fenced.clear();
    memset(thread.synced, 0, sizeof thread.synced);
    memset(thread.arrived_at, 0, sizeof thread.arrived_at);
}

void start_block(Block &block, uint32_t number, Cluster &cluster, char *window)
{
    block.number = number;
    block.rank = number % launch.cluster;
    block.index = unravel(number, launch.grid);
    block.cluster = &cluster;
    cluster.blocks.push_back(&block);
    block.window = window;
    block.alive = threads_per_block;
    block.arrived = block.votes = 0;
    block.born = block.synced = now;
    block.seen.clear();
    block.fenced.clear();
    block.ready.clear();
    memset(window, 0xff, launch.shared_bytes);
    if (launch.checked) block.cells.resize(launch.shared_bytes / launch.shared_granule + 1);
    block.threads.resize(threads_per_block);
    for (uint32_t i = 0; i < threads_per_block; ++i) start_thread(block.threads[i], block, i);
    in_schedule_order(block.threads, [&](Thread &thread) { block.ready.push_back(&thread); });
}

// Blocks that are resident together: one, a cluster, or a whole cooperative grid.
void run_group(uint32_t first, uint32_t resident)
{
    ++now;
    threads_alive = resident * threads_per_block;
    for (Cluster &cluster : clusters) cluster = {{}, 0, launch.cluster * threads_per_block, false, now};
    for (uint32_t i = 0; i < resident; ++i) start_block(blocks[i], first + i, clusters[i / launch.cluster], windows[i]);
    enter(&blocks[0]);
    run_until_fault_or_done();
}

std::vector<uint32_t> order_of_groups(uint32_t count)
{
    std::vector<uint32_t> order(count);
    for (uint32_t i = 0; i < count; ++i) order[i] = launch.seed == 1 ? count - 1 - i : i;
    if (launch.seed > 1)
        for (uint32_t i = count; i > 1; --i) std::swap(order[i - 1], order[random_bits() % i]);
    return order;
}

void on_bad_address(int, siginfo_t *information, void *)
{
    if (!running) {  // not ours: let it happen again and end the process
        signal(SIGSEGV, SIG_DFL);
        return;
    }
    fault(running->site, "invalid address %p", information->si_addr);
}

// While it lives, a wild access of a kernel is a fault and not the end of Python.
class CatchBadAddresses {
public:
    CatchBadAddresses()
    {
        static char stack[64 << 10];
        const stack_t ours{stack, 0, sizeof stack};
        sigaltstack(&ours, &old_stack_);
        struct sigaction action {};
        action.sa_sigaction = on_bad_address;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
        sigaction(SIGSEGV, &action, &old_segv_);
        sigaction(SIGBUS, &action, &old_bus_);
    }
    ~CatchBadAddresses()
    {
        sigaction(SIGSEGV, &old_segv_, nullptr);
        sigaction(SIGBUS, &old_bus_, nullptr);
        sigaltstack(&old_stack_, nullptr);
    }

private:
    stack_t old_stack_;
    struct sigaction old_segv_, old_bus_;
};

}  // namespace
}  // namespace machine

using namespace machine;

// Returns 0, or 1 with the fault in `message`.
extern "C" int machine_launch(Launch *request, char *message, size_t message_size)
{
    launch = *request;
    *message = 0;
    fault_message = message;
    fault_message_size = message_size;
    threads_per_block = product(launch.block);
    block_count = product(launch.grid);
    const uint32_t resident = launch.cooperative ? block_count : launch.cluster;
    blocks.resize(resident);
    clusters.resize(resident / launch.cluster);
    while (windows.size() < resident) windows.push_back(new_window());
    view = {};
    view.block_size = {launch.block[0], launch.block[1], launch.block[2]};
    view.grid_size = {launch.grid[0], launch.grid[1], launch.grid[2]};
    view.cluster_size = launch.cluster;
    view.checked = launch.checked;
    view.steps_left = launch.steps;

    start_checking();
    start_schedule(launch.seed);
    {
        const CatchBadAddresses guard;
        for (uint32_t group : order_of_groups(block_count / resident)) {
            run_group(group * resident, resident);
            if (*message) break;
        }
    }
    running = nullptr;
    if (*message) forget_stacks();
    request->switches = launch.switches;
    request->barriers = launch.barriers;
    request->accesses = launch.accesses;
    return *message != 0;
}
