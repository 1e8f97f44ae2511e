"""The CUDA machine on a GPU: `pytest -m gpu`.  Without CuPy or a device everything here skips and says why.

The suite of all machines runs on it as the machine `cuda`; here is what only a device has: sizes, streams, graphs,
threads, other libraries' memory.
"""

import threading

import numpy as np
import oracle
import pytest

import cubn
from cubn.namespace import why_no_cuda

missing = why_no_cuda()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(missing is not None, reason=str(missing))]

SHAPES = {
    "NCHW": (32, 64, 56, 56),
    "NCHW, odd planes": (16, 48, 55, 55),
    "NCHW, small planes": (64, 512, 7, 7),
    "(N, C)": (65536, 256),
    "(N, C), odd": (40001, 27),
    "one channel": (64, 1, 512, 512),
    "many channels": (8, 8192, 4, 4),
}


@pytest.fixture
def cp():
    cupy = pytest.importorskip("cupy")
    cupy.get_default_memory_pool().free_all_blocks()
    return cupy


def randoms(cp, shape, dtype, seed=0):
    x, dy = (cp.random.default_rng(seed + i).standard_normal(shape, dtype="float32") for i in range(2))
    return (x * 2 + 3).astype(dtype), dy.astype(dtype)


def train(cp, x, dy, gamma, beta, **options):
    y, saved = cubn.batch_norm(x, gamma, beta, **options)
    grads = cubn.batch_norm_backward(dy, saved)
    return y, saved.moments.mean, saved.moments.var, grads.dx, grads.dgamma, grads.dbeta


def parameters(cp, channels, dtype="float32"):
    return cp.linspace(0.5, 1.5, channels, dtype=dtype), cp.linspace(-1, 1, channels, dtype=dtype)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("layout", ["C order", "channels last"])
@pytest.mark.parametrize("name", SHAPES)
def test_large_tensors_agree_with_float64_on_the_device(cp, name, layout, dtype):
    """The reference, in float64 on the same device, is the oracle.  Sums of M terms of float32 arithmetic that is
    settled in double every 32: 64 roundings, and one more to the dtype of the result."""
    shape = SHAPES[name]
    x, dy = randoms(cp, shape, dtype)
    if layout == "channels last":
        x, dy = (cp.moveaxis(cp.ascontiguousarray(cp.moveaxis(a, 1, -1)), -1, 1) for a in (x, dy))
    gamma, beta = parameters(cp, shape[1], "float64" if dtype == "float64" else "float32")
    found = train(cp, x, dy, gamma, beta)
    assert found[0].strides == x.strides
    with cubn.dispatch.use_machine("reference"):
        exact = train(cp, *(a.astype("float64") for a in (x, dy, gamma, beta)))
    unit = 64 * (2.0**-53 if dtype == "float64" else 2.0**-24)
    for what, a, b in zip(("y", "mean", "var", "dx", "dgamma", "dbeta"), found, exact, strict=True):
        last = oracle.ROUNDOFF[dtype] if what in ("y", "dx") else 0
        scale = float(cp.abs(b).max())
        if what in ("dgamma", "dbeta"):
            scale = max(scale, float(cp.abs(dy.astype("float64")).sum()) / shape[1])
        assert float(cp.abs(a.astype("float64") - b).max()) <= (unit + last) * scale * 4, what


def test_more_elements_than_32_bits_count(cp):
    """2**31 + 2**27 elements, float16: every channel against float64 sums of its own slab, ends included."""
    shape = (34, 64, 1024, 1024)
    if cp.cuda.runtime.memGetInfo()[0] < 4 * 2 * np.prod(shape, dtype=np.int64):
        pytest.skip("needs 18 GB of free device memory")
    x = cp.empty(shape, "float16")
    for i in range(shape[0]):
        x[i] = cp.random.default_rng(i).standard_normal(shape[1:], dtype="float32")
    y, saved = cubn.batch_norm(x)
    for channel in (0, 31, 63):
        slab = x[:, channel].astype("float32").astype("float64")
        mean, var = slab.mean(), slab.var()
        assert abs(float(saved.moments.mean[channel] - mean)) < 1e-6
        assert abs(float(saved.moments.var[channel] / var) - 1) < 1e-5
        exact = (slab - mean) / cp.sqrt(var + 1e-5)
        assert float(cp.abs(y[:, channel].astype("float64") - exact).max()) < 2**-11 * 8
        del slab, exact
    del y
    dx = cubn.batch_norm_backward(x, saved).dx
    assert float(cp.abs(dx[-1, -1, -1, -64:]).max()) < 1e-2  # dy = x has no gradient but eps's


@pytest.mark.parametrize("name", SHAPES)
def test_repeats_are_equal_bit_for_bit(cp, name):
    x, dy = randoms(cp, SHAPES[name], "float16")
    gamma, beta = parameters(cp, x.shape[1])
    runs = {b"".join(a.tobytes() for a in train(cp, x, dy, gamma, beta)) for _ in range(5)}
    assert len(runs) == 1


def test_a_captured_graph_replays_on_new_data(cp):
    """After one warm-up call, forward and backward capture; replaying computes on what the memory holds then."""
    x, dy = randoms(cp, (64, 32, 28, 28), "float32")
    gamma, beta = parameters(cp, 32)
    y, dx = cp.empty_like(x), cp.empty_like(x)
    stream = cp.cuda.Stream(non_blocking=True)

    def call():
        _, saved = cubn.batch_norm(x, gamma, beta, out=y)
        cubn.batch_norm_backward(dy, saved, out=dx)
        return saved

    cp.cuda.Device().synchronize()
    with stream:
        call()
        stream.begin_capture()
        kept = call()
        graph = stream.end_capture()
    for seed in (10, 20, 30):
        x[...], dy[...] = randoms(cp, x.shape, "float32", seed)
        expected = train(cp, x, dy, gamma, beta)
        cp.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        cp.testing.assert_array_equal(y, expected[0])
        cp.testing.assert_array_equal(dx, expected[3])
    del kept


