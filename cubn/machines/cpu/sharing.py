"""How the threads of one call share its tasks out among themselves.

Every thread has a region of the tasks of its own, so that two rarely write to the same lines of memory and the
second walk over a region finds in the cache what the first has left; a thread that has finished its region
helps in the others.  A thread that never comes therefore costs nothing but its help.

All they share is an array of integers (`counters`): a line of the cache for the number of threads that have come,
for the tasks done in each of three phases, and for the next task of every region.

A call that wants help puts its work on the `board`, an array of integers that all calls and all helpers know, in
one of a few slots.  There it says how many may come, and where the work and its arguments are.  Helpers
listen to the bell, which every new work rings, for a while before they go to sleep: to be woken up takes as long
as normalising a megabyte.  They come and go without Python's lock.  The caller does what tasks nobody takes, shuts
its slot, and returns when those who have come have left.
"""

# mypy: disable-error-code="untyped-decorator"
# Numba has no type hints, so its decorators hide those of what they decorate.

import platform
import sys
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.typing import signature
from numba.extending import intrinsic

MEASURING, MERGING, WRITING = 0, 1, 2
"""The phases of a walk that cannot do with one: moments of pieces, their union, the result."""

LINE = 64
"""Bytes; no two integers that different threads write to share a line of the cache."""

BELL = 0
"""Where on the board the number of works so far is."""

SLOTS, SLOT = 8, 3 * LINE
"""Calls that can have helpers at the same time (more do without), and the bytes of each.

A slot has three lines: who has it (0: nobody) with the addresses of the work and of its arguments, the places
that are left, and the helpers that have left again.
"""

ALERT, PATIENCE = 4000, 100_000
"""Turns of a waiting loop that a helper listens for, at first alone, then letting others have the processor.

A turn takes 10 to 50 ns, so it sleeps after one to five milliseconds; OpenMP's threads listen as long or longer.
"""

_I8, _I32, _I64 = ir.IntType(8), ir.IntType(32), ir.IntType(64)
_X86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")


