"""Ranks of an NCCL communicator, through CuPy."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from cubn.errors import SyncError
from cubn.namespace import Array, library_of, why_no_cuda
from cubn.sync.protocol import Sync, lost, on_host, require_timeout, unusable
from cubn.sync.rounds import EqualRounds


def nccl(comm: Any, *, timeout: float = 60.0) -> Sync:
    """Ranks of an NCCL communicator, one GPU each.

    Messages are sent on CuPy's current stream.  While that stream records a CUDA graph nothing is read back:
    the ranks are taken to agree, so let each layer run once before it is recorded.

    Parameters
    ----------
    comm : cupy.cuda.nccl.NcclCommunicator, or what cupyx.distributed.init_process_group returns
        The ranks.
    timeout : float
        Seconds after which a rank that others wait for counts as lost; the communicator is then aborted.

    Returns
    -------
    Sync

    Raises
    ------
    ImportError
        If CuPy, a device or NCCL is missing.
    TypeError
        If `comm` is no communicator.

    Examples
    --------
    >>> import cubn
    >>> from cupy.cuda import nccl                                                     # doctest: +SKIP
    >>> comm = nccl.NcclCommunicator(size, id_of_rank_0, rank)                         # doctest: +SKIP
    >>> bn = cubn.BatchNorm(64, device="cuda", sync=cubn.sync.nccl(comm))              # doctest: +SKIP
    """
    timeout = require_timeout(timeout)
    library = _library()
    comm = getattr(comm, "_comm", comm)  # cupyx.distributed keeps NCCL's communicator there
    if not all(hasattr(comm, name) for name in ("allGather", "rank_id", "size", "abort", "check_async_error")):
        raise TypeError(
            f"comm is a {type(comm).__name__}, but ranks meet in a communicator of NCCL; "
            f"pass a cupy.cuda.nccl.NcclCommunicator, or what cupyx.distributed.init_process_group returns."
        )
    return _NCCLSync(comm, timeout, sys.modules["cupy"], library)


class _NCCLSync(EqualRounds):
    """One rank of an NCCL communicator."""

    def __init__(self, comm: Any, timeout: float, cupy: Any, library: Any) -> None:
        super().__init__()
        self.rank, self.size = int(comm.rank_id()), int(comm.size())
        self._device = int(comm.device_id())
        self._comm, self._timeout, self._cupy, self._library = comm, timeout, cupy, library
        self._lost = False

    def all_gather(self, payload: Array) -> Sequence[Array]:
        if self._lost:
            raise unusable(self.rank)
        if library_of(payload).name == "cupy":
            self._require_device(payload)
            return super().all_gather(payload)
        with self._cupy.cuda.Device(self._device):
            return super().all_gather(self._cupy.asarray(on_host(payload)))

    def _gather_blindly(self, payload: Array) -> Sequence[Array]:
        self._require_device(payload)
        return super()._gather_blindly(payload)

    def _gather_equal(self, row: Array) -> Array:
        stream = self._cupy.cuda.get_current_stream()
        row = self._cupy.ascontiguousarray(row, dtype="float64")
        rows = self._cupy.empty((self.size, row.shape[0]), "float64")
        try:
            self._comm.allGather(row.data.ptr, rows.data.ptr, row.shape[0], self._library.NCCL_FLOAT64, stream.ptr)
            if not stream.is_capturing():
                self._wait(stream)
        except self._library.NcclError as error:
            self._lost = True
            raise SyncError(
                f"rank {self.rank} met an error of NCCL in the all-gather of {self.size} ranks ({error}), but without "
                f"it the batch is not whole; look for a rank that has died, and make new communicators."
            ) from error
        return rows

    def _wait(self, stream: Any) -> None:
        """Until the messages are there: a read from the device would wait for a dead rank for ever."""
        arrived = stream.record(self._cupy.cuda.Event(disable_timing=True))
        start = time.monotonic()
        while not arrived.done:
            self._comm.check_async_error()
            if time.monotonic() - start > self._timeout:
                self._lost = True
                self._comm.abort()
                raise lost(self.rank, self.size, self._timeout)
            time.sleep(0)

    def _require_device(self, payload: Array) -> None:
        if payload.data.device_id != self._device:
            raise SyncError(
                f"x lives on device {payload.data.device_id}, but the communicator of rank {self.rank} was made on "
                f"device {self._device}; pass x on that device, or make the communicator where x is."
            )

    def __repr__(self) -> str:
        return f"<rank {self.rank} of {self.size} of NCCL, device {self._device}>"


def _library() -> Any:
    missing = why_no_cuda()
    if missing is not None:
        raise ImportError(f"cubn.sync.nccl sends between GPUs, but {missing}; use cubn.sync.mpi or threads on CPUs.")
    from importlib import import_module

    library = import_module("cupy.cuda.nccl")
    if not getattr(library, "available", True):
        raise ImportError(
            "cubn.sync.nccl needs NCCL, but this CuPy finds none; "
            "pip install nvidia-nccl-cu12 (or -cu13), or CuPy's extra [ctk]."
        )
    return library
