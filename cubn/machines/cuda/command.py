"""`python -m cubn plan`: how the kernels would share a tensor out on a device, with no GPU at hand."""

import argparse
from math import prod

from cubn.errors import ShapeError
from cubn.layout import arrange, normalise_axes
from cubn.machines.cuda.plan import DEVICES, ITEM_BYTES, DeviceLimits, LaunchPlan, Memory, backward_plans, forward_plans
from cubn.problem import Problem

SUMMARY = "show which CUDA kernels a tensor gets, how they share it out, and the bytes that they move"

TENSORS = {"moments": 1, "normalize": 2, "gradient_sums": 2, "input_gradient": 3}
"""Kernel -> tensors of the size of x that it reads and writes (without residual and mask)."""


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
    active = options.relu and options.residual
    forward = forward_plans(problem, limits, Memory(), residual=options.residual, where=options.where)
    backward = backward_plans(
        problem, limits, Memory(), where=options.where, active=active, residual=options.residual and options.relu
    )
    size = prod(options.shape) * ITEM_BYTES[options.dtype]
    first = forward[0].tiles
    lines = [
        f"x {options.shape} {options.dtype}, S = {_bytes(size)}, on {limits}",
        f"canonical form (outer, channels, inner) = ({layout.outer}, {layout.channels}, {layout.inner}); "
        f"{problem.samples} samples per channel",
        _reason(first.column, layout.inner * ITEM_BYTES[options.dtype]),
        "",
    ]
    for name, plans, floor in (("forward", forward, 2), ("backward", backward, 3)):
        moved = sum(TENSORS[plan.kernel] for plan in plans)
        lines.append(
            f"{name}: {moved} S = {_bytes(moved * size)} without residual and mask, less what the caches serve; "
            f"the floor is {floor} S = {_bytes(floor * size)}"
        )
        lines += [f"  {line}" for plan in plans for line in _lines(plan)]
    return "\n".join(lines)


def _lines(plan: LaunchPlan) -> list[str]:
    lines = [str(plan)]
    if plan.partials:
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
