"""Arrays too large to hold: the blocks that they are read in, and functions that go through a Dask array's chunks.

Stored arrays (memory-mapped, Zarr, HDF5) are anything with a shape, a dtype and slices that is no array itself.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import prod
from typing import Any

import numpy as np

from cubn.namespace import Array, is_array, library_of

BLOCK_BYTES = 1 << 24
"""Of a stored array at a time: 16 MiB, which stays in the caches of a CPU and hides the cost of a call."""


def is_stored(x: Any) -> bool:
    """True for an array that is to be read block by block."""
    if isinstance(x, np.memmap):
        return True
    return not is_array(x) and all(hasattr(x, name) for name in ("shape", "dtype", "__getitem__")) and len(x.shape) > 0


def block_shape(shape: Sequence[int], chunks: Sequence[int] | None, item_bytes: int) -> tuple[int, ...]:
    """Whole chunks, as many as make `BLOCK_BYTES`, the last axes first; of an array without chunks, whole rows.

    Examples
    --------
    >>> block_shape((1000, 64, 32, 32), None, item_bytes=4)
    (64, 64, 32, 32)
    >>> block_shape((1000, 64, 32, 32), (10, 16, 32, 32), item_bytes=4)
    (60, 64, 32, 32)
    """
    block = [max(1, size) for size in (chunks or [1] * len(shape))]
    for axis in reversed(range(len(shape))):
        times = max(1, BLOCK_BYTES // (prod(block) * item_bytes))
        whole = -(-max(1, shape[axis]) // block[axis])
        block[axis] = min(max(1, shape[axis]), block[axis] * min(times, whole))
        if times < whole:
            break
    return tuple(block)


def stored_blocks(x: Any, kept: Sequence[int]) -> Iterator[tuple[tuple[int, ...], Array]]:
    """The blocks of a stored array, each with where it begins along the kept axes; every chunk is read once."""
    shape, chunks = tuple(int(size) for size in x.shape), getattr(x, "chunks", None)
    if chunks is not None and not all(isinstance(size, int) for size in chunks):
        chunks = None  # of another meaning than HDF5's and Zarr's
    sides = block_shape(shape, chunks, np.dtype(x.dtype).itemsize)
    for starts in product(*(range(0, size, side) for size, side in zip(shape, sides, strict=True))):
        block = x[tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))]
        yield tuple(starts[axis] for axis in kept), block


def block_count(x: Any) -> int:
    """How many blocks `stored_blocks` reads."""
    sides = block_shape(x.shape, getattr(x, "chunks", None), np.dtype(x.dtype).itemsize)
    return prod(-(-size // side) for size, side in zip(x.shape, sides, strict=True))


def map_chunks(
    function: Callable[..., Array],
    x: Array,
    kept: Sequence[int],
    per_channel: dict[str, Array],
    like_x: dict[str, Array],
    **options: Any,
) -> Array:
    """`function` of every chunk of a Dask array: lazy, and in the chunks of x.

    Parameters
    ----------
    function : callable
        Takes a chunk of x and, by name, what belongs to it of the others, and the options; returns one like x.
    x : dask array
    kept : sequence of int
        The channel axes.
    per_channel : dict of dask arrays
        With the shape of the kept axes.
    like_x : dict of dask arrays
        That broadcast to x.
    """
    import dask.array as da

    axes = tuple(range(x.ndim))
    operands: list[Any] = [x, axes]
    for values in per_channel.values():
        operands += [values.rechunk(tuple(x.chunks[axis] for axis in kept)), tuple(kept)]
    for values in like_x.values():
        operands += [da.broadcast_to(values, x.shape).rechunk(x.chunks), axes]
    return da.blockwise(
        _on_chunk, axes, *operands, function=function, names=(*per_channel, *like_x), options=options,
        dtype=x.dtype, meta=x._meta, align_arrays=False,
    )  # fmt: skip


def _on_chunk(
    x: Array, *others: Array, function: Callable[..., Array], names: Sequence[str], options: dict[str, Any]
) -> Array:
    library = library_of(x)
    named = {
        name: value if library_of(value) == library else library.asarray(value)
        for name, value in zip(names, others, strict=True)
    }
    return function(x, **named, **options)


def as_dask(values: Array) -> Array:
    """An array of another library in one chunk, as it is."""
    import dask.array as da

    return da.from_array(values, chunks=-1, asarray=False)


def is_dask(x: Any) -> bool:
    """True for a Dask array; loads Dask not."""
    dask = sys.modules.get("dask.array")
    return dask is not None and isinstance(x, dask.Array)
