// checker.cpp: what every access to memory goes through.
//
// Always: bounds, alignment, traffic.  In a checked launch also reads of what nobody has written, and races: two
// accesses to the same bytes, one of them a write, that no synchronisation orders.  What orders accesses:
//
//   __syncthreads     all threads of the block
//   __syncwarp        the lanes that take part (shuffles and votes do not: they only exchange registers)
//   cluster barrier   what threads did before they arrived, for those who have waited
//   __threadfence     what a thread has done or seen before the fence, together with an atomic (or volatile)
//     and an atomic   operation after it, for whoever later operates on the same variable
//
// Two atomic operations never race.  A race is found only if both accesses happen in this run, but whatever the
// order in which this run performs them.
//
// More lenient than the memory model: whoever reads needs no fence behind its atomic operation.  And of many readers
// of a cell only two are remembered, so that a later write may be told of a race with another than the first.

#include <algorithm>

#include "internals.h"

namespace machine {

Time now = 1, launched;
std::unordered_map<uintptr_t, Clock> published;

void Clock::clear()
{
    blocks.clear();
    threads.clear();
}

void Clock::see_block(uint32_t block, Time until)
{
    if (blocks.empty()) blocks.resize(block_count);
    blocks[block] = std::max(blocks[block], until);
}

void Clock::see_thread(uint32_t block, uint32_t thread, Time until)
{
    std::vector<Time> &known = threads[block];
    if (known.empty()) known.resize(threads_per_block);
    known[thread] = std::max(known[thread], until);
}

static void join_times(std::vector<Time> &mine, const std::vector<Time> &other)
{
    mine.resize(std::max(mine.size(), other.size()));
    for (size_t i = 0; i < other.size(); ++i) mine[i] = std::max(mine[i], other[i]);
}

void Clock::join(const Clock &other)
{
    join_times(blocks, other.blocks);
    for (auto &[block, times] : other.threads) join_times(threads[block], times);
}

bool Clock::covers(uint32_t block, uint32_t thread, Time when) const
{
    if (!blocks.empty() && when < blocks[block]) return true;
    if (threads.empty()) return false;
    const auto found = threads.find(block);
    return found != threads.end() && when < found->second[thread];
}

namespace {

constexpr uint64_t steps_per_access = 16;  // about as much time as so many branches
std::vector<uint8_t> shared_bytes_in_use;  // per byte of a window: whether a variable lies there

uint32_t block_of(ThreadId who) { return (who - 1) / threads_per_block; }
uint32_t number_of(ThreadId who) { return (who - 1) % threads_per_block; }

// Whether that access is ordered before what the running thread does now.
bool ordered(ThreadId who, Time when)
{
    const Thread &me = *running;
    if (who == me.id || when < launched) return true;
    const Block &mine = *me.block;
    const uint32_t block = block_of(who), number = number_of(who);
    if (block == mine.number) {
        if (when < mine.synced) return true;
        if (number / 32 == me.number / 32 && when < me.synced[number % 32]) return true;
    }
    if (me.waits > 0 && block / launch.cluster == mine.number / launch.cluster) {
        const Thread &peer = mine.cluster->blocks[block % launch.cluster]->threads[number];
        if (when < peer.arrived_at[(me.waits - 1) % 2]) return true;
    }
    return mine.seen.covers(block, number, when) || me.seen.covers(block, number, when);
}

std::string name_of(ThreadId who)
{
    return "thread " + std::to_string(number_of(who)) + " of block " + std::to_string(block_of(who));
}

struct Target {
    Cell *cells;
    size_t count;
    Time born;              // what the cells say about earlier times is about memory that is gone
    bool initialised;
    const char *name;
};

const char *verb(Access kind)
{
    switch (kind) {
        case Access::read: return "read";
        case Access::write: return "write";
        case Access::atomic_read: return "volatile read";
        case Access::atomic_write: return "volatile write";
        default: return "atomic operation";
    }
}

Target shared_target(Block &block, const char *pointer, uint32_t size, Access kind, Site site)
{
    const size_t offset = size_t(pointer - block.window);
    if (!valid_shared(offset, size)) {
        const int64_t told = offset < window_size / 2 ? int64_t(offset) : int64_t(offset) - int64_t(window_size);
        fault(site, "out-of-bounds shared %s of %u bytes, at byte %lld of the block's shared memory", verb(kind), size,
              static_cast<long long>(told));
    }
    if (block.alive == 0) fault(site, "%s in the shared memory of block %u, which has exited", verb(kind), block.number);
    if (!launch.checked) return {};
    const size_t first = offset / launch.shared_granule, last = (offset + size - 1) / launch.shared_granule;
    return {&block.cells[first], last - first + 1, block.born, false, "shared memory"};
}

Target global_target(Region &region, uintptr_t address, uint32_t size, Access kind, Site site)
{
    if (address + size > region.start + region.size)
        fault(site, "out-of-bounds %s of %u bytes: %s", verb(kind), size, describe_address(address + size - 1).c_str());
    const bool reads = kind != Access::write && kind != Access::atomic_write;
    const bool writes = kind != Access::read && kind != Access::atomic_read;
    if (reads) region.read += size;
    if (writes) region.written += size;
    if (!launch.checked) return {};
    if (region.cells.empty()) region.cells.resize(region.size / region.granule + 1);
    const size_t offset = address - region.start;
    const size_t first = offset / region.granule, last = (offset + size - 1) / region.granule;
    return {&region.cells[first], last - first + 1, 0, region.initialised, region.name.c_str()};
}

[[noreturn]] void race(const Target &target, Access kind, const char *earlier, ThreadId who, Site site)
{
    fault(site, "race in %s: %s after a %s by %s with nothing that orders them", target.name, verb(kind), earlier,
          name_of(who).c_str());
}

void remember_reader(Cell &cell)
{
    const ThreadId me = running->id;
    for (Cell::Reader &reader : cell.readers) {
        if (reader.who != 0 && reader.who != me && !ordered(reader.who, reader.when)) continue;
        reader = {me, now};
        return;
    }
    const bool upside_down = cell.readers[0].who > cell.readers[1].who;
    Cell::Reader &low = cell.readers[upside_down], &high = cell.readers[!upside_down];
    if (me < low.who) low = {me, now};
    else if (me > high.who) high = {me, now};
}

// Global memory starts as poison: bytes that differ from it were written by the host.
bool host_wrote(const char *pointer, uint32_t size)
{
    return std::any_of(pointer, pointer + size, [](char byte) { return byte != char(0xff); });
}

void check(const Target &target, const char *pointer, uint32_t size, Access kind, Site site)
{
    const bool reads = kind == Access::read || kind == Access::atomic_read || kind == Access::read_modify_write;
    const bool atomic = kind != Access::read && kind != Access::write;
    const bool writes = kind != Access::read && kind != Access::atomic_read;
    for (size_t i = 0; i < target.count; ++i) {
        Cell &cell = target.cells[i];
        if (cell.written < target.born) cell.writer = 0;
        for (Cell::Reader &reader : cell.readers)
            if (reader.when < target.born) reader.who = 0;

        const ThreadId writer = cell.writer & ~atomic_flag;
        if (writer && !(atomic && cell.writer & atomic_flag) && !ordered(writer, cell.written))
            race(target, kind, "write", writer, site);
        if (reads && !writer && !target.initialised && !(target.born == 0 && host_wrote(pointer, size)))
            fault(site, "%s of uninitialised %s", verb(kind), target.name);
        if (writes) {
            for (const Cell::Reader &reader : cell.readers)
                if (reader.who && !ordered(reader.who, reader.when)) race(target, kind, "read", reader.who, site);
            cell = {running->id | (atomic ? atomic_flag : 0), now, {}};
        }
        else if (!atomic)
            remember_reader(cell);
    }
}

// An atomic operation publishes what the thread's fences covered, and sees what others have published there.
void exchange_clocks(uintptr_t address, Access kind)
{
    Thread &me = *running;
    const bool writes = kind != Access::atomic_read;
    for (const Clock *fenced : {&me.fenced, &me.block->fenced})
        if (writes && !fenced->empty()) published[address].join(*fenced);
    if (kind == Access::atomic_write) return;
    const auto found = published.find(address);
    if (found != published.end()) me.seen.join(found->second);
}

}  // namespace

void start_checking()
{
    launched = ++now;
    published.clear();
    shared_bytes_in_use.assign(launch.shared_bytes, 0);
    for (uint32_t i = 0; i < launch.shared_count; ++i) {
        const SharedVariable &variable = launch.shared[i];
        std::fill_n(shared_bytes_in_use.begin() + variable.offset, variable.size, uint8_t(1));
    }
    for (auto &region : regions) region->read = region->written = 0;
    constexpr Time far = Time(1) << 30;  // with room for the longest launch before the clock overflows
    if (now < far) return;
    now = launched = 2;
    for (auto &region : regions)
        for (Cell &cell : region->cells) cell.written = cell.readers[0].when = cell.readers[1].when = 1;
    for (Block &block : blocks) block.cells.clear();
}

bool valid_shared(size_t offset, uint32_t size)
{
    return offset + size <= shared_bytes_in_use.size() && shared_bytes_in_use[offset] &&
           shared_bytes_in_use[offset + size - 1];
}

// Synchronising passes on what was seen and fenced.  Strictly, a fence before __syncthreads and an atomic after it
// by another thread are no release pattern of the memory model; devices honour it, and much code relies on that.
static void pass_on(Clock &from, Clock &to)
{
    if (from.empty()) return;
    to.join(from);
    from.clear();
}

void block_synchronised(Block &block)
{
    for (Thread &thread : block.threads) {
        pass_on(thread.seen, block.seen);
        pass_on(thread.fenced, block.fenced);
    }
}

void warp_synchronised(Thread *warp, uint32_t lanes)
{
    Time synced[32] = {};
    Clock seen, fenced;
    for (uint32_t lane = 0; lane < 32; ++lane) {
        if (!(lanes >> lane & 1)) continue;
        for (uint32_t other = 0; other < 32; ++other) synced[other] = std::max(synced[other], warp[lane].synced[other]);
        pass_on(warp[lane].seen, seen);
        pass_on(warp[lane].fenced, fenced);
    }
    for (uint32_t lane = 0; lane < 32; ++lane)
        if (lanes >> lane & 1) synced[lane] = now;
    for (uint32_t lane = 0; lane < 32; ++lane) {
        if (!(lanes >> lane & 1)) continue;
        std::copy_n(synced, 32, warp[lane].synced);
        if (!seen.empty()) warp[lane].seen = seen;
        if (!fenced.empty()) warp[lane].fenced = fenced;
    }
}

void cluster_synchronised(Cluster &cluster)
{
    Clock seen, fenced;
    for (Block *block : cluster.blocks) {
        block_synchronised(*block);
        seen.join(block->seen);
        fenced.join(block->fenced);
    }
    for (Block *block : cluster.blocks) {
        block->seen.join(seen);
        block->fenced.join(fenced);
    }
}

void fence()
{
    if (!launch.checked) return;
    Thread &me = *running;
    const Block &mine = *me.block;
    me.fenced.join(mine.seen);
    me.fenced.join(me.seen);
    me.fenced.see_block(mine.number, mine.synced);
    if (me.waits > 0)
        for (const Block *block : mine.cluster->blocks) me.fenced.see_block(block->number, mine.cluster->opened);
    const uint32_t first_lane = me.number - me.number % 32;
    for (uint32_t lane = 0; lane < 32; ++lane)
        if (me.synced[lane] > mine.synced) me.fenced.see_thread(mine.number, first_lane + lane, me.synced[lane]);
    me.fenced.see_thread(mine.number, me.number, ++now);
}

void access(const void *pointer, uint32_t size, Access kind, Site site)
{
    Thread &me = *running;
    const char *bytes = static_cast<const char *>(pointer);
    const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
    ++launch.accesses;
    if (view.steps_left < steps_per_access) fault(site, "endless loop");
    view.steps_left -= steps_per_access;
    if (address & (size - 1)) fault(site, "misaligned %s of %u bytes", verb(kind), size);

    Target target;
    if (size_t(bytes - me.block->window) < window_size) target = shared_target(*me.block, bytes, size, kind, site);
    else if (size_t(bytes - me.stack) < stack_size) return;  // a local array through a generic address
    else if (Region *region = find_region(address)) target = global_target(*region, address, size, kind, site);
    else {
        const auto &peers = me.block->cluster->blocks;
        const auto peer = std::find_if(peers.begin(), peers.end(),
                                       [&](Block *block) { return size_t(bytes - block->window) < window_size; });
        if (peer == peers.end())
            fault(site, "out-of-bounds %s of %u bytes: %s", verb(kind), size, describe_address(address).c_str());
        target = shared_target(**peer, bytes, size, kind, site);
    }
    if (!launch.checked) return;
    check(target, bytes, size, kind, site);
    if (kind != Access::read && kind != Access::write) exchange_clocks(address, kind);
}

char *peer_window(uint32_t rank, Site site)
{
    const auto &peers = running->block->cluster->blocks;
    if (rank >= 255 - 16) fault(site, "out-of-bounds shared access before the block's shared memory");
    if (rank >= peers.size()) fault(site, "shared memory of rank %u in a cluster of %zu", rank, peers.size());
    return peers[rank]->window;
}

uint64_t cluster_address(uint64_t generic, Site site)
{
    for (const Block *block : running->block->cluster->blocks) {
        const uint64_t offset = generic - reinterpret_cast<uint64_t>(block->window);
        if (offset < window_size) return uint64_t(block->rank + 1) << window_bits | offset;
    }
    fault(site, "the address is not one of the cluster's shared memory");
}

// cp.async: the source is read at once, the target may hold anything until the thread has waited for the copy.
void copy_async(char *to, const char *from, uint32_t size, uint32_t source_size, Site site)
{
    if (size != 4 && size != 8 && size != 16) fault(site, "cp.async of %u bytes", size);
    if (source_size > size) fault(site, "cp.async: %u of %u bytes", source_size, size);
    const auto aligned = [&](const char *p) { return (reinterpret_cast<uintptr_t>(p) & (size - 1)) == 0; };
    if (!aligned(to) || !aligned(from)) fault(site, "misaligned cp.async of %u bytes", size);
    // The bytes that are copied may be fewer than the power of two that access() knows.
    for (uint32_t done = 0; done < source_size;) {
        uint32_t part = size;
        while (part > source_size - done) part /= 2;
        access(from + done, part, Access::read, site);
        done += part;
    }
    access(to, size, Access::write, site);
    if (launch.checked) {
        const size_t offset = size_t(to - running->block->window), granule = launch.shared_granule;
        for (size_t i = offset / granule; i <= (offset + size - 1) / granule; ++i) running->block->cells[i].writer = 0;
    }
    std::fill_n(to, size, char(0xff));
    running->copies.push_back({to, from, size, source_size, running->copy_group});
}

void copy_commit() { ++running->copy_group; }

void copy_wait(uint32_t left_alone, Site site)
{
    auto &copies = running->copies;
    size_t kept = 0;
    for (const Copy &copy : copies) {
        if (copy.group + left_alone >= running->copy_group) {
            copies[kept++] = copy;
            continue;
        }
        std::copy_n(copy.from, copy.source_size, copy.to);
        std::fill(copy.to + copy.source_size, copy.to + copy.size, char(0));
        if (launch.checked) access(copy.to, copy.size, Access::write, site);
    }
    copies.resize(kept);
}

}  // namespace machine
