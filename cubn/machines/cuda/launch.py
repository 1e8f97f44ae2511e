"""The machine named `cuda`: kernels compiled by NVRTC and launched by CuPy.  The only file that imports CuPy.

Everything runs on the device of its arrays and on CuPy's current stream of that device, without waiting for
either.  The first call of a kind compiles its kernels and sets memory for its workspace aside, which must not
happen while a stream is being captured: call once before the capture.  A captured graph uses the workspace of the
stream that it was captured on, so it must not run at the same time as other work of that stream.

Where float32 x (16-bit x too: it is computed in float32) can be summed: squares of distances within a channel
must stay in float32's range, so distances between 1e-18 and 1e18.  Numbers below 1.2e-38 count as zero, but in
a constant channel.  float64 x has the range of float64.

In the tests the kernels are executed on the CPU, thread for thread, and this file runs on the real CuPy over a stand-in
for the driver (`make test-cupy`); neither has yet run on a GPU.
"""

import ctypes
import importlib.util
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path
from struct import Struct
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from cubn.errors import DeviceError, KernelError
from cubn.machines.cuda.backend import WORKSPACE, Launch, Number, Operand, Part
from cubn.machines.cuda.machine import KernelMachine, typed_arguments
from cubn.machines.cuda.plan import VECTOR_BYTES, X_TYPES, DeviceLimits, LaunchPlan, largest_cluster
from cubn.machines.cuda.source import translation_unit
from cubn.namespace import Array
from cubn.problem import Problem

try:
    import cupy
except ImportError as error:
    raise DeviceError(
        f"the CUDA machine was asked for, but CuPy cannot be imported ({error}); "
        f"pip install 'cubn[cuda12]' or 'cubn[cuda13]', as the driver needs."
    ) from error

PER_THREAD_STREAM = 2
"""Handle of CUDA's per-thread default stream: one number, as many streams as threads."""

FIRST_PARTIALS, FIRST_COUNTERS = 1 << 20, 1 << 12
"""Bytes of a new workspace and its counters: enough for most tensors, so that it rarely has to grow."""

UNKNOWN_BANDWIDTH = 1000.0
"""GB/s, where the driver does not tell."""

LARGEST_PORTABLE_CLUSTER = 8
MAX_DYNAMIC_SHARED_SIZE_BYTES, NON_PORTABLE_CLUSTER_SIZE_ALLOWED = 8, 14
"""CU_FUNC_ATTRIBUTE_... of cuda.h; CuPy has a name for the first alone."""
CLUSTER_LAUNCH = 120
"""cudaDevAttrClusterLaunch of driver_types.h, likewise."""

NUMBERS = {int: "q", float: "d", np.int64: "q", np.int32: "i4x", np.float64: "d"}
"""Type of an argument that is a number -> its eight bytes in `struct`'s terms.  All others are addresses."""

MOST_PREPARED = 4096
"""Launches that are remembered; a program has that many only if its shapes never repeat."""

NOTHING: AbstractContextManager[Any] = nullcontext()

PackedLaunch: TypeAlias = Callable[[int, list[Any]], None]
"""A launch on a stream, given the arguments that are not packed yet."""

NOT_PACKED: tuple[None, tuple[str, ...], Any] = (None, (), None)

LAUNCH_ERRORS = (cupy.cuda.driver.CUDADriverError, cupy.cuda.runtime.CUDARuntimeError)


class Workspace(NamedTuple):
    """Memory that the blocks of a launch share, kept from launch to launch."""

    partials: Array
    arrivals: Array
    barriers: Array

    def suffices(self, plan: LaunchPlan) -> bool:
        """Whether the plan's blocks have room in it."""
        return bool(
            self.partials.size >= plan.partial_bytes
            and self.arrivals.size >= plan.arrivals
            and self.barriers.size >= plan.barriers
        )


class Named:
    """Stands for an argument whose value is not known yet, in a list of arguments."""

    def __init__(self, name: str, factor: int = 1) -> None:
        self.name, self.factor = name, factor

    def __rmul__(self, factor: int) -> "Named":
        return Named(self.name, factor * self.factor)


