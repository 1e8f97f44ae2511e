"""Helper threads: a few Python threads that wait for kernels to run.

A kernel shares its tasks out by counters in memory (`cubn.machines.cpu.sharing`), so it does not matter how many
threads run it or when they come: the caller starts at once, helpers join as they wake up, and one that comes
too late finds nothing to do.  The kernel returns when all tasks are done.  Nothing about the result depends
on who did what, because tasks are cut by shape alone and their results are merged in order.

Numba's own threads are not used.  Two of its three threading layers do not survive a fork and one cannot be
called from two threads; these can, and a forked child simply starts its own.
"""

import os
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

import numba
import numpy as np
from numba.np.ufunc import parallel

from cubn.machines.cpu.sharing import counters_length

Job = list[tuple[Callable[..., Any], tuple[Any, ...]]]
"""A kernel and its arguments, or nothing once the call is over."""

_jobs: "SimpleQueue[Job]" = SimpleQueue()
_bell = np.zeros(8, np.int64)
_helpers = 0
_starting = threading.Lock()


def thread_count() -> int:
    """Threads a call may use: `numba.set_num_threads` of this thread, else `NUMBA_NUM_THREADS`."""
    if parallel._is_initialized:  # only then can somebody have set it; asking would start Numba's threads
        return int(numba.get_num_threads())
    return int(numba.config.NUMBA_NUM_THREADS)


def run(kernel: Callable[..., Any], arguments: tuple[Any, ...], tasks: int) -> None:
    """Run a kernel here, and on as many helpers as there are tasks worth one.

    Its last four arguments are added here: what the threads share, how many they are, and whether this is a helper.
    """
    team = min(thread_count(), tasks)
    shared = (np.zeros(counters_length(team), np.int64), _bell, team)
    if team > 1:
        if _helpers < team - 1:
            _start(team - 1)
        job = [(kernel, (*arguments, *shared, True))]
        for _ in range(team - 1):
            _jobs.put(job)
        kernel(*arguments, *shared, False)
        job.clear()  # a helper that has not come by now must not keep the arrays alive
    else:
        kernel(*arguments, *shared, False)


def _start(wanted: int) -> None:
    global _helpers
    with _starting:
        while _helpers < wanted:
            threading.Thread(target=_help, args=(_jobs,), name=f"cubn-{_helpers}", daemon=True).start()
            _helpers += 1


def _help(jobs: "SimpleQueue[Job]") -> None:
    while True:
        for kernel, arguments in tuple(jobs.get()):
            with suppress(MemoryError):  # before it has taken a task: the others do without
                kernel(*arguments)
            del kernel, arguments  # or the arrays of the last call would live until the next


def _forget() -> None:
    """In a forked child the helpers are gone, and the queue may have been left in any state."""
    global _jobs, _helpers, _starting
    _jobs, _helpers, _starting = SimpleQueue(), 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
