"""The reference machine: batch normalisation in the Python array API standard alone.

This is the specification.  It runs on every library of the standard and says in the book's symbols what
the other machines must compute.  It works in float64 (float32 where the device has nothing wider),
makes no attempt at speed, and writes to no array but `out`.
"""

from typing import Any

from cubn.machines import Backward, Forward, GradientSums, Running
from cubn.moments import Moments, reciprocal_std, towards
from cubn.namespace import Array, integer_dtype, library_of, namespace_of, widest_float
from cubn.problem import Problem

name = "reference"

AVERAGED = (0, 2)
"""The axes of the canonical form (outer, channels, inner) that a channel's samples lie along."""


def moments(problem: Problem, x: Array, where: Array | None = None) -> Moments:
    """Two passes, the mean first, both over the distance from one sample of the channel.

    Taking one sample away from all changes no variance.  It makes the sums of a constant channel exactly
    zero, so that its mean is that constant, and leaves the digits of a large mean out of every rounding.
    """
    xp, x = _widen(x)
    statistics_dtype = getattr(xp, problem.statistics_dtype)
    if problem.samples == 0:
        nothing = xp.sum(x, axis=AVERAGED)
        return Moments(0, nothing, nothing, statistics_dtype)
    if where is None:
        count: Any = problem.samples
        divisor: Any = count
        pivot = x[:1, :, :1]
        distance = x - pivot
    else:
        count = xp.sum(xp.astype(where, integer_dtype(xp)), axis=AVERAGED)
        divisor = _per_channel(xp, xp.maximum(xp.astype(count, x.dtype), xp.ones_like(count, dtype=x.dtype)))
        lowest = xp.full_like(x, -float("inf"))
        largest = xp.max(xp.where(where, x, lowest), axis=AVERAGED, keepdims=True)
        pivot = xp.where(_per_channel(xp, count) == 0, xp.zeros_like(largest), largest)
        distance = xp.where(where, x - pivot, xp.zeros_like(x))

    shift = xp.sum(distance, axis=AVERAGED, keepdims=True) / divisor
    from_mean = distance - shift
    if where is not None:
        from_mean = xp.where(where, from_mean, xp.zeros_like(x))
    m2 = xp.sum(from_mean * from_mean, axis=AVERAGED)
    return Moments(count, xp.reshape(pivot + shift, (problem.channels,)), m2, statistics_dtype)


def normalize(
    problem: Problem,
    x: Array,
    mean: Array,
    rstd: Array,
    gamma: Array | None,
    beta: Array | None,
    residual: Array | None = None,
    where: Array | None = None,
    out: Array | None = None,
    keep: bool = True,
) -> tuple[Array, Array | None]:
    """y = act(gamma * (x - mean) * rstd + beta + residual), and 0 where the mask is False."""
    dtype = x.dtype
    xp, z = _before_activation(x, mean, rstd, gamma, beta)
    if residual is not None:
        z = z + xp.astype(residual, z.dtype)
    active = None
    if problem.activation == "relu":
        passes = _passes(z)
        z = xp.where(passes, z, xp.zeros_like(z))
        active = passes if residual is not None and keep else None
    if where is not None:
        z = xp.where(where, z, xp.zeros_like(z))
    return _into(out, xp.astype(z, dtype)), active


def gradient_sums(
    problem: Problem,
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    gamma: Array | None,
    beta: Array | None,
    where: Array | None = None,
    active: Array | None = None,
) -> GradientSums:
    """The sums of dz and dz * xhat, which are also the gradients of beta and gamma."""
    xp, dz, xhat = _gradient_terms(problem, dy, x, mean, rstd, gamma, beta, where, active)
    return GradientSums(xp.sum(dz, axis=AVERAGED), xp.sum(dz * xhat, axis=AVERAGED))


