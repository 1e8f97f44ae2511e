"""All-gathers of equal lengths, so used that ranks may send unequal ones.

MPI, NCCL and `torch.distributed` want one length from all ranks, known beforehand.  Ranks that agree send one
length; but ranks that disagree must hear of it, not hang, and nobody knows beforehand which it will be.  So the
length of a round is what all ranks expect alike, because they have all seen the same rounds before: training is
one sequence of layers again and again, and what followed last time follows now.  A payload carries its own length
in front and is filled up with zeros.  Where one is longer than expected, all ranks see that, and a second round
brings the rest: in the first step of a training run, and where ranks disagree.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cubn.namespace import Array, library_of
from cubn.sync.protocol import on_host

FIRST = 512
"""Numbers expected before anything was seen: 4 KiB, which a message costs in time whether it is full or not."""

MEMORY = 1 << 14
"""Rounds that are remembered: two steps of a network with 4,000 layers, forward and back."""

CONTEXT = 256
"""Rounds that are compared to find out where in its sequence a network is."""


class Expectation:
    """Tells the length of the next round from the lengths of those before.

    It follows the sequence one cycle behind.  Where that was wrong it looks for the most recent place with the
    longest equal past.

    Examples
    --------
    >>> expected, network = Expectation(), [600, 700, 600, 800]
    >>> surprises = []
    >>> for step in range(4):
    ...     surprises.append(0)
    ...     for length in network:
    ...         surprises[-1] += length > expected.length
    ...         expected.learn(length)
    >>> surprises
    [4, 1, 0, 0]
    """

    def __init__(self) -> None:
        self._past: list[int] = []
        self._follow = -1  # the place in the past that is thought to be followed now; -1 for none

    @property
    def length(self) -> int:
        """What the next round is thought to need."""
        return self._past[self._follow] if self._follow >= 0 else FIRST

    def learn(self, length: int) -> None:
        """The round has needed this."""
        as_thought = self._follow >= 0 and self._past[self._follow] == length
        self._past.append(length)
        if as_thought:
            self._follow += 1
        else:
            self._follow = self._find()
        if len(self._past) > MEMORY:
            forgotten = len(self._past) // 2
            del self._past[:forgotten]
            self._follow = self._follow - forgotten if self._follow >= forgotten else self._find()

    def _find(self) -> int:
        """The place after the most recent longest repetition of how the past ends."""
        past, last = self._past, len(self._past) - 1
        best, follow = 0, -1
        for place in range(last - 1, -1, -1):
            if past[place] != past[last] or best == CONTEXT:
                continue
            equal = 1
            while equal < CONTEXT and equal <= place and past[place - equal] == past[last - equal]:
                equal += 1
            if equal > best:
                best, follow = equal, place + 1
        return follow


class EqualRounds:
    """An adapter whose library gathers equal lengths only.  It has `rank`, `size` and `_gather_equal`."""

    rank: int
    size: int

    def __init__(self) -> None:
        self._expected = Expectation()

    def _gather_equal(self, row: Array) -> Array:
        """The rows (n,) of all ranks as (size, n)."""
        raise NotImplementedError

    def all_gather(self, payload: Array) -> Sequence[Array]:
        """The payloads of all ranks in rank order, each as it was sent."""
        own, block = int(payload.shape[0]), self._expected.length
        rows = self._gather_equal(_row(payload[:block], 1 + block, own))
        lengths = [int(length) for length in on_host(rows[:, 0])]
        longest = max(lengths)
        parts = [rows[rank, 1 : 1 + min(length, block)] for rank, length in enumerate(lengths)]
        if longest > block:
            more = self._gather_equal(_row(payload[block:], longest - block))
            xp = library_of(more).xp
            parts = [xp.concat([part, more[rank, : max(lengths[rank] - block, 0)]]) for rank, part in enumerate(parts)]
        self._expected.learn(longest)  # last: ranks that fail together must expect the same afterwards
        return parts

    def _gather_blindly(self, payload: Array) -> Sequence[Array]:
        """The same among ranks that are known to send one length: nothing is read back from the device."""
        rows = self._gather_equal(payload)
        return [rows[rank, :] for rank in range(self.size)]


def _row(values: Array, length: int, *front: int) -> Array:
    """Numbers in front, the values, and zeros up to `length`."""
    library = library_of(values)
    xp, dtype = library.xp, values.dtype
    filled = length - len(front) - int(values.shape[0])
    if library.is_numpy:
        row: Any = np.zeros(length, dtype)
        row[: len(front)] = front
        row[len(front) : length - filled] = values
        return row
    pieces = [library.asarray([float(number) for number in front], dtype)] if front else []
    pieces.append(values)
    if filled:
        pieces.append(xp.zeros((filled,), dtype=dtype, device=library.device))
    return xp.concat(pieces)
