"""Every rank, channel axis, dtype, layout and option, in combinations that cover all pairs, against the oracle.

Regimes: rank 1 to 5; every set of kept axes, none and all included, in positive and negative numbers; the four
element types; nine memory layouts, other ones for dy and out than for x; affine, activation, residual and mask.
"""

from itertools import chain, combinations

import arrays
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cubn
from cubn.problem import pose

SHAPES = {1: (7,), 2: (6, 5), 3: (4, 3, 5), 4: (3, 4, 2, 3), 5: (2, 3, 2, 1, 3)}
DTYPES = ("float32", "float64", "float16", "bfloat16")
OPTIONS = (
    {},
    {"affine": True},
    {"affine": True, "activation": "relu"},
    {"residual": True},
    {"affine": True, "activation": "relu", "residual": True},
    {"where": True, "affine": True},
    {"affine": True, "activation": "relu", "residual": True, "where": True},
)
STATISTICS = {"float16": "float32", "bfloat16": "float32", "float32": "float32", "float64": "float64"}


def kept_axes(rank):
    return chain.from_iterable(combinations(range(rank), size) for size in range(rank + 1))


def cases():
    """(rank, kept) in full against the layouts; dtypes and options rotate so that all pairs meet."""
    number = 0
    for rank in SHAPES:
        for kept in kept_axes(rank):
            for layout in arrays.LAYOUTS:
                yield rank, kept, layout, DTYPES[number % 4], OPTIONS[number % 7]
                number += 1


def test_the_cases_cover_every_pair_of_options():
    met = set()
    for rank, kept, layout, dtype, option in cases():
        met |= {(rank, layout.__name__), (layout.__name__, dtype), (layout.__name__, str(option)), (dtype, str(option))}
        met |= {(rank, dtype), (rank, str(option)), (rank, kept)}
    layouts, options = [layout.__name__ for layout in arrays.LAYOUTS], [str(option) for option in OPTIONS]
    for firsts, seconds in ((layouts, DTYPES), (layouts, options), (DTYPES, options)):
        assert {(a, b) for a in firsts for b in seconds} <= met
    assert {(rank, dtype) for rank in SHAPES for dtype in DTYPES if rank > 1} <= met


def build(shape, kept, dtype, option, seed):
    """Random operands for one case, C-contiguous; values on a grid that no activation's kink lies on."""
    rng = np.random.default_rng(seed)
    per_channel = tuple(shape[axis] for axis in kept)
    statistics = STATISTICS[np.dtype(dtype).name]
    return {
        "x": (rng.normal(1.5, 2.0, shape)).astype(dtype),
        "dy": rng.normal(0.0, 1.0, shape).astype(dtype),
        "gamma": rng.uniform(0.5, 2.0, per_channel).astype(statistics) if option.get("affine") else None,
        "beta": rng.normal(0.0, 1.0, per_channel).astype(statistics) if option.get("affine") else None,
        "residual": rng.normal(0.0, 1.0, shape).astype(dtype) if option.get("residual") else None,
        "where": rng.random(shape) < 0.7 if option.get("where") else None,
    }


def spelled(kept, rank, number):
    """The same axes as a user may write them: an int, a tuple, negative."""
    axes = tuple(axis - rank if (number + axis) % 2 else axis for axis in kept)
    return axes[0] if len(axes) == 1 and number % 3 else axes


@pytest.mark.parametrize("rank", SHAPES)
def test_every_layout_gives_the_exact_result(machine, rank):
    """Training forward and backward within the oracle's bounds; no input is written to."""
    for number, (case_rank, kept, layout, dtype_name, option) in enumerate(cases()):
        dtype = arrays.dtype_of(dtype_name)
        if case_rank != rank or dtype is None:
            continue
        samples = int(np.prod([SHAPES[rank][axis] for axis in range(rank) if axis not in kept]))
        if samples < 2:
            continue
        operands = build(SHAPES[rank], kept, dtype, option, number)
        check_training(operands, kept, layout, dtype, option, number)


