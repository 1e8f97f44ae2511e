"""The fused kernels, executed thread for thread on the CPU: every kind of team, on both maps, held or read again.

The devices here do not exist.  Their memory is so slow that nothing else counts, so that teams of many blocks are
the best choice for tensors of a few thousand numbers, and their blocks are narrow and have little shared memory.
All launches are checked, as in test_cuda_kernels.py.
"""

from dataclasses import replace

import arrays
import host_machine
import numpy as np
import oracle
import pytest
from host.build import missing
from host.executor import Fault
from test_cuda_kernels import PLACES, Case, kink_free_seed, placed, random

from cubn.machines import Running
from cubn.machines.cuda.plan import DeviceLimits, Memory, blocks_at_once, forward_choices, windows_of_a_thread
from cubn.machines.cuda.source import translation_unit
from cubn.moments import Moments, towards
from cubn.problem import Problem

if missing():
    pytest.skip(missing(), allow_module_level=True)

ALONE = DeviceLimits("alone", arch=80, processors=2, threads_per_block=64, bandwidth=1e-3, in_flight=2)
OLD = replace(ALONE, name="old", arch=75)
POOR = replace(ALONE, name="poor", shared_most=6400)
TIGHT = replace(ALONE, name="tight", shared_most=12_000)
CLUSTERS = replace(ALONE, name="clusters", arch=90, processors=8, shared_most=16_000, largest_cluster=4)
GRIDS = replace(ALONE, name="grids", processors=6, shared_most=12_000, cooperative=True)
POOR_GRIDS = replace(GRIDS, name="poor grids", processors=2, shared_most=6400)
POOR_COLUMNS = replace(POOR_GRIDS, name="poor columns", shared_most=7000, shared_per_processor=17_000)
WIDE = replace(ALONE, name="wide", in_flight=4)
TIGHT_WIDE = replace(WIDE, name="tight and wide", shared_most=12_000)

REGIMES = {
    "block, planes": (ALONE, (3, 5, 256)),
    "block, planes, less than registers hold": (ALONE, (1, 5, 384)),
    "block, planes in shared memory": (ALONE, (6, 3, 256)),
    "block, planes in shared memory before sm_80": (OLD, (6, 3, 256)),
    "block, ragged planes": (ALONE, (3, 4, 1031)),
    "block, columns": (ALONE, (100, 16, 1)),
    "block, columns, the last tile narrower": (ALONE, (100, 84, 1)),
    "block, columns of short runs": (ALONE, (6, 16, 49)),
    "block, planes read again": (POOR, (3, 1, 1200)),
    "block, ragged planes read again": (POOR, (3, 4, 1031)),
    "block, four windows in flight": (WIDE, (6, 3, 1024)),
    "cluster, planes": (CLUSTERS, (3, 1, 2048)),
    "cluster, more channels than clusters": (replace(CLUSTERS, grid=5, processors=16), (4, 3, 512)),
    "cluster, ragged planes": (CLUSTERS, (3, 4, 1031)),
    "cluster, columns": (CLUSTERS, (300, 16, 1)),
    "cluster, columns of short runs": (CLUSTERS, (6, 16, 49)),
    "cluster, columns folded from rows": (CLUSTERS, (303, 27, 1)),
    "grid, planes": (GRIDS, (3, 1, 2048)),
    "grid, more ragged planes than teams": (POOR_GRIDS, (5, 5, 1031)),
    "grid, columns": (GRIDS, (700, 8, 1)),
    "grid, columns folded from rows": (GRIDS, (303, 27, 1)),
    "grid, more columns than teams, read again": (POOR_COLUMNS, (200, 192, 1)),
}
"""A device and a shape for every way in which teams work, with float32."""

KINDS = ("block, planes", "cluster, planes", "cluster, columns", "grid, planes", "grid, columns")


def machine_on(device):
    """A machine of its own, so that no test sees another's launches."""
    backend = host_machine.HostBackend(device)
    backend._kernels = host_machine.BACKEND._kernels  # compiled once
    return host_machine.KernelMachine("host", backend)


