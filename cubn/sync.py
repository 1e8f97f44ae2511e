"""Statistics over the samples of several ranks.

A *rank* is one of several workers that hold a part of the batch each.  Everything that they must tell each
other is one all-gather per forward pass (count, mean and m2 of every channel) and one per backward pass (two
sums).  Each rank merges what it receives in rank order with the one union that there is, so that all ranks
hold the same bits, whatever their shares of the batch, none included.
"""

import threading
from collections.abc import Sequence
from numbers import Real
from typing import Any, Protocol

from cubn.errors import SyncError
from cubn.machines import GradientSums
from cubn.moments import Moments, union
from cubn.namespace import Array, integer_dtype, is_static_count, widest_float
from cubn.problem import Call


class Sync(Protocol):
    """What an adapter to a message-passing library must offer.

    Attributes
    ----------
    rank : int
        Number of this worker, from 0.
    size : int
        How many workers there are.
    """

    rank: int
    size: int

    def all_gather(self, payload: Array) -> Sequence[Array]:
        """The payloads of all ranks, one-dimensional arrays of one length and dtype, in rank order."""


def threads(size: int, *, timeout: float = 60.0) -> list[Sync]:
    """Ranks that are threads of this process: one communicator for each.

    For tests, for simulations of a cluster, and for data-parallel training on one machine.

    Parameters
    ----------
    size : int
        How many ranks.
    timeout : float
        Seconds after which a rank that others wait for counts as lost.

    Returns
    -------
    list of Sync
        The communicator of rank r at place r.

    Raises
    ------
    ValueError
        If `size` is no positive integer or `timeout` is not positive.

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
    if not (isinstance(timeout, Real) and timeout > 0):
        raise ValueError(f"timeout is {timeout!r}, but ranks wait for one another; pass seconds above zero.")
    meeting = _Meeting(int(size), float(timeout))
    return [_ThreadSync(rank, meeting) for rank in range(meeting.size)]


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
            raise SyncError(
                f"rank {self.rank} waited for {self.size} ranks, but one of them did not arrive within "
                f"{self._meeting.timeout:g} s or gave up; call from all ranks, and make new communicators after an "
                f"error."
            ) from None

    def __repr__(self) -> str:
        return f"<rank {self.rank} of {self.size} threads>"


def gather_moments(sync: Sync, call: Call, own: Moments) -> Moments:
    """The moments of all ranks together: equal bits on every rank."""
    xp, channels = call.library.xp, call.problem.channels
    wide = widest_float(call.library)
    header = [float(channels), call.problem.eps, _DTYPE_CODE[call.problem.dtype]]
    if is_static_count(own.count):
        counts = xp.full_like(own.wide_mean, float(own.count), dtype=wide)
    else:
        counts = xp.astype(own.count, wide)
    payload = xp.concat([
        call.library.asarray([*header, float(not is_static_count(own.count))], wide),
        _in_user_order(call, counts),
        _in_user_order(call, xp.astype(own.wide_mean, wide)),
        _in_user_order(call, xp.astype(own.wide_m2, wide)),
    ])  # fmt: skip
    gathered = sync.all_gather(payload)
    _require_agreement(gathered, header)
    masked = any(float(values[3]) for values in gathered)

    def of_rank(values: Array) -> Moments:
        count, mean, m2 = (values[4 + part * channels : 4 + (part + 1) * channels] for part in range(3))
        if masked or channels == 0:
            return Moments(xp.astype(count, integer_dtype(xp)), mean, m2)
        return Moments(int(count[0]), mean, m2)

    merged = union(of_rank(values) for values in gathered)
    count = merged.count if is_static_count(merged.count) else _in_canonical_order(call, merged.count)
    if is_static_count(merged.count) and merged.count == 0:
        return Moments(0, own.wide_mean, own.wide_m2, own.dtype)
    return Moments(
        count, _in_canonical_order(call, merged.wide_mean), _in_canonical_order(call, merged.wide_m2), own.dtype
    )


def gather_sums(sync: Sync, call: Call, own: GradientSums) -> GradientSums:
    """The gradient sums of all ranks, added in rank order: equal bits on every rank."""
    xp, channels = call.library.xp, call.problem.channels
    payload = xp.concat([_in_user_order(call, own.dy), _in_user_order(call, own.dy_xhat)])
    gathered = sync.all_gather(payload)
    lengths = {int(values.shape[0]) for values in gathered}
    if lengths != {2 * channels}:
        raise SyncError(
            f"rank {sync.rank} has {channels} channels, but the ranks sent gradient sums of {sorted(lengths)} "
            f"numbers; call batch_norm_backward for the same layer on all ranks."
        )
    total = gathered[0]
    for values in gathered[1:]:
        total = total + values
    return GradientSums(_in_canonical_order(call, total[:channels]), _in_canonical_order(call, total[channels:]))


_DTYPE_CODE = {"float16": 0.0, "bfloat16": 1.0, "float32": 2.0, "float64": 3.0}


def _require_agreement(gathered: Sequence[Array], own: Sequence[float]) -> None:
    """Every rank sees every header, so all of them raise or none does."""
    names = ("channels", "eps", "dtype")
    first = [float(value) for value in gathered[0][:3]]
    for rank, values in enumerate(gathered):
        header = [float(value) for value in values[:3]]
        for name, mine, theirs in zip(names, first, header, strict=True):
            if mine != theirs:
                raise SyncError(
                    f"rank {rank} has another {name} than rank 0 ({_spoken(name, theirs)} against "
                    f"{_spoken(name, mine)}), but they normalise one batch together; "
                    f"call batch_norm with the same {name} on all ranks."
                )


def _spoken(name: str, value: float) -> str:
    if name == "dtype":
        return next(dtype for dtype, code in _DTYPE_CODE.items() if code == value)
    return f"{value:g}"


def _in_user_order(call: Call, values: Array) -> Array:
    """Per-channel values in the order of the channel axes: x may lie differently in memory on each rank."""
    xp = call.library.xp
    return xp.reshape(call.layout.unflatten(values, xp), (-1,))


def _in_canonical_order(call: Call, values: Array) -> Array:
    xp = call.library.xp
    return call.layout.flatten(xp.reshape(values, call.layout.channel_shape), xp)
