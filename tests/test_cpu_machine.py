"""What is special to the CPU machine: vectors, half precisions, streaming stores, threads, forks and plans.

What every machine must do is in the other files, where `machine` is "cpu" in turn.  The oracle here is NumPy in
float64 or wider, written out; none of cubn computes what is expected.
"""

import os
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc

import numpy as np
import pytest

import cubn

numba = pytest.importorskip("numba", reason="the CPU machine needs Numba, which is not installed")

from cubn.machines.cpu import compiling, plan, sharing, simd, threads  # noqa: E402

FORKS = hasattr(os, "fork")


def normalised(x, kept, gamma, beta, eps=1e-5):
    """y, mean and var of batch normalisation over all axes but `kept`, in float64."""
    wide = x.astype(np.float64)
    axes = tuple(axis for axis in range(x.ndim) if axis != kept)
    shape = [1] * x.ndim
    shape[kept] = -1
    mean = wide.mean(axis=axes, keepdims=True)
    var = ((wide - mean) ** 2).mean(axis=axes, keepdims=True)
    y = gamma.reshape(shape) * (wide - mean) / np.sqrt(var + eps) + beta.reshape(shape)
    return y, mean.ravel(), var.ravel()


def assert_near(found, exact, bound):
    """Every element within its own bound."""
    excess = np.abs(found - exact) - bound
    worst = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), excess.shape)
    assert excess[worst] <= 0, f"at {worst}: {found[worst]} is not within {bound[worst]} of {exact[worst]}"


