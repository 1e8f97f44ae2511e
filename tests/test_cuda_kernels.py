"""The CUDA kernels, executed thread for thread on the CPU: every map, every tail, every schedule.

The suite of the other machines runs on them too, as the machine `host`; here is what only kernels have.  All
launches are checked: a race, an uninitialised or a misplaced access fails the test in which it happens.  Shapes
are small, and so is the device that they are planned for, so that few numbers meet many tiles and many blocks.
"""

import itertools
from dataclasses import replace

import arrays
import host_machine
import numpy as np
import oracle
import pytest
from host.build import missing
from host.executor import Fault, Kernel, device_array, device_empty

from cubn.machines.cuda.plan import DeviceLimits, windows_of_a_thread
from cubn.machines.cuda.source import translation_unit
from cubn.problem import Problem

if missing():
    pytest.skip(missing(), allow_module_level=True)

ROUNDOFF = {"float16": 2.0**-24, "bfloat16": 2.0**-24, "float32": 2.0**-24, "float64": 2.0**-53}
"""Of the arithmetic, whatever the elements are."""

REGIMES = {
    "planes": (3, 5, 256),
    "planes, one of them": (1, 3, 512),
    "planes, one channel in many tiles": (3, 1, 2048),
    "planes, more channels than blocks": (2, 37, 128),
    "planes, shorter than a block": (7, 3, 160),
    "planes, ragged": (3, 4, 1031),
    "planes, ragged and each in one tile": (1, 17, 517),
    "columns": (60, 64, 1),
    "columns, many tiles": (33, 320, 1),
    "columns, the last tile narrower": (40, 84, 1),
    "columns, tall": (700, 8, 1),
    "columns, odd": (303, 27, 1),
    "columns, three": (203, 3, 1),
    "columns, odd and many tiles": (13, 531, 1),
    "columns, fewer rows than a row is folded from": (3, 35, 1),
    "columns of short runs": (6, 16, 49),
    "columns of short odd runs": (5, 3, 49),
    "columns of two": (2, 5, 1),
    "one number per channel": (1, 12, 1),
}
"""(outer, channels, inner) for every way that the plans cut a tensor, with its tails."""

TILED = ("planes, one channel in many tiles", "columns, tall", "columns, odd", "columns, odd and many tiles")
"""Regimes in which blocks leave partial results to one another."""


@pytest.fixture
def host():
    """A machine of its own, so that no test sees another's launches; the fused kernels are in test_cuda_teams.py."""
    backend = host_machine.HostBackend()
    backend._kernels = host_machine.BACKEND._kernels  # compiled once
    return host_machine.Apart("host", backend)


def random(shape, dtype="float32", seed=0, mean=3.0):
    return np.random.default_rng(seed).normal(mean, 2.0, shape).astype(arrays.dtype_of(dtype))


