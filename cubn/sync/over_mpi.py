"""Ranks of an MPI communicator, through mpi4py."""

import ctypes
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from cubn.errors import SyncError
from cubn.namespace import Array, library_of
from cubn.sync.grid import Grid
from cubn.sync.protocol import Sync, lines, lost, on_host, patience, require_shape, require_timeout, unusable
from cubn.sync.rounds import EqualRounds


def mpi(
    comm: Any = None,
    *,
    shape: Sequence[int] | None = None,
    timeout: float = 60.0,
    cuda_aware: bool | None = None,
) -> Sync:
    """Ranks of an MPI communicator: `mpiexec -n 4 python train.py`.

    NumPy arrays, CuPy arrays and those of every other library go over it, and ranks may hold different ones.
    Device memory is given to MPI itself where the library says that it takes it, and goes through pinned host
    memory otherwise; the current stream is synchronised before MPI reads.

    Parameters
    ----------
    comm : mpi4py.MPI.Intracomm, optional
        The ranks.  By default MPI.COMM_WORLD.  It is used as it is, not duplicated.
    shape : sequence of int, optional
        Gather along the sides of a grid of ranks, neighbours first; see `cubn.sync.grid`.  All ranks of `comm`
        must call, because it is split.
    timeout : float
        Seconds after which a rank that others wait for counts as lost: one that hangs, or whose death the
        launcher does not see (if it does, it ends all ranks).  MPI cannot take a message back: after
        an error the communicator is of no use, and a program that ends by itself may wait for the lost rank in
        MPI_Finalize; ``python -m mpi4py train.py`` aborts it instead.
    cuda_aware : bool, optional
        Give device memory to MPI.  By default, what the MPI library answers.

    Returns
    -------
    Sync

    Raises
    ------
    ImportError
        If mpi4py or an MPI library is missing.
    TypeError, ValueError
        If `comm` is no communicator of one group, was freed, or does not have the ranks of `shape`.

    Examples
    --------
    >>> import numpy as np, cubn
    >>> sync = cubn.sync.mpi()                                       # doctest: +SKIP
    >>> bn = cubn.BatchNorm(64, sync=sync)                           # doctest: +SKIP
    >>> y = bn(x)                        # statistics of all ranks   # doctest: +SKIP
    """
    timeout = require_timeout(timeout)
    library = _library()
    comm = library.COMM_WORLD if comm is None else comm
    if not isinstance(comm, library.Comm):
        raise TypeError(
            f"comm is a {type(comm).__name__}, but ranks meet in a communicator of mpi4py; "
            f"pass one such as mpi4py.MPI.COMM_WORLD."
        )
    if comm == library.COMM_NULL:
        raise ValueError(
            "comm is MPI.COMM_NULL, a communicator that was freed or that this process is no member of, "
            "but ranks meet in it; pass a living one, such as MPI.COMM_WORLD."
        )
    if comm.Is_inter():
        raise ValueError("comm joins two groups of ranks, but a batch belongs to one; pass an intracommunicator.")
    if shape is None:
        return _MPISync(comm, timeout, library, cuda_aware)
    sides = require_shape(shape, comm.size)
    stages: list[Sync] = []
    for place, ranks in lines(comm.rank, sides):
        line = comm.Split(color=ranks[0], key=place)
        stages.append(_MPISync(line, patience(timeout, len(stages)), library, cuda_aware))
    return Grid(stages)


class _MPISync(EqualRounds):
    """One rank of an MPI communicator."""

    def __init__(self, comm: Any, timeout: float, library: Any, cuda_aware: bool | None) -> None:
        super().__init__()
        self.rank, self.size = int(comm.rank), int(comm.size)
        self._comm, self._timeout, self._library = comm, timeout, library
        self._cuda_aware = takes_device_memory(comm, library) if cuda_aware is None else cuda_aware
        self._unfinished: tuple[Any, ...] | None = None

    def all_gather(self, payload: Array) -> Sequence[Array]:
        if self._unfinished is not None:
            raise unusable(self.rank)
        if self._comm == self._library.COMM_NULL:
            raise SyncError(
                f"the communicator of rank {self.rank} was freed, but the ranks meet in it; "
                f"free it after the last use, or make a new one with cubn.sync.mpi."
            )
        device = library_of(payload).name == "cupy"
        if device and not self._cuda_aware:
            payload = to_pinned(payload, sys.modules["cupy"])
        elif not device:
            payload = on_host(payload)
        return super().all_gather(np.asarray(payload, np.float64) if not device else payload)

    def _gather_equal(self, row: Array) -> Array:
        try:
            return self._on_device(row) if library_of(row).name == "cupy" else self._on_host(row)
        except self._library.Exception as error:
            self._unfinished = (row,)
            raise SyncError(
                f"rank {self.rank} met an error of MPI in the all-gather of {self.size} ranks ({error}), but without "
                f"it the batch is not whole; look for a rank that has died, and make new communicators."
            ) from error

    def _on_host(self, row: Array) -> Array:
        rows = np.empty((self.size, row.shape[0]))
        self._finish(self._comm.Iallgather(row, rows), row, rows)
        return rows

    def _on_device(self, row: Array) -> Array:
        """Open MPI takes device memory in blocking calls only, so the waiting is done before, at a barrier."""
        cupy = sys.modules["cupy"]
        rows = cupy.empty((self.size, row.shape[0]))
        cupy.cuda.get_current_stream().synchronize()
        self._finish(self._comm.Ibarrier(), row)
        self._comm.Allgather(row, rows)
        return rows

    def _finish(self, request: Any, *buffers: Any) -> None:
        """Wait for the other ranks, but not for ever."""
        start = time.monotonic()
        for pause in _pauses():
            if request.Test():
                return
            if time.monotonic() - start > self._timeout:
                self._unfinished = (request, *buffers)  # MPI may still write there
                raise lost(self.rank, self.size, self._timeout)
            time.sleep(pause)

    def __repr__(self) -> str:
        return f"<rank {self.rank} of {self.size} of MPI>"


def _pauses() -> Any:
    """Seconds to sleep between looks: none at first, for messages take microseconds; up to a millisecond later."""
    for _ in range(2000):
        yield 0.0
    pause = 2e-5
    while True:
        yield pause
        pause = min(1e-3, 1.2 * pause)


def to_pinned(values: Array, cupy: Any) -> Array:
    """A CuPy array as NumPy's in pinned memory, once everything before it on the current stream is done."""
    from importlib import import_module

    pinned = import_module("cupyx").empty_pinned(values.shape, values.dtype)
    stream = cupy.cuda.get_current_stream()
    values.get(stream=stream, out=pinned)
    stream.synchronize()
    return pinned


def takes_device_memory(comm: Any, library: Any) -> bool:
    """What the MPI library says of itself: the kinds of memory it allocates (MPI 4.1), or its own extension."""
    info = comm.Get_info()
    kinds = info.Get("mpi_memory_alloc_kinds")
    info.Free()
    if kinds is not None and any(kind.strip().startswith("cuda") for kind in kinds.split(",")):
        return True
    try:  # Open MPI and MPICH have this function; the module of mpi4py is linked to their library
        return bool(ctypes.CDLL(library.__file__).MPIX_Query_cuda_support())
    except (OSError, AttributeError):
        return False


def _library() -> Any:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: mpi4py is there and finds no MPI
        raise ImportError(
            f"cubn.sync.mpi needs mpi4py and an MPI library, but they cannot be loaded ({error}); "
            f"pip install 'cubn[sync]', or mpi4py beside the MPI of your cluster."
        ) from error
    return MPI
