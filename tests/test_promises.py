"""The seven promises about numbers, each on every machine."""

import math
from fractions import Fraction

import arrays
import numpy as np
import oracle
import pytest

import cubn

DTYPES = ("float16", "bfloat16", "float32", "float64")
SHAPES = ((2, 1), (3, 2), (7, 3), (1000, 3), (2, 3, 5, 7), (5, 2, 16, 16), (3, 130, 9), (1, 4, 33, 31), (64, 8, 3, 3))
CONSTANTS = (0.0, 100.0, 0.1, -1 / 3, 1.23e8, -7e-20, 3e38, -1e-45)


def as_dtype(name):
    dtype = arrays.dtype_of(name)
    if dtype is None:
        pytest.skip("bfloat16 needs ml_dtypes, which is not installed")
    return dtype


@pytest.mark.parametrize("layout", [arrays.c_order, arrays.channels_last], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_a_constant_channel_gives_exactly_beta(machine, name, shape, layout):
    """Promise 1.  Exactly: the bits of beta, whatever gamma, eps and the constant."""
    dtype = as_dtype(name)
    statistics = "float64" if name == "float64" else "float32"
    channels = shape[1]
    beta = np.linspace(-2, 3, channels).astype(statistics)
    gamma = np.linspace(1, 50, channels).astype(statistics)
    aligned = (1, channels, *(1,) * (len(shape) - 2))
    for constant in CONSTANTS:
        with np.errstate(over="ignore"):
            value = np.asarray(constant).astype(dtype)
        if not np.isfinite(value.astype("float64")):
            continue  # no number of this dtype
        x = layout(np.full(shape, value), (1,))
        for eps in (1e-5, 0.0, 1e-300):
            y, saved = cubn.batch_norm(x, gamma, beta, eps=eps)
            np.testing.assert_array_equal(y, np.broadcast_to(beta.astype(dtype).reshape(aligned), shape))
            np.testing.assert_array_equal(saved.moments.var, np.zeros(channels))
            np.testing.assert_array_equal(saved.moments.mean, np.full(channels, value).astype(statistics))


def test_a_masked_constant_channel_gives_exactly_beta(machine):
    x = np.full((6, 2, 5), 0.1)
    where = np.random.default_rng(0).random(x.shape) < 0.6
    x[~where] = np.nan
    y, _ = cubn.batch_norm(x, np.ones(2), np.array([0.3, -0.7]), where=where)
    np.testing.assert_array_equal(y, np.where(where, np.array([0.3, -0.7])[:, None], 0))


@pytest.mark.parametrize("shape", [(4096, 3), (16, 3, 16, 16), (2, 3, 100, 100)], ids=str)
@pytest.mark.parametrize("layout", [arrays.c_order, arrays.channels_last], ids=lambda layout: layout.__name__)
def test_a_mean_of_a_million_leaves_the_variance_its_digits(machine, shape, layout):
    """Promise 2: within 1e-4 relative of float64 arithmetic on the same float32 numbers."""
    x = layout(np.random.default_rng(1).normal(1e6, 1.0, shape).astype("float32"), (1,))
    found = cubn.moments(x)
    axes = tuple(axis for axis in range(x.ndim) if axis != 1)
    wide = x.astype("float64")
    np.testing.assert_allclose(found.mean, wide.mean(axes), rtol=1e-4)
    np.testing.assert_allclose(found.var, wide.var(axes), rtol=1e-4)
    y, saved = cubn.batch_norm(x)
    oracle.assert_within(y, oracle.batch_norm(x).y.rounded_to("float32"))
    np.testing.assert_allclose(saved.moments.var, wide.var(axes), rtol=1e-4)


def test_the_shortcut_through_mean_of_squares_would_break_the_second_promise():
    """The teeth of the test above: E[x^2] - E[x]^2 has no digit left at this mean, even summed in float64 chunks."""
    x = np.random.default_rng(1).normal(1e6, 1.0, 4096).astype("float32")
    shortcut = (x * x).mean(dtype="float32") - x.mean(dtype="float32") ** 2
    assert abs(shortcut - x.var(dtype="float64")) > 0.5


@pytest.mark.parametrize("size", [1e15, 1e30, 1e-15, 1e-30])
@pytest.mark.parametrize("layout", [arrays.c_order, arrays.channels_last], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("where", [None, "mask"])
def test_values_of_extreme_size_stay_right(machine, size, layout, where):
    """Promise 3: float32 at 1e15 and, on the CPU, at 1e30, where squares leave float32's range."""
    if machine in ("host", "gpu") and size in (1e30, 1e-30):
        pytest.skip("the kernels square float32 distances in float32: between 1e-18 and 1e18, as launch.py says")
    values = (np.random.default_rng(2).normal(0.5, 1.0, (8, 3, 6, 6)) * size).astype("float32")
    mask = None if where is None else np.random.default_rng(3).random(values.shape) < 0.8
    dy = np.random.default_rng(4).normal(size=values.shape).astype("float32")
    x = layout(values, (1,))
    y, saved = cubn.batch_norm(x, eps=0.0, where=mask)
    exact = oracle.batch_norm(values, eps=0.0, where=mask, dy=dy)
    assert np.isfinite(y).all()
    oracle.assert_within(y, exact.y.rounded_to("float32"))
    oracle.assert_within(cubn.batch_norm_backward(dy, saved).dx, exact.dx.rounded_to("float32"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("layout", [arrays.c_order, arrays.channels_last], ids=lambda layout: layout.__name__)
def test_nan_and_infinity_stay_in_their_channel(machine, bad, name, layout):
    """Promise 4: the other channels have the bits that they have without it."""
    dtype = as_dtype(name)
    rng = np.random.default_rng(5)
    clean, dy = rng.normal(size=(2, 6, 9, 7, 4)).astype(dtype)
    spoiled = clean.copy()
    spoiled[3, 4, 2, 1] = bad
    gamma, beta = np.full(9, 2, "float32"), np.full(9, 1, "float32")
    others = np.arange(9) != 4
    results = []
    for values in (clean, spoiled):
        y, saved = cubn.batch_norm(layout(values, (1,)), gamma, beta, activation="relu")
        results.append((y, *cubn.batch_norm_backward(dy, saved)[:3]))
    for before, after in zip(*results, strict=True):
        axis = 1 if before.ndim > 1 else 0
        np.testing.assert_array_equal(before.compress(others, axis), after.compress(others, axis))
    for values in results[1][:2]:
        assert np.isnan(values[:, 4].astype("float32")).any()


def test_relu_passes_nan_through(machine):
    x = np.array([[1.0, 2.0], [3.0, np.nan], [-4.0, 0.0]], "float32")
    y, saved = cubn.batch_norm(x, activation="relu")
    assert np.isnan(y[:, 1]).all()
    assert (y[:, 0] >= 0).all()
    assert np.isnan(cubn.batch_norm_backward(np.ones_like(x), saved).dx[:, 1]).all()
    one = np.ones(2, "float32")
    assert np.isnan(cubn.batch_norm_inference(x, 0 * one, one, activation="relu")[1, 1])
    z, _ = cubn.batch_norm(x[:, :1], residual=np.array([[np.nan], [0], [0]], "float32"), activation="relu")
    assert np.isnan(z[0, 0])
    assert not np.isnan(z[1:]).any()


def test_relu_stops_the_gradient_at_exactly_zero(machine):
    """A constant channel with beta = 0 lies on the kink, where the derivative is taken as 0, as PyTorch does."""
    x = np.full((6, 2), 0.1, "float32")
    _, saved = cubn.batch_norm(x, np.ones(2, "float32"), np.array([0, 1], "float32"), activation="relu")
    grads = cubn.batch_norm_backward(np.ones_like(x), saved)
    np.testing.assert_array_equal(grads.dbeta, [0, 6])


def test_nan_behind_the_mask_harms_nothing(machine):
    """y and dx are 0 there, and everything else has the bits of any other number behind the mask."""
    rng = np.random.default_rng(6)
    x, dy, residual = rng.normal(size=(3, 5, 4, 6)).astype("float32")
    where = rng.random(x.shape) < 0.7
    gamma, beta = np.full(4, 2, "float32"), np.full(4, 1, "float32")

    def run(filling):
        hidden = [np.where(where, values, np.float32(filling)) for values in (x, dy, residual)]
        y, saved = cubn.batch_norm(hidden[0], gamma, beta, where=where, residual=hidden[2], activation="relu")
        return y, *cubn.batch_norm_backward(hidden[1], saved), saved.moments.mean, saved.moments.var

    for filled, spoiled in zip(run(0), run(np.nan), strict=True):
        np.testing.assert_array_equal(filled, spoiled)
    for results in (run(np.nan), run(np.inf)):
        for name, values in zip(("y", "dx"), results[:2], strict=True):
            assert (values[~where] == 0).all(), name


@pytest.mark.parametrize("shape", [(64, 32), (8, 16, 28, 28), (3, 5, 7, 11, 2)], ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_the_same_input_gives_the_same_bits_every_time(machine, shape, name):
    """Promise 5."""
    dtype = as_dtype(name)
    x, dy = np.random.default_rng(7).normal(size=(2, *shape)).astype(dtype)
    gamma = np.linspace(0.5, 2, shape[1]).astype("float32")

    def run():
        y, saved = cubn.batch_norm(x, gamma, gamma)
        grads = cubn.batch_norm_backward(dy, saved)
        return b"".join(values.tobytes() for values in (y, saved.moments.mean, saved.moments.var, *grads[:3]))

    assert len({run() for _ in range(5)}) == 1


def test_a_handful_of_numbers_agrees_with_exact_fractions(machine):
    """dx of Algorithm 1 in rational arithmetic but for one square root: within 40 units in the last place."""
    x = np.array([[1.25], [-0.5], [3.0], [0.0625], [2.0]])
    dy = np.array([[0.5], [-1.0], [0.25], [2.0], [-0.125]])
    eps = Fraction(1, 8)
    values, slopes = ([Fraction(float(v)) for v in column[:, 0]] for column in (x, dy))
    mean = sum(values) / 5
    var = sum((v - mean) ** 2 for v in values) / 5
    rstd = Fraction(math.sqrt((var + eps).numerator / (var + eps).denominator)) ** -1
    s0, s1 = sum(slopes) / 5, sum(g * (v - mean) for g, v in zip(slopes, values, strict=True)) / 5
    dx = [rstd * (g - s0 - (v - mean) * s1 / (var + eps)) for g, v in zip(slopes, values, strict=True)]
    y, saved = cubn.batch_norm(x, eps=float(eps))
    np.testing.assert_allclose(y[:, 0], [float((v - mean) * rstd) for v in values], rtol=40 * 2**-53)
    found = cubn.batch_norm_backward(dy, saved).dx[:, 0]
    np.testing.assert_allclose(found, [float(v) for v in dx], rtol=40 * 2**-53, atol=1e-16)


# Algebra


def test_gamma_and_beta_can_give_the_input_back(machine):
    """gamma = sqrt(var + eps), beta = mean undo the normalisation (paper, section 3): to a few roundings of x."""
    x = np.random.default_rng(8).normal(3, 2, (16, 4, 5))
    found = cubn.moments(x)
    y, _ = cubn.batch_norm(x, np.sqrt(found.var + 1e-5), found.mean)
    np.testing.assert_allclose(y, x, rtol=0, atol=20 * 2**-53 * np.abs(x).max())


def test_scale_and_shift_of_the_input_change_nothing(machine):
    """BN(a x + b) = BN(x) for a > 0 and eps = 0; powers of two, so that a x + b is exact where b = 0."""
    x = np.random.default_rng(9).normal(size=(32, 3, 4))
    y, _ = cubn.batch_norm(x, eps=0.0)
    np.testing.assert_array_equal(cubn.batch_norm(8.0 * x, eps=0.0)[0], y)
    np.testing.assert_allclose(cubn.batch_norm(3.0 * x + 7.0, eps=0.0)[0], y, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_channels_last_on_the_transposed_array_is_the_transposed_result(machine, name):
    """The same numbers whichever axis holds the channels.  Sums may be taken in another order, hence the bound."""
    x, dy = np.random.default_rng(10).normal(2, 3, (2, 6, 5, 4, 3)).astype(name)
    y, _ = cubn.batch_norm(x)
    moved, saved_moved = cubn.batch_norm(np.moveaxis(x, 1, -1).copy(), channel_axis=-1)
    exact = oracle.batch_norm(x, dy=dy)
    oracle.assert_within(np.moveaxis(moved, -1, 1), exact.y.rounded_to(name))
    oracle.assert_within(y, exact.y.rounded_to(name))
    dx = cubn.batch_norm_backward(np.moveaxis(dy, 1, -1), saved_moved).dx
    oracle.assert_within(np.moveaxis(dx, -1, 1), exact.dx.rounded_to(name))


@pytest.mark.parametrize(
    ("channel_axis", "averaged", "entries"),
    [((2, 3), (0, 1), 30), ((1, 2, 3), (0,), 120), (1, (0, 2, 3), 4)],
    ids=["method 1: per location", "method 2: per activation", "method 3: per feature map"],
)
def test_the_three_methods_are_numpy_written_out(machine, channel_axis, averaged, entries):
    """Within (M + 8) roundings of the largest |y| of float64 arithmetic."""
    x = np.random.default_rng(11).normal(1, 2, (8, 4, 5, 6))
    mean, var = x.mean(averaged, keepdims=True), x.var(averaged, keepdims=True)
    y, saved = cubn.batch_norm(x, channel_axis=channel_axis)
    expected = (x - mean) / np.sqrt(var + 1e-5)
    np.testing.assert_allclose(y, expected, rtol=0, atol=(240 + 8) * 2**-53 * np.abs(expected).max())
    assert saved.moments.mean.size == saved.rstd.size == entries


def test_the_batch_of_one_large_array_matches_float64(machine):
    """More elements than any block: 3.2 million, odd sizes, float32."""
    if machine == "host":
        pytest.skip("executed thread for thread this takes minutes; tests/test_gpu.py has larger ones")
    x = np.random.default_rng(12).normal(1, 2, (17, 5, 195, 193)).astype("float32")
    y, saved = cubn.batch_norm(x)
    oracle.assert_within(y, oracle.batch_norm(x).y.rounded_to("float32"))
    wide = x.astype("float64")
    np.testing.assert_allclose(saved.moments.var, wide.var((0, 2, 3)), rtol=1e-6)
