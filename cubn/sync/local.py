"""Ranks that are threads of this process."""

import threading
from collections.abc import Sequence
from typing import Any

from cubn.namespace import Array
from cubn.sync.grid import Grid
from cubn.sync.protocol import Sync, lines, lost, patience, require_shape, require_timeout


def threads(size: int, *, shape: Sequence[int] | None = None, timeout: float = 60.0) -> list[Sync]:
    """Ranks that are threads of this process: one communicator for each.

    For tests, for simulations of a cluster, and for data-parallel training on one machine.

    Parameters
    ----------
    size : int
        How many ranks.
    shape : sequence of int, optional
        Gather along the sides of a grid; see `cubn.sync.grid`.
    timeout : float
        Seconds after which a rank that others wait for counts as lost.

    Returns
    -------
    list of Sync
        The communicator of rank r at place r.

    Raises
    ------
    ValueError
        If `size` is no positive integer, `shape` does not hold that many, or `timeout` is not positive.

    Examples
    --------
    >>> from concurrent.futures import ThreadPoolExecutor
    >>> import numpy as np, cubn
    >>> x = np.arange(6.0).reshape(6, 1)
    >>> shares = [x[:1], x[1:]]
    >>> with ThreadPoolExecutor(2) as pool:
    ...     parts = list(pool.map(lambda s, c: cubn.batch_norm(s, sync=c)[0], shares, cubn.sync.threads(2)))
    >>> np.allclose(np.concatenate(parts), cubn.batch_norm(x)[0])
    True
    """
    if isinstance(size, bool) or not hasattr(size, "__index__") or size < 1:
        raise ValueError(f"size is {size!r}, but there is no such number of ranks; pass a positive integer.")
    size, timeout = int(size), require_timeout(timeout)
    if shape is None:
        meeting = _Meeting(size, timeout)
        return [_ThreadSync(rank, meeting) for rank in range(size)]
    sides = require_shape(shape, size)
    meetings: dict[tuple[int, ...], _Meeting] = {}
    found: list[Sync] = []
    for rank in range(size):
        stages: list[Sync] = []
        for place, ranks in lines(rank, sides):
            meeting = meetings.setdefault((len(stages), *ranks), _Meeting(len(ranks), patience(timeout, len(stages))))
            stages.append(_ThreadSync(place, meeting))
        found.append(Grid(stages))
    return found


class _Meeting:
    """The place where threads exchange payloads."""

    def __init__(self, size: int, timeout: float) -> None:
        self.size = size
        self.timeout = timeout
        self.barrier = threading.Barrier(size)
        self.payloads: list[Any] = [None] * size


class _ThreadSync:
    """The communicator of one thread."""

    def __init__(self, rank: int, meeting: _Meeting) -> None:
        self.rank = rank
        self.size = meeting.size
        self._meeting = meeting

    def all_gather(self, payload: Array) -> Sequence[Array]:
        meeting = self._meeting
        meeting.payloads[self.rank] = payload
        self._meet()
        gathered = list(meeting.payloads)
        self._meet()  # nobody writes the next payload before everybody has read this one
        return gathered

    def _meet(self) -> None:
        try:
            self._meeting.barrier.wait(self._meeting.timeout)
        except threading.BrokenBarrierError:
            raise lost(self.rank, self.size, self._meeting.timeout) from None

    def __repr__(self) -> str:
        return f"<rank {self.rank} of {self.size} threads>"
