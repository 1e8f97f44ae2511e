"""The CPU machine: batch normalisation at the speed of a copy, in Numba.

Arrays whose channels are planes of neighbours go to `planes`, those whose channels are neighbours themselves to
`columns`; anything else is copied once.  All sums are in float64, whatever the element type, around a sample of the
channel.  What is done to every element on its own is done in float32, for float64 in float64 (`affine` says how that
loses nothing), and rounded to the dtype of x when it is stored.

A call uses as many threads as `numba.set_num_threads` or ``NUMBA_NUM_THREADS`` allow, and its result has the same
bits for any number of them.  It may be called from several threads at once and in a forked process.  The threads are
its own and not an OpenMP or BLAS pool, so `threadpoolctl` does not see them.
"""

from functools import cache, lru_cache
from math import nan
from typing import Any, NamedTuple

import numpy as np
from numba import types

from cubn.machines import Backward, Forward, GradientSums, Running
from cubn.machines.cpu import columns, planes
from cubn.machines.cpu.compiling import BOARD, STORED, array, compile_for
from cubn.machines.cpu.plan import plan_columns, plan_planes
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
_ITEMSIZE = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
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
        problem, x, gamma, beta, residual, where, out,
        measure=False, write=True, keep=keep, mean=_wide(mean), rstd=_wide(rstd),
    )  # fmt: skip
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

    y = x if not write else np.empty(x.shape, x.dtype) if out is None else out
    add = x if residual is None else residual
    relu, masked = problem.activation is not None, where is not None
    keep = keep and relu and residual is not None and write
    route = _route(problem, x.strides, (y.strides, add.strides), keep, masked, measure)
    if route is None:
        walk, x = _walk(x)
        y = x if not write else y if _conforms(walk, y) else np.empty(x.shape, x.dtype)
        add = x if residual is None else _conforming(walk, residual)
        route = _route(problem, x.strides, (y.strides, add.strides), keep, masked, measure)
        assert route is not None
    counts = _NO_COUNTS
    if masked and measure:
        count = counts = np.empty(channels, np.int64)
    active = _NO_BITS if not keep else np.empty(_words(route.walk, problem), np.uint16)
    none = _NO_PARAMETER[problem.statistics_dtype]
    run(
        _forward_kernel(route.walk, dtype),
        (
            x, y, add, _mask(route.walk, where), active,
            none if gamma is None else gamma, none if beta is None else beta,
            mean, m2, rstd, counts, _NO_PARTS if route.partial is None else np.empty(route.partial), problem.eps,
            residual is not None, masked, gamma is not None, beta is not None, relu, keep,
            measure, write, *route.plan,
        ),
        route.tasks,
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

    dx = x if not write else np.empty(x.shape, x.dtype) if out is None else out
    dresidual = np.empty(x.shape, x.dtype) if residual and write else x
    bits, masked = active is not None, where is not None
    route = _route(problem, x.strides, (dy.strides, dx.strides, dresidual.strides), bits, masked, measure)
    if route is None:
        walk, x = _walk(x)
        dy = _conforming(walk, dy)
        dx = x if not write else dx if _conforms(walk, dx) else np.empty(x.shape, x.dtype)
        dresidual = dresidual if residual and write else x
        route = _route(problem, x.strides, (dy.strides, dx.strides, dresidual.strides), bits, masked, measure)
        assert route is not None
    constant = count is None
    has_counts = not constant and not isinstance(count, int)
    none = _NO_PARAMETER[problem.statistics_dtype]
    run(
        _backward_kernel(route.walk, dtype),
        (
            dy, x, dx, dresidual, _mask(route.walk, where), _NO_BITS if active is None else active,
            none if gamma is None else gamma, none if beta is None else beta,
            _wide(mean), _wide(rstd), sum_dy, sum_dy_xhat,
            np.ascontiguousarray(count, np.float64) if has_counts else _NO_SUMS,
            _NO_PARTS if route.partial is None else np.empty(route.partial),
            1.0 if constant or has_counts else float(max(count, 1)),
            masked, gamma is not None, beta is not None, has_counts,
            problem.activation is not None, bits, residual and write, constant,
            measure, write, *route.plan,
        ),
        route.tasks,
    )  # fmt: skip
    if out is not None and dx is not out and write:
        out[...] = dx
        dx = out
    return Backward(dx, dresidual if residual and write else None, GradientSums(sum_dy, sum_dy_xhat))


def _wide(values: Array) -> Any:
    """(channels,) as the kernels take it: contiguous float64."""
    if values.dtype is _STATISTICS["float64"] and values.strides == (8,):
        return values
    return np.ascontiguousarray(values, np.float64)


class Route(NamedTuple):
    """How a call is walked: which kernels, the last of their arguments, the memory for partial results, tasks."""

    walk: Any
    plan: tuple[Any, ...]
    partial: tuple[int, int, int] | None
    tasks: int


@lru_cache(maxsize=4096)
def _route(
    problem: Problem,
    strides: tuple[int, ...],
    others: tuple[tuple[int, ...], ...],
    bits: bool,
    masked: bool,
    measure: bool,
) -> Route | None:
    """The route for x and other arrays of these strides; None if one of them has to be copied."""
    outer, channels, inner = problem.outer, problem.channels, problem.inner
    itemsize = _ITEMSIZE[problem.dtype]
    walk = _walk_for(channels, inner, strides, itemsize)
    if walk is None or not all(_walkable(walk, channels, inner, other, itemsize) for other in others):
        return None
    if walk is planes:
        tiles = plan_planes(outer, channels, inner, itemsize, measure)
        pieces = tiles.outer_pieces * tiles.inner_pieces
        numbers = tiles.past, tiles.group, tiles.outer_pieces, tiles.inner_pieces, tiles.fits_twice
        return Route(walk, numbers, (1, channels * pieces, 3) if measure and pieces > 1 else None, tiles.tasks)
    row = channels * inner * itemsize
    close = outer == 1 or all(each[0] == row for each in (strides, *others))
    strips = plan_columns(outer, channels * inner, itemsize, close, bits, masked, measure)
    padded = (channels // LANES + 1) * LANES
    partial = (strips.blocks, 3, padded) if measure and strips.blocks > 1 else None
    return Route(walk, (strips.past, strips.ranges, strips.blocks, strips.fold, strips.spread), partial, strips.tasks)


def _walk_for(channels: int, inner: int, strides: tuple[int, ...], itemsize: int) -> Any:
    """The kernels for memory of these strides; None if there are none."""
    walk = columns if inner < SMALL_PLANE else planes
    if _walkable(walk, channels, inner, strides, itemsize):
        return walk
    if walk is columns and inner > 1 and _walkable(planes, channels, inner, strides, itemsize):
        return planes
    return None


def _walkable(walk: Any, channels: int, inner: int, strides: tuple[int, ...], itemsize: int) -> bool:
    """True if the kernels can walk through an array of these strides."""
    if inner > 1 and strides[2] != itemsize:
        return False
    return walk is planes or channels == 1 or strides[1] == inner * itemsize


def _walk(x: Array) -> tuple[Any, Array]:
    """The kernels for the memory of x, and x itself or, where no kernel can walk it, a contiguous copy."""
    walk = _walk_for(x.shape[1], x.shape[2], x.strides, x.itemsize)
    if walk is None:
        return (columns if x.shape[2] < SMALL_PLANE else planes), np.ascontiguousarray(x)
    return walk, x


def _conforms(walk: Any, array: Array) -> bool:
    return _walkable(walk, array.shape[1], array.shape[2], array.strides, array.itemsize)


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


@cache
def _forward_kernel(walk: Any, dtype: str) -> Any:
    element, parameter = STORED[dtype], types.float64 if dtype == "float64" else types.float32
    big, numbers = array(element), array(types.float64, 1)
    flag, integer = types.boolean, types.int64
    return compile_for(
        walk.forward,
        types.Tuple((
        big, big, big, array(types.boolean), array(types.uint16, 1), array(parameter, 1), array(parameter, 1),
        numbers, numbers, numbers, array(types.int64, 1), array(types.float64), types.float64,
        *[flag] * 9, *([integer] * 3 + [flag] if walk is planes else [integer] * 4),
        )),
        BOARD, types.int64,
    )  # fmt: skip


@cache
def _backward_kernel(walk: Any, dtype: str) -> Any:
    element, parameter = STORED[dtype], types.float64 if dtype == "float64" else types.float32
    big, numbers = array(element), array(types.float64, 1)
    flag, integer = types.boolean, types.int64
    return compile_for(
        walk.backward,
        types.Tuple((
        big, big, big, big, array(types.boolean), array(types.uint16, 1), array(parameter, 1), array(parameter, 1),
        numbers, numbers, numbers, numbers, numbers, array(types.float64),
        types.float64, *[flag] * 11, *([integer] * 3 + [flag] if walk is planes else [integer] * 4),
        )),
        BOARD, types.int64,
    )  # fmt: skip
