"""Kernels for memory in planes: each channel's samples lie in rows of neighbours, as in (N, C, H*W).

The walk is channel by channel.  A channel's slab is read once for its sums and then again for its result,
and the second time it comes from the cache: the memory sees one read and one write, as in a copy.  Where the
channels are too few, or their slabs too large to share out, every slab is cut into pieces, whose moments
are merged before the second read.

How a slab is cut depends on the problem alone and pieces are merged in order, so that the bits of a result
do not depend on how many threads there were.

Arrays are (outer, channels, inner) with neighbours in the last axis; `counters` is what the threads of one
call share out work with.
"""

# mypy: ignore-errors
# Compiled by Numba, which has no type hints and infers every type in this file itself.

import numpy as np
from numba import njit

from cubn.machines.cpu.compiling import kernel
from cubn.machines.cpu.sharing import MEASURING, MERGING, WRITING, finish, join, leave, take, wait_until_done
from cubn.machines.cpu.simd import (
    LANES,
    apart,
    first,
    fma,
    lanes_in,
    load,
    load_mask,
    load_some,
    number,
    pack,
    passes_relu,
    select,
    splat,
    store,
    store_some,
    stream,
    total,
    unpack,
)

FIRST_SEGMENT, SEGMENT = 128, 4096
"""Samples after which sums are merged into moments, which then give the next sums a better pivot.

The first pivot is one sample, which may be an outlier: it is soon replaced.
"""


@njit(error_model="numpy")
def merge_sums(count, mean, m2, n, distance, square):
    """Moments after n more samples with these sums of x - mean and (x - mean)**2 (Chan et al. 1979)."""
    if n == 0:
        return count, mean, m2
    shift = distance / n
    within = square - distance * shift
    if within < 0.0:
        within = 0.0  # rounding; NaN is kept
    union = count + n
    return union, mean + shift * (n / union), m2 + within + shift * shift * (count * (n / union))


@njit(error_model="numpy")
def unite(count, mean, m2, n, other_mean, other_m2):
    """Moments of the union of two disjoint sets (Chan et al. 1979)."""
    if n == 0.0:
        return count, mean, m2
    if count == 0.0:
        return n, other_mean, other_m2
    union = count + n
    gap = other_mean - mean
    return union, mean + gap * (n / union), m2 + other_m2 + gap * gap * (count * (n / union))


@njit(error_model="numpy")
def reciprocal_std(count, m2, eps):
    """(m2 / count + eps) ** -1/2, and 0 where that would divide by zero."""
    width = m2 / count + eps
    return 0.0 if width == 0.0 else 1.0 / np.sqrt(width)


@njit
def times(total_distance, rstd):
    """sum dz * xhat from sum dz * (x - mean).  A channel without samples has no rstd (NaN), but its sum is 0."""
    return 0.0 if total_distance == 0.0 else total_distance * rstd


@njit
def _start(array, o, c, i):
    """Offset in bytes of one element."""
    return o * array.strides[0] + c * array.strides[1] + i * array.itemsize


@njit
def _first_admitted(x, where, c, o0, o1, i0, i1):
    """One sample that the mask lets in, to measure distances from; 0 if there is none."""
    apart()
    for o in range(o0, o1):
        for i in range(i0, i1):
            if where[o, c, i]:
                return number(x, _start(x, o, c, i))
    return 0.0


