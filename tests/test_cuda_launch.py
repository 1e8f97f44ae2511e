"""launch.py without a GPU: a stand-in for CuPy whose kernels are executed on the CPU.

What is tested is what launch.py itself decides: what is compiled and kept, whose workspace a call gets, what the
driver is asked and told, and which error comes of what.  The stand-in has only what launch.py uses of CuPy; an
attribute more and the test fails.  A kernel reads its arguments from the bytes that the driver would be handed.
"""

import ctypes
import dataclasses
import importlib
import itertools
import sys
import threading
import types
from contextlib import nullcontext

import numpy as np
import pytest
from host.build import missing
from host.executor import Kernel, device_array, device_empty

import cubn
from cubn.machines.cuda.plan import LaunchPlan, Memory, moments_plan
from cubn.problem import Problem

if missing():
    pytest.skip(missing(), allow_module_level=True)

LAUNCH = "cubn.machines.cuda.launch"
PROBLEM = Problem(700, 8, 1, "float32", 1e-5, None)

ATTRIBUTES = {
    "MultiProcessorCount": 2,
    "MaxThreadsPerBlock": 64,
    "MaxGridDimX": 3,
    "MaxSharedMemoryPerBlock": 49152,
    "MaxSharedMemoryPerBlockOptin": 101376,
    "MaxSharedMemoryPerMultiprocessor": 102400,
    "MaxRegistersPerMultiprocessor": 65536,
    "MaxThreadsPerMultiProcessor": 1536,
    "CooperativeLaunch": 1,
    "L2CacheSize": 1 << 20,
    "MemoryClockRate": 3_201_000,
    "GlobalMemoryBusWidth": 6144,
}


class Device(nullcontext):
    def __init__(self, number=0):
        super().__init__()
        self.id = number
        self.compute_capability = "80"


class Array(np.ndarray):
    """Executor memory with what launch.py reads and calls of a CuPy array."""

    @property
    def device(self):
        return Device(0)

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.ctypes.data)

    def copy(self):
        return device_array(self).view(Array)


class Stream:
    def __init__(self, ptr):
        self.ptr = ptr
        self.capturing = False

    def is_capturing(self):
        return self.capturing


class OutOfMemoryError(MemoryError):
    pass


class CUDARuntimeError(RuntimeError):
    pass


class CUDADriverError(RuntimeError):
    pass


class PackedKernel(Kernel):
    """Takes its arguments as cuLaunchKernel does: the address of a table of their addresses."""

    def _cells(self, args):
        table = (ctypes.c_void_p * len(self._parameters)).from_address(args)
        return [
            np.frombuffer((ctypes.c_char * parameter.size).from_address(address), np.uint8).copy()
            for address, parameter in zip(table, self._parameters, strict=True)
        ]


class RawKernel:
    """Compiles when its `kernel` is first asked for, as CuPy's does."""

    compiled: list = []  # noqa: RUF012
    by_handle: dict = {}  # noqa: RUF012
    handles = itertools.count(1)

    def __init__(self, code, name, options=()):
        self.code, self.name, self.options = code, name, options

    @property
    def kernel(self):
        assert self.options[0] == "-std=c++17"
        defines = dict(option[2:].split("=") for option in self.options[1:])
        kernel = PackedKernel(self.code, self.name, defines=defines)
        RawKernel.compiled.append(self.name)
        handle = next(RawKernel.handles)
        RawKernel.by_handle[handle] = kernel
        return types.SimpleNamespace(ptr=handle)


class Driver:
    """What launch.py calls of cupy.cuda.driver, and what it was told."""

    CUDADriverError = CUDADriverError

    def __init__(self):
        self.launched = []
        self.told = []
        self.occupancy = 2

    def launchKernel(self, handle, gx, gy, gz, bx, by, bz, shared, stream, table, extra):  # noqa: N802
        assert (gy, gz, by, bz, extra) == (1, 1, 1, 1, 0)
        self.launched.append(("plain", gx, bx, shared, stream))
        RawKernel.by_handle[handle]((gx,), (bx,), table, shared_mem=shared)

    def launchCooperativeKernel(self, handle, gx, gy, gz, bx, by, bz, shared, stream, table):  # noqa: N802
        assert (gy, gz, by, bz) == (1, 1, 1, 1)
        self.launched.append(("cooperative", gx, bx, shared, stream))
        RawKernel.by_handle[handle]((gx,), (bx,), table, shared_mem=shared, cooperative=True)

    def funcSetAttribute(self, handle, attribute, value):  # noqa: N802
        self.told.append((attribute, value))

    def occupancyMaxActiveBlocksPerMultiprocessor(self, handle, block, shared):  # noqa: N802
        if self.occupancy is None:
            raise CUDADriverError("CUDA_ERROR_INVALID_VALUE")
        return self.occupancy


