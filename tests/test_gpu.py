"""The CUDA machine on a GPU: `pytest -m gpu`.  Without CuPy or a device everything here skips and says why.

The suite of all machines runs there as the machine `gpu`; here is what only a device has: sizes, every way to share
a tensor out at the size that it is made for, streams, graphs, threads, other libraries' memory.

The oracle is the formula in float64, written out below in CuPy's own arithmetic.
"""

import dataclasses
import shutil
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import oracle
import pytest

import cubn
from cubn.namespace import why_no_cuda

reason = why_no_cuda()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(reason is not None, reason=f"needs a GPU: {reason}")]

SHAPES = {
    "NCHW": (32, 64, 56, 56),
    "NCHW, odd planes": (16, 48, 55, 55),
    "NCHW, small planes": (64, 512, 7, 7),
    "(N, C)": (65536, 256),
    "(N, C), odd": (40001, 27),
    "one channel": (64, 1, 512, 512),
    "many channels": (8, 8192, 4, 4),
    "a few numbers": (32, 64),
}

REGIMES = {
    "planned": {},
    "without clusters": {"largest_cluster": 1},
    "without clusters and blocks that wait": {"largest_cluster": 1, "cooperative": False},
    "with the shared memory of the smallest device": {"shared_most": 48 * 1024, "shared_per_processor": 64 * 1024},
}
"""What is taken from the device's limits, so that the planner has to choose something else."""

SIZES = {
    "a slab for one block": (16, 256, 14, 14),
    "a slab for two blocks": (32, 128, 56, 56),
    "a slab for a cluster": (64, 64, 112, 112),
    "a slab for many blocks": (4, 16, 1024, 1024),
    "rows for one block": (512, 512),
    "rows for many blocks": (200_000, 256),
}


@pytest.fixture
def cp():
    cupy = pytest.importorskip("cupy")
    cupy.get_default_memory_pool().free_all_blocks()
    return cupy


def randoms(cp, shape, dtype, seed=0):
    x, dy = (cp.random.default_rng(seed + i).standard_normal(shape, dtype="float32") for i in range(2))
    return (x * 2 + 3).astype(dtype), dy.astype(dtype)


def parameters(cp, channels, dtype="float32"):
    return cp.linspace(0.5, 1.5, channels, dtype=dtype), cp.linspace(-1, 1, channels, dtype=dtype)


def channels_last(cp, *arrays):
    return tuple(cp.moveaxis(cp.ascontiguousarray(cp.moveaxis(a, 1, -1)), -1, 1) for a in arrays)


def strides(array):
    """Of the axes along which there are two elements."""
    return [stride for stride, size in zip(array.strides, array.shape, strict=True) if size > 1]


def train(x, dy, gamma, beta, **options):
    y, saved = cubn.batch_norm(x, gamma, beta, **options)
    grads = cubn.batch_norm_backward(dy, saved)
    return y, saved.moments.mean, saved.moments.var, grads.dx, grads.dgamma, grads.dbeta


def exactly(cp, x, dy, gamma, beta, eps=1e-5, activation=None, residual=None):
    """What `train` returns, in float64.  ReLU passes what is above zero."""
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    kept = tuple(-1 if axis == 1 else 1 for axis in range(x.ndim))
    x, dy, gamma, beta = (a.astype("float64") for a in (x, dy, gamma, beta))
    count = x.size // x.shape[1]
    mean = x.sum(axes, keepdims=True) / count
    apart = x - mean
    var = (apart * apart).sum(axes, keepdims=True) / count
    rstd = 1 / cp.sqrt(var + eps)
    xhat = apart * rstd
    y = gamma.reshape(kept) * xhat + beta.reshape(kept)
    if residual is not None:
        y = y + residual.astype("float64")
    if activation == "relu":
        dy = dy * (y > 0)
        y = y * (y > 0)
    s0, s1 = dy.sum(axes, keepdims=True), (dy * xhat).sum(axes, keepdims=True)
    dx = gamma.reshape(kept) * rstd * (dy - s0 / count - xhat * (s1 / count))
    return y, mean.ravel(), var.ravel(), dx, s1.ravel(), s0.ravel()


