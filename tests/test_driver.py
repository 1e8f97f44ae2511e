"""launch.py on the real CuPy, over the stand-in for the driver: `make test-cupy`.

test_cuda_launch.py tests what launch.py decides, on something that has only what launch.py uses of CuPy; here CuPy
itself is asked, and the driver that it asks counts.  The oracle is the formula in float64 (test_gpu.py).
"""

import itertools
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import test_gpu

import cubn
from cubn.__main__ import main

if "driver.plugin" not in sys.modules:
    pytest.skip("needs CuPy over the stand-in for a driver: make test-cupy", allow_module_level=True)

from driver import computed, under_cupy

cp = computed.cupy

LEAST = {
    "MultiProcessorCount": 2, "MaxThreadsPerBlock": 64, "ClusterLaunch": 0, "CooperativeLaunch": 0,
    "MemoryClockRate": 1, "GlobalMemoryBusWidth": 4000,  # so slow that nothing but memory counts
}  # fmt: skip
DEVICES = {
    "block": LEAST,
    "cluster": LEAST | {"ClusterLaunch": 1, "MultiProcessorCount": 8, "MaxSharedMemoryPerBlockOptin": 16_000},
    "grid": LEAST | {"CooperativeLaunch": 1, "MultiProcessorCount": 6, "MaxSharedMemoryPerBlockOptin": 16_000},
}
"""What the driver says of a device on which small tensors are shared out as large ones are."""

PLANES = {"block": (3, 5, 16, 16), "cluster": (3, 1, 64, 128), "grid": (3, 1, 64, 128)}
COLUMNS = {"block": (100, 16), "cluster": (600, 16), "grid": (1400, 8)}
WAYS = [
    *(("float16", way, columns) for way in DEVICES for columns in (False, True)),
    ("float32", "cluster", True), ("float32", "grid", False), ("float64", "block", False), ("float64", "grid", True),
]  # fmt: skip
SHAPE = (3, 4, 6, 6)
NUMBERS = itertools.count()


@contextmanager
def device(monkeypatch, **limits):
    """Devices that say this of themselves, and a machine that has compiled and prepared nothing."""
    from cubn.machines.cuda import launch

    before = list(under_cupy.attributes)
    under_cupy.limits(**limits)
    launch.limits_of.cache_clear()
    name = f"fresh {next(NUMBERS)}"
    monkeypatch.setitem(sys.modules, name, launch.KernelMachine(name, launch.CupyBackend()))
    monkeypatch.setitem(cubn.dispatch.MACHINES, name, name)
    computed.launches.clear()
    try:
        with cubn.dispatch.use_machine(name):
            yield sys.modules[name].backend
    finally:
        under_cupy.attributes[:] = before
        launch.limits_of.cache_clear()


def operands(shape, dtype, last=False):
    """x and dy on the host and on the device, where the channel is the last axis in memory if `last`."""
    host = [np.random.default_rng(i).normal(3 * (i == 0), 2 - i, shape).astype(dtype) for i in range(2)]
    if last:
        return host, [np.moveaxis(cp.asarray(np.ascontiguousarray(np.moveaxis(a, 1, -1))), -1, 1) for a in host]
    return host, [cp.asarray(a) for a in host]


def parameters(channels, dtype="float32"):
    host = [np.linspace(0.5, 1.5, channels, dtype=dtype), np.linspace(-1, 1, channels, dtype=dtype)]
    return host, [cp.asarray(a) for a in host]


def assert_right(found, exact, dtype, count, decided=None):
    test_gpu.assert_right(np, [cp.asnumpy(a) for a in found], exact, dtype, count, decided)


def kind(launched):
    return "cluster" if launched.cluster > 1 else "grid" if launched.cooperative else "block"