@pytest.fixture
def cupy(monkeypatch):
    """The stand-in, where `import cupy` finds it, and launch.py imported with it."""
    stand_in = types.ModuleType("cupy")
    contexts = []
    attributes = {**ATTRIBUTES, 120: 0}
    runtime = types.SimpleNamespace(
        getDevice=lambda: 0,
        CUDARuntimeError=CUDARuntimeError,
        getDeviceProperties=lambda device: {"name": b"Stand-in"},
        deviceGetAttribute=lambda attribute, device: attributes[attribute],
        memGetInfo=lambda: contexts.append(threading.get_ident()),
        runtimeGetVersion=lambda: 12090,
        **{f"cudaDevAttr{name}": name for name in ATTRIBUTES},
    )
    vars(stand_in).update(
        __version__="14.2.0",
        RawKernel=RawKernel,
        empty=lambda shape, dtype: device_empty(shape, dtype).view(Array),
        zeros=lambda shape, dtype: device_array(np.zeros(shape, dtype)).view(Array),
        ascontiguousarray=lambda array, dtype: (
            array if array.dtype == dtype else device_array(np.asarray(array, dtype)).view(Array)
        ),
        cuda=types.SimpleNamespace(
            runtime=runtime,
            driver=Driver(),
            memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            get_current_stream=lambda: stand_in.stream,
            Device=Device,
        ),
        stream=Stream(7),
        contexts=contexts,
        attributes=attributes,
    )
    monkeypatch.setitem(sys.modules, "cupy", stand_in)
    monkeypatch.delitem(sys.modules, LAUNCH, raising=False)
    RawKernel.compiled = []
    yield stand_in
    sys.modules.pop(LAUNCH, None)


@pytest.fixture
def launch(cupy):
    return importlib.import_module(LAUNCH)


@pytest.fixture
def x():
    return device_array(np.random.default_rng(0).normal(3, 2, (700, 8, 1)).astype("float32")).view(Array)


def test_a_pass_through_launch_computes_what_it_must(launch, x):
    y, batch, rstd, *_ = launch.forward(PROBLEM, x, None, None)
    wide = np.asarray(x, "float64")
    np.testing.assert_allclose(batch.wide_mean, wide.mean((0, 2)), rtol=1e-7)
    exact = (wide - wide.mean((0, 2))[:, None]) / np.sqrt(wide.var((0, 2)) + 1e-5)[:, None]
    np.testing.assert_allclose(y, exact, rtol=0, atol=1e-6 * 5)
    dx = launch.backward(PROBLEM, x, x, batch.wide_mean, rstd, None, None, batch.count).dx
    assert np.abs(dx).max() < 1e-4  # dy = x has no gradient but eps's


def test_a_device_is_proved_by_a_small_batch_that_comes_out_right(launch, cupy, monkeypatch):
    cupy.asarray = lambda values: device_array(values).view(Array)
    cupy.asnumpy = np.asarray
    assert launch.prove(0) == launch.MACHINE.backend.limits()
    spoilt = launch.translation_unit

    def without_eps(file):
        return spoilt(file).replace("+ eps;", "+ eps + 100.0;")

    monkeypatch.setattr(launch, "translation_unit", without_eps)
    launch.MACHINE.backend.__init__()  # forget what was compiled
    with pytest.raises(cubn.KernelError, match=r"y of a small batch is wrong by .* on Stand-in \(sm_80"):
        launch.prove(0)


def test_a_kernel_is_compiled_once(launch, x):
    for _ in range(3):
        launch.forward(PROBLEM, x, None, None)
    assert len(set(RawKernel.compiled)) == len(RawKernel.compiled) > 0


