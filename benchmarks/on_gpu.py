"""Everything that a GPU is needed for, in one run of under nine minutes: tests, sanitizer, first benchmark.

    python benchmarks/on_gpu.py               on a machine with a GPU and CuPy
    python benchmarks/on_gpu.py --dry-run     anywhere: what would run, in which order, with which launch plans

What matters most comes first, and every result is on disk as soon as it is there: benchmarks/results/gpu-*.json.
Device time is that of a replayed CUDA graph between two events, after a write of twice the second-level cache
(cold) or without (warm); `copy` is a device-to-device copy of x in the same run and the denominator of all ratios.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

SECONDS = 9 * 60 - 20
TEST_SECONDS = 240
SANITIZER_SECONDS = 60
TURNS = 15
LIBRARIES = ("numpy", "cupy-cuda13x", "cupy-cuda12x", "torch", "ml_dtypes")
FLOOR = {"forward": 2, "inference": 2, "backward": 3}
"""Transfers of one activation tensor that no implementation can do without."""

FIRST = (
    (32, 256, 56, 56), (32, 64, 112, 112), (256, 64, 56, 56), (32, 1024, 14, 14), (32, 512, 7, 7),
    (8192, 512), (100000, 32), (128, 24, 56, 56), (4, 128, 1024, 1024), (8, 64, 32, 32), (32, 64),
)  # fmt: skip
"""Shapes in the order in which they are worth knowing; all of cases.py follows as far as the time goes."""

SANITIZED = "repeats and (small or odd) or streams"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print what would run; needs neither GPU nor CuPy")
    parser.add_argument("--device", default="h200", help="whose plans a dry run prints")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything together")
    parser.add_argument("--no-tests", action="store_true", help="only the benchmark")
    parser.add_argument("--output", type=Path, help="where the record goes")
    options = parser.parse_args()
    if options.dry_run:
        rehearse(options.device)
        return
    deadline = time.monotonic() + options.seconds
    record: dict[str, Any] = {"date": date.today().isoformat(), "commit": commit(), **environment()}
    path = (
        options.output or HERE / "results" / f"gpu-{record['device'].lower().replace(' ', '-')}-{record['date']}.json"
    )

    def keep(name: str, value: Any) -> None:
        record[name] = value
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=1) + "\n")

    if not options.no_tests:
        keep("tests", run_tests(min(TEST_SECONDS, deadline - time.monotonic())))
        print(record["tests"]["summary"], flush=True)
        keep("sanitizer", run_sanitizer(min(SANITIZER_SECONDS, deadline - time.monotonic())))
    results: list[dict[str, Any]] = []
    for measurement in schedule():
        if time.monotonic() > deadline - 10:
            keep("unfinished", f"time was up before {measurement}")
            break
        try:
            results += measure(*measurement)
        except Exception as error:  # a failing case must not take the others' results with it
            results.append({"measurement": str(measurement), "error": f"{type(error).__name__}: {error}"})
            print(measurement, "failed:", error, flush=True)
        keep("results", results)
    print(f"record in {path}")


def schedule() -> list[tuple[tuple[int, ...], str, bool]]:
    """(shape, dtype, channels-last), the most telling first."""
    import cases

    shapes = list(FIRST) + [case.shape for case in cases.CASES if case.shape not in FIRST]
    found = [(shape, "float16", False) for shape in shapes[: len(FIRST)]]
    found += [(shape, "float16", True) for shape in FIRST if len(shape) > 2]
    found += [(shape, "float32", False) for shape in FIRST]
    found += [(shape, "bfloat16", False) for shape in FIRST[:3]]
    found += [
        (shape, "float16", last)
        for shape in shapes[len(FIRST) :]
        for last in (False, True)
        if len(shape) > 2 or not last
    ]
    return found


def rehearse(device: str) -> None:
    """What main() would do, without a GPU: this runs in the tests."""
    from cubn.layout import arrange
    from cubn.machines.cuda.plan import DEVICES, Memory, backward_plans, forward_plans
    from cubn.problem import Problem

    print(f"tests: {' '.join(test_command())}, at most {TEST_SECONDS} s")
    print(f"sanitizer: {' '.join(sanitizer_command('memcheck'))}, then racecheck, at most {SANITIZER_SECONDS} s")
    print(f"benchmark: {len(schedule())} measurements until {SECONDS} s are over; plans for {DEVICES[device]}:")
    for shape, dtype, channels_last in schedule():
        order = (0, *range(2, len(shape)), 1) if channels_last else tuple(range(len(shape)))
        strides = [0] * len(shape)
        for place, axis in enumerate(order):
            strides[axis] = 2 * prod(shape[later] for later in order[place + 1 :])
        layout = arrange(shape, tuple(strides), (1,))
        problem = Problem(layout.outer, layout.channels, layout.inner, dtype, 1e-5, None)
        print(f"\n{'x'.join(map(str, shape))} {dtype}{' channels-last' if channels_last else ''}")
        plans = forward_plans(problem, DEVICES[device], Memory()) + backward_plans(problem, DEVICES[device], Memory())
        print("\n".join(f"    {plan}" for plan in plans))


# Tests


def test_command() -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", str(ROOT / "tests")]


def sanitizer_command(tool: str) -> list[str]:
    program = shutil.which("compute-sanitizer") or "compute-sanitizer"
    options = ["--tool", tool, "--error-exitcode", "9", "--target-processes", "all"]
    return [program, *options, *test_command(), "-k", SANITIZED]


def run(command: list[str], seconds: float) -> tuple[int | str, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, timeout=max(seconds, 1), text=True, stdout=-1, stderr=subprocess.STDOUT
        )
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
        return "out of time", output.decode(errors="replace") if isinstance(output, bytes) else output
    return done.returncode, done.stdout


def run_tests(seconds: float) -> dict[str, Any]:
    status, output = run(test_command(), seconds)
    lines = output.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"status": status, "summary": lines[-1] if lines else "", "failed": failed, "end": lines[-60:]}


def run_sanitizer(seconds: float) -> dict[str, Any]:
    if shutil.which("compute-sanitizer") is None:
        return {"skipped": "compute-sanitizer is not installed"}
    found = {}
    for tool in ("memcheck", "racecheck"):
        status, output = run(sanitizer_command(tool), seconds / 2)
        found[tool] = {"status": status, "end": output.strip().splitlines()[-5:]}
    return found


# Benchmark


def measure(shape: tuple[int, ...], dtype: str, channels_last: bool) -> list[dict[str, Any]]:
    """All competitors on one tensor, interleaved."""
    import cupy as cp

    cp.get_default_memory_pool().free_all_blocks()
    item = 2 if dtype in ("float16", "bfloat16") else 4
    size = prod(shape) * item
    if 8 * size > cp.cuda.runtime.memGetInfo()[0]:
        raise MemoryError(f"needs {8 * size / 1e9:.0f} GB")
    cache = cp.cuda.Device().attributes["L2CacheSize"]
    flush = cp.empty(2 * cache, "uint8")
    entries = []
    for which in ("forward", "inference", "backward"):
        calls = contestants(which, shape, dtype, channels_last)
        replays = {name: captured(name, call) for name, call in calls.items()}
        cold: dict[str, list[float]] = {name: [] for name in replays}
        warm: dict[str, list[float]] = {name: [] for name in replays}
        for _ in range(TURNS):
            for name, replay in replays.items():
                cold[name].append(device_seconds(replay, flush))
                warm[name].append(device_seconds(replay, None))
        copy = statistics.median(cold["copy"])
        for name in replays:
            found = statistics.median(cold[name])
            entries.append({
                "shape": shape, "dtype": dtype, "channels_last": channels_last, "pass": which, "competitor": name,
                "cold_us": quartiles(cold[name]), "warm_us": quartiles(warm[name]),
                "wall_us": round(1e6 * wall_seconds(calls[name]), 2), "bytes": size,
                "floor_bytes": (2 if name == "copy" else FLOOR[which]) * size,
                "floor_share_of_copy": round(FLOOR[which] / 2 * copy / found, 4),
            })  # fmt: skip
        print(line(shape, dtype, channels_last, which, cold, copy, size), flush=True)
    return entries


def contestants(which: str, shape: tuple[int, ...], dtype: str, channels_last: bool) -> dict[str, Callable[[], Any]]:
    """Competitor -> a call that computes the pass once.  All of one pass read the same numbers."""
    import cupy as cp

    import cubn

    if dtype == "bfloat16":
        import ml_dtypes

        element: Any = ml_dtypes.bfloat16
    else:
        element = dtype

    def tensor(seed: int) -> Any:
        values = cp.random.default_rng(seed).standard_normal(shape, dtype="float32").astype(element)
        return cp.moveaxis(cp.ascontiguousarray(cp.moveaxis(values, 1, -1)), -1, 1) if channels_last else values

    x, dy = tensor(0), tensor(1)
    y, dx = cp.empty_like(x), cp.empty_like(x)
    gamma, beta = cp.linspace(0.5, 1.5, shape[1], dtype="float32"), cp.linspace(-1, 1, shape[1], dtype="float32")
    mean, var = cp.zeros(shape[1], "float32"), cp.ones(shape[1], "float32")
    _, saved = cubn.batch_norm(x, gamma, beta, out=y)
    check(cp, x, y, gamma, beta)
    calls: dict[str, Callable[[], Any]] = {
        "copy": lambda: y.data.copy_from_device_async(x.data, x.nbytes),
        "cubn": {
            "forward": lambda: cubn.batch_norm(x, gamma, beta, out=y),
            "inference": lambda: cubn.batch_norm_inference(x, mean, var, gamma, beta, out=y),
            "backward": lambda: cubn.batch_norm_backward(dy, saved, out=dx),
        }[which],
    }
    calls.update(pytorch(which, x, dy, gamma, beta, dtype))
    return calls


def pytorch(which: str, x: Any, dy: Any, gamma: Any, beta: Any, dtype: str) -> dict[str, Callable[[], Any]]:
    """PyTorch's own, with cuDNN and without, on the same memory."""
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}
    views = [a.view("int16") if dtype == "bfloat16" else a for a in (x, dy)]
    tx, tdy = (torch.from_dlpack(a) for a in views)
    if dtype == "bfloat16":
        tx, tdy = tx.view(torch.bfloat16), tdy.view(torch.bfloat16)
    tgamma, tbeta = torch.from_dlpack(gamma), torch.from_dlpack(beta)
    ops = torch.ops.aten
    found: dict[str, Callable[[], Any]] = {}
    for name, cudnn in (("PyTorch", True), ("PyTorch without cuDNN", False)):
        if which == "inference":
            zero, one = torch.zeros_like(tgamma), torch.ones_like(tgamma)

            def call(cudnn: bool = cudnn, zero: Any = zero, one: Any = one) -> Any:
                with torch.backends.cudnn.flags(enabled=cudnn):
                    return torch.batch_norm(tx, tgamma, tbeta, zero, one, False, 0.1, 1e-5, cudnn)

        elif which == "forward":

            def call(cudnn: bool = cudnn) -> Any:  # type: ignore[misc]
                with torch.backends.cudnn.flags(enabled=cudnn):
                    return torch.batch_norm(tx, tgamma, tbeta, None, None, True, 0.1, 1e-5, cudnn)

        else:
            if cudnn:
                continue  # cuDNN's backward needs its forward's reserve; the native one is what eager PyTorch exposes
            _, mean, rstd = ops.native_batch_norm(tx, tgamma, tbeta, None, None, True, 0.1, 1e-5)

            def call(mean: Any = mean, rstd: Any = rstd) -> Any:  # type: ignore[misc]
                return ops.native_batch_norm_backward(
                    tdy, tx, tgamma, None, None, mean, rstd, True, 1e-5, [True, True, True]
                )

        found[name] = call
    return found


