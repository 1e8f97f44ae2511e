"""The machine named `gpu`: NumPy in, NumPy out, computed by the CUDA kernels on a GPU.

For the suite of all machines, which holds NumPy arrays: every argument of a launch is copied to the device, to the
same distance from a vector boundary and with the same strides, and every result back.  A result holds poison, NaN or
-1, until the kernel has written it.
"""

import ctypes
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import numpy as np

from cubn.machines.cuda.backend import Launch, LaunchByName, Part
from cubn.machines.cuda.machine import KernelMachine
from cubn.machines.cuda.plan import KERNELS, DeviceLimits, LaunchPlan
from cubn.problem import Problem

BOUNDARY = 256


class MirroringBackend:
    """Launches as CuPy's backend does, but on copies of NumPy memory."""

    @cached_property
    def _device(self) -> Any:
        from cubn.machines.cuda.launch import CupyBackend  # needs CuPy, so not before it is used

        return CupyBackend()

    def current_device(self) -> int:
        return self._device.current_device()

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

    def block(self, size: int) -> np.ndarray:
        return self.empty((size,), np.uint8)

    scratch = block

    def view(self, block: np.ndarray, part: Part) -> np.ndarray:
        return np.ndarray(part.shape, part.dtype, block, part.offset)

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

    def bind(self, plan: LaunchPlan, arguments: Mapping[str, Any]) -> Launch:
        return LaunchByName(self, plan, arguments)

    def widening(self, problem: Problem) -> Callable[[np.ndarray, np.ndarray, np.ndarray], None]:
        import cupy

        widen = self._device.widening(problem)

        def on_copies(mean: np.ndarray, var: np.ndarray, block: np.ndarray) -> None:
            memory = cupy.cuda.alloc(block.size)
            widen(cupy.asarray(mean), cupy.asarray(var), memory)
            block[...] = cupy.ndarray(block.shape, np.uint8, memory).get()

        return on_copies

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
prepare_forward = MACHINE.prepare_forward
prepare_backward = MACHINE.prepare_backward
prepare_inference = MACHINE.prepare_inference
