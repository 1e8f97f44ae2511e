"""Launch plans, without a GPU: every element visited exactly once, every limit kept, for every device."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cubn.machines.cuda.plan import (
    DEVICES,
    ITEM_BYTES,
    MERGING,
    PACKED,
    TENSORS,
    VECTOR_BYTES,
    DeviceLimits,
    Memory,
    backward_choices,
    blocks_at_once,
    fewer_teams,
    forward_choices,
    input_gradient_plan,
    moments_plan,
    normalize_plan,
    share_out,
    windows_of_a_thread,
)
from cubn.problem import Problem

TINY = DeviceLimits("tiny", arch=80, processors=2, threads_per_block=64, grid=3)
SMALL = dataclasses.replace(
    TINY, name="small", arch=90, processors=6, grid=40, shared_most=12_000, largest_cluster=4, cooperative=True,
    bandwidth=1e-3,
)  # fmt: skip
ALL_LIMITS = (*DEVICES.values(), TINY, SMALL)
PLACES = (
    Memory(),
    Memory(phase=1, step=0),
    Memory(phase=0, step=1, dense=False),
    Memory(phase=0, step=0, dense=False),
    Memory(phase=None, step=None, dense=False),
)

sizes = st.one_of(st.integers(1, 9), st.integers(1, 400))


def visits(tiles, block, place, outer):
    """How often each element is visited, by the rules of kernels/tiles.cuh, thread by thread."""
    length = tiles.channels * tiles.inner
    count = np.zeros((outer, length), int)
    folded = count.reshape(-1) if tiles.column else None
    vector = tiles.vector
    for tile in range(tiles.count):
        split, group = divmod(tile, tiles.groups)
        thread = np.arange(block)
        if tiles.column:
            high = block // tiles.width
            down, across = thread // tiles.width, thread % tiles.width
            window = group * tiles.width + across
            for row in range(split * tiles.part, min((split + 1) * tiles.part, tiles.rows)):
                mine = (window < tiles.windows) & (down < high) & (down == (row - split * tiles.part) % high)
                start = row * length * tiles.fold + window[mine] * vector
                last = tiles.tail if row == tiles.rows - 1 else length * tiles.fold
                elements = (start[:, None] + np.arange(vector)).ravel()
                inside = (elements - row * length * tiles.fold) < last
                assert tiles.ragged or inside.all()
                np.add.at(folded, elements[inside], 1)
        else:
            first, end = split * tiles.part, min((split + 1) * tiles.part, tiles.rows * tiles.windows)
            row, window = np.divmod(np.arange(first, end), tiles.windows)
            lead = np.zeros_like(row)
            if tiles.ragged:
                stride = length if place.dense else length + ((place.step or 0) - length) % vector
                lead = ((place.phase or 0) + row * stride + group * tiles.inner) % vector
            position = (window * vector - lead)[:, None] + np.arange(vector)
            inside = (position >= 0) & (position < tiles.inner)
            assert tiles.ragged or inside.all()
            rows = np.broadcast_to(row[:, None], position.shape)
            np.add.at(count, (rows[inside], group * tiles.inner + position[inside]), 1)
    return count


@settings(max_examples=300, deadline=None)
@given(sizes, sizes, sizes, st.sampled_from((2, 4, 8)), st.sampled_from(PLACES), st.sampled_from(ALL_LIMITS))
@example(1, 1, 1, 2, PLACES[0], TINY)
@example(3, 35, 1, 2, PLACES[0], TINY)
@example(3, 4, 1031, 4, PLACES[1], TINY)
@example(700, 8, 1, 4, PLACES[4], TINY)
def test_every_element_is_visited_exactly_once(outer, channels, inner, itemsize, place, limits):
    while outer * channels * inner > 30_000:
        outer, channels, inner = (max(1, size // 2) for size in (outer, channels, inner))
    tiles, block = share_out(outer, channels, inner, itemsize, limits, place)
    count = visits(tiles, block, place, outer)
    assert (count == 1).all(), tiles


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 60),
    st.integers(1, 60),
    st.integers(1, 60),
    st.sampled_from(("float16", "float32", "float64")),
    st.sampled_from(PLACES),
    st.sampled_from(ALL_LIMITS),
)
@example(7, 3, 40, "float16", PLACES[1], SMALL)
@example(59, 27, 1, "float32", PLACES[0], SMALL)
def test_the_teams_of_every_choice_visit_every_element_exactly_once(outer, channels, inner, dtype, place, limits):
    """The tiles of each rank of each team: also where there are more ranks than there is work for."""
    while outer * channels * inner > 10_000:
        outer, channels, inner = (max(1, size // 2) for size in (outer, channels, inner))
    cuts = {
        (plan.tiles, plan.block) for plan in all_plans(Problem(outer, channels, inner, dtype, 0, None), limits, place)
    }
    for tiles, block in cuts:
        if tiles.count * block < 200_000:
            assert (visits(tiles, block, place, outer) == 1).all(), tiles


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(sizes, st.integers(1, 2**24)),
    st.one_of(sizes, st.integers(1, 2**16)),
    st.one_of(sizes, st.integers(1, 2**24)),
    st.sampled_from(tuple(ITEM_BYTES)),
    st.sampled_from(PLACES),
    st.sampled_from(ALL_LIMITS),
)
@example(2**33, 3, 1, "float16", PLACES[4], TINY)
@example(1, 1, 2**36, "float16", PLACES[4], TINY)
@example(1, 2**33, 1, "float16", PLACES[4], TINY)
@example(2, 2**33, 1, "float64", PLACES[0], DEVICES["h200"])
def test_every_limit_is_kept_at_every_size(outer, channels, inner, dtype, place, limits):
    """What the kernels count in 32 bits stays below 2**31, and no block asks for more than there is."""
    problem = Problem(outer, channels, inner, dtype, 1e-5, None)
    for plan in all_plans(problem, limits, place):
        tiles = plan.tiles
        assert 0 < plan.grid <= limits.grid
        assert 0 < plan.block <= limits.threads_per_block
        assert plan.block % 32 == 0
        assert plan.shared_bytes <= limits.shared_per_block
        assert plan.shared_bytes + plan.dynamic_bytes <= max(limits.shared_most, limits.shared_per_block)
        assert plan.registers * plan.block <= limits.registers
        assert tiles.count < 2**30
        assert tiles.part < 2**31
        assert tiles.splits * tiles.part >= (tiles.rows if tiles.column else tiles.rows * tiles.windows)
        assert tiles.groups < 2**31
        assert tiles.splits * tiles.fold < 2**31
        assert tiles.vector * ITEM_BYTES[dtype] in (VECTOR_BYTES, ITEM_BYTES[dtype])
        if tiles.column:
            assert tiles.width * tiles.vector % tiles.inner == 0, "a tile is whole runs"
            assert tiles.width <= plan.block
            assert tiles.groups * tiles.width >= tiles.windows
        if plan.fused:
            check_teams(plan, limits)
        else:
            assert plan.partials in (0, tiles.splits * tiles.fold * channels)
            assert (plan.partials > 0) == (plan.arrivals > 0)


def all_plans(problem, limits, place=Memory()):  # noqa: B008  it is a constant
    """Of every choice, the best and the others."""
    choices = forward_choices(problem, limits, place) + backward_choices(problem, limits, place)
    return [plan for choice in choices for plan in choice.plans]


def check_teams(plan, limits):
    """What the kernels take for granted of the blocks that share a group."""
    tiles = plan.tiles
    assert plan.grid % plan.ranks == 0
    assert plan.grid // plan.ranks <= tiles.groups
    assert tiles.fold == 1 or tiles.groups == 1, "a channel is with one team"
    assert plan.cluster in (1, plan.ranks)
    assert plan.cluster <= limits.largest_cluster
    assert not (plan.cluster > 1 and plan.cooperative)
    assert (plan.cluster == 1 and not plan.cooperative) == (plan.ranks == 1)
    assert plan.cooperative <= limits.cooperative
    assert plan.barriers == (plan.grid // plan.ranks if plan.cooperative else 0)
    runs = tiles.width * tiles.vector // tiles.inner if tiles.column else 1
    totals = plan.barriers if tiles.column else 0
    assert plan.partials == (2 * (plan.grid + totals) * runs if plan.cooperative else 0)
    if plan.cooperative:
        assert plan.grid <= blocks_at_once(plan, limits)
    assert 0 <= plan.room <= max(0, windows_of_a_thread(tiles, plan.block) - plan.held)
    assert plan.held % dict(plan.constants)["UNROLL"] == 0


@settings(max_examples=200, deadline=None)
@given(sizes, sizes, sizes, st.sampled_from((2, 4, 8)), st.sampled_from(PLACES), st.sampled_from(ALL_LIMITS))
def test_no_tile_is_empty(outer, channels, inner, itemsize, place, limits):
    tiles, _ = share_out(outer, channels, inner, itemsize, limits, place)
    length = tiles.rows if tiles.column else tiles.rows * tiles.windows
    assert (tiles.splits - 1) * tiles.part < length
    if tiles.column:
        assert (tiles.groups - 1) * tiles.width < tiles.windows


@pytest.mark.parametrize("limits", ALL_LIMITS, ids=str)
def test_a_large_tensor_keeps_every_processor_busy(limits):
    for shape in ((32, 64, 112 * 112), (32, 256, 56 * 56), (4, 1, 2**20), (32 * 28 * 28, 512, 1), (100_000, 32, 1)):
        plan = moments_plan(Problem(*shape, "float16", 1e-5, None), limits, Memory())
        assert plan.tiles.count >= limits.processors, plan


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ([(256, 64), (512, 64)], Memory(0, 0, True)),
        ([(256, 64), (516, 64)], Memory(None, 0, True)),
        ([(260, 64), (516, 64)], Memory(1, 0, True)),
        ([(256, 96), (512, 64)], Memory(0, 0, False)),
        ([(256, 65), (512, 66)], Memory(0, None, False)),
        ([(256, -61)], Memory(0, 3, False)),
    ],
)
def test_memory_is_what_all_tensors_have_in_common(tensors, expected):
    """float32: four elements to a vector, 64 to a row."""
    assert Memory.of(tensors, 64, 4) == expected


def test_a_plan_is_a_value_of_one_line():
    problem = Problem(32, 256, 3136, "float16", 1e-5, "relu")
    plans = [normalize_plan(problem, DEVICES["h200"], Memory()) for _ in range(2)]
    assert plans[0] == plans[1]
    assert hash(plans[0]) == hash(plans[1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        plans[0].grid = 1
    assert "\n" not in str(plans[0])
    assert str(plans[0]).startswith("normalize<<<")
    assert "RELU=1" in str(plans[0])


def test_options_become_constants_and_eps_does_not():
    """eps is an argument of the kernel: a new value compiles nothing."""
    one, other = (Problem(8, 4, 64, "float32", eps, "relu") for eps in (1e-5, 1e-3))
    limits = DEVICES["a100"]
    assert moments_plan(one, limits, Memory()) == moments_plan(other, limits, Memory())
    plan = input_gradient_plan(one, limits, Memory(), train=False, where=True, active=PACKED, residual=True)
    assert dict(plan.constants).items() >= {"TRAIN": 0, "WHERE": 1, "RELU": 1, "KEPT": 2, "SPLIT": 1}.items()
    assert set(MERGING) == {"moments", "gradient_sums", *TENSORS}
    assert (
        forward_choices(one, limits, Memory())[0].plans[0].constants
        == forward_choices(other, limits, Memory())[0].plans[0].constants
    )


# The choice among teams


def best(shape, device, dtype="float16"):
    problem = Problem(*shape, dtype, 1e-5, None)
    return tuple(choose(problem, device, Memory())[0] for choose in (forward_choices, backward_choices))


def moved(choice, shape):
    return choice.moved / (2 * np.prod(shape))


@pytest.mark.parametrize("limits", ALL_LIMITS, ids=str)
def test_two_kernels_are_always_among_the_choices_and_the_cheapest_is_first(limits):
    for shape in ((32, 64, 3136), (4096, 27, 1), (2, 5, 1), (1, 12, 1), (4, 128, 2**20), (13, 531, 1)):
        for choices in (forward_choices, backward_choices):
            found = choices(Problem(*shape, "float16", 1e-5, None), limits, Memory())
            costs = [choice.cost for choice in found]
            assert costs == sorted(costs)
            assert sum(choice.team is None for choice in found) == 1


@pytest.mark.parametrize("batch", [32, 64])
def test_the_floor_is_planned_for_every_layer_of_a_residual_network_on_an_h200(batch):
    """ResNet-50's shapes, float16, batch first: forward 2 S; backward close to 3 S, the rest from the cache."""
    layers = ((64, 112), (64, 56), (256, 56), (128, 28), (512, 28), (256, 14), (1024, 14), (512, 7), (2048, 7))
    for channels, side in layers:
        shape = (batch, channels, side * side)
        forward, backward = best(shape, DEVICES["h200"])
        assert moved(forward, shape) == 2, forward
        assert moved(backward, shape) < 3.6, backward