def test_every_stream_has_a_workspace_of_its_own_and_keeps_it(launch, cupy, x):
    launch.moments(PROBLEM, x)
    launch.moments(PROBLEM, x)
    cupy.stream = Stream(8)
    launch.moments(PROBLEM, x)
    workspaces = launch.MACHINE.backend._workspaces
    assert {stream for _, stream, _ in workspaces} == {7, 8}
    memories = [array.ctypes.data for workspace in workspaces.values() for array in workspace]
    assert len(set(memories)) == 6
    assert not any(workspace.arrivals.any() for workspace in workspaces.values())


def test_the_per_thread_stream_is_a_stream_for_each_thread(launch, cupy, x):
    cupy.stream = Stream(2)
    launch.moments(PROBLEM, x)
    thread = threading.Thread(target=launch.moments, args=(PROBLEM, x))
    thread.start()
    thread.join()
    assert len(launch.MACHINE.backend._workspaces) == 2


def test_an_outgrown_workspace_is_kept_for_the_graphs_that_hold_it(launch, x, monkeypatch):
    monkeypatch.setattr(launch, "FIRST_PARTIALS", 16)
    launch.moments(PROBLEM, x)
    backend = launch.MACHINE.backend
    (first,) = backend._workspaces.values()
    wide = device_array(np.ones((700, 200, 1), "float32")).view(Array)
    launch.moments(Problem(700, 200, 1, "float32", 1e-5, None), wide)
    (second,) = backend._workspaces.values()
    assert second.partials.size > first.partials.size
    assert [workspace is first for workspace in backend._outgrown] == [True]


def test_a_first_call_during_a_capture_is_refused_in_words(launch, cupy, x):
    cupy.stream.capturing = True
    with pytest.raises(cubn.KernelError, match="once before the capture"):
        launch.moments(PROBLEM, x)
    cupy.stream.capturing = False
    launch.moments(PROBLEM, x)
    cupy.stream.capturing = True
    launch.moments(PROBLEM, x)


def test_copies_made_during_a_capture_are_kept_for_its_graph(launch, cupy):
    narrow = device_array(np.ones(8, np.float32)).view(Array)
    backend = launch.MACHINE.backend
    assert backend.contiguous(narrow, np.dtype("float32")) is narrow
    backend.contiguous(narrow, np.dtype("float64"))
    assert backend._captured == []
    cupy.stream.capturing = True
    assert backend.contiguous(narrow, np.dtype("float32")) is narrow
    copy = backend.contiguous(narrow, np.dtype("float64"))
    assert [kept is copy for kept in backend._captured] == [True]


def test_a_kernel_that_does_not_compile_says_what_to_install(launch, x, monkeypatch):
    monkeypatch.setattr(launch, "translation_unit", lambda file: "this is no CUDA")
    with pytest.raises(cubn.KernelError, match=r"(?s)moments<<<.*did not compile on Stand-in.*cubn\[cuda12\]"):
        launch.moments(PROBLEM, x)


def test_a_launch_that_fails_names_plan_and_device(launch, cupy, x, monkeypatch):
    def refuse(*_):
        raise CUDADriverError("CUDA_ERROR_INVALID_VALUE")

    monkeypatch.setattr(cupy.cuda.driver, "launchKernel", refuse)
    with pytest.raises(cubn.KernelError, match=r"moments<<<.*on Stand-in \(sm_80.*INVALID_VALUE"):
        launch.moments(PROBLEM, x)


def test_too_little_memory_says_what_was_asked_for(launch, cupy, x):
    def refuse(shape, dtype):
        raise OutOfMemoryError("Out of memory allocating 44,800 bytes")

    cupy.empty = refuse
    with pytest.raises(cubn.KernelError, match=r"of shape \(2, 8\) and dtype float64.*44,800.*smaller batch"):
        launch.moments(PROBLEM, x)


TEXT = {
    "wait": """
extern "C" __global__ void wait(unsigned *counter, const float *x, float *y, long long n, int step, double scale)
{
    extern __shared__ float held[];
    held[threadIdx.x] = x[blockIdx.x * step + threadIdx.x];
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(counter, 1);
        while (atomicAdd(counter, 0) < gridDim.x) ;
    }
    __syncthreads();
    if (blockIdx.x * step + threadIdx.x < n) y[blockIdx.x * step + threadIdx.x] = held[threadIdx.x] * scale;
}
""",
}
"""A kernel whose blocks wait for one another: it hangs, and the executor says so, unless it is cooperative."""