def python(code, **environment):
    """Run a program of its own and return what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=300, env={**os.environ, **environment}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def _cpu():
    with cubn.dispatch.use_machine("cpu"):
        yield


@pytest.fixture
def everything_bypasses(monkeypatch):
    """Results of any size are written past the cache."""
    monkeypatch.setattr(plan, "BYPASS", 0)
    monkeypatch.setattr(plan, "TASK", 1 << 10)
    plan.plan_planes.cache_clear()
    plan.plan_columns.cache_clear()
    yield
    monkeypatch.undo()
    plan.plan_planes.cache_clear()
    plan.plan_columns.cache_clear()


# --- half precisions ------------------------------------------------------------------------------------


def conversions():
    """Functions that convert through vectors, compiled here and now."""

    @numba.njit
    def widen(source, result):
        for i in range(0, len(source), simd.LANES):
            simd.store(result, i * 8, simd.load(source, i * source.itemsize))

    @numba.njit
    def narrow(source, result):
        for i in range(0, len(source), simd.LANES):
            simd.store(result, i * result.itemsize, simd.load(source, i * 8))

    return widen, narrow


def bfloat16():
    return pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes, which is not installed").bfloat16


@pytest.fixture(params=["instructions", "integers"])
def half_conversions(request, monkeypatch):
    if request.param == "instructions" and not simd.has_half_instructions():
        pytest.skip("this processor has no instructions for float16")
    monkeypatch.setattr(simd, "has_half_instructions", lambda: request.param == "instructions")
    return conversions()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_pattern_of_sixteen_bits_widens_to_its_value(half_conversions, name):
    dtype, bits = (np.float16, np.uint16) if name == "float16" else (bfloat16(), np.int16)
    patterns = np.arange(1 << 16, dtype=np.uint16)
    found = np.empty(patterns.size)
    half_conversions[0](patterns.view(bits), found)
    with np.errstate(invalid="ignore"):  # signalling NaN
        expected = patterns.view(dtype).astype(np.float64)
    np.testing.assert_array_equal(found, expected)
    assert (np.signbit(found) == (patterns >= 0x8000)).all()


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_every_value_and_every_tie_narrows_to_the_nearest_even(half_conversions, name):
    """All values, all midpoints of neighbours and the float32 on either side of these."""
    dtype, bits = (np.float16, np.uint16) if name == "float16" else (bfloat16(), np.int16)
    with np.errstate(invalid="ignore"):
        values = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float64)
    finite = np.unique(values[np.isfinite(values)])
    ties = ((finite[1:] + finite[:-1]) / 2).astype(np.float32)
    overflow = np.float32([65519.996, 65520, 65520.004, 1e5, 3.4e38])
    up, down = (np.nextafter(ties, np.float32(end)) for end in (np.inf, -np.inf))
    special = np.float32([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, -1e-45])
    single = np.concatenate([finite.astype(np.float32), ties, up, down, overflow, -overflow, special])
    single = np.resize(single, -(-single.size // simd.LANES) * simd.LANES)
    found = np.empty(single.size, bits)
    half_conversions[1](single.astype(np.float64), found)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = single.astype(dtype)
    known = ~np.isnan(single)
    np.testing.assert_array_equal(found.view(np.uint16)[known], expected.view(np.uint16)[known])
    assert np.isnan(found.view(dtype)[~known].astype(np.float32)).all()


# --- memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", range(0, 20, 3))
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3, 4, 50), (2, 3, 257), (900, 24), (600, 33), (40, 4, 5), (1, 1, 5000)], ids=str)
def test_streaming_stores_write_all_of_the_result_and_nothing_else(everything_bypasses, shape, dtype, offset):
    """At any alignment of `out`.  y rounds once to its dtype, after four float32 operations on gamma * xhat."""
    rng = np.random.default_rng(offset)
    x = rng.normal(2, 3, shape).astype(dtype)
    statistics = np.float64 if dtype is np.float64 else np.float32
    gamma, beta = rng.normal(size=(2, shape[1])).astype(statistics)
    memory = np.full(x.size + 40, 77, dtype)
    out = memory[offset : offset + x.size].reshape(shape)
    y, saved = cubn.batch_norm(x, gamma, beta, out=out)
    assert y is out
    exact, _, _ = normalised(x, 1, gamma, beta)
    shift = beta.reshape(1, -1, *[1] * (x.ndim - 2))
    operation = 1e-13 if dtype is np.float64 else 2.0**-24
    last = 1.01 * max(np.finfo(dtype).eps / 2, operation)
    bound = operation * (4 * np.abs(exact - shift) + 2 * np.abs(shift)) + last * np.abs(exact)
    assert_near(out, exact, bound + (6e-8 if dtype is np.float16 else 0) + operation / 64)
    assert (memory[:offset] == 77).all()
    assert (memory[offset + x.size :] == 77).all()

    dy = rng.normal(size=shape).astype(dtype)
    expected = cubn.batch_norm_backward(dy, saved).dx.copy()
    memory[...] = 77
    cubn.batch_norm_backward(dy, saved, out=out)
    np.testing.assert_array_equal(out, expected)
    assert (memory[:offset] == 77).all()
    assert (memory[offset + x.size :] == 77).all()


SHAPES = [
    (32, 512, 7, 7), (8, 3, 224, 224), (1, 2, 700, 700), (5, 1, 300, 400), (100_001, 3), (70_000, 40), (4099, 257),
    (9, 50_021), (3000, 9, 4), (2, 2, 100_003), (1_000_000, 1), (64, 2048), (130, 24, 30, 31),
]  # fmt: skip
"""Every walk and every way to cut it: whole channels, pieces of one, ranges of columns, blocks of rows, wide rows."""


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_large_and_odd_shapes_agree_with_float64_arithmetic(shape, last):
    """One float32 rounding of gamma * xhat, two of beta, one of y; eight of each term of dx.  1e-8 is for the sums."""
    rng = np.random.default_rng(1)
    x = rng.normal(1000, 3, shape).astype(np.float32)
    if last and x.ndim > 2:
        x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    gamma, beta = rng.normal(size=(2, shape[1])).astype(np.float32)
    y, saved = cubn.batch_norm(x, gamma, beta)
    exact, mean, var = normalised(x, 1, gamma, beta)
    np.testing.assert_allclose(saved.moments.wide_mean, mean, rtol=1e-12)
    np.testing.assert_allclose(saved.moments.wide_var, var, rtol=1e-9)
    axes = (0, *range(2, x.ndim))
    aligned = (1, -1, *[1] * (x.ndim - 2))
    unit = 2.0**-24
    shift = beta.reshape(aligned)
    assert_near(y, exact, unit * (np.abs(exact - shift) + 2 * np.abs(shift) + np.abs(exact)) + 1e-8)

    dy = rng.normal(size=shape).astype(np.float32)
    xhat = (x - mean.reshape(aligned)) / np.sqrt(var.reshape(aligned) + 1e-5)
    s0, s1 = dy.sum(axes, np.float64), (dy * xhat).sum(axes)
    m = x.size / shape[1]
    scale = (gamma / np.sqrt(var + 1e-5)).reshape(aligned)
    level, tilt = (s0 / m).reshape(aligned), xhat * (s1 / m).reshape(aligned)
    dx = scale * (dy - level - tilt)
    grads = cubn.batch_norm_backward(dy, saved)
    assert_near(grads.dx, dx, 8 * unit * np.abs(scale) * (np.abs(dy) + np.abs(level) + np.abs(tilt)) + 1e-8)
    np.testing.assert_allclose(grads.dbeta, s0, rtol=2.0**-23, atol=1e-7 * np.sqrt(m))
    np.testing.assert_allclose(grads.dgamma, s1, rtol=2.0**-23, atol=1e-7 * np.sqrt(m))


@pytest.mark.parametrize("shape", [(64, 3, 40, 40), (9000, 5)], ids=str)
def test_float32_is_right_up_to_1e30(shape):
    x = np.random.default_rng(2).normal(1e30, 1e29, shape).astype(np.float32)
    gamma, beta = np.float32([[2.0], [0.5]]) * np.ones((2, shape[1]), np.float32)
    y, saved = cubn.batch_norm(x, gamma, beta)
    exact, _, var = normalised(x, 1, gamma, beta)
    shift = beta.reshape(1, -1, *[1] * (x.ndim - 2))
    assert_near(y, exact, 2.0**-24 * (np.abs(exact - shift) + 2 * np.abs(shift) + np.abs(exact)) + 1e-12)
    np.testing.assert_allclose(saved.moments.wide_var, var, rtol=1e-10)


@pytest.mark.parametrize("scale", [1e-41, 1e-36, 1e-20, 1.0, 1e20, 3e37])
@pytest.mark.parametrize("shape", [(8, 3, 40, 41), (900, 5), (33, 20, 7, 7)], ids=str)
def test_float32_arithmetic_is_as_right_at_every_scale(shape, scale):
    """Without eps, y does not depend on the scale of x.  The distance rounds, the constant term twice, and y; dx takes
    eight."""
    rng = np.random.default_rng(6)
    x = (scale * rng.normal(3, 1, shape)).astype(np.float32)
    gamma, beta = rng.normal(size=(2, shape[1])).astype(np.float32)
    y, saved = cubn.batch_norm(x, gamma, beta, eps=0.0)
    exact, mean, var = normalised(x, 1, gamma, beta, eps=0.0)
    aligned = (1, -1, *[1] * (x.ndim - 2))
    shift, unit = beta.reshape(aligned), 2.0**-24
    assert_near(y, exact, unit * (np.abs(exact - shift) + 2 * np.abs(shift) + np.abs(exact)) + 1e-12)
    if scale < 1e-37:
        return  # dx is beyond the largest float32

    dy = rng.normal(size=shape).astype(np.float32)
    axes = (0, *range(2, x.ndim))
    xhat = (x - mean.reshape(aligned)) / np.sqrt(var).reshape(aligned)
    level = dy.mean(axes, np.float64).reshape(aligned)
    tilt = xhat * (dy * xhat).mean(axes).reshape(aligned)
    scale_dx = (gamma / np.sqrt(var)).reshape(aligned)
    bound = 8 * unit * np.abs(scale_dx) * (np.abs(dy) + np.abs(level) + np.abs(tilt)) + 2e-45
    assert_near(cubn.batch_norm_backward(dy, saved).dx, scale_dx * (dy - level - tilt), bound)


@pytest.mark.parametrize("eps", [0.0, 1e-5])
@pytest.mark.parametrize("value", [3.4e38, -1.7e38, 1.23e8, -7e-20, 1e-42])
@pytest.mark.parametrize("shape", [(4, 3, 5, 7), (40, 3)], ids=str)
def test_a_constant_channel_gives_beta_at_the_ends_of_the_range(shape, value, eps):
    beta = np.float32([0.1, -2.0, 1e10])
    y, _ = cubn.batch_norm(np.full(shape, value, np.float32), np.float32([1.0, 3.0, -1.0]), beta, eps=eps)
    assert (y == beta.reshape(1, -1, *[1] * (y.ndim - 2))).all()


def test_an_outlier_as_first_sample_costs_few_digits():
    """Sums are of distances from the first sample of a segment or block: m2 has a condition of at most its samples.

    With 2000 of them, and sums of as many terms, the error is below 2000 * 2000 / 16 lanes * 2**-53 = 3e-11.
    """
    x = np.random.default_rng(3).normal(size=(200_000, 2))
    x[0] = 1e6
    for values in (x, np.ascontiguousarray(x.T).reshape(1, 2, -1)):
        m = cubn.moments(values)
        exact = x.astype(np.longdouble)
        var = ((exact - exact.mean(axis=0)) ** 2).mean(axis=0)
        np.testing.assert_allclose(m.wide_var, var.astype(float), rtol=3e-11)


@pytest.mark.parametrize("shape", [(64, 64, 56, 56), (50_000, 256), (64, 3, 256, 256), (1024, 8192)], ids=str)
def test_no_more_than_one_percent_of_x_is_allocated_beside_the_results(shape):
    """The results of three calls are y, dx and ten numbers per channel; few long rows are cut into four blocks,
    each of which has three numbers per channel for a while."""
    x = np.random.default_rng(4).standard_normal(shape, np.float32)
    out = np.empty_like(x)
    _, saved = cubn.batch_norm(x, out=out)
    cubn.batch_norm_backward(x, saved, out=out)  # compiled by now
    tracemalloc.start()
    try:
        cubn.batch_norm(x, out=out)
        cubn.batch_norm_backward(x, saved, out=out)
        cubn.batch_norm_inference(x, np.zeros(shape[1], np.float32), np.ones(shape[1], np.float32), out=out)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    parts = 96 * shape[1] if shape[0] == 1024 else 0
    assert peak <= x.nbytes / 100 + 80 * shape[1] + parts, f"{peak} B beside {x.nbytes} B"


# --- threads --------------------------------------------------------------------------------------------


def everything(shape, dtype, last):
    """All results of a forward and backward pass, as bytes."""
    rng = np.random.default_rng(5)
    x = rng.normal(3, 2, shape).astype(dtype)
    dy, residual = rng.normal(size=(2, *shape)).astype(dtype)
    if last and x.ndim > 2:
        x, dy, residual = (np.moveaxis(np.ascontiguousarray(np.moveaxis(a, 1, -1)), -1, 1) for a in (x, dy, residual))
    gamma, beta = rng.normal(size=(2, shape[1])).astype(np.float32 if dtype != np.float64 else dtype)
    found = []
    for options in ({}, {"activation": "relu", "residual": residual}, {"where": rng.random(shape) < 0.8}):
        y, saved = cubn.batch_norm(x, gamma, beta, **options)
        grads = cubn.batch_norm_backward(dy, saved)
        moments = saved.moments
        found += [y, moments.wide_mean, moments.wide_m2, grads.dx, grads.dgamma, grads.dbeta]
    found.append(cubn.batch_norm_inference(x, beta, np.abs(gamma), gamma, beta))
    return [np.ascontiguousarray(a).tobytes() for a in found]


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape", [(16, 64, 28, 28), (2, 3, 400, 401), (30_000, 24), (32, 256, 7, 7), (64, 20_000)], ids=str
)
def test_the_number_of_threads_changes_no_bit(monkeypatch, shape, last):
    monkeypatch.setattr(threads, "thread_count", lambda: 1)
    alone = everything(shape, np.float32, last)
    for count in (2, 3, 8):
        monkeypatch.setattr(threads, "thread_count", lambda count=count: count)
        for _ in range(3):
            assert everything(shape, np.float32, last) == alone, f"{count} threads"


def test_calls_from_several_threads_do_not_disturb_each_other():
    shapes = [(16, 64, 28, 28), (30_000, 24), (32, 64), (2, 3, 400, 401)]
    expected = [everything(shape, np.float32, False) for shape in shapes]
    wrong = []

    def work(k):
        with cubn.dispatch.use_machine("cpu"):
            for turn in range(6):
                k = (k + turn) % len(shapes)
                if everything(shapes[k], np.float32, False) != expected[k]:
                    wrong.append(shapes[k])

    callers = [threading.Thread(target=work, args=(k,)) for k in range(sharing.SLOTS + 2)]  # two find no slot
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(timeout=120)
        assert not caller.is_alive(), "a call did not return"
    assert not wrong


def test_a_helper_goes_to_sleep_and_is_woken_up(monkeypatch):
    monkeypatch.setattr(threads, "thread_count", lambda: 2)
    woken = []
    wake = threads._wake
    monkeypatch.setattr(threads, "_wake", lambda wanted: (woken.append(wanted), wake(wanted)))
    x = np.random.default_rng(7).standard_normal((32, 64, 56, 56), np.float32)
    expected = cubn.batch_norm(x)[0]
    for turn in range(3):
        limit = time.monotonic() + 60
        while len(threads._asleep) < threads._helpers:
            assert time.monotonic() < limit, "a helper does not go to sleep"
            time.sleep(0.01)
        woken.clear()
        np.testing.assert_array_equal(cubn.batch_norm(x)[0], expected)
        assert woken == [1], turn


def test_helpers_leave_nothing_on_the_board(monkeypatch):
    monkeypatch.setattr(threads, "thread_count", lambda: 3)
    for shape in ((16, 64, 28, 28), (30_000, 24)):
        cubn.batch_norm(np.ones(shape, np.float32))
        for slot in range(sharing.SLOTS):
            owner, gate = (
                threads._board[(sharing.LINE + slot * sharing.SLOT + line) // 8] for line in (0, sharing.LINE)
            )
            assert owner == gate == 0


@pytest.mark.parametrize("pause", [0, 0.004])
def test_a_program_may_end_while_helpers_listen(pause):
    found = python(
        f"""
        import time, numpy as np, cubn
        from cubn.machines.cpu import threads
        threads.thread_count = lambda: 4
        cubn.batch_norm(np.ones((32, 64, 56, 56), np.float32))
        print("done", flush=True)
        time.sleep({pause})
        """
    )
    assert found == "done"


@pytest.mark.skipif(not FORKS, reason="this system has no fork")
def test_a_forked_worker_computes_after_its_parent_has():
    """As a DataLoader does, with the helpers of the parent running and several times over."""
    found = python(
        """
        import multiprocessing, threading, numpy as np, cubn
        from cubn.machines.cpu import threads
        threads.thread_count = lambda: 3
        x = np.random.default_rng(0).standard_normal((16, 64, 56, 56), np.float32)
        def work(_):
            total = cubn.batch_norm(x)[0].sum(dtype=np.float64)
            return total, sum(thread.name.startswith('cubn-') for thread in threading.enumerate())
        before = work(None)
        with multiprocessing.get_context("fork").Pool(2) as pool:
            inside = pool.map_async(work, range(8)).get(timeout=120)
        assert work(None) == before and set(inside) == {before}, (before, inside)
        print(before[1])
        """
    )
    assert found == "2"


@pytest.mark.parametrize(("variable", "helpers"), [("1", 0), ("3", 2)])
def test_numba_num_threads_is_respected(variable, helpers):
    found = python(
        """
        import threading, numpy as np, cubn
        cubn.batch_norm(np.ones((64, 64, 56, 56), np.float32))
        print(threading.active_count() - 1)
        """,
        NUMBA_NUM_THREADS=variable,
    )
    assert int(found) == helpers


def test_set_num_threads_is_respected():
    found = python(
        """
        import threading, numba, numpy as np, cubn
        numba.set_num_threads(1)
        before = threading.active_count()
        cubn.batch_norm(np.ones((64, 64, 56, 56), np.float32))
        print(threading.active_count() - before)
        """,
        NUMBA_NUM_THREADS="4",
    )
    assert found == "0"


def test_every_task_is_taken_once_whoever_comes():
    """Two walks over 17 tasks by 5 threads, of which some never come: each task once in each phase."""

    @numba.njit
    def all_of(counters, team, me, phase, tasks, taken, backwards):
        task = sharing.take(counters, team, me, phase, tasks, backwards)
        while task < tasks:
            taken[task] += 1
            task = sharing.take(counters, team, me, phase, tasks, backwards)

    for tasks in (1, 4, 17):
        counters = sharing.start(5)
        for phase in (sharing.MEASURING, sharing.MERGING, sharing.WRITING):
            taken = np.zeros(tasks, np.int64)
            all_of(counters, 5, 3, phase, tasks, taken, False)
            all_of(counters, 5, 0, phase, tasks, taken, False)
            assert (taken == 1).all()


def test_the_next_task_is_foreseen_within_a_region_only():
    for team in (1, 2, 3, 8):
        for tasks in (1, 2, 7, 24):
            begins = {tasks * region // team for region in range(team + 1)}
            for task in range(tasks):
                assert sharing.goes_on(team, task, tasks) == (task + 1 not in begins), (team, tasks, task)


# --- compiling ------------------------------------------------------------------------------------------


def test_importing_cubn_loads_no_numba():
    assert python("import sys, cubn; print('numba' in sys.modules, 'llvmlite' in sys.modules)") == "False False"


WITHOUT_NUMBA = """
import sys, warnings
sys.modules["numba"] = None     # as if it were not installed
import numpy as np, cubn
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    y, _ = cubn.batch_norm(np.array([[1.0], [3.0]]), eps=0.0)
    cubn.batch_norm(np.array([[1.0], [3.0]]))
