"""From a kernel's text to a shared library on disk: NVRTC, PTX, C++, g++.  Kept by content, so built once.

The cache is a folder under the user's cache directory, or CUBN_HOST_CACHE.  What is in it may be deleted at any
time.  Files appear under their final names complete, so several processes may share it.
"""

import contextlib
import ctypes
import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .nvrtc import compile_ptx, toolkit_for, toolkits
from .ptx import parse
from .translate import translate

MACHINE = Path(__file__).parent / "machine"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ("-std=c++20", "-fPIC", "-mfma", "-mf16c", "-ffp-contract=off", "-fno-strict-aliasing")
MACHINE_FLAGS = (*FLAGS, "-O2", "-fno-semantic-interposition", "-Wall", "-Wextra")
KERNEL_FLAGS = (*FLAGS, "-O1", "-w")
CPU_FEATURES = {"fma", "f16c"}


def missing() -> str:
    """Why kernels cannot be executed here, as a sentence; empty when they can."""
    if (sys.platform, platform.machine()) != ("linux", "x86_64"):
        return "executing kernels on the host needs Linux on x86-64"
    if not toolkits():
        return "executing kernels on the host needs NVRTC; pip install nvidia-cuda-nvrtc nvidia-cuda-runtime"
    if not any(toolkit.includes for toolkit in toolkits()):
        return "executing kernels on the host needs CUDA's headers; pip install nvidia-cuda-runtime"
    if shutil.which(COMPILER) is None:
        return f"executing kernels on the host needs a C++20 compiler, and there is no {COMPILER}"
    lacking = CPU_FEATURES - set(Path("/proc/cpuinfo").read_text().split())
    return f"executing kernels on the host needs a CPU with {', '.join(sorted(lacking))}" if lacking else ""


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    chosen = os.environ.get("CUBN_HOST_CACHE")
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(chosen) if chosen else Path(user, "cubn", "host")


def kernel_library(text: str, name: str, defines: Mapping[str, object], arch: int) -> Path:
    """The library of one specialisation, built unless it is there."""
    key = json.dumps([text, name, sorted((k, str(v)) for k, v in defines.items()), arch, toolkit_for(arch).version])

    def build(path: Path) -> None:
        code = translate(parse(compile_ptx(text, name, defines, arch), name))
        _compile([*KERNEL_FLAGS, f"-I{_headers()}", "-shared", "-x", "c++", "-"], path, code)

    return _cached(name, key, build)


@functools.cache
def machine() -> ctypes.PyDLL:
    """The library that runs translated kernels, loaded for them to find.

    A PyDLL keeps Python's lock: there is one machine, and two threads must not launch on it at once.
    """
    sources = sorted(str(path) for path in MACHINE.glob("*.cpp"))
    path = _cached("machine", "", lambda path: _compile([*MACHINE_FLAGS, "-shared", *sources], path))
    library = ctypes.PyDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.machine_allocate.restype = pointer
    library.machine_allocate.argtypes = [size, size, size, ctypes.c_int, ctypes.c_char_p]
    library.machine_adopt.argtypes = [pointer, size, ctypes.c_char_p]
    library.machine_free.argtypes = [pointer]
    library.machine_array_at.restype = pointer
    library.machine_array_at.argtypes = [pointer]
    library.machine_traffic.restype = size
    library.machine_traffic.argtypes = [size, pointer, pointer, pointer]
    library.machine_unwritten.argtypes = [pointer, size, pointer]
    library.machine_launch.argtypes = [pointer, ctypes.c_char_p, size]
    return library


def prebuild(kernels: Iterable[tuple[str, str, Mapping[str, object], int]], processes: int = 2) -> None:
    """Build many (text, name, defines, arch) side by side, so that the tests that follow find them built.

    Threads are enough: nearly all of the time is spent in NVRTC and in g++, which run outside of Python's lock.
    """
    machine()
    with ThreadPoolExecutor(processes) as pool:
        for _ in pool.map(lambda kernel: kernel_library(*kernel), kernels):
            pass


@functools.cache
def _toolchain() -> str:
    """Changes whenever something changes that may go into a build: the compiler, or a file of this folder."""
    version = subprocess.run([COMPILER, "-dumpfullversion"], capture_output=True, text=True, check=True).stdout
    here = Path(__file__).parent
    sources = [path for folder in (here, MACHINE) for path in sorted(folder.iterdir()) if path.is_file()]
    return hashlib.sha256("\0".join([COMPILER, version, *(path.read_text() for path in sources)]).encode()).hexdigest()


@functools.cache
def _headers() -> Path:
    """A folder with the headers of translated kernels, precompiled: that halves the time to build a small kernel."""

    def build(folder: Path) -> None:
        folder.mkdir()
        for header in MACHINE.glob("*.h"):
            shutil.copy(header, folder)
        _compile([*KERNEL_FLAGS, "-x", "c++-header", str(folder / "memory.h")], folder / "memory.h.gch")

    return _cached("headers", "", build)


def _cached(name: str, key: str, build: Callable[[Path], None]) -> Path:
    """The file or folder that `build` makes, made if it is not there; whole or not at all under its final name."""
    digest = hashlib.sha256(f"{_toolchain()}\0{key}".encode()).hexdigest()[:24]
    path = cache_folder() / f"{name}-{digest}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=path.parent) as folder:
            made = Path(folder, name)
            build(made)
            # Another process may have been faster.  Then its result is there, and as good.
            with contextlib.suppress(OSError):
                made.rename(path)
    return path


def _compile(arguments: list[str], path: Path, text: str | None = None) -> None:
    done = subprocess.run([COMPILER, *arguments, "-o", str(path)], input=text, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{COMPILER} {' '.join(arguments)}\n{done.stderr[-4000:]}")
