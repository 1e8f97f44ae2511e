"""The CPU machine: batch normalisation at the speed of a copy, in Numba.

Arrays whose channels are planes of neighbours go to `planes`, those whose channels are neighbours themselves to
`columns`; anything else is copied once.  All sums are in float64, whatever the element type, around a
sample of the channel, and everything is rounded once, when it is stored (float16 and bfloat16: to float32 first).

A call uses as many threads as `numba.set_num_threads` or ``NUMBA_NUM_THREADS`` allow, and its result has the same
bits for any number of them.  It may be called from several threads at once and in a forked process.  The threads are
its own and not an OpenMP or BLAS pool, so `threadpoolctl` does not see them.
"""

from functools import cache
from math import nan
from typing import Any

import numpy as np
from numba import types

from cubn.machines import Backward, Forward, GradientSums, Running
from cubn.machines.cpu import columns, planes
from cubn.machines.cpu.compiling import STORED, array, compile_for
from cubn.machines.cpu.plan import Columns, Planes, plan_columns, plan_planes
from cubn.machines.cpu.simd import LANES
from cubn.machines.cpu.threads import run
from cubn.moments import Moments, towards
from cubn.namespace import Array
from cubn.problem import Problem

name = "cpu"

SMALL_PLANE = 16
"""Inner sizes below this are taken as columns: a vector would not be full in a plane."""

_NO_MASK = np.zeros((1, 1, 1), np.bool_)
_NO_BITS = np.zeros(0, np.uint16)
_NO_COUNTS = np.zeros(0, np.int64)
_NO_PARTS = np.zeros((0, 0, 0))
_NO_SUMS = np.zeros(0)
_STATISTICS = {name: np.dtype(name) for name in ("float32", "float64")}
_NO_PARAMETER = {name: np.zeros(0, dtype) for name, dtype in _STATISTICS.items()}


def moments(problem: Problem, x: Array, where: Array | None = None) -> Moments:
    """Count, mean and sum of squared distances per channel, over the samples that `where` admits."""
    return _forward(problem, x, None, None, None, where, None, measure=True, write=False).moments


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
) -> tuple[Array, Any]:
    """y = act(gamma * (x - mean) * rstd + beta + residual), and 0 where the mask is False."""
    result = _forward(
        problem,
        x,
        gamma,
        beta,
        residual,
        where,
        out,
        measure=False,
        write=True,
        keep=keep,
        mean=_wide(mean),
        rstd=_wide(rstd),
    )
    return result.y, result.active


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
    """`moments` and `normalize` in one walk, which reads x from memory once where the cache allows."""
    found = _forward(problem, x, gamma, beta, residual, where, out, measure=True, write=True)
    if running is None:
        return found
    return found._replace(running=towards(running.mean, running.var, found.moments, running.weight))


def gradient_sums(
    problem: Problem,
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    gamma: Array | None,
    beta: Array | None,
    where: Array | None = None,
    active: Any = None,
) -> GradientSums:
    """The sums of dz and of dz * xhat over each channel."""
    return _backward(
        problem, dy, x, mean, rstd, gamma, beta, 0, None, where, active, False, None, measure=True, write=False
    ).sums


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
    active: Any = None,
    residual: bool = False,
    out: Array | None = None,
) -> tuple[Array, Array | None]:
    """dx = gamma * rstd * (dz - mean(dz) - xhat * mean(dz * xhat)); constant statistics have no means."""
    if sums is None:
        count = None
    result = _backward(
        problem, dy, x, mean, rstd, gamma, beta, count, sums, where, active, residual, out, measure=False, write=True
    )
    return result.dx, result.dresidual


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
    active: Any = None,
    residual: bool = False,
    out: Array | None = None,
) -> Backward:
    """`gradient_sums` and `input_gradient` in one walk; without a count the statistics are constants."""
    return _backward(
        problem, dy, x, mean, rstd, gamma, beta, count, None, where, active, residual, out, measure=True, write=True
    )


def compile_ahead(dtype: str) -> None:
    """Compile every kernel for one element type, or fetch it from the disk."""
    for walk in (planes, columns):
        _forward_kernel(walk, dtype)
        _backward_kernel(walk, dtype)


