// memory.cpp: global memory between guard pages, shared windows, stacks.

#include <sys/mman.h>

#include <cstring>

#include "internals.h"

namespace machine {

std::vector<std::unique_ptr<Region>> regions;

namespace {

constexpr size_t page = 4096;
constexpr size_t gap = 64 << 20;     // nothing is mapped this far around an array, so an index may be wrong by millions
constexpr size_t alignment = 256;    // of every array, as cudaMalloc promises
constexpr uint8_t poison = 0xff;     // NaN in every floating-point format, -1 in every integer

size_t round_up(size_t n, size_t unit) { return (n + unit - 1) / unit * unit; }

char *reserve(size_t size)
{
    void *start = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return start == MAP_FAILED ? nullptr : static_cast<char *>(start);
}

}  // namespace

char *new_stack()
{
    char *start = reserve(stack_size);
    mprotect(start, stack_size, PROT_READ | PROT_WRITE);
    return start;
}

// As much as an address can reach; no more than the block has is ever touched.
char *new_window()
{
    char *start = reserve(window_size);
    mprotect(start, 512 << 10, PROT_READ | PROT_WRITE);
    return start;
}

// The last region found comes first: a kernel goes on where it was.
Region *find_region(uintptr_t address)
{
    for (size_t i = 0; i < regions.size(); ++i) {
        if (address - regions[i]->start >= regions[i]->size) continue;
        if (i > 0) std::swap(regions[i], regions[0]);
        return regions[0].get();
    }
    return nullptr;
}

// Says where an address that belongs to nothing lies, by the array nearest to it.
std::string describe_address(uintptr_t address)
{
    std::string text = "address outside any array";
    size_t nearest = gap;
    for (const auto &region : regions) {
        const bool before = address < region->start;
        const size_t distance = before ? region->start - address : address - region->start - region->size + 1;
        if (distance >= nearest) continue;
        nearest = distance;
        text = std::to_string(distance) + " bytes " + (before ? "before " : "past the end of ") + region->name + " (" +
               std::to_string(region->size) + " bytes)";
    }
    return text;
}

}  // namespace machine

using namespace machine;

extern "C" {

// An array of `size` bytes that starts `offset` bytes after an aligned address, with a guard page behind it.
void *machine_allocate(size_t size, size_t offset, size_t granule, int initialised, const char *name)
{
    const size_t body = round_up(size + offset, alignment), room = round_up(body, page) + page;
    char *mapping = reserve(room + 2 * gap);
    if (!mapping) return nullptr;
    mprotect(mapping + gap, room, PROT_READ | PROT_WRITE);
    char *start = mapping + gap + room - body;
    memset(start, poison, body);
    start += offset;
    regions.push_back(std::make_unique<Region>(Region{reinterpret_cast<uintptr_t>(start), size, granule, initialised != 0,
                                                      true, {}, name, mapping, room + 2 * gap, 0, 0}));
    return start;
}

// A kernel's own __device__ or __constant__ variable.
void machine_adopt(void *start, size_t size, const char *name)
{
    regions.push_back(std::make_unique<Region>(
        Region{reinterpret_cast<uintptr_t>(start), size, 1, true, false, {}, name, nullptr, 0, 0, 0}));
}

void machine_free(void *start)
{
    for (auto &region : regions) {
        if (region->start != reinterpret_cast<uintptr_t>(start)) continue;
        if (region->guarded) munmap(region->mapping, region->mapping_size);
        std::swap(region, regions.back());
        regions.pop_back();
        return;
    }
}

// Where the array that contains `address` starts, or null.
void *machine_array_at(void *address)
{
    const Region *region = find_region(reinterpret_cast<uintptr_t>(address));
    return region && region->guarded ? reinterpret_cast<void *>(region->start) : nullptr;
}

// Bytes read and written in the last launch; returns how many arrays there are, of which `room` are told.
size_t machine_traffic(size_t room, void **starts, uint64_t *read, uint64_t *written)
{
    size_t count = 0;
    for (const auto &region : regions) {
        if (!region->guarded || (region->read == 0 && region->written == 0)) continue;
        if (count < room) {
            starts[count] = reinterpret_cast<void *>(region->start);
            read[count] = region->read;
            written[count] = region->written;
        }
        ++count;
    }
    return count;
}

// Marks in `mask`, one byte for each `item` bytes, what neither a kernel nor the host has written.
void machine_unwritten(void *start, size_t item, uint8_t *mask)
{
    for (const auto &region : regions) {
        if (region->start != reinterpret_cast<uintptr_t>(start)) continue;
        const uint8_t *bytes = static_cast<const uint8_t *>(start);
        for (size_t i = 0; i * item < region->size; ++i) {
            bool untouched = !region->initialised;
            for (size_t k = i * item; k < (i + 1) * item && untouched; ++k) untouched = bytes[k] == poison;
            if (untouched && !region->cells.empty()) untouched = region->cells[i * item / region->granule].writer == 0;
            mask[i] = untouched;
        }
        return;
    }
}

}  // extern "C"
