"""The machine named `gpu`: NumPy in, NumPy out, computed by the CUDA kernels on a GPU.

For the suite of all machines, which holds NumPy arrays: every argument of a launch is copied to the device, to the
same distance from a vector boundary and with the same strides, and every result back.  A result holds poison, NaN or
-1, until the kernel has written it.
"""

import ctypes
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import numpy as np

from cubn.machines.cuda.machine import KernelMachine
from cubn.machines.cuda.plan import KERNELS, DeviceLimits, LaunchPlan

BOUNDARY = 256


class MirroringBackend:
    """Launches as CuPy's backend does, but on copies of NumPy memory."""

    @cached_property
    def _device(self) -> Any:
        from cubn.machines.cuda.launch import CupyBackend  # needs CuPy, so not before it is used

        return CupyBackend()

    def on_device_of(self, array: np.ndarray) -> Any:
        return nullcontext()

    def limits(self) -> DeviceLimits:
        return self._device.limits()

    def resident(self, plan: LaunchPlan) -> int:
        return self._device.resident(plan)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        memory = np.full(size + BOUNDARY, 0xFF, np.uint8)
        start = -memory.ctypes.data % BOUNDARY
        return memory[start : start + size].view(dtype).reshape(shape)

    def contiguous(self, array: np.ndarray, dtype: Any) -> np.ndarray:
        array = np.ascontiguousarray(array, dtype)
        if array.ctypes.data % 16:
            aligned = self.empty(array.shape, array.dtype)
            aligned[...] = array
            array = aligned
        return array

    def address(self, array: np.ndarray) -> int:
        return array.ctypes.data

    def workspace(self, plan: LaunchPlan) -> Any:
        return self._device.workspace(plan)

    def launch(self, plan: LaunchPlan, arguments: dict[str, Any]) -> None:
        mirrors: list[_Mirror] = []
        passed = dict(arguments)
        for name, value in arguments.items():
            if isinstance(value, np.ndarray):
                mirror = next((mirror for mirror in mirrors if mirror.covers(value)), None)
                if mirror is None:
                    mirror = _Mirror(value)
                    mirrors.append(mirror)
                passed[name] = mirror.address(value)
        self._device.launch(plan, passed)
        for name in KERNELS[plan.kernel][1].split():
            value = arguments[name]
            if isinstance(value, np.ndarray):
                next(mirror for mirror in mirrors if mirror.covers(value)).fetch_into(value)


class _Mirror:
    """The place on the device of the bytes between the first and the last of a NumPy array."""

    def __init__(self, array: np.ndarray) -> None:
        import cupy

        self.low, self.high = _bounds(array)
        size = self.high - self.low
        memory = cupy.empty(size + BOUNDARY, np.uint8)
        start = (self.low - memory.data.ptr) % BOUNDARY
        self.memory = memory[start : start + size]
        self.memory.set(np.frombuffer((ctypes.c_char * size).from_address(self.low), np.uint8))

    def covers(self, array: np.ndarray) -> bool:
        low, high = _bounds(array)
        return self.low <= low and high <= self.high

    def address(self, array: np.ndarray) -> int:
        return int(self.memory.data.ptr) + array.ctypes.data - self.low

    def fetch_into(self, array: np.ndarray) -> None:
        fetched = self.memory.get()
        array[...] = np.ndarray(array.shape, array.dtype, fetched.data, array.ctypes.data - self.low, array.strides)


def _bounds(array: np.ndarray) -> tuple[int, int]:
    return np.lib.array_utils.byte_bounds(array) if array.size else (array.ctypes.data,) * 2


MACHINE = KernelMachine("gpu", MirroringBackend())
name = MACHINE.name
moments = MACHINE.moments
normalize = MACHINE.normalize
gradient_sums = MACHINE.gradient_sums
input_gradient = MACHINE.input_gradient
forward = MACHINE.forward
backward = MACHINE.backward