def assert_right(cp, found, exact, dtype, count, decided=None):
    """Bounds on the largest error, in units of the largest value.

    A sum of M terms in float32 that is settled in double every 32 terms: at most 64 roundings for y and dx, whose
    operands are such sums.  Two more roundings for the result of dtype x.  dgamma and dbeta have terms of the size
    of dy that cancel, so their scale is M times it.  `decided` is False where the rounding of y decides about ReLU.
    """
    unit = 64 * (2.0**-53 if dtype == "float64" else 2.0**-24)
    for what, a, b in zip(("y", "mean", "var", "dx", "dgamma", "dbeta"), found, exact, strict=True):
        error = cp.abs(a.astype("float64") - b)
        last = 0.0
        if what in ("y", "dx"):
            last = 2 * oracle.ROUNDOFF[dtype]
            if decided is not None:
                error = error * decided
        scale = float(cp.abs(b).max())
        if what in ("dgamma", "dbeta"):
            scale = max(scale, float(count) ** 0.5)
            if decided is not None:
                continue
        assert float(error.max()) <= 4 * (unit + last) * scale, what
        assert bool(cp.isfinite(a).all()), what


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("layout", ["C order", "channels last"])
@pytest.mark.parametrize("name", SHAPES)
def test_large_tensors_agree_with_float64(cp, name, layout, dtype):
    shape = SHAPES[name]
    x, dy = randoms(cp, shape, dtype)
    if layout == "channels last":
        x, dy = channels_last(cp, x, dy)
    gamma, beta = parameters(cp, shape[1], "float64" if dtype == "float64" else "float32")
    found = train(x, dy, gamma, beta)
    assert strides(found[0]) == strides(found[3]) == strides(x)
    assert_right(cp, found, exactly(cp, x, dy, gamma, beta), dtype, x.size // shape[1])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("layout", ["C order", "channels last"])
@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("regime", REGIMES)
def test_every_way_to_share_a_tensor_out_computes_the_same(cp, regime, name, layout, dtype, monkeypatch):
    """What a device has decides between kernels; whatever is left of it, the numbers stay right.  ReLU and residual
    too, except where y is so near to zero that its rounding decides on which side it falls."""
    shape = SIZES[name]
    backend = restricted(monkeypatch, REGIMES[regime])
    x, dy = randoms(cp, shape, dtype)
    residual = randoms(cp, shape, dtype, seed=5)[1]
    if layout == "channels last":
        x, dy, residual = channels_last(cp, x, dy, residual)
    gamma, beta = parameters(cp, shape[1])
    with cubn.dispatch.use_machine("restricted"):
        plain = train(x, dy, gamma, beta)
        fused = train(x, dy, gamma, beta, activation="relu", residual=residual)
    count = x.size // shape[1]
    assert_right(cp, plain, exactly(cp, x, dy, gamma, beta), dtype, count)
    linear = exactly(cp, x, dy, gamma, beta, residual=residual)[0]
    exact = exactly(cp, x, dy, gamma, beta, activation="relu", residual=residual)
    assert_right(cp, fused, exact, dtype, count, decided=cp.abs(linear) > 1e-4)
    for plan in backend.plans:
        limits = backend.limits()
        assert plan.cluster <= limits.largest_cluster, plan
        assert limits.cooperative or not plan.cooperative, plan
        assert plan.shared_bytes + plan.dynamic_bytes <= limits.shared_most, plan


def restricted(monkeypatch, changes):
    """A machine named `restricted` on a device that has less, and its backend, which keeps the plans it took."""
    from cubn.machines.cuda.launch import CupyBackend
    from cubn.machines.cuda.machine import KernelMachine

    class Restricted(CupyBackend):
        plans = []  # noqa: RUF012

        def limits(self):
            return dataclasses.replace(super().limits(), **changes)

        def launch(self, plan, arguments):
            self.plans.append(plan)
            super().launch(plan, arguments)

        def bind(self, plan, arguments):
            self.plans.append(plan)
            return super().bind(plan, arguments)

    backend = Restricted()
    backend.plans = []
    monkeypatch.setitem(sys.modules, "restricted", KernelMachine("restricted", backend))
    monkeypatch.setitem(cubn.dispatch.MACHINES, "restricted", "restricted")
    cubn.dispatch._load.cache_clear()
    return backend


def test_more_elements_than_32_bits_count(cp):
    """2**31 + 2**27 elements, float16: the first and last channels and one between, against float64 sums."""
    shape = (34, 64, 1024, 1024)
    if cp.cuda.runtime.memGetInfo()[0] < 6 * 2 * np.prod(shape, dtype=np.int64):
        pytest.skip("needs 28 GB of free device memory")
    x, dy = cp.empty(shape, "float16"), cp.empty(shape, "float16")
    for i in range(shape[0]):
        x[i] = cp.random.default_rng(i).standard_normal(shape[1:], dtype="float32")
        dy[i] = cp.random.default_rng(1000 + i).standard_normal(shape[1:], dtype="float32")
    y, saved = cubn.batch_norm(x)
    grads = cubn.batch_norm_backward(dy, saved)
    one, none = cp.ones(1), cp.zeros(1)
    for channel in (0, 31, 63):
        slabs = (a[:, channel : channel + 1] for a in (x, dy))
        exact = exactly(cp, *slabs, one, none)
        found = (
            y[:, channel : channel + 1], saved.moments.mean[channel], saved.moments.var[channel],
            grads.dx[:, channel : channel + 1],
        )  # fmt: skip
        for a, b, bound in zip(found, exact, (2**-9, 1e-6, 1e-5, 2**-9), strict=False):
            assert float(cp.abs(a.astype("float64") - b).max()) <= bound * 6


@pytest.mark.parametrize("name", SHAPES)
def test_repeats_are_equal_bit_for_bit(cp, name):
    x, dy = randoms(cp, SHAPES[name], "float16")
    gamma, beta = parameters(cp, x.shape[1])
    runs = {b"".join(a.tobytes() for a in train(x, dy, gamma, beta)) for _ in range(5)}
    assert len(runs) == 1


@pytest.mark.parametrize("shape", [(64, 32, 28, 28), (512, 64), (16, 8, 224, 224)], ids=str)
def test_a_captured_graph_replays_on_new_data(cp, shape):
    """After one warm-up call, forward and backward capture; replaying computes on what the memory holds then."""
    x, dy = randoms(cp, shape, "float32")
    gamma, beta = parameters(cp, shape[1])
    y, dx = cp.empty_like(x), cp.empty_like(x)
    stream = cp.cuda.Stream(non_blocking=True)

    def call():
        _, saved = cubn.batch_norm(x, gamma, beta, out=y)
        return saved, cubn.batch_norm_backward(dy, saved, out=dx)  # the graph writes to all that is in them

    cp.cuda.Device().synchronize()
    with stream:
        call()
        stream.begin_capture()
        kept = call()
        graph = stream.end_capture()
    for seed in (10, 20, 30):
        x[...], dy[...] = randoms(cp, x.shape, "float32", seed)
        expected = train(x, dy, gamma, beta)
        cp.cuda.Device().synchronize()
        for _ in range(3):  # a barrier that is left in the wrong state would show at the second time
            y.fill(0), dx.fill(0)
            cp.cuda.Device().synchronize()
            graph.launch(stream)
            stream.synchronize()
            cp.testing.assert_array_equal(y, expected[0])
            cp.testing.assert_array_equal(dx, expected[3])
    del kept


def test_a_capture_without_a_warm_up_is_refused_in_words(cp, monkeypatch):
    x = cp.ones((4, 3, 11, 13), "float64")
    restricted(monkeypatch, {})  # has compiled nothing
    stream = cp.cuda.Stream(non_blocking=True)
    with stream, cubn.dispatch.use_machine("restricted"):
        stream.begin_capture()
        try:
            with pytest.raises(cubn.KernelError, match="once before the capture"):
                cubn.moments(x)
        finally:
            stream.end_capture()


def test_after_warmup_a_capture_needs_no_call_before_it(cp, monkeypatch):
    restricted(monkeypatch, {})  # has compiled nothing
    x, dy = randoms(cp, (8, 16, 12, 12), "float16")
    gamma, beta = parameters(cp, 16)
    stream = cp.cuda.Stream(non_blocking=True)
    with stream, cubn.dispatch.use_machine("restricted"):
        cubn.warmup("float16", device="cuda", shapes=[x.shape])
        y, dx = cp.empty_like(x), cp.empty_like(x)
        stream.begin_capture()
        _, saved = cubn.batch_norm(x, gamma, beta, out=y)
        kept = saved, cubn.batch_norm_backward(dy, saved, out=dx)
        graph = stream.end_capture()
    graph.launch(stream)
    stream.synchronize()
    expected = train(x, dy, gamma, beta)
    cp.testing.assert_array_equal(y, expected[0])
    cp.testing.assert_array_equal(dx, expected[3])
    del kept


def test_streams_do_not_disturb_one_another(cp):
    """Many calls in flight on several streams at once: each has a workspace of its own."""
    streams = [cp.cuda.Stream(non_blocking=True) for _ in range(4)]
    work = [randoms(cp, (200_000, 8), "float32", seed) for seed in range(4)]
    gamma, beta = parameters(cp, 8)
    expected = [train(*pair, gamma, beta) for pair in work]
    cp.cuda.Device().synchronize()
    found = [[] for _ in streams]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with stream:
                found[i].append(train(*work[i], gamma, beta))
    cp.cuda.Device().synchronize()
    for results, right in zip(found, expected, strict=True):
        for result in results:
            for a, b in zip(result, right, strict=True):
                cp.testing.assert_array_equal(a, b)


def test_threads_compile_and_launch_at_once(cp, monkeypatch):
    restricted(monkeypatch, {})  # has compiled nothing
    x, dy = randoms(cp, (32, 16, 20, 20), "float16")
    gamma, beta = parameters(cp, 16)
    results, errors = [None] * 8, []
    cp.cuda.Device().synchronize()

    def run(i):
        try:
            with cp.cuda.Stream(non_blocking=True) as stream, cubn.dispatch.use_machine("restricted"):
                for _ in range(20):
                    results[i] = train(x, dy, gamma, beta)
                stream.synchronize()
        except Exception as error:
            errors.append(error)

    workers = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            cp.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("sliced", [False, True], ids=["in place", "copied"])
def test_every_device_computes_its_own_arrays(cp, sliced):
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two devices")
    values = np.random.default_rng(0).normal(size=(32, 8, 16, 32)).astype("float32")
    found = []
    for device in (0, 1):
        with cp.cuda.Device(device):
            x = cp.asarray(values)
        x = x[..., ::2] if sliced else x
        y, saved = cubn.batch_norm(x)  # from device 0, whichever x lives on
        dx = cubn.batch_norm_backward(x, saved).dx
        assert y.device.id == dx.device.id == saved.rstd.device.id == device
        found.append((cp.asnumpy(y), cp.asnumpy(dx)))
    np.testing.assert_array_equal(*found)


def test_a_call_does_not_wait_for_the_device(cp):
    """A kernel that runs for a fifth of a second is still running when the calls return."""
    x, dy = randoms(cp, (32, 16, 20, 20), "float32")
    gamma, beta = parameters(cp, 16)
    spin = cp.RawKernel(
        'extern "C" __global__ void spin(long long t) { long long s = clock64(); while (clock64() - s < t); }', "spin"
    )
    rate = cp.cuda.Device().attributes["ClockRate"] * 1000
    spin((1,), (1,), (np.int64(1),))
    train(x, dy, gamma, beta)
    cp.cuda.Device().synchronize()
    spin((1,), (1,), (np.int64(rate // 5),))
    _, saved = cubn.batch_norm(x, gamma, beta)
    cubn.batch_norm_backward(dy, saved)
    assert not cp.cuda.get_current_stream().done


def test_only_results_are_allocated(cp):
    """y and rows of statistics, dx and two sums per channel; the pool rounds each up to 512 bytes."""
    x, dy = randoms(cp, (32, 64, 56, 56), "float16")
    gamma, beta = parameters(cp, 64)
    train(x, dy, gamma, beta)
    pool = cp.get_default_memory_pool()

    def rounded(*sizes):
        return sum(-(-size // 512) * 512 for size in sizes)

    before = pool.used_bytes()
    _, saved = kept = cubn.batch_norm(x, gamma, beta)
    assert rounded(x.nbytes, 64 * 8) <= pool.used_bytes() - before <= rounded(x.nbytes, 4 * 64 * 8)
    before = pool.used_bytes()
    grads = cubn.batch_norm_backward(dy, saved)
    assert pool.used_bytes() - before <= rounded(x.nbytes, 2 * 64 * 8)
    del kept, grads


def on_stream_of_pytorch(cp, torch):
    """PyTorch's current stream as CuPy's: the recipe of the README, for every pair of versions."""
    stream = torch.cuda.current_stream()
    if not hasattr(cp.cuda.Stream, "from_external"):
        return cp.cuda.ExternalStream(stream.cuda_stream)  # CuPy 13
    if not hasattr(stream, "__cuda_stream__"):  # PyTorch before 2.10
        stream = types.SimpleNamespace(__cuda_stream__=lambda handle=stream.cuda_stream: (0, handle))
    return cp.cuda.Stream.from_external(stream)


@pytest.mark.parametrize("side", [False, True], ids=["default stream", "side stream"])
def test_a_pytorch_tensor_goes_in_and_out_without_a_copy(cp, side):
    """DLPack in both directions, on PyTorch's stream: the recipe of the documentation."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    with torch.cuda.stream(torch.cuda.Stream() if side else torch.cuda.current_stream()):
        tensor = torch.randn(16, 8, 20, 20, device="cuda")
        with on_stream_of_pytorch(cp, torch):
            x = cp.from_dlpack(tensor)
            y, saved = cubn.batch_norm(x)
            back = torch.from_dlpack(y)
            dx = torch.from_dlpack(cubn.batch_norm_backward(cp.from_dlpack(torch.ones_like(tensor)), saved).dx)
        expected = torch.nn.functional.batch_norm(tensor.double(), None, None, training=True)
        assert x.data.ptr == tensor.data_ptr()
        assert back.data_ptr() == y.data.ptr
        torch.testing.assert_close(back.double(), expected, rtol=0, atol=1e-5)
        assert float(dx.abs().max()) < 1e-5  # a shift of all samples changes no y


def test_bfloat16_where_cupy_has_it(cp):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    try:
        x, dy = randoms(cp, (64, 24, 14, 14), ml_dtypes.bfloat16)
    except (TypeError, ValueError, KeyError) as error:
        pytest.skip(f"CuPy {cp.__version__} has no bfloat16 ({error}); it comes with CuPy 14")
    gamma, beta = parameters(cp, 24)
    found = train(x, dy, gamma, beta)
    assert found[0].dtype == found[3].dtype == x.dtype
    wide = [cp.asarray(cp.asnumpy(a).astype("float32")) for a in (x, dy)]
    found = [cp.asarray(cp.asnumpy(a).astype("float32")) for a in found]
    assert_right(cp, found, exactly(cp, *wide, gamma, beta), "bfloat16", x.size // 24)


def test_a_layer_trains_as_float64_does(cp):
    """Three steps of a layer: outputs, gradients, and running statistics."""
    layer = cubn.BatchNorm(24, momentum=0.25, device="cuda")
    mean, var = cp.zeros(24), cp.ones(24)
    for step in range(3):
        x, dy = randoms(cp, (16, 24, 20, 20), "float32", seed=step)
        y = layer(x)
        dx = layer.backward(dy)
        exact = exactly(cp, x, dy, layer.gamma, layer.beta)
        found = (y, *exact[1:3], dx, layer.gamma_grad, layer.beta_grad)
        assert_right(cp, found, exact, "float32", x.size // 24)
        count = x.size // 24
        mean = 0.75 * mean + 0.25 * exact[1]
        var = 0.75 * var + 0.25 * exact[2] * count / (count - 1)
    assert float(cp.abs(layer.running_mean - mean).max()) < 1e-5
    assert float(cp.abs(layer.running_var - var).max()) < 1e-5
    layer.eval()
    y = layer(x)
    exact = (x.astype("float64") - mean.reshape(-1, 1, 1)) / cp.sqrt(var.reshape(-1, 1, 1) + 1e-5)
    assert float(cp.abs(y - exact).max()) < 1e-4


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_the_sanitizer_finds_nothing(tool):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not on the PATH; it comes with the CUDA toolkit")
    script = Path(__file__).with_name("gpu_calls.py")
    command = [program, "--tool", tool, "--error-exitcode", "9", sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "ERROR SUMMARY: 0 errors" in done.stdout or "0 hazards displayed" in done.stdout, done.stdout[-1000:]