def check_training(operands, kept, layout, dtype, option, number):
    rank = operands["x"].ndim
    layouts = arrays.LAYOUTS
    x = layout(operands["x"], kept)
    dy = layouts[(number * 5 + 1) % len(layouts)](operands["dy"], kept)
    residual = operands["residual"]
    if residual is not None:
        residual = layouts[(number * 7 + 2) % len(layouts)](residual, kept)
    before = x.copy(), dy.copy()
    axis = spelled(kept, rank, number)

    y, saved = cubn.batch_norm(
        x, operands["gamma"], operands["beta"], channel_axis=axis, activation=option.get("activation"),
        residual=residual, where=operands["where"],
    )  # fmt: skip
    grads = cubn.batch_norm_backward(dy, saved)

    exact = oracle.batch_norm(
        operands["x"], operands["gamma"], operands["beta"], channel_axis=kept, activation=option.get("activation"),
        residual=operands["residual"], where=operands["where"], dy=operands["dy"],
    )  # fmt: skip
    statistics = STATISTICS[dtype.name]
    note = f"{layout.__name__} {dtype} {operands['x'].shape} kept {kept} {option}:"
    oracle.assert_within(y, exact.y.rounded_to(dtype), f"{note} y")
    oracle.assert_within(saved.moments.mean, exact.mean.rounded_to(statistics), f"{note} mean")
    counted = np.asarray(saved.moments.count) > 0
    variance = np.where(counted, saved.moments.var, 0)
    oracle.assert_within(variance, exact.var.rounded_to(statistics), f"{note} var")
    oracle.assert_within(grads.dx, exact.dx.rounded_to(dtype), f"{note} dx")
    for name, value, wanted in (("dgamma", grads.dgamma, exact.dgamma), ("dbeta", grads.dbeta, exact.dbeta)):
        assert (value is None) == (not option.get("affine"))
        if value is not None:
            assert value.dtype == statistics
            oracle.assert_within(value, wanted.rounded_to(statistics), f"{note} {name}")
    assert (grads.dresidual is None) == (residual is None)
    if residual is not None:
        oracle.assert_within(grads.dresidual, exact.dresidual.rounded_to(dtype), f"{note} dresidual")
    assert y.dtype == grads.dx.dtype == dtype, note
    np.testing.assert_array_equal(x, before[0], err_msg=f"{note} x was written to")
    np.testing.assert_array_equal(dy, before[1], err_msg=f"{note} dy was written to")


@pytest.mark.parametrize("rank", SHAPES)
def test_inference_is_exact_in_every_layout_and_takes_single_samples(machine, rank):
    for number, (case_rank, kept, layout, dtype_name, option) in enumerate(cases()):
        dtype = arrays.dtype_of(dtype_name)
        if case_rank != rank or dtype is None:
            continue
        operands = build(SHAPES[rank], kept, dtype, option, number)
        statistics = STATISTICS[dtype.name]
        rng = np.random.default_rng(number)
        per_channel = tuple(SHAPES[rank][axis] for axis in kept)
        mean = rng.normal(1.0, 1.0, per_channel).astype(statistics)
        var = rng.uniform(0.5, 4.0, per_channel).astype(statistics)
        x = layout(operands["x"], kept)
        dy = arrays.LAYOUTS[(number * 5 + 1) % len(arrays.LAYOUTS)](operands["dy"], kept)
        options = {
            "channel_axis": spelled(kept, rank, number), "activation": option.get("activation"),
            "residual": operands["residual"], "where": operands["where"],
        }  # fmt: skip
        y = cubn.batch_norm_inference(x, mean, var, operands["gamma"], operands["beta"], **options)
        grads = cubn.batch_norm_inference_backward(dy, x, mean, var, operands["gamma"], operands["beta"], **options)
        exact = oracle.batch_norm(
            operands["x"], operands["gamma"], operands["beta"], channel_axis=kept,
            activation=option.get("activation"), residual=operands["residual"], where=operands["where"],
            dy=operands["dy"], statistics=(mean, var),
        )  # fmt: skip
        note = f"{layout.__name__} {dtype} {x.shape} kept {kept} {option}:"
        oracle.assert_within(y, exact.y.rounded_to(dtype), f"{note} y")
        oracle.assert_within(grads.dx, exact.dx.rounded_to(dtype), f"{note} dx")
        if option.get("affine"):
            oracle.assert_within(grads.dgamma, exact.dgamma.rounded_to(statistics), f"{note} dgamma")
            oracle.assert_within(grads.dbeta, exact.dbeta.rounded_to(statistics), f"{note} dbeta")
        if option.get("residual"):
            oracle.assert_within(grads.dresidual, exact.dresidual.rounded_to(dtype), f"{note} dresidual")


