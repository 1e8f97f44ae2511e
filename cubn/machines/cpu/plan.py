"""How a call is cut into tasks: a frozen value, computed from shapes and strides alone.

Never from the number of threads, or results would depend on it.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import gcd

from cubn.machines.cpu.simd import LANES

CACHE = 1 << 20
"""Bytes of x that a core is trusted to keep between two reads: half the second-level cache of a server."""

TASK = 1 << 18
"""Bytes of x worth waking up another thread for: some 20 us of work, which is what waking up takes."""

ROW = 1 << 12
"""Bytes of a row that a task should cover, so that threads rarely write to the same lines of memory."""

BYPASS = 1 << 24
"""Bytes of a result from which it is written past the cache."""


@dataclass(frozen=True)
class Planes:
    """Tasks of `cubn.machines.cpu.planes`: `group` channels, or one of the pieces of one channel."""

    group: int
    outer_pieces: int
    inner_pieces: int
    past: bool
    tasks: int


@dataclass(frozen=True)
class Columns:
    """Tasks of `cubn.machines.cpu.columns`: ranges of columns, or blocks of rows."""

    ranges: int
    blocks: int
    fold: int
    spread: int
    past: bool
    tasks: int


@lru_cache(maxsize=4096)
def plan_planes(outer: int, channels: int, inner: int, itemsize: int) -> Planes:
    """Whole channels as tasks, unless they are few and large."""
    slab = outer * inner * itemsize
    total = slab * channels
    worthwhile = max(1, total // TASK)
    past = total >= BYPASS
    if channels < 16 and slab > CACHE:
        wanted = min(64, -(-total // (2 * TASK)), -(-slab // TASK))
        wanted = -(-wanted // channels)
        outer_pieces = min(outer, wanted)
        inner_pieces = max(1, min(-(-wanted // outer_pieces), inner // 1024))
        pieces = outer_pieces * inner_pieces
        if pieces > 1:
            return Planes(1, outer_pieces, inner_pieces, past, min(worthwhile, channels * pieces))
    group = max(1, min(channels // 8, max(TASK // 4 // max(slab, 1), ROW // (inner * itemsize))))
    return Planes(group, 1, 1, past, min(worthwhile, -(-channels // group)))


@lru_cache(maxsize=4096)
def plan_columns(rows: int, columns: int, itemsize: int, close: bool, bits: bool, mask: bool) -> Columns:
    """Ranges of columns where the rows of one fit the cache, blocks of rows elsewhere.

    `close` says that rows lie one after the other in all arrays, `bits` that ReLU's choices are kept or used.
    """
    total = rows * columns * itemsize
    worthwhile = max(1, total // TASK)
    past = total >= BYPASS
    if total <= TASK:
        return Columns(1, 1, 1, 1, past, 1)
    width = min(1024, CACHE // (rows * itemsize) // 64 * 64)
    if width and -(-columns // width) >= 4:
        ranges = -(-columns // width)
        return Columns(ranges, 1, 1, 1, past, min(worthwhile, ranges))

    # A block leaves three float64 per channel behind: at most 0.33 % of x, if it has this many rows.
    blocks = min(128, -(-total // (2 * TASK)), max(4, rows * itemsize // 7200))
    fold, spread = 1, 1
    repeat = LANES // gcd(columns, LANES)
    if close and not mask and repeat * columns <= 1024 and rows >= 64 * repeat and not (bits and repeat > 1):
        fold = repeat
        spread = repeat * max(1, min(512 // (repeat * columns), rows // (64 * repeat)))
    return Columns(1, blocks, fold, spread, past, min(worthwhile, blocks))
