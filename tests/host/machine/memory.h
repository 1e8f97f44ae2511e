// memory.h: PTX's instructions on memory, as C++.

#pragma once

#include <cstring>

#include "arithmetic.h"
#include "machine.h"

using machine::Access;
using machine::Site;

// A generic or global address is a host address.  A shared address is an offset into the block's window; in the
// cluster's window, (rank + 1) << window_bits is added.  A local address is a host address in the thread's stack.
enum class Space { generic, global, shared, local };

template <Space space> INLINE char *at(u64 address, Site site)
{
    if constexpr (space != Space::shared) return reinterpret_cast<char *>(address);
    else {
        const u64 rank = (address & 0xffffffff) >> machine::window_bits;
        char *window = rank == 0 ? machine::view.shared : machine::peer_window(u32(rank) - 1, site);
        return window + (address & (machine::window_size - 1));
    }
}

INLINE u64 shared_to_generic(u64 address, Site site) { return reinterpret_cast<u64>(at<Space::shared>(address, site)); }
INLINE u64 generic_to_shared(u64 address) { return address - reinterpret_cast<u64>(machine::view.shared); }
INLINE u64 map_shared(u64 address, u32 rank)
{
    return (address & (machine::window_size - 1)) | u64(rank + 1) << machine::window_bits;
}

template <Space space, u32 bytes, Access kind> INLINE char *visit(u64 address, Site site)
{
    char *pointer = at<space>(address, site);
    if (space == Space::generic || space == Space::global || (space == Space::shared && machine::view.checked))
        machine::access(pointer, bytes, kind, site);
    return pointer;
}

template <class T, Space space, Access kind, class... Registers> INLINE void load(u64 address, Site site, Registers &...to)
{
    if constexpr (kind == Access::atomic_read) machine::let_others_run(site);
    const char *from = visit<space, sizeof(T) * sizeof...(Registers), kind>(address, site);
    const auto one = [&](auto &target) {
        T value;
        memcpy(&value, from, sizeof value);
        from += sizeof value;
        put(target, value);
    };
    (one(to), ...);
}

template <class T, Space space, Access kind, class... Registers> INLINE void store(u64 address, Site site, Registers... values)
{
    char *to = visit<space, sizeof(T) * sizeof...(Registers), kind>(address, site);
    const auto one = [&](auto bits) {
        const T value = as<T>(bits);
        memcpy(to, &value, sizeof value);
        to += sizeof value;
    };
    (one(values), ...);
}

enum class Atomic { add, exch, cas, min, max, and_, or_, xor_, inc, dec };

template <class T, Space space, Atomic operation> INLINE T atomic(u64 address, Site site, T operand, T replacement = {})
{
    machine::let_others_run(site);
    T *cell = reinterpret_cast<T *>(visit<space, sizeof(T), Access::read_modify_write>(address, site));
    const T old = *cell;
    if constexpr (operation == Atomic::add) *cell = add(old, operand);
    else if constexpr (operation == Atomic::exch) *cell = operand;
    else if constexpr (operation == Atomic::cas) *cell = old == operand ? replacement : old;
    else if constexpr (operation == Atomic::min) *cell = min_(old, operand);
    else if constexpr (operation == Atomic::max) *cell = max_(old, operand);
    else if constexpr (operation == Atomic::and_) *cell = old & operand;
    else if constexpr (operation == Atomic::or_) *cell = old | operand;
    else if constexpr (operation == Atomic::xor_) *cell = old ^ operand;
    else if constexpr (operation == Atomic::inc) *cell = old >= operand ? 0 : old + 1;
    else *cell = old == 0 || old > operand ? operand : old - 1;
    return old;
}

// Before a branch to an earlier instruction: no kernel of a test takes this many, so it would never end.
INLINE void step(Site site)
{
    if (machine::view.steps_left == 0) machine::fault(site, "endless loop");
    --machine::view.steps_left;
}
