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
from cubn.layout import MemoryOrder
from cubn.machines import Running
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


class Pointer:
    """Memory, as CuPy hands it out and makes arrays of."""

    def __init__(self, memory, offset=0):
        self.memory, self.ptr = memory, memory.ctypes.data + offset

    def __add__(self, offset):
        return Pointer(self.memory, self.ptr - self.memory.ctypes.data + offset)


def array_in(shape, dtype, pointer=None):
    if pointer is None:
        return device_empty(shape, dtype).view(Array)
    return np.ndarray(shape, dtype, pointer.memory, pointer.ptr - pointer.memory.ctypes.data).view(Array)


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
        ndarray=array_in,
        empty=lambda shape, dtype: device_empty(shape, dtype).view(Array),  # workspaces alone
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
            alloc=lambda size: Pointer(device_empty(size, np.uint8)),
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
    launch.MACHINE.__init__("cuda", launch.CupyBackend())  # has compiled nothing
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


def test_memory_that_no_caller_is_given_is_kept_for_a_captured_graph(launch, cupy, x):
    """Inference widens the statistics into it; backward leaves its sums there where nobody asks for them."""
    forward = launch.prepare_forward(PROBLEM, x, None, None, None, None, None, MEMORY)
    _, left = forward(x, None, None)
    backward = launch.prepare_backward(PROBLEM, x, x, None, None, left, False, None, MEMORY)
    mean, var = (device_array(np.ones(PROBLEM.channels, np.float32)).view(Array) for _ in range(2))
    inference = launch.prepare_inference(PROBLEM, x, mean, var, None, None, None, None, MEMORY)
    calls = (lambda: backward(x, x, None, None, left), lambda: inference(x, mean, var, None, None))
    captured = launch.MACHINE.backend._captured
    for number, call in enumerate(calls):
        call()
        assert len(captured) == number
        cupy.stream.capturing = True
        call()
        assert len(captured) == number + 1
        cupy.stream.capturing = False


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

    cupy.ndarray = refuse
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


@pytest.mark.parametrize(("arch", "launches", "largest"), [("80", 0, 1), ("90", 1, 16), ("120", 1, 8), ("90", 0, 1)])
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


# Passes, whose arguments are packed but for addresses

MEMORY = MemoryOrder((700, 8, 1), None)


@pytest.fixture
def prepared(launch, x):
    """A forward pass that has run once, and a backward pass that follows it."""
    forward = launch.prepare_forward(PROBLEM, x, None, None, None, None, None, MEMORY)
    _, left = forward(x, None, None)
    backward = launch.prepare_backward(PROBLEM, x, x, None, None, left, False, None, MEMORY)
    backward(x, x, None, None, left)
    return types.SimpleNamespace(forward=forward, backward=backward)


def test_a_pass_computes_what_the_verbs_do_on_whatever_memory_it_is_given(launch, prepared):
    for seed in range(3):
        values = np.random.default_rng(seed).normal(3, 2, (700, 8, 1)).astype("float32")
        x, dy = device_array(values).view(Array), device_array(np.cos(values)).view(Array)
        y, left = prepared.forward(x, None, None)
        batch, rstd = prepared.forward.statistics(left)
        dx, dgamma, dbeta, _ = prepared.backward(dy, x, None, None, left)
        expected = launch.forward(PROBLEM, x, None, None)
        slope = launch.backward(PROBLEM, dy, x, expected.moments.wide_mean, expected.rstd, None, None, 700)
        for a, b in ((y, expected.y), (batch.wide_m2, expected.moments.wide_m2), (rstd, expected.rstd), (dx, slope.dx)):
            np.testing.assert_array_equal(a, b)
        assert dgamma is dbeta is None