def case_of(regime, dtype="float32", **options):
    device, shape = REGIMES[regime]
    return machine_on(device), Case(shape, dtype, seed=kink_free_seed(shape, options), **options)


def launches(machine):
    """The forward and the backward launch of a checked case: the fused kernels, and nothing else."""
    assert [launch.plan.kernel for launch in machine.backend.launches] == ["forward", "backward"]
    return machine.backend.launches


@pytest.mark.parametrize("regime", REGIMES)
def test_every_regime_is_exact_and_gets_the_team_of_its_name(regime):
    host, case = case_of(regime)
    case.check(host)
    for launch in launches(host):
        plan = launch.plan
        team = "grid" if plan.cooperative else "cluster" if plan.cluster > 1 else "block"
        assert team == regime.partition(",")[0], plan
        assert plan.tiles.column == ("columns" in regime)
        assert plan.tiles.ragged == ("ragged" in regime or "folded" in regime)
        if "more" in regime:
            assert plan.tiles.groups > plan.grid // plan.ranks


def test_windows_are_held_in_registers_in_shared_memory_and_read_again():
    """Each of them, and all three at once, by some regime of each kind of team."""
    seen = set()
    for device, shape in REGIMES.values():
        for choice in forward_choices(Problem(*shape, "float32", 1e-3, None), device, Memory())[:1]:
            seen.add((choice.team, choice.plans[0].room > 0, choice.streamed > 0))
    assert seen >= {("block", False, False), ("block", True, False), ("block", True, True)}
    assert seen >= {("cluster", True, False), ("cluster", True, True), ("cluster", False, False)}
    assert seen >= {("grid", False, False)}
    assert any(team == "grid" and streamed for team, _, streamed in seen)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
@pytest.mark.parametrize("regime", ["block, planes in shared memory", "cluster, columns", "grid, planes"])
def test_every_dtype_is_exact(regime, dtype):
    host, case = case_of(regime, dtype)
    case.check(host)
    launches(host)


OPTIONS = [
    {"where": True},
    {"relu": True},
    {"residual": True, "relu": True},
    {"residual": True},
    {"where": True, "residual": True, "relu": True},
    {"frozen": True, "relu": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options))
@pytest.mark.parametrize("regime", ["block, planes in shared memory", "block, planes read again"])
def test_every_option_is_exact(regime, options):
    host, case = case_of(regime, **options)
    case.check(host)
    assert host.backend.launches[-1].plan.kernel == "backward"


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("regime", ["block, ragged planes", "cluster, columns", "grid, columns"])
def test_all_options_together_are_exact(regime, dtype):
    host, case = case_of(regime, dtype, where=True, residual=True, relu=True)
    case.check(host)


# Same input, same bits


@pytest.mark.parametrize("regime", [*KINDS, "grid, more ragged planes than teams", "cluster, ragged planes"])
def test_no_schedule_changes_a_bit(regime):
    """Blocks and threads ascending, descending and in random orders."""
    host, case = case_of(regime)
    found = []
    for seed in (0, 1, 2, 3, 4):
        host.backend.seed = seed
        found.append(b"".join(values.tobytes() for values in case.check(host)))
    assert len(set(found)) == 1


@pytest.mark.parametrize("regime", ["grid, more ragged planes than teams", "grid, more columns than teams, read again"])
def test_the_number_of_teams_changes_no_bit(regime, monkeypatch):
    """The driver may have room for fewer blocks than the plan hopes for: for a single team, or for two."""
    host, case = case_of(regime)
    case.check(host)
    planned = [launch.plan for launch in launches(host)]
    found = []
    for teams in (1, 2):
        host = host_machine.KernelMachine("host", host.backend)  # asks anew
        host.backend.launches.clear()
        monkeypatch.setattr(host.backend, "resident", lambda plan, teams=teams: teams * plan.ranks + plan.ranks - 1)
        found.append(b"".join(values.tobytes() for values in case.check(host)))
        grids = [min(plan.grid, teams * plan.ranks) for plan in planned]
        assert [launch.plan.grid for launch in launches(host)] == grids
    assert len(set(found)) == 1


