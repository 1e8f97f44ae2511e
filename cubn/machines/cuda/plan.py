"""Launch plans: how many threads do what, decided in plain Python from a problem and the limits of a device.

A plan is a frozen value: it compares with `==`, prints as one line, and needs no GPU.  `launch` decides nothing.

    Memory       how the tensors of a call lie in memory, as far as it matters to a kernel
    Tiles        how one tensor is shared out among blocks and threads; the numbers that every kernel is passed
    LaunchPlan   one kernel: its text's constants, its grid, its tiles
"""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache
from math import gcd

from cubn.problem import Problem

X_TYPES = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}
"""Element type of x -> X_TYPE of scalar.cuh.  The only such table."""

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

KERNELS = {
    "moments": ("x x_stride where eps", "mean m2 rstd count"),
    "normalize": ("x x_stride residual residual_stride where mean rstd gamma beta", "y y_stride active"),
    "gradient_sums": ("dy dy_stride x x_stride where active mean rstd gamma beta", "sum_dy sum_dy_xhat"),
    "input_gradient": (
        "dy dy_stride x x_stride where active mean rstd gamma beta sum_dy sum_dy_xhat counts count",
        "dx dx_stride dresidual dresidual_stride",
    ),
}  # fmt: skip
"""Verb -> what its kernel takes before the sizes (and the workspace) and after them.  The only such table."""

MERGING = {"moments": 24, "gradient_sums": 16}
"""Kernels that merge what threads and blocks have found, and the bytes of one such set."""

WARP = 32
VECTOR_BYTES = 16  # the widest load and store of one thread
LONG_RUN_BYTES = 256  # from here on, a warp that reads one run keeps almost all bandwidth (98 % on H100, QuACK's notes)
RAGGED_RUN_BYTES = 2048  # from here on, the half-empty windows at both ends of a run are below 2 %
TILE_BYTES = 256  # what neighbouring threads read of one matrix row
SETS_PER_BLOCK = 1024  # 24 KB of shared memory at most: two blocks on the smallest processor
BLOCKS_PER_PROCESSOR = 8
LARGEST_PART = 2**30  # windows or rows of a tile: what a thread counts in 32 bits


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """What a plan must know of a device.

    Attributes
    ----------
    name : str
        For people.
    arch : int
        Compute capability times ten: 90 is sm_90.
    processors : int
        Streaming multiprocessors.
    threads_per_block, grid : int
        The most threads of a block and blocks of a grid.
    shared_per_block : int
        Bytes of shared memory that a block may have without asking for more.
    in_flight : int
        Windows that a thread loads before it uses the first.
    """

    name: str
    arch: int
    processors: int
    threads_per_block: int = 1024
    grid: int = 2**31 - 1
    shared_per_block: int = 48 * 1024
    in_flight: int = 4

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.arch}, {self.processors} processors)"


DEVICES = {
    device.name: device
    for device in (
        DeviceLimits("v100", 70, 80),
        DeviceLimits("t4", 75, 40),
        DeviceLimits("a100", 80, 108),
        DeviceLimits("rtx3090", 86, 82),
        DeviceLimits("l4", 89, 58),
        DeviceLimits("rtx4090", 89, 128),
        DeviceLimits("h100", 90, 132),  # SXM
        DeviceLimits("h200", 90, 132),
        DeviceLimits("b200", 100, 148),
        DeviceLimits("rtx5090", 120, 170),
    )
}
"""Devices to plan for where none is at hand.  Processors as published by NVIDIA or others; of a device that is at
hand, `launch` asks the driver."""


