"""The machine named `gpu`: NumPy in, NumPy out, computed by the CUDA kernels on a GPU.

For the suite of all machines, which holds NumPy arrays: every argument of a launch is copied to the device, to the
same distance from a vector boundary and with the same strides, and every result back.
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
    """Launches like CuPy's backend, but on copies of NumPy memory."""

    @cached_property
    def _device(self) -> Any:
        from cubn.machines.cuda.launch import CupyBackend  # needs CuPy, so not before it is used

        return CupyBackend()

    def on_device_of(self, array: np.ndarray) -> Any:
        return nullcontext()

    def limits(self) -> DeviceLimits:
        return self._device.limits()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        return np.empty(shape, dtype)

    def contiguous(self, array: np.ndarray, dtype: Any) -> np.ndarray:
        array = np.ascontiguousarray(array, dtype)
        return array if array.ctypes.data % 16 == 0 else array.copy()

    def address(self, array: np.ndarray) -> int:
        return array.ctypes.data

    def workspace(self, plan: LaunchPlan) -> Any:
        return self._device.workspace(plan)

    def launch(self, plan: LaunchPlan, arguments: dict[str, Any]) -> None:
        import cupy

        mirrors: dict[int, tuple[np.ndarray, Any]] = {}
        passed = {}
        for name, value in arguments.items():
            passed[name] = value
            if isinstance(value, np.ndarray):
                low, high = np.lib.array_utils.byte_bounds(value)
                if low not in mirrors:  # a result in place of an input shares its copy
                    host = np.ndarray(high - low, np.uint8, _bytes_at(low, high - low))
                    device = cupy.empty(high - low + 2 * BOUNDARY, np.uint8)
                    start = (low - device.data.ptr) % BOUNDARY
                    device = device[start : start + high - low]
                    device.set(host)
                    mirrors[low] = (host, device)
                passed[name] = np.uint64(mirrors[low][1].data.ptr + value.ctypes.data - low)
        self._device.launch(plan, passed)
        for name in KERNELS[plan.kernel][1].split():
            value = arguments[name]
            if isinstance(value, np.ndarray):
                low, high = np.lib.array_utils.byte_bounds(value)
                fetched = cupy.asnumpy(mirrors[low][1])
                value[...] = np.ndarray(
                    value.shape, value.dtype, fetched.data, value.ctypes.data - low, value.strides
                )  # fmt: skip


def _bytes_at(address: int, size: int) -> Any:
    return (ctypes.c_char * size).from_address(address)


MACHINE = KernelMachine("gpu", MirroringBackend())
name = MACHINE.name
moments = MACHINE.moments
normalize = MACHINE.normalize
gradient_sums = MACHINE.gradient_sums
input_gradient = MACHINE.input_gradient
forward = MACHINE.forward
backward = MACHINE.backward
