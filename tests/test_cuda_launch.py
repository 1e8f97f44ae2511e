"""launch.py without a GPU: a stand-in for CuPy whose kernels are executed on the CPU.

What is tested is what launch.py itself decides: what is compiled and kept, whose workspace a call gets, which error
comes of what.  The stand-in has only what launch.py uses of CuPy; an attribute more and the test fails.
"""

import importlib
import sys
import types
from contextlib import nullcontext

import numpy as np
import pytest
from host.build import missing
from host.executor import Kernel, device_array, device_empty

import cubn
from cubn.problem import Problem

if missing():
    pytest.skip(missing(), allow_module_level=True)

LAUNCH = "cubn.machines.cuda.launch"
PROBLEM = Problem(700, 8, 1, "float32", 1e-5, None)


class Device(nullcontext):
    def __init__(self, number=0):
        super().__init__()
        self.id = number
        self.compute_capability = "80"


class Array(np.ndarray):
    """Executor memory with the two attributes that launch.py reads of a CuPy array."""

    @property
    def device(self):
        return Device(0)

    @property
    def data(self):
        return types.SimpleNamespace(ptr=self.ctypes.data)


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


class RawKernel:
    """Compiles when its `kernel` is first asked for, as CuPy's does."""

    compiled: list = []  # noqa: RUF012

    def __init__(self, code, name, options=()):
        self.code, self.name, self.options = code, name, options

    @property
    def kernel(self):
        assert self.options[0] == "-std=c++17"
        defines = dict(option[2:].split("=") for option in self.options[1:])
        RawKernel.compiled.append(self.name)
        kernel = Kernel(self.code, self.name, defines=defines)

        def function(grid, block, args):
            for value in args:
                assert isinstance(value, Array | np.uint64 | np.int64 | np.int32 | np.float64), value
            kernel(grid, block, [None if type(value) is np.uint64 else np.asarray(value) for value in args])

        return function


@pytest.fixture
def cupy(monkeypatch):
    """The stand-in, where `import cupy` finds it, and launch.py imported with it."""
    stand_in = types.ModuleType("cupy")
    stream = Stream(7)
    attributes = {
        "MultiProcessorCount": 2,
        "MaxThreadsPerBlock": 64,
        "MaxGridDimX": 3,
        "MaxSharedMemoryPerBlock": 49152,
    }
    runtime = types.SimpleNamespace(
        getDevice=lambda: 0,
        CUDARuntimeError=CUDARuntimeError,
        getDeviceProperties=lambda device: {"name": b"Stand-in"},
        deviceGetAttribute=lambda attribute, device: attributes[attribute],
        **{f"cudaDevAttr{name}": name for name in attributes},
    )
    vars(stand_in).update(
        __version__="0",
        RawKernel=RawKernel,
        empty=lambda shape, dtype: device_empty(shape, dtype).view(Array),
        zeros=lambda shape, dtype: device_array(np.zeros(shape, dtype)).view(Array),
        ascontiguousarray=lambda array, dtype: (
            array if array.dtype == dtype else device_array(array, dtype).view(Array)
        ),
        cuda=types.SimpleNamespace(
            runtime=runtime,
            driver=types.SimpleNamespace(CUDADriverError=CUDADriverError),
            memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            get_current_stream=lambda: stand_in.stream,
            Device=Device,
        ),
        stream=stream,
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
    y, batch, rstd, _ = launch.forward(PROBLEM, x, None, None)
    wide = np.asarray(x, "float64")
    np.testing.assert_allclose(batch.wide_mean, wide.mean((0, 2)), rtol=1e-7)
    exact = (wide - wide.mean((0, 2))[:, None]) / np.sqrt(wide.var((0, 2)) + 1e-5)[:, None]
    np.testing.assert_allclose(y, exact, rtol=0, atol=1e-6 * 5)
    dx = launch.backward(PROBLEM, x, x, batch.wide_mean, rstd, None, None, batch.count).dx
    assert np.abs(dx).max() < 1e-4  # dy = x has no gradient but eps's


def test_a_kernel_is_compiled_once(launch, x):
    for _ in range(3):
        launch.forward(PROBLEM, x, None, None)
    assert RawKernel.compiled == ["moments", "normalize"]


def test_every_stream_has_a_workspace_of_its_own_and_keeps_it(launch, cupy, x):
    launch.moments(PROBLEM, x)
    launch.moments(PROBLEM, x)
    cupy.stream = Stream(8)
    launch.moments(PROBLEM, x)
    workspaces = launch.MACHINE.backend._workspaces
    assert {stream for _, stream, _ in workspaces} == {7, 8}
    memories = [partials.ctypes.data for partials, _ in workspaces.values()]
    assert len(set(memories)) == 2
    assert not any(arrivals.any() for _, arrivals in workspaces.values())


def test_the_per_thread_stream_is_a_stream_for_each_thread(launch, cupy, x):
    import threading

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
    ((first, _),) = backend._workspaces.values()
    wide = device_array(np.ones((700, 200, 1), "float32")).view(Array)
    launch.moments(Problem(700, 200, 1, "float32", 1e-5, None), wide)
    ((second, _),) = backend._workspaces.values()
    assert second.size > first.size
    assert [partials is first for partials, _ in backend._outgrown] == [True]


def test_a_first_call_during_a_capture_is_refused_in_words(launch, cupy, x):
    cupy.stream.capturing = True
    with pytest.raises(cubn.KernelError, match="once before the capture"):
        launch.moments(PROBLEM, x)
    cupy.stream.capturing = False
    launch.moments(PROBLEM, x)
    cupy.stream.capturing = True
    launch.moments(PROBLEM, x)


def test_a_kernel_that_does_not_compile_says_what_to_install(launch, x, monkeypatch):
    monkeypatch.setattr(launch, "translation_unit", lambda file: "this is no CUDA")
    with pytest.raises(cubn.KernelError, match=r"(?s)moments<<<.*did not compile on Stand-in.*cubn\[cuda12\]"):
        launch.moments(PROBLEM, x)


def test_a_launch_that_fails_names_plan_and_device(launch, x, monkeypatch):
    def refuse(*_):
        raise CUDADriverError("CUDA_ERROR_INVALID_VALUE")

    monkeypatch.setattr(launch.MACHINE.backend, "_compile", lambda plan: refuse)
    with pytest.raises(cubn.KernelError, match=r"moments<<<.*on Stand-in \(sm_80.*INVALID_VALUE"):
        launch.moments(PROBLEM, x)


def test_too_little_memory_says_what_was_asked_for(launch, cupy, x):
    def refuse(shape, dtype):
        raise OutOfMemoryError("Out of memory allocating 44,800 bytes")

    cupy.empty = refuse
    with pytest.raises(cubn.KernelError, match=r"of shape \(2, 8\) and dtype float64.*44,800.*smaller batch"):
        launch.moments(PROBLEM, x)


def test_without_cupy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.delitem(sys.modules, LAUNCH, raising=False)
    with pytest.raises(cubn.DeviceError, match=r"CuPy cannot be imported.*pip install 'cubn\[cuda12\]'"):
        importlib.import_module(LAUNCH)
