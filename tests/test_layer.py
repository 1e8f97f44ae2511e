"""The layer: its modes, its gradients, its state in and out, and how it looks."""

import copy
import pickle
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest

import cubn

# Modes


def written_out(x, mean, var, bn, channel_axis=1):
    """gamma * (x - mean) / sqrt(var + eps) + beta in float64."""
    kept = channel_axis if isinstance(channel_axis, tuple) else (channel_axis,)
    aligned = tuple(x.shape[axis] if axis in kept else 1 for axis in range(x.ndim))
    mean, var, gamma, beta = (np.asarray(v, "float64").reshape(aligned) for v in (mean, var, bn.gamma, bn.beta))
    return gamma * (x - mean) / np.sqrt(var + bn.eps) + beta


def trained(features=3, *, shape=(6, 3, 4), steps=2, **options):
    bn = cubn.BatchNorm(features, dtype="float64", **options)
    rng = np.random.default_rng(0)
    if bn.affine:
        bn.gamma, bn.beta = rng.uniform(0.5, 2.0, bn.channel_shape), rng.normal(size=bn.channel_shape)
    for _ in range(steps):
        bn(rng.normal(2.0, 3.0, shape))
    return bn


X = np.random.default_rng(1).normal(1.0, 2.0, (6, 3, 4))


def test_training_takes_the_statistics_of_the_batch(machine):
    """24 float64 samples of size up to 8: all roundings together are below 100 u of y's largest."""
    bn = trained()
    wanted = written_out(X, X.mean(axis=(0, 2)), X.var(axis=(0, 2)), bn)
    np.testing.assert_allclose(bn(X), wanted, rtol=0, atol=100 * 2.0**-53 * np.abs(wanted).max())


def test_evaluation_takes_the_running_statistics(machine):
    """Four roundings of terms up to twice y's largest and the mean's share of it."""
    bn = trained().eval()
    wanted = written_out(X, bn.running_mean, bn.running_var, bn)
    np.testing.assert_allclose(bn(X), wanted, rtol=0, atol=20 * 2.0**-53 * np.abs(wanted).max())
    assert np.array_equal(bn(X[:1]), bn(X)[:1]), "what else is in the batch matters in evaluation"


def test_without_tracking_evaluation_takes_the_statistics_of_the_batch(machine):
    bn = trained(track_running_stats=False)
    assert np.array_equal(bn.eval()(X), bn.train()(X))
    assert (bn.running_mean, bn.running_var, bn.num_batches_tracked) == (None, None, 0)
    with pytest.raises(cubn.ShapeError, match="one sample per channel"):
        bn.eval()(np.ones((1, 3)))


def test_without_affine_there_is_nothing_to_learn():
    bn = trained(affine=False)
    y = bn(X)
    np.testing.assert_allclose(y.mean(axis=(0, 2)), 0, atol=1e-15)
    bn.backward(X)
    assert (bn.gamma, bn.beta, bn.gamma_grad, bn.beta_grad) == (None,) * 4
    assert sorted(bn.state_dict()) == ["num_batches_tracked", "running_mean", "running_var"]


def test_the_mode_is_what_was_asked_for_last():
    bn = cubn.BatchNorm(3)
    assert bn.training
    assert bn.eval() is bn
    assert not bn.training
    assert bn.train() is bn
    assert bn.training
    assert not bn.train(False).training


