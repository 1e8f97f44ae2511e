"""The executor of tests/host: traffic, arrays, arguments, the compiler, the cache."""

import numpy as np
import pytest
from host import build, nvrtc
from host.executor import Fault, Kernel, device_array, device_empty, unwritten
from host.ptx import UnsupportedPtxError
from host.samples import sample, sample_text

pytestmark = pytest.mark.skipif(bool(build.missing()), reason=build.missing())

THREADS = 128

bfloat16 = pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes, which is not installed").bfloat16


def launch(kernel, arguments, count, block=128, **options):
    kernel((-(-count // block),), (block,), arguments, **options)


# Traffic


@pytest.mark.parametrize("checked", [True, False])
def test_every_byte_that_moves_is_counted_once(checked):
    x, y = device_array(np.ones(1000, np.float32)), device_empty(1000, np.float32)
    idle = device_array(np.ones(9))
    kernel = sample("values", "copy_vectors", checked=checked)
    launch(kernel, (x, y, np.int64(250)), 250)
    assert kernel.traffic.of(x) == (4000, 0)
    assert kernel.traffic.of(y) == (0, 4000)
    assert kernel.traffic.of(x[500:]) == (4000, 0), "a view belongs to its array"
    assert kernel.traffic.of(idle) == (0, 0)
    assert (kernel.traffic.read, kernel.traffic.written) == (4000, 4000)
    earlier = kernel.traffic
    launch(kernel, (x, y, np.int64(2)), 250)
    assert kernel.traffic.read == 32, "each launch counts from zero"
    assert earlier.read == 4000


def test_shared_memory_is_no_traffic_and_an_atomic_is_a_read_and_a_write():
    a, f = device_array(np.zeros(300, np.int32)), device_array(np.zeros(1, np.float32))
    y, count = device_array(np.zeros(20, np.int32)), device_array(np.zeros(1, np.uint64))
    kernel = sample("values", "atomics")
    launch(kernel, (a, y, f, count, np.int32(300)), 300)
    assert kernel.traffic.of(f) == (1200, 1200)
    assert kernel.traffic.of(count) == (2400, 2400)
    assert kernel.traffic.of(a)[1] == 0


# Arrays and arguments


def test_what_a_kernel_leaves_unwritten_is_told():
    x = device_array(np.ones(100, np.float32))
    for checked in (True, False):
        for bug in (0, 1):
            y = device_empty(256, np.float32)
            sample("bounds", "unwritten_output", checked=checked, BUG=bug)((1,), (THREADS,), (x, y, np.int32(100)))
            assert np.flatnonzero(unwritten(y)).tolist() == ([77] if bug else [])
            assert np.isnan(y[77]) == bool(bug)


def test_what_a_kernel_writes_is_written_even_if_it_looks_like_poison():
    y = device_empty(8, np.int32)
    Kernel('extern "C" __global__ void fill(int *y) { y[threadIdx.x] = -1; }', "fill")((1,), (4,), (y,))
    assert unwritten(y).tolist() == [False] * 4 + [True] * 4


def test_what_the_host_writes_is_written():
    y = device_empty(256, np.float32)
    assert unwritten(y).all()
    y[:] = 0
    assert not unwritten(y).any()
    x = device_array(np.ones(100, np.float32))
    sample("bounds", "uninitialised_global", BUG=1)((1,), (THREADS,), (x, y, np.int32(100)))
    assert y[:THREADS].tolist() == [1.0] * THREADS
    with pytest.raises(TypeError, match="whole array"):
        unwritten(y[1:])


@pytest.mark.parametrize("dtype", [np.float16, bfloat16, np.float32, np.float64, np.uint8, np.int64])
@pytest.mark.parametrize("offset", [0, 2, 16, 24])
def test_device_arrays_hold_values_at_the_offset_asked_for(dtype, offset):
    values = np.arange(35).reshape(5, 7).astype(dtype)
    array = device_array(values, offset=offset)
    assert array.ctypes.data % 256 == offset
    assert array.dtype == values.dtype
    np.testing.assert_array_equal(array, values)
    empty = device_empty((3, 5), dtype, offset=offset)
    assert empty.ctypes.data % 256 == offset
    assert (np.frombuffer(empty.tobytes(), np.uint8) == 0xFF).all()
    assert device_empty((0, 3), dtype, offset=offset).shape == (0, 3)


def test_an_unaligned_base_makes_vectors_misaligned():
    kernel = sample("values", "copy_vectors")
    y = device_empty(8, np.float32)
    launch(kernel, (device_array(np.ones(8, np.float32), offset=16), y, np.int64(2)), 2)
    with pytest.raises(Fault, match="misaligned read of 16 bytes"):
        launch(kernel, (device_array(np.ones(8, np.float32), offset=8), y, np.int64(2)), 2)


def test_wrong_arguments_are_refused():
    kernel = sample("values", "scale")
    x, y = device_array(np.ones(4, np.float32)), device_empty(4, np.float32)
    factor, shift, n = np.float32(2), np.float64(3), np.int32(4)
    kernel((1,), (4,), (x, y, factor, shift, n))
    np.testing.assert_array_equal(y, 5)
    wrong = [
        ((x, y, factor, shift), "takes 5 arguments, but was given 4"),
        ((x, y, factor, shift, 4), "pass a NumPy scalar"),
        ((x, y, 2.0, shift, n), "pass a NumPy scalar"),
        ((x, y, factor, shift, np.int64(4)), "takes 4 bytes, but was given"),
        ((x, y, factor, shift, np.float32(4)), "takes 4 bytes, but was given"),
        ((x, y, np.int32(2), shift, n), "takes 4 bytes, but was given"),
        ((x, y, factor, np.float32(3), n), "takes 8 bytes, but was given"),
        ((x, y, factor, np.int64(3), n), "takes 8 bytes, but was given"),
        ((x, np.int64(0), factor, shift, n), "is a pointer, but was given the scalar"),
        ((x, np.zeros(4, np.float32), factor, shift, n), "an array of the host"),
        ((x, y, factor, shift, None), "is no pointer, but was given None"),
        ((x, y, factor, x, n), "is no pointer, but was given an array"),
    ]
    for arguments, message in wrong:
        with pytest.raises(TypeError, match=message):
            kernel((1,), (4,), arguments)


def test_launches_that_no_device_accepts_are_refused():
    y = device_array(np.zeros(256, np.float32))
    kernel = sample("clusters", "read_too_early", 90, BUG=0)
    for grid, block, message in (((2,), (129,), "1 to 128"), ((2,), (0,), "1 to 128"), ((3,), (128,), "no multiple")):
        with pytest.raises(ValueError, match=message):
            kernel(grid, block, (y,))
    with pytest.raises(ValueError, match="no device has more"):
        kernel((2,), (128,), (y,), shared_mem=227 << 10)


def test_an_unknown_instruction_is_an_error_and_not_executed_as_something_else():
    with pytest.raises(UnsupportedPtxError, match="device functions must be inlined"):
        sample("values", "calls")


# The compiler

SPILLING = """
extern "C" __global__ void __launch_bounds__(1024) crowded(float *y, const float *x)
{
    float v[96];
    for (int i = 0; i < 96; ++i) v[i] = x[i * 1024 + threadIdx.x];
    for (int k = 0; k < 4; ++k) {
        __syncthreads();
        for (int i = 0; i < 96; ++i) v[i] = v[i] * v[(i * 7 + 3) % 96] + v[(i * 5 + 1) % 96];
    }
    for (int i = 0; i < 96; ++i) y[i * 1024 + threadIdx.x] = v[i];
}
"""


@pytest.mark.parametrize("arch", [75, 80, 90, 120])
def test_the_compiler_tells_what_a_kernel_needs(arch):
    text = sample_text("values")
    usage = nvrtc.compile_cubin(text, "block_sums", {}, arch)
    assert 8 <= usage.registers <= 64
    assert usage.shared == 32
    assert usage.spill_stores == usage.spill_loads == usage.stack == 0
    assert usage.warnings == ""
    crowded = nvrtc.compile_cubin(SPILLING, "crowded", {}, arch)
    assert crowded.registers <= 64
    assert min(crowded.spill_stores, crowded.spill_loads, crowded.stack) > 0


def test_the_compiler_reports_errors_and_warnings():
    with pytest.raises(nvrtc.CompileError, match=r'typo\.cu\(1\): error: identifier "undefined_name"'):
        nvrtc.compile_cubin('extern "C" __global__ void typo(float *y) { y[0] = undefined_name; }', "typo", {}, 80)
    with pytest.raises(nvrtc.CompileError, match="no entry point 'other'"):
        nvrtc.compile_cubin('extern "C" __global__ void one() {}', "other", {}, 80)
    usage = nvrtc.compile_cubin('extern "C" __global__ void unused() { int never; }', "unused", {}, 80)
    assert "declared but never referenced" in usage.warnings
    with pytest.raises(nvrtc.CompileError, match="no installed NVRTC compiles for sm_10"):
        nvrtc.compile_cubin("", "x", {}, 10)


def test_each_toolkit_offers_architectures():
    assert {75, 80, 90, 120} <= set(nvrtc.architectures())
    for toolkit in nvrtc.toolkits():
        assert toolkit.includes, f"{toolkit} has no headers; install its nvidia-cuda-runtime package"


# The cache


def test_a_kernel_is_built_once_and_the_cache_may_be_shared(tmp_path, monkeypatch):
    monkeypatch.setenv("CUBN_HOST_CACHE", str(tmp_path))
    build._headers.cache_clear()
    try:
        text = 'extern "C" __global__ void fill(float *y) { y[threadIdx.x] = VALUE; }'
        jobs = [(text, "fill", {"VALUE": value}, 80) for value in (1, 2, 3)]
        build.prebuild([*jobs, *jobs], processes=2)
        built = {path: path.stat().st_mtime_ns for path in tmp_path.glob("fill-*")}
        assert len(built) == 3
        assert not list(tmp_path.glob(".unfinished-*"))
        y = device_empty(4, np.float32)
        for job in jobs:
            Kernel(*job)((1,), (4,), (y,))
            assert y.tolist() == [job[2]["VALUE"]] * 4
        assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("fill-*")} == built
    finally:
        build._headers.cache_clear()
