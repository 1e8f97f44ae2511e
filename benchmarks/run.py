"""Measure the CPU machine against a copy and against what a user would pick instead.

    python benchmarks/run.py                                     a minute: one case of each kind
    python benchmarks/run.py --full                              all of benchmarks/cases.py, twenty minutes
    python benchmarks/run.py --full --append RECORD --limit 60   a minute of that: what the record does not have yet

Competitors take turns; a ratio is that of two neighbours in time, and what is reported is the median over
the turns with its quartiles.  Results are checked against float64 before the clock starts.  The record goes to
benchmarks/results/ as JSON; `report.py` makes tables and plots from records.
"""

import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
PAUSE = 0.008
"""Seconds before each turn: the threads of the last competitor listen for up to five milliseconds for more work."""

WARM = 0.005
"""Seconds of calls before the clock starts: a competitor's threads have to wake up, wherever the system puts them."""

LIBRARIES = ("numpy", "numba", "llvmlite", "torch", "onnxruntime", "jax", "ml_dtypes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="every case, pass and memory order")
    parser.add_argument("--threads", type=int, default=2, help="threads of every competitor (default 2)")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for the turns of one measurement")
    parser.add_argument("--only", default="", help="only cases whose name has this in it")
    parser.add_argument("--output", type=Path, help="where the record goes (default: benchmarks/results/)")
    parser.add_argument("--append", type=Path, help="record to go on with: what it has is not measured again")
    parser.add_argument("--limit", type=float, default=1e9, help="seconds after which no measurement begins")
    options = parser.parse_args()
    for variable in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = str(options.threads)  # read when the libraries are imported, so not before here
    sys.path[:0] = [str(HERE.parent), str(HERE)]

    began = time.monotonic()
    record = provenance(options.threads)
    if options.append and options.append.exists():
        record["results"] = json.loads(options.append.read_text())["results"]
    name = f"cpu-{'full' if options.full else 'quick'}-{record['date']}.json"
    path = options.append or options.output or HERE / "results" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    left = 0
    for job in jobs(options):
        if done(job, record["results"]):
            continue
        if time.monotonic() - began > options.limit:
            left += 1
            continue
        scales = job.case.family == "scaling"
        record["results"] += scaling(job.case, options.threads) if scales else measure(job, options.seconds)
        path.write_text(json.dumps(record, indent=1) + "\n")  # so that nothing is lost with what comes after
    print(f"record in {path}, {left} measurements left")


class Job(NamedTuple):
    """One measurement: a case in one memory order and element type, and one pass."""

    case: Any
    which: str
    channels_last: bool = False
    dtype: str = "float32"


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """What there is to measure."""
    import cases

    for case in cases.CASES if options.full else cases.QUICK:
        orders = [False, True] if len(case.shape) > 2 and case.family[0] in cases.CHANNELS_LAST else [False]
        for channels_last in orders if options.only in str(case) else []:
            for which in ("forward", "backward", "inference"):
                yield Job(case, which, channels_last)
    for case in cases.DTYPES[: None if options.full else 1]:
        for dtype in ("float32", "float16", "bfloat16", "float64") if options.only in str(case) else []:
            yield Job(case, "forward", dtype=dtype)
    for case in cases.SCALING if options.full else []:
        if options.only in str(case):
            yield Job(case, "scaling")


def done(job: Job, results: list[dict[str, Any]]) -> bool:
    """True if a record has this measurement."""
    wanted = str(job.case), job.which, job.channels_last, job.dtype
    return any(wanted == (e["case"], e["pass"], e["channels_last"], e["dtype"]) for e in results)


def provenance(threads: int) -> dict[str, Any]:
    """What a run runs on, and no results yet."""
    return {
        "date": date.today().isoformat(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": versions(),
        "commit": commit(),
        "results": [],
    }


def measure(job: Job, seconds: float) -> list[dict[str, Any]]:
    """All competitors on one case, one entry for each."""
    from competitors import competitors

    case, which, channels_last, dtype = job
    slow = case.family[0] in "AF" and not channels_last and case.size < 7e6
    operands = arrays(case.shape, channels_last, dtype)
    exact = truth(operands, which)
    functions = {}
    for name, function in competitors(which, operands, slow):
        if dtype != "float32" and not name.startswith(("cubn", "copy")):
            continue
        found = function()
        if name != "copy":
            check(found, exact, 1 if name.startswith("cubn") else 10, f"{name}, {case}, {which}, {dtype}")
        functions[name] = function
    times = take_turns(functions, seconds)
    entries = []
    for name, own in times.items():
        entries.append(
            {
                "case": str(case), "family": case.family, "shape": case.shape, "count": case.count, "pass": which,
                "channels_last": channels_last, "dtype": dtype, "bytes": operands.x.nbytes, "competitor": name,
                "seconds": rounded(quartiles(own)),
                "over_copy": rounded(quartiles([a / b for a, b in zip(own, times["copy"], strict=False)])),
                "over_cubn": rounded(quartiles([a / b for a, b in zip(own, times[rival(name)], strict=False)])),
            }
        )  # fmt: skip
    print(line(case, which, channels_last, dtype, entries), flush=True)
    del functions, operands
    gc.collect()
    return entries


def rival(name: str) -> str:
    """The way of calling cubn that is fair to compare with: both allocate, or neither does."""
    return "cubn new" if name.endswith("new") else "cubn out"


def arrays(shape: tuple[int, ...], channels_last: bool, dtype: str) -> Any:
    import numpy as np
    from competitors import Operands

    rng = np.random.default_rng(0)
    kind = np.dtype(dtype) if dtype != "bfloat16" else np.dtype(__import__("ml_dtypes").bfloat16)
    channels, statistics = shape[1], np.float64 if dtype == "float64" else np.float32

    def random() -> np.ndarray:
        if channels_last:
            values = rng.standard_normal((shape[0], *shape[2:], channels), np.float32)
            return np.moveaxis(values.astype(kind, copy=False), -1, 1)
        return rng.standard_normal(shape, np.float32).astype(kind, copy=False)

    gamma, beta, mean = (rng.standard_normal(channels).astype(statistics) for _ in range(3))
    return Operands(random(), random(), gamma, beta, mean, np.abs(gamma) + statistics(0.5), channels_last)


def truth(a: Any, which: str) -> dict[int, Any]:
    """The result in float64 for the first, a middle and the last channel."""
    import numpy as np

    exact = {}
    for c in {0, len(a.gamma) // 2, len(a.gamma) - 1}:
        x, gamma, beta = a.x[:, c].astype(np.float64), float(a.gamma[c]), float(a.beta[c])
        mean, var = (float(a.mean[c]), float(a.var[c])) if which == "inference" else (x.mean(), x.var())
        xhat = (x - mean) / np.sqrt(var + 1e-5)
        if which == "backward":
            dy = a.dy[:, c].astype(np.float64)
            exact[c] = gamma / np.sqrt(var + 1e-5) * (dy - dy.mean() - xhat * (dy * xhat).mean())
        else:
            exact[c] = gamma * xhat + beta
    return exact


def check(found: Any, exact: dict[int, Any], lenience: float, what: str) -> None:
    """Within 1e-4 of the largest value, or a few units in the last place of a half.

    Others get ten times as much: with four million samples in a channel PyTorch is off by 4.5e-4.
    """
    import numpy as np

    tolerance = lenience * {2: 0.02, 4: 1e-4, 8: 1e-10}[found.dtype.itemsize]
    for c, values in exact.items():
        error = np.abs(np.asarray(found[:, c]).astype(np.float64) - values).max()
        if not error <= tolerance * np.abs(values).max():
            raise AssertionError(f"{what}: channel {c} is off by {error}")


def take_turns(functions: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Seconds per call of every function, turn by turn; the slow ones have three turns at least."""
    durations = {}
    for name, function in functions.items():
        begin = time.perf_counter()
        function()
        durations[name] = time.perf_counter() - begin
    calls = {name: max(1, min(100, int(0.0005 / duration))) for name, duration in durations.items()}
    warm = {name: max(1, min(100, int(WARM / duration))) for name, duration in durations.items()}
    times: dict[str, list[float]] = {name: [] for name in functions}
    turn = sum((calls[name] + warm[name]) * durations[name] + PAUSE for name in functions)
    for _ in range(max(3, min(60, int(seconds / turn)))):
        for name, function in functions.items():
            time.sleep(PAUSE)
            for _ in range(warm[name]):
                function()
            begin = time.perf_counter()
            for _ in range(calls[name]):
                function()
            times[name].append((time.perf_counter() - begin) / calls[name])
    return times


def scaling(case: Any, threads: int) -> list[dict[str, Any]]:
    """Forward pass and copy on one thread and on all."""
    import numba
    import numpy as np
    import torch

    import cubn

    x = np.random.default_rng(0).standard_normal(case.shape, np.float32)
    out = np.zeros_like(x)
    source, target = torch.from_numpy(x), torch.from_numpy(out)

    def on(count: int, function: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> None:
            if numba.get_num_threads() != count:
                numba.set_num_threads(count)
                torch.set_num_threads(count)
            function()

        return call

    functions = {}
    for count in (1, threads):
        functions[f"cubn, {count}"] = on(count, lambda: cubn.batch_norm(x, out=out))
        functions[f"copy, {count}"] = on(count, lambda: target.copy_(source))
    entries = [
        {
            "case": str(case), "family": case.family, "shape": case.shape, "pass": "scaling", "channels_last": False,
            "dtype": "float32", "bytes": x.nbytes, "competitor": name, "seconds": rounded(quartiles(times)),
        }
        for name, times in take_turns(functions, 2.0).items()
    ]  # fmt: skip
    numba.set_num_threads(threads)
    torch.set_num_threads(threads)
    print(case, {e["competitor"]: e["seconds"][1] for e in entries}, flush=True)
    return entries


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    ordered = sorted(values)
    return [ordered[round(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75)]


def rounded(values: list[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def line(case: Any, which: str, channels_last: bool, dtype: str, entries: list[dict[str, Any]]) -> str:
    """One line of progress: cubn over the copy, and the others over cubn."""
    by_name = {entry["competitor"]: entry for entry in entries}
    own = by_name["cubn out"]
    others = ", ".join(
        f"{name} {entry['over_cubn'][1]:.2f}x"
        for name, entry in by_name.items()
        if not name.startswith(("cubn", "copy"))
    )
    memory = "last " if channels_last else ""
    return (
        f"{case!s:34} {which:9} {memory}{dtype}: {own['seconds'][1] * 1e3:9.3f} ms, "
        f"{own['over_copy'][1]:.2f} copies; {others}"
    )


def processor() -> str:
    try:
        for text in Path("/proc/cpuinfo").read_text().splitlines():
            if text.startswith("model name"):
                return text.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def versions() -> dict[str, str]:
    import cubn

    found = {"cubn": cubn.__version__}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            continue
    return found


def commit() -> str:
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