def test_a_slab_of_8_megabytes_is_held_by_many_blocks():
    """(4, 128, 1024, 1024) float16: no block and no cluster can, half a device does."""
    shape = (4, 128, 2**20)
    for choice, floor in zip(best(shape, DEVICES["h200"]), (2, 3), strict=True):
        assert choice.team == "grid"
        assert moved(choice, shape) == floor


def test_what_a_device_lacks_is_not_planned():
    shape = (64, 64, 112 * 112)
    h200 = DEVICES["h200"]
    lone = dataclasses.replace(h200, largest_cluster=1, cooperative=False)
    for limits in (h200, lone, DEVICES["t4"], dataclasses.replace(h200, cooperative=False)):
        for choices in (forward_choices, backward_choices):
            teams = {choice.team for choice in choices(Problem(*shape, "float16", 1e-5, None), limits, Memory())}
            assert ("cluster" in teams) == (limits.largest_cluster > 1)
            assert ("grid" in teams) == limits.cooperative
    few = Problem(8 * 10**6, 8, 1, "float16", 1e-5, None)  # one group: a single block would be alone
    assert forward_choices(few, lone, Memory())[0].team is None


def test_small_tensors_get_one_launch_of_narrow_blocks():
    for shape in ((32, 64, 1), (8, 64, 1024), (4, 256, 784)):
        for choice in best(shape, DEVICES["h200"]):
            assert len(choice.plans) == 1
            assert moved(choice, shape) in (2, 3)
    assert best((32, 64, 1), DEVICES["h200"])[0].plans[0].block == 64


def test_a_driver_that_has_room_for_less_gets_fewer_teams_or_none():
    plan = best((4, 128, 2**20), DEVICES["h200"])[0].plans[0]
    assert fewer_teams(plan, plan.grid) is plan
    assert fewer_teams(plan, plan.grid + 5) is plan
    less = fewer_teams(plan, 2 * plan.ranks + 1)
    assert (less.grid, less.barriers) == (2 * plan.ranks, 2)
    assert fewer_teams(plan, plan.ranks - 1) is None


def test_the_run_on_a_gpu_can_be_rehearsed_without_one():
    script = Path(__file__).parents[1] / "benchmarks" / "on_gpu.py"
    done = subprocess.run([sys.executable, script, "--dry-run", "--device", "l4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pytest -q -m gpu" in done.stdout
    assert "32x256x56x56 float16 channels-last\n    " in done.stdout
    assert "forward<<<" in done.stdout