def test_a_capture_without_a_warm_up_is_refused_in_words(cp):
    x = cp.ones((4, 3, 11, 13), "float64")
    stream = cp.cuda.Stream(non_blocking=True)
    from cubn.machines.cuda.launch import MACHINE

    MACHINE.backend._kernels.clear()
    with stream:
        stream.begin_capture()
        try:
            with pytest.raises(cubn.KernelError, match="once before the capture"):
                cubn.moments(x)
        finally:
            stream.end_capture()


def test_streams_do_not_disturb_one_another(cp):
    """Many calls in flight on several streams at once: each has a workspace of its own."""
    streams = [cp.cuda.Stream(non_blocking=True) for _ in range(4)]
    work = [randoms(cp, (200_000, 8), "float32", seed) for seed in range(4)]
    gamma, beta = parameters(cp, 8)
    expected = [train(cp, *pair, gamma, beta) for pair in work]
    cp.cuda.Device().synchronize()
    found = [[] for _ in streams]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with stream:
                found[i].append(train(cp, *work[i], gamma, beta))
    cp.cuda.Device().synchronize()
    for results, right in zip(found, expected, strict=True):
        for result in results:
            for a, b in zip(result, right, strict=True):
                cp.testing.assert_array_equal(a, b)


def test_threads_compile_and_launch_at_once(cp):
    from cubn.machines.cuda.launch import MACHINE

    MACHINE.backend._kernels.clear()
    x, dy = randoms(cp, (32, 16, 20, 20), "float16")
    gamma, beta = parameters(cp, 16)
    results, errors = [None] * 8, []
    cp.cuda.Device().synchronize()

    def run(i):
        try:
            with cp.cuda.Stream(non_blocking=True) as stream:
                results[i] = train(cp, x, dy, gamma, beta)
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


def test_every_device_computes_its_own_arrays(cp):
    if cp.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("needs two devices")
    found = []
    for device in (0, 1):
        with cp.cuda.Device(device):
            x = cp.asarray(np.random.default_rng(0).normal(size=(32, 8, 16, 16)).astype("float32"))
        y, _ = cubn.batch_norm(x)  # from device 0, whichever x lives on
        assert y.device.id == device
        found.append(cp.asnumpy(y))
    np.testing.assert_array_equal(*found)


def test_a_call_does_not_wait_for_the_device(cp):
    """A kernel that runs for a fifth of a second is still running when the call returns."""
    x, _ = randoms(cp, (32, 16, 20, 20), "float32")
    cubn.batch_norm(x)
    spin = cp.RawKernel(
        'extern "C" __global__ void spin(long long t) { long long s = clock64(); while (clock64() - s < t); }', "spin"
    )
    rate = cp.cuda.Device().attributes["ClockRate"] * 1000
    spin((1,), (1,), (np.int64(1),))
    cp.cuda.Device().synchronize()
    spin((1,), (1,), (np.int64(rate // 5),))
    _, saved = cubn.batch_norm(x)
    cubn.batch_norm_backward(x, saved)
    assert not cp.cuda.get_current_stream().done


def test_only_results_are_allocated(cp):
    """y and one (3, C) array; dx and one (2, C).  The pool rounds each up to 512 bytes."""
    x, dy = randoms(cp, (32, 64, 56, 56), "float16")
    gamma, beta = parameters(cp, 64)
    train(cp, x, dy, gamma, beta)
    pool = cp.get_default_memory_pool()

    def rounded(*sizes):
        return sum(-(-size // 512) * 512 for size in sizes)

    before = pool.used_bytes()
    _, saved = kept = cubn.batch_norm(x, gamma, beta)
    assert pool.used_bytes() - before == rounded(x.nbytes, 3 * 64 * 8)
    before = pool.used_bytes()
    grads = cubn.batch_norm_backward(dy, saved)
    assert pool.used_bytes() - before <= rounded(x.nbytes, 2 * 64 * 4)
    del kept, grads


def test_a_pytorch_tensor_goes_in_and_out_without_a_copy(cp):
    """DLPack in both directions, on PyTorch's stream: the recipe of the documentation."""
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    tensor = torch.randn(16, 8, 20, 20, device="cuda")
    with cp.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
        x = cp.from_dlpack(tensor)
        y, _ = cubn.batch_norm(x)
        back = torch.from_dlpack(y)
    assert x.data.ptr == tensor.data_ptr()
    assert back.data_ptr() == y.data.ptr
    expected = torch.nn.functional.batch_norm(tensor.double(), None, None, training=True)
    torch.testing.assert_close(back.double(), expected, rtol=0, atol=1e-5)


def test_bfloat16_where_cupy_has_it(cp):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    try:
        x = cp.random.default_rng(0).standard_normal((64, 24, 14, 14), dtype="float32").astype(ml_dtypes.bfloat16)
    except TypeError as error:
        pytest.skip(f"this CuPy has no bfloat16 ({error})")
    y, saved = cubn.batch_norm(x)
    wide = x.astype("float64")
    exact = (wide - wide.mean((0, 2, 3), keepdims=True)) / cp.sqrt(wide.var((0, 2, 3), keepdims=True) + 1e-5)
    assert y.dtype == x.dtype
    assert float(cp.abs(y.astype("float64") - exact).max()) <= 2**-8 * 5
    assert float(cp.abs(saved.moments.mean.astype("float64") - wide.mean((0, 2, 3))).max()) < 1e-6
