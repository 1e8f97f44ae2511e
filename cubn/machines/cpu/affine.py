"""The map of one channel in an array's own arithmetic, as right in float32 as one rounding allows.

    y = gamma * rstd * (x - mean) + beta

In float32 the mean of x would lose the digits that x - mean is made of, and numbers like 1e30 or 1e-30 leave the
range on the way.  So the mean is split into two floats, high + low, and distances are taken in a unit near the
standard deviation, a power of two, which costs nothing in a fused multiply-add and rounds nothing:

    d = fma(x, unit, -high * unit) - low * unit        that is (x - mean) * unit, about xhat
    y = fma(d, gamma * rstd / unit, beta)

Where x is near the mean its distance from `high` is exact, and elsewhere its rounding is relative to the distance.
A channel of equal samples has d = 0 and gives beta.  The gradient of x takes the same distances:

    dx = gamma * rstd * (dz - mean(dz) - xhat * mean(dz * xhat)) = a * unit * (dz + level + d * tilt)

Tables hold these terms, a row for each (`UNIT` and so on), a column for each channel.
"""

# mypy: ignore-errors
# Compiled by Numba, which has no type hints and infers every type in this file itself.

from math import inf

from numba import njit

from cubn.machines.cpu.simd import (
    LANES,
    apart,
    clip,
    first,
    fma,
    load_some,
    magnitude,
    own,
    power_of_two,
    splat,
    store,
    widen,
)

UNIT, CENTER, REST, FACTOR, OFFSET, LEVEL, TILT = range(7)
"""unit (which comes first), -high * unit, -low * unit, gamma * rstd / unit, beta; -mean(dz),
-rstd * mean(dz * xhat) / unit."""

AFFINE_TERMS, GRADIENT_TERMS = 5, 7
"""Rows of a table for the result, and for the gradient."""

SMALLEST, LARGEST = 2.0**-126, 2.0**126
"""Bounds of a unit, and of a mean in this unit, so that float32 holds both."""


@njit
def padded(columns):
    """Length of a table whose last vector can be read whole, from any offset in it."""
    return (columns // LANES + 2) * LANES


@njit
def distance(values, unit, center, rest):
    """(values - mean) * unit."""
    return fma(values, unit, center) + rest


@njit
def _unit(mean, rstd):
    reach = clip(magnitude(mean), splat(1.0), splat(inf))
    return clip(power_of_two(rstd), splat(SMALLEST), power_of_two(splat(LARGEST) / reach))


@njit
def load_affine(tables, c0, c1, mean, rstd, gamma, beta, has_gamma, has_beta):
    """The terms of y for channels c0 to c1."""
    apart()
    for c in range(c0, c1, LANES):
        inside = first(c1 - c)
        here = (c - c0) * tables.itemsize
        middle, scale = load_some(mean, c * 8, inside), load_some(rstd, c * 8, inside)
        unit = _unit(middle, scale)
        high = widen(own(tables, middle))
        if has_gamma:
            scale = scale * load_some(gamma, c * gamma.itemsize, inside)
        shift = load_some(beta, c * beta.itemsize, inside) if has_beta else splat(0.0)
        store(tables[UNIT], here, unit)
        store(tables[CENTER], here, splat(0.0) - high * unit)
        store(tables[REST], here, (high - middle) * unit)
        store(tables[FACTOR], here, scale / unit)
        store(tables[OFFSET], here, shift)


@njit
def load_slopes(tables, c0, c1, mean, rstd, sum_dy, sum_dy_xhat, count, has_counts, samples, constant):
    """The terms that a gradient has besides; 0 for constant statistics."""
    apart()
    zero, one = splat(0.0), splat(1.0)
    for c in range(c0, c1, LANES):
        inside = first(c1 - c)
        here = (c - c0) * tables.itemsize
        level, tilt = zero, zero
        if not constant:
            n = clip(load_some(count, c * 8, inside), one, splat(inf)) if has_counts else splat(samples)
            middle, scale = load_some(mean, c * 8, inside), load_some(rstd, c * 8, inside)
            level = zero - load_some(sum_dy, c * 8, inside) / n
            tilt = (zero - scale * (load_some(sum_dy_xhat, c * 8, inside) / n)) / _unit(middle, scale)
        store(tables[LEVEL], here, level)
        store(tables[TILT], here, tilt)
