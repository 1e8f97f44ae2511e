"""Helper threads: they wait for kernels to run, and run them without Python.

A kernel shares its tasks out by counters in memory (`cubn.machines.cpu.sharing`), so it does not matter how many
threads run it or when they come: the caller starts at once, helpers join as they hear of it, and one that comes
too late finds nothing to do.  The kernel returns when all tasks are done.  Nothing about the result depends
on who did what, because tasks are cut by shape alone and their results are merged in order.

Numba's own threads are not used.  Two of its three threading layers do not survive a fork and one cannot be
called from two threads; these can, and a forked child simply starts its own.
"""

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.np.ufunc import parallel

from cubn.machines.cpu.compiling import BOARD, compile_for, kernel
from cubn.machines.cpu.sharing import board_length, serve


class Helper(NamedTuple):
    """One helper thread: what wakes it up, and its number in the system."""

    alarm: threading.Lock
    thread: int


_board = np.zeros(board_length(), np.int64)
_asleep: deque[Helper] = deque()
_helpers = 0
_starting = threading.Lock()


def thread_count() -> int:
    """Threads a call may use: `numba.set_num_threads` of this thread, else `NUMBA_NUM_THREADS`."""
    if parallel._is_initialized:  # only then can somebody have set it; asking would start Numba's threads
        return int(numba.get_num_threads())
    return int(numba.config.NUMBA_NUM_THREADS)


def run(kernel: Callable[..., Any], arguments: tuple[Any, ...], tasks: int) -> None:
    """Run a kernel here, and on as many helpers as there are tasks worth one."""
    team = 1 if tasks == 1 else min(thread_count(), tasks)
    if team > 1:
        if _helpers < team - 1:
            _start(team - 1)
        if _asleep:
            _wake(team - 1)
    kernel(arguments, _board, team)


def _start(wanted: int) -> None:
    global _helpers
    listen = _serve()
    with _starting:
        while _helpers < wanted:
            alarm = threading.Lock()
            alarm.acquire()
            name = f"cubn-{_helpers}"
            thread = threading.Thread(target=_help, args=(listen, _board, _asleep, alarm), name=name, daemon=True)
            thread.start()
            _asleep.append(Helper(alarm, thread.native_id or 0))
            _helpers += 1


def _help(listen: Callable[..., Any], board: Any, asleep: deque[Helper], alarm: threading.Lock) -> None:
    me = Helper(alarm, threading.get_native_id())
    while True:
        alarm.acquire()  # until a caller releases it
        if _MOVES:
            with suppress(OSError):
                os.sched_setaffinity(0, os.sched_getaffinity(os.getpid()))
        listen(board)
        asleep.append(me)


def _wake(wanted: int) -> None:
    """Wake up so many helpers, each on another processor than this one, where it would have to wait for us.

    Some kernels put a thread that wakes up on the processor of the one that woke it, and move it milliseconds later.
    """
    for _ in range(wanted):
        try:
            helper = _asleep.pop()
        except IndexError:
            return  # all are awake
        if _MOVES:
            with suppress(OSError):
                os.sched_setaffinity(helper.thread, os.sched_getaffinity(0) - {_processor()})  # fails if it is empty
        helper.alarm.release()


_MOVES = hasattr(os, "sched_setaffinity")


@cache
def _system() -> Any:
    return ctypes.CDLL(None)


def _processor() -> int:
    """The processor that this thread runs on."""
    return int(_system().sched_getcpu())


@cache
def _serve() -> Any:
    return compile_for(kernel(serve), BOARD)


def _forget() -> None:
    """In a forked child the helpers are gone, and the board may have been left in any state."""
    global _board, _asleep, _helpers, _starting
    _board, _asleep, _helpers, _starting = np.zeros_like(_board), deque(), 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
