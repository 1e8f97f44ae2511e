"""Moments of finite sets of samples, and their union: the statistics of batch normalisation as a value.

Sums are kept as wide as the machine took them (float64 wherever the device has it).  What a user reads
is narrowed to the dtype that statistics have for his x: float32, or float64 for float64 input.
"""

import sys
from collections.abc import Iterable
from functools import lru_cache, reduce
from typing import Any

import numpy as np

from cubn.namespace import Array, integer_dtype, is_static_count, library_of, namespace_of


class Moments:
    """Count, mean and sum of squared distances of a set of samples, per channel.

    `p | q` is the moments of the union of two disjoint sets (Chan, Golub & LeVeque 1979):

        count = p.count + q.count
        mean  = p.mean + (q.mean - p.mean) * q.count / count
        m2    = p.m2 + q.m2 + (q.mean - p.mean)**2 * p.count * q.count / count

    The union is associative up to rounding, deterministic, and has the empty set as its identity, so
    the same fold serves micro-batches, ranks, blocks of an array and whole data sets.

    Parameters
    ----------
    count : int or integer array (C,)
        Samples per channel; an array where a mask left every channel its own number.
    mean : array (C,)
        In the unit of x.
    m2 : array (C,)
        Sum of squared distances from `mean`, in the unit of x squared.
    dtype : dtype, optional
        What `mean`, `m2`, `var` and `var_unbiased` are handed out in.  By default, that of `mean`.

    Examples
    --------
    >>> import numpy as np, cubn
    >>> x = np.array([[1.0, 10.0], [2.0, 20.0], [6.0, 30.0]])
    >>> whole = cubn.moments(x)
    >>> parts = cubn.moments(x[:1]) | cubn.moments(x[1:])
    >>> parts.count, parts.mean, parts.var
    (3, array([ 3., 20.]), array([ 4.66666667, 66.66666667]))
    >>> np.allclose(parts.m2, whole.m2)
    True
    """

    __slots__ = ("_m2", "_mean", "count", "dtype")

    def __init__(self, count: Any, mean: Array, m2: Array, dtype: Any = None) -> None:
        self.count = count
        self._mean = mean
        self._m2 = m2
        self.dtype = dtype

    @property
    def mean(self) -> Array:
        """Mean per channel, in the unit of x."""
        return self._narrow(self._mean)

    @property
    def m2(self) -> Array:
        """Sum of squared distances from the mean per channel, in the unit of x squared."""
        return self._narrow(self._m2)

    @property
    def var(self) -> Array:
        """Biased variance, m2 / count: what normalises.  NaN for a set of no samples."""
        return self._narrow(self.wide_var)

    @property
    def var_unbiased(self) -> Array:
        """Unbiased variance, m2 / (count - 1): what the running statistics take.  NaN below two samples."""
        return self._narrow(self._m2 / _positive_or_nan(self.count, 1, self._m2))

    @property
    def wide_mean(self) -> Array:
        """The mean, as wide as it was summed."""
        return self._mean

    @property
    def wide_m2(self) -> Array:
        """The sum of squared distances, as wide as it was summed."""
        return self._m2

    @property
    def wide_var(self) -> Array:
        """The biased variance, as wide as it was summed."""
        return self._m2 / _positive_or_nan(self.count, 0, self._m2)

    def __or__(self, other: "Moments") -> "Moments":
        if not isinstance(other, Moments):
            return NotImplemented
        dtype = self.dtype if self.dtype is not None else other.dtype
        empty, adds_nothing = (is_static_count(m.count) and m.count == 0 for m in (self, other))
        if empty and (not adds_nothing or type(self._mean) is float):  # EMPTY knows no channels, another may
            return other
        if adds_nothing:
            return self
        with np.errstate(all="ignore"):  # NaN and infinity are results here, not accidents
            if not (is_static_count(self.count) and is_static_count(other.count)):
                return _union_per_channel(self, other, dtype)
            count = self.count + other.count
            share = other.count / count
            gap = other._mean - self._mean
            return Moments(
                count,
                self._mean + gap * share,
                self._m2 + other._m2 + gap * gap * (self.count * share),
                dtype,
            )

    def _narrow(self, values: Array) -> Array:
        if self.dtype is None or values.dtype == self.dtype:
            return values
        with library_of(values).here():
            return namespace_of(values).astype(values, self.dtype)

    def __repr__(self) -> str:
        return f"Moments(count={self.count!r}, mean={self.mean!r}, m2={self.m2!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return Moments, (self.count, self._mean, self._m2, self.dtype)