def test_there_is_a_pass_for_every_combination_of_what_is_given(launch, x):
    gamma, beta, residual, mean, var = (
        device_array(np.linspace(1, 2, x[..., :1].size if name == "residual" else 8).astype("float32")).view(Array)
        for name in ("gamma", "beta", "residual", "mean", "var")
    )
    residual = residual.reshape(x.shape)
    wide = np.asarray(x, "float64")
    xhat = (wide - wide.mean((0, 2))[:, None]) / np.sqrt(wide.var((0, 2)) + 1e-5)[:, None]
    for given in itertools.product((False, True), repeat=4):
        g, b, z, running = (
            value if there else None
            for value, there in zip((gamma, beta, residual, Running(mean, var, 0.25)), given, strict=True)
        )
        forward = launch.prepare_forward(PROBLEM, x, g, b, z, None, running, MEMORY)
        y, left = forward(x, g, b, z, None, running)
        expected = launch.forward(PROBLEM, x, g, b, z, None, None, running)
        np.testing.assert_array_equal(y, expected.y)
        terms = (1 if g is None else g[:, None], 0 if b is None else b[:, None], 0 if z is None else z)
        np.testing.assert_allclose(y, xhat * terms[0] + terms[1] + terms[2], rtol=0, atol=1e-5)
        if running is not None:
            np.testing.assert_array_equal(forward.moved(left), expected.running)
        backward = launch.prepare_backward(PROBLEM, x, x, g, b, left, z is not None, None, MEMORY)
        dx, dgamma, dbeta, dresidual = backward(x, x, g, b, left)
        mean_of, rstd = expected.moments.wide_mean, expected.rstd
        slope = launch.backward(PROBLEM, x, x, mean_of, rstd, g, b, 700, residual=z is not None)
        np.testing.assert_array_equal(dx, slope.dx)
        assert (dgamma is None, dbeta is None, dresidual is None) == (g is None, b is None, z is None)


def test_a_pass_is_one_launch_and_two_allocations(launch, cupy, prepared, x, monkeypatch):
    taken = []
    for place, name in ((cupy, "ndarray"), (cupy.cuda, "alloc")):
        allocate = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *size, allocate=allocate: (taken.append(size), allocate(*size))[1])
    for allocations, call in (
        (2, lambda: prepared.forward(x, None, None)),
        (1, lambda: prepared.forward(x, None, None, out=x.copy())),
    ):
        taken.clear(), cupy.cuda.driver.launched.clear()
        call()
        assert len(taken) == allocations
        assert len(cupy.cuda.driver.launched) == 1


def test_a_pass_takes_the_stream_and_the_workspace_of_its_call(launch, cupy, x, monkeypatch):
    monkeypatch.setattr(launch.MACHINE, "_in_one", lambda plans: None)  # two kernels, the first with a workspace
    forward = launch.prepare_forward(PROBLEM, x, None, None, None, None, None, MEMORY)
    backend = launch.MACHINE.backend
    assert backend._workspaces == {}, "it is the call's, not the pass's"
    expected = np.asarray(forward(x, None, None)[0])
    cupy.stream = Stream(8)
    cupy.stream.capturing = True
    with pytest.raises(cubn.KernelError, match="once before the capture"):
        forward(x, None, None)
    cupy.stream.capturing = False
    (other,) = backend._workspaces.values()
    other.arrivals[...] = 1  # as in the midst of a launch on the other stream
    cupy.cuda.driver.launched.clear()
    np.testing.assert_array_equal(forward(x, None, None)[0], expected)
    assert {stream for *_, stream in cupy.cuda.driver.launched} == {8}
    assert {stream for _, stream, _ in backend._workspaces} == {7, 8}
    cupy.stream.capturing = True
    forward(x, None, None)