@pytest.mark.parametrize("layout", arrays.LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("kept", [(1,), (0, 2), (3,), (1, 2, 3)], ids=str)
def test_out_is_filled_and_returned_whatever_its_layout(machine, layout, kept):
    """Same bits as without `out`, and nothing beside `out` is touched."""
    operands = build((3, 4, 2, 3), kept, np.dtype("float32"), {"affine": True}, 1)
    x = operands["x"]
    if layout in (arrays.read_only,):
        pytest.skip("a result cannot be written into read-only memory; tests/test_errors.py has the error")
    out = layout(np.full_like(x, 5), kept)
    expected, saved = cubn.batch_norm(x, operands["gamma"], operands["beta"], channel_axis=kept)
    around = None if out.base is None else out.base.copy()
    y, _ = cubn.batch_norm(x, operands["gamma"], operands["beta"], channel_axis=kept, out=out)
    assert y is out
    np.testing.assert_array_equal(out, expected)
    if layout in (arrays.every_second, arrays.cut_out):
        np.testing.assert_array_equal(out.base == 77, around == 77)

    out = layout(np.full_like(x, 5), kept)
    dx = cubn.batch_norm_backward(operands["dy"], saved, out=out).dx
    assert dx is out
    np.testing.assert_array_equal(out, cubn.batch_norm_backward(operands["dy"], saved).dx)


@pytest.mark.parametrize("layout", arrays.DENSE, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("kept", [(1,), (0, 2), (3,), (1, 2, 3), (2, 3)], ids=str)
def test_results_have_the_strides_of_a_dense_x(machine, layout, kept):
    x = layout(np.random.default_rng(0).normal(size=(3, 4, 2, 5)).astype("float32"), kept)
    y, saved = cubn.batch_norm(x, channel_axis=kept)
    assert y.strides == x.strides
    dy = np.ascontiguousarray(y)
    assert cubn.batch_norm_backward(dy, saved).dx.strides == x.strides


@pytest.mark.parametrize("byte_order", "<>")
def test_either_byte_order_is_read(machine, byte_order):
    x = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")
    y, _ = cubn.batch_norm(x.astype(x.dtype.newbyteorder(byte_order)))
    np.testing.assert_array_equal(y, cubn.batch_norm(x)[0])


def test_a_broadcast_array_is_read_as_what_it_stands_for(machine):
    row = np.array([1.0, 2.0, 4.0], "float32")
    x = np.broadcast_to(row[:, None], (5, 3, 4))
    np.testing.assert_array_equal(cubn.batch_norm(x)[0], np.zeros((5, 3, 4)))
    x = np.broadcast_to(row, (5, 4, 3))
    y, saved = cubn.batch_norm(x)
    np.testing.assert_array_equal(y, cubn.batch_norm(x.copy())[0])
    assert y.flags.writeable
    assert saved.x is x


@st.composite
def problems(draw):
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=5)))
    kept = tuple(sorted(draw(st.sets(st.integers(0, len(shape) - 1)))))
    order = draw(st.permutations(range(len(shape))))
    steps = tuple(draw(st.sampled_from([1, -1])) for _ in shape)
    return shape, kept, order, steps


