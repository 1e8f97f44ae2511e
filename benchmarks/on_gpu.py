"""Everything that a GPU is needed for, in one run of under nine minutes: tests, benchmark, sanitizer.

    python benchmarks/on_gpu.py               on a machine with a GPU and CuPy
    python benchmarks/on_gpu.py --dry-run     anywhere: what would run, in which order, with which launch plans

What matters most comes first, every section has a time of its own, and every result is on disk as soon as it is
there, so that a run that is cut short keeps what it has: benchmarks/results/gpu-*.json.

Device time is that of a replayed CUDA graph between two events: after a write of twice the second-level cache
(cold), or the mean of several calls in one graph (warm).  `copy` is a device-to-device copy of x in the same run,
and a share is the time of a copy of the floor's bytes over the time measured: 2 S of a forward pass, 3 S of a
backward pass, whatever was moved.
"""

import argparse
import dataclasses
import gc
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

SECONDS = 9 * 60 - 25
TURNS = 11
WARM_CALLS = 20
SMALL = 1 << 22
"""Bytes of x up to which the warm time is that of many calls in one graph: a single one is lost in the events."""
LIBRARIES = ("numpy", "cupy-cuda13x", "cupy-cuda12x", "torch", "ml_dtypes")
FLOOR = {"forward": 2, "inference": 2, "fused": 3, "backward": 3, "training": 5}
"""Transfers of one activation tensor that no implementation can do without; `training` is forward and backward."""

PUBLISHED = ((4, 128, 1024, 1024), (8, 64, 32, 32), (4, 256, 28, 28), (32, 64))
"""Shapes that others have published times for."""

COMPILED = ((32, 256, 56, 56), (4, 128, 1024, 1024), (32, 1024, 14, 14), (32, 512, 7, 7), (8, 64, 32, 32))
JOINT = ("forward", "training")
"""What torch.compile is asked for: its backward pass has no life of its own."""

REGIMES = {
    "planned": {},
    "without clusters": {"largest_cluster": 1},
    "without clusters and blocks that wait": {"largest_cluster": 1, "cooperative": False},
}
"""What is taken from the device's limits, so that the planner has to choose something else; `split` is the verbs."""


class Job(NamedTuple):
    """One tensor to measure on."""

    shape: tuple[int, ...]
    dtype: str
    channels_last: bool = False
    passes: tuple[str, ...] = ("forward", "backward")
    count: int = 1

    def __str__(self) -> str:
        order = " channels-last" if self.channels_last else ""
        return f"{'x'.join(map(str, self.shape))} {self.dtype}{order}"


class Section(NamedTuple):
    """A part of the run: its name in the record, the seconds it may take, and what it does.

    `run` yields results, which are written one by one; it is not resumed once the time is over.
    """

    name: str
    seconds: float
    run: Callable[[float], Iterable[Any]]
    jobs: Sequence[Job] = ()


# The schedule


def sections() -> list[Section]:
    """Most telling first.  What a section leaves of its time goes to those after it."""
    return [
        Section("compilation", 25, compilation),
        Section("first tests", 60, first_tests),
        measuring("copy bandwidth", 6, [], copies),
        measuring("ResNet-50, batch 32, float16", 30, resnet(32, "float16")),
        measuring("published shapes", 15, [Job(shape, "float16") for shape in PUBLISHED]),
        measuring("ResNet-50, batch 256, float16", 30, resnet(256, "float16")),
        Section("all tests", 110, all_tests),
        measuring("ResNet-50, batch 32, float16, channels-last", 25, resnet(32, "float16", channels_last=True)),
        measuring("regimes", 30, list(contested()), regimes),
        measuring("ResNet-50, batch 64, float16", 20, resnet(64, "float16")),
        measuring(
            "ResNet-50, batch 64 and 256, float16, channels-last",
            40,
            [*resnet(64, "float16", channels_last=True), *resnet(256, "float16", channels_last=True)],
        ),
        measuring("inference and fusion", 12, list(inference_and_fusion())),
        measuring("host", 4, [], host),
        measuring("ResNet-50, batch 64, float32 and bfloat16", 30, [*resnet(64, "float32"), *resnet(64, "bfloat16")]),
        measuring("other layers, float16", 20, list(others())),
        measuring("torch.compile", 40, [Job(shape, "float16", passes=JOINT) for shape in COMPILED], compiled),
        Section("sanitizer", 50, sanitizer),
    ]