class Case:
    """A problem with its arrays and its exact results."""

    def __init__(self, shape, dtype="float32", *, where=False, residual=False, relu=False, seed=0, frozen=False):
        self.problem = Problem(*shape, dtype, 1e-3, "relu" if relu else None)
        statistics = self.problem.statistics_dtype
        self.x, self.dy = random(shape, dtype, seed), random(shape, dtype, seed + 1, mean=0.5)
        self.gamma, self.beta = np.random.default_rng(seed).normal(1, 0.3, (2, shape[1])).astype(statistics)
        self.residual = random(shape, dtype, seed + 2) if residual else None
        self.where = np.random.default_rng(seed).random(shape) < 0.7 if where else None
        if where:
            self.x[~self.where] = np.nan  # must not be seen
            self.dy[~self.where] = np.inf
        self.constants = None
        if frozen:
            self.constants = np.random.default_rng(seed).random((2, shape[1])) + 0.5
        self.dtype = arrays.dtype_of(dtype)
        self.exact = oracle.batch_norm(
            self.x,
            self.gamma,
            self.beta,
            eps=self.problem.eps,
            activation=self.problem.activation,
            residual=self.residual,
            where=self.where,
            dy=self.dy,
            statistics=None if self.constants is None else tuple(self.constants),
            roundoff=ROUNDOFF[dtype],
        )

    def check(self, machine):
        """Everything that the machine computes for this case is within its bound; returns it all."""
        problem, parameters = self.problem, (self.gamma, self.beta)
        wants_residual = self.residual is not None
        with np.errstate(all="ignore"):
            if self.constants is None:
                y, batch, rstd, active, _ = machine.forward(problem, self.x, *parameters, self.residual, self.where)
                mean, count = batch.wide_mean, batch.count
                oracle.assert_within(batch.mean, self.exact.mean.rounded_to(batch.mean.dtype), "mean")
                oracle.assert_within(batch.var, self.exact.var.rounded_to(batch.var.dtype), "var")
                oracle.assert_within(rstd, self.exact.rstd, "rstd")
            else:
                mean, rstd, count = self.constants[0], (self.constants[1] + problem.eps) ** -0.5, None
                y, active = machine.normalize(problem, self.x, mean, rstd, *parameters, self.residual, self.where)
            dx, dresidual, sums = machine.backward(
                problem, self.dy, self.x, mean, rstd, *parameters, count, self.where, active, wants_residual
            )
        oracle.assert_within(y, self.exact.y.rounded_to(self.dtype), "y")
        oracle.assert_within(dx, self.exact.dx.rounded_to(self.dtype), "dx")
        oracle.assert_within(sums.dy, self.exact.dbeta.rounded_to(sums.dy.dtype), "dbeta")
        oracle.assert_within(sums.dy_xhat, self.exact.dgamma.rounded_to(sums.dy.dtype), "dgamma")
        if wants_residual:
            oracle.assert_within(dresidual, self.exact.dresidual.rounded_to(self.dtype), "dresidual")
        return [np.array(a) for a in (y, mean, rstd, dx, sums.dy, sums.dy_xhat)]


@pytest.mark.parametrize("dtype", ROUNDOFF)
@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_is_exact(host, regime, dtype):
    """Within the oracle's bounds for the arithmetic of the dtype.  A ReLU's kink may not be near, so none here."""
    Case(REGIMES[regime], dtype).check(host)


def test_the_regimes_are_those_that_the_plans_know(host):
    """Both maps, whole and ragged, alone and in many tiles, folded or not: each by some regime of float32."""
    seen = set()
    for shape in REGIMES.values():
        Case(shape).check(host)
        for launch in host.backend.launches:
            tiles = launch.plan.tiles
            seen.add((tiles.column, tiles.ragged, tiles.splits > 1, tiles.fold > 1, tiles.count > launch.plan.grid))
    for column, ragged, split in itertools.product((False, True), repeat=3):
        assert any(s[:3] == (column, ragged, split) for s in seen), (column, ragged, split)
    assert any(fold for _, _, _, fold, _ in seen)
    assert any(crowded for *_, crowded in seen)


OPTIONS = [
    dict(zip(("where", "residual", "relu", "frozen"), values, strict=True))
    for values in itertools.product((False, True), repeat=4)
    if any(values)
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(k for k, v in options.items() if v))
@pytest.mark.parametrize("regime", ["planes", "columns of short odd runs"])
def test_every_option_is_exact(host, regime, options):
    Case(REGIMES[regime], seed=kink_free_seed(REGIMES[regime], options), **options).check(host)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("regime", ["planes, ragged", "columns"])
def test_all_options_together_are_exact_in_every_dtype(host, regime, dtype):
    options = {"where": True, "residual": True, "relu": True, "dtype": dtype}
    Case(REGIMES[regime], seed=kink_free_seed(REGIMES[regime], options), **options).check(host)


def kink_free_seed(shape, options):
    """A seed whose data keep ReLU's kink away from every rounding error; the oracle refuses others."""
    for seed in range(50):
        try:
            Case(shape, seed=seed, **options)
        except AssertionError:
            continue
        return seed
    raise AssertionError("no such data")


@pytest.mark.parametrize("regime", TILED)
def test_no_schedule_changes_a_bit(host, regime):
    """Blocks and threads ascending, descending and in random orders: the last to arrive merges in index order."""
    found = []
    for seed in (0, 1, 2, 3, 4):
        host.backend.seed = seed
        found.append(b"".join(values.tobytes() for values in Case(REGIMES[regime]).check(host)))
    assert len(set(found)) == 1


