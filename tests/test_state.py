"""Running statistics: the closed form, the cumulative average, and all that must leave them as they were."""

from fractions import Fraction

import numpy as np
import oracle
import pytest

import cubn

U = {"float32": 2.0**-24, "float64": 2.0**-53}


def exact_state(x):
    """Mean and unbiased variance per channel of (N, C, ...), and their bounds, from `oracle`."""
    exact = oracle.batch_norm(x)
    m = x.size // x.shape[1]
    unbiased = exact.var.value * m / (m - 1)
    return exact.mean, oracle.Exact(unbiased, exact.var.bound * m / (m - 1))


def snapshot(bn):
    """Every bit of the layer that a caller can see."""
    grads = (bn.gamma_grad, bn.beta_grad, bn.residual_grad)
    state = {key: np.asarray(values).tobytes() for key, values in bn.state_dict().items()}
    return state, bn.training, [None if g is None else g.tobytes() for g in grads]


# What is stored


def test_the_unbiased_variance_is_stored_and_the_biased_one_normalises():
    """1 and 3: biased variance 1, unbiased 2."""
    bn = cubn.BatchNorm(1, eps=0.0, dtype="float64")
    assert bn(np.array([[1.0], [3.0]])).tolist() == [[-1.0], [1.0]]
    assert bn.running_mean.tolist() == [pytest.approx(0.1 * 2, rel=1e-15)]
    assert bn.running_var.tolist() == [pytest.approx(0.9 * 1 + 0.1 * 2, rel=1e-15)]
    assert bn.num_batches_tracked == 1


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.25, 0.49])
@pytest.mark.parametrize("steps", [1, 2, 30])
def test_the_same_batch_for_k_steps_gives_the_closed_form(machine, dtype, momentum, steps):
    """running = (1 - w)^k * first + (1 - (1 - w)^k) * batch.  A step rounds 1 - w, w and both products, adds and
    rounds: less than 4 u of the larger of the two, and later steps only shrink that: 4 k u in all, and the error of
    the batch's own statistics, rounded to the dtype, once."""
    x = np.random.default_rng(0).normal(3.0, 2.0, (6, 4, 5)).astype(dtype)
    bn = cubn.BatchNorm(4, momentum=momentum, dtype=dtype)
    for _ in range(steps):
        bn(x)
    left = (1 - Fraction(momentum)) ** steps
    for found, first, batch in zip((bn.running_mean, bn.running_var), (0, 1), exact_state(x), strict=True):
        wanted = float(left) * first + float(1 - left) * batch.value
        size = np.maximum(first, np.abs(batch.value))
        bound = batch.bound + U[dtype] * np.abs(batch.value) + 4 * steps * U[dtype] * size
        oracle.assert_within(found, oracle.Exact(wanted, bound))
    assert bn.num_batches_tracked == steps


def test_the_other_convention_of_momentum_is_seen():
    """The teeth: with the weights exchanged, one step is off by 80 % of the distance to the batch."""
    x = np.random.default_rng(0).normal(3.0, 2.0, (6, 4, 5))
    bn = cubn.BatchNorm(4, momentum=0.1, dtype="float64")
    bn(x)
    mean, _ = exact_state(x)
    with pytest.raises(AssertionError):
        oracle.assert_within(bn.running_mean, oracle.Exact(0.9 * mean.value, mean.bound))