class Arguments:
    """Memory for the arguments of one launch: a slot of eight bytes for each, and the table of their addresses.

    The driver reads it during the call and never again, so it serves the next launch.
    """

    __slots__ = ("address", "slots", "table")

    def __init__(self, constant: bytes, places: list[int]) -> None:
        self.slots = (ctypes.c_uint64 * (len(constant) // 8)).from_buffer_copy(constant)
        start = ctypes.addressof(self.slots)
        self.table = (ctypes.c_void_p * len(places))(*(start + 8 * place for place in places))
        self.address = ctypes.addressof(self.table)


def packed_launch(
    kernel: "CompiledKernel",
    grid: int,
    block: int,
    order: list[Any],
    forms: Mapping[str, str],
    *,
    dynamic_bytes: int = 0,
    cooperative: bool = False,
) -> PackedLaunch:
    """A kernel's launch on a stream, with its arguments packed as far as they are the same in every launch.

    `order` are all arguments, `Named` for those that differ; a launch is given the values of these, addresses and
    numbers, in the order of `forms`, which has the form of each in `struct`'s terms.
    """
    factors = {value.name: value.factor for value in order if isinstance(value, Named)}
    constant = [value for value in order if not isinstance(value, Named)]
    names = list(forms)
    scaled = [(i, factors[name]) for i, name in enumerate(names) if factors[name] != 1]
    form = Struct("<" + "".join(forms.values()))
    constants = Struct("<" + "".join("Q" if value is None else NUMBERS[type(value)] for value in constant))
    template = bytes(form.size) + constants.pack(*(0 if value is None else value.item() for value in constant))
    slots = iter(range(len(names), len(order)))
    places = [names.index(value.name) if isinstance(value, Named) else next(slots) for value in order]
    idle: list[Arguments] = []
    pack = form.pack_into
    driver = cupy.cuda.driver
    start = driver.launchCooperativeKernel if cooperative else driver.launchKernel
    extra = () if cooperative else (0,)

    def launch(stream: int, values: list[Any]) -> None:
        for i, factor in scaled:
            values[i] *= factor
        try:
            arguments = idle.pop()
        except IndexError:
            arguments = Arguments(template, places)
        pack(arguments.slots, 0, *values)
        start(kernel.handle, grid, 1, 1, block, 1, 1, dynamic_bytes, stream, arguments.address, *extra)
        idle.append(arguments)

    return launch


WIDENING_BLOCK = 128
"""Threads of a block of widening.cu, one for each channel."""


class CompiledKernel:
    """One kernel of one device."""

    def __init__(self, function: Any) -> None:
        self.function = function  # CuPy's; it keeps the module loaded
        self.handle = int(function.ptr)
        self._dynamic_bytes = 0

    def allow(self, plan: LaunchPlan, limits: DeviceLimits) -> None:
        """Tell the driver what the plan needs beyond what every kernel may have."""
        driver = cupy.cuda.driver
        if (
            plan.dynamic_bytes > self._dynamic_bytes
            and plan.shared_bytes + plan.dynamic_bytes > limits.shared_per_block
        ):
            driver.funcSetAttribute(self.handle, MAX_DYNAMIC_SHARED_SIZE_BYTES, plan.dynamic_bytes)
            self._dynamic_bytes = plan.dynamic_bytes
        if plan.cluster > LARGEST_PORTABLE_CLUSTER:
            driver.funcSetAttribute(self.handle, NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)


class Thread(threading.local):
    """What a host thread has of the driver."""

    def __init__(self) -> None:
        self.devices: set[int] = set()  # whose contexts are there


class CupyBackend:
    """Memory, kernels and workspaces of every device of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.current_device: Callable[[], int] = cupy.cuda.runtime.getDevice
        self._kernels: dict[tuple[int, str, tuple[tuple[str, Any], ...]], CompiledKernel] = {}
        self._packed: dict[tuple[int, int], tuple[LaunchPlan, tuple[str, ...], PackedLaunch]] = {}
        self._equal: dict[tuple[int, LaunchPlan], tuple[tuple[str, ...], PackedLaunch]] = {}
        self._residents: dict[tuple[int, int], tuple[LaunchPlan, int]] = {}  # likewise
        self._workspaces: dict[tuple[int, int, int], Workspace] = {}
        self._outgrown: list[Workspace] = []  # a captured graph may still use them,
        self._captured: list[Any] = []  # as it does these copies and blocks, at every replay
        self.thread = Thread()

    def on_device_of(self, array: Array) -> AbstractContextManager[Any]:
        """The array's device as the current one."""
        device = array.device
        return NOTHING if device.id == cupy.cuda.runtime.getDevice() else device  # type: ignore[no-any-return]

    def limits(self) -> DeviceLimits:
        """Of the current device."""
        return limits_of(cupy.cuda.runtime.getDevice())

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """From CuPy's memory pool, in the order of the current stream."""
        try:
            return cupy.ndarray(shape, dtype)
        except cupy.cuda.memory.OutOfMemoryError as error:
            raise self._too_large(f"a result of shape {shape} and dtype {np.dtype(dtype)}", error) from error

    def block(self, size: int) -> Any:
        """Likewise: CuPy's pointer to memory, of which arrays are made when they are looked at."""
        try:
            return cupy.cuda.alloc(size)
        except cupy.cuda.memory.OutOfMemoryError as error:
            raise self._too_large(f"a block of {size} bytes for values per channel", error) from error

    def scratch(self, size: int) -> Any:
        """A block, kept for ever if the current stream is being captured."""
        block = self.block(size)
        if cupy.cuda.get_current_stream().is_capturing():
            self._captured.append(block)
        return block

    def _too_large(self, what: str, error: Exception) -> KernelError:
        return KernelError(
            f"{what} needs memory that {self.limits()} does not "
            f"have ({error}); pass a smaller batch, memory that is there as out, or free some, for example "
            f"with cupy.get_default_memory_pool().free_all_blocks()."
        )

    def view(self, block: Any, part: Part) -> Array:
        """An array whose memory begins there."""
        _, offset, shape, dtype = part
        return cupy.ndarray(shape, dtype, block + offset)

    def widening(self, problem: Problem) -> Callable[[Array, Array, Any], None]:
        """One launch, on the current stream."""
        device, channels = cupy.cuda.runtime.getDevice(), problem.channels
        if device not in self.thread.devices:
            self.enter_context(device)
        kernel = self._compiled("widening", (("X_TYPE", X_TYPES[problem.statistics_dtype]),))
        forms = dict.fromkeys(("mean", "var", "wide", "rstd"), "Q")
        order = [*map(Named, forms), np.int64(channels), np.float64(problem.eps)]
        packed = packed_launch(kernel, -(-channels // WIDENING_BLOCK), WIDENING_BLOCK, order, forms)

        def widen(mean: Array, var: Array, block: Any) -> None:
            if device not in self.thread.devices:
                self.enter_context(device)
            wide = block.ptr
            values = [mean.data.ptr, var.data.ptr, wide, wide + 8 * channels]
            try:
                packed(cupy.cuda.get_current_stream().ptr, values)
            except LAUNCH_ERRORS as error:
                raise KernelError(
                    f"widening of the statistics of {channels} channels did not launch on {self.limits()}: {error}."
                ) from error

        return widen

    def contiguous(self, array: Array, dtype: Any) -> Array:
        """The array itself, or a copy that kernels can read in vectors."""
        copy = cupy.ascontiguousarray(array, dtype)
        if copy.data.ptr % VECTOR_BYTES:
            copy = copy.copy()
        if copy is not array and cupy.cuda.get_current_stream().is_capturing():
            self._captured.append(copy)
        return copy

    def address(self, array: Array) -> int:
        """Of the first element, in bytes."""
        return int(array.data.ptr)

    def workspace(self, plan: LaunchPlan) -> Workspace:
        """One for each device and stream: kernels of one stream never run at the same time."""
        stream = cupy.cuda.get_current_stream().ptr
        thread = threading.get_ident() if stream == PER_THREAD_STREAM else 0
        key = (cupy.cuda.runtime.getDevice(), stream, thread)
        workspace = self._workspaces.get(key)
        if workspace is not None and workspace.suffices(plan):
            return workspace
        with self._lock:
            workspace = self._workspaces.get(key)
            if workspace is None or not workspace.suffices(plan):
                _require_no_capture(f"memory for {plan.partial_bytes} bytes of partial results")
                if workspace is not None:
                    self._outgrown.append(workspace)
                workspace = self._workspaces[key] = Workspace(
                    cupy.empty(max(FIRST_PARTIALS, 2 * plan.partial_bytes), np.uint8),
                    cupy.zeros(max(FIRST_COUNTERS, 2 * plan.arrivals), np.uint32),
                    cupy.zeros(max(FIRST_COUNTERS, 2 * plan.barriers), np.uint32),
                )
        return workspace

    def resident(self, plan: LaunchPlan) -> int:
        """Blocks of the plan's kernel that are on the current device at the same time; 0 where the driver refuses."""
        device = cupy.cuda.runtime.getDevice()
        known, found = self._residents.get((device, id(plan)), (None, 0))
        if known is not plan:
            self.enter_context(device)
            kernel = self._kernel(plan)
            try:
                kernel.allow(plan, self.limits())
                if plan.cluster > 1:
                    found = plan.cluster * _resident_clusters(kernel.handle, plan)
                else:
                    found = self.limits().processors * cupy.cuda.driver.occupancyMaxActiveBlocksPerMultiprocessor(
                        kernel.handle, plan.block, plan.dynamic_bytes
                    )
            except cupy.cuda.driver.CUDADriverError:
                found = 0
            if len(self._residents) >= MOST_PREPARED:
                self._residents.clear()
            self._residents[device, id(plan)] = (plan, found)
        return found

    def launch(self, plan: LaunchPlan, arguments: dict[str, Any]) -> None:
        """On the current stream."""
        device = cupy.cuda.runtime.getDevice()
        if device not in self.thread.devices:
            self.enter_context(device)
        known, names, packed = self._packed.get((device, id(plan)), NOT_PACKED)
        if known is not plan:
            names, packed = self._pack(device, plan, arguments)
        values = [
            0 if value is None else value if value.__class__ in NUMBERS else value.data.ptr
            for value in map(arguments.__getitem__, names)
        ]
        try:
            packed(cupy.cuda.get_current_stream().ptr, values)
        except LAUNCH_ERRORS as error:
            raise self.refused(plan, error) from error

    def bind(self, plan: LaunchPlan, arguments: Mapping[str, Any]) -> Launch:
        """On the current device."""
        device = cupy.cuda.runtime.getDevice()
        arrays = {name: value.place for name, value in arguments.items() if isinstance(value, Operand)}
        parts = {name: value for name, value in arguments.items() if isinstance(value, Part)}
        numbers = {name: value.place for name, value in arguments.items() if isinstance(value, Number)}
        known = {name: value for name, value in arguments.items() if name not in arrays | parts | numbers}
        shared = WORKSPACE if plan.partials else ()
        names = (*arrays, *sorted(parts, key=lambda name: parts[name].place), *numbers, *shared)
        order = typed_arguments(plan, dict.fromkeys(WORKSPACE) | known | {name: Named(name) for name in names})
        taken = {value.name for value in order if isinstance(value, Named)}  # of a workspace, not all
        forms = {name: "d" if name in numbers else "Q" for name in names if name in taken}
        launch = self._packed_launch(device, plan, order, forms)
        array_places, number_places = tuple(arrays.values()), tuple(numbers.values())
        offsets: dict[int, list[int]] = {}
        for part in sorted(parts.values()):
            offsets.setdefault(part.place, []).append(part.offset)
        blocks = tuple(offsets.items())
        workspace_places = tuple(WORKSPACE.index(name) for name in shared if name in taken)
        thread, current_stream = self.thread, cupy.cuda.get_current_stream

        def bound(operands: Sequence[Any]) -> None:
            if device not in thread.devices:
                self.enter_context(device)
            values = [operands[place].data.ptr for place in array_places]
            for place, rows in blocks:
                start = operands[place].ptr
                values += [start + row for row in rows]
            if number_places:
                values += [operands[place] for place in number_places]
            if workspace_places:
                workspace = self.workspace(plan)
                values += [workspace[place].data.ptr for place in workspace_places]
            try:
                launch(current_stream().ptr, values)
            except LAUNCH_ERRORS as error:
                raise self.refused(plan, error) from error

        return bound

    def refused(self, plan: LaunchPlan, error: Exception) -> KernelError:
        """What is said of a launch that the driver refuses."""
        return KernelError(f"{plan} did not launch on {self.limits()}: {error}.")

    def _pack(self, device: int, plan: LaunchPlan, arguments: dict[str, Any]) -> tuple[tuple[str, ...], PackedLaunch]:
        found = self._equal.get((device, plan))
        if found is None:
            order = typed_arguments(plan, {name: Named(name) for name in arguments})
            taken = {value.name for value in order if isinstance(value, Named)}
            forms = {name: NUMBERS.get(type(value), "Q") for name, value in arguments.items() if name in taken}
            found = tuple(forms), self._packed_launch(device, plan, order, forms)
            if len(self._equal) >= MOST_PREPARED:
                self._equal.clear()
                self._packed.clear()
            self._equal[device, plan] = found
            self._packed[device, id(plan)] = plan, *found  # holds the plan, and so its id
        return found

    def _packed_launch(self, device: int, plan: LaunchPlan, order: list[Any], forms: Mapping[str, str]) -> PackedLaunch:
        return packed_launch(
            self.kernel(device, plan), plan.grid, plan.block, order, forms,
            dynamic_bytes=plan.dynamic_bytes, cooperative=plan.cooperative,
        )  # fmt: skip

    def kernel(self, device: int, plan: LaunchPlan) -> CompiledKernel:
        """The plan's kernel, compiled and allowed what the plan needs."""
        if device not in self.thread.devices:
            self.enter_context(device)
        try:
            kernel = self._kernel(plan)
            kernel.allow(plan, self.limits())
        except LAUNCH_ERRORS as error:
            raise self.refused(plan, error) from error
        return kernel

    def enter_context(self, device: int) -> None:
        """A new thread has no context of a device before something of the runtime has run in it."""
        cupy.cuda.runtime.memGetInfo()
        self.thread.devices.add(device)

    def _kernel(self, plan: LaunchPlan) -> CompiledKernel:
        return self._compiled(plan.kernel, plan.constants, plan)

    def _compiled(
        self, name: str, constants: tuple[tuple[str, int], ...], plan: LaunchPlan | None = None
    ) -> CompiledKernel:
        """The kernel of that name, which is in the file of that name."""
        key = (cupy.cuda.runtime.getDevice(), name, constants)
        kernel = self._kernels.get(key)
        if kernel is None:
            with self._lock:
                kernel = self._kernels.get(key) or self._compile(name, constants, plan)
                self._kernels[key] = kernel
        return kernel

    def _compile(self, name: str, constants: tuple[tuple[str, int], ...], plan: LaunchPlan | None) -> CompiledKernel:
        _require_no_capture(f"the kernel {name}")
        options = ("-std=c++17", *(f"-D{macro}={value}" for macro, value in constants))
        raw = cupy.RawKernel(translation_unit(f"{name}.cu"), name, options)
        load_compiler()
        try:
            return CompiledKernel(raw.kernel)
        except Exception as error:  # NVRTC's, the driver's or the loader's: CuPy has a class for each
            raise KernelError(
                f"{plan or name} did not compile on {self.limits()} with CuPy {cupy.__version__} ({error}); the "
                f"compiler and the headers come with pip install 'cubn[cuda12]' or 'cubn[cuda13]', as the driver needs."
            ) from error


def _require_no_capture(what: str) -> None:
    if cupy.cuda.get_current_stream().is_capturing():
        raise KernelError(
            f"{what} is needed for the first time, but the current stream is being captured into a graph; "
            f"make the same call once before the capture."
        )


@lru_cache(maxsize=64)
def limits_of(device: int) -> DeviceLimits:
    """What a device can do, as its driver says."""
    runtime = cupy.cuda.runtime

    def attribute(name: str) -> int:
        return int(runtime.deviceGetAttribute(getattr(runtime, f"cudaDevAttr{name}"), device))

    arch = int(cupy.cuda.Device(device).compute_capability)
    bytes_per_s = attribute("MemoryClockRate") * 1000 * 2 * attribute("GlobalMemoryBusWidth") / 8  # 2: on both edges
    clusters = arch >= 90 and bool(runtime.deviceGetAttribute(CLUSTER_LAUNCH, device))
    return DeviceLimits(
        name=runtime.getDeviceProperties(device)["name"].decode(),
        arch=arch,
        processors=attribute("MultiProcessorCount"),
        threads_per_block=attribute("MaxThreadsPerBlock"),
        grid=attribute("MaxGridDimX"),
        shared_per_block=attribute("MaxSharedMemoryPerBlock"),
        shared_most=attribute("MaxSharedMemoryPerBlockOptin"),
        shared_per_processor=attribute("MaxSharedMemoryPerMultiprocessor"),
        registers=attribute("MaxRegistersPerMultiprocessor"),
        threads_per_processor=attribute("MaxThreadsPerMultiProcessor"),
        largest_cluster=largest_cluster(arch) if clusters else 1,
        cooperative=bool(attribute("CooperativeLaunch")),
        cache_bytes=attribute("L2CacheSize"),
        bandwidth=bytes_per_s / 1e9 or UNKNOWN_BANDWIDTH,
    )


def prove(device: int) -> DeviceLimits:
    """Train on a small batch on a device, and return what that device can do.

    Raises
    ------
    KernelError
        If something does not compile, does not launch, or comes out wrong; says what.
    """
    values = np.cos(np.arange(7 * 3 * 40, dtype=np.float32)).reshape(7, 3, 40)
    wide = values.astype(np.float64)
    exact = (wide - wide.mean((0, 2), keepdims=True)) / np.sqrt(wide.var((0, 2), keepdims=True) + 1e-5)
    problem = Problem(7, 3, 40, "float32", 1e-5, None)
    with cupy.cuda.Device(device):
        limits = limits_of(device)
        x = cupy.asarray(values)
        found = forward(problem, x, None, None)
        count = found.moments.count
        slope = backward(problem, x, x, found.moments.wide_mean, found.rstd, None, None, count).dx
        y, dx = cupy.asnumpy(found.y), cupy.asnumpy(slope)
    # dy = x, so dx = rstd * (x - mean - xhat * mean(x * xhat)) = rstd * (x - mean) * eps / (var + eps): nearly nothing
    errors = {"y": np.abs(y - exact).max(), "dx": np.abs(dx).max()}
    for name, error in errors.items():
        if not error < 1e-4:
            raise KernelError(f"{name} of a small batch is wrong by {error:.1e} on {limits}; do not rely on it there.")
    return limits


class LaunchConfig(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("dynamic_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.c_void_p),
        ("attribute_count", ctypes.c_uint),
    )


def _resident_clusters(handle: int, plan: LaunchPlan) -> int:
    """Of the current device; 0 where no cluster of the plan fits.  CuPy has no call for it, the driver has.

    The size of a cluster is part of the kernel, so the configuration need not say it.
    """
    library = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    ask = getattr(library, "cuOccupancyMaxActiveClusters", None)
    if ask is None:  # a driver from before clusters
        return 0
    config = LaunchConfig((plan.grid, 1, 1), (plan.block, 1, 1), plan.dynamic_bytes, None, None, 0)
    clusters = ctypes.c_int()
    status = ask(ctypes.byref(clusters), ctypes.c_void_p(handle), ctypes.byref(config))
    return 0 if status else clusters.value


@lru_cache(maxsize=1)
def load_compiler() -> None:
    """Load NVRTC from NVIDIA's package where CuPy 13 does not look for it; CuPy 14 finds it there by itself.

    A library that is loaded is found under its name.  Where there is none, CuPy says so when it compiles.
    """
    if int(cupy.__version__.partition(".")[0]) >= 14 or not sys.platform.startswith("linux"):
        return
    major = cupy.cuda.runtime.runtimeGetVersion() // 1000
    name = f"libnvrtc.so.{major}"
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or ())] if spec else []
    places = [root / folder / "lib" / name for root in roots for folder in ("cuda_nvrtc", f"cu{major}")]
    for library in (name, *(str(place) for place in places if place.is_file())):
        try:
            ctypes.CDLL(library)
            return
        except OSError:
            continue


MACHINE = KernelMachine("cuda", CupyBackend())
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
