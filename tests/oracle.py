"""Batch normalisation in extended precision, written out, with the error that each result may have.

`roundoff` is the unit roundoff u of a machine's arithmetic, by default that of `ARITHMETIC`.  The bounds follow
the standard model fl(a op b) = (a op b)(1 + e), |e| <= u, for sums taken in any order, to first order in u:

R = max |x - mean| of a channel, M its samples, sigma its standard deviation.  Sums over distances from one sample,
which are at most 2R, give

    error of the mean       E_m <= u |mean| + 2 (M + 2) u R
    error of x - mean       e   <= E_m + u R
    relative error of var   E_v <= 2 e' / sigma + (M + 2) u,   e' = 2 (M + 3) u R, because mean |x - mean| <= sigma
    relative error of rstd  E_r <= E_v / 2 + 4 u

and everything else is the product rule.  The last rounding, to the dtype of the result, adds half a unit in its
last place.

What is done to every element on its own may be rounder than the sums: w >= u is the unit roundoff of that, by
default that of `ELEMENTS`.  Then x - mean is taken from two numbers of that width, mean = high + low, where |low| <=
w |mean| is known to w, and each of the two subtractions rounds, the second perhaps within the constant term of y:

    error of x - mean       e_w <= e + 2 w |x - mean| + 2 w^2 |mean|

The constant term, what is added to it and y itself round to w: 3 w |y|.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

EXTENDED = np.longdouble
ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
ARITHMETIC = dict.fromkeys(ROUNDOFF, ROUNDOFF["float64"])
"""Element type of x -> unit roundoff of the arithmetic of the machine under test; the `machine` fixture changes it."""

ELEMENTS = {dtype: max(unit, ROUNDOFF["float32"]) for dtype, unit in ARITHMETIC.items()} | {"float64": 2.0**-53}
"""The same for what is done to every element on its own: float32, unless x is wider."""

SMALLEST = {"float64": 5e-324, "float32": 1.4e-45, "float16": 6e-8, "bfloat16": 9.2e-41}


@dataclass
class Exact:
    """A value in extended precision and how far a machine may be from it, element by element."""

    value: np.ndarray
    bound: np.ndarray

    def rounded_to(self, dtype: Any) -> "Exact":
        """The same value when the machine's result is rounded once to `dtype` at the end."""
        name = np.dtype(dtype).name
        # A 16-bit result may be rounded to float32 first; the two roundings add up.
        unit = ROUNDOFF[name] + (ROUNDOFF["float32"] if np.dtype(dtype).itemsize == 2 else 0)
        last = unit * (np.abs(self.value) + self.bound) + SMALLEST[name]
        return Exact(self.value, self.bound + last)


@dataclass
class Result:
    """Everything about one forward and backward pass."""

    mean: Exact
    var: Exact
    rstd: Exact
    y: Exact
    dx: Exact | None = None
    dgamma: Exact | None = None
    dbeta: Exact | None = None
    dresidual: Exact | None = None


def assert_within(actual: Any, exact: Exact, what: str = "result") -> None:
    """Every element is within its own bound; on failure, name the worst.  NaN is never within."""
    actual = np.asarray(actual).astype(EXTENDED)
    assert actual.shape == exact.value.shape, f"{what}: shape {actual.shape}, not {exact.value.shape}"
    if actual.size == 0:
        return
    excess = np.abs(actual - exact.value) - exact.bound
    excess = np.where(np.isnan(excess), np.inf, excess)
    worst = np.unravel_index(np.argmax(excess), excess.shape)
    assert excess[worst] <= 0, (
        f"{what} at {tuple(map(int, worst))}: got {actual[worst]}, exact {exact.value[worst]}, "
        f"error {float(abs(actual[worst] - exact.value[worst])):.3e}, bound {float(exact.bound[worst]):.3e}"
    )


