"""Launches kernels on the host: the stand-in for a device and for CuPy's RawKernel.

x = device_array(np.arange(8, dtype=np.float32), name="x")
y = device_empty(8, np.float32, name="y")
double = Kernel(text, "double")
double((1,), (8,), (x, y, np.int64(8)))
assert double.traffic.of(x) == (32, 0)
"""

import ctypes
import json
import re
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .build import kernel_library, machine
from .translate import MOST_SHARED

MOST_THREADS = 1024
MESSAGE_SIZE = 2048


class Fault(RuntimeError):  # noqa: N818  it is the kernel's, and tests read better with the word
    """The kernel did something that is undefined, or that never ends, on a device."""


def device_empty(shape: Any, dtype: Any, name: str = "y", offset: int = 0) -> np.ndarray:
    """An array in device memory that holds poison, NaN or -1, until somebody writes it.

    It starts `offset` bytes after a 256-byte boundary.  Nothing else is near: an access beside it is a fault.
    """
    return _allocate(shape, dtype, name, offset, initialised=False)


def device_array(values: Any, name: str = "x", offset: int = 0) -> np.ndarray:
    """A copy of `values` in device memory, in C order."""
    values = np.asarray(values)
    array = _allocate(values.shape, values.dtype, name, offset, initialised=True)
    array[...] = values
    return array


def _allocate(shape: Any, dtype: Any, name: str, offset: int, *, initialised: bool) -> np.ndarray:
    dtype = np.dtype(dtype)
    shape = tuple(np.atleast_1d(np.asarray(shape, dtype=np.int64))) if shape != () else ()
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    granule = min(dtype.itemsize, 8)
    start = machine().machine_allocate(size, offset, granule, initialised, name.encode())
    if start is None:
        raise MemoryError(f"no address space for {size} bytes")
    memory = (ctypes.c_char * max(size, 1)).from_address(start)
    weakref.finalize(memory, machine().machine_free, start)
    return np.frombuffer(memory, np.uint8)[:size].view(dtype).reshape(shape)


def unwritten(array: np.ndarray) -> np.ndarray:
    """Where a whole array from `device_empty` still holds what nobody has written, as booleans of its shape."""
    if machine().machine_array_at(array.ctypes.data) != array.ctypes.data or not array.flags.c_contiguous:
        raise TypeError("unwritten() takes a whole array that device_empty or device_array returned.")
    mask = np.zeros(array.size, np.bool_)
    machine().machine_unwritten(array.ctypes.data, array.dtype.itemsize, mask.ctypes.data)
    return mask.reshape(array.shape)


@dataclass(frozen=True)
class Traffic:
    """Bytes of global memory that one launch read and wrote: every access counts, an atomic operation as both."""

    arrays: Mapping[int, tuple[int, int]]  # by address

    @property
    def read(self) -> int:
        """Bytes read, from all arrays."""
        return sum(read for read, _ in self.arrays.values())

    @property
    def written(self) -> int:
        """Bytes written, to all arrays."""
        return sum(written for _, written in self.arrays.values())

    def of(self, array: np.ndarray) -> tuple[int, int]:
        """(read, written) of the array, or of the whole one that it is a view of."""
        return self.arrays.get(machine().machine_array_at(array.ctypes.data), (0, 0))


class _SharedVariable(ctypes.Structure):
    _fields_ = [("offset", ctypes.c_uint32), ("size", ctypes.c_uint32)]


class _Launch(ctypes.Structure):  # mirrors Launch in machine/internals.h
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("run", "arguments", "sites", "shared")),
        *((name, ctypes.c_uint32) for name in ("shared_count", "shared_bytes", "shared_granule")),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        *((name, ctypes.c_uint32) for name in ("cluster", "cooperative", "checked")),
        *((name, ctypes.c_uint64) for name in ("seed", "steps", "switches", "barriers", "accesses")),
    ]


