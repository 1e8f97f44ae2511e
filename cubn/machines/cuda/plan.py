"""Launch plans: how many threads do what, decided in plain Python from a problem and the limits of a device.

A plan is a frozen value: it compares with `==`, prints as one line, and needs no GPU.  `launch` decides nothing.

    Memory       how the tensors of a call lie in memory, as far as it matters to a kernel
    Tiles        how one tensor is shared out among blocks and threads; the numbers that every kernel is passed
    LaunchPlan   one kernel: its text's constants, its grid, its tiles
    Choice       a way through a whole pass: the fused kernel with teams of some kind and size, or two kernels

`forward_choices` and `backward_choices` weigh all ways that a device has, the best first, by one measure: the bytes
that the busiest processor moves, with the time that blocks wait for one another counted in such bytes.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from math import gcd

from cubn.problem import Problem

X_TYPES = {"float16": 0, "bfloat16": 1, "float32": 2, "float64": 3}
"""Element type of x -> X_TYPE of scalar.cuh.  The only such table."""

ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}

KERNELS = {
    "forward": (
        "x x_stride residual residual_stride where gamma beta eps running_mean running_var weight",
        "y y_stride active mean m2 rstd count new_mean new_var",
    ),
    "backward": (
        "dy dy_stride x x_stride where active mean rstd gamma beta counts count",
        "dx dx_stride dresidual dresidual_stride sum_dy sum_dy_xhat",
    ),
    "moments": ("x x_stride where eps", "mean m2 rstd count"),
    "normalize": ("x x_stride residual residual_stride where mean rstd gamma beta", "y y_stride active"),
    "gradient_sums": ("dy dy_stride x x_stride where active mean rstd gamma beta", "sum_dy sum_dy_xhat"),
    "input_gradient": (
        "dy dy_stride x x_stride where active mean rstd gamma beta sum_dy sum_dy_xhat counts count",
        "dx dx_stride dresidual dresidual_stride",
    ),
}  # fmt: skip
"""Verb -> what its kernel takes before the sizes (and the workspace) and after them.  The only such table."""

MERGING = {"moments": 24, "gradient_sums": 16, "forward": 24, "backward": 16}
"""Kernels that merge what threads and blocks have found, and the bytes of one such set."""

HELD = 2
"""How many times the windows in flight a thread of a fused kernel holds in registers.  That is the most that no
specialisation spills (twice as many do, by the compile matrix)."""

TENSORS = {"forward": 1, "backward": 2}
"""Fused kernels, and how many tensors each holds between its two passes over them."""

TEAMS = {"block": 0, "cluster": 1, "grid": 2}
"""Blocks that share a group of channels -> TEAM of team.cuh."""

CLUSTERS = (2, 4, 8, 16)

BYTES, PACKED = 1, 2
"""How `active` is kept, KEPT of marks.cuh; 0 where it is not."""

REGISTERS = 65536  # of a processor, of every architecture since sm_50

WARP = 32
VECTOR_BYTES = 16  # the widest load and store of one thread
LONG_RUN_BYTES = 256  # from here on, a warp that reads one run keeps almost all bandwidth (98 % on H100, QuACK's notes)
RAGGED_RUN_BYTES = 2048  # from here on, the half-empty windows at both ends of a run are below 2 %
TILE_BYTES = 256  # what neighbouring threads read of one matrix row
SETS_PER_BLOCK = 1024  # 24 KB of shared memory at most: two blocks on the smallest processor
BLOCKS_PER_PROCESSOR = 8
LARGEST_PART = 2**30  # windows or rows of a tile: what a thread counts in 32 bits
MAP_WORDS = {"forward": 3, "backward": 4}  # numbers that a block keeps of each channel: Affine, Pull
MOST_BLOCKS = 16  # of a processor, on the smallest architecture
TEAMS_OF_A_GRID = (
    1,
    2,
    3,
    4,
    6,
    8,
    12,
    16,
    24,
    32,
    48,
    64,
)  # at work at once; more are what clusters and blocks are for
RESERVED_BYTES = 1024  # of shared memory, for each block, by the driver (since sm_80)

# What the choice among teams goes by.  None of these has been measured by us; each says what would settle it.
MEETING = {"block": 0.7, "cluster": 1.2, "grid": 2.5}
"""Microseconds from the last load of a team's tile to its first store.  Estimates: some 1000 cycles to merge the sets
of a block, a cluster's barrier and a read of its shared memory besides, and a round trip through the second-level
cache for a counter.  To measure: a tile that is all in registers, with each kind of team."""
LAUNCH = 2.0
"""Microseconds that a second kernel costs: the drain of the first, and its own start.  To measure: two empty ones."""
LONE = 3.0
"""How many times its share of the memory's bandwidth one processor can move while the others are idle: 64 bytes a
cycle are 110 GB/s, a share is 32 GB/s on an H200.  To measure: a copy by few blocks."""
CACHED = 0.5
"""The part of the second-level cache that still holds what was read last once y has been written beside it.  To
measure: read S, then read it backwards, for S from 5 to 80 MB."""
FROM_CACHE = 0.4
"""What a byte from that cache costs, of one from memory: some 5.5 TB/s have been published for an H100's.  To
measure: the same, for S below the size of the cache."""


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
    shared_per_block, shared_most : int
        Bytes of shared memory that a block may have without asking for more, and if it asks.
    shared_per_processor, registers, threads_per_processor : int
        Bytes of shared memory, 32-bit registers and threads of a processor, which its blocks share.
    largest_cluster : int
        Blocks of the largest cluster; 1 where there are none (below sm_90).
    cooperative : bool
        Whether a grid can be launched whose blocks wait for one another.
    cache_bytes : int
        Of the second-level cache.
    bandwidth : float
        Of the memory, in GB/s.
    in_flight : int
        Windows that a thread loads before it uses the first.
    """

    name: str
    arch: int
    processors: int
    threads_per_block: int = 1024
    grid: int = 2**31 - 1
    shared_per_block: int = 48 * 1024
    shared_most: int = 48 * 1024
    shared_per_processor: int = 64 * 1024
    registers: int = 65536
    threads_per_processor: int = 1024
    largest_cluster: int = 1
    cooperative: bool = False
    cache_bytes: int = 0
    bandwidth: float = 1000.0
    in_flight: int = 4

    def __str__(self) -> str:
        return f"{self.name} (sm_{self.arch}, {self.processors} processors)"


