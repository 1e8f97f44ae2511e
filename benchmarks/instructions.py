"""What the kernels' loops cost a processor: instructions for every 16 bytes of x, read from the machine code.

    python benchmarks/instructions.py [--device h200] [--record benchmarks/results/instructions.json]

Needs no GPU, and is no time: the compiler's output is counted (pip install nvidia-cuda-nvdisasm nvidia-cuda-nvrtc).
A warp moves a *window* of 16 bytes for each of its 32 threads at once.  While the memory delivers the bytes of a
window, a processor can issue so many instructions and no more: the budget.  A kernel over its budget is bound by
instructions, whatever bytes it saves; one at half of it leaves its processors the time to wait.

Counted is the shortest way through each main loop that makes all of its accesses, and as `at most` the whole loop.
What is done in every n-th turn only, such as the step from float to double, is in the second alone; what is done once
for a channel, such as the merging of what threads have found, in neither.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
if __name__ == "__main__":
    sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

from host.nvrtc import machine_code, toolkit_for  # noqa: E402
from host.sass import Loop, loops  # noqa: E402

from cubn.machines.cuda import plan as plans  # noqa: E402
from cubn.machines.cuda.plan import DEVICES, DeviceLimits, LaunchPlan, Memory  # noqa: E402
from cubn.machines.cuda.source import translation_unit  # noqa: E402
from cubn.problem import Problem  # noqa: E402

SCHEDULERS = 4  # of a processor, each issues one instruction of a warp in a cycle
WINDOW_BYTES = 32 * 16  # of a warp

CLOCK_GHZ = {"v100": 1.53, "t4": 1.59, "a100": 1.41, "rtx3090": 1.70, "l4": 2.04, "rtx4090": 2.52, "h100": 1.98,
             "h200": 1.98, "b200": 1.97, "rtx5090": 2.41}  # fmt: skip
"""The highest clock of each device, as published; under load it is lower, and so is the budget."""

SHAPES = {"planes": (256, 256, 56 * 56), "columns": (256 * 56 * 56, 256, 1)}
"""One tensor, contiguous and channels-last, in canonical form; large enough that windows are kept and streamed."""

MOVED = {"forward": 2, "backward": 3, "moments": 1, "normalize": 2, "gradient_sums": 2, "input_gradient": 3}
"""Tensors that a kernel moves once for each window."""

READ = {"forward": 1, "backward": 2, "moments": 1, "normalize": 1, "gradient_sums": 2, "input_gradient": 2}
"""Tensors of which it reads a window where nothing is asked for besides."""


@dataclass(frozen=True)
class Cost:
    """Instructions of a warp for one window."""

    kernel: str
    dtype: str
    map: str
    phases: dict[str, tuple[float, float]]
    budget: float

    @property
    def instructions(self) -> tuple[float, float]:
        """Of a window that a fused kernel keeps, or all of a kernel that keeps none: the fewest, and the most."""
        once = [counts for name, counts in self.phases.items() if "again" not in name]
        fewest, most = (sum(counts) for counts in zip(*once, strict=True))
        return round(fewest, 1), round(most, 1)


def budget(device: DeviceLimits, tensors: int) -> float:
    """Instructions that a processor can issue while the memory moves a warp's window of so many tensors."""
    seconds = tensors * WINDOW_BYTES / (1e9 * device.bandwidth / device.processors)
    return seconds * SCHEDULERS * 1e9 * CLOCK_GHZ[device.name]


def plan_of(kernel: str, problem: Problem, device: DeviceLimits) -> LaunchPlan:
    """The kernel as this device would run it: with a team where it is fused."""
    if kernel in plans.TENSORS:
        choices = getattr(plans, f"{kernel}_choices")(problem, device, Memory())
        return next(choice.plans[0] for choice in choices if choice.team)  # type: ignore[no-any-return]
    return getattr(plans, f"{kernel}_plan")(problem, device, Memory())  # type: ignore[no-any-return]


def phases_of(kernel: str, found: list[Loop]) -> dict[str, tuple[float, float]]:
    """What a window goes through -> instructions, from the loop that takes most windows at a time."""
    read = READ[kernel]
    best: dict[str, tuple[float, Loop]] = {}
    for loop in found:
        if loop.copies:
            name, windows = "fetch", loop.copies / read
        elif loop.stores:
            name, windows = "give out" if loop.kept or kernel not in plans.TENSORS else "give out again", loop.stores
        elif loop.kept:
            name, windows = "sum", loop.kept / read
        elif loop.loads:
            name, windows = "sum" if kernel not in plans.TENSORS else "sum, to read again", loop.loads / read
        else:
            continue
        if windows >= 1 and (name not in best or windows > best[name][0]):
            best[name] = windows, loop
    return {
        name: (round(loop.instructions / windows, 1), round(loop.most / windows, 1))
        for name, (windows, loop) in best.items()
    }


def cost_of(kernel: str, dtype: str, layout: str, device: DeviceLimits) -> Cost:
    """Compile one kernel and count."""
    plan = plan_of(kernel, Problem(*SHAPES[layout], dtype, 1e-5, None), device)
    code = machine_code(translation_unit(f"{kernel}.cu"), kernel, dict(plan.constants), device.arch)
    return Cost(kernel, dtype, layout, phases_of(kernel, list(loops(code))), budget(device, MOVED[kernel]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEVICES, default="h200")
    parser.add_argument("--record", type=Path, help="where a record is written")
    options = parser.parse_args()
    device = DEVICES[options.device]
    rows: list[dict[str, Any]] = []
    print(f"{device}, {CLOCK_GHZ[device.name]} GHz, {device.bandwidth / 1000:.1f} TB/s; {toolkit_for(device.arch)}")
    print("kernel          dtype     map      instructions  at most  budget")
    for kernel in MOVED:
        for dtype in plans.ITEM_BYTES:
            for layout in SHAPES:
                cost = cost_of(kernel, dtype, layout, device)
                fewest, most = cost.instructions
                rows.append({"kernel": kernel, "dtype": dtype, "map": layout, "instructions": fewest, "at_most": most,
                             "budget": round(cost.budget, 2), "phases": cost.phases})  # fmt: skip
                parts = ", ".join(f"{name} {count:.0f}" for name, (count, _) in cost.phases.items())
                print(
                    f"{kernel:15} {dtype:9} {layout:8} {fewest:12.0f} {most:8.0f} {cost.budget:7.0f}  {parts}",
                    flush=True,
                )
    if options.record is not None:
        record = {"date": date.today().isoformat(), "device": device.name, "clock_ghz": CLOCK_GHZ[device.name],
                  "compiler": str(toolkit_for(device.arch)), "rows": rows}  # fmt: skip
        options.record.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
