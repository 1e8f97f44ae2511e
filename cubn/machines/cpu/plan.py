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
"""Bytes of x worth another thread: some 15 us of work.  One that listens comes within one, one that sleeps in fifty."""

TERMS = 1 << 12
"""Channels whose terms (20 or 28 bytes each) a thread holds at once."""

ROW = 1 << 12
"""Bytes of a row that a task should cover, so that threads rarely write to the same lines of memory."""

LINE = 64
"""Bytes of a line of the cache.  A vector of a 16-bit type is half of one, and halves past the cache take six times
as long as plain stores."""

BYPASS = 1 << 21
"""Bytes of a result from which it is written past the cache.

From 2 MB on a thread of a server with 2 MB of second-level cache wrote 18 GB/s so, and 14 GB/s through the cache; in
`benchmarks/results/` that is what makes inference of 25 MB twice as fast as a copy.
"""


@dataclass(frozen=True)
class Planes:
    """Tasks of `cubn.machines.cpu.planes`: `group` channels, or one of the pieces of one group.

    `fits_twice` says that the cache holds two groups, so that the next can be fetched while one is written.
    """

    group: int
    outer_pieces: int
    inner_pieces: int
    fits_twice: bool
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
def plan_planes(outer: int, channels: int, inner: int, itemsize: int, measure: bool) -> Planes:
    """Whole channels as tasks, unless they are few and large, or in any order, if nothing is to be measured."""
    slab = outer * inner * itemsize
    total = slab * channels
    worthwhile = max(1, total // TASK)
    past = total >= BYPASS and LANES * itemsize >= LINE
    if not measure and channels <= TERMS:
        # In the order of memory: pieces of the first axis with all of their channels, or what else there is to cut.
        wanted = min(64, -(-total // TASK))
        outer_pieces = min(outer, wanted)
        groups = min(channels, -(-wanted // outer_pieces))
        inner_pieces = max(1, min(-(-wanted // (outer_pieces * groups)), inner // 1024))
        group = -(-channels // groups)
        tasks = -(-channels // group) * outer_pieces * inner_pieces
        return Planes(group, outer_pieces, inner_pieces, False, past, min(worthwhile, tasks))
    if channels < 16 and slab > CACHE:
        wanted = min(64, -(-total // (2 * TASK)), -(-slab // TASK))
        wanted = -(-wanted // channels)
        outer_pieces = min(outer, wanted)
        inner_pieces = max(1, min(-(-wanted // outer_pieces), inner // 1024))
        pieces = outer_pieces * inner_pieces
        if pieces > 1:
            return Planes(1, outer_pieces, inner_pieces, False, past, min(worthwhile, channels * pieces))
    group = max(1, min(channels // 8, max(TASK // 4 // max(slab, 1), ROW // (inner * itemsize))))
    return Planes(group, 1, 1, 2 * group * slab <= CACHE, past, min(worthwhile, -(-channels // group)))


@lru_cache(maxsize=4096)
def plan_columns(rows: int, columns: int, itemsize: int, close: bool, bits: bool, mask: bool, measure: bool) -> Columns:
    """Ranges of columns where the rows of one fit the cache, blocks of rows elsewhere.

    `close` says that rows lie one after the other in all arrays, `bits` that ReLU's choices are kept or used.
    """
    total = rows * columns * itemsize
    worthwhile = max(1, total // TASK)
    past = total >= BYPASS and LANES * itemsize >= LINE
    if total <= TASK:
        return Columns(1, 1, 1, 1, past, 1)
    width = min(1024, CACHE // (rows * itemsize) // 64 * 64)
    if measure and width >= 512 and -(-columns // width) >= 4:
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