def input_gradient(
    problem: Problem,
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    gamma: Array | None,
    beta: Array | None,
    count: Any,
    sums: GradientSums | None,
    where: Array | None = None,
    active: Array | None = None,
    residual: bool = False,
    out: Array | None = None,
) -> tuple[Array, Array | None]:
    """dx = gamma * rstd * (dz - mean(dz) - xhat * mean(dz * xhat)); constant statistics have no means."""
    dtype = x.dtype
    xp, dz, xhat = _gradient_terms(problem, dy, x, mean, rstd, gamma, beta, where, active)
    dx = dz
    if sums is not None:
        if isinstance(count, int):
            samples: Any = max(count, 1)
        else:
            counts = xp.astype(count, dz.dtype)
            samples = xp.maximum(counts, xp.ones_like(counts))
        mean_dz = _per_channel(xp, sums.dy / samples)
        mean_dz_xhat = _per_channel(xp, sums.dy_xhat / samples)
        dx = dx - mean_dz - xhat * mean_dz_xhat
    dx = dx * _scale(xp, rstd, gamma, dz.dtype)
    if where is not None:
        dx = xp.where(where, dx, xp.zeros_like(dx))
    return _into(out, xp.astype(dx, dtype)), xp.astype(dz, dtype) if residual else None


def forward(
    problem: Problem,
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    residual: Array | None = None,
    where: Array | None = None,
    out: Array | None = None,
    running: Running | None = None,
) -> Forward:
    """`moments`, then `normalize`."""
    batch = moments(problem, x, where)
    rstd = reciprocal_std(batch.wide_var, problem.eps)
    y, active = normalize(problem, x, batch.wide_mean, rstd, gamma, beta, residual, where, out)
    moved = None if running is None else towards(running.mean, running.var, batch, running.weight)
    return Forward(y, batch, rstd, active, moved)


def backward(
    problem: Problem,
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    gamma: Array | None,
    beta: Array | None,
    count: Any,
    where: Array | None = None,
    active: Array | None = None,
    residual: bool = False,
    out: Array | None = None,
) -> Backward:
    """`gradient_sums`, then `input_gradient`; without a count the statistics are constants."""
    sums = gradient_sums(problem, dy, x, mean, rstd, gamma, beta, where, active)
    taken = None if count is None else sums
    dx, dresidual = input_gradient(problem, dy, x, mean, rstd, gamma, beta, count, taken, where, active, residual, out)
    return Backward(dx, dresidual, sums)


def _gradient_terms(
    problem: Problem,
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    gamma: Array | None,
    beta: Array | None,
    where: Array | None,
    active: Array | None,
) -> tuple[Any, Array, Array]:
    """dz, the gradient before the activation, and xhat, both 0 where the mask is False."""
    xp, dz = _widen(dy)
    _, x = _widen(x)
    xhat = (x - _per_channel(xp, mean, x.dtype)) * _per_channel(xp, rstd, x.dtype)
    if problem.activation == "relu":
        if active is None:
            active = _passes(_before_activation(x, mean, rstd, gamma, beta)[1])
        dz = xp.where(active, dz, xp.zeros_like(dz))
    if where is not None:
        dz = xp.where(where, dz, xp.zeros_like(dz))
        xhat = xp.where(where, xhat, xp.zeros_like(xhat))
    return xp, dz, xhat


def _before_activation(
    x: Array, mean: Array, rstd: Array, gamma: Array | None, beta: Array | None
) -> tuple[Any, Array]:
    """gamma * (x - mean) * rstd + beta.  Never a*x + b, which loses the digits of a large mean."""
    xp, x = _widen(x)
    z = (x - _per_channel(xp, mean, x.dtype)) * _scale(xp, rstd, gamma, x.dtype)
    return xp, z if beta is None else z + _per_channel(xp, beta, z.dtype)


def _passes(z: Array) -> Array:
    """Where ReLU lets z through: above zero, and NaN, which must not be hidden."""
    return ~(z <= 0)


def _scale(xp: Any, rstd: Array, gamma: Array | None, dtype: Any) -> Array:
    scale = _per_channel(xp, rstd, dtype)
    return scale if gamma is None else scale * _per_channel(xp, gamma, dtype)


def _per_channel(xp: Any, values: Array, dtype: Any = None) -> Array:
    """(channels,) as (1, channels, 1), to go with the canonical form."""
    if dtype is not None and values.dtype != dtype:
        values = xp.astype(values, dtype)
    return xp.reshape(values, (1, -1, 1))


def _widen(x: Array) -> tuple[Any, Array]:
    """The namespace of x, and x in the widest float of its device."""
    wide = widest_float(library_of(x))
    xp = namespace_of(x)
    return xp, x if x.dtype == wide else xp.astype(x, wide)


def _into(out: Array | None, result: Array) -> Array:
    if out is None:
        return result
    out[...] = result
    return out