@pytest.fixture
def wait(launch, cupy, monkeypatch):
    """A plan of that kernel, and its launch."""
    tiles = moments_plan(PROBLEM, launch.MACHINE.backend.limits(), Memory()).tiles
    plan = LaunchPlan("wait", 3, 32, (), tiles, dynamic_bytes=128, cooperative=True)
    monkeypatch.setattr(launch, "translation_unit", lambda file: TEXT[file.removesuffix(".cu")])
    monkeypatch.setattr(launch, "typed_arguments", lambda plan, arguments: list(arguments.values()))
    x = device_array(np.arange(96, dtype=np.float32)).view(Array)

    def run(plan):
        y = device_array(np.zeros(96, np.float32)).view(Array)
        counter = device_array(np.zeros(1, np.uint32)).view(Array)
        arguments = {
            "counter": counter, "x": x, "y": y, "n": np.int64(90), "step": np.int32(32), "scale": np.float64(0.5)
        }  # fmt: skip
        launch.MACHINE.backend.launch(plan, arguments)
        return y

    return types.SimpleNamespace(plan=plan, run=run)


def test_a_cooperative_plan_is_launched_cooperatively_with_its_shared_memory(launch, cupy, wait):
    y = wait.run(wait.plan)
    np.testing.assert_array_equal(y[:90], np.arange(90) / 2)
    assert not y[90:].any()
    assert cupy.cuda.driver.launched == [("cooperative", 3, 32, 128, 7)]
    assert cupy.cuda.driver.told == []  # 128 bytes need no permission


def test_shared_memory_beyond_what_every_block_has_is_asked_for_once_and_never_less(launch, cupy, wait):
    for dynamic_bytes in (60000, 60000, 50000, 90000, 60000):
        wait.run(dataclasses.replace(wait.plan, dynamic_bytes=dynamic_bytes))
    assert cupy.cuda.driver.told == [(8, 60000), (8, 90000)]
    assert [launched[3] for launched in cupy.cuda.driver.launched] == [60000, 60000, 50000, 90000, 60000]


def test_a_cluster_larger_than_any_device_must_have_is_allowed_first(launch, cupy, wait, monkeypatch):
    monkeypatch.setattr(PackedKernel, "__call__", lambda *_, **__: None)
    for cluster in (8, 16):
        wait.run(dataclasses.replace(wait.plan, cooperative=False, cluster=cluster, grid=16))
    assert cupy.cuda.driver.told == [(14, 1)]
    assert [launched[0] for launched in cupy.cuda.driver.launched] == ["plain", "plain"]


def test_resident_blocks_are_what_the_driver_says_of_one_processor_times_all(launch, cupy, wait):
    backend = launch.MACHINE.backend
    assert backend.resident(wait.plan) == 2 * 2
    cupy.cuda.driver.occupancy = 7
    assert backend.resident(wait.plan) == 4  # asked once
    assert backend.resident(dataclasses.replace(wait.plan, dynamic_bytes=90000)) == 14
    assert cupy.cuda.driver.told == [(8, 90000)]  # before it is asked, or the answer would be none
    cupy.cuda.driver.occupancy = None
    assert backend.resident(dataclasses.replace(wait.plan, dynamic_bytes=95000)) == 0


def test_resident_clusters_are_asked_of_the_driver_itself(launch, wait, monkeypatch):
    asked = []

    def occupancy(clusters, handle, config):
        config = config._obj
        asked.append((list(config.grid), list(config.block), config.dynamic_bytes, config.attribute_count))
        clusters._obj.value = 5
        return status

    library = types.SimpleNamespace(cuOccupancyMaxActiveClusters=occupancy)
    monkeypatch.setattr(launch.ctypes, "CDLL", lambda name: library)
    plan = dataclasses.replace(wait.plan, cooperative=False, cluster=4, grid=8)
    status = 0
    assert launch.MACHINE.backend.resident(plan) == 20
    assert asked == [([8, 1, 1], [32, 1, 1], 128, 0)]
    status = 1  # CUDA_ERROR_INVALID_VALUE
    assert launch.MACHINE.backend.resident(dataclasses.replace(plan, grid=4)) == 0
    status = 0
    monkeypatch.setattr(launch.ctypes, "CDLL", lambda name: types.SimpleNamespace())  # an old driver
    assert launch.MACHINE.backend.resident(dataclasses.replace(plan, grid=12)) == 0


