"""Statistics of a whole data set, for inference: Algorithm 2 of the paper, and the exact alternative."""

from collections.abc import Iterable, Sequence
from typing import Any

from cubn.errors import ShapeError
from cubn.functional import moments
from cubn.moments import EMPTY, Moments
from cubn.namespace import Array, is_array, library_of, require_same_library

ESTIMATORS = ("pooled", "paper")


def population(
    batches: Iterable[Array] | Array,
    *,
    channel_axis: int | Sequence[int] = 1,
    estimator: str = "pooled",
    progress: bool = False,
) -> Moments:
    """Moments of a data set that comes in batches, for `batch_norm_inference`.

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
        Consumed once.  Batches may differ in every averaged axis; empty ones add nothing.
    channel_axis : int or tuple of int
        The axis, or axes, that keep their own statistics.
    estimator : {"pooled", "paper"}
        Which of the two.
    progress : bool
        Show a progress bar (needs tqdm).

    Returns
    -------
    Moments
        Its `mean` and `var_unbiased` are the E[x] and Var[x] of Algorithm 2.

    Raises
    ------
    ValueError
        If `estimator` is unknown or there is no batch with a sample in it.
    ShapeError
        If a batch has other channels than the first, or ("paper") one sample per channel.
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
    if is_array(batches):
        batches = [batches]
    if progress:
        batches = _with_progress(batches)

    total = EMPTY
    means = variances = None
    averaged = 0
    for number, batch in enumerate(batches):
        part = moments(batch, channel_axis=channel_axis)
        if part.count == 0:
            continue
        if total.count:
            require_same_library(
                f"batch {number}", part.wide_mean, library_of(total.wide_mean), "the first with samples"
            )  # fmt: skip
        if total.count and part.wide_mean.shape != total.wide_mean.shape:
            raise ShapeError(
                f"batch {number} has channels of shape {tuple(part.wide_mean.shape)}, but those before it have "
                f"{tuple(total.wide_mean.shape)}; pass batches of one data set with one channel_axis."
            )
        total = total | part
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
    if total.count == 0:
        raise ValueError("batches hold no sample, but a population has one at least; pass some data.")
    if estimator == "pooled":
        return total
    assert variances is not None
    return Moments(total.count, means, variances * (total.count - 1), total.dtype)


def _with_progress(batches: Iterable[Any]) -> Iterable[Any]:
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError(
            "progress=True needs tqdm, but it is not installed; pip install tqdm, or leave progress away."
        ) from None
    return tqdm(batches, desc="population", unit=" batches")  # type: ignore[no-any-return]