def largest_cluster(arch: int) -> int:
    """Blocks of a cluster: 8 on every device that has them, 16 on those of data centres, which have to be asked."""
    return 1 if arch < 90 else 16 if arch < 110 else 8


_KB, _MB = 1 << 10, 1 << 20


def _device(
    name: str, arch: int, processors: int, shared: int, threads: int, cache: float, bandwidth: float
) -> DeviceLimits:
    """`shared` in KB: of a processor.  A block may have all but 1 KB of it since sm_80, and all of it before."""
    most = shared - (1 if arch >= 80 else 0)
    return DeviceLimits(
        name,
        arch,
        processors,
        shared_most=most * _KB,
        shared_per_processor=shared * _KB,
        threads_per_processor=threads,
        largest_cluster=largest_cluster(arch),
        cooperative=True,
        cache_bytes=int(cache * _MB),
        bandwidth=bandwidth,
    )


DEVICES = {
    device.name: device
    for device in (
        _device("v100", 70, 80, 96, 2048, 6, 900),
        _device("t4", 75, 40, 64, 1024, 4, 320),
        _device("a100", 80, 108, 164, 2048, 40, 1555),
        _device("rtx3090", 86, 82, 100, 1536, 6, 936),
        _device("l4", 89, 58, 100, 1536, 48, 300),
        _device("rtx4090", 89, 128, 100, 1536, 72, 1008),
        _device("h100", 90, 132, 228, 2048, 50, 3350),  # SXM
        _device("h200", 90, 132, 228, 2048, 50, 4800),
        _device("b200", 100, 148, 228, 2048, 126, 8000),
        _device("rtx5090", 120, 170, 100, 1536, 96, 1792),
    )
}
"""Devices to plan for where none is at hand.  Processors, cache and bandwidth as published by NVIDIA or others, the
rest from the tables of the CUDA C++ programming guide; of a device that is at hand, `launch` asks the driver."""


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
    partials, arrivals, barriers : int
        Workspace: sets that blocks leave to others, counters of those that are done, and counters at which they meet.
    room : int
        Windows of each tensor that a thread of a fused kernel can keep in shared memory.
    dynamic_bytes : int
        Shared memory of a block that is asked for at launch.
    cluster : int
        Blocks of a cluster; the grid is a multiple of it.
    cooperative : bool
        Whether the blocks wait for one another, so that all have to be on the device at once.
    """

    kernel: str
    grid: int
    block: int
    constants: tuple[tuple[str, int], ...]
    tiles: Tiles
    partials: int = 0
    arrivals: int = 0
    barriers: int = 0
    room: int = 0
    dynamic_bytes: int = 0
    cluster: int = 1
    cooperative: bool = False

    @property
    def fused(self) -> bool:
        """True for `forward` and `backward`, whose blocks work in teams."""
        return self.kernel in TENSORS

    @property
    def held(self) -> int:
        """Windows of each tensor that a thread of a fused kernel holds in registers."""
        return dict(self.constants).get("HELD", 0)

    @property
    def ranks(self) -> int:
        """Blocks of a team."""
        return self.tiles.splits

    @property
    def shared_bytes(self) -> int:
        """Static shared memory: the sets of all threads, or of all warps, and a flag."""
        merging = MERGING.get(self.kernel)
        if not merging:
            return 0
        warps = self.fused and not self.tiles.column
        return merging * (self.block // WARP if warps else self.block * self.tiles.lanes) + 16

    @property
    def registers(self) -> int:
        """The most that a thread may need: as many as leave room for a second block, or than there are."""
        return min(255, REGISTERS // (2 * self.block))

    @property
    def packed(self) -> bool:
        """True if `active` is kept as bits."""
        return dict(self.constants).get("KEPT") == PACKED

    @property
    def partial_bytes(self) -> int:
        """Bytes of all partials."""
        return self.partials * MERGING.get(self.kernel, 0)

    def __str__(self) -> str:
        constants = " ".join(f"{name}={value}" for name, value in self.constants)
        shared = f", {self.dynamic_bytes} B" if self.dynamic_bytes else ""
        return f"{self.kernel}<<<{self.grid}, {self.block}{shared}>>> {constants} | {self.tiles}"


def moments_plan(problem: Problem, limits: DeviceLimits, memory: Memory, *, where: bool = False) -> LaunchPlan:
    """Count, mean and m2 of each channel."""
    return _plan("moments", problem, limits, memory, WHERE=where)


def normalize_plan(
    problem: Problem,
    limits: DeviceLimits,
    memory: Memory,
    *,
    residual: bool = False,
    where: bool = False,
    keep: bool = False,
) -> LaunchPlan:
    """y from x and the statistics; `keep` asks for `active`, which there is with a residual and an activation."""
    options = {"ADD": residual, "RELU": _relu(problem), "WHERE": where, "KEPT": keep and residual and _relu(problem)}
    return _plan("normalize", problem, limits, memory, **options)


def gradient_sums_plan(
    problem: Problem, limits: DeviceLimits, memory: Memory, *, where: bool = False, active: int = 0
) -> LaunchPlan:
    """The sums of dz and of dz * xhat over each channel; `active` is BYTES, PACKED or 0."""
    kept = active if _relu(problem) else 0
    return _plan("gradient_sums", problem, limits, memory, WHERE=where, RELU=_relu(problem), KEPT=kept)


def input_gradient_plan(
    problem: Problem,
    limits: DeviceLimits,
    memory: Memory,
    *,
    train: bool = True,
    where: bool = False,
    active: int = 0,
    residual: bool = False,
) -> LaunchPlan:
    """dx, and dz where `residual` asks for it: with an activation, only where `active` tells what it let pass."""
    relu = _relu(problem)
    assert active or not (relu and residual)
    options = {"TRAIN": train, "WHERE": where, "RELU": relu, "KEPT": active if relu else 0, "SPLIT": residual}
    return _plan("input_gradient", problem, limits, memory, **options)


@dataclass(frozen=True, slots=True)
class Choice:
    """One way through a pass.

    Attributes
    ----------
    team : {"block", "cluster", "grid", None}
        The kind of team of the fused kernel; None for two kernels.
    plans : tuple of LaunchPlan
        Its launches, in order.
    held, streamed : int
        Bytes of the tensors that are read, which are read once, and which are read twice.
    moved : int
        Bytes read from tensors and written to them in all, whatever a cache may serve of them.
    cost : float
        Bytes that the busiest processor moves or could have moved.
    """

    team: str | None
    plans: tuple[LaunchPlan, ...]
    held: int
    streamed: int
    moved: int
    cost: float


@lru_cache(maxsize=4096)
def forward_choices(
    problem: Problem,
    limits: DeviceLimits,
    memory: Memory,
    *,
    residual: bool = False,
    where: bool = False,
    keep: bool = True,
) -> tuple[Choice, ...]:
    """All ways through a training forward pass, the best first; one of them is always two kernels."""
    kept = keep and residual and _relu(problem)
    options = {"ADD": residual, "RELU": _relu(problem), "WHERE": where, "KEPT": kept}
    apart = (
        moments_plan(problem, limits, memory, where=where),
        normalize_plan(problem, limits, memory, residual=residual, where=where, keep=keep),
    )
    return _choices("forward", problem, limits, memory, options, apart, reads=1, once=1 + residual)


@lru_cache(maxsize=4096)
def backward_choices(
    problem: Problem,
    limits: DeviceLimits,
    memory: Memory,
    *,
    train: bool = True,
    where: bool = False,
    active: int = 0,
    residual: bool = False,
) -> tuple[Choice, ...]:
    """All ways through a backward pass, the best first; one of them is always two kernels."""
    relu = _relu(problem)
    options = {"TRAIN": train, "RELU": relu, "WHERE": where, "KEPT": active if relu else 0, "SPLIT": residual}
    apart = (
        gradient_sums_plan(problem, limits, memory, where=where, active=active),
        input_gradient_plan(problem, limits, memory, train=train, where=where, active=active, residual=residual),
    )
    return _choices("backward", problem, limits, memory, options, apart, reads=2, once=1 + residual)


def blocks_at_once(plan: LaunchPlan, limits: DeviceLimits) -> int:
    """How many blocks of a plan the device holds, by arithmetic; the driver knows better, and is asked for a team."""
    of_a_processor = min(
        limits.threads_per_processor // plan.block,
        limits.registers // (plan.registers * plan.block),
        limits.shared_per_processor // (plan.shared_bytes + plan.dynamic_bytes + RESERVED_BYTES),
        MOST_BLOCKS,
    )
    return of_a_processor * limits.processors // plan.cluster * plan.cluster


@lru_cache(maxsize=4096)
def fewer_teams(plan: LaunchPlan, blocks: int) -> LaunchPlan | None:
    """The plan with as many teams as fit into so many blocks; None if not even one does."""
    if blocks >= plan.grid:
        return plan
    teams = blocks // plan.ranks
    if not teams:
        return None
    partials = plan.partials // plan.barriers * teams
    return replace(plan, grid=teams * plan.ranks, partials=partials, barriers=teams)


def _choices(
    kernel: str,
    problem: Problem,
    limits: DeviceLimits,
    memory: Memory,
    options: Mapping[str, int],
    apart: tuple[LaunchPlan, ...],
    *,
    reads: int,
    once: int,
) -> tuple[Choice, ...]:
    """`reads` tensors are read twice where they are not held; `once` are read or written once in any case."""
    size = problem.outer * problem.channels * problem.inner * ITEM_BYTES[problem.dtype]
    rate = 1000 * limits.bandwidth / limits.processors  # bytes that a processor moves in a microsecond

    def read_again(size: float) -> float:
        """The cost of so many bytes, all of which have gone through the cache since they were read."""
        cached = min(size, CACHED * limits.cache_bytes)
        return size - cached + FROM_CACHE * cached

    cost = ((reads + once) * size + read_again(reads * size)) / limits.processors + (LAUNCH + MEETING["block"]) * rate
    choices = [Choice(None, apart, 0, reads * size, (2 * reads + once) * size, cost)]
    for team, plan in _fused_plans(kernel, problem, limits, memory, options):
        blocks = blocks_at_once(plan, limits)
        fitting = fewer_teams(plan, blocks) if plan.cooperative else plan
        if fitting is None or blocks < plan.ranks:
            continue
        held = _held_share(plan)
        streamed = round((1 - held) * reads * size)
        at_once = min(plan.grid // plan.ranks, blocks // plan.ranks)
        rounds = -(-plan.tiles.groups // at_once)
        busy = at_once * plan.ranks
        of_a_processor = -(-busy // limits.processors)
        again = (1 - held) * reads * size / plan.tiles.groups * at_once  # of all teams that are at work
        of_a_block = (reads + once) * size / plan.tiles.groups / plan.ranks + read_again(again) / plan.ranks / at_once
        alone = max(min(1.0, busy / limits.processors), 1 / LONE)
        meeting = MEETING[team] * rate * (2 if team == "grid" and plan.tiles.column else 1)
        cost = rounds * (of_a_processor * of_a_block * alone + meeting / min(2, of_a_processor))
        choices.append(
            Choice(team, (fitting,), reads * size - streamed, streamed, (reads + once) * size + streamed, cost)
        )
    return tuple(sorted(choices, key=lambda choice: choice.cost))


def _held_share(plan: LaunchPlan) -> float:
    """Of the windows of the fullest thread."""
    return min(1.0, (plan.held + plan.room) / windows_of_a_thread(plan.tiles, plan.block))


def windows_of_a_thread(tiles: Tiles, block: int) -> int:
    """The most that a thread of a tile visits."""
    return -(-tiles.part // (block // tiles.width if tiles.column else block))


def _fused_plans(
    kernel: str, problem: Problem, limits: DeviceLimits, memory: Memory, options: Mapping[str, int]
) -> Iterator[tuple[str, LaunchPlan]]:
    """Plans with teams of every kind and of every size that is worth a look."""
    sizes = problem.outer, problem.channels, problem.inner, ITEM_BYTES[problem.dtype], limits, memory
    tiles, block = share_out(*sizes)
    if tiles.fold > 1 and tiles.windows <= block:
        tiles = replace(tiles, groups=1, width=tiles.windows)
    if tiles.fold > 1 and tiles.groups > 1:
        return  # a channel is in several groups, and so not with one team
    length = tiles.rows if tiles.column else tiles.rows * tiles.windows
    # As narrow as leaves each thread a few windows: fewer threads to merge, more blocks for many small channels.
    narrow = 1 << (max(64, tiles.width, -(-length * tiles.width // limits.in_flight)) - 1).bit_length()
    if narrow < block and tiles.fold == 1 and (not tiles.column or tiles.inner == 1):
        tiles, block = share_out(*sizes, narrow)

    def plans(team: str, ranks: int) -> Iterator[tuple[str, LaunchPlan]]:
        part = -(-length // ranks)
        if part > LARGEST_PART or tiles.groups * ranks >= 2**30:
            return
        for neighbours in (2, 1):  # two blocks of different teams on a processor hide each other's meetings
            plan = _fused_plan(kernel, problem, limits, replace(tiles, part=part, splits=ranks), block, options, team,
                               neighbours)  # fmt: skip
            if plan is not None:
                yield team, plan
                if _held_share(plan) == 1:
                    return

    yield from plans("block", 1)
    for ranks in CLUSTERS:
        if ranks <= min(limits.largest_cluster, length):
            yield from plans("cluster", ranks)
    if limits.cooperative:
        seen = set()
        for blocks in (limits.processors, 2 * limits.processors):
            for teams in TEAMS_OF_A_GRID:
                ranks = min(blocks // teams, -(-length // (block // tiles.width)))
                if ranks > 1 and ranks not in seen and teams <= tiles.groups:
                    seen.add(ranks)
                    yield from plans("grid", ranks)


def _fused_plan(
    kernel: str,
    problem: Problem,
    limits: DeviceLimits,
    tiles: Tiles,
    block: int,
    options: Mapping[str, int],
    team: str,
    neighbours: int,
) -> LaunchPlan | None:
    """With as much shared memory as `neighbours` blocks on a processor leave each other, if that is enough."""
    ranks = tiles.splits
    constants = _constants(kernel, problem, limits, tiles, block, options)
    constants |= {
        "HELD": HELD * constants["UNROLL"],
        "TEAM": TEAMS[team],
        "RANKS": ranks if team == "cluster" else 1,
    }
    runs = tiles.width * tiles.vector // tiles.inner if tiles.column else 1
    word = ITEM_BYTES[problem.statistics_dtype]
    sets = {"block": 1, "cluster": 2, "grid": 0}[team] * MERGING[kernel]
    board = -(-runs * (sets + MAP_WORDS[kernel] * word) // 16) * 16
    marks = bool(options["WHERE"] or tiles.ragged) + (kernel == "backward" and bool(options["KEPT"]))
    window = block * (TENSORS[kernel] * tiles.vector * ITEM_BYTES[problem.dtype] + marks)
    grid = min(tiles.groups, limits.grid // ranks) * ranks
    plan = LaunchPlan(
        kernel,
        grid,
        block,
        tuple((name, int(value)) for name, value in constants.items()),
        tiles,
        partials=2 * (grid + (grid // ranks if tiles.column else 0)) * runs if team == "grid" else 0,
        barriers=grid // ranks if team == "grid" else 0,
        cluster=ranks if team == "cluster" else 1,
        cooperative=team == "grid",
    )
    most = min(limits.shared_most, limits.shared_per_processor // neighbours - RESERVED_BYTES)
    free = most - plan.shared_bytes - board
    if free < 0 or grid == 0:
        return None
    room = max(0, min(windows_of_a_thread(tiles, block) - plan.held, free // window))
    return replace(plan, room=room, dynamic_bytes=board + room * window)


def _relu(problem: Problem) -> bool:
    return problem.activation == "relu"


def _plan(kernel: str, problem: Problem, limits: DeviceLimits, memory: Memory, **options: int) -> LaunchPlan:
    tiles, block = share_out(problem.outer, problem.channels, problem.inner, ITEM_BYTES[problem.dtype], limits, memory)
    constants = _constants(kernel, problem, limits, tiles, block, options)
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


def _constants(
    kernel: str, problem: Problem, limits: DeviceLimits, tiles: Tiles, block: int, options: Mapping[str, int]
) -> dict[str, int]:
    """Macros that all kernels have, and the options'."""
    if kernel in ("forward", "normalize") and options["KEPT"]:  # what others will read is this kernel's to choose
        whole = tiles.vector * ITEM_BYTES[problem.dtype] == VECTOR_BYTES and not tiles.ragged
        options = {**options, "KEPT": PACKED if whole else BYTES}
    # What is known of each window needs registers as the windows do, and so does a second tensor of them.
    second = kernel == "backward" or (kernel == "forward" and options["ADD"])
    lone = kernel == "backward" and problem.dtype == "float64" and tiles.vector == 1  # one of these would spill
    halved = bool(options["WHERE"] or tiles.ragged) + bool(second) + lone
    return {
        "X_TYPE": X_TYPES[problem.dtype],
        "BLOCK": block,
        "COLUMN": tiles.column,
        "VEC": tiles.vector,
        "RAGGED": tiles.ragged,
        "UNROLL": max(1, limits.in_flight >> halved),
        **options,
    }


