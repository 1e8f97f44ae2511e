// warps.cpp: what the lanes of a warp receive from a shuffle, a vote or a reduction.

#include <algorithm>

#include "internals.h"

namespace machine {
namespace {

// Which lane a shuffle reads from, and whether that is the lane asked for.
uint32_t source_lane(const Thread &thread, uint32_t lane, bool &in_range)
{
    const uint32_t size = 32 - thread.segment, first = lane & ~(size - 1), by = thread.argument;
    int64_t source = lane;
    switch (thread.operation) {
        case WarpOperation::shuffle_index: source = first | (by & (size - 1)); break;
        case WarpOperation::shuffle_up: source = int64_t(lane) - by; break;
        case WarpOperation::shuffle_down: source = int64_t(lane) + by; break;
        case WarpOperation::shuffle_xor: source = lane ^ by; break;
        default: break;
    }
    // A xor may reach down into another segment, as on the device.
    in_range = source < first + size && (source >= first || thread.operation == WarpOperation::shuffle_xor);
    return in_range ? uint32_t(source) : lane;
}

uint64_t reduced(WarpOperation operation, const Thread *warp, uint32_t lanes)
{
    uint32_t result = 0;
    bool first = true;
    for (uint32_t lane = 0; lane < 32; ++lane) {
        if (!(lanes >> lane & 1)) continue;
        const uint32_t v = uint32_t(warp[lane].value);
        if (first) result = v;
        else switch (operation) {
            case WarpOperation::add: result += v; break;
            case WarpOperation::min: result = uint32_t(std::min(int32_t(result), int32_t(v))); break;
            case WarpOperation::max: result = uint32_t(std::max(int32_t(result), int32_t(v))); break;
            case WarpOperation::umin: result = std::min(result, v); break;
            case WarpOperation::umax: result = std::max(result, v); break;
            case WarpOperation::bit_and: result &= v; break;
            case WarpOperation::bit_or: result |= v; break;
            default: result ^= v; break;
        }
        first = false;
    }
    return result;
}

}  // namespace

void give_warp_results(Thread *warp, uint32_t lanes)
{
    uint32_t votes = 0;
    for (uint32_t lane = 0; lane < 32; ++lane)
        if (lanes >> lane & 1 && warp[lane].value & 1) votes |= 1u << lane;

    for (uint32_t lane = 0; lane < 32; ++lane) {
        if (!(lanes >> lane & 1)) continue;
        Thread &thread = warp[lane];
        switch (thread.operation) {
            case WarpOperation::sync: break;
            case WarpOperation::ballot: thread.result = votes; break;
            case WarpOperation::any: thread.result = votes != 0; break;
            case WarpOperation::all: thread.result = votes == lanes; break;
            case WarpOperation::match_any:
                thread.result = 0;
                for (uint32_t other = 0; other < 32; ++other)
                    if (lanes >> other & 1 && warp[other].value == thread.value) thread.result |= 1u << other;
                break;
            case WarpOperation::shuffle_index:
            case WarpOperation::shuffle_up:
            case WarpOperation::shuffle_down:
            case WarpOperation::shuffle_xor: {
                const uint32_t source = source_lane(thread, lane, thread.in_range);
                if (!(lanes >> source & 1))
                    fault(thread.site, "shuffle: lane %u reads lane %u, which takes no part", lane, source);
                thread.result = warp[source].value;
                break;
            }
            default: thread.result = reduced(thread.operation, warp, lanes);
        }
    }
}

}  // namespace machine
