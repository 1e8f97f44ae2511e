// threads.cpp: every CUDA thread is a fiber of one OS thread.  Who runs next, and who waits for whom.
//
// A thread runs until it has to wait; then the schedule picks another: the lowest that is ready (seed 0), the
// highest (seed 1), or any (other seeds).  When nobody is ready although not everybody is done, that is a deadlock,
// and the fault says who waits where.

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>

#include "internals.h"

extern "C" void machine_switch_stack(void **save_here, void *load_this);
asm(R"(
.text
.globl machine_switch_stack
machine_switch_stack:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov %rsi, %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
)");

namespace machine {

View view;
Thread *running;
char *fault_message;
size_t fault_message_size;

namespace {

constexpr size_t canary = 0x5afe5afe5afe5afe;       // at the far end of every stack
constexpr uint64_t patience = 2000;                 // spins per living thread before a launch counts as livelocked

std::vector<char *> free_stacks, all_stacks;
void *launcher;       // stack pointer of the code that started the launch
Block *current;
uint64_t random_state, spins;
bool next_block_please;

bool several_blocks() { return blocks.size() > 1; }

const char *state_name(const Thread &thread)
{
    switch (thread.state) {
        case State::fresh: return "not started";
        case State::ready: return "ready";
        case State::at_warp: return "a warp operation";
        case State::at_block: return "__syncthreads";
        case State::at_cluster: return "a cluster barrier";
        default: return "done";
    }
}

[[noreturn]] void deadlock()
{
    std::map<std::string, int> places;
    for (Block &block : blocks)
        for (Thread &thread : block.threads)
            ++places[thread.state == State::done ? "have exited"
                                                 : std::string("wait at ") + state_name(thread) + " " + launch.sites[thread.site]];
    std::string text;
    for (auto &[place, count] : places) text += (text.empty() ? "" : ", ") + std::to_string(count) + " " + place;
    fault(0, "deadlock (divergent barrier): threads: %s", text.c_str());
}

void thread_main();

void resume(Thread *thread, void **save_here)
{
    if (thread->state == State::fresh) {
        if (free_stacks.empty()) {
            free_stacks.push_back(new_stack());
            all_stacks.push_back(free_stacks.back());
        }
        thread->stack = free_stacks.back();
        free_stacks.pop_back();
        memcpy(thread->stack, &canary, sizeof canary);
        // As machine_switch_stack leaves a stack: six registers, then where to return to, then 8 bytes so that
        // thread_main starts with the alignment that a call would give it.
        void **top = reinterpret_cast<void **>(thread->stack + stack_size) - 2;
        top[0] = reinterpret_cast<void *>(thread_main);
        top[1] = nullptr;
        thread->stack_pointer = top - 6;
    }
    thread->state = State::ready;
    running = thread;
    view.thread = thread->index;
    view.lane = thread->number % 32;
    view.warp = thread->number / 32;
    ++launch.switches;
    machine_switch_stack(save_here, thread->stack_pointer);
}

void wait(State state, Site site)
{
    Thread *me = running;
    me->state = state;
    me->site = site;
    Thread *next = next_thread();
    if (!next) deadlock();
    if (next == me) me->state = State::ready;
    else resume(next, &me->stack_pointer);
}

void open_block_barrier(Block &block)
{
    block.synced = ++now;
    ++launch.barriers;
    const uint32_t votes = block.votes;
    const uint32_t result = block.operation == BlockOperation::all   ? votes == block.alive
                            : block.operation == BlockOperation::any ? votes > 0
                                                                     : votes;
    block.arrived = block.votes = 0;
    if (launch.checked) block_synchronised(block);
    in_schedule_order(block.threads, [&](Thread &thread) {
        if (thread.state != State::at_block) return;
        thread.result = result;
        make_ready(thread);
    });
}

void look_at_block_barrier(Block &block)
{
    if (block.arrived == 0 || block.arrived != block.alive) return;
    if (block.alive != threads_per_block)
        fault(block.site, "divergent barrier: %u threads are at __syncthreads, %u have exited", block.alive,
              threads_per_block - block.alive);
    open_block_barrier(block);
}

void look_at_cluster_barrier(Cluster &cluster)
{
    if (cluster.pending > 0 || !cluster.anybody_arrived) return;
    for (Block *block : cluster.blocks) cluster.pending += block->alive;
    cluster.anybody_arrived = false;
    ++cluster.phase;
    cluster.opened = ++now;
    ++launch.barriers;
    if (launch.checked) cluster_synchronised(cluster);
    in_schedule_order(cluster.blocks, [](Block *block) {
        in_schedule_order(block->threads, [](Thread &thread) {
            if (thread.state == State::at_cluster) make_ready(thread);
        });
    });
}

// Completes a warp operation if `lead` was the last lane that it had to wait for.
void look_at_warp(Thread *lead)
{
    Thread *warp = lead - lead->number % 32;
    const uint32_t size = std::min(32u, threads_per_block - warp->number);
    uint32_t lanes = 0;
    for (uint32_t lane = 0; lane < size; ++lane) {
        Thread &thread = warp[lane];
        if (!(lead->mask >> lane & 1) || thread.state == State::done) continue;
        if (thread.state != State::at_warp || thread.mask != lead->mask || thread.operation != lead->operation) return;
        if (thread.site != lead->site)
            fault(lead->site, "divergent warp operation: lane %u meets lane %u, which is at %s", lead->number % 32, lane,
                  launch.sites[thread.site]);
        lanes |= 1u << lane;
    }
    ++now;
    ++launch.barriers;
    give_warp_results(warp, lanes);
    // Shuffles and votes exchange registers; only __syncwarp orders memory.
    if (launch.checked && lead->operation == WarpOperation::sync) warp_synchronised(warp, lanes);
    for (uint32_t i = 0; i < size; ++i) {
        const uint32_t lane = launch.seed == 0 ? size - 1 - i : i;
        if (lanes >> lane & 1) make_ready(warp[lane]);
    }
}

// After a lane has exited: it may be the one that others were waiting for.
void look_at_waiting_lanes(Thread *exited)
{
    Thread *warp = exited - exited->number % 32;
    for (uint32_t lane = 0; lane < 32 && warp->number + lane < threads_per_block; ++lane)
        if (warp[lane].state == State::at_warp) look_at_warp(&warp[lane]);
}

void thread_main()
{
    launch.run(launch.arguments);
    Thread *me = running;
    Block &block = *me->block;
    if (memcmp(me->stack, &canary, sizeof canary) != 0) fault(0, "stack overflow (%zu bytes)", stack_size);
    if (!me->copies.empty()) fault(0, "the thread exits with cp.async copies in flight");
    me->state = State::done;
    free_stacks.push_back(me->stack);
    --block.alive;
    --threads_alive;
    spins = 0;
    me->arrived_at[0] = me->arrived_at[1] = ++now;  // whoever has exited holds up no cluster barrier
    if (me->arrivals == block.cluster->phase) --block.cluster->pending;
    look_at_waiting_lanes(me);
    look_at_block_barrier(block);
    look_at_cluster_barrier(*block.cluster);
    if (threads_alive && std::all_of(blocks.begin(), blocks.end(), [](Block &other) { return other.ready.empty(); }))
        deadlock();
    running = nullptr;
    void *never_again;
    machine_switch_stack(&never_again, launcher);
}

}  // namespace

uint64_t random_bits()
{
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

void start_schedule(uint64_t seed)
{
    random_state = seed * 0x9e3779b97f4a7c15 + 1;
    for (int i = 0; i < 8; ++i) random_bits();
    spins = 0;
    next_block_please = false;
}

void enter(Block *block)
{
    current = block;
    view.block = block->index;
    view.cluster_rank = block->rank;
    view.shared = block->window;
}

void make_ready(Thread &thread)
{
    thread.state = State::ready;
    thread.block->ready.push_back(&thread);
    spins = 0;
}

Thread *next_thread()
{
    const bool random = launch.seed > 1;
    if (several_blocks() && (current->ready.empty() || next_block_please || (random && random_bits() % 64 == 0))) {
        const size_t from = random ? random_bits() % blocks.size() : size_t(current - blocks.data()) + 1;
        for (size_t i = 0; i < blocks.size(); ++i) {
            Block &candidate = blocks[(from + i) % blocks.size()];
            if (candidate.ready.empty()) continue;
            enter(&candidate);
            break;
        }
        next_block_please = false;
    }
    auto &ready = current->ready;
    if (ready.empty()) return nullptr;
    if (random) std::swap(ready[random_bits() % ready.size()], ready.back());
    Thread *next = ready.back();
    ready.pop_back();
    return next;
}

void run_until_fault_or_done()
{
    next_block_please = launch.seed == 1 && several_blocks();
    while (*fault_message == 0) {
        Thread *next = next_thread();
        if (!next) return;
        resume(next, &launcher);
    }
}

void forget_stacks() { free_stacks = all_stacks; }  // a fault leaves fibers behind that never finish

void fault(Site site, const char *format, ...)
{
    char text[1024];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    const Index t = running->index, b = running->block->index;
    const char *place = launch.sites[site];
    snprintf(fault_message, fault_message_size, "%s%s%s; by thread (%u,%u,%u) of block (%u,%u,%u)", text,
             *place ? " at " : "", place, t.x, t.y, t.z, b.x, b.y, b.z);
    running = nullptr;
    void *never_again;
    machine_switch_stack(&never_again, launcher);
    __builtin_unreachable();
}

uint64_t warp(WarpOperation operation, uint32_t mask, uint64_t value, uint32_t argument, uint32_t segment, Site site)
{
    Thread *me = running;
    if (!(mask >> me->number % 32 & 1))
        fault(site, "warp operation: lane %u is not in its own mask %08x", me->number % 32, mask);
    me->operation = operation;
    me->mask = mask;
    me->value = value;
    me->argument = argument;
    me->segment = segment;
    me->site = site;
    me->state = State::at_warp;
    look_at_warp(me);
    wait(me->state, site);
    return me->result;
}

bool source_in_range() { return running->in_range; }

uint32_t active_lanes()
{
    const Thread *warp = running - running->number % 32;
    uint32_t lanes = 0;
    for (uint32_t lane = 0; lane < 32 && warp->number + lane < threads_per_block; ++lane)
        if (warp[lane].state != State::done) lanes |= 1u << lane;
    return lanes;
}

uint32_t block_barrier(BlockOperation operation, bool predicate, Site site)
{
    Thread *me = running;
    Block &block = *me->block;
    if (block.arrived > 0 && (block.site != site || block.operation != operation))
        fault(site, "divergent barrier: __syncthreads meets the one at %s", launch.sites[block.site]);
    block.site = site;
    block.operation = operation;
    block.votes += predicate;
    ++block.arrived;
    me->state = State::at_block;
    me->site = site;
    look_at_block_barrier(block);
    wait(me->state, site);
    return uint32_t(me->result);
}

void cluster_arrive(bool relaxed, Site site)
{
    Thread *me = running;
    Cluster &cluster = *me->block->cluster;
    if (me->arrivals != me->waits) fault(site, "cluster barrier: a second arrive without a wait");
    // A relaxed arrival orders nothing: no access is earlier than time 0.
    me->arrived_at[me->arrivals % 2] = relaxed ? 0 : ++now;
    ++me->arrivals;
    --cluster.pending;
    cluster.anybody_arrived = true;
    look_at_cluster_barrier(cluster);
}

void cluster_wait(Site site)
{
    Thread *me = running;
    if (me->arrivals == me->waits) fault(site, "cluster barrier: a wait without an arrive");
    while (me->arrivals > me->block->cluster->phase) wait(State::at_cluster, site);
    ++me->waits;
}

void let_others_run(Site site)
{
    if (++spins > patience * threads_alive) fault(site, "livelock: threads only spin");
    auto &ready = running->block->ready;
    ready.insert(ready.begin(), running);
    next_block_please = true;
    wait(State::ready, site);
}

}  // namespace machine