@lru_cache(maxsize=4096)
def share_out(
    outer: int, channels: int, inner: int, itemsize: int, limits: DeviceLimits, memory: Memory, widest: int = 256
) -> tuple[Tiles, int]:
    """Tiles for a tensor of no size 0, and the threads of a block: `widest` at most."""
    assert min(outer, channels, inner) > 0
    if outer == 1:
        memory = Memory(memory.phase, 0, memory.dense)
    column = _columns(outer, channels, inner, itemsize, limits, memory, widest)
    run = inner * itemsize
    long = run >= LONG_RUN_BYTES and (run % VECTOR_BYTES == 0 or run >= RAGGED_RUN_BYTES)
    return _planes(outer, channels, inner, itemsize, limits, memory, widest) if long or column is None else column


def _planes(
    outer: int, channels: int, inner: int, itemsize: int, limits: DeviceLimits, memory: Memory, widest: int
) -> tuple[Tiles, int]:
    vector = VECTOR_BYTES // itemsize
    if memory.phase is None or memory.step is None:
        vector = 1
    ragged = vector > 1 and not (memory.phase == memory.step == inner % vector == 0)
    if ragged and inner > LARGEST_PART:  # where the windows of a plane are more than a thread counts
        vector, ragged = 1, False
    windows = (inner + 2 * vector - 2) // vector if ragged else inner // vector
    block = _block(1, limits, widest)
    part, splits = _split(outer * windows, block * limits.in_flight, channels, limits)
    return Tiles(False, vector, ragged, outer, channels, inner, windows, 0, part, channels, splits, 1, 1), block


def _columns(
    outer: int, channels: int, inner: int, itemsize: int, limits: DeviceLimits, memory: Memory, widest: int
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
    block = _block(vector, limits, widest)
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


def _block(lanes: int, limits: DeviceLimits, widest: int) -> int:
    return min(widest, SETS_PER_BLOCK // lanes, limits.threads_per_block)


def _split(length: int, least: int, groups: int, limits: DeviceLimits) -> tuple[int, int]:
    """Into how many parts, and how long each: enough for all processors, none without work."""
    wanted = -(-limits.processors * BLOCKS_PER_PROCESSOR // groups)
    splits = max(1, min(wanted, -(-length // least)), -(-length // LARGEST_PART))
    part = -(-length // splits)
    splits = -(-length // part)
    assert groups * splits < 2**30, "more tiles than a kernel counts"
    return part, splits
