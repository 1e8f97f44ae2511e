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
    VECTOR_BYTES,
    DeviceLimits,
    Memory,
    backward_plans,
    forward_plans,
    input_gradient_plan,
    moments_plan,
    normalize_plan,
    share_out,
)
from cubn.problem import Problem

TINY = DeviceLimits("tiny", arch=80, processors=2, threads_per_block=64, grid=3)
ALL_LIMITS = (*DEVICES.values(), TINY)
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
    for plan in (*forward_plans(problem, limits, place), *backward_plans(problem, limits, place)):
        tiles = plan.tiles
        assert 0 < plan.grid <= limits.grid
        assert 0 < plan.block <= limits.threads_per_block
        assert plan.block % 32 == 0
        assert plan.shared_bytes <= limits.shared_per_block
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
        assert plan.partials in (0, tiles.splits * tiles.fold * channels)
        assert (plan.partials > 0) == (plan.arrivals > 0)


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
    plan = input_gradient_plan(one, limits, Memory(), train=False, where=True, active=True, residual=True)
    assert dict(plan.constants).items() >= {"TRAIN": 0, "WHERE": 1, "RELU": 1, "KEPT": 1, "SPLIT": 1}.items()
    assert set(MERGING) == {"moments", "gradient_sums"}


def test_the_run_on_a_gpu_can_be_rehearsed_without_one():
    script = Path(__file__).parents[1] / "benchmarks" / "on_gpu.py"
    done = subprocess.run([sys.executable, script, "--dry-run", "--device", "l4"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pytest -q -m gpu" in done.stdout
    assert "32x256x56x56 float16 channels-last\n    moments<<<" in done.stdout