def test_momentum_one_remembers_the_last_batch_alone():
    with pytest.warns(UserWarning, match="weight of the new batch"):
        bn = cubn.BatchNorm(2, momentum=1, dtype="float64")
    for seed in range(3):
        x = np.random.default_rng(seed).normal(size=(5, 2))
        bn(x)
    np.testing.assert_allclose(bn.running_mean, x.mean(axis=0), rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(bn.running_var, x.var(axis=0, ddof=1), rtol=1e-14)


BATCHES = [
    np.random.default_rng(seed).normal(seed, 1 + seed, (size, 3, 2)) for seed, size in enumerate((4, 0, 1, 9, 2))
]


def test_momentum_none_averages_over_the_batches_whatever_their_size(machine):
    """Float64 means of 4 numbers, folded one by one: 4 additions and products each, far inside 1e-14 relative of the
    largest.  The empty batch is no batch."""
    bn = cubn.BatchNorm(3, momentum=None, dtype="float64")
    for batch in BATCHES:
        bn(batch)
    full = [batch for batch in BATCHES if batch.size]
    means, variances = [b.mean(axis=(0, 2)) for b in full], [b.var(axis=(0, 2), ddof=1) for b in full]
    np.testing.assert_allclose(bn.running_mean, np.mean(means, axis=0), rtol=0, atol=1e-14 * np.abs(means).max())
    np.testing.assert_allclose(bn.running_var, np.mean(variances, axis=0), rtol=0, atol=1e-14 * np.max(variances))
    assert bn.num_batches_tracked == 4


def test_momentum_none_averages_over_masked_batches():
    """Two samples at least in every channel of every batch, so every batch counts for every channel."""
    bn = cubn.BatchNorm(3, momentum=None, dtype="float64")
    means, variances = [], []
    for seed in range(4):
        rng = np.random.default_rng(seed)
        x, where = rng.normal(seed, 1.0, (6, 3)), rng.random((6, 3)) < 0.5
        where[:2] = True
        bn(x, where=where)
        columns = [x[where[:, c], c] for c in range(3)]
        means.append([column.mean() for column in columns])
        variances.append([column.var(ddof=1) for column in columns])
    np.testing.assert_allclose(bn.running_mean, np.mean(means, axis=0), rtol=1e-13)
    np.testing.assert_allclose(bn.running_var, np.mean(variances, axis=0), rtol=1e-13)
    assert bn.num_batches_tracked == 4


@pytest.mark.parametrize(("layer", "x"), [("float32", "float32"), ("float32", "float16"), ("float64", "float64")])
def test_the_state_keeps_the_dtype_of_the_layer(machine, layer, x):
    bn = cubn.BatchNorm(3, dtype=layer)
    y = bn(np.random.default_rng(0).normal(size=(5, 3)).astype(x))
    assert y.dtype == np.dtype(x)
    assert {values.dtype.name for key, values in bn.state_dict().items() if key != "num_batches_tracked"} == {layer}
    assert type(bn.num_batches_tracked) is int


# What leaves it alone


def test_evaluation_leaves_the_state_alone():
    bn = cubn.BatchNorm(3)
    x = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    bn(x)
    bn.eval()
    before = snapshot(bn)
    bn(x + 5)
    assert snapshot(bn) == before


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (5, 3, 0)])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_an_empty_batch_passes_the_layer_and_leaves_all_as_it_was(machine, shape, momentum, activation):
    bn = cubn.BatchNorm(3, momentum=momentum, activation=activation)
    bn(np.random.default_rng(0).normal(size=(5, 3)).astype("float32"))
    before = snapshot(bn)
    empty = np.ones(shape, np.float32)
    y = bn(empty, residual=empty)
    assert (y.shape, y.dtype) == (shape, np.dtype("float32"))
    assert snapshot(bn) == before
    assert bn.backward(y).shape == shape
    assert bn.gamma_grad.tolist() == bn.beta_grad.tolist() == [0, 0, 0]
    assert bn.residual_grad.shape == shape


def test_channels_with_fewer_than_two_samples_stay_and_the_others_move():
    bn = cubn.BatchNorm(4, dtype="float64")
    bn.running_mean, bn.running_var = np.arange(4.0), np.arange(4.0) + 2
    x = np.random.default_rng(0).normal(size=(6, 4))
    where = np.ones((6, 4), bool)
    where[:, 1], where[1:, 2] = False, False
    bn(x, where=where)
    assert bn.running_mean[1:3].tolist() == [1.0, 2.0]
    assert bn.running_var[1:3].tolist() == [3.0, 4.0]
    moved = [0, 3]
    np.testing.assert_allclose(bn.running_mean[moved], 0.9 * np.array([0, 3]) + 0.1 * x.mean(axis=0)[moved], rtol=1e-14)
    np.testing.assert_allclose(
        bn.running_var[moved], 0.9 * np.array([2, 5]) + 0.1 * x.var(axis=0, ddof=1)[moved], rtol=1e-14
    )
    assert bn.num_batches_tracked == 1


@pytest.mark.parametrize("rows", [0, 1])
def test_a_mask_that_leaves_no_channel_two_samples_changes_nothing(rows):
    bn = cubn.BatchNorm(4)
    before = snapshot(bn)
    where = np.arange(6)[:, None] < rows
    bn(np.random.default_rng(0).normal(size=(6, 4)).astype("float32"), where=where)
    assert snapshot(bn) == before


def test_nan_stays_in_its_channel_of_the_state():
    bn = cubn.BatchNorm(3)
    x = np.random.default_rng(0).normal(size=(5, 3)).astype("float32")
    x[2, 1] = np.nan
    bn(x)
    assert np.isnan(bn.running_mean).tolist() == np.isnan(bn.running_var).tolist() == [False, True, False]