def resnet(batch: int, dtype: str, *, channels_last: bool = False) -> list[Job]:
    """Its layers, the heaviest first."""
    from cases import RESNET50

    layers = sorted(RESNET50, key=lambda layer: -layer[0] * layer[1] ** 2 * layer[2])
    return [Job((batch, c, edge, edge), dtype, channels_last, count=count) for c, edge, count in layers]


def contested() -> Iterator[Job]:
    """Where more than one way to share a tensor out is worth trying."""
    for last in (False, True):
        for shape in ((32, 1024, 14, 14), (32, 256, 56, 56), (32, 64, 112, 112), (256, 256, 56, 56), (256, 512, 7, 7)):
            yield Job(shape, "float16", last)
    yield Job((8, 64, 32, 32), "float16")
    yield Job((8192, 512), "float16")


def inference_and_fusion() -> Iterator[Job]:
    """y alone from given statistics, and training with ReLU and a residual."""
    for last in (False, True):
        for shape in ((32, 256, 56, 56), (256, 256, 56, 56), (32, 1024, 14, 14)):
            yield Job(shape, "float16", last, ("inference", "fused"))


def others() -> Iterator[Job]:
    """All other cases of the CPU's benchmark, once."""
    import cases

    for case in cases.CASES:
        if not case.family.startswith("A"):
            yield Job(case.shape, "float16")