def test_the_configuration_of_a_launch_is_laid_out_as_cuda_lays_it_out(launch):
    offsets = {name: getattr(launch.LaunchConfig, name).offset for name, _ in launch.LaunchConfig._fields_}
    assert offsets == {
        "grid": 0, "block": 12, "dynamic_bytes": 24, "stream": 32, "attributes": 40, "attribute_count": 48
    }  # fmt: skip
    assert ctypes.sizeof(launch.LaunchConfig) == 56


def test_limits_are_those_that_the_driver_gives(launch, cupy):
    limits = launch.MACHINE.backend.limits()
    assert (limits.name, limits.arch, limits.processors) == ("Stand-in", 80, 2)
    assert (limits.shared_per_block, limits.shared_most, limits.shared_per_processor) == (49152, 101376, 102400)
    assert (limits.registers, limits.threads_per_processor, limits.cache_bytes) == (65536, 1536, 1 << 20)
    assert limits.cooperative
    assert limits.largest_cluster == 1
    assert limits.bandwidth == pytest.approx(4917, abs=1)  # an H200's, GB/s
    cupy.attributes["MemoryClockRate"] = 0
    launch.limits_of.cache_clear()
    assert launch.MACHINE.backend.limits().bandwidth > 0  # where the driver does not tell


@pytest.mark.parametrize(("arch", "launches", "largest"), [("80", 0, 1), ("90", 1, 8), ("90", 0, 1)])
def test_clusters_are_there_where_architecture_and_driver_say_so(launch, cupy, monkeypatch, arch, launches, largest):
    cupy.attributes[120] = launches  # cudaDevAttrClusterLaunch
    device = Device()
    device.compute_capability = arch
    monkeypatch.setattr(cupy.cuda, "Device", lambda number: device)
    assert launch.limits_of(0).largest_cluster == largest


def test_every_thread_enters_the_context_once(launch, cupy, x):
    def call():
        for _ in range(3):
            launch.moments(PROBLEM, x)

    call()
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert len(cupy.contexts) == len(set(cupy.contexts)) == 2


def test_arguments_that_the_driver_is_still_reading_are_not_overwritten(launch, cupy, x, monkeypatch):
    """A launch that is overtaken by another of the same kernel while the driver has let go of Python's lock."""
    launch.moments(PROBLEM, x)  # compiled, and its memory for arguments is free
    other = device_array(np.zeros((700, 8, 1), np.float32)).view(Array)
    launch_kernel = cupy.cuda.driver.launchKernel
    overtaken = []

    def overtake(*values):
        if not overtaken:
            overtaken.append(True)
            thread = threading.Thread(target=launch.moments, args=(PROBLEM, other))
            thread.start()
            thread.join()
        launch_kernel(*values)

    monkeypatch.setattr(cupy.cuda.driver, "launchKernel", overtake)
    mean = launch.moments(PROBLEM, x).wide_mean
    np.testing.assert_allclose(mean, np.asarray(x, "float64").mean((0, 2)), rtol=1e-7)


@pytest.mark.parametrize(("version", "asked"), [("13.6.0", True), ("14.0.1", False)])
def test_cupy_13_is_given_the_compiler_of_nvidias_package(launch, cupy, monkeypatch, version, asked):
    """CuPy 13 asks the loader for a name; a library that is loaded is found under it."""
    tried = []

    def load(library):
        tried.append(library)
        if library == "libnvrtc.so.12":
            raise OSError("no such file")

    monkeypatch.setattr(cupy, "__version__", version)
    monkeypatch.setattr(launch.ctypes, "CDLL", load)
    launch.load_compiler()
    assert bool(tried) == asked
    if asked:
        assert tried[0] == "libnvrtc.so.12"
        assert tried[1].endswith("nvidia/cuda_nvrtc/lib/libnvrtc.so.12")


def test_without_cupy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.delitem(sys.modules, LAUNCH, raising=False)
    with pytest.raises(cubn.DeviceError, match=r"CuPy cannot be imported.*pip install 'cubn\[cuda12\]'"):
        importlib.import_module(LAUNCH)