@pytest.mark.parametrize(("dtype", "way", "columns"), WAYS)
def test_every_team_is_launched_as_it_must_be_and_agrees_with_float64(monkeypatch, way, dtype, columns):
    shape = (COLUMNS if columns else PLANES)[way]
    host, (x, dy) = operands(shape, dtype)
    both, (gamma, beta) = parameters(shape[1], "float64" if dtype == "float64" else "float32")
    with device(monkeypatch, **DEVICES[way]):
        found = test_gpu.train(x, dy, gamma, beta)
    assert [(launched.name, kind(launched)) for launched in computed.launches] == [("forward", way), ("backward", way)]
    assert_right(found, test_gpu.exactly(np, *host, *both), dtype, x.size // shape[1])


def test_relu_and_residual_agree_with_float64_in_channels_last_memory():
    """But where y is so near to zero that its rounding decides on which side it falls."""
    host, (x, dy) = operands(SHAPE, "float16", last=True)
    both, (gamma, beta) = parameters(SHAPE[1])
    found = test_gpu.train(x, dy, gamma, beta, activation="relu", residual=dy)
    linear = test_gpu.exactly(np, *host, *both, residual=host[1])[0]
    exact = test_gpu.exactly(np, *host, *both, activation="relu", residual=host[1])
    assert test_gpu.strides(found[0]) == test_gpu.strides(found[3]) == test_gpu.strides(x)
    assert_right(found, exact, "float16", x.size // SHAPE[1], decided=abs(linear) > 1e-4)


def test_a_mask_leaves_numbers_out():
    """A mask of whole positions: what is left is a smaller tensor, whose statistics and gradients these are."""
    kept = np.arange(SHAPE[-1]) % 3 != 1
    host, (x, dy) = operands(SHAPE, "float32")
    both, (gamma, beta) = parameters(SHAPE[1])
    y, mean, var, dx, dgamma, dbeta = test_gpu.train(x, dy, gamma, beta, where=cp.asarray(kept))
    exact = test_gpu.exactly(np, *(a[..., kept] for a in host), *both)
    found = (cp.asnumpy(y)[..., kept], mean, var, cp.asnumpy(dx)[..., kept], dgamma, dbeta)
    assert_right(found, exact, "float32", exact[0].size // SHAPE[1])


def inferred(x, mean, var, gamma, beta):
    """In float64."""
    x, *rest = (a.astype("float64") for a in (x, mean, var, gamma, beta))
    mean, var, gamma, beta = (a.reshape(-1, 1, 1) for a in rest)
    return gamma * ((x - mean) / np.sqrt(var + 1e-5)) + beta


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_inference_agrees_with_float64(dtype):
    (host, _), (x, _) = operands(SHAPE, dtype)
    both, parameters_ = parameters(SHAPE[1])
    given = [np.float32([3, 2, 1, 0]), np.float32([4, 3, 2, 1e-3])]
    y = cubn.batch_norm_inference(x, *map(cp.asarray, given), *parameters_)
    exact = inferred(host, *given, *both)
    error = abs(cp.asnumpy(y).astype("float64") - exact).max()
    assert error <= (2.0**-10 if dtype == "float16" else 2.0**-21) * abs(exact).max()


def test_a_call_of_a_known_form_is_one_launch_and_at_most_two_allocations():
    """y and statistics, dx and sums; inference widens its statistics in a launch of their own.  Nothing waits, and
    nothing is copied or set."""
    _, (x, dy) = operands(SHAPE, "float32")
    _, (gamma, beta) = parameters(SHAPE[1])
    y, dx = cp.empty_like(x), cp.empty_like(x)
    _, saved = cubn.batch_norm(x, gamma, beta)
    calls = {
        "forward": (lambda: cubn.batch_norm(x, gamma, beta), 2, 1),
        "forward, out": (lambda: cubn.batch_norm(x, gamma, beta, out=y), 1, 1),
        "backward": (lambda: cubn.batch_norm_backward(dy, saved), 2, 1),
        "backward, out": (lambda: cubn.batch_norm_backward(dy, saved, out=dx), 1, 1),
        "inference": (lambda: cubn.batch_norm_inference(x, beta, gamma, gamma, beta), 2, 2),
        "inference, out": (lambda: cubn.batch_norm_inference(x, beta, gamma, gamma, beta, out=y), 1, 2),
    }
    for name, (call, allocations, launches) in calls.items():
        kept = [call(), call()]
        before = under_cupy.counts()
        kept.append(call())
        found = under_cupy.counts().since(before)
        assert found._replace(frees=0) == (allocations, 0, launches, 0, 0, 0), name


def test_results_are_written_where_they_are_wanted():
    host, (x, dy) = operands(SHAPE, "float32")
    both, (gamma, beta) = parameters(SHAPE[1])
    y, dx = cp.empty_like(x), cp.empty_like(x)
    for _ in range(3):  # the long way, then the prepared one
        found, saved = cubn.batch_norm(x, gamma, beta, out=y)
        grads = cubn.batch_norm_backward(dy, saved, out=dx)
        assert found is y
        assert grads.dx is dx
        results = (y, saved.moments.mean, saved.moments.var, dx, grads.dgamma, grads.dbeta)
        assert_right(results, test_gpu.exactly(np, *host, *both), "float32", x.size // SHAPE[1])


def test_a_launch_that_the_driver_refuses_names_plan_and_device():
    _, (x, _) = operands(SHAPE, "float32")
    cubn.batch_norm(x)
    for _ in range(2):
        with (
            under_cupy.refusing(719),
            pytest.raises(cubn.KernelError, match=r"did not launch on stand-in for a device"),
        ):
            cubn.batch_norm(x)
    cubn.batch_norm(x)


def test_info_trains_on_every_device(capsys):
    main(["info"])
    said = capsys.readouterr().out
    assert "a small batch came out right on stand-in for a device (sm_90, 4 processors)" in said
    assert said.count("second-level cache") == cp.cuda.runtime.getDeviceCount() == 2


# The stand-in itself


@pytest.fixture(scope="module")
def touch():
    """A kernel that writes element n."""
    text = 'extern "C" __global__ void touch(float *p, long long n) { p[n] = 7; }'
    return cp.RawKernel(text, "touch", ("-std=c++17",))


def test_an_access_beside_an_array_is_a_failure_in_words(touch):
    x = cp.asarray(np.zeros(4, "float32"))
    touch((1,), (1,), (x, np.int64(3)))
    assert cp.asnumpy(x).tolist() == [0, 0, 0, 7]
    with pytest.raises(cp.cuda.driver.CUDADriverError, match="Fault: touch: "):
        touch((1,), (1,), (x, np.int64(4)))


def test_a_launch_needs_a_context_of_its_device_in_its_thread(touch):
    x = cp.asarray(np.zeros(4, "float32"))
    touch((1,), (1,), (x, np.int64(0)))
    slots = np.array([x.data.ptr, 1], np.uint64)
    table = slots.ctypes.data + 8 * np.arange(2, dtype=np.uint64)
    codes = []

    def start():
        try:
            cp.cuda.driver.launchKernel(touch.kernel.ptr, 1, 1, 1, 1, 1, 1, 0, 0, table.ctypes.data, 0)
        except cp.cuda.driver.CUDADriverError as error:
            codes.append(error.status)
        else:
            codes.append(0)

    handle = touch.kernel.ptr
    assert handle
    start()
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    assert codes[0] == 0
    assert codes[1:] == [201]
