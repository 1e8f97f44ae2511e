"""Statistics of a whole data set, for inference: Algorithm 2 of the paper, and the exact alternative.

Data come as batches, as one array, or as one that is too large to hold: then block by block, once, and what is kept
of a block is its moments.  Moments are merged as a tree over the blocks in their order, so that the result depends
neither on how the work is scheduled nor on who has done it, and rounding errors grow with the logarithm of how many
there are.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from itertools import accumulate, product
from typing import Any

import numpy as np

from cubn.chunks import block_count, is_dask, is_stored, stored_blocks
from cubn.errors import ShapeError
from cubn.functional import moments
from cubn.layout import normalise_axes
from cubn.moments import EMPTY, Moments
from cubn.namespace import Array, is_array, library_of, require_same_library
from cubn.problem import pose

ESTIMATORS = ("pooled", "paper")

FAN_IN = 8
"""Moments that one task of a Dask graph merges: a power of two, so that the tree is the one of `Tree`."""


def population(
    batches: Iterable[Array] | Array,
    *,
    channel_axis: int | Sequence[int] = 1,
    estimator: str = "pooled",
    progress: bool = False,
    compute: bool = True,
) -> Moments:
    """Moments of a data set that comes in batches or blocks, for `batch_norm_inference`.

    There are two answers to "the statistics of the population", and on batches that differ from one another
    they are different numbers:

    * ``"pooled"``: the moments of all samples together, merged exactly.  It does not matter how the data set
      is cut into batches.
    * ``"paper"``: Algorithm 2, step 10 (Ioffe & Szegedy 2015), E[x] = E_B[mean_B] and
      Var[x] = E_B[m / (m - 1) * var_B]: every batch counts alike, and the spread *between* batches is no
      part of the variance.

    Parameters
    ----------
    batches : iterable of arrays (N, C, *S), or one such array
        An iterable is consumed once.  Batches may differ in every averaged axis; empty ones add nothing.  One
        array may be stored (memory-mapped, Zarr, HDF5) or a Dask array: it is read once, in blocks of whole
        chunks, which may cut any axis, the channel axes too.  It is one batch, whatever its chunks.
    channel_axis : int or tuple of int
        The axis, or axes, that keep their own statistics.
    estimator : {"pooled", "paper"}
        Which of the two.
    progress : bool
        Show a progress bar (needs tqdm; Dask has its own).
    compute : bool
        False leaves the mean and m2 of a Dask array as Dask arrays that are still to be computed.

    Returns
    -------
    Moments
        Its `mean` and `var_unbiased` are the E[x] and Var[x] of Algorithm 2.

    Raises
    ------
    ValueError
        If `estimator` is unknown, there is no batch with a sample in it, or `compute` is False and `batches` no
        Dask array.
    ShapeError
        If a batch has other channels than the first, ("paper") one sample per channel, or chunks are of
        unknown size.
    ImportError
        If a progress bar is asked for and tqdm is not installed.

    Examples
    --------
    >>> import numpy as np, cubn
    >>> batches = [np.array([[0.0], [2.0]]), np.array([[10.0], [12.0]])]
    >>> pooled = cubn.population(batches)
    >>> pooled.mean, pooled.var_unbiased.round(3)
    (array([6.]), array([34.667]))
    >>> paper = cubn.population(batches, estimator="paper")
    >>> paper.mean, paper.var_unbiased
    (array([6.]), array([2.]))
    """
    if estimator not in ESTIMATORS:
        raise ValueError(
            f'estimator is {estimator!r}, but a population has two: "pooled" and "paper"; pass one of these.'
        )
    if is_dask(batches):
        found = _of_dask(batches, channel_axis, progress=progress, compute=compute)
        return _require_samples(found, estimator)
    if not compute:
        raise ValueError(
            f"compute is False, but batches is a {type(batches).__name__}, which cannot be computed later; "
            f"pass a Dask array, or leave compute away."
        )
    if is_stored(batches):
        return _require_samples(_of_stored(batches, channel_axis, progress=progress), estimator)
    if is_array(batches):
        batches = [batches]
    return _of_batches(_with_progress(batches) if progress else batches, channel_axis, estimator)


class Tree:
    """Moments merged in pairs of neighbours, the pairs in pairs, and so on, while they come.

    Keeps one set of moments for each level, log2 of how many came.

    Examples
    --------
    >>> import numpy as np, cubn
    >>> tree = Tree()
    >>> for value in range(5):
    ...     tree.add(cubn.moments(np.full((1, 1), float(value))))
    >>> tree.merged().count, tree.merged().mean
    (5, array([2.]))
    """

    def __init__(self) -> None:
        self._levels: list[tuple[int, Moments]] = []  # of how many each is made: falling powers of two

    def add(self, part: Moments) -> None:
        """One more, after those before it."""
        size = 1
        while self._levels and self._levels[-1][0] == size:
            part = self._levels.pop()[1] | part
            size *= 2
        self._levels.append((size, part))

    def merged(self) -> Moments:
        """All that came."""
        total = EMPTY
        for _, part in reversed(self._levels):
            total = part | total
        return total


def merge(parts: Sequence[Moments]) -> Moments:
    """The same tree over moments that are all there."""
    tree = Tree()
    for part in parts:
        tree.add(part)
    return tree.merged()


# Batches


def _of_batches(batches: Iterable[Array], channel_axis: int | Sequence[int], estimator: str) -> Moments:
    tree, first = Tree(), None
    means = variances = None
    averaged = 0
    for number, batch in enumerate(batches):
        if is_dask(batch):
            part = _of_dask(batch, channel_axis, progress=False, compute=True)
        elif is_stored(batch):
            part = _of_stored(batch, channel_axis, progress=False)
        else:
            part = moments(batch, channel_axis=channel_axis)
        if part.count == 0:
            continue
        if first is None:
            first = part
        require_same_library(
            f"batch {number}", part.wide_mean, library_of(first.wide_mean), "the first with samples"
        )  # fmt: skip
        if part.wide_mean.shape != first.wide_mean.shape:
            raise ShapeError(
                f"batch {number} has channels of shape {tuple(part.wide_mean.shape)}, but those before it have "
                f"{tuple(first.wide_mean.shape)}; pass batches of one data set with one channel_axis."
            )
        tree.add(part)
        if estimator == "paper":
            if part.count < 2:
                raise ShapeError(
                    f'batch {number} has one sample per channel, but estimator="paper" needs its unbiased variance; '
                    f'pass batches of two samples at least, or estimator="pooled".'
                )
            averaged += 1
            variance = part.wide_m2 / (part.count - 1)
            means = part.wide_mean if means is None else means + (part.wide_mean - means) / averaged
            variances = variance if variances is None else variances + (variance - variances) / averaged
    total = _require_samples(tree.merged(), "pooled")
    if estimator == "pooled":
        return total
    assert variances is not None
    return Moments(total.count, means, variances * (total.count - 1), total.dtype)


def _require_samples(found: Moments, estimator: str) -> Moments:
    if found.count == 0:
        raise ValueError("batches hold no sample, but a population has one at least; pass some data.")
    if estimator == "paper" and found.count < 2:
        raise ShapeError(
            'batch 0 has one sample per channel, but estimator="paper" needs its unbiased variance; '
            'pass batches of two samples at least, or estimator="pooled".'
        )
    return found


# Stored arrays


def _of_stored(x: Any, channel_axis: int | Sequence[int], *, progress: bool) -> Moments:
    """Block by block, a tree for each range of channels."""
    kept = normalise_axes(channel_axis, x.shape)
    trees: dict[tuple[int, ...], Tree] = {}
    blocks: Iterable[tuple[tuple[int, ...], Array]] = stored_blocks(x, kept)
    if progress:
        blocks = _with_progress(blocks, total=block_count(x), unit=" blocks")
    for corner, block in blocks:
        trees.setdefault(corner, Tree()).add(moments(block, channel_axis=kept))
    if not trees:  # no elements at all
        return moments(np.empty(x.shape, x.dtype), channel_axis=kept)
    return _joined({corner: tree.merged() for corner, tree in trees.items()})


def _joined(parts: dict[tuple[int, ...], Moments]) -> Moments:
    """Moments of ranges of channels, known by where they begin, put side by side along every channel axis."""
    while len(next(iter(parts))) > 0:
        rows: dict[tuple[int, ...], list[Moments]] = {}
        for corner in sorted(parts):
            rows.setdefault(corner[:-1], []).append(parts[corner])
        axis = len(next(iter(parts))) - 1
        parts = {corner: _side_by_side(row, axis) for corner, row in rows.items()}
    return parts[()]


def _side_by_side(row: Sequence[Moments], axis: int) -> Moments:
    first = row[0]
    if len(row) == 1:
        return first
    xp = library_of(first.wide_mean).xp
    mean, m2 = (xp.concat([getattr(part, name) for part in row], axis=axis) for name in ("wide_mean", "wide_m2"))
    return Moments(max(part.count for part in row), mean, m2, first.dtype)


# Dask arrays


def _of_dask(x: Any, channel_axis: int | Sequence[int], *, progress: bool, compute: bool) -> Moments:
    """A task for each chunk, a tree of tasks for each range of channels."""
    import dask
    import dask.array as da

    x, call = pose(x, channel_axis=channel_axis)
    kept, problem = call.layout.channel_axes, call.problem
    wide = np.dtype("float64")
    of_chunk = dask.delayed(_moments_of_chunk, pure=True)
    together = dask.delayed(merge, pure=True)

    chunks = x.to_delayed()
    starts = [tuple(accumulate((0, *sizes[:-1]))) for sizes in x.chunks]
    averaged = [axis for axis in range(x.ndim) if axis not in kept]
    parts = {}
    for place in product(*(range(chunks.shape[axis]) for axis in kept)):
        index: list[Any] = [slice(None)] * x.ndim
        for axis, number in zip(kept, place, strict=True):
            index[axis] = number
        level = [of_chunk(chunk, kept) for chunk in _flat(chunks[tuple(index)], len(averaged))]
        while len(level) > 1:
            level = [together(level[first : first + FAN_IN]) for first in range(0, len(level), FAN_IN)]
        parts[tuple(starts[axis][number] for axis, number in zip(kept, place, strict=True))] = level[0]
    found = dask.delayed(_joined, pure=True)(parts)

    if compute:
        with _dask_progress(progress):
            return _computed(found, progress)
    shape = call.layout.channel_shape
    of_blocks = x._meta[:0].reshape(0).astype(wide)
    mean, m2 = (
        da.from_delayed(dask.delayed(getattr)(found, name), shape, wide, meta=of_blocks)
        for name in ("wide_mean", "wide_m2")
    )
    return Moments(problem.samples, mean, m2, call.statistics_dtype)


def _flat(chunks: Any, axes: int) -> list[Any]:
    return list(chunks.ravel()) if axes else [chunks]


def _moments_of_chunk(chunk: Array, kept: tuple[int, ...]) -> Moments:
    return moments(chunk, channel_axis=kept)


def _dask_progress(progress: bool) -> Any:
    """Dask's own bar; on a cluster, that of `distributed` (see `_computed`)."""
    if not progress:
        return nullcontext()
    from dask.diagnostics import ProgressBar

    return ProgressBar()


def _computed(found: Any, progress: bool) -> Moments:
    client = _client() if progress else None
    if client is None:
        return found.compute()  # type: ignore[no-any-return]
    from distributed import progress as bar

    future = client.compute(found)
    bar(future, notebook=False)
    return future.result()  # type: ignore[no-any-return]


def _client() -> Any:
    """The cluster that computes for this thread, or None."""
    import sys

    distributed = sys.modules.get("distributed")
    if distributed is None:
        return None
    try:
        return distributed.get_client()
    except ValueError:
        return None


# Progress


def _with_progress(batches: Iterable[Any], total: int | None = None, unit: str = " batches") -> Iterator[Any]:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError(
            "progress=True needs tqdm, but it is not installed; pip install tqdm, or leave progress away."
        ) from None
    return tqdm(batches, desc="population", unit=unit, total=total)  # type: ignore[no-any-return]
