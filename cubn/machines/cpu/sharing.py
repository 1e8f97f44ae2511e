"""How the threads of one call share its tasks out among themselves.

Every thread has a region of the tasks of its own, so that two rarely write to the same lines of memory and the
second walk over a region finds in the cache what the first has left; a thread that has finished its region
helps in the others.  A thread that never comes therefore costs nothing but its help.

All they share is an array of integers (`counters`): a line of the cache for the number of threads that have come,
for the tasks done in each of three phases, for the number of the call, and for the next task of every region.

A helper that is done listens for a while whether the next call comes (`bell`, which all calls share), before it goes
to sleep: to be woken up takes as long as normalising a megabyte.  It listens without Python's lock, and the bell
is rung without it, so that neither waits for the other.
"""

# mypy: disable-error-code="untyped-decorator"
# Numba has no type hints, so its decorators hide those of what they decorate.

import platform
import sys
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

MEASURING, MERGING, WRITING = 0, 1, 2
"""The phases of a walk that cannot do with one: moments of pieces, their union, the result."""

LINE = 64
"""Bytes; no two integers share a line of the cache."""

PATIENCE = 4000
"""Turns of a waiting loop that a helper listens for: about 0.2 ms.  OpenMP's threads do so for longer."""

_I64 = ir.IntType(64)
_X86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")


def counters_length(team: int) -> int:
    """Integers (int64) that so many threads share."""
    return (5 + 3 * team) * LINE // 8


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, at: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    moved = builder.gep(builder.bitcast(data, ir.IntType(8).as_pointer()), [at])
    return builder.bitcast(moved, _I64.as_pointer())


def _call(builder: Any, name: str) -> None:
    kind = ir.FunctionType(ir.VoidType(), [])
    builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [])


@intrinsic
def _take_number(typing: Any, counters: Any, at: Any) -> Any:
    """The integer at this offset, which is one larger afterwards; no two threads get the same one."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1])
        return builder.atomic_rmw("add", pointer, ir.Constant(_I64, 1), "seq_cst")

    return types.int64(counters, types.int64), lower


@intrinsic
def _read_number(typing: Any, counters: Any, at: Any) -> Any:
    """The integer at this offset, as other threads have left it by now."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1])
        return builder.load_atomic(pointer, "seq_cst", 8)

    return types.int64(counters, types.int64), lower


@intrinsic
def _publish_stores(typing: Any) -> Any:
    """Wait until every store of this thread, those past the cache included, can be seen by the others."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if _X86:
            _call(builder, "llvm.x86.sse.sfence")
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.none(), lower


@intrinsic
def _rest(typing: Any) -> Any:
    """Tell the processor that this is a waiting loop."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        if _X86:
            _call(builder, "llvm.x86.sse2.pause")
        return context.get_dummy_value()

    return types.none(), lower


_yield_processor = types.ExternalFunction("sched_yield", types.int32())
_CAN_YIELD = sys.platform != "win32"


@njit
def _wait_for(counters, at, wanted):  # type: ignore[no-untyped-def]  # compiled
    """Return when the integer at this offset has reached `wanted`."""
    turns = 0
    while _read_number(counters, at) < wanted:
        turns += 1
        if _CAN_YIELD and turns % 1024 == 0:
            _yield_processor()  # the thread waited for may need this very processor
        else:
            _rest()


@njit
def join(counters, bell, helper):  # type: ignore[no-untyped-def]  # compiled
    """The number of this thread among those that have come; the caller's own wakes up the helpers that listen."""
    if not helper:
        counters[4 * LINE // 8] = _take_number(bell, 0) + 1
    return _take_number(counters, 0)


@njit
def leave(counters, bell, helper):  # type: ignore[no-untyped-def]  # compiled
    """A helper listens for the next call; the caller goes on."""
    if helper:
        heard = _read_number(counters, 4 * LINE)
        turns = 0
        while turns < PATIENCE and (_read_number(bell, 0) == heard or heard == 0):
            turns += 1
            _rest()


@njit
def take(counters, team, me, phase, tasks):  # type: ignore[no-untyped-def]  # compiled
    """The next task of this phase that nobody has taken, or `tasks` if there is none left."""
    for k in range(team):
        region = (me + k) % team
        begin, end = tasks * region // team, tasks * (region + 1) // team
        task = begin + _take_number(counters, (5 + phase * team + region) * LINE)
        if task < end:
            # The second walk goes backwards: the cache holds what was read last.
            return task if phase == MEASURING else begin + end - 1 - task
    return tasks


@njit
def finish(counters, phase):  # type: ignore[no-untyped-def]  # compiled
    """One more task of this phase is done, and all can see its results."""
    _publish_stores()
    _take_number(counters, (1 + phase) * LINE)


@njit
def wait_until_done(counters, phase, tasks):  # type: ignore[no-untyped-def]  # compiled
    """Return when all tasks of this phase are done, whoever does them."""
    _wait_for(counters, (1 + phase) * LINE, tasks)