def _forward(
    problem: Problem,
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    residual: Array | None,
    where: Array | None,
    out: Array | None,
    *,
    measure: bool,
    write: bool,
    keep: bool = True,
    mean: Any = None,
    rstd: Any = None,
) -> Forward:
    channels, dtype = problem.channels, problem.dtype
    statistics = _STATISTICS[problem.statistics_dtype]
    m2 = _NO_SUMS
    if measure:
        mean, m2, rstd = np.empty((3, channels))
    count: Any = problem.samples
    if x.size == 0:
        if measure:
            mean[:], m2[:], rstd[:] = 0.0, 0.0, nan
            count = count if where is None else np.zeros(channels, np.int64)
        y = np.empty(x.shape, x.dtype) if out is None else out
        keep = keep and problem.activation is not None and residual is not None
        return Forward(y, Moments(count, mean, m2, statistics), rstd, _NO_BITS if keep else None, None)

    walk, x = _walk(x)
    where = _mask(walk, where)
    y = x
    if write:
        y = out if out is not None and _conforms(walk, out) else np.empty(x.shape, x.dtype)
    add = x if residual is None else _conforming(walk, residual)
    relu = problem.activation is not None
    keep = keep and relu and residual is not None and write
    counts = _NO_COUNTS
    if where is not _NO_MASK and measure:
        count = counts = np.empty(channels, np.int64)
    plan, shape, partial = _plan(walk, problem, x, (y, add), keep, where is not _NO_MASK, measure)
    active = _NO_BITS if not keep else np.empty(_words(walk, problem), np.uint16)
    none = _NO_PARAMETER[problem.statistics_dtype]
    run(
        _forward_kernel(walk, dtype),
        (
            x, y, add, where, active,
            none if gamma is None else gamma, none if beta is None else beta,
            mean, m2, rstd, counts, partial, problem.eps,
            residual is not None, where is not _NO_MASK, gamma is not None, beta is not None, relu, keep,
            measure, write, plan.past, *shape,
        ),
        plan.tasks,
    )  # fmt: skip
    if out is not None and y is not out and write:
        out[...] = y
        y = out
    return Forward(y, Moments(count, mean, m2, statistics), rstd, active if keep else None, None)


def _backward(
    problem: Problem,
    dy: Array,
    x: Array,
    mean: Array,
    rstd: Array,
    gamma: Array | None,
    beta: Array | None,
    count: Any,
    sums: GradientSums | None,
    where: Array | None,
    active: Any,
    residual: bool,
    out: Array | None,
    *,
    measure: bool,
    write: bool,
) -> Backward:
    channels, dtype = problem.channels, problem.dtype
    if sums is not None:
        sum_dy, sum_dy_xhat = _wide(sums.dy), _wide(sums.dy_xhat)
    else:
        sum_dy, sum_dy_xhat = np.empty((2, channels))
    if x.size == 0:
        if measure:
            sum_dy[:], sum_dy_xhat[:] = 0.0, 0.0
        dx = np.empty(x.shape, x.dtype) if out is None else out
        return Backward(dx, np.empty(x.shape, x.dtype) if residual else None, GradientSums(sum_dy, sum_dy_xhat))

    walk, x = _walk(x)
    where = _mask(walk, where)
    dy = _conforming(walk, dy)
    dx = dresidual = x
    if write:
        dx = out if out is not None and _conforms(walk, out) else np.empty(x.shape, x.dtype)
        if residual:
            dresidual = np.empty(x.shape, x.dtype)
    constant = count is None
    has_counts = not constant and not isinstance(count, int)
    plan, shape, partial = _plan(
        walk, problem, x, (dy, dx, dresidual), active is not None, where is not _NO_MASK, measure
    )
    none = _NO_PARAMETER[problem.statistics_dtype]
    run(
        _backward_kernel(walk, dtype),
        (
            dy, x, dx, dresidual, where, _NO_BITS if active is None else active,
            none if gamma is None else gamma, none if beta is None else beta,
            _wide(mean), _wide(rstd), sum_dy, sum_dy_xhat,
            np.ascontiguousarray(count, np.int64) if has_counts else _NO_COUNTS, partial,
            1.0 if constant or has_counts else float(max(count, 1)),
            where is not _NO_MASK, gamma is not None, beta is not None, has_counts,
            problem.activation is not None, active is not None, residual and write, constant,
            measure, write, plan.past, *shape,
        ),
        plan.tasks,
    )  # fmt: skip
    if out is not None and dx is not out and write:
        out[...] = dx
        dx = out
    return Backward(dx, dresidual if residual and write else None, GradientSums(sum_dy, sum_dy_xhat))


