"""Ranks of a process group of torch.distributed."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import numpy as np

from cubn.errors import SyncError
from cubn.namespace import Array, library_of
from cubn.sync.grid import Grid
from cubn.sync.protocol import Sync, lines, lost, on_host, patience, require_shape, require_timeout, unusable
from cubn.sync.rounds import EqualRounds


def torch(group: Any = None, *, shape: Sequence[int] | None = None, timeout: float = 60.0) -> Sync:
    """Ranks of a process group of `torch.distributed`: ``torchrun --nproc-per-node 4 train.py``.

    Arrays of every library go over it.  A group with NCCL sends from device memory, on CuPy's current stream for
    CuPy arrays; one with gloo sends from the host.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        The ranks.  By default all of them.
    shape : sequence of int, optional
        Gather along the sides of a grid of ranks, neighbours first; see `cubn.sync.grid`.  All processes of
        the default group must call, because new groups are made.
    timeout : float
        Seconds after which a rank that others wait for counts as lost.

    Returns
    -------
    Sync

    Raises
    ------
    ImportError
        If PyTorch is missing, or was built without `distributed`.
    RuntimeError
        If there is no process group yet.
    ValueError
        If this process is no member of `group`, or it does not have the ranks of `shape`.

    Examples
    --------
    >>> import torch.distributed, cubn                               # doctest: +SKIP
    >>> torch.distributed.init_process_group("gloo")                 # doctest: +SKIP
    >>> bn = cubn.BatchNorm(64, sync=cubn.sync.torch())              # doctest: +SKIP
    """
    timeout = require_timeout(timeout)
    distributed = _library()
    if not distributed.is_initialized():
        raise RuntimeError(
            "torch.distributed has no process group yet, but ranks meet in one; "
            "call torch.distributed.init_process_group first."
        )
    rank = distributed.get_rank(group)
    if rank < 0:
        raise ValueError(
            "group has not this process among its ranks, but every rank must call; pass a group that it belongs to."
        )
    if shape is None:
        return _TorchSync(distributed, group, timeout)
    sides = require_shape(shape, distributed.get_world_size(group))
    members = distributed.get_process_group_ranks(group if group is not None else distributed.group.WORLD)
    stages: list[Sync] = []
    for side, (_, mine) in enumerate(lines(rank, sides)):
        for first in range(len(members)):  # every process takes part in the making of every group, in one order
            line = lines(first, sides)[side][1]
            if line[0] == first:
                made = distributed.new_group([members[place] for place in line])
                if line == mine:
                    stages.append(_TorchSync(distributed, made, patience(timeout, side)))
    return Grid(stages)


class _TorchSync(EqualRounds):
    """One rank of a process group."""

    def __init__(self, distributed: Any, group: Any, timeout: float) -> None:
        super().__init__()
        self.rank, self.size = int(distributed.get_rank(group)), int(distributed.get_world_size(group))
        self._distributed, self._group, self._timeout = distributed, group, timeout
        backend = str(distributed.get_backend(group)).lower()
        self._device = "cuda" if "nccl" in backend else "cpu"
        self._unfinished: tuple[Any, ...] | None = None

    def all_gather(self, payload: Array) -> Sequence[Array]:
        if self._unfinished is not None:
            raise unusable(self.rank)
        library = library_of(payload)
        if self._device == "cpu":
            return super().all_gather(np.asarray(on_host(payload), np.float64))
        import torch

        with _on_stream_of(library.name):
            if library.name not in ("cupy", "torch"):
                payload = on_host(payload)
            return super().all_gather(torch.as_tensor(payload, device=self._device, dtype=torch.float64).detach())

    def _gather_equal(self, row: Array) -> Array:
        import torch

        own = torch.from_numpy(row) if isinstance(row, np.ndarray) else row
        rows = [torch.empty_like(own) for _ in range(self.size)]
        try:
            work = self._distributed.all_gather(rows, own, group=self._group, async_op=True)
            arrived = work.wait(timedelta(seconds=self._timeout))
        except RuntimeError as error:
            self._unfinished = (own, rows)
            if "timed out" in str(error).lower() or "timeout" in str(error).lower():
                raise lost(self.rank, self.size, self._timeout) from error
            raise SyncError(
                f"rank {self.rank} met an error of torch.distributed in the all-gather of {self.size} ranks "
                f"({str(error).splitlines()[0]}), but without it the batch is not whole; look for a rank that has "
                f"died, and make new communicators."
            ) from error
        if arrived is False:
            self._unfinished = (own, rows, work)
            raise lost(self.rank, self.size, self._timeout)
        stacked = torch.stack(rows)
        return stacked.numpy() if isinstance(row, np.ndarray) else stacked

    def __repr__(self) -> str:
        return f"<rank {self.rank} of {self.size} of torch.distributed>"


def _on_stream_of(library: str) -> AbstractContextManager[Any]:
    """PyTorch's current stream is CuPy's for as long as a CuPy array is sent."""
    if library != "cupy":
        return nullcontext()
    import sys

    import torch

    current = sys.modules["cupy"].cuda.get_current_stream()
    return torch.cuda.stream(torch.cuda.ExternalStream(current.ptr))  # type: ignore[no-any-return, no-untyped-call]


def _library() -> Any:
    try:
        import torch.distributed as distributed
    except ImportError as error:
        raise ImportError(
            f"cubn.sync.torch needs PyTorch, but it cannot be imported ({error}); pip install torch."
        ) from error
    if not distributed.is_available():
        raise ImportError(
            "this PyTorch was built without torch.distributed, which cubn.sync.torch is; install another."
        )
    return distributed