def measuring(
    name: str, seconds: float, jobs: list[Job], measure: Callable[[Job], Iterable[Any]] | None = None
) -> Section:
    """A section that measures its jobs one after the other; a job that fails leaves the others theirs."""
    measure = measure or compared

    def run(deadline: float) -> Iterator[Any]:
        for job in jobs or [None]:
            if time.monotonic() > deadline:
                yield {"unfinished": f"time was up before {job}"}
                return
            try:
                yield from measure(job)
            except Exception as error:
                print(f"{job} failed: {type(error).__name__}: {error}", flush=True)
                yield {"job": str(job), "error": f"{type(error).__name__}: {error}"}
            gc.collect()

    return Section(name, seconds, run, jobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print what would run; needs neither GPU nor CuPy")
    parser.add_argument("--device", default="h200", help="whose plans a dry run prints")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything together")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="sections whose names have one of these words")
    parser.add_argument("--output", type=Path, help="where the record goes")
    options = parser.parse_args()
    chosen = [s for s in sections() if not options.only or any(word in s.name for word in options.only)]
    if options.dry_run:
        rehearse(chosen, options)
        return
    record: dict[str, Any] = {"date": date.today().isoformat(), "commit": commit(), **environment(), "sections": {}}
    path = (
        options.output or HERE / "results" / f"gpu-{record['device'].lower().replace(' ', '-')}-{record['date']}.json"
    )
    carry_out(chosen, time.monotonic() + options.seconds, record, path)
    print(summary(record))
    print(f"record in {path}")


def carry_out(chosen: list[Section], deadline: float, record: dict[str, Any], path: Path) -> None:
    """Run the sections until the time is over, and write the record after every result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    later = sum(section.seconds for section in chosen)
    for section in chosen:
        start = time.monotonic()
        later -= section.seconds
        spare = max(0.0, deadline - start - later - section.seconds)
        until = min(start + section.seconds + spare, deadline)
        results: list[Any] = []
        entry = record["sections"][section.name] = {"results": results}
        print(f"\n== {section.name}, {until - start:.0f} s", flush=True)
        if until - start < 3:
            entry["unfinished"] = "time was up"
            continue
        try:
            for result in section.run(until):
                results.append(result)
                path.write_text(json.dumps(record, indent=1) + "\n")
        except Exception as error:  # a failing section must not take the others' results with it
            entry["error"] = f"{type(error).__name__}: {error}"
            print("failed:", entry["error"], flush=True)
        entry["seconds"] = round(time.monotonic() - start, 1)
        path.write_text(json.dumps(record, indent=1) + "\n")


def rehearse(chosen: list[Section], options: argparse.Namespace) -> None:
    """All that needs no GPU: the schedule, the plans of every tensor in it, the tests' commands, a record."""
    from cubn.machines.cuda.plan import DEVICES

    print(f"device {DEVICES[options.device]}; {options.seconds:.0f} s for all")
    print(f"first tests: {' '.join(test_command(*FIRST_TESTS))}")
    print(f"sanitizer: {' '.join(sanitizer_command('memcheck'))}")
    for section in chosen:
        print(f"\n== {section.name}, {section.seconds:.0f} s")
        for job in section.jobs:
            print("\n".join(planned(job, options.device)))
    empty = [section._replace(run=lambda until, name=section.name: [{"rehearsed": name}]) for section in chosen]
    record: dict[str, Any] = {"device": options.device, "sections": {}}
    path = options.output or ROOT / ".gpu-rehearsal.json"
    carry_out(empty, time.monotonic() + options.seconds, record, path)
    print(summary(json.loads(path.read_text())))
    if options.output is None:
        path.unlink()


def planned(job: Job, device: str) -> list[str]:
    """The job, and the launch plans of its passes on the device of a dry run."""
    from cubn.layout import arrange
    from cubn.machines.cuda.plan import DEVICES, Memory, backward_choices, forward_choices
    from cubn.problem import Problem

    order = (0, *range(2, len(job.shape)), 1) if job.channels_last else tuple(range(len(job.shape)))
    strides = [0] * len(job.shape)
    for place, axis in enumerate(order):
        strides[axis] = 2 * prod(job.shape[later] for later in order[place + 1 :])
    layout = arrange(job.shape, tuple(strides), (1,))
    problem = Problem(layout.outer, layout.channels, layout.inner, job.dtype, 1e-5, None)
    limits = DEVICES[device]
    plans = [plan for ways in (forward_choices, backward_choices) for plan in ways(problem, limits, Memory())[0].plans]
    return [str(job), *(f"    {plan}" for plan in plans)]


# Tests

FIRST_TESTS = (str(ROOT / "tests" / "test_gpu.py"), "-k", "every_way or captured or bfloat16 or layer")


def test_command(*rest: str) -> list[str]:
    """In eight processes where pytest-xdist is there: most of the time goes into compiling."""
    side_by_side = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    return [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *side_by_side, *rest]


def sanitizer_command(tool: str) -> list[str]:
    program = shutil.which("compute-sanitizer") or "compute-sanitizer"
    options = ["--tool", tool, "--error-exitcode", "9"]
    return [program, *options, sys.executable, str(ROOT / "tests" / "gpu_calls.py")]


def first_tests(until: float) -> Iterator[Any]:
    yield tested(test_command(*FIRST_TESTS), until)


def all_tests(until: float) -> Iterator[Any]:
    yield tested(test_command("--continue-on-collection-errors", str(ROOT / "tests")), until)


def tested(command: list[str], until: float) -> dict[str, Any]:
    status, output = finished(command, until)
    lines = output.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    print("\n".join([*failed, lines[-1] if lines else "no output"]), flush=True)
    return {"command": command[2:], "status": status, "summary": lines[-1:], "failed": failed, "end": lines[-80:]}


def sanitizer(until: float) -> Iterator[Any]:
    """Accesses beside an array; races and divergent barriers in shared memory."""
    if shutil.which("compute-sanitizer") is None:
        yield {"skipped": "compute-sanitizer is not on the PATH"}
        return
    for number, tool in enumerate(("memcheck", "racecheck", "synccheck")):
        now = time.monotonic()
        status, output = finished(sanitizer_command(tool), now + (until - now) / (3 - number))
        lines = output.strip().splitlines()
        print(f"{tool}: {lines[-1] if lines else status}", flush=True)
        yield {"tool": tool, "status": status, "end": lines[-8:]}


def finished(command: list[str], until: float) -> tuple[int | str, str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    seconds = max(1.0, until - time.monotonic())
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            timeout=seconds,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
        return "out of time", output.decode(errors="replace") if isinstance(output, bytes) else output
    return done.returncode, done.stdout


# Measurements


def compilation(until: float) -> Iterator[Any]:
    """What the first call of a kind costs, and that the machine computes at all."""
    import cupy as cp

    import cubn

    for dtype, shape in (("float16", (32, 64, 56, 56)), ("float32", (32, 64, 56, 56)), ("float16", (4096, 256))):
        x = cp.random.default_rng(0).standard_normal(shape, dtype="float32").astype(dtype)
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            _, saved = cubn.batch_norm(x)
            cubn.batch_norm_backward(x, saved)
            cp.cuda.Device().synchronize()
            seconds.append(time.perf_counter() - start)
        print(f"{shape} {dtype}: first call {seconds[0]:.2f} s, second {1e6 * seconds[1]:.0f} us", flush=True)
        yield {"shape": shape, "dtype": dtype, "first_s": round(seconds[0], 3), "second_us": round(1e6 * seconds[1], 1)}


def copies(job: Job | None) -> Iterator[Any]:
    """Copy bandwidth from 1 MB to 4 GB, cold and warm."""
    import cupy as cp

    flush = flushing()
    for bits in range(20, 33, 2):
        source, target = cp.random.default_rng(0).integers(0, 255, 1 << bits, "uint8"), cp.empty(1 << bits, "uint8")
        replay = captured("copy", lambda a=source, b=target: b.data.copy_from_device_async(a.data, a.nbytes))
        cold = [device_seconds(replay, flush) for _ in range(TURNS)]
        warm = [device_seconds(replay, None) for _ in range(TURNS)]
        rate = 2 * (1 << bits) / statistics.median(cold)
        print(f"copy of {1 << bits} bytes: {rate / 1e9:.0f} GB/s cold", flush=True)
        yield {"bytes": 1 << bits, "cold_us": quartiles(cold), "warm_us": quartiles(warm), "cold_bytes_per_s": rate}
    nothing = captured("nothing", lambda: cp.empty(1, "uint8").fill(0))
    yield {"bytes": 1, "cold_us": quartiles([device_seconds(nothing, flush) for _ in range(TURNS)])}


def compared(job: Job) -> Iterator[Any]:
    """cubn, a copy, and PyTorch in all its ways, interleaved, for every pass of the job."""
    operands = Operands(job)
    operands.check()
    for which in job.passes:
        yield from interleaved(job, which, {**operands.copy(), **operands.cubn(which), **operands.pytorch(which)})


def compiled(job: Job) -> Iterator[Any]:
    """torch.compile, whose compilation takes seconds for every shape."""
    operands = Operands(job)
    for which in job.passes:
        yield from interleaved(job, which, {**operands.copy(), **operands.cubn(which), **operands.torch_compile(which)})


def regimes(job: Job) -> Iterator[Any]:
    """The ways to share one tensor out against one another, so that the planner's choice can be judged."""
    operands = Operands(job)
    for which in job.passes:
        yield from interleaved(job, which, {**operands.copy(), **operands.regimes(which)})


def host(job: Job | None) -> Iterator[Any]:
    """Time of the host per call: a tensor so small that the device waits."""
    import cupy as cp

    operands = Operands(Job((8, 64, 8, 8), "float16"))
    for which in ("forward", "backward", "inference"):
        for name, call in {
            **operands.cubn(which),
            **operands.cubn(which, allocating=True),
            **operands.pytorch(which),
        }.items():
            seconds = []
            for _ in range(7):
                cp.cuda.Device().synchronize()
                start = time.perf_counter()
                for _ in range(200):
                    call()
                seconds.append((time.perf_counter() - start) / 200)
            print(f"host, {which}, {name}: {1e6 * statistics.median(seconds):.1f} us", flush=True)
            yield {"pass": which, "competitor": name, "host_us": quartiles(seconds)}


def interleaved(job: Job, which: str, calls: dict[str, Callable[[], Any]]) -> Iterator[Any]:
    """One result for each competitor; one that cannot be captured is noted and left out."""
    size = prod(job.shape) * item_bytes(job.dtype)
    flush = flushing()
    replays: dict[str, Callable[[], Any]] = {}
    many: dict[str, Callable[[], Any]] = {}
    for name, call in calls.items():
        try:
            replays[name] = captured(name, call)
            if size <= SMALL:
                many[name] = captured(name, call, WARM_CALLS)
        except Exception as error:
            replays.pop(name, None)
            yield {"job": str(job), "pass": which, "competitor": name, "error": f"{type(error).__name__}: {error}"}
    cold: dict[str, list[float]] = {name: [] for name in replays}
    warm: dict[str, list[float]] = {name: [] for name in replays}
    for _ in range(TURNS):
        for name, replay in replays.items():
            cold[name].append(device_seconds(replay, flush))
            if name in many:
                warm[name].append(device_seconds(many[name], None) / WARM_CALLS)
            else:
                warm[name].append(device_seconds(replay, None))
    copy = statistics.median(cold["copy"])
    found = {name: statistics.median(seconds) for name, seconds in cold.items()}
    text = ", ".join(f"{name} {1e6 * seconds:.1f}" for name, seconds in found.items())
    print(f"{job} {which}, us: {text}; copy {2 * size / copy / 1e9:.0f} GB/s", flush=True)
    for name in replays:
        yield {
            "shape": job.shape, "dtype": job.dtype, "channels_last": job.channels_last, "count": job.count,
            "pass": which, "competitor": name, "cold_us": quartiles(cold[name]), "warm_us": quartiles(warm[name]),
            "bytes": size, "floor_bytes": (2 if name == "copy" else FLOOR[which]) * size,
            "floor_share_of_copy": round(FLOOR[which] / 2 * copy / found[name], 4),
        }  # fmt: skip


class Operands:
    """The tensors of one job, and what every competitor does with them.  All read the same memory."""

    def __init__(self, job: Job) -> None:
        import cupy as cp

        cp.get_default_memory_pool().free_all_blocks()
        self.job = job
        shape = job.shape
        if 9 * prod(shape) * item_bytes(job.dtype) > cp.cuda.runtime.memGetInfo()[0]:
            raise MemoryError(f"needs {9 * prod(shape) * item_bytes(job.dtype) / 1e9:.0f} GB")
        self.x, self.dy, self.residual = (self._tensor(seed) for seed in range(3))
        self.y, self.dx = cp.empty_like(self.x), cp.empty_like(self.x)
        self.gamma = cp.linspace(0.5, 1.5, shape[1], dtype="float32")
        self.beta = cp.linspace(-1, 1, shape[1], dtype="float32")
        self.mean, self.var = cp.zeros(shape[1], "float32"), cp.ones(shape[1], "float32")

    def _tensor(self, seed: int) -> Any:
        import cupy as cp

        values = cp.random.default_rng(seed).standard_normal(self.job.shape, dtype="float32")
        if self.job.channels_last:
            values = cp.moveaxis(cp.ascontiguousarray(cp.moveaxis(values, 1, -1)), -1, 1)
        return values.astype(element(self.job.dtype))

    def check(self) -> None:
        """Against float64, on the first and the last channel, before any clock runs."""
        import cupy as cp

        import cubn

        y, saved = cubn.batch_norm(self.x, self.gamma, self.beta)
        dx = cubn.batch_norm_backward(self.dy, saved).dx
        limit = {"float16": 2**-8, "bfloat16": 2**-5}.get(self.job.dtype, 1e-4)
        for c in (0, self.job.shape[1] - 1):
            x, dy = (wide(a[:, c]) for a in (self.x, self.dy))
            gamma, beta = float(self.gamma[c]), float(self.beta[c])
            xhat = (x - x.mean()) / cp.sqrt(x.var() + 1e-5)
            exact = gamma * xhat + beta
            slope = gamma / cp.sqrt(x.var() + 1e-5) * (dy - dy.mean() - xhat * (dy * xhat).mean())
            for name, found, right in (("y", y, exact), ("dx", dx, slope)):
                error = float(cp.abs(wide(found[:, c]) - right).max())
                if not error < limit * max(1.0, float(cp.abs(right).max())):
                    raise ArithmeticError(f"{name} of {self.job} is wrong by {error} in channel {c}")

    def copy(self) -> dict[str, Callable[[], Any]]:
        return {"copy": lambda: self.y.data.copy_from_device_async(self.x.data, self.x.nbytes)}

    def cubn(self, which: str, *, allocating: bool = False) -> dict[str, Callable[[], Any]]:
        """The public functions, into memory that is there, or `allocating` it."""
        import cubn

        x, gamma, beta = self.x, self.gamma, self.beta
        y, dx = (None, None) if allocating else (self.y, self.dx)
        fused = {"activation": "relu", "residual": self.residual}

        def training() -> Any:
            _, saved = cubn.batch_norm(x, gamma, beta, out=y)
            return saved, cubn.batch_norm_backward(self.dy, saved, out=dx)

        _, saved = cubn.batch_norm(x, gamma, beta)
        call: Callable[[], Any] = {
            "forward": lambda: cubn.batch_norm(x, gamma, beta, out=y),
            "inference": lambda: cubn.batch_norm_inference(x, self.mean, self.var, gamma, beta, out=y),
            "fused": lambda: cubn.batch_norm(x, gamma, beta, out=y, **fused),
            "backward": lambda: cubn.batch_norm_backward(self.dy, saved, out=dx),
            "training": training,
        }[which]
        return {"cubn, allocating" if allocating else "cubn": call}

    def regimes(self, which: str) -> dict[str, Callable[[], Any]]:
        """cubn on a device that is said to have less, and the verbs one after the other."""
        import cubn
        from cubn.machines.cuda.launch import CupyBackend
        from cubn.machines.cuda.machine import KernelMachine

        found: dict[str, Callable[[], Any]] = {}
        for regime, changes in REGIMES.items():

            class Restricted(CupyBackend):
                def limits(self, changes: dict[str, Any] = changes) -> Any:
                    return dataclasses.replace(super().limits(), **changes)

            name = f"cubn {regime}"
            sys.modules[name] = KernelMachine(name, Restricted())  # type: ignore[assignment]
            cubn.dispatch.MACHINES[name] = name
            inner = self.cubn(which)["cubn"]

            def call(name: str = name, inner: Callable[[], Any] = inner) -> Any:
                with cubn.dispatch.use_machine(name):
                    return inner()

            found[name] = call
        return {**found, **self.split(which)}

    def split(self, which: str) -> dict[str, Callable[[], Any]]:
        """The verbs one after the other: what the fusions must beat."""
        from cubn.machines.cuda import launch
        from cubn.problem import pose

        _, call = pose(self.x, channel_axis=1, eps=1e-5)
        x, dy, y, dx = (call.canonical(a) for a in (self.x, self.dy, self.y, self.dx))
        moments = launch.moments(call.problem, x)
        from cubn.moments import reciprocal_std

        rstd = reciprocal_std(moments.wide_var, 1e-5)

        def forward() -> Any:
            batch = launch.moments(call.problem, x)
            return launch.normalize(call.problem, x, batch.wide_mean, rstd, self.gamma, self.beta, out=y), batch

        def backward() -> Any:
            statistics = (moments.wide_mean, rstd, self.gamma, self.beta)
            sums = launch.gradient_sums(call.problem, dy, x, *statistics)
            return launch.input_gradient(call.problem, dy, x, *statistics, moments.count, sums, out=dx), sums

        return {"cubn split": forward if which == "forward" else backward}

    def pytorch(self, which: str) -> dict[str, Callable[[], Any]]:
        """PyTorch's own kernels and cuDNN's, on the same memory, and in the other memory order on a copy."""
        torch = pytorch_with_cuda()
        if torch is None:
            return {}
        found: dict[str, Callable[[], Any]] = {}
        x, dy, residual = (as_tensor(a) for a in (self.x, self.dy, self.residual))
        orders = {"": (x, dy, residual)}
        if x.ndim == 4 and not self.job.channels_last:
            last = torch.channels_last
            orders[", channels_last"] = tuple(a.contiguous(memory_format=last) for a in (x, dy, residual))
        for order, tensors in orders.items():
            for name, cudnn in (("cuDNN", True), ("PyTorch", False)):
                if cudnn and (self.job.dtype == "bfloat16" or x.ndim == 2):
                    continue  # PyTorch does not take it there
                call = self._eager(torch, which, tensors, cudnn)
                if call is not None:
                    found[name + order] = call
        return found

    def _eager(self, torch: Any, which: str, tensors: tuple[Any, ...], cudnn: bool) -> Callable[[], Any] | None:
        aten = torch.ops.aten
        x, dy, residual = tensors
        gamma, beta, mean, var = (as_tensor(a) for a in (self.gamma, self.beta, self.mean, self.var))
        if which == "inference":
            return lambda: torch.batch_norm(x, gamma, beta, mean, var, False, 0.1, 1e-5, cudnn)
        if which == "fused":

            def fused() -> Any:
                with torch.backends.cudnn.flags(enabled=cudnn):
                    return torch.relu_(
                        torch.batch_norm(x, gamma, beta, None, None, True, 0.1, 1e-5, cudnn).add_(residual)
                    )

            return fused
        if cudnn:
            forward = lambda: aten.cudnn_batch_norm(x, gamma, beta, None, None, True, 0.1, 1e-5)  # noqa: E731
            _, batch, rstd, reserve = forward()
            backward = lambda: aten.cudnn_batch_norm_backward(  # noqa: E731
                x, dy, gamma, None, None, batch, rstd, 1e-5, reserve
            )
        else:
            forward = lambda: aten.native_batch_norm(x, gamma, beta, None, None, True, 0.1, 1e-5)  # noqa: E731
            _, batch, rstd = forward()
            backward = lambda: aten.native_batch_norm_backward(  # noqa: E731
                dy, x, gamma, None, None, batch, rstd, True, 1e-5, [True, True, True]
            )
        return {"forward": forward, "backward": backward}.get(which)

    def torch_compile(self, which: str) -> dict[str, Callable[[], Any]]:
        """What Inductor makes of batch normalisation, and of its gradient."""
        torch = pytorch_with_cuda()
        if torch is None:
            return {}
        torch._dynamo.reset()
        x, dy = as_tensor(self.x), as_tensor(self.dy)
        gamma, beta = as_tensor(self.gamma), as_tensor(self.beta)

        @torch.compile(dynamic=False)
        def forward(x: Any, gamma: Any, beta: Any) -> Any:
            return torch.nn.functional.batch_norm(x, None, None, gamma, beta, True)

        if which == "forward":
            return {"torch.compile": lambda: forward(x, gamma, beta)}
        leaves = [a.detach().clone().requires_grad_() for a in (x, gamma, beta)]

        def training() -> Any:
            return torch.autograd.grad(forward(*leaves), leaves, dy)

        return {"torch.compile": training}


def pytorch_with_cuda() -> Any:
    """The module, or None."""
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def as_tensor(array: Any) -> Any:
    """A PyTorch tensor on the same memory; bfloat16 goes by its bits, which every version of DLPack can carry."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_dlpack(array.view("int16")).view(torch.bfloat16)
    return torch.from_dlpack(array)


def element(dtype: str) -> Any:
    """CuPy's name of an element type."""
    if dtype != "bfloat16":
        return dtype
    import ml_dtypes

    return ml_dtypes.bfloat16


def item_bytes(dtype: str) -> int:
    return 2 if dtype in ("float16", "bfloat16") else 4


def wide(array: Any) -> Any:
    """float64, exactly."""
    return array.astype("float32").astype("float64")


def flushing() -> Any:
    """Memory of twice the second-level cache."""
    import cupy as cp

    return cp.empty(2 * cp.cuda.Device().attributes["L2CacheSize"], "uint8")


def captured(name: str, call: Callable[[], Any], calls: int = 1) -> Callable[[], Any]:
    """The call as a graph, so that the host's time is not in the device's.  It keeps what the calls returned."""
    import cupy as cp

    cp.cuda.Device().synchronize()
    if name.startswith(("PyTorch", "cuDNN", "torch")):
        import torch

        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            kept = [call() for _ in range(calls)]
        return lambda kept=kept: graph.replay()
    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        warmed = [call() for _ in range(calls)]
        stream.synchronize()
        del warmed  # its memory serves the calls that are captured
        stream.begin_capture()
        try:
            kept = [call() for _ in range(calls)]
        finally:
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


def quartiles(seconds: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile, in microseconds."""
    return [round(1e6 * value, 2) for value in statistics.quantiles(seconds, n=4)]


# The record


def summary(record: dict[str, Any]) -> str:
    """Tests, then for every section and pass: share of copy, and the best competitor's time over cubn's."""
    lines = [f"\n{record['device']}"]
    for name, section in record["sections"].items():
        results = section["results"]
        lines += [f"{name}: {result['summary']}" for result in results if "summary" in result]
        lines += [f"{name}: {section[word]}" for word in ("error", "unfinished") if word in section]
        measured = [result for result in results if "floor_share_of_copy" in result]
        for which in dict.fromkeys(result["pass"] for result in measured):
            lines.append(f"{name}, {which}: " + totals([r for r in measured if r["pass"] == which]))
    return "\n".join(lines)


def totals(results: list[dict[str, Any]]) -> str:
    """Of one section and pass, layers weighted by how often the network has them."""
    tensors: dict[Any, dict[str, dict[str, Any]]] = {}
    for result in results:
        key = (tuple(result["shape"]), result["dtype"], result["channels_last"])
        tensors.setdefault(key, {})[result["competitor"]] = result
    cubn = best = floor = 0.0
    slower = []
    for key, competitors in tensors.items():
        own = competitors.get("cubn") or competitors.get("cubn planned")
        if own is None or "copy" not in competitors:
            continue
        others = [r["cold_us"][1] for n, r in competitors.items() if n != "copy" and not n.startswith("cubn")]
        time_of_floor = own["floor_bytes"] / (2 * own["bytes"]) * competitors["copy"]["cold_us"][1]
        cubn += own["count"] * own["cold_us"][1]
        floor += own["count"] * time_of_floor
        best += own["count"] * min(others, default=float("nan"))
        if others and min(others) < own["cold_us"][1]:
            slower.append("x".join(map(str, key[0])))
    text = f"cubn {cubn:.0f} us, {100 * floor / cubn if cubn else 0:.0f} % of copy"
    if best == best and cubn:  # not NaN
        text += f", best competitor {best / cubn:.2f}x its time"
    return text + (f"; slower on {', '.join(slower)}" if slower else "")


def environment() -> dict[str, Any]:
    import cupy as cp

    from cubn.machines.cuda.launch import limits_of

    device = cp.cuda.Device().id
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    torch = pytorch_with_cuda()
    return {
        "device": cp.cuda.runtime.getDeviceProperties(device)["name"].decode(),
        "limits": dataclasses.asdict(limits_of(device)),
        "driver": cp.cuda.runtime.driverGetVersion(),
        "runtime": cp.cuda.runtime.runtimeGetVersion(),
        "cudnn": torch.backends.cudnn.version() if torch else None,
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": versions,
    }


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
