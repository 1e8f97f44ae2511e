"""The canonical form: every array of every rank and memory order seen as (outer, channels, inner).

Sort the axes by how far apart their neighbours lie in memory, and merge what is contiguous.  Then
(N, C, H, W) is (N, C, H*W); channels-last memory, (N, H, W, C) and (N, D) are (N*H*W, C, 1) and (N, D, 1);
`channel_axis=(1, 2, 3)` is (N, C*H*W, 1) and `(2, 3)` is (N*C, H*W, 1).  Whatever has this form is read
in place; the rest (a strided slice, kept axes with averaged ones between them) is copied once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby, pairwise
from math import prod
from operator import index
from typing import Any, NamedTuple

import numpy as np

from cubn.errors import ShapeError
from cubn.namespace import Array, Library


class MemoryOrder(NamedTuple):
    """How a new array lies in memory: its shape there, and the axes to transpose it by, if at all."""

    shape: tuple[int, ...]
    axes: tuple[int, ...] | None


@dataclass(frozen=True)
class Layout:
    """How one array is seen as (outer, channels, inner).

    Attributes
    ----------
    shape : tuple of int
        Of the array itself.
    channel_axes : tuple of int
        The axes that keep their own statistics, not negative, ascending.
    order : tuple of int
        The axes as the canonical form takes them: averaged, kept, averaged.
    memory_order : tuple of int
        The axes from outermost to innermost in memory: `order`, except where kept axes have averaged
        ones between them.
    outer, channels, inner : int
        Sizes of the canonical form.
    in_place : bool
        True if the array can be seen in this form without a copy.
    """

    shape: tuple[int, ...]
    channel_axes: tuple[int, ...]
    order: tuple[int, ...]
    memory_order: tuple[int, ...]
    outer: int
    channels: int
    inner: int
    in_place: bool

    @cached_property
    def channel_shape(self) -> tuple[int, ...]:
        """Shape of gamma, beta and every statistic: the sizes of the kept axes."""
        return tuple(self.shape[axis] for axis in self.channel_axes)

    @cached_property
    def _inverse(self) -> tuple[int, ...]:
        return _invert(self.order)

    @cached_property
    def _ordered_shape(self) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in self.order)

    @cached_property
    def memory(self) -> MemoryOrder:
        """Of results, which have the memory order of x."""
        shape = tuple(self.shape[axis] for axis in self.memory_order)
        straight = self.memory_order == tuple(range(len(shape)))
        return MemoryOrder(shape, None if straight else _invert(self.memory_order))

    @cached_property
    def _admitted(self) -> dict[tuple[int, ...], bool]:
        return {}

    @cached_property
    def _straight(self) -> bool:
        return self.order == tuple(range(len(self.order)))

    @cached_property
    def _channel_order(self) -> tuple[int, ...] | None:
        """Kept axes in canonical order as positions among themselves; None where that is their own order."""
        kept = [axis for axis in self.order if axis in self.channel_axes]
        order = tuple(self.channel_axes.index(axis) for axis in kept)
        return None if order == tuple(range(len(order))) else order

    def canonical(self, x: Array, xp: Any) -> Array:
        """x as (outer, channels, inner): a view where memory allows, else a copy."""
        if type(x) is np.ndarray:  # without the wrappers of the standard's namespace, which take longer
            return (x if self._straight else x.transpose(self.order)).reshape(self.outer, self.channels, self.inner)
        if not self._straight:
            x = xp.permute_dims(x, self.order)
        return xp.reshape(x, (self.outer, self.channels, self.inner))

    def restore(self, y: Array, xp: Any) -> Array:
        """The inverse of `canonical`."""
        y = xp.reshape(y, self._ordered_shape)
        return y if self._straight else xp.permute_dims(y, self._inverse)

    def allocate(self, library: Library, dtype: Any) -> tuple[Array, Array | None]:
        """A new array with the memory order of x, and its canonical view (None where it has none)."""
        shape, axes = self.memory
        memory = library.empty(shape, dtype)
        result = memory if axes is None else memory.transpose(axes)
        if self.memory_order != self.order:
            return result, None
        return result, memory.reshape(self.outer, self.channels, self.inner)

    def admits(self, strides: tuple[int, ...]) -> bool:
        """True if an array of this shape with those strides can be seen in this form without a copy."""
        known = self._admitted.get(strides)
        if known is None:
            known = self._admitted[strides] = self._admits(strides)
        return known

    def _admits(self, strides: tuple[int, ...]) -> bool:
        runs = _runs([axis for axis in self.order if self.shape[axis] != 1], frozenset(self.channel_axes))
        return all(_mergeable(run, self.shape, strides) for run in runs)

    def flatten(self, values: Array, xp: Any) -> Array:
        """Per-channel values of shape `channel_shape` as (channels,), in canonical order."""
        if len(self.channel_axes) == 1:
            return values
        if self._channel_order is not None:
            values = xp.permute_dims(values, self._channel_order)
        return xp.reshape(values, (self.channels,))

    def unflatten(self, values: Array, xp: Any) -> Array:
        """The inverse of `flatten`."""
        if len(self.channel_axes) == 1:
            return values
        order = self._channel_order
        if order is None:
            return xp.reshape(values, self.channel_shape)
        values = xp.reshape(values, tuple(self.channel_shape[position] for position in order))
        return xp.permute_dims(values, _invert(order))


def _invert(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(axis) for axis in range(len(order)))


def normalise_axes(channel_axis: int | Sequence[int], shape: Sequence[int]) -> tuple[int, ...]:
    """Kept axes as ascending non-negative integers; `ShapeError` if one is out of range or repeated."""
    rank = len(shape)
    given = channel_axis if isinstance(channel_axis, Sequence) else (channel_axis,)
    if isinstance(channel_axis, str) or not all(is_integer(axis) for axis in given):
        raise ShapeError(
            f"channel_axis is {channel_axis!r}, but an axis is an integer; "
            f"pass the axis of x that keeps its own statistics, or a tuple of them."
        )
    if rank == 0:
        raise ShapeError("x is a scalar, but batch normalisation averages over an axis; pass x with one axis at least.")
    for axis in given:
        if not -rank <= axis < rank:
            raise ShapeError(
                f"channel_axis is {channel_axis!r}, but x has shape {tuple(shape)}, whose axes are 0 to {rank - 1}; "
                f"pass an axis from {-rank} to {rank - 1}."
            )
    axes = sorted(int(axis) % rank for axis in given)
    if len(set(axes)) < len(axes):
        raise ShapeError(
            f"channel_axis is {channel_axis!r}, which names an axis of x (shape {tuple(shape)}) twice; "
            f"pass every axis once."
        )
    return tuple(axes)


def is_integer(axis: Any) -> bool:
    """True for what NumPy takes as an integer, False for bool."""
    try:
        index(axis)
    except TypeError:
        return False
    return not isinstance(axis, bool)


@lru_cache(maxsize=4096)
def arrange(shape: tuple[int, ...], strides: tuple[int, ...] | None, channel_axes: tuple[int, ...]) -> Layout:
    """Find the canonical form of an array from its shape and strides (None: not known, so C order)."""
    kept = frozenset(channel_axes)
    by_memory = _memory_order(shape, strides)
    runs = _runs([axis for axis in by_memory if shape[axis] != 1], kept)

    if len(runs) == 1 and not kept.intersection(runs[0]):
        runs = [[], [], runs[0]]  # one channel: all of x is one inner run
    elif runs and kept.intersection(runs[0]):
        runs = [[], *runs]
    runs += [[]] * (3 - len(runs))
    interleaved = len(runs) > 3
    if interleaved:
        # Kept axes with averaged ones between them: no view has the canonical form, so x is copied.
        # One channel after the other is the copy that every machine reads best.
        runs = [[], [axis for run in runs for axis in run if axis in kept],
                [axis for run in runs for axis in run if axis not in kept]]  # fmt: skip
    in_place = not interleaved and (strides is None or all(_mergeable(run, shape, strides) for run in runs))

    # Axes of size 1 lie anywhere in memory: each joins the axes of its own kind.
    single = [axis for axis in range(len(shape)) if shape[axis] == 1]
    runs[0] = [axis for axis in single if axis not in kept] + runs[0]
    runs[1] = [axis for axis in single if axis in kept] + runs[1]

    outer, channels, inner = (prod(shape[axis] for axis in run) for run in runs)
    order = tuple(axis for run in runs for axis in run)
    return Layout(shape, channel_axes, order, by_memory if interleaved else order, outer, channels, inner, in_place)


def _memory_order(shape: tuple[int, ...], strides: tuple[int, ...] | None) -> tuple[int, ...]:
    axes = range(len(shape))
    return tuple(axes if strides is None else sorted(axes, key=lambda axis: -abs(strides[axis])))


def _runs(axes: Sequence[int], kept: frozenset[int]) -> list[list[int]]:
    """Neighbouring axes of one kind (kept, averaged), in order."""
    return [list(run) for _, run in groupby(axes, key=kept.__contains__)]


def _mergeable(run: Sequence[int], shape: Sequence[int], strides: Sequence[int]) -> bool:
    """True if these axes, outermost first, are one axis in memory."""
    run = [axis for axis in run if shape[axis] != 1]
    return 0 in shape or all(strides[axis] == shape[after] * strides[after] for axis, after in pairwise(run))