def check(cp: Any, x: Any, y: Any, gamma: Any, beta: Any) -> None:
    """Against float64, on the first and the last channel, before any clock runs."""
    for channel in (0, x.shape[1] - 1):
        slab = x[:, channel].astype("float64")
        exact = (slab - slab.mean()) / cp.sqrt(slab.var() + 1e-5) * float(gamma[channel]) + float(beta[channel])
        error = float(cp.abs(y[:, channel].astype("float64") - exact).max())
        limit = {"float16": 2**-8, "bfloat16": 2**-5}.get(x.dtype.name, 1e-4)
        assert error < limit, f"wrong by {error}"


def captured(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call as a graph, so that the host's time is not in the device's."""
    import cupy as cp

    cp.cuda.Device().synchronize()
    if name.startswith("PyTorch"):
        import torch

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            call()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        call()
        stream.synchronize()
        stream.begin_capture()
        kept = call()
        graph = stream.end_capture()
    return lambda kept=kept: graph.launch()


def device_seconds(replay: Callable[[], Any], flush: Any) -> float:
    """Between two events.  The flush also gives the host time to have everything queued."""
    import cupy as cp

    stream = cp.cuda.get_current_stream()
    start, end = cp.cuda.Event(), cp.cuda.Event()
    if flush is not None:
        flush.fill(1)
    else:
        replay()
    start.record(stream)
    replay()
    end.record(stream)
    end.synchronize()
    return float(cp.cuda.get_elapsed_time(start, end)) / 1000


def wall_seconds(call: Callable[[], Any], repeats: int = 50) -> float:
    """Of one call in a loop that waits only at its end."""
    import cupy as cp

    call()
    cp.cuda.Device().synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    cp.cuda.Device().synchronize()
    return (time.perf_counter() - start) / repeats


def quartiles(seconds: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile, in microseconds."""
    return [round(1e6 * value, 2) for value in statistics.quantiles(seconds, n=4)]


def line(
    shape: tuple[int, ...], dtype: str, channels_last: bool, which: str, cold: dict[str, list[float]], copy: float,
    size: int,
) -> str:  # fmt: skip
    medians = {name: statistics.median(values) for name, values in cold.items()}
    text = ", ".join(f"{name} {1e6 * value:.1f} us" for name, value in medians.items())
    order = " channels-last" if channels_last else ""
    return f"{'x'.join(map(str, shape))} {dtype}{order} {which}: {text}; copy {2 * size / copy / 1e9:.0f} GB/s"


def environment() -> dict[str, Any]:
    import cupy as cp

    properties = cp.cuda.runtime.getDeviceProperties(cp.cuda.Device().id)
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    try:
        import torch

        cudnn = torch.backends.cudnn.version()
    except ImportError:
        cudnn = None
    return {
        "device": properties["name"].decode(),
        "processors": properties["multiProcessorCount"],
        "compute_capability": cp.cuda.Device().compute_capability,
        "driver": cp.cuda.runtime.driverGetVersion(),
        "runtime": cp.cuda.runtime.runtimeGetVersion(),
        "cudnn": cudnn,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": versions,
    }


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
