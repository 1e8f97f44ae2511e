"""Computes what is launched: `import driver.computed` instead of `driver.under_cupy` alone.

Every kernel, cubn's and CuPy's own, is compiled to PTX once more and executed on the CPU by tests/host, in memory
that is the executor's: an access beside an array is a fault, and the launch fails with the fault's words.  CuPy's
pool would hide that, so `cupy.cuda.set_allocator(None)` gives every array memory of its own.

Attributes
----------
launches : list of Launched
    Launches of cubn's kernels since the list was last cleared, those of replayed graphs among them.
"""

import atexit
import ctypes
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from host import nvrtc
from host.build import machine
from host.executor import Kernel

from driver.under_cupy import LIBRARY, connect

import cupy  # isort: skip  # over the stand-in
import cupy.cuda.compiler  # isort: skip

LAUNCH_FAILED = 719
OF_CUPY = "cupy/carray.cuh"
"""Every kernel of CuPy's own includes it, and none of cubn's."""


class Launched(NamedTuple):
    """One launch."""

    name: str
    grid: int
    block: int
    cluster: int
    cooperative: bool


class Passed(Kernel):
    """Takes its arguments as the driver does: a table of their addresses."""

    def _cells(self, args: Any) -> list[np.ndarray]:
        return [np.frombuffer(value, np.uint8) for value in self.copied(args)]

    def copied(self, table: Any) -> list[bytes]:
        """What the launch was passed; the caller may write to the places when it has returned."""
        return [ctypes.string_at(table[i], parameter.size) for i, parameter in enumerate(self._parameters)]


launches: list[Launched] = []
_sources: dict[int, tuple[str, tuple[str, ...]]] = {}  # of each module
_kernels: dict[tuple[int, bytes], Passed] = {}
_graphs: dict[int, list[Callable[[], None]]] = {}


def _kernel(module: int, name: bytes) -> Passed:
    kernel = _kernels.get((module, name))
    if kernel is None:
        text, options = _sources[module]
        pairs = (option[2:].partition("=") for option in options if option.startswith("-D"))
        defines = {macro: value or "1" for macro, _, value in pairs}
        arch = 90 if "__cluster" in text else 80
        kernel = _kernels[module, name] = Passed(text, name.decode(), defines, arch, checked=False)
    return kernel


def _launch(
    module: int, name: bytes, grid: int, block: int, shared: int, arguments: Any, cooperative: int, graph: int | None
) -> int:
    def run(values: Any) -> None:
        kernel((grid,), (block,), values, shared_mem=shared, cooperative=bool(cooperative))
        if OF_CUPY not in _sources[module][0]:
            cluster = kernel._cluster[0] if kernel._cluster else 1
            launches.append(Launched(kernel.name, grid, block, cluster, bool(cooperative)))

    try:
        kernel = _kernel(module, name)
        if graph is None:
            run(arguments)
        else:
            kept = [ctypes.create_string_buffer(value, len(value)) for value in kernel.copied(arguments)]
            _graphs.setdefault(graph, []).append(lambda: run([ctypes.addressof(value) for value in kept]))
    except Exception as error:  # nothing may be raised through C
        return _failed(error)
    return 0


def _replay(graph: int) -> int:
    try:
        for run in _graphs.get(graph, []):
            run()
    except Exception as error:
        return _failed(error)
    return 0


def _failed(error: Exception) -> int:
    text = (ctypes.c_char * 2048).in_dll(LIBRARY, "stand_in_fault")
    text.value = f"{type(error).__name__}: {error}".encode()[:2000]
    return LAUNCH_FAILED


def _allocate(size: int) -> int | None:
    return machine().machine_allocate(size, 0, 1, 1, b"an array of CuPy's")


def _release(address: int) -> None:
    machine().machine_free(address)


def _remembering(compile_: Callable[..., Any]) -> Callable[..., Any]:
    def compiled(source: str, options: Any, *rest: Any, **more: Any) -> Any:
        module = compile_(source, options, *rest, **more)
        _sources[module.ptr] = source, tuple(options)
        return module

    return compiled


def _with_headers_of_cupy(toolkits: Callable[[], tuple[nvrtc.Toolkit, ...]]) -> Callable[[], tuple[nvrtc.Toolkit, ...]]:
    folder = Path(cupy.__file__).with_name("_core") / "include"
    folders = (folder, *sorted((folder / "cupy" / "_cccl").iterdir()))
    found = tuple(dataclasses.replace(toolkit, includes=(*folders, *toolkit.includes)) for toolkit in toolkits())
    return lambda: found


_pointer, _unsigned, _int = ctypes.c_void_p, ctypes.c_uint, ctypes.c_int
_table = ctypes.POINTER(_pointer)
_HOOKS = {
    "launch": ctypes.CFUNCTYPE(
        _int, _pointer, ctypes.c_char_p, _unsigned, _unsigned, _unsigned, _table, _int, _pointer
    )(_launch),
    "replay": ctypes.CFUNCTYPE(_int, _pointer)(_replay),
    "allocate": ctypes.CFUNCTYPE(_pointer, ctypes.c_size_t)(_allocate),
    "release": ctypes.CFUNCTYPE(None, _pointer)(_release),
}
for _hook, _function in _HOOKS.items():
    connect(_hook, _function)
atexit.register(connect, "release", None)  # CuPy frees memory when Python can no longer be called
cupy.cuda.compiler._compile_with_cache_cuda = _remembering(cupy.cuda.compiler._compile_with_cache_cuda)
nvrtc.toolkits = _with_headers_of_cupy(nvrtc.toolkits)