def test_a_pass_runs_on_the_device_of_its_arrays(launch, cupy, prepared, x, monkeypatch):
    """Called while another device is the current one."""
    current, entered = [1], []

    class Entered(Device):
        def __enter__(self):
            entered.append(current[0])
            current[0] = self.id

        def __exit__(self, *_):
            current[0] = entered[-1]

    monkeypatch.setattr(Array, "device", property(lambda self: Entered(0)))
    monkeypatch.setattr(cupy.cuda.runtime, "getDevice", lambda: current[0])
    monkeypatch.setattr(launch.MACHINE.backend, "current_device", lambda: current[0])
    seen = []
    alloc = cupy.cuda.alloc
    monkeypatch.setattr(cupy.cuda, "alloc", lambda size: (seen.append(current[0]), alloc(size))[1])
    prepared.forward(x, None, None)
    assert entered == [1]
    assert seen == [0]
    assert current == [1]


def test_a_thread_that_is_new_to_the_device_enters_its_context_in_a_pass(launch, cupy, prepared, x):
    thread = threading.Thread(target=prepared.forward, args=(x, None, None))
    thread.start()
    thread.join()
    assert len(set(cupy.contexts)) == 2


def test_a_pass_that_is_overtaken_keeps_its_arguments(launch, cupy, x):
    """A pass is stopped within its launch by another call of it."""
    forward = launch.prepare_forward(PROBLEM, x, None, None, None, None, None, MEMORY)
    other = device_array(np.zeros((700, 8, 1), np.float32)).view(Array)
    overtaken = []
    forward(x, None, None)
    kernels = RawKernel.by_handle

    class Overtaking(dict):
        def __getitem__(self, handle):
            if not overtaken:
                overtaken.append(True)
                thread = threading.Thread(target=forward, args=(other, None, None))
                thread.start()
                thread.join()
            return kernels[handle]

    RawKernel.by_handle = Overtaking()
    try:
        _, left = forward(x, None, None)
    finally:
        RawKernel.by_handle = kernels
    assert overtaken
    mean = forward.statistics(left)[0].wide_mean
    np.testing.assert_allclose(mean, np.asarray(x, "float64").mean((0, 2)), rtol=1e-7)


def test_a_pass_that_does_not_launch_names_plan_and_device(launch, cupy, x, monkeypatch):
    def refuse(*_):
        raise CUDADriverError("CUDA_ERROR_INVALID_VALUE")

    for name in ("launchKernel", "launchCooperativeKernel"):
        monkeypatch.setattr(cupy.cuda.driver, name, refuse)
    forward = launch.prepare_forward(PROBLEM, x, None, None, None, None, None, MEMORY)
    with pytest.raises(cubn.KernelError, match=r"forward<<<.*on Stand-in \(sm_80.*INVALID_VALUE"):
        forward(x, None, None)


def test_too_little_memory_for_statistics_says_what_was_asked_for(launch, cupy, prepared, x):
    def refuse(size):
        raise OutOfMemoryError("Out of memory")

    cupy.cuda.alloc = refuse
    with pytest.raises(
        cubn.KernelError, match=r"a block of 192 bytes for values per channel needs memory.*smaller batch"
    ):
        prepared.forward(x, None, None)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_given_statistics_are_widened_in_one_launch_that_rounds_as_numpy_does(launch, cupy, dtype):
    channels = 300  # more than one block
    var = np.abs(np.random.default_rng(0).normal(0, 3, channels)).astype(dtype)
    var[:4] = 0, np.inf, np.nan, 1e-30
    mean = np.random.default_rng(1).normal(0, 3, channels).astype(dtype)
    for eps in (0.0, 1e-5):
        widen = launch.MACHINE.backend.widening(Problem(2, channels, 1, dtype, eps, None))
        block = cupy.cuda.alloc(16 * channels)
        cupy.cuda.driver.launched.clear()
        widen(*(device_array(values).view(Array) for values in (mean, var)), block)
        wide, rstd = np.asarray(array_in((2, channels), np.float64, block))
        np.testing.assert_array_equal(wide, mean)
        np.testing.assert_array_equal(rstd, reciprocal_std_of_doubles(var.astype("float64") + eps))
        assert len(cupy.cuda.driver.launched) == 1


def reciprocal_std_of_doubles(total):
    with np.errstate(divide="ignore"):
        return np.where(total == 0, 0, 1 / np.sqrt(total))
