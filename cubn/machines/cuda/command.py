"""`python -m cubn plan`: how the kernels would share a tensor out on a device, with no GPU at hand."""

import argparse
from math import prod

from cubn.errors import ShapeError
from cubn.layout import arrange, normalise_axes
from cubn.machines.cuda.plan import (
    DEVICES,
    ITEM_BYTES,
    PACKED,
    Choice,
    DeviceLimits,
    LaunchPlan,
    Memory,
    backward_choices,
    forward_choices,
    windows_of_a_thread,
)
from cubn.problem import Problem

SUMMARY = "show which CUDA kernels a tensor gets, how they share it out, and the bytes that they move"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("shape", type=_shape, metavar="SHAPE", help="sizes of x, such as 32,256,56,56")
    parser.add_argument("--dtype", choices=list(ITEM_BYTES), default="float32", help="of x (default: %(default)s)")
    parser.add_argument(
        "--channel-axis", type=_axes, default=(1,), metavar="AXIS[,AXIS]", help="the axes kept (default: 1)"
    )
    parser.add_argument(
        "--device", choices=list(DEVICES), default="h200", help="the device to plan for (default: %(default)s)"
    )
    parser.add_argument("--relu", action="store_true", help="with activation")
    parser.add_argument("--residual", action="store_true", help="with a residual")
    parser.add_argument("--where", action="store_true", help="with a mask")
    parser.epilog = (
        "examples:\n  python -m cubn plan 32,256,56,56 --dtype float16\n  python -m cubn plan 8192,512 --device a100"
    )


def run(options: argparse.Namespace) -> int:
    """Print the plans; exit status 2 for a shape that has none."""
    try:
        print(describe(options))
    except ShapeError as error:
        raise SystemExit(f"python -m cubn plan: error: {error}") from None
    return 0


def describe(options: argparse.Namespace) -> str:
    """What `run` prints."""
    axes = normalise_axes(options.channel_axis, options.shape)
    layout = arrange(options.shape, None, axes)
    if 0 in options.shape:
        raise ShapeError(f"shape is {options.shape}, but no kernel is launched for nothing; pass sizes of 1 and above.")
    activation = "relu" if options.relu else None
    problem = Problem(layout.outer, layout.channels, layout.inner, options.dtype, 1e-5, activation)
    limits: DeviceLimits = DEVICES[options.device]
    added = options.residual
    forward = forward_choices(problem, limits, Memory(), residual=added, where=options.where)
    kept = dict(forward[0].plans[-1].constants)["KEPT"]
    backward = backward_choices(
        problem, limits, Memory(), where=options.where, active=kept, residual=added and options.relu
    )
    size = prod(options.shape) * ITEM_BYTES[options.dtype]
    first = forward[0].plans[0].tiles
    lines = [
        f"x {options.shape} {options.dtype}, S = {_bytes(size)}, on {limits}",
        f"canonical form (outer, channels, inner) = ({layout.outer}, {layout.channels}, {layout.inner}); "
        f"{problem.samples} samples per channel",
        _reason(first.column, layout.inner * ITEM_BYTES[options.dtype]),
    ]
    for name, choices, floor in (
        ("forward", forward, 3 if added else 2),
        ("backward", backward, 4 if added and options.relu else 3),
    ):
        lines += ["", *_pass(name, choices, size, floor)]
    if options.where:
        lines += ["", "besides, a byte of the mask is read for each element, as often as its x"]
    if kept:
        of_an_element = "S / 16: a bit for each element" if kept == PACKED else "a byte for each element"
        lines += ["", f"what ReLU let pass is written and read besides: {of_an_element}"]
    return "\n".join(lines)


def _pass(name: str, choices: tuple[Choice, ...], size: int, floor: int) -> list[str]:
    best = choices[0]
    moved = best.moved / size
    launches = "1 launch" if len(best.plans) == 1 else f"{len(best.plans)} launches"
    lines = [
        f"{name}: {launches}, {moved:.3g} S = {_bytes(best.moved)}; the floor is {floor} S = {_bytes(floor * size)}",
        f"  {_words(best)}",
    ]
    lines += [f"  {line}" for plan in best.plans for line in _lines(plan)]
    others = {choice.team: choice for choice in reversed(choices) if choice.team != best.team}
    for choice in sorted(others.values(), key=lambda choice: choice.cost):
        lines.append(
            f"  rather than {NAMES[choice.team]}: {choice.moved / size:.3g} S, "
            f"estimated {choice.cost / best.cost:.2f} times as long (not yet measured)"
        )
    return lines


NAMES = {
    "block": "a block for each group of channels",
    "cluster": "a cluster of blocks for each",
    "grid": "many blocks of a cooperative launch for each",
    None: "two kernels",
}
"""Kind of team -> what it is called in a sentence."""


def _words(choice: Choice) -> str:
    """Who shares the samples of a channel, and what becomes of x between its two uses."""
    plan = choice.plans[0]
    if choice.team is None:
        return "two kernels, one after the other: no team of blocks would be faster, or none is possible"
    teams, groups = plan.grid // plan.ranks, plan.tiles.groups
    blocks = {
        "block": "each a block",
        "cluster": f"each a cluster of {plan.ranks} blocks, which read each other's shared memory",
        "grid": f"each {plan.ranks} blocks, which meet at a counter in global memory",
    }[choice.team]
    many = "a tile of several channels" if plan.tiles.column else "a channel"
    windows = windows_of_a_thread(plan.tiles, plan.block)
    places = [f"{min(windows, plan.held)} in registers"]
    if plan.room:
        places.append(f"{min(plan.room, windows - plan.held)} in shared memory")
    if windows > plan.held + plan.room:
        places.append(f"{windows - plan.held - plan.room} read twice, the second time backwards from the cache")
    return (
        f"{_count(teams, 'team')}, {blocks}, for {_count(groups, 'group')} of {many}; "
        f"of {windows} windows of a thread {', '.join(places)}"
    )  # fmt: skip


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _lines(plan: LaunchPlan) -> list[str]:
    lines = [str(plan)]
    if plan.partials and not plan.fused:
        lines.append(
            f"    {plan.tiles.splits} tiles share each group of channels: "
            f"partial results of {_bytes(plan.partial_bytes)}"
        )
    return lines


def _reason(column: bool, run_bytes: int) -> str:
    if column:
        return f"column map: a run of one channel is {run_bytes} bytes, so threads own columns of the matrix instead"
    return f"plane map: a run of one channel is {run_bytes} bytes, so neighbouring threads read along it"


def _bytes(number: int) -> str:
    size, unit = float(number), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.4g} {unit}"


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(size) for size in text.replace("x", ",").split(","))
    except ValueError:
        sizes = (-1,)
    if any(size < 0 for size in sizes):
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; pass sizes such as 32,256,56,56")
    return sizes


def _axes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(axis) for axis in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} names no axes; pass such as 1 or 1,2,3") from None