def _wide(values: Array) -> Any:
    """(channels,) as the kernels take it: contiguous float64."""
    if values.dtype == np.float64 and values.flags.c_contiguous:
        return values
    return np.ascontiguousarray(values, np.float64)


def _walk(x: Array) -> tuple[Any, Array]:
    """The kernels for the memory of x, and x itself or, where no kernel can walk it, a contiguous copy."""
    walk = columns if x.shape[2] < SMALL_PLANE else planes
    if _conforms(walk, x):
        return walk, x
    if walk is columns and x.shape[2] > 1 and _conforms(planes, x):
        return planes, x
    return walk, np.ascontiguousarray(x)


def _conforms(walk: Any, array: Array) -> bool:
    """True if the kernels can walk through this array."""
    _, channels, inner = array.shape
    _, between, step = array.strides
    if inner > 1 and step != array.itemsize:
        return False
    return walk is planes or channels == 1 or between == inner * array.itemsize


def _conforming(walk: Any, array: Array) -> Any:
    return array if _conforms(walk, array) else np.ascontiguousarray(array)


def _mask(walk: Any, where: Array | None) -> Any:
    """The mask with the axes that the kernels walk along; broadcast ones stay so."""
    if where is None:
        return _NO_MASK
    if walk is columns and where.shape[2] > 1:
        return np.ascontiguousarray(where).reshape(where.shape[0], -1, 1)
    return where


def _words(walk: Any, problem: Problem) -> int:
    """Groups of sixteen bits in which ReLU's choices are kept."""
    if walk is planes:
        return problem.outer * problem.channels * -(-problem.inner // LANES)
    return problem.outer * -(-problem.channels * problem.inner // LANES)


def _plan(
    walk: Any, problem: Problem, x: Array, others: tuple[Array, ...], bits: bool, masked: bool, measure: bool
) -> tuple[Planes | Columns, tuple[int, int, int] | tuple[int, int, int, int], Any]:
    """The plan, its numbers as the kernels take them, and memory for partial results."""
    outer, channels, inner, itemsize = problem.outer, problem.channels, problem.inner, x.itemsize
    if walk is planes:
        tiles = plan_planes(outer, channels, inner, itemsize)
        pieces = tiles.outer_pieces * tiles.inner_pieces
        partial = np.empty((1, channels * pieces, 3)) if measure and pieces > 1 else _NO_PARTS
        return tiles, (tiles.group, tiles.outer_pieces, tiles.inner_pieces), partial
    row = channels * inner * itemsize
    close = all(array.strides[0] == row for array in (x, *others)) if outer > 1 else True
    strips = plan_columns(outer, channels * inner, itemsize, close, bits, masked)
    padded = (channels // LANES + 1) * LANES
    partial = np.empty((strips.blocks, 3, padded)) if measure and strips.blocks > 1 else _NO_PARTS
    return strips, (strips.ranges, strips.blocks, strips.fold, strips.spread), partial


@cache
def _forward_kernel(walk: Any, dtype: str) -> Any:
    element, parameter = STORED[dtype], types.float64 if dtype == "float64" else types.float32
    big, numbers, numbered = array(element), array(types.float64, 1), array(types.int64, 1)
    flag, integer = types.boolean, types.int64
    return compile_for(
        walk.forward,
        big, big, big, array(types.boolean), array(types.uint16, 1), array(parameter, 1), array(parameter, 1),
        numbers, numbers, numbers, array(types.int64, 1), array(types.float64), types.float64,
        *[flag] * 9, *[integer] * (3 if walk is planes else 4), numbered, numbered, integer, flag,
    )  # fmt: skip


@cache
def _backward_kernel(walk: Any, dtype: str) -> Any:
    element, parameter = STORED[dtype], types.float64 if dtype == "float64" else types.float32
    big, numbers, numbered = array(element), array(types.float64, 1), array(types.int64, 1)
    flag, integer = types.boolean, types.int64
    return compile_for(
        walk.backward,
        big, big, big, big, array(types.boolean), array(types.uint16, 1), array(parameter, 1), array(parameter, 1),
        numbers, numbers, numbers, numbers, array(types.int64, 1), array(types.float64),
        types.float64, *[flag] * 11, *[integer] * (3 if walk is planes else 4), numbered, numbered, integer, flag,
    )  # fmt: skip
