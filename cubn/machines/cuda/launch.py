"""The machine named `cuda`: kernels compiled by NVRTC and launched by CuPy.  The only file that imports CuPy.

Everything runs on the device of its arrays and on CuPy's current stream of that device, without waiting for
either.  The first call of a kind compiles its kernels and sets memory for its workspace aside, which must not
happen while a stream is being captured: call once before the capture.

Where float32 x (16-bit x too: it is computed in float32) can be summed: squares of distances within a channel
must stay in float32's range, so distances between 1e-18 and 1e18.  Numbers below 1.2e-38 count as zero, but in
a constant channel.  float64 x has the range of float64.

The kernels have been executed on the CPU, thread for thread, in the tests; this file has not yet run on a GPU.
"""

import threading
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import numpy as np

from cubn.errors import DeviceError, KernelError
from cubn.machines.cuda.machine import KernelMachine, typed_arguments
from cubn.machines.cuda.plan import VECTOR_BYTES, DeviceLimits, LaunchPlan
from cubn.machines.cuda.source import translation_unit
from cubn.namespace import Array

try:
    import cupy
except ImportError as error:
    raise DeviceError(
        f"the CUDA machine was asked for, but CuPy cannot be imported ({error}); "
        f"pip install 'cubn[cuda12]' or 'cubn[cuda13]', as the driver needs."
    ) from error

NULL = np.uint64(0)
"""A pointer to nothing.  CuPy would turn None into an argument that is missing altogether."""

PER_THREAD_STREAM = 2
"""Handle of CUDA's per-thread default stream: one number, as many streams as threads."""

FIRST_PARTIALS, FIRST_ARRIVALS = 1 << 20, 1 << 12
"""Bytes of a new workspace and its counters: enough for most tensors, so that it rarely has to grow."""

NOTHING: AbstractContextManager[Any] = nullcontext()


class CupyBackend:
    """Memory, kernels and workspaces of every device of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kernels: dict[tuple[int, str, tuple[tuple[str, int], ...]], Any] = {}
        self._workspaces: dict[tuple[int, int, int], tuple[Array, Array]] = {}
        self._outgrown: list[tuple[Array, Array]] = []  # a captured graph may still use them

    def on_device_of(self, array: Array) -> AbstractContextManager[Any]:
        """The array's device as the current one."""
        device = array.device
        return NOTHING if device.id == cupy.cuda.runtime.getDevice() else device  # type: ignore[no-any-return]

    def limits(self) -> DeviceLimits:
        """Of the current device."""
        return _limits(cupy.cuda.runtime.getDevice())

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """From CuPy's memory pool, in the order of the current stream."""
        try:
            return cupy.empty(shape, dtype)
        except cupy.cuda.memory.OutOfMemoryError as error:
            raise KernelError(
                f"a result of shape {shape} and dtype {np.dtype(dtype)} needs memory that {self.limits()} does not "
                f"have ({error}); pass a smaller batch, memory that is there as out, or free some, for example "
                f"with cupy.get_default_memory_pool().free_all_blocks()."
            ) from error

    def contiguous(self, array: Array, dtype: Any) -> Array:
        """The array itself, or a copy that kernels can read in vectors."""
        array = cupy.ascontiguousarray(array, dtype)
        return array if array.data.ptr % VECTOR_BYTES == 0 else array.copy()

    def address(self, array: Array) -> int:
        """Of the first element, in bytes."""
        return int(array.data.ptr)

    def workspace(self, plan: LaunchPlan) -> tuple[Array, Array]:
        """One for each device and stream: kernels of one stream never run at the same time."""
        stream = cupy.cuda.get_current_stream().ptr
        thread = threading.get_ident() if stream == PER_THREAD_STREAM else 0
        key = (cupy.cuda.runtime.getDevice(), stream, thread)
        workspace = self._workspaces.get(key)
        if workspace is not None and _suffices(workspace, plan):
            return workspace
        with self._lock:
            workspace = self._workspaces.get(key)
            if workspace is None or not _suffices(workspace, plan):
                _require_no_capture(f"memory for {plan.partial_bytes} bytes of partial results")
                if workspace is not None:
                    self._outgrown.append(workspace)
                partials = cupy.empty(max(FIRST_PARTIALS, 2 * plan.partial_bytes), np.uint8)
                arrivals = cupy.zeros(max(FIRST_ARRIVALS, 2 * plan.arrivals), np.uint32)
                workspace = self._workspaces[key] = (partials, arrivals)
        return workspace

    def launch(self, plan: LaunchPlan, arguments: dict[str, Any]) -> None:
        """On the current stream."""
        values = typed_arguments(plan, arguments)
        function = self._function(plan)
        try:
            function((plan.grid,), (plan.block,), tuple(NULL if value is None else value for value in values))
        except (cupy.cuda.driver.CUDADriverError, cupy.cuda.runtime.CUDARuntimeError) as error:
            raise KernelError(f"{plan} did not launch on {self.limits()}: {error}.") from error

    def _function(self, plan: LaunchPlan) -> Any:
        key = (cupy.cuda.runtime.getDevice(), plan.kernel, plan.constants)
        function = self._kernels.get(key)
        if function is None:
            with self._lock:
                function = self._kernels.get(key) or self._compile(plan)
                self._kernels[key] = function
        return function

    def _compile(self, plan: LaunchPlan) -> Any:
        _require_no_capture(f"the kernel {plan.kernel}")
        options = ("-std=c++17", *(f"-D{name}={value}" for name, value in plan.constants))
        kernel = cupy.RawKernel(translation_unit(f"{plan.kernel}.cu"), plan.kernel, options)
        try:
            return kernel.kernel
        except Exception as error:  # NVRTC's, the driver's or the loader's: CuPy has a class for each
            raise KernelError(
                f"{plan} did not compile on {self.limits()} with CuPy {cupy.__version__} ({error}); the compiler and "
                f"the headers come with pip install 'cubn[cuda12]' or 'cubn[cuda13]', as the driver needs."
            ) from error


def _suffices(workspace: tuple[Array, Array], plan: LaunchPlan) -> bool:
    partials, arrivals = workspace
    return bool(partials.size >= plan.partial_bytes and arrivals.size >= plan.arrivals)


def _require_no_capture(what: str) -> None:
    if cupy.cuda.get_current_stream().is_capturing():
        raise KernelError(
            f"{what} is needed for the first time, but the current stream is being captured into a graph; "
            f"make the same call once before the capture."
        )


@lru_cache(maxsize=64)
def _limits(device: int) -> DeviceLimits:
    runtime = cupy.cuda.runtime

    def attribute(name: str) -> int:
        return int(runtime.deviceGetAttribute(getattr(runtime, f"cudaDevAttr{name}"), device))

    return DeviceLimits(
        name=runtime.getDeviceProperties(device)["name"].decode(),
        arch=int(cupy.cuda.Device(device).compute_capability),
        processors=attribute("MultiProcessorCount"),
        threads_per_block=attribute("MaxThreadsPerBlock"),
        grid=attribute("MaxGridDimX"),
        shared_per_block=attribute("MaxSharedMemoryPerBlock"),
    )


MACHINE = KernelMachine("cuda", CupyBackend())
name = MACHINE.name
moments = MACHINE.moments
normalize = MACHINE.normalize
gradient_sums = MACHINE.gradient_sums
input_gradient = MACHINE.input_gradient
forward = MACHINE.forward
backward = MACHINE.backward