def board_length() -> int:
    """Integers (int64) of a board."""
    return (LINE + SLOTS * SLOT) // 8


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
def _exchange_number(typing: Any, counters: Any, at: Any, value: Any) -> Any:
    """Put an integer at this offset and return what was there."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1])
        return builder.atomic_rmw("xchg", pointer, args[2], "seq_cst")

    return types.int64(counters, types.int64, types.int64), lower


@intrinsic
def _replace_number(typing: Any, counters: Any, at: Any, expected: Any, value: Any) -> Any:
    """Put an integer at this offset if `expected` is there; True if it was."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1])
        return builder.extract_value(builder.cmpxchg(pointer, args[2], args[3], "seq_cst", "seq_cst"), 1)

    return types.boolean(counters, types.int64, types.int64, types.int64), lower


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
def start(team):  # type: ignore[no-untyped-def]  # compiled
    """Counters for a call of so many threads."""
    return np.zeros((4 + 3 * team) * LINE // 8, np.int64)


@njit
def join(counters):  # type: ignore[no-untyped-def]  # compiled
    """The number of this thread among those that have come."""
    return _take_number(counters, 0)


@njit
def take(counters, team, me, phase, tasks, backwards):  # type: ignore[no-untyped-def]  # compiled
    """The next task of this phase that nobody has taken, or `tasks` if there is none left."""
    for k in range(team):
        region = (me + k) % team
        begin, end = tasks * region // team, tasks * (region + 1) // team
        task = begin + _take_number(counters, (4 + phase * team + region) * LINE)
        if task < end:
            return begin + end - 1 - task if backwards else task
    return tasks


@njit
def goes_on(team, task, tasks):  # type: ignore[no-untyped-def]  # compiled
    """True if the next task is in the same region, so that it is likely to be the next of this thread."""
    region = (team * (task + 1) - 1) // tasks
    return tasks * (region + 1) // team > task + 1


@njit
def finish(counters, phase):  # type: ignore[no-untyped-def]  # compiled
    """One more task of this phase is done, and all can see its results."""
    _publish_stores()
    _take_number(counters, (1 + phase) * LINE)


@njit
def wait_until_done(counters, phase, tasks):  # type: ignore[no-untyped-def]  # compiled
    """Return when all tasks of this phase are done, whoever does them."""
    _wait_for(counters, (1 + phase) * LINE, tasks)


# --- the board --------------------------------------------------------------------------------------------


@intrinsic
def _run(typing: Any, work: Any, frame: Any) -> Any:
    """Call a work that `together` has made; 0 if it was done."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = ir.FunctionType(_I32, [_I8.as_pointer()])
        function = builder.inttoptr(args[0], kind.as_pointer())
        return builder.call(function, [builder.inttoptr(args[1], _I8.as_pointer())])

    return types.int32(types.int64, types.int64), lower


@njit
def _call_helpers(board, places, work, frame):  # type: ignore[no-untyped-def]  # compiled
    """Put a work on the board; the offset of its slot, 0 if there is none free."""
    for slot in range(SLOTS):
        at = LINE + slot * SLOT
        if _replace_number(board, at, 0, 1):
            board[at // 8 + 1], board[at // 8 + 2] = work, frame
            _exchange_number(board, at + 2 * LINE, 0)
            _exchange_number(board, at + LINE, places)
            _take_number(board, BELL)
            return at
    return 0


@njit
def _dismiss_helpers(board, places, at):  # type: ignore[no-untyped-def]  # compiled
    """Let nobody come any more, and wait for those who have."""
    came = places - _exchange_number(board, at + LINE, 0)
    _wait_for(board, at + 2 * LINE, came)
    _exchange_number(board, at, 0)


def _share(board, team, work, frame):  # type: ignore[no-untyped-def]  # compiled
    """Run a work here and on helpers; 0 if it was done."""
    at = 0
    if team > 1:
        at = _call_helpers(board, team - 1, work, frame)
    failed = _run(work, frame)
    if at:
        _dismiss_helpers(board, team - 1, at)
    return failed


@intrinsic
def together(typing: Any, function: Any, arguments: Any, board: Any, team: Any) -> Any:
    """Call a compiled function with these arguments on as many threads as come; True if memory was lacking."""
    called = function.get_call_type(typing, tuple(arguments), {})

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        compiled = function.dispatcher.overloads[called.args]
        context.active_code_library.add_linking_library(compiled.library)
        values = [builder.extract_value(args[1], k) for k in range(len(arguments))]
        frame = cgutils.alloca_once(builder, ir.LiteralStructType([value.type for value in values]))
        for k, value in enumerate(values):
            builder.store(value, cgutils.gep_inbounds(builder, frame, 0, k))

        # work(frame): unpack the arguments and call the function
        kind = ir.FunctionType(_I32, [_I8.as_pointer()])
        work = ir.Function(builder.module, kind, builder.module.get_unique_name("work"))
        work.linkage = "internal"
        inside = ir.IRBuilder(work.append_basic_block())
        given = inside.bitcast(work.args[0], frame.type)
        unpacked = [inside.load(cgutils.gep_inbounds(inside, given, 0, k)) for k in range(len(values))]
        target = context.declare_function(builder.module, compiled.fndesc)
        status, _ = context.call_conv.call_function(inside, target, called.return_type, called.args, unpacked)
        inside.ret(inside.zext(status.is_error, _I32))

        addresses = [builder.ptrtoint(pointer, _I64) for pointer in (work, frame)]
        kind = signature(types.int32, sig.args[2], types.int64, types.int64, types.int64)
        failed = context.compile_internal(builder, _share, kind, [args[2], args[3], *addresses])
        return builder.icmp_unsigned("!=", failed, ir.Constant(_I32, 0))

    return types.boolean(function, arguments, board, types.int64), lower


@njit
def _enter(board, at):  # type: ignore[no-untyped-def]  # compiled
    """Take a place at this work, if there is one left."""
    places = _read_number(board, at + LINE)
    while places > 0:
        if _replace_number(board, at + LINE, places, places - 1):
            return True
        places = _read_number(board, at + LINE)
    return False


def serve(board):  # type: ignore[no-untyped-def]  # compiled
    """Do what is on the board, until nothing new has come for a while."""
    heard, turns = -1, 0
    while turns < PATIENCE:
        now = _read_number(board, BELL)
        if now != heard:
            heard, turns = now, 0
            for slot in range(SLOTS):
                at = LINE + slot * SLOT
                if _enter(board, at):
                    _run(board[at // 8 + 1], board[at // 8 + 2])
                    _take_number(board, at + 2 * LINE)
        else:
            turns += 1
            _rest()
            if _CAN_YIELD and turns > ALERT and turns % 32 == 0:
                _yield_processor()