@dataclass(frozen=True, slots=True)
class Memory:
    """How all tensors of one call lie in memory, taken together; a vector is 16 bytes.

    Attributes
    ----------
    phase : int or None
        Elements from the last vector boundary to the first element; None if the tensors differ in it.
    step : int or None
        The same of the distance from row to row.
    dense : bool
        True if no tensor has a gap between its rows.
    """

    phase: int | None = 0
    step: int | None = 0
    dense: bool = True

    @classmethod
    def of(cls, tensors: Iterable[tuple[int, int]], row_length: int, itemsize: int) -> "Memory":
        """From (address in bytes, row stride in elements) of each tensor."""
        vector = VECTOR_BYTES // itemsize
        tensors = list(tensors)
        phases = {address // itemsize % vector for address, _ in tensors}
        steps = {stride % vector for _, stride in tensors}
        return cls(
            phases.pop() if len(phases) == 1 else None,
            steps.pop() if len(steps) == 1 else None,
            all(stride == row_length for _, stride in tensors),
        )


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a tensor is cut, in the words of kernels/tiles.cuh.

    Attributes
    ----------
    column : bool
        The column map rather than the plane map.
    vector : int
        Elements of a window.
    ragged : bool
        True if a window may reach over the end of its row.
    rows, channels, inner, windows, tail, part, groups, splits, width, fold : int
        As in `struct Tiles` of kernels/tiles.cuh, in the order in which every kernel takes them.
    """

    column: bool
    vector: int
    ragged: bool
    rows: int
    channels: int
    inner: int
    windows: int
    tail: int
    part: int
    groups: int
    splits: int
    width: int
    fold: int

    @property
    def count(self) -> int:
        """Tiles in all."""
        return self.groups * self.splits

    @property
    def lanes(self) -> int:
        """Channels that a thread sums at a time."""
        return self.vector if self.column else 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """The numbers that every kernel takes, in its order."""
        return tuple(getattr(self, field.name) for field in fields(self)[3:])

    def __str__(self) -> str:
        ragged = ", ragged" if self.ragged else ""
        if self.column:
            extent = f"{self.part} rows of {self.width} x {self.vector}"
            return f"column map, {self.groups} x {self.splits} tiles of {extent}{ragged}"
        return f"plane map, {self.groups} x {self.splits} tiles of {self.part} x {self.vector}{ragged}"


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """One kernel, compiled with `constants`, over `grid` blocks of `block` threads.

    Attributes
    ----------
    kernel : str
        Name of the verb, of its file and of its entry point.
    grid, block : int
        Blocks, and threads of a block.
    constants : tuple of (str, int)
        Macros of the text.
    tiles : Tiles
        What is shared out.
    partials, arrivals : int
        Workspace: sets that blocks leave to the last of them, and counters of those that are done.
    """

    kernel: str
    grid: int
    block: int
    constants: tuple[tuple[str, int], ...]
    tiles: Tiles
    partials: int = 0
    arrivals: int = 0

    @property
    def shared_bytes(self) -> int:
        """Static shared memory: the sets of all threads, and a flag."""
        merging = MERGING.get(self.kernel)
        return merging * self.block * self.tiles.lanes + 16 if merging else 0

    @property
    def partial_bytes(self) -> int:
        """Bytes of all partials."""
        return self.partials * MERGING.get(self.kernel, 0)

    def __str__(self) -> str:
        constants = " ".join(f"{name}={value}" for name, value in self.constants)
        return f"{self.kernel}<<<{self.grid}, {self.block}>>> {constants} | {self.tiles}"


def moments_plan(problem: Problem, limits: DeviceLimits, memory: Memory, *, where: bool = False) -> LaunchPlan:
    """Count, mean and m2 of each channel."""
    return _plan("moments", problem, limits, memory, WHERE=where)


def normalize_plan(
    problem: Problem, limits: DeviceLimits, memory: Memory, *, residual: bool = False, where: bool = False
) -> LaunchPlan:
    """y from x and the statistics."""
    return _plan("normalize", problem, limits, memory, ADD=residual, RELU=_relu(problem), WHERE=where)


def gradient_sums_plan(
    problem: Problem, limits: DeviceLimits, memory: Memory, *, where: bool = False, active: bool = False
) -> LaunchPlan:
    """The sums of dz and of dz * xhat over each channel."""
    kept = active and _relu(problem)
    return _plan("gradient_sums", problem, limits, memory, WHERE=where, RELU=_relu(problem), KEPT=kept)


def input_gradient_plan(
    problem: Problem,
    limits: DeviceLimits,
    memory: Memory,
    *,
    train: bool = True,
    where: bool = False,
    active: bool = False,
    residual: bool = False,
) -> LaunchPlan:
    """dx, and dz where `residual` asks for it."""
    relu = _relu(problem)
    options = {"TRAIN": train, "WHERE": where, "RELU": relu, "KEPT": active and relu, "SPLIT": residual}
    return _plan("input_gradient", problem, limits, memory, **options)


def forward_plans(
    problem: Problem, limits: DeviceLimits, memory: Memory, *, residual: bool = False, where: bool = False
) -> tuple[LaunchPlan, ...]:
    """The launches of a training forward pass, in order."""
    return (
        moments_plan(problem, limits, memory, where=where),
        normalize_plan(problem, limits, memory, residual=residual, where=where),
    )


def backward_plans(
    problem: Problem,
    limits: DeviceLimits,
    memory: Memory,
    *,
    where: bool = False,
    active: bool = False,
    residual: bool = False,
) -> tuple[LaunchPlan, ...]:
    """The launches of a training backward pass, in order."""
    return (
        gradient_sums_plan(problem, limits, memory, where=where, active=active),
        input_gradient_plan(problem, limits, memory, where=where, active=active, residual=residual),
    )


def _relu(problem: Problem) -> bool:
    return problem.activation == "relu"


def _plan(kernel: str, problem: Problem, limits: DeviceLimits, memory: Memory, **options: bool) -> LaunchPlan:
    tiles, block = share_out(problem.outer, problem.channels, problem.inner, ITEM_BYTES[problem.dtype], limits, memory)
    constants = {
        "X_TYPE": X_TYPES[problem.dtype],
        "BLOCK": block,
        "COLUMN": tiles.column,
        "VEC": tiles.vector,
        "RAGGED": tiles.ragged,
        "UNROLL": max(1, limits.in_flight // 2) if options["WHERE"] or tiles.ragged else limits.in_flight,
        **options,
    }
    alone = tiles.splits == tiles.fold == 1 or kernel not in MERGING
    return LaunchPlan(
        kernel,
        min(tiles.count, limits.grid),
        block,
        tuple((name, int(value)) for name, value in constants.items()),
        tiles,
        partials=0 if alone else tiles.splits * tiles.fold * tiles.channels,
        arrivals=0 if alone else tiles.groups if tiles.fold == 1 else 1,
    )


@lru_cache(maxsize=4096)
def share_out(
    outer: int, channels: int, inner: int, itemsize: int, limits: DeviceLimits, memory: Memory
) -> tuple[Tiles, int]:
    """Tiles for a tensor of no size 0, and the threads of a block."""
    assert min(outer, channels, inner) > 0
    if outer == 1:
        memory = Memory(memory.phase, 0, memory.dense)
    column = _columns(outer, channels, inner, itemsize, limits, memory)
    run = inner * itemsize
    long = run >= LONG_RUN_BYTES and (run % VECTOR_BYTES == 0 or run >= RAGGED_RUN_BYTES)
    return _planes(outer, channels, inner, itemsize, limits, memory) if long or column is None else column


def _planes(
    outer: int, channels: int, inner: int, itemsize: int, limits: DeviceLimits, memory: Memory
) -> tuple[Tiles, int]:
    vector = VECTOR_BYTES // itemsize
    if memory.phase is None or memory.step is None:
        vector = 1
    ragged = vector > 1 and not (memory.phase == memory.step == inner % vector == 0)
    windows = (inner + 2 * vector - 2) // vector if ragged else inner // vector
    block = _block(1, limits)
    part, splits = _split(outer * windows, block * limits.in_flight, channels, limits)
    return Tiles(False, vector, ragged, outer, channels, inner, windows, 0, part, channels, splits, 1, 1), block


def _columns(
    outer: int, channels: int, inner: int, itemsize: int, limits: DeviceLimits, memory: Memory
) -> tuple[Tiles, int] | None:
    """None where no block is wide enough for a tile of whole runs."""
    vector, fold = VECTOR_BYTES // itemsize, 1
    row = channels * inner
    if memory.phase != 0:
        vector = 1
    elif memory.dense:
        fold = vector // gcd(row, vector)
    elif memory.step != 0 or row % vector:
        vector = 1
    block = _block(vector, limits)
    unit = inner // gcd(inner, vector)  # windows of the narrowest tile of whole runs
    if unit > block:
        return None
    windows = row * fold // vector
    side_by_side = -(-windows * vector * itemsize // TILE_BYTES)
    width = -(-windows // side_by_side)
    width = min(-(-width // unit) * unit, block // unit * unit)
    groups = -(-windows // width)
    rows = -(-outer // fold)
    tail = (outer - (rows - 1) * fold) * row
    part, splits = _split(rows, 2 * (block // width) * limits.in_flight, groups, limits)
    return (
        Tiles(
            True, vector, tail % vector != 0, rows, channels, inner, windows, tail, part, groups, splits, width, fold
        ),
        block,
    )


def _block(lanes: int, limits: DeviceLimits) -> int:
    return min(256, SETS_PER_BLOCK // lanes, limits.threads_per_block)


def _split(length: int, least: int, groups: int, limits: DeviceLimits) -> tuple[int, int]:
    """Into how many parts, and how long each: enough for all processors, none without work."""
    wanted = -(-limits.processors * BLOCKS_PER_PROCESSOR // groups)
    splits = max(1, min(wanted, -(-length // least)), -(-length // LARGEST_PART))
    part = -(-length // splits)
    splits = -(-length // part)
    assert groups * splits < 2**30, "more tiles than a kernel counts"
    return part, splits
