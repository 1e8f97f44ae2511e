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

from cubn.machines.cpu.affine import (
    AFFINE_TERMS,
    CENTER,
    FACTOR,
    FINE,
    GRADIENT_TERMS,
    LEVEL,
    OFFSET,
    TILT,
    distance,
    load_affine,
    load_slopes,
    padded,
    scaled,
)
from cubn.machines.cpu.compiling import kernel
from cubn.machines.cpu.sharing import (
    MEASURING,
    MERGING,
    WRITING,
    finish,
    goes_on,
    join,
    start,
    take,
    together,
    wait_until_done,
)
from cubn.machines.cpu.simd import (
    LANES,
    apart,
    first,
    fma,
    lanes_in,
    load,
    load_mask,
    load_own,
    load_some,
    load_some_own,
    number,
    own,
    pack,
    passes_relu,
    prefetch,
    select,
    splat,
    spread,
    store,
    store_some,
    stream,
    total,
    unpack,
    widen,
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
def _runs_on(array):
    """True if the rows of neighbouring channels lie one after the other."""
    return array.strides[1] == array.shape[2] * array.itemsize


@njit
def _terms(terms, k):
    """The terms of a distance and of y for one channel of a table."""
    at, each = k * terms.itemsize, terms.strides[0]
    return (
        spread(terms, at), spread(terms, at + CENTER * each),
        spread(terms, at + FACTOR * each), spread(terms, at + FINE * each), spread(terms, at + OFFSET * each),
    )  # fmt: skip


@njit
def _terms_of_two(mask, terms, k):
    """The terms of channel k where the mask is true, those of the next one elsewhere."""
    u, c, f, e, b = _terms(terms, k)
    unit, center, factor, fine, offset = _terms(terms, k + 1)
    return (
        select(mask, u, unit), select(mask, c, center),
        select(mask, f, factor), select(mask, e, fine), select(mask, b, offset),
    )  # fmt: skip


@njit
def _normalize_rows(
    x, y, residual, where, active, has_residual, has_where, relu, keep, past, o0, o1, c0, c1, i0, i1, ahead, terms
):
    """y = act(gamma * rstd * (x - mean) + beta + residual) for a piece of some channels, whose terms are given.

    `keep` notes in `active`, a bit for each element, where ReLU let it pass; `past` writes past the cache;
    `ahead` is how many bytes further on the x lies that is wanted next.  Rows of several channels that lie one
    after the other are one run, in which a vector may belong to two.
    """
    apart()
    size = x.itemsize
    step = LANES * size
    words = (x.shape[2] + LANES - 1) // LANES
    zero = own(x, splat(0.0))
    together = (
        not has_where and not keep and i1 - i0 == x.shape[2]
        and _runs_on(x) and _runs_on(y) and (_runs_on(residual) or not has_residual)
    )  # fmt: skip
    channels = c1 - c0 if together else 1
    for o in range(o0, o1):
        for c in range(c0, c1, channels):
            at, to, add = _start(x, o, c, i0), _start(y, o, c, i0), _start(residual, o, c, i0)
            bits = 2 * ((c * x.shape[0] + o) * words + i0 // LANES)
            length = channels * (i1 - i0)
            head = head_length(y, to, length) if past else 0
            streams = past
            if keep and head:
                head, streams = 0, False  # the bits are in steps of sixteen elements from the row's start
            k, end = c - c0, i1 - i0  # the channel in the table, and where it ends
            unit, center, factor, fine, offset = _terms(terms, k)
            i = 0
            while i < length:
                if i >= head and not has_where:
                    while i + LANES <= end:
                        prefetch(x, at + ahead)
                        z = scaled(distance(load_own(x, at), unit, center), factor, fine, offset)
                        if has_residual:
                            z = z + load_own(residual, add)
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
                    prefetch(x, at + ahead)
                    if i + n > end:
                        unit, center, factor, fine, offset = _terms_of_two(first(end - i), terms, k)
                    z = scaled(distance(load_some_own(x, at, inside), unit, center), factor, fine, offset)
                    if has_residual:
                        z = z + load_some_own(residual, add, inside)
                    if relu:
                        lets = passes_relu(z)
                        z = select(lets, z, zero)
                        if keep:
                            pack(active, bits, lets)
                            bits += 2
                    if has_where:
                        start = o * where.strides[0] + c * where.strides[1] + (i0 + i) * where.strides[2]
                        z = select(load_mask(where, start, where.strides[2], inside), z, zero)
                    if streams and n == LANES:
                        stream(y, to, z)
                    else:
                        store_some(y, to, z, inside)
                    i += n
                    at += n * size
                    to += n * size
                    add += n * size
                    if i >= end and i < length:
                        k, end = k + 1, end + (i1 - i0)
                        unit, center, factor, fine, offset = _terms(terms, k)


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


@njit(error_model="numpy")
def _forward_tasks(
    x, y, residual, where, active, gamma, beta, mean, m2, rstd, count, partial, eps,
    has_residual, has_where, has_gamma, has_beta, relu, keep, measure, write, past,
    group, outer_pieces, inner_pieces, fits_twice, counters, team,
):  # fmt: skip
    """Moments (`measure`), the normalised result (`write`), or both in one walk.

    A task is `group` channels, or one of the pieces of one channel.  `mean` and `rstd` are results when
    measuring and given otherwise; `count` is written to under a mask only.
    """
    channels = x.shape[1]
    pieces = outer_pieces * inner_pieces
    fused = pieces == 1
    tasks = (channels + group - 1) // group * pieces
    me = join(counters)

    if measure and not fused:
        task = take(counters, team, me, MEASURING, tasks, False)
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
            task = take(counters, team, me, MEASURING, tasks, False)
        wait_until_done(counters, MEASURING, tasks)
        if take(counters, team, me, MERGING, 1, False) == 0:
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
        terms = np.empty((AFFINE_TERMS, padded(group)), gamma.dtype)
        loaded = -1
        ahead = group * x.strides[1] if measure and fused and fits_twice else 0
        task = take(counters, team, me, WRITING, tasks, measure and not fused)
        while task < tasks:
            c0, c1 = task // pieces * group, min(channels, (task // pieces + 1) * group)
            o0, o1, i0, i1 = _piece(x, outer_pieces, inner_pieces, task % pieces)
            if measure and fused:
                for c in range(c0, c1):
                    n, a, b = _piece_moments(x, where, has_where, c, o0, o1, i0, i1)
                    mean[c], m2[c], rstd[c] = a, b, reciprocal_std(n, b, eps)
                    if has_where:
                        count[c] = n
            if write and o0 < o1 and i0 < i1:
                if loaded != c0:
                    load_affine(terms, c0, c1, mean, rstd, gamma, beta, has_gamma, has_beta)
                    loaded = c0
                _normalize_rows(
                    x, y, residual, where, active, has_residual, has_where, relu, keep, past,
                    o0, o1, c0, c1, i0, i1, ahead if goes_on(team, task, tasks) else 0, terms,
                )  # fmt: skip
            finish(counters, WRITING)
            task = take(counters, team, me, WRITING, tasks, measure and not fused)
        wait_until_done(counters, WRITING, tasks)


@kernel
def forward(arguments, board, team):
    """`_forward_tasks` with these arguments, on a team of threads."""
    if together(_forward_tasks, arguments + (start(team), team), board, team):  # noqa: RUF005  Numba knows no *
        raise MemoryError


@njit
def _piece_sums(dy, x, where, active, has_where, relu, has_active, c, o0, o1, i0, i1, mean, terms, k):
    """Sums of dz and of dz * (x - mean) over one piece of a channel, which has column k of the table."""
    apart()
    length = i1 - i0
    size = x.itemsize
    words = (x.shape[2] + LANES - 1) // LANES
    zero = splat(0.0)
    middle = splat(mean)
    unit, center, factor, fine, offset = _terms(terms, k)
    s, q = zero, zero
    for o in range(o0, o1):
        at, to = _start(x, o, c, i0), _start(dy, o, c, i0)
        bits = 2 * ((c * x.shape[0] + o) * words + i0 // LANES)
        i = 0
        while i < length:
            if not has_where:
                while i + LANES <= length:
                    dz = load(dy, to)
                    v = load_own(x, at)
                    d = widen(v) - middle
                    if relu:
                        if has_active:
                            lets = unpack(active, bits)
                        else:
                            lets = passes_relu(scaled(distance(v, unit, center), factor, fine, offset))
                        dz = select(lets, dz, zero)
                        bits += 2
                    s = s + dz
                    q = fma(dz, d, q)
                    i += LANES
                    at += LANES * size
                    to += LANES * size
            if i < length:
                inside = first(length - i)
                if has_where:
                    start = o * where.strides[0] + c * where.strides[1] + (i0 + i) * where.strides[2]
                    inside = load_mask(where, start, where.strides[2], inside)
                dz = load_some(dy, to, inside)
                v = load_some_own(x, at, inside)
                d = select(inside, widen(v) - middle, zero)
                if relu:
                    if has_active:
                        lets = unpack(active, bits)
                    else:
                        lets = passes_relu(scaled(distance(v, unit, center), factor, fine, offset))
                    dz = select(lets, dz, zero)
                    bits += 2
                s = s + dz
                q = fma(dz, d, q)
                i += LANES
                at += LANES * size
                to += LANES * size
    return total(s), total(q)


@njit
def _slopes(terms, k):
    """The terms that the gradient has besides, for one channel of a table."""
    at, each = k * terms.itemsize, terms.strides[0]
    return spread(terms, at + LEVEL * each), spread(terms, at + TILT * each)


@njit
def _gradient_rows(
    dy, x, dx, dresidual, where, active, has_where, relu, has_active, give_dresidual, past,
    o0, o1, c0, c1, i0, i1, ahead, ahead_dy, terms,
):  # fmt: skip
    """The gradient of x for a piece of some channels, whose terms are given, and dz where asked for."""
    apart()
    size = x.itemsize
    step = LANES * size
    words = (x.shape[2] + LANES - 1) // LANES
    zero = own(x, splat(0.0))
    together = (
        not has_where and not has_active and i1 - i0 == x.shape[2]
        and _runs_on(x) and _runs_on(dy) and _runs_on(dx) and (_runs_on(dresidual) or not give_dresidual)
    )  # fmt: skip
    channels = c1 - c0 if together else 1
    for o in range(o0, o1):
        for c in range(c0, c1, channels):
            at, of = _start(x, o, c, i0), _start(dy, o, c, i0)
            to, also = _start(dx, o, c, i0), _start(dresidual, o, c, i0)
            bits = 2 * ((c * x.shape[0] + o) * words + i0 // LANES)
            length = channels * (i1 - i0)
            head = head_length(dx, to, length) if past else 0
            streams = past
            if has_active and head:
                head, streams = 0, False
            k, end = c - c0, i1 - i0
            unit, center, factor, fine, offset = _terms(terms, k)
            level, tilt = _slopes(terms, k)
            i = 0
            while i < length:
                if i >= head and not has_where:
                    while i + LANES <= end:
                        prefetch(x, at + ahead)
                        prefetch(dy, of + ahead_dy)
                        dz = load_own(dy, of)
                        d = distance(load_own(x, at), unit, center)
                        if relu:
                            lets = unpack(active, bits) if has_active else passes_relu(scaled(d, factor, fine, offset))
                            dz = select(lets, dz, zero)
                            bits += 2
                        result = fma(d, tilt, dz + level) * factor * unit
                        if give_dresidual:
                            store(dresidual, also, dz)
                            also += step
                        if streams:
                            stream(dx, to, result)
                        else:
                            store(dx, to, result)
                        i += LANES
                        at += step
                        of += step
                        to += step
                if i < length:
                    n = min(LANES, (head if i < head else length) - i)
                    inside = first(n)
                    prefetch(x, at + ahead)
                    prefetch(dy, of + ahead_dy)
                    admitted = inside
                    if has_where:
                        start = o * where.strides[0] + c * where.strides[1] + (i0 + i) * where.strides[2]
                        admitted = load_mask(where, start, where.strides[2], inside)
                    if i + n > end:
                        here = first(end - i)
                        unit, center, factor, fine, offset = _terms_of_two(here, terms, k)
                        next_level, next_tilt = _slopes(terms, k + 1)
                        level, tilt = select(here, level, next_level), select(here, tilt, next_tilt)
                    dz = load_some_own(dy, of, admitted)
                    d = distance(load_some_own(x, at, admitted), unit, center)
                    if relu:
                        lets = unpack(active, bits) if has_active else passes_relu(scaled(d, factor, fine, offset))
                        dz = select(lets, dz, zero)
                        bits += 2
                    result = select(admitted, fma(d, tilt, dz + level) * factor * unit, zero)
                    if give_dresidual:
                        store_some(dresidual, also, dz, inside)
                        also += n * size
                    if streams and n == LANES:
                        stream(dx, to, result)
                    else:
                        store_some(dx, to, result, inside)
                    i += n
                    at += n * size
                    of += n * size
                    to += n * size
                    if i >= end and i < length:
                        k, end = k + 1, end + (i1 - i0)
                        unit, center, factor, fine, offset = _terms(terms, k)
                        level, tilt = _slopes(terms, k)


@njit(error_model="numpy")
def _backward_tasks(
    dy, x, dx, dresidual, where, active, gamma, beta, mean, rstd, sum_dy, sum_dy_xhat, count, partial,
    samples, has_where, has_gamma, has_beta, has_counts, relu, has_active, give_dresidual, constant,
    measure, write, past, group, outer_pieces, inner_pieces, fits_twice, counters, team,
):  # fmt: skip
    """The two sums (`measure`), the gradient of the input (`write`), or both in one walk.

    A task is `group` channels, or one of the pieces of one channel.  `sum_dy` and `sum_dy_xhat` are results
    when measuring and given otherwise; `constant` statistics pass no gradient on.
    """
    channels = x.shape[1]
    pieces = outer_pieces * inner_pieces
    fused = pieces == 1
    tasks = (channels + group - 1) // group * pieces
    me = join(counters)
    terms = np.empty((GRADIENT_TERMS, padded(group)), gamma.dtype)

    if measure and not fused:
        task = take(counters, team, me, MEASURING, tasks, False)
        while task < tasks:
            c = task // pieces
            o0, o1, i0, i1 = _piece(x, outer_pieces, inner_pieces, task % pieces)
            load_affine(terms, c, c + 1, mean, rstd, gamma, beta, has_gamma, has_beta)
            partial[0, task, 0], partial[0, task, 1] = _piece_sums(
                dy, x, where, active, has_where, relu, has_active, c, o0, o1, i0, i1, mean[c], terms, 0
            )
            finish(counters, MEASURING)
            task = take(counters, team, me, MEASURING, tasks, False)
        wait_until_done(counters, MEASURING, tasks)
        if take(counters, team, me, MERGING, 1, False) == 0:
            for c in range(channels):
                a, b = 0.0, 0.0
                for k in range(pieces):
                    a += partial[0, c * pieces + k, 0]
                    b += partial[0, c * pieces + k, 1]
                sum_dy[c], sum_dy_xhat[c] = a, times(b, rstd[c])
            finish(counters, MERGING)
        wait_until_done(counters, MERGING, 1)

    if write or fused:
        loaded = -1
        task = take(counters, team, me, WRITING, tasks, measure and not fused)
        while task < tasks:
            c0, c1 = task // pieces * group, min(channels, (task // pieces + 1) * group)
            o0, o1, i0, i1 = _piece(x, outer_pieces, inner_pieces, task % pieces)
            fresh = loaded != c0
            goes = measure and fused and fits_twice and goes_on(team, task, tasks)
            loaded = c0
            if fresh:
                load_affine(terms, c0, c1, mean, rstd, gamma, beta, has_gamma, has_beta)
            if measure and fused:
                for c in range(c0, c1):
                    a, b = _piece_sums(
                        dy, x, where, active, has_where, relu, has_active,
                        c, o0, o1, i0, i1, mean[c], terms, c - c0,
                    )  # fmt: skip
                    sum_dy[c], sum_dy_xhat[c] = a, times(b, rstd[c])
            if write and o0 < o1 and i0 < i1:
                if fresh:
                    load_slopes(terms, c0, c1, mean, rstd, sum_dy, sum_dy_xhat, count, has_counts, samples, constant)
                _gradient_rows(
                    dy, x, dx, dresidual, where, active, has_where, relu, has_active, give_dresidual, past,
                    o0, o1, c0, c1, i0, i1, group * x.strides[1] * goes, group * dy.strides[1] * goes, terms,
                )  # fmt: skip
            finish(counters, WRITING)
            task = take(counters, team, me, WRITING, tasks, measure and not fused)
        wait_until_done(counters, WRITING, tasks)


@kernel
def backward(arguments, board, team):
    """`_backward_tasks` with these arguments, on a team of threads."""
    if together(_backward_tasks, arguments + (start(team), team), board, team):  # noqa: RUF005  Numba knows no *
        raise MemoryError
