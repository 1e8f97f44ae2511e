"""What a call of the CUDA machine costs the host: Python's time, microseconds per call.

    python benchmarks/host_path.py [--stand-in] [--profile forward]

Without a GPU the machine runs over NumPy memory and a backend whose launches do nothing: what is measured is all of
cubn's own Python, and NumPy's allocations instead of CuPy's.  With a GPU the same calls are measured on CuPy arrays so
small that the device keeps up, launches and CuPy's allocations included.  --stand-in measures CuPy without a GPU: its
arrays, memory pool and launches, which a stand-in for the driver takes and does nothing with (tests/driver; `make
test-cupy` sets up the environment .venv/cupy-14.2).  The three do not compare with one another.
"""

import argparse
import cProfile
import json
import platform
import pstats
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent)]

import cubn  # noqa: E402
from cubn.machines.cuda.backend import Launch, Part  # noqa: E402
from cubn.machines.cuda.machine import KernelMachine  # noqa: E402
from cubn.machines.cuda.plan import DEVICES, DeviceLimits, LaunchPlan  # noqa: E402
from cubn.namespace import why_no_cuda  # noqa: E402
from cubn.problem import Problem  # noqa: E402

SHAPES = ((8, 64, 8, 8), (512, 64))
TURNS, CALLS = 15, 300


class IdleBackend:
    """NumPy memory, an H200's limits, and launches that do nothing."""

    limits_of_all = DEVICES["h200"]

    def __init__(self) -> None:
        self.memory = tuple(np.zeros(1 << 16, np.uint32) for _ in range(3))

    def current_device(self) -> int:
        return 0

    def on_device_of(self, array: np.ndarray) -> Any:
        return nullcontext()

    def limits(self) -> DeviceLimits:
        return self.limits_of_all

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.empty(shape, dtype)

    def block(self, size: int) -> np.ndarray:
        return np.empty(size, np.uint8)

    scratch = block

    def view(self, block: np.ndarray, part: Part) -> np.ndarray:
        return np.ndarray(part.shape, part.dtype, block, part.offset)

    def contiguous(self, array: np.ndarray, dtype: Any) -> np.ndarray:
        return np.ascontiguousarray(array, dtype)

    def address(self, array: np.ndarray) -> int:
        return array.ctypes.data & ~15  # NumPy promises no alignment to vectors

    def workspace(self, plan: LaunchPlan) -> Any:
        return self.memory

    def resident(self, plan: LaunchPlan) -> int:
        return plan.grid

    def launch(self, plan: LaunchPlan, arguments: dict[str, Any]) -> None:
        """Nothing."""

    def bind(self, plan: LaunchPlan, arguments: Mapping[str, Any]) -> Launch:
        return nothing

    def widening(self, problem: Problem) -> Callable[..., None]:
        return nothing


def nothing(*_: Any) -> None:
    """What a launch does here."""


def calls(xp: Any, shape: tuple[int, ...]) -> dict[str, Callable[[], Any]]:
    """The calls of a training step and of inference, with memory for the result and without."""
    x, dy = (xp.asarray(np.random.default_rng(i).standard_normal(shape).astype("float32")) for i in range(2))
    y, dx = xp.empty_like(x), xp.empty_like(x)
    gamma, beta, mean = (xp.zeros(shape[1], "float32") for _ in range(3))
    var = xp.ones(shape[1], "float32")
    _, saved = cubn.batch_norm(x, gamma, beta)
    layer = cubn.BatchNorm(shape[1], device="cpu" if xp is np else "cuda")
    return {
        "forward": lambda: cubn.batch_norm(x, gamma, beta),
        "forward, out": lambda: cubn.batch_norm(x, gamma, beta, out=y),
        "backward": lambda: cubn.batch_norm_backward(dy, saved),
        "backward, out": lambda: cubn.batch_norm_backward(dy, saved, out=dx),
        "layer": lambda: layer(x),
        "inference": lambda: cubn.batch_norm_inference(x, mean, var, gamma, beta),
        "inference, out": lambda: cubn.batch_norm_inference(x, mean, var, gamma, beta, out=y),
    }


def microseconds(call: Callable[[], Any]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    for _ in range(20):
        call()  # what is decided once for its form is decided here
    found = []
    for _ in range(TURNS):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        found.append(1e6 * (time.perf_counter() - start) / CALLS)
    return [round(value, 2) for value in statistics.quantiles(found, n=4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", metavar="CALL", help="show where the time of one call goes, such as 'forward'")
    parser.add_argument("--stand-in", action="store_true", help="measure CuPy without a GPU")
    parser.add_argument("--record", type=Path, help="where a record is written")
    options = parser.parse_args()
    if options.stand_in:
        sys.path.insert(0, str(HERE.parent / "tests"))
        import driver.under_cupy  # noqa: F401  before CuPy
    reason = why_no_cuda()
    if reason is None:
        import cupy as xp

        machine, device = "cuda", xp.cuda.runtime.getDeviceProperties(0)["name"].decode()
        if options.stand_in:
            device = "none: a stand-in for the driver takes the launches"
    else:
        xp = np
        machine, device = "idle", "none: launches do nothing"
        sys.modules["idle"] = KernelMachine("idle", IdleBackend())  # type: ignore[assignment]
        cubn.dispatch.MACHINES["idle"] = "idle"
    record: dict[str, Any] = {
        "date": date.today().isoformat(), "device": device, "arrays": f"{xp.__name__} {xp.__version__}",
        "python": platform.python_version(), "processor": platform.machine(), "microseconds": {},
    }  # fmt: skip
    print(f"device {device}; {record['arrays']}, Python {record['python']}")
    with cubn.dispatch.use_machine(machine):
        for shape in SHAPES:
            for name, call in calls(xp, shape).items():
                if options.profile is not None:
                    if name == options.profile:
                        profile(call)
                    continue
                found = record["microseconds"][f"{'x'.join(map(str, shape))} {name}"] = microseconds(call)
                print(f"{shape!s:16} {name:16} {found[1]:8.1f} us")
    if options.record is not None:
        options.record.write_text(json.dumps(record, indent=1) + "\n")


def profile(call: Callable[[], Any]) -> None:
    call()
    with cProfile.Profile() as profiler:
        for _ in range(3000):
            call()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
