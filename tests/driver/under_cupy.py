"""Puts driver.c under CuPy, in this process: `import driver.under_cupy` before CuPy.

CuPy finds the driver by the name libcuda.so.1, which the library bears.  The runtime is linked into CuPy's binaries,
so the first bytes of each of its functions are overwritten, in memory, by a jump to the one of driver.c.

Attributes
----------
attributes : ctypes array of int
    What the devices say of themselves, by CUDA's number of the attribute; `limits` sets them by name.
"""

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from host import build

SOURCE = Path(__file__).with_name("driver.c")
FLAGS = ("-x", "c", "-std=gnu11", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wl,-soname,libcuda.so.1")
KNOWN = {"13.6", "14.2"}
"""Versions of CuPy that have run over it."""

PACKAGES = {"cupy-cuda12x": 12090, "cupy-cuda13x": 13000}
"""CuPy's package -> the version of CUDA that the stand-in claims."""

JUMP = b"\x48\xb8%b\xff\xe0"
"""mov rax, ADDRESS; jmp rax."""

PAGE = 4096
READ_WRITE_EXECUTE = 7

NUMBERS = {
    "MaxThreadsPerBlock": 1, "MaxGridDimX": 5, "MaxSharedMemoryPerBlock": 8, "WarpSize": 10, "MaxRegistersPerBlock": 12,
    "ClockRate": 13, "MultiProcessorCount": 16, "MemoryClockRate": 36, "GlobalMemoryBusWidth": 37, "L2CacheSize": 38,
    "MaxThreadsPerMultiProcessor": 39, "ComputeCapabilityMajor": 75, "ComputeCapabilityMinor": 76,
    "MaxSharedMemoryPerMultiprocessor": 81, "MaxRegistersPerMultiprocessor": 82, "CooperativeLaunch": 95,
    "MaxSharedMemoryPerBlockOptin": 97, "ReservedSharedMemoryPerBlock": 111, "ClusterLaunch": 120,
}  # fmt: skip
"""cudaDevAttr... of driver_types.h."""

H200 = {
    "MaxThreadsPerBlock": 1024, "MaxGridDimX": 2**31 - 1, "MaxSharedMemoryPerBlock": 49152, "WarpSize": 32,
    "MaxRegistersPerBlock": 65536, "ClockRate": 1_980_000, "MultiProcessorCount": 132, "MemoryClockRate": 3_201_000,
    "GlobalMemoryBusWidth": 6144, "L2CacheSize": 50 << 20, "MaxThreadsPerMultiProcessor": 2048,
    "ComputeCapabilityMajor": 9, "ComputeCapabilityMinor": 0, "MaxSharedMemoryPerMultiprocessor": 233472,
    "MaxRegistersPerMultiprocessor": 65536, "CooperativeLaunch": 1, "MaxSharedMemoryPerBlockOptin": 232448,
    "ReservedSharedMemoryPerBlock": 1024, "ClusterLaunch": 1,
}  # fmt: skip


class Counts(NamedTuple):
    """What was asked of the driver; a memset or a copy within CuPy's own kernels is a launch."""

    allocations: int
    frees: int
    launches: int
    synchronisations: int
    memsets: int
    copies: int

    def since(self, before: "Counts") -> "Counts":
        """What was asked of it between the two."""
        return Counts(*(now - then for now, then in zip(self, before, strict=True)))


def missing() -> str:
    """Why CuPy cannot run over the stand-in here, as a sentence; empty when it can."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return "the stand-in for a driver needs Linux on x86-64"
    if platform.libc_ver()[0] != "glibc":
        return "the stand-in needs glibc, which finds a library that is loaded by the name that it bears"
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        return (
            "there is a CUDA driver here, whose place the stand-in never takes; run the tests for a GPU, pytest -m gpu"
        )
    if "cupy" in sys.modules:
        return "CuPy is imported already, and the stand-in has to be there first"
    if importlib.util.find_spec("cupy") is None:
        return "the stand-in runs CuPy, which is not installed; pip install cupy-cuda13x"
    version = importlib.metadata.version(_package())
    if version.rpartition(".")[0] not in KNOWN:
        return f"the stand-in has not run CuPy {version}; it knows {', '.join(sorted(KNOWN))}"
    for program in (build.COMPILER, "nm"):
        if shutil.which(program) is None:
            return f"the stand-in is built by a C compiler, and there is no {program}"
    return ""


def counts() -> Counts:
    """So far."""
    return Counts(*_counts)


def limits(**values: int) -> None:
    """Set what the devices say of themselves, by the names of `NUMBERS`.  Who has asked already may remember."""
    for name, value in values.items():
        attributes[NUMBERS[name]] = value


@contextlib.contextmanager
def refusing(error: int) -> Iterator[None]:
    """Every launch fails with an error of the driver."""
    refusal = ctypes.c_int.in_dll(LIBRARY, "stand_in_refusal")
    refusal.value = error
    try:
        yield
    finally:
        refusal.value = 0


def connect(hook: str, function: object) -> None:
    """Let driver.c call a ctypes function, which the caller keeps alive, or none."""
    ctypes.c_void_p.in_dll(LIBRARY, f"stand_in_{hook}").value = ctypes.cast(function, ctypes.c_void_p).value


def _package() -> str:
    installed = {str(one.metadata["Name"]).lower() for one in importlib.metadata.distributions()}
    found = sorted(installed & PACKAGES.keys())
    if len(found) != 1:
        raise ImportError(f"the stand-in knows {' and '.join(PACKAGES)}; installed: {', '.join(found) or 'neither'}.")
    return found[0]


def _load() -> ctypes.CDLL:
    path = build._cached("driver", SOURCE.read_text(), lambda path: build._compile([*FLAGS, str(SOURCE)], path))
    return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _redirect() -> None:
    """Every function of CuPy's runtime that driver.c has."""
    import cupy_backends.cuda.api.runtime as runtime

    path = str(Path(runtime.__file__).resolve())
    table = subprocess.run(["nm", path], capture_output=True, text=True, check=True).stdout
    symbols = {name: int(offset, 16) for offset, name in re.findall(r"^(\w+) [tT] (cuda\w+)$", table, re.MULTILINE)}
    maps = Path("/proc/self/maps").read_text().splitlines()
    start = min((int(line.split("-")[0], 16) for line in maps if line.endswith(path)), default=0)
    if "cudaGetDevice" not in symbols or not start:
        raise ImportError(f"CUDA's runtime is not linked into {path}, so the stand-in cannot take its place.")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    for name, offset in symbols.items():
        # _v2: CUDA's later form of the same; _ptsz: the same on the stream of each thread
        function = getattr(LIBRARY, "stand_in_" + name.removesuffix("_ptsz").removesuffix("_v2"), None)
        if function is None:
            continue
        address = start + offset
        if libc.mprotect(address // PAGE * PAGE, 2 * PAGE, READ_WRITE_EXECUTE):
            reason = os.strerror(ctypes.get_errno())
            raise ImportError(f"this system does not let a process change its own code ({reason}); the stand-in must.")
        target = ctypes.cast(function, ctypes.c_void_p).value or 0
        ctypes.memmove(address, JUMP % target.to_bytes(8, "little"), 12)


if missing():
    raise ImportError(missing() + ".")
os.environ["CUPY_CACHE_DIR"] = str(build.cache_folder() / "cupy")
os.environ["CUPY_ACCELERATORS"] = ""  # CUB's kernels are beyond the executor
LIBRARY = _load()
attributes = (ctypes.c_int * 256).in_dll(LIBRARY, "stand_in_attributes")
_counts = (ctypes.c_int64 * len(Counts._fields)).in_dll(LIBRARY, "stand_in_counts")
ctypes.c_int.in_dll(LIBRARY, "stand_in_version").value = PACKAGES[_package()]
limits(**H200)
_redirect()