@settings(max_examples=150, deadline=None)
@given(problem=problems(), seed=st.integers(0, 2**32 - 1), dtype=st.sampled_from(["float32", "float64"]))
def test_any_permutation_and_direction_of_memory_gives_the_exact_result(problem, seed, dtype):
    shape, kept, order, steps = problem
    rng = np.random.default_rng(seed)
    values = rng.normal(0.5, 1.0, shape).astype(dtype)
    memory = np.ascontiguousarray(values.transpose(order)).transpose(np.argsort(order))
    slices = tuple(slice(None, None, step) for step in steps)
    x = memory[slices].copy(order="K")[slices]
    np.testing.assert_array_equal(x, values)
    samples = x.size // max(1, int(np.prod([shape[axis] for axis in kept])))
    if samples < 2:
        with pytest.raises(cubn.ShapeError, match="one sample per channel"):
            cubn.batch_norm(x, channel_axis=kept)
        return
    dy = rng.normal(size=shape).astype(dtype)
    y, saved = cubn.batch_norm(x, channel_axis=kept)
    exact = oracle.batch_norm(values, channel_axis=kept, dy=dy)
    oracle.assert_within(y, exact.y.rounded_to(dtype))
    oracle.assert_within(cubn.batch_norm_backward(dy, saved).dx, exact.dx.rounded_to(dtype))


@pytest.mark.parametrize("shape", [(0, 3), (4, 0), (0, 0), (2, 3, 0), (0, 3, 4, 4)], ids=str)
def test_inference_and_moments_take_arrays_of_no_elements(machine, shape):
    x = np.zeros(shape, "float32")
    ones = np.ones(shape[1], "float32")
    assert cubn.batch_norm_inference(x, ones, ones).shape == shape
    grads = cubn.batch_norm_inference_backward(x, x, ones, ones, ones, ones)
    assert grads.dx.shape == shape
    np.testing.assert_array_equal(grads.dgamma, np.zeros(shape[1]))
    found = cubn.moments(x)
    assert found.count == (x.size // shape[1] if shape[1] else shape[0])
    np.testing.assert_array_equal(found.mean, np.zeros(shape[1]))


FORMS = {
    "(N, C, H, W)": (arrays.c_order, (4, 3, 5, 6), 1, (4, 3, 30)),
    "channels-last memory": (arrays.channels_last, (4, 3, 5, 6), 1, (120, 3, 1)),
    "(N, H, W, C)": (arrays.c_order, (4, 5, 6, 3), -1, (120, 3, 1)),
    "(N, D)": (arrays.c_order, (4, 3), 1, (4, 3, 1)),
    "per activation": (arrays.c_order, (4, 3, 5, 6), (1, 2, 3), (4, 90, 1)),
    "per location": (arrays.c_order, (4, 3, 5, 6), (2, 3), (12, 30, 1)),
    "Fortran order": (arrays.fortran_order, (4, 3, 5, 6), 1, (30, 3, 4)),
    "one channel": (arrays.c_order, (4, 3, 5), (), (1, 1, 60)),
    "a kept axis of size 1": (arrays.c_order, (4, 1, 5), 1, (1, 1, 20)),
    "backwards": (arrays.backwards, (4, 3, 5, 6), 1, (4, 3, 30)),
    "a cut along N and C": (lambda v, kept: np.zeros((9, 8, 5, 6), v.dtype)[2:6, 1:4], (4, 3, 5, 6), 1, (4, 3, 30)),
}


@pytest.mark.parametrize("form", FORMS)
def test_canonical_forms_are_views_of_the_documented_sizes(form):
    layout, shape, axis, sizes = FORMS[form]
    kept = axis if isinstance(axis, tuple) else (axis % len(shape),)
    x = layout(np.zeros(shape, "float32"), kept)
    found, call = pose(x, channel_axis=axis)
    assert (call.layout.outer, call.layout.channels, call.layout.inner) == sizes
    assert call.layout.in_place
    assert np.shares_memory(call.canonical(found), x)


@pytest.mark.parametrize(
    ("layout", "axis"), [(arrays.every_second, 1), (arrays.half_backwards, 1), (arrays.c_order, (0, 2))]
)
def test_what_has_no_such_view_is_copied_once(layout, axis):
    x = layout(np.zeros((4, 3, 5, 6), "float32"), (1,))
    found, call = pose(x, channel_axis=axis)
    assert not call.layout.in_place
    copy = call.canonical(found)
    assert not np.shares_memory(copy, x)
    assert copy.flags.c_contiguous