@njit(error_model="numpy")
def _piece_moments(x, where, has_where, c, o0, o1, i0, i1):
    """Count, mean and sum of squared distances of one piece of a channel.

    Sums are of the distances from a pivot: at first one of the samples, so that a constant channel gives
    exact zeros, then the mean so far.
    """
    apart()
    length = i1 - i0
    step = LANES * x.itemsize
    count, m2 = 0.0, 0.0
    mean = _first_admitted(x, where, c, o0, o1, i0, i1) if has_where else number(x, _start(x, o0, c, i0))
    zero = splat(0.0)
    pivot = splat(mean)
    s, t, q, r = zero, zero, zero, zero
    pending, limit = 0, FIRST_SEGMENT
    for o in range(o0, o1):
        at = _start(x, o, c, i0)
        i = 0
        while i < length:
            if not has_where:
                end = min(length, i + limit)
                pending += end - i
                while i + 2 * LANES <= end:
                    d = load(x, at) - pivot
                    e = load(x, at + step) - pivot
                    s = s + d
                    q = fma(d, d, q)
                    t = t + e
                    r = fma(e, e, r)
                    i += 2 * LANES
                    at += 2 * step
                if i + LANES <= end:
                    d = load(x, at) - pivot
                    s = s + d
                    q = fma(d, d, q)
                    i += LANES
                    at += step
                if i < end:
                    mask = first(end - i)
                    d = select(mask, load_some(x, at, mask) - pivot, zero)
                    s = s + d
                    q = fma(d, d, q)
                    i += LANES
                    at += step
            else:
                mask = load_mask(
                    where,
                    o * where.strides[0] + c * where.strides[1] + (i0 + i) * where.strides[2],
                    where.strides[2],
                    first(length - i),
                )
                pending += lanes_in(mask)
                d = select(mask, load_some(x, at, mask) - pivot, zero)
                s = s + d
                q = fma(d, d, q)
                i += LANES
                at += step
            if pending >= limit:
                count, mean, m2 = merge_sums(count, mean, m2, pending, total(s + t), total(q + r))
                pivot = splat(mean)
                s, t, q, r = zero, zero, zero, zero
                pending, limit = 0, SEGMENT
    return merge_sums(count, mean, m2, pending, total(s + t), total(q + r))


