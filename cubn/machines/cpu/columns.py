"""Kernels for memory in columns: the channels of one sample are neighbours, as in (N, D) or channels-last.

A row holds one sample of every channel, so sums are kept for sixteen columns at a time while a strip of
rows goes by.  There are two walks:

* over *ranges* of columns, where there are few rows: a range is read for its sums and then again, from the
  cache, for its result, as a channel is in `planes`;
* over *blocks* of rows otherwise: all blocks are read for their moments, these are merged in order, and then
  the blocks are visited backwards, because the cache holds what was read last.

Rows that are no multiple of sixteen wide are taken several at a time (`fold`), if they lie close together, so
that no lane idles: the columns of such a wide row are merged into channels afterwards.  `inner` above one
(small planes, as in (N, C, 4)) is no different: a channel is then several neighbouring columns.

Arrays are (outer, channels, inner), contiguous in the last two axes; a row is one index of the first.  How the work
is cut depends on the problem alone.
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
from cubn.machines.cpu.planes import head_length, times, unite
from cubn.machines.cpu.sharing import MEASURING, MERGING, WRITING, finish, join, start, take, together, wait_until_done
from cubn.machines.cpu.simd import (
    LANES,
    apart,
    first,
    fma,
    load,
    load_mask,
    load_own,
    load_some,
    load_some_own,
    ones_of,
    own,
    pack,
    passes_relu,
    positive,
    root,
    select,
    splat,
    store,
    store_some,
    stream,
    unpack,
    widen,
)

WORD = 8
"""Bytes of a number in the tables of sums, which are float64."""

PANEL = 2048
"""Columns after which a walk over rows begins anew, so that what it needs of each column stays near."""

AT_ONCE = 8
"""Rows written at the same time: they share the terms of their columns, and memory takes as many straight walks."""


@njit
def _rows(x, fold):
    """Complete rows of `fold` samples, the columns in each, and those in the row that is left over."""
    columns = x.shape[1] * x.shape[2]
    return x.shape[0] // fold, columns * fold, x.shape[0] % fold * columns


@njit
def _strip(columns, itemsize):
    """Rows per strip: enough to pay for fetching the sums, few enough for the memory to see a straight walk."""
    return max(8, min(64, 8192 // (columns * itemsize)))


@njit
def _share(extent, parts, k):
    share = (extent + parts - 1) // parts
    return min(extent, k * share), min(extent, (k + 1) * share)


# --- moments --------------------------------------------------------------------------------------------


@njit
def _find_pivots(x, where, r0, r1, j0, j1, pivot):
    """For every column the first sample that the mask admits."""
    apart()
    for j in range(j0, j1, LANES):
        inside = first(j1 - j)
        found = splat(0.0)
        for r in range(r1 - 1, r0 - 1, -1):
            mask = load_mask(where, r * where.strides[0] + j * where.strides[1], where.strides[1], inside)
            found = select(mask, load_some(x, r * x.strides[0] + j * x.itemsize, mask), found)
        store(pivot, (j - j0) * WORD, found)


@njit
def _add_rows(x, where, has_where, pitch, r0, r1, start, j0, j1, tables):
    """Add up the distances from the pivot, and their squares, of these rows and columns."""
    apart()
    count, pivot, s, q = tables[0], tables[1], tables[2], tables[3]
    zero = splat(0.0)
    j = j0
    while j < j1:
        here = (j - start) * WORD
        inside = first(j1 - j)
        whole = j + LANES <= j1 and not has_where
        center = load(pivot, here)
        total, square = load(s, here), load(q, here)
        at = r0 * pitch + j * x.itemsize
        if whole:
            for _ in range(r0, r1):
                d = load(x, at) - center
                total = total + d
                square = fma(d, d, square)
                at += pitch
        else:
            seen = load(count, here)
            for r in range(r0, r1):
                mask = inside
                if has_where:
                    bit = r * where.strides[0] + j * where.strides[1]
                    mask = load_mask(where, bit, where.strides[1], inside)
                    seen = seen + ones_of(mask)
                d = select(mask, load_some(x, at, mask) - center, zero)
                total = total + d
                square = fma(d, d, square)
                at += pitch
            store(count, here, seen)
        store(s, here, total)
        store(q, here, square)
        j += LANES


@njit
def _column_moments(x, where, has_where, fold, r0, r1, j0, j1, tables):
    """Count, mean and sum of squared distances of every column of a block, into tables[0], [1] and [2].

    Distances are taken from the column's first sample, so that a constant column gives exact zeros.
    """
    apart()
    rows, width, rest = _rows(x, fold)
    pitch = x.strides[0] * fold
    j1 = min(j1, width)
    end = min(r1, rows)
    short = min(j1, rest) if r1 > rows else j0  # columns of the row left over, if it is in this block
    count, pivot, s, q = tables[0], tables[1], tables[2], tables[3]
    zero = splat(0.0)
    for j in range(j0, j1, LANES):
        here = (j - j0) * WORD
        inside = first((j1 if r0 < rows else short) - j)
        store(pivot, here, load_some(x, r0 * pitch + j * x.itemsize, inside))
        store(s, here, zero)
        store(q, here, zero)
        seen = splat(np.float64(max(0, end - r0)))
        if r1 > rows:
            seen = seen + ones_of(first(short - j))
        store(count, here, zero if has_where else seen)
    if has_where:
        _find_pivots(x, where, r0, r1, j0, j1, pivot)

    for j in range(j0, j1, PANEL):
        to = min(j1, j + PANEL)
        strip = _strip(to - j, x.itemsize)
        for r in range(r0, end, strip):
            _add_rows(x, where, has_where, pitch, r, min(end, r + strip), j0, j, to, tables)
        if short > j:
            _add_rows(x, where, has_where, pitch, rows, rows + 1, j0, j, min(to, short), tables)

    for j in range(j0, j1, LANES):
        here = (j - j0) * WORD
        n, total = load(count, here), load(s, here)
        any_here = positive(n)
        shift = select(any_here, total / n, zero)
        within = load(q, here) - total * shift
        store(pivot, here, load(pivot, here) + shift)
        store(s, here, select(passes_relu(within), within, zero))


@njit
def _unite(n, a, b, m, c, d):
    """Count, mean and m2 of unions, sixteen at a time; see `planes.unite`."""
    zero = splat(0.0)
    union = n + m
    known, more = positive(n), positive(m)
    share = select(more, m / union, zero)
    gap = c - a
    mean = select(known, a + gap * share, c)
    m2 = select(known, b + d + gap * gap * (n * share), d)
    return union, select(more, mean, a), select(more, m2, b)


@njit
def _fold_moments(tables, columns, inner, fold):
    """From moments of columns to moments of channels: first the samples of a wide row, then the inner axis."""
    apart()
    count, mean, m2 = tables[0], tables[1], tables[2]
    if fold > 1:
        for j in range(0, columns, LANES):
            here = j * WORD
            n, a, b = load(count, here), load(mean, here), load(m2, here)
            for k in range(1, fold):
                there = here + k * columns * WORD
                n, a, b = _unite(n, a, b, load(count, there), load(mean, there), load(m2, there))
            store(count, here, n)  # lanes past the last column spill into samples that were read already
            store(mean, here, a)
            store(m2, here, b)
    if inner > 1:
        for c in range(columns // inner):
            n, a, b = 0.0, 0.0, 0.0
            for j in range(c * inner, (c + 1) * inner):
                n, a, b = unite(n, a, b, count[j], mean[j], m2[j])
            count[c], mean[c], m2[c] = n, a, b


@njit
def _copy(tables, parts, numbers, channels):
    apart()
    for k in range(numbers):
        for c in range(channels):
            parts[k, c] = tables[k, c]


@njit
def _unite_blocks(partial, blocks, channels):
    """Moments of all blocks, in their order, into the place of the first."""
    apart()
    each, table = partial.strides[0], partial.strides[1]
    for c in range(0, channels, LANES):
        here = c * WORD
        n, a, b = load(partial, here), load(partial, here + table), load(partial, here + 2 * table)
        for k in range(1, blocks):
            at = here + k * each
            n, a, b = _unite(n, a, b, load(partial, at), load(partial, at + table), load(partial, at + 2 * table))
        store(partial, here, n)
        store(partial, here + table, a)
        store(partial, here + 2 * table, b)


@njit
def _publish_moments(tables, c0, c1, mean, m2, rstd, count, has_where, eps):
    """Moments of channels c0 to c1 from the tables into the results, and the reciprocal standard deviation."""
    apart()
    zero, one, more = splat(0.0), splat(1.0), splat(eps)
    for c in range(c0, c1, LANES):
        inside = first(c1 - c)
        here = (c - c0) * WORD
        b = load(tables[2], here)
        width = b / load(tables[0], here) + more
        store_some(mean, c * WORD, load(tables[1], here), inside)
        store_some(m2, c * WORD, b, inside)
        store_some(rstd, c * WORD, select(passes_relu(width), one / root(width), zero), inside)
    if has_where:
        for c in range(c0, c1):
            count[c] = tables[0, c - c0]


# --- the result -----------------------------------------------------------------------------------------


@njit
def _spread(terms, columns, inner, fold):
    """From channels to columns: repeat each term along the inner axis, then the row for every sample of it."""
    apart()
    for row in range(terms.shape[0] if inner * fold > 1 else 0):
        values = terms[row]
        if inner > 1:
            for c in range(columns // inner - 1, -1, -1):
                value = values[c]
                for j in range(c * inner, (c + 1) * inner):
                    values[j] = value
        for k in range(1, fold):
            for j in range(columns):
                values[k * columns + j] = values[j]


@njit
def _normalize_rows(
    x, y, residual, where, active, has_residual, has_where, relu, keep, past,
    fold, r0, r1, start, j0, j1, words, terms,
):  # fmt: skip
    """y = act(gamma * rstd * (x - mean) + beta + residual) for a strip of rows; the terms begin at column `start`."""
    apart()
    size, each = x.itemsize, terms.strides[0]
    pitch, pitch_y, pitch_r = x.strides[0] * fold, y.strides[0] * fold, residual.strides[0] * fold
    streams = past and pitch_y % (LANES * size) == 0
    head = head_length(y, r0 * pitch_y + j0 * size, j1 - j0) if streams else 0
    if keep and head:
        head, streams = 0, False  # the bits are in steps of sixteen columns
    zero = own(x, splat(0.0))
    j = j0
    while j < j1:
        n = head if j == j0 and head else min(LANES, j1 - j)
        here = (j - start) * terms.itemsize
        unit, center = load_own(terms, here), load_own(terms, here + CENTER * each)
        factor, fine = load_own(terms, here + FACTOR * each), load_own(terms, here + FINE * each)
        offset = load_own(terms, here + OFFSET * each)
        at, to, add = r0 * pitch + j * size, r0 * pitch_y + j * size, r0 * pitch_r + j * size
        if n == LANES and not has_where:
            for r in range(r0, r1):
                z = scaled(distance(load_own(x, at), unit, center), factor, fine, offset)
                if has_residual:
                    z = z + load_own(residual, add)
                if relu:
                    lets = passes_relu(z)
                    z = select(lets, z, zero)
                    if keep:
                        pack(active, 2 * (r * words + j // LANES), lets)
                if streams:
                    stream(y, to, z)
                else:
                    store(y, to, z)
                at += pitch
                to += pitch_y
                add += pitch_r
        else:
            inside = first(n)
            for r in range(r0, r1):
                z = scaled(distance(load_some_own(x, at, inside), unit, center), factor, fine, offset)
                if has_residual:
                    z = z + load_some_own(residual, add, inside)
                if relu:
                    lets = passes_relu(z)
                    z = select(lets, z, zero)
                    if keep:
                        pack(active, 2 * (r * words + j // LANES), lets)
                if has_where:
                    bit = r * where.strides[0] + j * where.strides[1]
                    z = select(load_mask(where, bit, where.strides[1], inside), z, zero)
                store_some(y, to, z, inside)
                at += pitch
                to += pitch_y
                add += pitch_r
        j += n


@njit
def _normalize_block(
    x, y, residual, where, active, has_residual, has_where, relu, keep, past, fold, r0, r1, j0, j1, terms
):
    """A few rows at a time, with the row that is left over at the end."""
    apart()
    rows, width, rest = _rows(x, fold)
    words = (width + LANES - 1) // LANES
    for j in range(j0, j1, PANEL):
        end = min(j1, j + PANEL)
        for r in range(r0, min(r1, rows), AT_ONCE):
            _normalize_rows(
                x, y, residual, where, active, has_residual, has_where, relu, keep, past,
                fold, r, min(r1, rows, r + AT_ONCE), j0, j, end, words, terms,
            )  # fmt: skip
        if r1 > rows and rest > j:
            _normalize_rows(
                x, y, residual, where, active, has_residual, has_where, relu, keep, past,
                fold, rows, rows + 1, j0, j, min(end, rest), words, terms,
            )  # fmt: skip


@njit(error_model="numpy")
def _forward_tasks(
    x, y, residual, where, active, gamma, beta, mean, m2, rstd, count, partial, eps,
    has_residual, has_where, has_gamma, has_beta, relu, keep, measure, write, past,
    ranges, blocks, fold, spread, counters, team,
):  # fmt: skip
    """Moments (`measure`), the normalised result (`write`), or both.

    With one block of rows, a task is one of the `ranges` of columns; else it is one of the `blocks`, with
    rows of `fold` samples when measuring and of `spread` when writing.  `mean` and `rstd` are results when
    measuring and given otherwise; `count` is written to under a mask only.
    """
    rows, channels, inner = x.shape
    columns = channels * inner
    me = join(counters)
    first_one, single = np.int64(0), np.int64(1)  # as literals they would have functions compiled for themselves

    if blocks == 1:
        unit = LANES * inner
        each = ((columns + ranges - 1) // ranges + unit - 1) // unit * unit
        tables = np.empty((4, padded(each)))
        terms = np.empty((AFFINE_TERMS, padded(each)), gamma.dtype)
        task = take(counters, team, me, WRITING, ranges, False)
        while task < ranges:
            j0, j1 = min(columns, task * each), min(columns, (task + 1) * each)
            c0, c1 = j0 // inner, j1 // inner
            if measure and c0 < c1:
                _column_moments(x, where, has_where, single, first_one, rows, j0, j1, tables)
                _fold_moments(tables, j1 - j0, inner, single)
                _publish_moments(tables, c0, c1, mean, m2, rstd, count, has_where, eps)
            if write and c0 < c1:
                load_affine(terms, c0, c1, mean, rstd, gamma, beta, has_gamma, has_beta)
                _spread(terms, j1 - j0, inner, single)
                _normalize_block(
                    x, y, residual, where, active, has_residual, has_where, relu, keep, past,
                    single, first_one, rows, j0, j1, terms,
                )  # fmt: skip
            finish(counters, WRITING)
            task = take(counters, team, me, WRITING, ranges, False)
        wait_until_done(counters, WRITING, ranges)
        return

    if measure:
        rows, width, rest = _rows(x, fold)
        rows += rest > 0
        tables = np.empty((4, padded(width)))
        task = take(counters, team, me, MEASURING, blocks, False)
        while task < blocks:
            r0, r1 = _share(rows, blocks, task)
            if r0 < r1:
                _column_moments(x, where, has_where, fold, r0, r1, first_one, width, tables)
                _fold_moments(tables, columns, inner, fold)
                _copy(tables, partial[task], 3, channels)
            else:
                partial[task, 0] = 0.0
            finish(counters, MEASURING)
            task = take(counters, team, me, MEASURING, blocks, False)
        wait_until_done(counters, MEASURING, blocks)
        if take(counters, team, me, MERGING, 1, False) == 0:
            _unite_blocks(partial, blocks, channels)
            _publish_moments(partial[0], first_one, channels, mean, m2, rstd, count, has_where, eps)
            finish(counters, MERGING)
        wait_until_done(counters, MERGING, 1)

    if write:
        rows, width, rest = _rows(x, spread)
        rows += rest > 0
        terms = np.empty((AFFINE_TERMS, padded(width)), gamma.dtype)
        loaded = False
        task = take(counters, team, me, WRITING, blocks, measure)
        while task < blocks:
            if not loaded:
                load_affine(terms, first_one, channels, mean, rstd, gamma, beta, has_gamma, has_beta)
                _spread(terms, columns, inner, spread)
                loaded = True
            r0, r1 = _share(rows, blocks, task)
            if r0 < r1:
                _normalize_block(
                    x, y, residual, where, active, has_residual, has_where, relu, keep, past,
                    spread, r0, r1, first_one, width, terms,
                )  # fmt: skip
            finish(counters, WRITING)
            task = take(counters, team, me, WRITING, blocks, measure)
        wait_until_done(counters, WRITING, blocks)


@kernel
def forward(arguments, board, team):
    """`_forward_tasks` with these arguments, on a team of threads."""
    if together(_forward_tasks, arguments + (start(team), team), board, team):  # noqa: RUF005  Numba knows no *
        raise MemoryError


# --- gradients ------------------------------------------------------------------------------------------


@njit
def _add_gradient_rows(
    dy, x, where, active, has_where, relu, has_active, fold, r0, r1, start, j0, j1, words, tables, terms
):
    """Add dz to tables[1] and dz * (x - mean) to tables[2], for a strip of rows; tables[0] holds the means."""
    apart()
    size, each = x.itemsize, terms.strides[0]
    pitch, pitch_d = x.strides[0] * fold, dy.strides[0] * fold
    zero = splat(0.0)
    j = j0
    while j < j1:
        here, of_terms = (j - start) * WORD, (j - start) * terms.itemsize
        inside = first(j1 - j)
        whole = j + LANES <= j1 and not has_where
        middle, s, q = load(tables[0], here), load(tables[1], here), load(tables[2], here)
        unit, center = load_own(terms, of_terms), load_own(terms, of_terms + CENTER * each)
        factor, fine = load_own(terms, of_terms + FACTOR * each), load_own(terms, of_terms + FINE * each)
        offset = load_own(terms, of_terms + OFFSET * each)
        at, of = r0 * pitch + j * size, r0 * pitch_d + j * size
        for r in range(r0, r1):
            if whole:
                dz = load(dy, of)
                value = load_own(x, at)
                d = widen(value) - middle
            else:
                mask = inside
                if has_where:
                    bit = r * where.strides[0] + j * where.strides[1]
                    mask = load_mask(where, bit, where.strides[1], inside)
                dz = load_some(dy, of, mask)
                value = load_some_own(x, at, mask)
                d = select(mask, widen(value) - middle, zero)
            if relu:
                if has_active:
                    dz = select(unpack(active, 2 * (r * words + j // LANES)), dz, zero)
                else:
                    dz = select(passes_relu(scaled(distance(value, unit, center), factor, fine, offset)), dz, zero)
            s = s + dz
            q = fma(dz, d, q)
            at += pitch
            of += pitch_d
        store(tables[1], here, s)
        store(tables[2], here, q)
        j += LANES


@njit
def _column_sums(dy, x, where, active, has_where, relu, has_active, fold, r0, r1, j0, j1, tables, terms):
    """Sums of dz and dz * (x - mean) for every column of a block, into tables[1] and tables[2]."""
    apart()
    rows, width, rest = _rows(x, fold)
    words = (width + LANES - 1) // LANES
    zero = splat(0.0)
    for j in range(0, j1 - j0, LANES):
        store(tables[1], j * WORD, zero)
        store(tables[2], j * WORD, zero)
    for j in range(j0, j1, PANEL):
        end = min(j1, j + PANEL)
        strip = _strip(end - j, x.itemsize)
        for r in range(r0, min(r1, rows), strip):
            _add_gradient_rows(
                dy, x, where, active, has_where, relu, has_active,
                fold, r, min(r1, rows, r + strip), j0, j, end, words, tables, terms,
            )  # fmt: skip
        if r1 > rows and rest > j:
            _add_gradient_rows(
                dy, x, where, active, has_where, relu, has_active,
                fold, rows, rows + 1, j0, j, min(end, rest), words, tables, terms,
            )  # fmt: skip


@njit
def _fold_sums(sums, columns, inner, fold):
    """From sums of columns to sums of channels."""
    apart()
    for j in range(0, columns, LANES):
        s = load(sums, j * WORD)
        for k in range(1, fold):
            s = s + load(sums, (j + k * columns) * WORD)
        store(sums, j * WORD, s)
    if inner > 1:
        for c in range(columns // inner):
            a = 0.0
            for j in range(c * inner, (c + 1) * inner):
                a += sums[j]
            sums[c] = a


@njit
def _load_means(values, mean, c0, c1, inner, fold):
    """The mean of every column."""
    apart()
    for c in range(c0, c1):
        values[0, c - c0] = mean[c]
    _spread(values[:1], (c1 - c0) * inner, inner, fold)


@njit
def _gradient_rows(
    dy, x, dx, dresidual, where, active, has_where, relu, has_active, give_dresidual, past,
    fold, r0, r1, start, j0, j1, words, terms,
):  # fmt: skip
    """The gradient of x for a strip of rows, and dz where asked for; the terms begin at column `start`."""
    apart()
    size, each = x.itemsize, terms.strides[0]
    pitch, pitch_d, pitch_to = x.strides[0] * fold, dy.strides[0] * fold, dx.strides[0] * fold
    pitch_also = dresidual.strides[0] * fold
    streams = past and pitch_to % (LANES * size) == 0
    head = head_length(dx, r0 * pitch_to + j0 * size, j1 - j0) if streams else 0
    if has_active and head:
        head, streams = 0, False
    zero = own(x, splat(0.0))
    j = j0
    while j < j1:
        n = head if j == j0 and head else min(LANES, j1 - j)
        here = (j - start) * terms.itemsize
        unit, center = load_own(terms, here), load_own(terms, here + CENTER * each)
        factor, fine = load_own(terms, here + FACTOR * each), load_own(terms, here + FINE * each)
        offset = load_own(terms, here + OFFSET * each)
        level, tilt = load_own(terms, here + LEVEL * each), load_own(terms, here + TILT * each)
        at, of = r0 * pitch + j * size, r0 * pitch_d + j * size
        to, also = r0 * pitch_to + j * size, r0 * pitch_also + j * size
        if n == LANES and not has_where:
            for r in range(r0, r1):
                dz = load_own(dy, of)
                d = distance(load_own(x, at), unit, center)
                if relu:
                    if has_active:
                        dz = select(unpack(active, 2 * (r * words + j // LANES)), dz, zero)
                    else:
                        dz = select(passes_relu(scaled(d, factor, fine, offset)), dz, zero)
                result = fma(d, tilt, dz + level) * factor * unit
                if give_dresidual:
                    store(dresidual, also, dz)
                if streams:
                    stream(dx, to, result)
                else:
                    store(dx, to, result)
                at += pitch
                of += pitch_d
                to += pitch_to
                also += pitch_also
        else:
            inside = first(n)
            for r in range(r0, r1):
                mask = inside
                if has_where:
                    bit = r * where.strides[0] + j * where.strides[1]
                    mask = load_mask(where, bit, where.strides[1], inside)
                dz = load_some_own(dy, of, mask)
                d = distance(load_some_own(x, at, mask), unit, center)
                if relu:
                    if has_active:
                        dz = select(unpack(active, 2 * (r * words + j // LANES)), dz, zero)
                    else:
                        dz = select(passes_relu(scaled(d, factor, fine, offset)), dz, zero)
                result = fma(d, tilt, dz + level) * factor * unit
                if give_dresidual:
                    store_some(dresidual, also, dz, inside)
                store_some(dx, to, select(mask, result, zero), inside)
                at += pitch
                of += pitch_d
                to += pitch_to
                also += pitch_also
        j += n


@njit
def _gradient_block(
    dy, x, dx, dresidual, where, active, has_where, relu, has_active, give_dresidual, past,
    fold, r0, r1, j0, j1, terms,
):  # fmt: skip
    """As `_normalize_block`."""
    apart()
    rows, width, rest = _rows(x, fold)
    words = (width + LANES - 1) // LANES
    for j in range(j0, j1, PANEL):
        end = min(j1, j + PANEL)
        for r in range(r0, min(r1, rows), AT_ONCE):
            _gradient_rows(
                dy, x, dx, dresidual, where, active, has_where, relu, has_active, give_dresidual, past,
                fold, r, min(r1, rows, r + AT_ONCE), j0, j, end, words, terms,
            )  # fmt: skip
        if r1 > rows and rest > j:
            _gradient_rows(
                dy, x, dx, dresidual, where, active, has_where, relu, has_active, give_dresidual, past,
                fold, rows, rows + 1, j0, j, min(end, rest), words, terms,
            )  # fmt: skip


@njit(error_model="numpy")
def _backward_tasks(
    dy, x, dx, dresidual, where, active, gamma, beta, mean, rstd, sum_dy, sum_dy_xhat, count, partial,
    samples, has_where, has_gamma, has_beta, has_counts, relu, has_active, give_dresidual, constant,
    measure, write, past, ranges, blocks, fold, spread, counters, team,
):  # fmt: skip
    """The two sums (`measure`), the gradient of the input (`write`), or both.

    Tasks are those of `forward`.  `sum_dy` and `sum_dy_xhat` are results when measuring and given otherwise;
    `constant` statistics pass no gradient on.
    """
    rows, channels, inner = x.shape
    columns = channels * inner
    me = join(counters)
    first_one, single = np.int64(0), np.int64(1)  # as literals they would have functions compiled for themselves

    if blocks == 1:
        unit = LANES * inner
        each = ((columns + ranges - 1) // ranges + unit - 1) // unit * unit
        tables = np.empty((3, padded(each)))
        terms = np.empty((GRADIENT_TERMS, padded(each)), gamma.dtype)
        task = take(counters, team, me, WRITING, ranges, False)
        while task < ranges:
            j0, j1 = min(columns, task * each), min(columns, (task + 1) * each)
            c0, c1 = j0 // inner, j1 // inner
            if measure and c0 < c1:
                load_affine(terms, c0, c1, mean, rstd, gamma, beta, has_gamma, has_beta)
                _spread(terms, j1 - j0, inner, single)
                _load_means(tables, mean, c0, c1, inner, single)
                _column_sums(
                    dy, x, where, active, has_where, relu, has_active, single, first_one, rows, j0, j1, tables, terms
                )
                _fold_sums(tables[1], j1 - j0, inner, single)
                _fold_sums(tables[2], j1 - j0, inner, single)
                for c in range(c0, c1):
                    sum_dy[c], sum_dy_xhat[c] = tables[1, c - c0], times(tables[2, c - c0], rstd[c])
            if write and c0 < c1:
                load_affine(terms, c0, c1, mean, rstd, gamma, beta, has_gamma, has_beta)
                load_slopes(terms, c0, c1, mean, rstd, sum_dy, sum_dy_xhat, count, has_counts, samples, constant)
                _spread(terms, j1 - j0, inner, single)
                _gradient_block(
                    dy, x, dx, dresidual, where, active, has_where, relu, has_active, give_dresidual, past,
                    single, first_one, rows, j0, j1, terms,
                )  # fmt: skip
            finish(counters, WRITING)
            task = take(counters, team, me, WRITING, ranges, False)
        wait_until_done(counters, WRITING, ranges)
        return

    if measure:
        rows, width, rest = _rows(x, fold)
        rows += rest > 0
        tables = np.empty((3, padded(width)))
        terms = np.empty((AFFINE_TERMS, padded(width)), gamma.dtype)
        loaded = False
        task = take(counters, team, me, MEASURING, blocks, False)
        while task < blocks:
            if not loaded:
                load_affine(terms, first_one, channels, mean, rstd, gamma, beta, has_gamma, has_beta)
                _spread(terms, columns, inner, fold)
                _load_means(tables, mean, first_one, channels, inner, fold)
                loaded = True
            r0, r1 = _share(rows, blocks, task)
            if r0 < r1:
                _column_sums(
                    dy, x, where, active, has_where, relu, has_active, fold, r0, r1, first_one, width, tables, terms
                )
                _fold_sums(tables[1], columns, inner, fold)
                _fold_sums(tables[2], columns, inner, fold)
                _copy(tables[1:], partial[task], 2, channels)
            else:
                partial[task, 0] = 0.0
                partial[task, 1] = 0.0
            finish(counters, MEASURING)
            task = take(counters, team, me, MEASURING, blocks, False)
        wait_until_done(counters, MEASURING, blocks)
        if take(counters, team, me, MERGING, 1, False) == 0:
            for c in range(channels):
                a, b = 0.0, 0.0
                for k in range(blocks):
                    a += partial[k, 0, c]
                    b += partial[k, 1, c]
                sum_dy[c], sum_dy_xhat[c] = a, times(b, rstd[c])
            finish(counters, MERGING)
        wait_until_done(counters, MERGING, 1)

    if write:
        rows, width, rest = _rows(x, spread)
        rows += rest > 0
        terms = np.empty((GRADIENT_TERMS, padded(width)), gamma.dtype)
        loaded = False
        task = take(counters, team, me, WRITING, blocks, measure)
        while task < blocks:
            if not loaded:
                load_affine(terms, first_one, channels, mean, rstd, gamma, beta, has_gamma, has_beta)
                load_slopes(
                    terms, first_one, channels, mean, rstd, sum_dy, sum_dy_xhat, count, has_counts, samples, constant
                )
                _spread(terms, columns, inner, spread)
                loaded = True
            r0, r1 = _share(rows, blocks, task)
            if r0 < r1:
                _gradient_block(
                    dy, x, dx, dresidual, where, active, has_where, relu, has_active, give_dresidual, past,
                    spread, r0, r1, first_one, width, terms,
                )  # fmt: skip
            finish(counters, WRITING)
            task = take(counters, team, me, WRITING, blocks, measure)
        wait_until_done(counters, WRITING, blocks)


@kernel
def backward(arguments, board, team):
    """`_backward_tasks` with these arguments, on a team of threads."""
    if together(_backward_tasks, arguments + (start(team), team), board, team):  # noqa: RUF005  Numba knows no *
        raise MemoryError