@pytest.mark.parametrize("regime", ["cluster, planes", "grid, planes"])
def test_a_device_without_room_for_a_team_takes_the_best_way_that_is_left(regime, monkeypatch):
    host, case = case_of(regime)
    monkeypatch.setattr(host.backend, "resident", lambda plan: plan.ranks - 1)
    case.check(host)
    choices = forward_choices(case.problem, host.backend.device, Memory())
    left = next(choice for choice in choices if choice.team in ("block", None))
    launched = [launch.plan for launch in host.backend.launches]
    assert launched[: len(left.plans)] == list(left.plans)
    assert not any(plan.cooperative or plan.cluster > 1 for plan in launched)


@pytest.mark.parametrize("regime", ["grid, planes", "cluster, planes"])
def test_a_plane_may_have_more_windows_than_a_thread_counts(regime):
    """2^30 windows of a plane are too many to execute, so the limit is brought down to what a tile needs at least."""
    far = "FAR = (1 << 30) + 2 * BLOCK"
    assert far in translation_unit("forward.cu")
    host, case = machine_on(REGIMES[regime][0]), Case((2, 2, 8192))
    case.check(host)
    plan = launches(host)[0].plan
    limit = plan.tiles.part + 2 * plan.block
    assert limit < plan.tiles.windows
    host.backend.replace = ((far, f"FAR = {limit}"),)
    case.check(host)
    host.backend.replace = ((far, f"FAR = {plan.tiles.part // 2}"),)
    with pytest.raises((AssertionError, Fault)):
        case.check(host_machine.KernelMachine("host", host.backend))


def test_two_kernels_are_taken_where_no_team_is_better(monkeypatch):
    host, case = case_of("block, planes")
    apart = [choice for choice in forward_choices(case.problem, host.backend.device, Memory()) if not choice.team]
    assert host._in_one(tuple(apart)) is None


def test_a_barrier_serves_launch_after_launch_without_a_reset():
    """An odd number of meetings leaves the sign set; the next launch must take it as it is."""
    host, case = case_of("grid, planes")
    found = [b"".join(values.tobytes() for values in case.check(host)) for _ in range(3)]
    assert len(set(found)) == 1
    plan = host.backend.launches[0].plan
    assert plan.tiles.groups * plan.ranks // plan.grid % 2 == 1
    assert host.backend._barriers.any() or len(host.backend.launches) % 2 == 0


# Memory and traffic, as the heads of the kernel files state them


@pytest.mark.parametrize("regime", REGIMES)
def test_what_is_held_is_read_once_and_what_is_not_twice(regime):
    """Forward 2 S and backward 3 S where a team holds its tile; else what is streamed once more, window by window."""
    host, case = case_of(regime)
    case.check(host)
    forward, backward = launches(host)
    size = case.x.nbytes
    assert forward.written["y"] == backward.written["dx"] == size
    assert forward.read["y"] == backward.read["dx"] == 0
    assert size <= forward.read["x"] < 2 * size
    assert size <= backward.read["x"] == backward.read["dy"] < 2 * size
    held = [plan.held + plan.room for plan in (forward.plan, backward.plan)]
    for launch, room in zip((forward, backward), held, strict=True):
        again = launch.read["x"] - size
        assert (again > 0) == (room < windows(launch.plan)), launch.plan
        if "ragged" not in regime and again:
            assert again == 16 * streamed_windows(launch.plan)
    width = 8 * case.problem.channels
    assert all(forward.written[name] == width for name in ("mean", "m2", "rstd"))
    for launch in (forward, backward):
        assert ("partials" in launch.written) == launch.plan.cooperative