def test_absorbing_a_batch_makes_a_new_value_and_keeps_the_old():
    first = cubn.RunningStatistics.initial(np, (3,), "float32")
    second = first.absorb(cubn.moments(np.arange(12, dtype="float32").reshape(4, 3)), 0.1)
    assert (first.mean.tolist(), first.var.tolist(), first.num_batches_tracked) == ([0, 0, 0], [1, 1, 1], 0)
    assert second.num_batches_tracked == 1
    assert (second.mean != first.mean).all()


# Exceptions


class InjectedError(Exception):
    pass


def refuse(*args, **options):
    raise InjectedError


@pytest.fixture
def layer():
    """A layer in the middle of training: one step done, its gradient not yet taken."""
    bn = cubn.BatchNorm(3, activation="relu")
    x = np.random.default_rng(0).normal(size=(6, 3)).astype("float32")
    bn(x)
    bn.backward(x)
    bn(x + 1)
    return bn


GOOD = np.random.default_rng(1).normal(size=(6, 3)).astype("float32")


def expect_untouched(bn, error, call):
    """The call raises; every visible bit is as before, and so is the gradient of the call before."""
    before = snapshot(bn)
    with pytest.raises(error):
        call()
    assert snapshot(bn) == before
    untouched = cubn.BatchNorm(3, activation="relu")
    untouched(np.random.default_rng(0).normal(size=(6, 3)).astype("float32") + 1)
    assert bn.backward(GOOD).tobytes() == untouched.backward(GOOD).tobytes()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"x": GOOD[:, :2]},
        {"x": GOOD.astype("int64")},
        {"residual": GOOD[:2]},
        {"where": np.ones((6, 3))},
        {"out": GOOD[:2].copy()},
        {"out": np.broadcast_to(np.float32(0), (6, 3))},
    ],
    ids=["channels", "dtype", "residual", "where", "out", "read-only out"],
)
def test_a_call_that_is_refused_leaves_the_layer_as_it_was(layer, training, options):
    layer.train(training)
    x = options.get("x", GOOD)
    expect_untouched(layer, (ValueError, TypeError), lambda: layer(x, **{k: v for k, v in options.items() if k != "x"}))


def test_one_sample_leaves_the_layer_as_it_was(layer):
    expect_untouched(layer, cubn.ShapeError, lambda: layer(GOOD[:1]))


@pytest.mark.parametrize(
    "place",
    [
        "cubn.functional.machine_for",
        "cubn.functional.Call.canonical",
        "cubn.functional.Call.deliver",
        "cubn.functional.Saved.__init__",
        "cubn.functional.RunningStatistics",
    ],
)
def test_an_exception_anywhere_in_a_training_step_leaves_the_layer_as_it_was(layer, monkeypatch, place):
    def failing():
        with monkeypatch.context() as patch:
            patch.setattr(place, refuse)
            layer(GOOD)

    expect_untouched(layer, InjectedError, failing)


def test_an_exception_between_the_two_statistics_leaves_both_as_they_were(layer, monkeypatch):
    """The mean has been computed when the variance fails."""

    def failing():
        with monkeypatch.context() as patch:
            patch.setattr(cubn.Moments, "var_unbiased", property(refuse))
            layer(GOOD, where=np.ones_like(GOOD, bool))  # with a mask, no machine moves the state along

    expect_untouched(layer, InjectedError, failing)


def test_a_rank_that_fails_leaves_the_layer_as_it_was(layer):
    class Broken:
        rank, size, all_gather = 0, 2, refuse

    def failing():
        layer.sync = Broken()
        try:
            layer(GOOD)
        finally:
            layer.sync = None

    expect_untouched(layer, InjectedError, failing)


@pytest.mark.parametrize("place", ["cubn.functional.machine_for", "cubn.functional.Call.user_channels"])
def test_an_exception_in_the_backward_pass_keeps_the_gradients_of_the_pass_before(layer, monkeypatch, place):
    def failing():
        with monkeypatch.context() as patch:
            patch.setattr(place, refuse)
            layer.backward(GOOD)

    expect_untouched(layer, InjectedError, failing)


def test_a_dy_that_is_refused_keeps_the_gradients_of_the_pass_before(layer):
    expect_untouched(layer, cubn.ShapeError, lambda: layer.backward(GOOD[:2]))


def test_a_layer_that_was_changed_by_a_failing_call_is_seen(layer):
    """The teeth of `expect_untouched`, for the state and for the saved pass."""

    def moves_the_mean():
        layer.running_mean = layer.running_mean + 1
        refuse()

    def forgets_the_pass():
        running = layer._running
        layer(GOOD)
        layer._running = running
        refuse()

    for broken in (moves_the_mean, forgets_the_pass):
        with pytest.raises(AssertionError):
            expect_untouched(layer, InjectedError, broken)
