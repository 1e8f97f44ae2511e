"""`python -m cubn demo --ranks 2`: the same training by several processes, and the proof that it is the same."""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter

import numpy as np

import cubn
from cubn.demo.training import History, train

RATE = 1.0
"""Where the comparison of the whole demo ends best."""

AGREEMENT = 1e-6
"""Largest difference of the loss that rounding may make.  Both train in float64, where it begins at 1e-16 and grows
with every step; after 600 steps it is still below 1e-9.  Statistics of each rank by itself differ from the start."""

STARTED = ("CUBN_DEMO_RANK", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
"""Environment variables that say that this process is one of several."""

SHOWN = 10
"""Lines of the table."""


def run(options: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> int:
    """Start the ranks, or be one of them; the exit status."""
    if options.ranks > options.batch:
        options.error(
            f"--ranks is {options.ranks}, but a batch has {options.batch} images, which are shared out; "
            f"pass a larger --batch, or fewer ranks."
        )
    if not any(name in environment for name in STARTED):
        return start(options, environment)
    try:
        sync = cubn.sync.mpi()
    except ImportError as error:
        options.error(str(error))
    if sync.size != options.ranks:
        options.error(
            f"--ranks is {options.ranks}, but MPI has started {sync.size}; "
            f"pass that number, or call without mpiexec."
        )  # fmt: skip
    return compare(options, sync)


def start(options: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Run this command on every rank."""
    beside = Path(sys.executable).with_name("mpiexec")
    launcher = str(beside) if beside.exists() else shutil.which("mpiexec")
    lacking = [name for name, there in (("mpi4py", find_spec("mpi4py")), ("mpiexec", launcher)) if not there]
    if launcher is None or lacking:
        options.error(
            f"--ranks needs {' and '.join(lacking)}, which {'is' if len(lacking) == 1 else 'are'} not there, but the "
            f"ranks are processes of MPI; pip install 'cubn[sync]' mpich."
        )
        raise AssertionError  # options.error does not return
    same = [f"--{name}={getattr(options, name)}" for name in ("ranks", "steps", "batch", "seed")]
    rates = ["--rates", *map(str, options.rates)]
    command = [launcher, "-n", str(options.ranks), sys.executable, "-m", "cubn", "demo", *same, *rates]
    more_ranks_than_cores = {
        "OMPI_MCA_rmaps_base_oversubscribe": "1", "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_ALLOW_RUN_AS_ROOT": "1", "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    }  # fmt: skip
    threads = str(max(1, (os.cpu_count() or 1) // options.ranks))  # each rank its share, or they wait for one another
    sharing = {"NUMBA_NUM_THREADS": threads, "OMP_NUM_THREADS": threads, "CUBN_DEMO_RANK": "1"}
    return subprocess.run(command, env={**sharing, **environment, **more_ranks_than_cores}, check=False).returncode


def compare(options: argparse.Namespace, sync: cubn.sync.Sync) -> int:
    """Train on all ranks, then the same on rank 0 alone; rank 0 prints both curves."""
    rate = RATE if len(options.rates) != 1 else options.rates[0]
    settings = {"with_bn": True, "rate": rate, "steps": options.steps, "batch": options.batch, "seed": options.seed}
    shares = [len(part) for part in np.array_split(range(options.batch), sync.size)]
    if sync.rank == 0:
        print(
            f"{sync.size} ranks of MPI, {options.steps} steps of {options.batch} digits "
            f"({' + '.join(map(str, shares)) if sync.size <= 8 else f'{shares[-1]} to {shares[0]} each'}), "
            f"rate {rate:g}, seed {options.seed}, float64",
            flush=True,
        )
    start = perf_counter()
    together = train(**settings, dtype="float64", sync=sync)
    seconds = perf_counter() - start
    if sync.rank > 0:
        return 0
    start = perf_counter()
    alone = train(**settings, dtype="float64")
    print(f"\n{table(alone, together, sync.size)}\n")
    print(f"{seconds:.1f} s on {sync.size} ranks, {perf_counter() - start:.1f} s in one process.")
    apart = difference(alone, together)
    if not apart < AGREEMENT:
        print(f"error: the curves are {apart:.1e} apart, and rounding makes less than {AGREEMENT:g}.", file=sys.stderr)
        return 1
    print(f"The curve of {sync.size} ranks is that of one process: the losses are {apart:.0e} apart, by rounding.")
    return 0


def difference(one: History, other: History) -> float:
    """The largest of all losses' differences; infinite if an accuracy differs or a run ended before the other."""
    if not np.array_equal(one.steps, other.steps) or not np.array_equal(one.accuracy, other.accuracy):
        return float("inf")
    return float(np.nanmax(np.abs(one.loss - other.loss), initial=0.0))


def table(alone: History, together: History, ranks: int) -> str:
    """Loss and accuracy of both runs, at some of the steps."""
    lines = [
        f"{'':6}    {'one process':<20}    {ranks} rank{'s' * (ranks > 1)}",
        f"{'step':>6}" + 2 * f"    {'loss':>11} {'accuracy':>8}" + f"    {'apart':>8}",
    ]
    tests = len(alone.steps)
    for row in sorted({round(place) for place in np.linspace(0, tests - 1, min(SHOWN + 1, tests))} - {0}):
        cells = "".join(f"    {run.loss[row]:>11.8f} {run.accuracy[row] * 100:>6.1f} %" for run in (alone, together))
        lines.append(f"{alone.steps[row]:>6}{cells}    {abs(alone.loss[row] - together.loss[row]):>8.0e}")
    return "\n".join(lines)