@njit
def head_length(array, at, length):
    """Elements before the first address that `stream` can write to."""
    width = LANES * array.itemsize
    return min(length, (-(array.ctypes.data + at) % width) // array.itemsize)


@njit
def _normalize_piece(
    x, y, residual, where, active, has_residual, has_where, relu, keep, past, c, o0, o1, i0, i1, mean, scale, shift
):
    """y = act(scale * (x - mean) + shift + residual) for one piece of a channel.

    `keep` notes in `active`, a bit for each element, where ReLU let it pass; `past` writes past the cache.
    """
    apart()
    length = i1 - i0
    size = x.itemsize
    step = LANES * size
    words = (x.shape[2] + LANES - 1) // LANES
    zero = splat(0.0)
    center, factor, offset = splat(mean), splat(scale), splat(shift)
    for o in range(o0, o1):
        at, to, add = _start(x, o, c, i0), _start(y, o, c, i0), _start(residual, o, c, i0)
        bits = 2 * ((c * x.shape[0] + o) * words + i0 // LANES)
        head = head_length(y, to, length) if past else 0
        streams = past
        if keep and head:
            head, streams = 0, False  # the bits are in steps of sixteen elements from the row's start
        i = 0
        while i < length:
            if i >= head and not has_where:
                while i + LANES <= length:
                    z = fma(load(x, at) - center, factor, offset)
                    if has_residual:
                        z = z + load(residual, add)
                    if relu:
                        lets = passes_relu(z)
                        z = select(lets, z, zero)
                        if keep:
                            pack(active, bits, lets)
                            bits += 2
                    if streams:
                        stream(y, to, z)
                    else:
                        store(y, to, z)
                    i += LANES
                    at += step
                    to += step
                    add += step
            if i < length:
                n = min(LANES, (head if i < head else length) - i)
                inside = first(n)
                z = fma(load_some(x, at, inside) - center, factor, offset)
                if has_residual:
                    z = z + load_some(residual, add, inside)
                if relu:
                    lets = passes_relu(z)
                    z = select(lets, z, zero)
                    if keep:
                        pack(active, bits, lets)
                        bits += 2
                if has_where:
                    start = o * where.strides[0] + c * where.strides[1] + (i0 + i) * where.strides[2]
                    z = select(load_mask(where, start, where.strides[2], inside), z, zero)
                store_some(y, to, z, inside)
                i += n
                at += n * size
                to += n * size
                add += n * size


@njit
def _bounds(extent, pieces, k, unit):
    """Where piece k of so many begins and ends; inner edges are multiples of `unit`."""
    share = (extent + pieces - 1) // pieces
    share = (share + unit - 1) // unit * unit
    return min(extent, k * share), min(extent, (k + 1) * share)


@njit
def _piece(x, outer_pieces, inner_pieces, k):
    o0, o1 = _bounds(x.shape[0], outer_pieces, k // inner_pieces, 1)
    i0, i1 = _bounds(x.shape[2], inner_pieces, k % inner_pieces, LANES)
    return o0, o1, i0, i1


@kernel
def forward(
    x, y, residual, where, active, gamma, beta, mean, m2, rstd, count, partial, eps,
    has_residual, has_where, has_gamma, has_beta, relu, keep, measure, write, past,
    group, outer_pieces, inner_pieces, counters, bell, team, helper,
):  # fmt: skip
    """Moments (`measure`), the normalised result (`write`), or both in one walk.

    A task is `group` channels, or one of the pieces of one channel.  `mean` and `rstd` are results when
    measuring and given otherwise; `count` is written to under a mask only.
    """
    channels = x.shape[1]
    pieces = outer_pieces * inner_pieces
    fused = pieces == 1
    tasks = (channels + group - 1) // group * pieces
    me = join(counters, bell, helper)

    if measure and not fused:
        task = take(counters, team, me, MEASURING, tasks)
        while task < tasks:
            c, k = task // pieces, task % pieces
            o0, o1, i0, i1 = _piece(x, outer_pieces, inner_pieces, k)
            if o0 < o1 and i0 < i1:
                partial[0, task, 0], partial[0, task, 1], partial[0, task, 2] = _piece_moments(
                    x, where, has_where, c, o0, o1, i0, i1
                )
            else:
                partial[0, task, 0], partial[0, task, 1], partial[0, task, 2] = 0.0, 0.0, 0.0
            finish(counters, MEASURING)
            task = take(counters, team, me, MEASURING, tasks)
        wait_until_done(counters, MEASURING, tasks)
        if take(counters, team, me, MERGING, 1) == 0:
            for c in range(channels):
                n, a, b = 0.0, 0.0, 0.0
                for k in range(pieces):
                    part = partial[0, c * pieces + k]
                    n, a, b = unite(n, a, b, part[0], part[1], part[2])
                mean[c], m2[c], rstd[c] = a, b, reciprocal_std(n, b, eps)
                if has_where:
                    count[c] = n
            finish(counters, MERGING)
        wait_until_done(counters, MERGING, 1)

    if write or fused:
        task = take(counters, team, me, WRITING, tasks)
        while task < tasks:
            for c in range(task // pieces * group, min(channels, (task // pieces + 1) * group)):
                o0, o1, i0, i1 = _piece(x, outer_pieces, inner_pieces, task % pieces)
                if o0 >= o1 or i0 >= i1:
                    continue
                if measure and fused:
                    n, a, b = _piece_moments(x, where, has_where, c, o0, o1, i0, i1)
                    mean[c], m2[c], rstd[c] = a, b, reciprocal_std(n, b, eps)
                    if has_where:
                        count[c] = n
                if write:
                    scale = rstd[c]
                    if has_gamma:
                        scale *= gamma[c]
                    shift = np.float64(beta[c]) if has_beta else 0.0
                    _normalize_piece(
                        x, y, residual, where, active, has_residual, has_where, relu, keep, past,
                        c, o0, o1, i0, i1, mean[c], scale, shift,
                    )  # fmt: skip
            finish(counters, WRITING)
            task = take(counters, team, me, WRITING, tasks)
        wait_until_done(counters, WRITING, tasks)
    leave(counters, bell, helper)


@njit
def _piece_sums(dy, x, where, active, has_where, relu, has_active, c, o0, o1, i0, i1, mean, scale, shift):
    """Sums of dz and of dz * (x - mean) over one piece of a channel."""
    apart()
    length = i1 - i0
    size = x.itemsize
    words = (x.shape[2] + LANES - 1) // LANES
    zero = splat(0.0)
    center, factor, offset = splat(mean), splat(scale), splat(shift)
    s, q = zero, zero
    for o in range(o0, o1):
        at, of = _start(x, o, c, i0), _start(dy, o, c, i0)
        bits = 2 * ((c * x.shape[0] + o) * words + i0 // LANES)
        i = 0
        while i < length:
            if not has_where:
                while i + LANES <= length:
                    dz = load(dy, of)
                    d = load(x, at) - center
                    if relu:
                        lets = unpack(active, bits) if has_active else passes_relu(fma(d, factor, offset))
                        dz = select(lets, dz, zero)
                        bits += 2
                    s = s + dz
                    q = fma(dz, d, q)
                    i += LANES
                    at += LANES * size
                    of += LANES * size
            if i < length:
                inside = first(length - i)
                if has_where:
                    start = o * where.strides[0] + c * where.strides[1] + (i0 + i) * where.strides[2]
                    inside = load_mask(where, start, where.strides[2], inside)
                dz = load_some(dy, of, inside)
                d = select(inside, load_some(x, at, inside) - center, zero)
                if relu:
                    lets = unpack(active, bits) if has_active else passes_relu(fma(d, factor, offset))
                    dz = select(lets, dz, zero)
                    bits += 2
                s = s + dz
                q = fma(dz, d, q)
                i += LANES
                at += LANES * size
                of += LANES * size
    return total(s), total(q)


@njit
def _gradient_piece(
    dy, x, dx, dresidual, where, active, has_where, relu, has_active, give_dresidual, past,
    c, o0, o1, i0, i1, mean, scale, shift, mean_dz, slope,
):  # fmt: skip
    """dx = scale * (dz - mean_dz - slope * (x - mean)) for one piece of a channel, and dz where asked for."""
    apart()
    length = i1 - i0
    size = x.itemsize
    words = (x.shape[2] + LANES - 1) // LANES
    zero = splat(0.0)
    center, factor, offset = splat(mean), splat(scale), splat(shift)
    level, tilt = splat(mean_dz), splat(-slope)
    for o in range(o0, o1):
        at, of = _start(x, o, c, i0), _start(dy, o, c, i0)
        to, also = _start(dx, o, c, i0), _start(dresidual, o, c, i0)
        bits = 2 * ((c * x.shape[0] + o) * words + i0 // LANES)
        head = head_length(dx, to, length) if past else 0
        streams = past
        if has_active and head:
            head, streams = 0, False
        i = 0
        while i < length:
            if i >= head and not has_where:
                while i + LANES <= length:
                    dz = load(dy, of)
                    d = load(x, at) - center
                    if relu:
                        lets = unpack(active, bits) if has_active else passes_relu(fma(d, factor, offset))
                        dz = select(lets, dz, zero)
                        bits += 2
                    result = fma(d, tilt, dz - level) * factor
                    if give_dresidual:
                        store(dresidual, also, dz)
                        also += LANES * size
                    if streams:
                        stream(dx, to, result)
                    else:
                        store(dx, to, result)
                    i += LANES
                    at += LANES * size
                    of += LANES * size
                    to += LANES * size
            if i < length:
                n = min(LANES, (head if i < head else length) - i)
                inside = first(n)
                admitted = inside
                if has_where:
                    start = o * where.strides[0] + c * where.strides[1] + (i0 + i) * where.strides[2]
                    admitted = load_mask(where, start, where.strides[2], inside)
                dz = load_some(dy, of, admitted)
                d = load_some(x, at, admitted) - center
                if relu:
                    lets = unpack(active, bits) if has_active else passes_relu(fma(d, factor, offset))
                    dz = select(lets, dz, zero)
                    bits += 2
                result = select(admitted, fma(d, tilt, dz - level) * factor, zero)
                if give_dresidual:
                    store_some(dresidual, also, dz, inside)
                    also += n * size
                store_some(dx, to, result, inside)
                i += n
                at += n * size
                of += n * size
                to += n * size


@kernel
def backward(
    dy, x, dx, dresidual, where, active, gamma, beta, mean, rstd, sum_dy, sum_dy_xhat, count, partial,
    samples, has_where, has_gamma, has_beta, has_counts, relu, has_active, give_dresidual, constant,
    measure, write, past, group, outer_pieces, inner_pieces, counters, bell, team, helper,
):  # fmt: skip
    """The two sums (`measure`), the gradient of the input (`write`), or both in one walk.

    A task is `group` channels, or one of the pieces of one channel.  `sum_dy` and `sum_dy_xhat` are results
    when measuring and given otherwise; `constant` statistics pass no gradient on.
    """
    channels = x.shape[1]
    pieces = outer_pieces * inner_pieces
    fused = pieces == 1
    tasks = (channels + group - 1) // group * pieces
    me = join(counters, bell, helper)

    if measure and not fused:
        task = take(counters, team, me, MEASURING, tasks)
        while task < tasks:
            c, k = task // pieces, task % pieces
            o0, o1, i0, i1 = _piece(x, outer_pieces, inner_pieces, k)
            scale = rstd[c] * gamma[c] if has_gamma else rstd[c]
            shift = np.float64(beta[c]) if has_beta else 0.0
            partial[0, task, 0], partial[0, task, 1] = _piece_sums(
                dy, x, where, active, has_where, relu, has_active, c, o0, o1, i0, i1, mean[c], scale, shift
            )
            finish(counters, MEASURING)
            task = take(counters, team, me, MEASURING, tasks)
        wait_until_done(counters, MEASURING, tasks)
        if take(counters, team, me, MERGING, 1) == 0:
            for c in range(channels):
                a, b = 0.0, 0.0
                for k in range(pieces):
                    a += partial[0, c * pieces + k, 0]
                    b += partial[0, c * pieces + k, 1]
                sum_dy[c], sum_dy_xhat[c] = a, times(b, rstd[c])
            finish(counters, MERGING)
        wait_until_done(counters, MERGING, 1)

    if write or fused:
        task = take(counters, team, me, WRITING, tasks)
        while task < tasks:
            for c in range(task // pieces * group, min(channels, (task // pieces + 1) * group)):
                o0, o1, i0, i1 = _piece(x, outer_pieces, inner_pieces, task % pieces)
                if o0 >= o1 or i0 >= i1:
                    continue
                scale = rstd[c] * gamma[c] if has_gamma else rstd[c]
                shift = np.float64(beta[c]) if has_beta else 0.0
                if measure and fused:
                    a, b = _piece_sums(
                        dy, x, where, active, has_where, relu, has_active,
                        c, o0, o1, i0, i1, mean[c], scale, shift,
                    )  # fmt: skip
                    sum_dy[c], sum_dy_xhat[c] = a, times(b, rstd[c])
                if write:
                    mean_dz, slope = 0.0, 0.0
                    if not constant:
                        n = max(np.float64(count[c]), 1.0) if has_counts else samples
                        mean_dz, slope = sum_dy[c] / n, rstd[c] * (sum_dy_xhat[c] / n)
                    _gradient_piece(
                        dy, x, dx, dresidual, where, active, has_where, relu, has_active, give_dresidual, past,
                        c, o0, o1, i0, i1, mean[c], scale, shift, mean_dz, slope,
                    )  # fmt: skip
            finish(counters, WRITING)
            task = take(counters, team, me, WRITING, tasks)
        wait_until_done(counters, WRITING, tasks)
    leave(counters, bell, helper)