@pytest.mark.parametrize("regime", TILED)
def test_no_grid_changes_a_bit(host, regime):
    """One block for all tiles, or one for each."""
    found = []
    for grid in (1, 2, 1000):
        host.backend.device = DeviceLimits("tiny", 80, 2, threads_per_block=64, grid=grid)
        found.append(b"".join(values.tobytes() for values in Case(REGIMES[regime]).check(host)))
    assert len(set(found)) == 1


# Memory


def placed(values, *, offset=0, gap=0):
    """The values, `offset` elements after a vector boundary and with `gap` elements between their rows."""
    outer, channels, inner = values.shape
    row = channels * inner + gap
    memory = np.full(outer * row + offset + 64, 77, values.dtype)
    start = (-memory.ctypes.data // values.itemsize) % 32 + offset
    strides = (row * values.itemsize, inner * values.itemsize, values.itemsize)
    view = np.ndarray(values.shape, values.dtype, memory.data, start * values.itemsize, strides)
    view[...] = values
    return view


PLACES = {
    "unaligned alike": ({"offset": 1}, {"offset": 1}),
    "unaligned each in its own way": ({"offset": 1}, {"offset": 2}),
    "with gaps of whole vectors": ({"gap": 32}, {"gap": 64}),
    "with gaps that leave vectors": ({"gap": 3}, {"gap": 3}),
    "with gaps of different lengths": ({"gap": 3}, {"gap": 5}),
}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("regime", ["planes", "planes, ragged", "columns", "columns, odd"])
def test_tensors_are_read_and_written_where_they_lie(host, regime, place, dtype):
    """Without a copy of any: nothing as large as x is allocated.  Nothing beside the result is written."""
    case = Case(REGIMES[regime], dtype)
    reading, writing = PLACES[place]
    x = placed(case.x, **reading)
    out = placed(np.zeros_like(case.x), **writing)
    before = np.array(out.base)
    y, batch, rstd, *_ = host.forward(case.problem, x, case.gamma, case.beta, None, None, out)
    assert y is out
    oracle.assert_within(y, case.exact.y.rounded_to(case.dtype), "y")
    dy, dx = placed(case.dy, **writing), placed(np.zeros_like(case.x), **reading)
    host.backward(case.problem, dy, x, batch.wide_mean, rstd, case.gamma, case.beta, batch.count, None, None, False, dx)
    oracle.assert_within(dx, case.exact.dx.rounded_to(case.dtype), "dx")
    assert max(host.backend.allocated) < case.x.nbytes or case.x.nbytes < 5 * 8 * case.problem.channels
    out[...] = 0
    np.testing.assert_array_equal(out.base, before)


@pytest.mark.parametrize("regime", ["planes", "columns"])
def test_packed_bits_are_read_by_windows_of_any_kind(host, regime):
    """The forward pass packs; the backward pass meets a dy that lies where only single elements can be loaded."""
    options = {"residual": True, "relu": True}
    case = Case(REGIMES[regime], seed=kink_free_seed(REGIMES[regime], options), **options)
    found = host.forward(case.problem, case.x, case.gamma, case.beta, case.residual)
    assert found.active.ndim == 1
    arguments = (found.moments.wide_mean, found.rstd, case.gamma, case.beta, found.moments.count)
    for offset in (0, 1):
        dy = placed(case.dy, offset=offset)
        back = host.backward(case.problem, dy, case.x, *arguments, None, found.active, True)
        oracle.assert_within(back.dx, case.exact.dx.rounded_to("float32"), "dx")
        oracle.assert_within(back.dresidual, case.exact.dresidual.rounded_to("float32"), "dresidual")
        oracle.assert_within(back.sums.dy, case.exact.dbeta.rounded_to("float32"), "dbeta")


def test_rows_may_run_backwards_and_stand_still(host):
    case = Case((6, 5, 128))
    for x in (case.x[::-1].copy()[::-1], np.broadcast_to(case.x[:1], case.x.shape)):
        same = np.ascontiguousarray(x)
        np.testing.assert_array_equal(
            host.forward(case.problem, x, None, None).y, host.forward(case.problem, same, None, None).y
        )


def test_inference_may_write_over_its_input(host):
    case = Case((4, 6, 128), frozen=True)
    mean, var = case.constants
    x = case.x.copy()
    y, _ = host.normalize(case.problem, x, mean, (var + case.problem.eps) ** -0.5, case.gamma, case.beta, out=x)
    assert y is x
    oracle.assert_within(x, case.exact.y.rounded_to("float32"))


@pytest.mark.parametrize("regime", ["planes, ragged", "columns, odd", "columns, tall"])
@pytest.mark.parametrize("options", [{}, {"residual": True, "relu": True}, {"where": True}], ids=str)
def test_a_call_allocates_its_results_and_one_small_array(host, regime, options):
    case = Case(REGIMES[regime], seed=kink_free_seed(REGIMES[regime], options), **options)
    size, channels = case.x.nbytes, case.problem.channels
    allocated = host.backend.allocated
    found = host.forward(case.problem, case.x, case.gamma, case.beta, case.residual, case.where)
    extra = [found.active.size] if found.active is not None else []
    assert sorted(allocated) == sorted([size, (4 if case.where is not None else 3) * 8 * channels, *extra])
    allocated.clear()
    arguments = (found.moments.wide_mean, found.rstd, case.gamma, case.beta, found.moments.count)
    host.backward(case.problem, case.dy, case.x, *arguments, case.where, found.active)
    assert sorted(allocated) == sorted([size, 2 * 4 * channels])


# Traffic, as the heads of the kernel files state it


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("regime", [name for name in REGIMES if name != "one number per channel"])
def test_every_kernel_moves_what_its_head_says(host, regime, dtype):
    """Each element of each tensor once, and partial results only where a channel is spread over several tiles."""
    case = Case(REGIMES[regime], dtype)
    found = host.forward(case.problem, case.x, case.gamma, case.beta)
    arguments = (found.moments.wide_mean, found.rstd, case.gamma, case.beta, found.moments.count)
    host.backward(case.problem, case.dy, case.x, *arguments)
    size = case.x.nbytes
    moments, normalize, gradient_sums, input_gradient = host.backend.launches
    assert (moments.read["x"], moments.written["x"]) == (size, 0)
    assert (normalize.read["x"], normalize.written["y"], normalize.read["y"]) == (size, size, 0)
    assert (gradient_sums.read["x"], gradient_sums.read["dy"]) == (size, size)
    assert (input_gradient.read["x"], input_gradient.read["dy"]) == (size, size)
    assert (input_gradient.written["dx"], input_gradient.read["dx"]) == (size, 0)
    for launch, results in ((moments, ("mean", "m2", "rstd")), (gradient_sums, ("sum_dy", "sum_dy_xhat"))):
        width = 8 if launch is moments else 4
        assert all(launch.written[name] == width * case.problem.channels for name in results)
        tiles = launch.plan.tiles
        alone = tiles.splits == tiles.fold == 1
        assert ("partials" in launch.written) == (not alone)
        if not alone:
            assert launch.read["partials"] == launch.written["partials"] == launch.plan.partial_bytes


@pytest.mark.parametrize("regime", ["planes", "planes, ragged", "columns", "columns, odd"])
def test_options_move_what_they_must_and_no_more(host, regime):
    shape = REGIMES[regime]
    options = {"where": True, "residual": True, "relu": True}
    case = Case(shape, seed=kink_free_seed(shape, options), **options)
    case.check(host)
    size, count = case.x.nbytes, case.x.size
    moments, normalize, gradient_sums, input_gradient = host.backend.launches
    assert moments.read["where"] == count
    packed = regime in ("planes", "columns")
    kept = size // 16 if packed else count
    assert normalize.plan.packed == packed
    assert (normalize.read["residual"], normalize.read["where"], normalize.written["active"]) == (size, count, kept)
    assert (gradient_sums.read["where"], gradient_sums.read["active"]) == (count, kept)
    assert (input_gradient.read["where"], input_gradient.read["active"]) == (count, kept)
    assert input_gradient.written["dresidual"] == size


def test_frozen_statistics_without_an_activation_do_not_read_x_again(host):
    case = Case((4, 6, 128), frozen=True)
    case.check(host)
    assert host.backend.launches[-1].plan.kernel == "input_gradient"
    assert host.backend.launches[-1].read["x"] == 0


# Numbers


@pytest.mark.parametrize("shape", [(8, 3, 512), (1024, 3, 1), (64, 5, 49)], ids=str)
def test_a_large_mean_costs_the_distance_from_it_no_digit(host, shape):
    """float32 at 1e6 with deviation 1: every bound is one of x - mean, none is one of x.

    x - pivot is exact in float32 here, sums of 32 are rounded 32 times relative to distances of a few, the rest is
    double: mean within 1e-6, var within 1e-5 relative, and y within 8 roundings of its largest value.
    """
    x = np.random.default_rng(1).normal(1e6, 1.0, shape).astype("float32")
    wide = x.astype("float64")
    y, batch, rstd, *_ = host.forward(Problem(*shape, "float32", 0.0, None), x, None, None)
    mean, var = wide.mean((0, 2)), wide.var((0, 2))
    np.testing.assert_allclose(batch.wide_mean, mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(batch.wide_var, var, rtol=1e-5)
    np.testing.assert_allclose(rstd, var**-0.5, rtol=1e-5)
    exact = (wide - mean[:, None]) / np.sqrt(var)[:, None]
    np.testing.assert_allclose(y, exact, rtol=0, atol=8 * 2**-24 * np.abs(exact).max() + 1e-5)


def test_an_outlier_as_the_first_sample_of_a_thread_costs_little(host):
    """The pivot is a thread's first sample.  Here it is a thousand deviations away: var within 1e-5 relative."""
    x = np.random.default_rng(2).normal(0.0, 1.0, (8, 2, 4096)).astype("float32")
    x[0, :, 0] = 1000.0
    _, batch, *_ = host.forward(Problem(8, 2, 4096, "float32", 0.0, None), x, None, None)
    np.testing.assert_allclose(batch.wide_var, x.astype("float64").var((0, 2)), rtol=1e-5)
    np.testing.assert_allclose(batch.wide_mean, x.astype("float64").mean((0, 2)), rtol=0, atol=1e-6 * 6)


def far_from_zero(shape):
    """float64 around 2^40, where it ends 12 binary digits behind the point, with deviations below 1."""
    return 2.0**40 + np.random.default_rng(4).integers(-1024, 1024, shape) * 2.0**-10


@pytest.mark.parametrize("where", [False, True], ids=["", "where"])
@pytest.mark.parametrize("shape", [(3, 2, 512), (300, 8, 1)], ids=str)
def test_float64_far_from_zero_keeps_the_digits_of_its_distances(host, shape, where):
    """Within the oracle's bounds, where that of var knows nothing of the mean."""
    x = far_from_zero(shape)
    mask = np.random.default_rng(5).random(shape) < 0.7 if where else None
    if where:
        mask[0, :, 0] = True
    _, batch, *_ = host.forward(Problem(*shape, "float64", 0.0, None), x, None, None, None, mask)
    exact = oracle.batch_norm(x, eps=0.0, where=mask)
    oracle.assert_within(batch.wide_var, exact.var, "var")
    oracle.assert_within(batch.wide_mean, exact.mean, "mean")


@pytest.mark.parametrize("shape", [(3, 2, 512), (300, 8, 1)], ids=str)
def test_a_masked_first_sample_of_float64_is_not_what_means_count_from(host, shape):
    """They count from 0 then.  At 2^40 each is known to 2^-13, and so is each gap to 2^-12, which is not much of var.

    From what is hidden here, -2^60, they would be known to 2^7.
    """
    x, mask = far_from_zero(shape), np.ones(shape, bool)
    mask[0, :, 0], x[0, :, 0] = False, -(2.0**60)
    _, batch, *_ = host.forward(Problem(*shape, "float64", 0.0, None), x, None, None, None, mask)
    exact = oracle.batch_norm(x, eps=0.0, where=mask)
    np.testing.assert_allclose(batch.wide_var, exact.var.value.astype("float64"), rtol=1e-3)
    np.testing.assert_allclose(batch.wide_mean, exact.mean.value.astype("float64"), rtol=0, atol=2.0**-10)


@pytest.mark.parametrize("shape", [(3, 16, 2048), (300, 512, 1)], ids=str)
def test_a_thread_sums_at_most_32_terms_at_a_time(host, shape):
    """2^24 and 1 are 2^24 in float32, so what is summed together with 2^24 loses a one for each of the others.

    Each channel is one tile, of whose steps 64 threads take a window of four each, or four rows.  A pivot is 0, for
    it comes from the first four steps at most.  A later one begins with 2^24, and all the rest are ones.
    """
    host.backend.device = replace(host_machine.TINY, processors=1)
    problem, size = Problem(*shape, "float32", 1e-3, None), shape[0] * shape[2]
    ones, mean, rstd = np.ones(shape, "float32"), np.zeros(shape[1]), np.ones(shape[1])

    def check(sums, values):
        # A sum that is handed out as float32 is rounded to an even number here; one that comes from a mean hardly.
        np.testing.assert_allclose(sums, values.astype("float64").sum((0, 2)), rtol=0, atol=31 + 1)

    for step in (0, 4, 8, 12, 32, 36):
        values = ones.copy()
        if shape[2] > 1 and step < 24:
            values[0, :, :1024], values[step // 8, :, step * 256 % 2048] = 0, 2.0**24
        elif shape[2] == 1:
            values[:16], values[4 * step] = 0, 2.0**24
        if step > 0:
            check(host.moments(problem, values).wide_mean * size, values)
        check(host.gradient_sums(problem, values, ones, mean, rstd, None, None).dy, values)
    for launch in host.backend.launches:
        tiles = launch.plan.tiles
        assert tiles.splits == tiles.fold == 1
        assert windows_of_a_thread(tiles, launch.plan.block) * tiles.vector // tiles.lanes > 64


@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("shape", [(4, 3, 256), (40, 8, 1)], ids=str)
def test_relu_stops_the_gradient_at_exactly_zero(host, shape, residual):
    """A constant channel with beta = 0 lies on the kink; one with beta = 1 lets everything pass."""
    problem, x, dy = Problem(*shape, "float32", 1e-3, "relu"), np.full(shape, 2.5, "float32"), np.ones(shape, "float32")
    beta = np.arange(shape[1], dtype="float32") % 2
    open_or_not = np.broadcast_to(beta[:, None], shape)
    found = host.forward(problem, x, None, beta, np.zeros_like(x) if residual else None)
    np.testing.assert_array_equal(found.y, open_or_not)
    statistics = found.moments.wide_mean, found.rstd, None, beta, found.moments.count
    back = host.backward(problem, dy, x, *statistics, None, found.active, residual)
    np.testing.assert_array_equal(back.sums.dy, open_or_not.sum((0, 2)))
    if residual:
        np.testing.assert_array_equal(back.dresidual, open_or_not)


@pytest.mark.parametrize("size", [1e17, 1e15, 1e-15, 1e-17])
@pytest.mark.parametrize("shape", [(5, 2, 256), (300, 4, 1)], ids=str)
def test_distances_between_the_stated_limits_are_right(host, shape, size):
    x = (np.random.default_rng(3).normal(0.5, 1.0, shape) * size).astype("float32")
    y, *_ = host.forward(Problem(*shape, "float32", 0.0, None), x, None, None)
    oracle.assert_within(y, oracle.batch_norm(x, eps=0.0, roundoff=2.0**-24).y.rounded_to("float32"))


def test_a_subnormal_constant_is_its_own_mean(host):
    """CuPy compiles with -ftz=true; the mean is widened by hand, and leaves no trace in y where beta is 0."""
    beta = np.array([1, 0, -1], "float32")
    for value, eps in itertools.product((-1e-45, 3e-39), (0.0, 1e-5)):
        x = np.full((4, 3, 64), value, "float32")
        y, batch, *_ = host.forward(Problem(4, 3, 64, "float32", eps, None), x, None, beta)
        np.testing.assert_array_equal(batch.wide_mean, np.full(3, np.float32(value), "float64"))
        np.testing.assert_array_equal(y, np.broadcast_to(beta[:, None], x.shape))


@pytest.mark.parametrize("shape", [(1, 3, 128), (5, 8, 1)], ids=str)
def test_nan_stays_in_its_channel_on_the_way_back(host, shape):
    """Here a block has threads that see no sample; theirs is no other channel's mean, not even times 0."""
    x, dy = random(shape), random(shape, seed=1)
    x[0, 0, 0] = np.nan
    problem = Problem(*shape, "float32", 1e-3, None)
    with np.errstate(all="ignore"):
        found = host.forward(problem, x, None, None)
        statistics = found.moments.wide_mean, found.rstd, None, None, found.moments.count
        back = host.backward(problem, dy, x, *statistics)
    assert np.isnan(back.dx[:, 0]).all()
    assert np.isfinite(back.dx[:, 1:]).all()
    assert np.isfinite(back.sums.dy_xhat[1:]).all()


def test_eps_far_below_float32_does_not_turn_a_constant_into_nan(host):
    """rstd is 1e100 then: 0 times it must be 0, so it is cut at the largest float32."""
    x = np.full((4, 3, 64), 2.5, "float32")
    problem, beta = Problem(4, 3, 64, "float32", 1e-200, None), np.full(3, 0.25, "float32")
    y, batch, rstd, *_ = host.forward(problem, x, None, beta)
    np.testing.assert_array_equal(y, np.full_like(x, 0.25))
    np.testing.assert_allclose(rstd, 1e100)
    dy = np.zeros_like(x)
    np.testing.assert_array_equal(host.backward(problem, dy, x, batch.wide_mean, rstd, None, beta, batch.count).dx, dy)


# Teeth: each of these is a mistake that the tests above have to notice


PLANTED = {
    "no barrier before sets are merged": ("    __syncthreads();\n    const int team", "    const int team"),
    "no fence before a block reports": ("        __threadfence();\n        last =", "        last ="),
    "no barrier before a block reports": ("    __syncthreads();\n    if (alone) return;", "    if (alone) return;"),
    "a counter that is not set back": ("atomicInc(counter, tiles_together - 1)", "atomicAdd(counter, 1u)"),
    "one tile too many": ("tile < tiles.count()", "tile <= tiles.count()"),
    "a window too many": ("+ row_step - 1) / row_step", "+ row_step) / row_step"),
    "a lane of the warp left out": ("for (int distance = team / 2;", "for (int distance = team / 4;"),
    "the last block takes too few partials": ("tiles.splits * tiles.fold;", "tiles.splits * tiles.fold - 1;"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_noticed(host, mistake):
    old, new = PLANTED[mistake]
    host.backend._kernels = {}
    host.backend.replace = ((old, new),)
    assert old in translation_unit("moments.cu")
    noticed = []
    for regime in ("columns, tall", "planes, one channel in many tiles"):
        for seed in (0, 1, 2):
            host.backend.seed = seed
            case = Case(REGIMES[regime])
            try:
                found = host.moments(case.problem, case.x)
                oracle.assert_within(found.wide_mean, case.exact.mean)
                oracle.assert_within(found.wide_var, case.exact.var)
            except (Fault, AssertionError) as error:
                noticed.append(str(error))
    assert noticed


# Given statistics


def widen_exactly(text):
    """Runs widening.cu, or a broken text of it, on numbers that a careless conversion would change."""
    for dtype, x_type in (("float32", 2), ("float64", 3)):
        kernel = Kernel(text, "widening", {"X_TYPE": x_type}, 80)
        channels, block = 70, 32
        mean, var = (random((channels,), dtype, seed=seed) for seed in (1, 2))
        mean[:2] = 1e-40, -np.inf
        np.abs(var, out=var)
        var[:5] = 0, np.inf, np.nan, 1e-30, 1e-40
        for eps in (0.0, 1e-5):
            wide, rstd = (device_empty((channels,), np.float64) for _ in range(2))
            values = [device_array(array) for array in (mean, var)]
            arguments = [*values, wide, rstd, np.int64(channels), np.float64(eps)]
            kernel((-(-channels // block),), (block,), arguments)
            np.testing.assert_array_equal(wide, mean)
            with np.errstate(divide="ignore"):
                total = var.astype(np.float64) + eps
                np.testing.assert_array_equal(rstd, np.where(total == 0, 0, 1 / np.sqrt(total)))


def test_given_statistics_are_widened_exactly():
    widen_exactly(translation_unit("widening.cu"))