@pytest.mark.parametrize(
    ("features", "channel_axis", "shape"),
    [
        (3, 1, (6, 3, 4)),
        (4, -1, (6, 3, 4)),
        ((3, 4), (1, 2), (6, 3, 4)),
        ((6, 4), (0, -1), (6, 3, 4)),
        ((), (), (5, 2)),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_features_are_the_sizes_of_the_channel_axes(machine, features, channel_axis, shape, training):
    bn = trained(features, channel_axis=channel_axis, shape=shape).train(training)
    x = np.random.default_rng(2).normal(1.0, 2.0, shape)
    kept = tuple(sorted(a % x.ndim for a in (channel_axis if isinstance(channel_axis, tuple) else (channel_axis,))))
    averaged = tuple(axis for axis in range(x.ndim) if axis not in kept)
    mean, var = (x.mean(averaged), x.var(averaged)) if training else (bn.running_mean, bn.running_var)
    wanted = written_out(x, mean, var, bn, kept)
    assert bn.gamma.shape == bn.running_mean.shape == bn.channel_shape
    np.testing.assert_allclose(bn(x), wanted, rtol=0, atol=200 * 2.0**-53 * np.abs(wanted).max())


def test_a_mask_hides_elements_in_both_modes():
    """Masked NumPy arithmetic is the oracle; in evaluation the mask only sets zeros."""
    where = np.random.default_rng(3).random(X.shape) < 0.6
    x = np.where(where, X, np.nan)
    bn = trained()
    columns = [X[:, c][where[:, c]] for c in range(3)]
    wanted = written_out(X, [c.mean() for c in columns], [c.var() for c in columns], bn)
    np.testing.assert_allclose(bn(x, where=where), np.where(where, wanted, 0), rtol=0, atol=1e-13)
    bn.eval()
    wanted = written_out(X, bn.running_mean, bn.running_var, bn)
    np.testing.assert_allclose(bn(x, where=where), np.where(where, wanted, 0), rtol=0, atol=1e-13)
    dx = bn.backward(np.where(where, 1.0, np.nan))
    assert np.array_equal(dx == 0, ~where)
    assert np.isfinite(bn.gamma_grad).all()


@pytest.mark.parametrize("training", [True, False])
def test_the_result_is_written_into_out(training):
    bn, out = trained().train(training), np.empty_like(X)
    wanted = bn(X)
    assert bn(X, out=out) is out
    assert np.array_equal(out, wanted)
    dx, into = bn.backward(X), np.empty_like(X)
    assert bn.backward(X, out=into) is into
    assert np.array_equal(into, dx)


@pytest.mark.parametrize("over", ["x", "residual"])
def test_evaluation_over_its_own_input_is_right_and_takes_no_gradient_of_what_is_gone(over):
    bn = trained().eval()
    given = SimpleNamespace(x=X.copy(), residual=X[::-1].copy())
    wanted = bn(X, residual=X[::-1])
    y = bn(given.x, residual=given.residual, out=getattr(given, over))
    assert y is getattr(given, over)
    np.testing.assert_array_equal(y, wanted)
    with pytest.raises(RuntimeError, match="wrote y over its input"):
        bn.backward(X)
    bn(X)
    assert bn.backward(X).shape == X.shape


# Gradients

STEP = 1e-5

CASES = {
    "plain": {},
    "not affine": {"affine": False},
    "not tracked": {"track_running_stats": False},
    "relu": {"activation": "relu"},
    "residual": {"residual": True},
    "residual and relu": {"activation": "relu", "residual": True},
    "mask": {"where": True},
    "everything": {"activation": "relu", "residual": True, "where": True},
    "last axis": {"features": 4, "channel_axis": -1},
    "two axes": {"features": (3, 2), "channel_axis": (1, 2), "shape": (4, 3, 2)},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_every_gradient_of_the_layer_is_a_central_difference(machine, case, training):
    """h = 1e-5 leaves h^2 |f'''| / 6 + u |f| / h, about 1e-10 for third derivatives up to 10: 1e-6 of the largest
    gradient is kept with room to spare, and by no formula with a term missing.  ReLU's kink stays 100 h away."""
    options = dict(CASES[case])
    shape = options.pop("shape", (3, 3, 4))
    has_residual, has_mask = options.pop("residual", False), options.pop("where", False)
    bn = trained(options.pop("features", 3), shape=shape, **options).train(training)
    rng = np.random.default_rng(6)
    weights, where = rng.normal(size=shape), (rng.random(shape) < 0.8 if has_mask else None)
    operands = {"x": rng.normal(size=shape)}
    if has_residual:
        operands["residual"] = rng.normal(size=shape)
    if bn.affine:
        operands |= {"gamma": bn.gamma, "beta": bn.beta}

    def y():
        return bn(operands["x"], residual=operands.get("residual"), where=where)

    while bn.activation and (np.abs(y()[y() != 0]) < 100 * STEP).any():
        operands["x"][...] = rng.normal(size=shape)

    y()
    found = {"x": bn.backward(weights)}
    found |= {"gamma": bn.gamma_grad, "beta": bn.beta_grad, "residual": bn.residual_grad}
    for name, values in operands.items():
        slopes = np.empty_like(values)
        for index in np.ndindex(values.shape):
            kept, losses = values[index], []
            for step in (STEP, -STEP):
                values[index] = kept + step
                losses.append((weights * y()).sum())
            values[index] = kept
            slopes[index] = (losses[0] - losses[1]) / (2 * STEP)
        assert np.abs(slopes).max() > 1e-3, f"{name}: this case tests nothing"
        np.testing.assert_allclose(found[name], slopes, rtol=0, atol=1e-6 * max(1, np.abs(slopes).max()), err_msg=name)
    for name in {"residual", "gamma", "beta"} - set(operands):
        assert found[name] is None


def test_a_frozen_layer_and_a_training_layer_have_different_gradients():
    """The teeth: with the batch's own statistics as running ones, y agrees and dx must not."""
    bn = trained()
    y = bn(X)
    dx = bn.backward(y)
    bn.running_mean, bn.running_var = X.mean(axis=(0, 2)), X.var(axis=(0, 2))
    np.testing.assert_allclose(bn.eval()(X), y, rtol=1e-12, atol=1e-13)
    frozen = bn.backward(y)
    assert np.abs(dx - frozen).max() > 0.1 * np.abs(frozen).max()


def test_a_change_of_mode_after_the_call_does_not_change_its_gradient():
    bn = trained()
    bn(X)
    dx = bn.backward(X)
    bn.eval()
    assert np.array_equal(bn.backward(X), dx)


def test_a_residual_that_is_gone_takes_its_gradient_with_it():
    bn = trained()
    bn(X, residual=X)
    bn.backward(X)
    assert bn.residual_grad.shape == X.shape
    bn(X)
    bn.backward(X)
    assert bn.residual_grad is None


def test_training_with_the_layer_learns_a_scale_and_a_shift():
    """Gradient descent on gamma and beta alone: least squares in a well-conditioned basis, contracts by 1/2 a step."""
    bn = cubn.BatchNorm(3, dtype="float64")
    target = 2.0 * (X - X.mean(axis=(0, 2), keepdims=True)) / X.std(axis=(0, 2), keepdims=True) + 0.5
    for _ in range(60):
        y = bn(X)
        bn.backward((y - target) / (2 * 24))
        bn.gamma, bn.beta = bn.gamma - bn.gamma_grad, bn.beta - bn.beta_grad
    np.testing.assert_allclose(bn.gamma, 2.0, rtol=1e-4)
    np.testing.assert_allclose(bn.beta, 0.5, rtol=1e-4)


# State in and out


ARRAYS = ("gamma", "beta", "running_mean", "running_var")


def bits(bn):
    return {key: getattr(bn, key).tobytes() for key in ARRAYS}


def test_a_state_dict_is_a_copy():
    bn = trained()
    before, state = bits(bn), bn.state_dict()
    for key in ARRAYS:
        state[key][...] = 77
    assert bits(bn) == before


def test_a_loaded_state_is_a_copy():
    state, bn = trained().state_dict(), cubn.BatchNorm(3, dtype="float64")
    bn.load_state_dict(state)
    loaded = bits(bn)
    for key in ARRAYS:
        state[key][...] = 77
    assert bits(bn) == loaded
    mine = np.ones(3)
    bn.running_mean = mine
    mine[...] = 77
    assert bn.running_mean.tolist() == [1, 1, 1]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("tracked", [True, False])
def test_a_state_dict_makes_another_layer_the_same(affine, tracked):
    options = {"affine": affine, "track_running_stats": tracked}
    bn, other = trained(**options), cubn.BatchNorm(3, dtype="float64", **options)
    other.load_state_dict(bn.state_dict())
    assert sorted(other.state_dict()) == sorted(bn.state_dict())
    assert np.array_equal(other.eval()(X), bn.eval()(X))
    assert other.num_batches_tracked == bn.num_batches_tracked == (2 if tracked else 0)


def test_a_state_dict_may_come_in_any_order_and_as_lists():
    state = trained().state_dict()
    other = cubn.BatchNorm(3, dtype="float64")
    other.load_state_dict({key: np.asarray(state[key]).tolist() for key in reversed(state)})
    assert all(np.array_equal(values, state[key]) for key, values in other.state_dict().items())


@pytest.mark.parametrize("bad_key", ["gamma", "beta", "running_mean", "running_var", "num_batches_tracked"])
@pytest.mark.parametrize("bad", [np.ones(4), np.array([1j, 0, 0]), "text", None, -np.ones(3, int)])
def test_one_bad_entry_changes_nothing_wherever_it_stands(bad_key, bad):
    bn = trained()
    before = bn.state_dict()
    good = {key: np.asarray(values) + 1 for key, values in before.items() if key != bad_key}
    for state in ({bad_key: bad, **good}, {**good, bad_key: bad}):
        with pytest.raises((ValueError, TypeError), match=bad_key):
            bn.load_state_dict(state)
        assert all(np.array_equal(values, before[key]) for key, values in bn.state_dict().items())


@pytest.mark.parametrize(
    ("affine", "tracked", "other"),
    [
        (True, True, (True, False)),
        (True, True, (False, True)),
        (False, True, (True, True)),
        (True, False, (True, True)),
    ],
)
def test_the_state_of_another_kind_of_layer_is_refused(affine, tracked, other):
    bn = trained(affine=affine, track_running_stats=tracked)
    with pytest.raises(ValueError, match=rf"affine={affine}, track_running_stats={tracked}"):
        bn.load_state_dict(trained(affine=other[0], track_running_stats=other[1]).state_dict())


@pytest.mark.parametrize("clone", [copy.deepcopy, copy.copy, lambda bn: pickle.loads(pickle.dumps(bn))])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"track_running_stats": False, "activation": "relu"}])
def test_a_copy_of_a_layer_is_the_same_layer_without_its_last_call(clone, options):
    bn = trained(**options).eval()
    bn(X)
    bn.backward(X)
    twin = clone(bn)
    assert repr(twin) == repr(bn)
    assert all(np.array_equal(values, bn.state_dict()[key]) for key, values in twin.state_dict().items())
    with pytest.raises(RuntimeError, match="before forward"):
        twin.backward(X)
    assert np.array_equal(twin(X), bn(X))
    assert twin.to("cpu").device == "cpu"