@dataclass(frozen=True)
class _Parameter:
    declaration: str
    type: str
    size: int
    is_struct: bool

    @property
    def is_pointer(self) -> bool | None:
        """PTX does not tell a pointer from a 64-bit integer; the declaration does, where it was found."""
        if self.type != "u64" or self.is_struct:
            return False
        return "*" in self.declaration if self.declaration else None


class Kernel:
    """One specialisation of a kernel, called as `kernel(grid, block, args)`.

    Parameters
    ----------
    text : str
        CUDA C with one `extern "C"` entry point called `name`.
    defines : mapping
        The macros that specialise it.
    arch : int
        The virtual architecture that NVRTC compiles for.
    checked : bool
        Whether launches look for races and uninitialised reads; bounds, alignment and traffic they always do.

    Attributes
    ----------
    traffic : Traffic
        What the last launch moved.
    statistics : dict
        Of the last launch: switches between threads, barriers (those of warps among them), accesses to memory.
    most_steps : int
        After so many backward branches, an access counting as 16, a launch is an endless loop: a few seconds.
    """

    most_steps = 1 << 30

    def __init__(
        self, text: str, name: str, defines: Mapping[str, object] | None = None, arch: int = 80, checked: bool = True
    ) -> None:
        self.name, self.checked = name, checked
        machine()
        path = kernel_library(text, name, defines or {}, arch)
        self._library = ctypes.PyDLL(str(path))
        description = json.loads(
            ctypes.c_char_p(ctypes.addressof(ctypes.c_char.in_dll(self._library, "kernel_description"))).value
        )
        declared = _declarations(text, name)
        parameters = description["parameters"]
        if len(declared) != len(parameters):
            declared = [""] * len(parameters)
        self._parameters = [_Parameter(d, *p) for d, p in zip(declared, parameters, strict=True)]
        self._max_threads = description["max_threads"]
        self._cluster = description["cluster"]
        self._shared = [_SharedVariable(*variable) for variable in description["shared"]]
        self._dynamic_offset, self._granule = description["dynamic_offset"], description["granule"]
        for symbol, size, label in description["variables"]:
            start = ctypes.addressof(ctypes.c_char.in_dll(self._library, symbol))
            machine().machine_free(start)  # the library may have been loaded before
            machine().machine_adopt(start, size, label.encode())
        self.traffic = Traffic({})
        self.statistics: dict[str, int] = {}

    def __call__(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        args: Sequence[Any],
        shared_mem: int = 0,
        cluster: int = 1,
        cooperative: bool = False,
        seed: int = 0,
    ) -> None:
        """Run the grid; raise `Fault` at the first thing that is undefined.

        `seed` chooses the schedule: 0 runs blocks and threads in ascending order as far as they get, 1 in
        descending order, any other number in an order drawn from it.
        """
        cells = self._cells(args)
        addresses = (ctypes.c_void_p * max(1, len(cells)))(*(cell.ctypes.data for cell in cells))
        if self._cluster:
            cluster = self._cluster[0]
        grid, block = _three(grid), _three(block)
        self._require_limits(grid, block, shared_mem, cluster)
        shared = [*self._shared, _SharedVariable(self._dynamic_offset, shared_mem)]
        variables = (_SharedVariable * len(shared))(*shared)
        library = self._library
        launch = _Launch(
            run=ctypes.cast(library.kernel_run, ctypes.c_void_p),
            arguments=ctypes.addressof(addresses),
            sites=ctypes.addressof(ctypes.c_void_p.in_dll(library, "kernel_sites")),
            shared=ctypes.addressof(variables),
            shared_count=len(shared),
            shared_bytes=self._dynamic_offset + shared_mem,
            shared_granule=self._granule,
            grid=grid,
            block=block,
            cluster=cluster,
            cooperative=cooperative,
            checked=self.checked,
            seed=seed,
            steps=self.most_steps,
        )
        message = ctypes.create_string_buffer(MESSAGE_SIZE)
        failed = machine().machine_launch(ctypes.addressof(launch), message, MESSAGE_SIZE)
        self.traffic = _traffic()
        self.statistics = {key: getattr(launch, key) for key in ("switches", "barriers", "accesses")}
        if failed:
            raise Fault(f"{self.name}: {message.value.decode()}")

    def _require_limits(self, grid: Any, block: Any, shared_mem: int, cluster: int) -> None:
        threads, blocks = int(np.prod(block)), int(np.prod(grid))
        most = min(self._max_threads or MOST_THREADS, MOST_THREADS)
        if not 0 < threads <= most:
            raise ValueError(f"{self.name} was given blocks of {threads} threads, but takes 1 to {most}.")
        if blocks < 1 or blocks % cluster:
            raise ValueError(
                f"{self.name} was given {blocks} blocks, which is no multiple of its cluster of {cluster}."
            )
        if blocks * threads >= 1 << 31:
            raise ValueError(f"{self.name} was given {blocks * threads} threads; the host counts below 2**31.")
        static = sum(variable.size for variable in self._shared)
        if static + shared_mem > MOST_SHARED:
            raise ValueError(
                f"{self.name} asks for {static} + {shared_mem} bytes of shared memory, "
                f"but no device has more than {MOST_SHARED}."
            )

    def _cells(self, args: Sequence[Any]) -> list[np.ndarray]:
        """Each argument as an array of one element that holds what the kernel is passed."""
        if len(args) != len(self._parameters):
            raise TypeError(f"{self.name} takes {len(self._parameters)} arguments, but was given {len(args)}.")
        return [self._cell(i, *pair) for i, pair in enumerate(zip(args, self._parameters, strict=True))]

    def _cell(self, number: int, argument: Any, parameter: _Parameter) -> np.ndarray:
        what = f"argument {number} of {self.name} ({parameter.declaration or parameter.type})"
        if argument is None or (isinstance(argument, np.ndarray) and argument.ndim > 0):
            if parameter.is_pointer is False or parameter.size != 8:
                raise TypeError(f"{what} is no pointer, but was given {'None' if argument is None else 'an array'}.")
            if argument is None:
                return np.zeros(1, np.uint64)
            if argument.size and machine().machine_array_at(argument.ctypes.data) is None:
                raise TypeError(f"{what} was given an array of the host; wrap it in device_array or device_empty.")
            return np.array([argument.ctypes.data], np.uint64)
        if not isinstance(argument, (np.generic, np.ndarray)):
            raise TypeError(f"{what} was given {argument!r}; pass a NumPy scalar, whose size is certain.")
        if parameter.is_pointer:
            raise TypeError(f"{what} is a pointer, but was given the scalar {argument!r}; pass a device array or None.")
        value = np.atleast_1d(argument)
        floating = parameter.type.startswith("f") and not parameter.is_struct
        if value.itemsize != parameter.size or (not parameter.is_struct and (value.dtype.kind in "fV") != floating):
            raise TypeError(f"{what} takes {parameter.size} bytes, but was given {argument!r} of type {value.dtype}.")
        return value


def _declarations(text: str, name: str) -> list[str]:
    """The kernel's parameters as its text declares them; empty when they are not plain to see."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
    match = re.search(rf"\b{re.escape(name)}\s*\(([^()]*)\)\s*\{{", text)
    if not match:
        return []
    return [" ".join(part.split()) for part in match[1].split(",") if part.strip()]


def _three(extent: Sequence[int]) -> Any:
    return (ctypes.c_uint32 * 3)(*[*extent, 1, 1][:3])


def _traffic() -> Traffic:
    room = machine().machine_traffic(0, None, None, None)
    starts, read, written = ((ctypes.c_uint64 * max(room, 1))() for _ in range(3))
    machine().machine_traffic(room, *(ctypes.addressof(column) for column in (starts, read, written)))
    return Traffic({starts[i]: (read[i], written[i]) for i in range(room)})
