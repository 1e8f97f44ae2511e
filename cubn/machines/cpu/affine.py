"""The map of one channel in an array's own arithmetic, as right in float32 as one rounding allows.

    y = gamma * rstd * (x - mean) + beta

In float32 the mean of x would lose the digits that x - mean is made of, and numbers like 1e30 or 1e-30 leave the
range on the way.  So distances are taken from `high`, the float nearest to the mean, and what is left of the mean goes
into the constant terms; and in a unit near the standard deviation, a power of two, which costs nothing in a fused
multiply-add and rounds nothing:

    d = fma(x, unit, -high * unit)                     that is (x - high) * unit, about xhat
    y = fma(d, factor, fma(d, fine, offset))           with factor + fine = gamma * rstd / unit

The factor is two floats as well: alone it would be wrong by half a digit of every y.  So y has the rounding of d, its
own, and two of `offset`, which is beta + gamma * rstd * (high - mean).  Where x is near the mean d is exact, and
elsewhere its rounding is relative to the distance.  In a channel of equal samples they, `high` and the mean are one
number, so d = 0 and y is beta.  The gradient of x takes the same distances:

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

UNIT, CENTER, FACTOR, FINE, OFFSET, LEVEL, TILT = range(7)
"""unit (which comes first), -high * unit, gamma * rstd / unit in two floats, beta + gamma * rstd * (high - mean);
-mean(dz) - rstd * mean(dz * xhat) * (high - mean), -rstd * mean(dz * xhat) / unit."""

AFFINE_TERMS, GRADIENT_TERMS = 5, 7
"""Rows of a table for the result, and for the gradient."""

HUGE = 3.402823466e38
"""The largest float32, which a factor of no distance may exceed: 0 times it is to be 0."""

SMALLEST, LARGEST = 2.0**-126, 2.0**126
"""Bounds of a unit, and of a mean in this unit, so that float32 holds both."""


@njit
def padded(columns):
    """Length of a table whose last vector can be read whole, from any offset in it."""
    return (columns // LANES + 2) * LANES


@njit
def distance(values, unit, center):
    """(values - high) * unit."""
    return fma(values, unit, center)


@njit
def scaled(d, factor, fine, offset):
    """y of a distance."""
    return fma(d, factor, fma(d, fine, offset))


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
        factor = clip(scale / unit, splat(-HUGE), splat(HUGE))
        rough = own(tables, factor)
        store(tables[FACTOR], here, rough)
        store(tables[FINE], here, factor - widen(rough))
        store(tables[OFFSET], here, shift + scale * (high - middle))


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
            slope = zero - scale * (load_some(sum_dy_xhat, c * 8, inside) / n)
            level = level + slope * (widen(own(tables, middle)) - middle)
            tilt = slope / _unit(middle, scale)
        store(tables[LEVEL], here, level)
        store(tables[TILT], here, tilt)