def test_a_deep_copy_learns_by_itself():
    bn = trained()
    before, twin = bn.state_dict(), copy.deepcopy(bn)
    twin(X)
    twin.gamma += 1
    assert all(np.array_equal(values, before[key]) for key, values in bn.state_dict().items())


# Places


def test_moving_to_the_cpu_keeps_the_state_and_drops_the_last_call():
    bn = trained()
    before, y = bn.state_dict(), bn(X)
    assert bn.to("cpu") is bn
    assert bn.device == "cpu"
    assert all(np.array_equal(bn.state_dict()[key], before[key]) for key in ("gamma", "beta"))
    assert bn.num_batches_tracked == before["num_batches_tracked"] + 1
    with pytest.raises(RuntimeError, match="before forward"):
        bn.backward(y)


def test_a_move_to_a_device_that_is_not_there_leaves_the_layer_usable(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    bn = trained()
    bn(X)
    before, dx = bn.state_dict(), bn.backward(X)
    with pytest.raises(cubn.DeviceError, match="CuPy is not installed"):
        bn.to("cuda")
    assert bn.device == "cpu"
    assert all(np.array_equal(values, before[key]) for key, values in bn.state_dict().items())
    assert np.array_equal(bn.backward(X), dx)
    bn(X)


# How it looks

CENSUSES = [
    (50, {}, "4·50 = 200 numbers: 100 learned, 100 tracked"),
    (30, {}, "4·30 = 120 numbers: 60 learned, 60 tracked"),
    ((2, 3, 4), {"channel_axis": (1, 2, 3)}, "4·24 = 96 numbers: 48 learned, 48 tracked"),
    (50, {"affine": False}, "2·50 = 100 numbers: 0 learned, 100 tracked"),
    (50, {"track_running_stats": False}, "2·50 = 100 numbers: 100 learned, 0 tracked"),
    (50, {"affine": False, "track_running_stats": False}, "0·50 = 0 numbers: 0 learned, 0 tracked"),
]


@pytest.mark.parametrize(("features", "options", "census"), CENSUSES)
def test_the_census_is_in_the_repr_and_in_the_html_and_is_true(features, options, census):
    bn = cubn.BatchNorm(features, **options)
    assert census in repr(bn)
    assert census in bn._repr_html_()
    arrays = [values for key, values in bn.state_dict().items() if key != "num_batches_tracked"]
    assert sum(values.size for values in arrays) == int(census.partition("= ")[2].partition(" ")[0])


def test_the_repr_makes_the_same_layer_again():
    bn = cubn.BatchNorm((3, 4), channel_axis=(1, 2), eps=1e-3, momentum=None, activation="relu", dtype="float64")
    again = eval(repr(bn), {"BatchNorm": cubn.BatchNorm})
    assert repr(again) == repr(bn)
    assert repr(bn).endswith("training")
    assert repr(bn.eval()).endswith("evaluation")


class Page(HTMLParser):
    """Raises on a tag that is closed out of turn; collects the text of the page."""

    def __init__(self, html):
        super().__init__()
        self.open, self.text = [], ""
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_html_says_how_the_running_statistics_move():
    assert "0.9 · old + 0.1 · batch; batches so far: 0" in Page(cubn.BatchNorm(3)._repr_html_()).text
    assert "average over all batches" in Page(cubn.BatchNorm(3, momentum=None)._repr_html_()).text
    assert "batches so far: 2" in Page(trained()._repr_html_()).text


@pytest.mark.parametrize(("features", "options", "_"), CENSUSES)
def test_the_html_has_one_row_for_each_array(features, options, _):
    bn = cubn.BatchNorm(features, **options)
    html = bn._repr_html_()
    for name in ("gamma", "beta", "running_mean", "running_var"):
        assert (f">{name}<" in html) == (getattr(bn, name) is not None)
    assert Page(html).text