def batch_norm(
    x: np.ndarray,
    gamma: np.ndarray | None = None,
    beta: np.ndarray | None = None,
    *,
    channel_axis: int | tuple[int, ...] = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: np.ndarray | None = None,
    where: np.ndarray | None = None,
    dy: np.ndarray | None = None,
    statistics: tuple[np.ndarray, np.ndarray] | None = None,
    roundoff: float | None = None,
) -> Result:
    """Forward and (with dy) backward pass; `statistics` (mean, var) makes it the inference of both."""
    u = ARITHMETIC[x.dtype.name] if roundoff is None else roundoff
    w = max(u, ELEMENTS[x.dtype.name])
    kept = channel_axis if isinstance(channel_axis, tuple) else (channel_axis,)
    kept = tuple(sorted(axis % x.ndim for axis in kept))
    averaged = tuple(axis for axis in range(x.ndim) if axis not in kept)
    aligned = tuple(x.shape[axis] if axis in kept else 1 for axis in range(x.ndim))

    def channel(values: np.ndarray | None, default: float) -> np.ndarray:
        return (
            np.asarray(default if values is None else values)
            .astype(EXTENDED)
            .reshape((1,) * x.ndim if values is None else aligned)
        )

    admitted = np.ones(x.shape, bool) if where is None else np.broadcast_to(where, x.shape)
    wide = np.where(admitted, x, 0).astype(EXTENDED)
    count = admitted.sum(axis=averaged, keepdims=True)
    samples = np.maximum(count, 1).astype(EXTENDED)
    if statistics is None:
        mean = wide.sum(axis=averaged, keepdims=True) / samples
        distance = np.where(admitted, wide - mean, 0)
        var = (distance**2).sum(axis=averaged, keepdims=True) / samples
        reach = np.abs(distance).max(axis=averaged, keepdims=True, initial=0)
        sigma = np.sqrt(var)
        e_mean = u * np.abs(mean) + 2 * (samples + 2) * u * reach
        ratio = np.divide(reach, sigma, out=np.zeros_like(sigma), where=sigma > 0)
        e_var = 4 * (samples + 3) * u * ratio + (samples + 2) * u
    else:
        mean, var = (channel(values, 0) for values in statistics)
        distance = np.where(admitted, wide - mean, 0)
        reach = np.abs(distance).max(axis=averaged, keepdims=True, initial=0)
        e_mean, e_var = u * np.abs(mean), np.zeros_like(var) + u
    rstd = np.where(var + eps > 0, 1 / np.sqrt(np.where(var + eps > 0, var + eps, 1)), 0)
    e_rstd = e_var / 2 + 4 * u
    e_distance = e_mean + u * reach
    e_element = e_distance + (0 if w == u else 2 * w * (np.abs(distance) + w * np.abs(mean)))

    scale = channel(gamma, 1) * rstd
    z = distance * scale + channel(beta, 0)
    e_z = np.abs(scale) * e_element + np.abs(distance * scale) * (e_rstd + 3 * w) + 3 * w * np.abs(z)
    if residual is not None:
        z = z + np.where(admitted, residual, 0).astype(EXTENDED)
        e_z = e_z + 2 * w * np.abs(z)
    y, passes = z, np.ones(x.shape, bool)
    if activation == "relu":
        passes = z > 0
        close = admitted & (np.abs(z) <= e_z) & (z != 0)
        assert dy is None or not close.any(), "the data put ReLU's kink inside the rounding error"
        y = np.where(passes, z, 0)
    y = np.where(admitted, y, 0)

    def per_channel(value: np.ndarray, bound: np.ndarray) -> Exact:
        shape = tuple(x.shape[axis] for axis in kept)
        return Exact(value.reshape(shape), np.broadcast_to(bound, value.shape).reshape(shape))

    result = Result(
        mean=per_channel(mean, e_mean),
        var=per_channel(var, var * e_var),
        rstd=per_channel(rstd, rstd * e_rstd),
        y=Exact(y, np.broadcast_to(e_z, y.shape)),
    )
    if dy is None:
        return result

    dz = np.where(passes & admitted, dy, 0).astype(EXTENDED)
    xhat = distance * rstd
    e_xhat = rstd * e_distance + np.abs(xhat) * (e_rstd + 2 * u)
    s0 = dz.sum(axis=averaged, keepdims=True)
    s1 = (dz * xhat).sum(axis=averaged, keepdims=True)
    e_s0 = samples * u * np.abs(dz).sum(axis=averaged, keepdims=True)
    e_s1 = (np.abs(dz) * e_xhat + (samples + 1) * u * np.abs(dz * xhat)).sum(axis=averaged, keepdims=True)
    e_xhat = rstd * e_element + np.abs(xhat) * (e_rstd + 2 * w)
    inner, e_inner = dz, w * np.abs(dz)
    if statistics is None:
        inner = dz - s0 / samples - xhat * s1 / samples
        parts = np.abs(dz) + np.abs(s0 / samples) + np.abs(xhat * s1 / samples)
        e_inner = e_s0 / samples + (e_xhat * np.abs(s1) + np.abs(xhat) * e_s1) / samples + 6 * w * parts
    dx = np.where(admitted, scale * inner, 0)
    e_dx = np.abs(scale) * e_inner + np.abs(dx) * (e_rstd + 4 * w)
    result.dx = Exact(dx, np.broadcast_to(e_dx, dx.shape))
    result.dgamma = per_channel(s1, e_s1)
    result.dbeta = per_channel(s0, e_s0)
    result.dresidual = Exact(dz, np.zeros_like(dz))
    return result
