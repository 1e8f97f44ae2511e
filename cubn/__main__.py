"""The command line: `python -m cubn demo`, `python -m cubn fold`, `python -m cubn info`, `python -m cubn plan`."""

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from typing import Any, NamedTuple

import numpy as np

import cubn
from cubn.demo import command as demo
from cubn.dispatch import MACHINES
from cubn.interop import command as fold
from cubn.machines.cuda import command as plan
from cubn.namespace import why_no_cuda

SERVES = {
    "reference": "every library of the array API standard",
    "cpu": "NumPy",
    "cuda": "CuPy",
}
"""Machine -> whose arrays it is made for."""


class Command(NamedTuple):
    """One subcommand: what `--help` says of it, its options, and what it does."""

    summary: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        Without the name of the program; those of this process if omitted.

    Returns
    -------
    int
        Exit status: 0 done, 1 done with a bad result, 130 interrupted.

    Raises
    ------
    SystemExit
        With status 2 for arguments that cannot be used, after a message; with 0 after `--help`.
    """
    parser = argparse.ArgumentParser(
        prog="python -m cubn", description="Batch normalisation for people who work with arrays."
    )
    parser.add_argument("--version", action="version", version=f"cubn {version()}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.summary,
            description=command.summary[0].upper() + command.summary[1:] + ".",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_options(subparser)
        subparser.set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    if not hasattr(options, "run"):
        parser.print_help()
        return 0
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130  # what a shell reports after Ctrl-C


def info(options: argparse.Namespace) -> int:
    """Print the versions, and which machines there are and why others are not."""
    print(f"cubn {version()}, Python {platform.python_version()}, NumPy {np.__version__}")
    print(f"CuPy: {why_no_cuda() or _cupy()}\n")
    rows = [("machine", "made for arrays of", "state here")]
    rows += [(name, SERVES.get(name, ""), _state(name)) for name in {**SERVES, **MACHINES}]
    first, second = (max(len(row[column]) for row in rows) for column in (0, 1))
    for machine, arrays, state in rows:
        print(f"{machine:<{first}}   {arrays:<{second}}   {state}")
    return 0


def version() -> str:
    """Of the installed package, or of this checkout where none is installed."""
    try:
        return metadata.version("cubn")
    except metadata.PackageNotFoundError:
        return cubn.__version__


def _state(machine: str) -> str:
    """Ready, or why not and what computes instead."""
    instead = f"{SERVES.get(machine, 'its')} arrays go through the reference"
    if machine not in MACHINES:
        what = "the CUDA kernels are " if machine == "cuda" else ""
        return f"{what}not part of this version; {instead}"
    try:
        if machine == "cuda":
            return _proved()
        import_module(MACHINES[machine])
        return f"ready, {_numba()}" if machine == "cpu" else "ready"
    except ImportError as error:
        return f"not ready: {error} (pip install 'cubn[{machine}]'); {instead}"


def _numba() -> str:
    import numba

    threads = numba.get_num_threads()
    return f"{threads} thread{'s' * (threads != 1)} (Numba {numba.__version__})"


def _cupy() -> str:
    import cupy

    runtime = cupy.cuda.runtime
    driver, toolkit = (
        f"{number // 1000}.{number % 1000 // 10}"
        for number in (runtime.driverGetVersion(), runtime.runtimeGetVersion())
    )
    names = (runtime.getDeviceProperties(device)["name"].decode() for device in range(runtime.getDeviceCount()))
    return f"{cupy.__version__}, {', '.join(names)} (driver for CUDA {driver}, runtime of CUDA {toolkit})"


def _proved() -> str:
    """What every device can do, once a small batch has come out right on it; or why it cannot be used."""
    missing = why_no_cuda()
    if missing is not None:
        return f"not ready: {missing}"
    try:
        import cupy

        launch = import_module(MACHINES["cuda"])
        devices = [launch.prove(device) for device in range(cupy.cuda.runtime.getDeviceCount())]
    except Exception as error:  # of CuPy, the compiler or the driver: whatever it is, the user should read it here
        return f"not ready: {error}"
    return "a small batch came out right on " + "; ".join(_described(limits) for limits in devices)


def _described(limits: Any) -> str:
    able = [
        f"{limits.shared_most / 1024:.0f} KB of shared memory a block",
        f"{limits.cache_bytes / 2**20:.0f} MB of second-level cache",
        f"clusters of {limits.largest_cluster}" if limits.largest_cluster > 1 else "no clusters",
        f"{'' if limits.cooperative else 'no '}cooperative launches",
    ]
    return f"{limits}, {', '.join(able)}"


def _no_options(parser: argparse.ArgumentParser) -> None:
    """For commands that take none."""


COMMANDS = {
    "demo": Command(demo.SUMMARY, demo.add_options, demo.run),
    "fold": Command(fold.SUMMARY, fold.add_options, fold.run),
    "plan": Command(plan.SUMMARY, plan.add_options, plan.run),
    "info": Command("show versions, and which machines compute here", _no_options, info),
}

if __name__ == "__main__":
    sys.exit(main())