EMPTY = Moments(0, 0.0, 0.0)
"""Moments of the empty set: the identity of the union."""


def union(parts: Iterable[Moments]) -> Moments:
    """Fold left to right, so that equal inputs in equal order give equal bits everywhere."""
    return reduce(Moments.__or__, parts, EMPTY)


def towards(mean: Array, var: Array, batch: Moments, weight: float) -> tuple[Array, Array]:
    """Running mean and variance after one more batch: running + weight * (batch - running), in their own dtype.

    The variance is the unbiased one (Ioffe & Szegedy 2015, Algorithm 2, step 10).
    """
    xp = namespace_of(mean)

    def moved(running: Array, of_batch: Array) -> Array:
        values = (1.0 - weight) * running + weight * xp.astype(of_batch, running.dtype)
        return xp.asarray(values)  # NumPy makes a scalar of an array without axes

    return moved(mean, batch.mean), moved(var, batch.var_unbiased)


def reciprocal_std(var: Array, eps: float) -> Array:
    """(var + eps) ** -1/2, and 0 where that would divide by zero.

    With eps = 0 a constant channel has 0 / 0 for its normalised value.  Zero is the limit of
    (x - mean) / std as the samples of a constant channel approach their mean, and gives exactly beta.
    The guarded value stays out of the power as well, so that no autodiff sees 0 * infinity.
    """
    if type(var) is np.ndarray and var.ndim:
        total = var + eps
        if total.all():
            return total**-0.5  # without the guard: one layer in evaluation computes little else
    library = library_of(var)
    if library.name == "cupy":
        with library.here():
            return _reciprocal_std_of_cupy()(var, eps)
    xp = namespace_of(var)
    total = var + eps
    zero = total == 0
    one = xp.ones_like(total)
    return xp.where(zero, xp.zeros_like(total), xp.where(zero, one, total) ** -0.5)


@lru_cache(maxsize=1)
def _reciprocal_std_of_cupy() -> Any:
    """The same in one launch instead of seven: inference waits for nothing else."""
    return sys.modules["cupy"].ElementwiseKernel(
        "T var, float64 eps",
        "T rstd",
        "const double total = double(var) + eps; rstd = total == 0.0 ? 0.0 : 1.0 / sqrt(total)",
        "cubn_reciprocal_std",
    )


def _union_per_channel(p: Moments, q: Moments, dtype: Any) -> Moments:
    """The union where the counts differ from channel to channel; an empty side adds nothing, exactly."""
    values = p.wide_mean
    xp = namespace_of(values)
    counts = [
        xp.full_like(values, m.count, dtype=integer_dtype(xp)) if is_static_count(m.count) else m.count for m in (p, q)
    ]
    p_count, q_count = (xp.astype(count, values.dtype) for count in counts)
    total = p_count + q_count
    share = q_count / xp.where(total > 0, total, xp.ones_like(total))
    gap = q.wide_mean - p.wide_mean
    mean = p.wide_mean + gap * share
    m2 = p.wide_m2 + q.wide_m2 + gap * gap * (p_count * share)

    def either_empty(merged: Array, from_p: Array, from_q: Array) -> Array:
        merged = xp.where(q_count == 0, from_p, merged)
        return xp.where(p_count == 0, from_q, merged)

    return Moments(
        counts[0] + counts[1],
        either_empty(mean, p.wide_mean, q.wide_mean),
        either_empty(m2, p.wide_m2, q.wide_m2),
        dtype,
    )


def _positive_or_nan(count: Any, taken: int, values: Array) -> Any:
    """count - taken as a divisor, NaN where that is not positive."""
    if is_static_count(count):
        return float(count - taken) if count > taken else float("nan")
    xp = namespace_of(values)
    divisor = xp.astype(count - taken, values.dtype)
    return xp.where(divisor > 0, divisor, xp.full_like(divisor, float("nan")))