def windows(plan):
    tiles = plan.tiles
    return -(-tiles.part // (plan.block // tiles.width if tiles.column else plan.block))


def streamed_windows(plan):
    """Of all threads, counted one by one."""
    tiles, total = plan.tiles, 0
    thread = np.arange(plan.block)
    length = tiles.rows if tiles.column else tiles.rows * tiles.windows
    for split in range(tiles.splits):
        begin, end = split * tiles.part, min((split + 1) * tiles.part, length)
        high = plan.block // tiles.width
        for group in range(tiles.groups):
            if tiles.column:
                down, across = thread // tiles.width, thread % tiles.width
                inside = (down < high) & (group * tiles.width + across < tiles.windows)
                steps = np.where(inside, np.maximum(0, -(-(end - begin - down) // high)), 0)
            else:
                steps = np.maximum(0, -(-(end - begin - thread) // plan.block))
            total += np.maximum(0, steps - plan.held - plan.room).sum()
    return total


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_residual_with_relu_costs_a_bit_for_each_element_of_a_vector(dtype):
    """3 S + S / 16 forward, 4 S + S / 16 backward with the residual's gradient."""
    host, case = case_of("block, planes in shared memory", dtype, residual=True, relu=True)
    case.check(host)
    forward, backward = launches(host)
    size = case.x.nbytes
    assert forward.plan.packed
    assert (forward.read["x"], forward.read["residual"], forward.written["y"]) == (size, size, size)
    assert forward.written["active"] == backward.read["active"] == size // 16
    assert (backward.read["x"], backward.read["dy"]) == (size, size)
    assert (backward.written["dx"], backward.written["dresidual"]) == (size, size)


def test_a_mask_is_read_as_often_as_its_x():
    host, case = case_of("block, planes in shared memory", where=True)
    case.check(host)
    for launch in launches(host):
        assert launch.read["where"] == case.x.size
        assert launch.read["x"] == case.x.nbytes


@pytest.mark.parametrize("options", [{}, {"residual": True, "relu": True}, {"where": True}], ids=str)
@pytest.mark.parametrize("regime", ["block, planes in shared memory", "block, ragged planes read again"])
def test_a_call_allocates_its_results_and_one_small_array(regime, options):
    host, case = case_of(regime, **options)
    size, channels, allocated = case.x.nbytes, case.problem.channels, host.backend.allocated
    running = Running(*np.ones((2, channels), "float32"), 0.1) if case.where is None else None
    found = host.forward(case.problem, case.x, case.gamma, case.beta, case.residual, case.where, None, running)
    extra = [found.active.size] if found.active is not None else []
    assert sorted(allocated) == sorted([size, 4 * 8 * channels, *extra])
    allocated.clear()
    arguments = (found.moments.wide_mean, found.rstd, case.gamma, case.beta, found.moments.count)
    host.backward(case.problem, case.dy, case.x, *arguments, case.where, found.active)
    assert sorted(allocated) == sorted([size, 2 * 4 * channels])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("regime", ["block, planes", "block, ragged planes", "cluster, columns"])
def test_tensors_are_read_and_written_where_they_lie(regime, place):
    """Unaligned, and with gaps between rows: nothing as large as x is allocated, and nothing beside y written."""
    host, case = case_of(regime)
    reading, writing = PLACES[place]
    x, out = placed(case.x, **reading), placed(np.zeros_like(case.x), **writing)
    before = np.array(out.base)
    found = host.forward(case.problem, x, case.gamma, case.beta, None, None, out)
    assert found.y is out
    oracle.assert_within(out, case.exact.y.rounded_to(case.dtype), "y")
    dy, dx = placed(case.dy, **writing), placed(np.zeros_like(case.x), **reading)
    arguments = (found.moments.wide_mean, found.rstd, case.gamma, case.beta, found.moments.count)
    host.backward(case.problem, dy, x, *arguments, None, None, False, dx)
    oracle.assert_within(dx, case.exact.dx.rounded_to(case.dtype), "dx")
    assert max(host.backend.allocated) < case.x.nbytes
    out[...] = 0
    np.testing.assert_array_equal(out.base, before)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_packed_bits_are_read_by_windows_of_any_kind(dtype):
    """The forward pass packs; the backward pass meets a dy that lies where only single elements can be loaded."""
    host, case = case_of("block, planes in shared memory", dtype, residual=True, relu=True)
    found = host.forward(case.problem, case.x, case.gamma, case.beta, case.residual)
    assert found.active.ndim == 1
    arguments = (found.moments.wide_mean, found.rstd, case.gamma, case.beta, found.moments.count)
    for offset in (0, 1):
        for machine in (host, host_machine.Apart("host", host.backend)):
            back = machine.backward(
                case.problem, placed(case.dy, offset=offset), case.x, *arguments, None, found.active, True
            )
            oracle.assert_within(back.dx, case.exact.dx.rounded_to(case.dtype), "dx")
            oracle.assert_within(back.dresidual, case.exact.dresidual.rounded_to(case.dtype), "dresidual")


# Running statistics


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("regime", ["block, planes in shared memory", "cluster, columns"])
def test_running_statistics_move_towards_the_batch(regime, dtype):
    """As `cubn.moments.towards` moves them, within two roundings of each term; what is passed is left alone."""
    device, shape = REGIMES[regime]
    running_statistics_move(machine_on(device), shape, dtype)


def running_statistics_move(host, shape, dtype):
    problem = Problem(*shape, dtype, 1e-3, None)
    narrow = np.dtype(problem.statistics_dtype)
    mean, var = np.random.default_rng(7).normal(1, 0.2, (2, shape[1])).astype(narrow)
    before = mean.copy(), var.copy()
    found = host.forward(problem, random(shape, dtype), None, None, running=Running(mean, var, 0.3))
    assert len(host.backend.launches) == 1
    np.testing.assert_array_equal((mean, var), before)
    batch = Moments(problem.samples, found.moments.wide_mean, found.moments.wide_var * problem.samples)
    wide = towards(mean.astype("float64"), var.astype("float64"), batch, 0.3)
    for new, expected in zip(found.running, wide, strict=True):
        assert new.dtype == narrow
        assert new.shape == (shape[1],)
        size = np.abs(expected) + 0.7 * np.abs(before).max() + 0.3 * np.abs(expected)
        assert (np.abs(new - expected) <= 4 * np.finfo(narrow).eps * size).all()


def test_one_sample_moves_no_running_statistics():
    """It has no unbiased variance.  The kernel still writes what it was given to."""
    one_sample_moves_nothing(machine_on(ALONE))


def one_sample_moves_nothing(host):
    before = np.random.default_rng(8).normal(1, 0.2, (2, 16)).astype("float32")
    x = random((1, 16, 1))
    found = host.forward(Problem(1, 16, 1, "float32", 1e-3, None), x, None, None, running=Running(*before, 0.3))
    assert [launch.plan.kernel for launch in host.backend.launches] == ["forward"]
    np.testing.assert_array_equal(found.running, before)


# Numbers


def test_a_large_mean_costs_the_distance_from_it_no_digit():
    """As in test_cuda_kernels.py, for teams: mean within 1e-6 at 1e6, var within 1e-5."""
    for regime in KINDS:
        device, shape = REGIMES[regime]
        x = np.random.default_rng(1).normal(1e6, 1.0, shape).astype("float32")
        found = machine_on(device).forward(Problem(*shape, "float32", 0.0, None), x, None, None)
        wide = x.astype("float64")
        np.testing.assert_allclose(found.moments.wide_mean, wide.mean((0, 2)), rtol=0, atol=1e-6)
        np.testing.assert_allclose(found.moments.wide_var, wide.var((0, 2)), rtol=1e-5)


SUMS = {
    "planes": (ALONE, "float32", False),
    "columns": (ALONE, "float32", True),
    "planes read again": (TIGHT, "float32", False),
    "columns read again": (TIGHT, "float32", True),
    "planes read again, 32 in flight": (TIGHT_WIDE, "bfloat16", False),
}


@pytest.mark.parametrize("sums", SUMS)
def test_a_thread_sums_at_most_32_terms_at_a_time(sums):
    device, dtype, columns = SUMS[sums]
    sums_of_32(machine_on(device), dtype, columns)


def sums_of_32(host, dtype, columns):
    """As in test_cuda_kernels.py: 2^24 takes a one from each of the terms that it is summed with, at most 31.

    It is the first of those that go to shared memory, of those that are read again, or of those in registers.  The
    pivot, the mean of the first windows that a thread sums, is 0.
    """
    steps = 80 if columns else 48  # windows of a thread; a block takes four rows at a time, or 64 windows of a plane
    high, wide = (4, None) if columns else (None, 64 * (16 // arrays.dtype_of(dtype).itemsize))
    shape = (steps * high, 128, 1) if columns else (1, 16, steps * wide)
    problem = Problem(*shape, dtype, 1e-3, None)
    mean, rstd, ones = np.zeros(shape[1]), np.ones(shape[1]), np.ones(shape, arrays.dtype_of(dtype))

    def of_step(values, step):
        """What the threads of a block take in a step of their way, the first of them first."""
        return values[step * high :][:high] if columns else values[..., step * wide :][..., :wide]

    def plan():
        (launch,) = host.backend.launches
        host.backend.launches.clear()
        assert launch.plan.fused
        assert windows_of_a_thread(launch.plan.tiles, launch.plan.block) == steps
        return launch.plan

    def big_at(step, zeros=()):
        values = ones.copy()
        for other in zeros:
            of_step(values, other)[...] = 0
        first = of_step(values, step)[:1] if columns else of_step(values, step)[..., :1]
        first[...] = 2.0**24
        return values

    def check(sums, values):
        np.testing.assert_allclose(sums, values.astype("float64").sum((0, 2)), rtol=0, atol=31 + 1)

    host.forward(problem, ones, None, None)
    found = plan()
    streamed = steps - found.room - found.held
    of_pivot = range(found.room, found.room + (dict(found.constants)["UNROLL"] if streamed else found.held))
    for step in (0, of_pivot.stop, steps - found.held) if streamed else (0,):
        x = big_at(step, zeros=of_pivot)
        check(host.forward(problem, x, None, None).moments.wide_mean * problem.samples, x)
        plan()

    host.backward(problem, ones, ones, mean, rstd, None, None, problem.samples)
    for step in {0, plan().room}:
        dy = big_at(step)
        check(host.backward(problem, dy, ones, mean, rstd, None, None, problem.samples).sums.dy, dy)
        plan()


@pytest.mark.parametrize("value", [100.0, 1.23e8, -7e-20, 3e-39])
@pytest.mark.parametrize("regime", KINDS)
def test_a_constant_leaves_beta(regime, value):
    """Also where x is subnormal: CuPy compiles with -ftz=true."""
    device, shape = REGIMES[regime]
    x, beta = np.full(shape, value, "float32"), np.linspace(-1, 1, shape[1], dtype="float32")
    found = machine_on(device).forward(Problem(*shape, "float32", 1e-5, None), x, None, beta)
    np.testing.assert_array_equal(found.y, np.broadcast_to(beta[:, None], shape))
    np.testing.assert_array_equal(found.moments.wide_mean, np.full(shape[1], np.float32(value), "float64"))


@pytest.mark.parametrize("regime", ["block, planes", "cluster, columns", "grid, columns"])
def test_nan_and_infinity_stay_in_their_channel(regime):
    device, shape = REGIMES[regime]
    x = random(shape)
    clean = machine_on(device).forward(Problem(*shape, "float32", 1e-5, None), x, None, None).y
    x[1, 0, 0], x[2, 2, 0] = np.nan, np.inf
    with np.errstate(all="ignore"):
        found = machine_on(device).forward(Problem(*shape, "float32", 1e-5, None), x, None, None).y
    assert np.isnan(found[:, [0, 2]]).all()
    sound = [c for c in range(shape[1]) if c not in (0, 2)]
    np.testing.assert_array_equal(found[:, sound], clean[:, sound])


def test_an_outlier_among_the_first_samples_of_a_thread_costs_little():
    """A pivot is the mean of a thread's first windows.  Here one of them is a thousand deviations away."""
    x = np.random.default_rng(2).normal(0.0, 1.0, (6, 3, 256)).astype("float32")
    x[0, :, 0] = 1000.0
    found = machine_on(ALONE).forward(Problem(6, 3, 256, "float32", 0.0, None), x, None, None)
    np.testing.assert_allclose(found.moments.wide_var, x.astype("float64").var((0, 2)), rtol=1e-5)


# Teeth: each of these is a mistake that the tests above have to notice


def test_a_device_holds_what_its_tightest_resource_allows():
    plan = forward_choices(Problem(3, 1, 2048, "float32", 1e-3, None), GRIDS, Memory())[0].plans[0]
    assert blocks_at_once(plan, GRIDS) >= plan.grid
    for tight in ({"registers": plan.registers * plan.block}, {"threads_per_processor": plan.block}):
        assert blocks_at_once(plan, replace(GRIDS, **tight)) == GRIDS.processors


SYNC = "        __syncthreads();\n"
FENCE = "            __threadfence();\n"
FIRST = "        if (threadIdx.x == 0) {\n"
ARRIVE = "            const unsigned before"
PLANTED = {
    "a block that does not wait for its sets": (
        "block, columns", "#if TEAM == BLOCK_TEAM\n        __syncthreads();", "#if TEAM == BLOCK_TEAM\n"),
    "a cluster that does not wait": ("cluster, planes", "        __cluster_barrier_wait();\n", ""),
    "a cluster that does not meet": ("cluster, planes", "    team.meet();\n\n    // Entry i", "\n    // Entry i"),
    "a block that leaves while its peers read": ("cluster, planes", "    team.part();\n", ""),
    "one place for all turns of a cluster": (
        "cluster, more channels than clusters",
        "const int turn = team.round % 2;",
        "const int turn = 0;",
    ),
    "one place for all turns of a grid": (
        "grid, more ragged planes than teams",
        "const int turn = team.round % 2;",
        "const int turn = 0;",
    ),
    "a rank that is heard twice": (
        "cluster, planes",
        "__cluster_map_shared_rank(board + run, rank)",
        "__cluster_map_shared_rank(board + run, rank | 1)",
    ),
    "no fence before a block arrives": ("grid, planes", FENCE + ARRIVE, ARRIVE),
    "no barrier before a block arrives": ("grid, columns", SYNC + FIRST + FENCE, FIRST + FENCE),
    "no barrier after a block was let go": ("grid, planes", FENCE + "        }\n" + SYNC, FENCE + "        }\n"),
    "a counter that nobody leads": ("grid, planes", "rank == 0 ? 0x80000000u - (ranks - 1) : 1u", "1u"),
    "a counter that two lead": ("grid, columns", "(barrier, rank == 0 ?", "(barrier, rank <= 1 ?"),
    "totals that nobody waits for": (
        "grid, columns",
        "    if (SHARED_OUT) {\n        team.meet();",
        "    if (SHARED_OUT) {",
    ),
    "maps that nobody waits for": ("block, planes", "    }\n    __syncthreads();\n}\n", "    }\n}\n"),
    "a window held in the wrong place": (
        "block, planes in shared memory",
        "chunk.x[u] = held.x[end - 1 - u];",
        "chunk.x[u] = held.x[(end - u) % HELD];",
    ),
    "a window from the wrong place of the shelf": (
        "block, planes in shared memory",
        "shelf.at(k, 0);",
        "shelf.at(max(k - 1, 0), 0);",
    ),
    "a copy that nobody waits for": ("block, planes in shared memory", "        shelf.arrived();\n", ""),
    "a way back that takes another step": (
        "block, planes read again",
        "step = DIRECTION * (walk.row_step * stride + walk.window_step * VEC);",
        "step = DIRECTION * (walk.row_step * stride + (walk.window_step + (DIRECTION == BACK)) * VEC);",
    ),
    "warps that do not wait for the last": ("block, planes", "= of_warp;\n        __syncthreads();", "= of_warp;"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", PLANTED)
def test_a_planted_mistake_is_noticed(mistake):
    regime, old, new = PLANTED[mistake]
    device, shape = REGIMES[regime]
    host = machine_on(device)
    host.backend._kernels = {}
    host.backend.replace = ((old, new),)
    assert old in translation_unit("forward.cu")
    noticed = []
    for seed in (0, 1, 2, 3):
        host.backend.seed = seed
        case = Case(shape)
        try:
            found = host.forward(case.problem, case.x, case.gamma, case.beta)
            oracle.assert_within(found.y, case.exact.y.rounded_to("float32"), "y")
            oracle.assert_within(found.moments.wide_mean, case.exact.mean)
        except (Fault, AssertionError) as error:
            noticed.append(str(error))
    assert noticed