assert y.tolist() == [[-1.0], [1.0]], y
print([(w.category.__name__, "cubn[cpu]" in str(w.message)) for w in seen])
"""


def test_without_numba_the_reference_serves_and_says_so_once():
    assert python(WITHOUT_NUMBA) == "[('PerformanceWarning', True)]"


def test_kernels_are_found_on_disk_the_second_time(tmp_path):
    code = """
        import numpy as np, cubn
        from cubn.machines.cpu import planes
        cubn.batch_norm(np.ones((2, 3, 40)))
        stats = planes.forward.stats
        print(sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
    """
    assert python(code, NUMBA_CACHE_DIR=str(tmp_path)) == "0 1"
    assert python(code, NUMBA_CACHE_DIR=str(tmp_path)) == "1 0"


def test_a_change_in_any_kernel_file_makes_the_cache_stale(monkeypatch):
    """Numba itself would look at the file of the kernel alone."""
    from cubn.machines.cpu import planes

    stamp = planes.forward._cache._cache_file._source_stamp
    assert stamp[1] == compiling._source()


def test_a_cache_that_cannot_be_written_is_done_without():
    code = """
        import numba.core.caching as caching
        def refuse(self): raise OSError("read-only")
        caching._CacheLocator.ensure_cache_path = refuse
        import numpy as np, cubn
        print(cubn.batch_norm(np.array([[1.0], [3.0]]), eps=0.0)[0].tolist())
    """
    assert python(code) == "[[-1.0], [1.0]]"


def test_a_cache_that_fails_when_it_is_written_is_done_without():
    code = """
        import numba.core.caching as caching
        def refuse(self, *args): raise OSError("no space left on device")
        caching.CompileResultCacheImpl.reduce = refuse
        import numpy as np, cubn
        print(cubn.batch_norm(np.array([[1.0], [3.0]]), eps=0.0)[0].tolist())
    """
    assert python(code, NUMBA_CACHE_DIR="/dev/null/cubn") == "[[-1.0], [1.0]]"


def test_warmup_refuses_a_dtype_that_has_no_kernels():
    from cubn.warmup import warmup

    with pytest.raises(cubn.DTypeError, match="int32"):
        warmup(["float32", "int32"])


# --- plans ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 31, 1000, 5000, 100_352, 3_211_264])
@pytest.mark.parametrize("columns", [1, 3, 24, 64, 1001, 2048, 802_816])
def test_partial_results_of_columns_take_no_more_than_one_percent(rows, columns):
    """24 bytes per channel and block, unless there are so few rows that four blocks are all there can be."""
    if rows * columns > 2**33:
        pytest.skip("no such array")
    for itemsize in (2, 4, 8):
        found = plan.plan_columns(rows, columns, itemsize, True, False, False, True)
        assert found.ranges == 1 or found.blocks == 1
        assert found.blocks <= 4 or 24 * found.blocks * columns <= 0.01 * rows * columns * itemsize + 24 * columns
