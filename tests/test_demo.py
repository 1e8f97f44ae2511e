"""The demo's network, training and figure: gradients, fairness of the comparison, and what is recorded."""

import types
from itertools import islice

import numpy as np
import pytest

from cubn.demo import digits, figure, training
from cubn.demo.network import (
    HIDDEN,
    Convolution,
    Descent,
    Network,
    Pool,
    Sigmoid,
    softmax_cross_entropy,
)
from cubn.demo.training import History, batches, train
from cubn.layer import BatchNorm


@pytest.fixture
def sklearn():
    return pytest.importorskip("sklearn", reason="the digits come with scikit-learn, which is not installed")


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason="the figure needs Matplotlib, which is not installed")


# The network


@pytest.mark.parametrize("with_bn", [False, True])
def test_every_gradient_of_the_network_agrees_with_central_differences(with_bn):
    """A random direction through an array meets all its entries, so three directions check each array.

    With h = 1e-5 the difference of two losses near 3 carries a rounding error of 1e-15 / h = 1e-10 and the
    truncation is of the order h^2 = 1e-10, on derivatives between 1e-3 and 1.
    """
    rng = np.random.default_rng(3)
    network = Network(np, rng, with_bn=with_bn, dtype="float64")
    images, labels = rng.normal(size=(7, 1, 8, 8)), rng.integers(10, size=7)
    for layer in network.layers:
        if isinstance(layer, BatchNorm):  # ones and zeros would hide an error
            layer.gamma[:] = rng.uniform(0.5, 2.0, layer.gamma.shape)
            layer.beta[:] = rng.normal(size=layer.beta.shape)

    def loss():
        return softmax_cross_entropy(np, network(images), labels)[0]

    dimages = network.backward(softmax_cross_entropy(np, network(images), labels)[1])
    pairs = [(images, dimages), *network.learned()]
    assert len(pairs) == 1 + (11 if with_bn else 8)
    h = 1e-5
    for values, grad in pairs:
        grad = grad.copy()
        assert grad.shape == values.shape
        for _ in range(3):
            direction = rng.normal(size=values.shape)
            values += h * direction
            above = loss()
            values -= 2 * h * direction
            below = loss()
            values += h * direction
            exact = (grad * direction).sum()
            assert (above - below) / (2 * h) == pytest.approx(exact, rel=1e-6, abs=1e-8)


def test_convolution_is_the_sum_over_every_window():
    rng = np.random.default_rng(0)
    x, weight, bias = rng.normal(size=(2, 3, 4, 6)), rng.normal(size=(5, 3, 3, 3)), rng.normal(size=5)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    expected = np.empty((2, 5, 4, 6))
    for n, f, i, j in np.ndindex(expected.shape):
        expected[n, f, i, j] = (padded[n, :, i : i + 3, j : j + 3] * weight[f]).sum() + bias[f]
    np.testing.assert_allclose(Convolution(np, weight, bias)(x), expected, rtol=1e-13, atol=1e-13)


def test_pool_takes_the_mean_of_every_two_by_two_block():
    x = np.arange(16.0).reshape(1, 1, 4, 4)
    assert Pool()(x).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]


def test_sigmoid_and_loss_stay_finite_far_out():
    with np.errstate(all="raise"):
        assert Sigmoid(np)(np.array([-1e4, 0.0, 1e4])).tolist() == [0.0, 0.5, 1.0]
    loss, dlogits = softmax_cross_entropy(np, np.array([[1e4, 0.0], [0.0, 1e4]]), np.array([0, 0]))
    assert loss == 5e3
    assert dlogits.tolist() == [[0.0, 0.0], [-0.5, 0.5]]


def test_descent_with_momentum_follows_its_closed_form():
    """A constant gradient g: the velocity after t steps is -rate * g * (1 - m^t) / (1 - m)."""
    network = Network(np, np.random.default_rng(0), with_bn=True, dtype="float64")
    before = [values.copy() for values, _ in network.learned()]
    for layer in network.layers:
        for name in ("weight", "bias", "gamma", "beta"):
            if getattr(layer, name, None) is not None:
                setattr(layer, f"{name}_grad", np.full_like(getattr(layer, name), 2.0))
    descent = Descent(network, 0.1, momentum=0.5)
    for _ in range(3):
        descent.step()
    travelled = -0.1 * 2.0 * (1.0 + 1.5 + 1.75)
    for (values, _), old in zip(network.learned(), before, strict=True):
        np.testing.assert_allclose(values - old, travelled, rtol=1e-12)


# A fair comparison


def test_both_networks_start_from_the_same_weights():
    plain, normalised = (Network(np, np.random.default_rng(5), with_bn=with_bn) for with_bn in (False, True))
    weights = [
        [layer.weight for layer in network.layers if hasattr(layer, "weight")] for network in (plain, normalised)
    ]
    assert [w.shape for w in weights[0]] == [(8, 1, 3, 3), (16, 8, 3, 3), (64, 32), (32, 10)]
    for one, other in zip(*weights, strict=True):
        np.testing.assert_array_equal(one, other)


def test_both_networks_see_the_same_images_in_the_same_order(sklearn, monkeypatch):
    seen = {False: [], True: []}
    call = Network.__call__

    def spy(self, x):
        seen[any(isinstance(layer, BatchNorm) for layer in self.layers)].append(x.copy())
        return call(self, x)

    monkeypatch.setattr(Network, "__call__", spy)
    for with_bn, rate in ((False, 0.1), (True, 1.0)):
        train(with_bn=with_bn, rate=rate, steps=30, batch=60, seed=4, test_every=10)
    assert len(seen[True]) == len(seen[False]) == 30 + 4
    for one, other in zip(seen[True], seen[False], strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.array_equal(seen[True][1], seen[True][2])


def test_an_epoch_takes_every_image_once_and_the_next_another_order():
    first, second, third = islice(batches(np.random.default_rng(0), 12, 6), 3)
    assert sorted([*first, *second]) == list(range(12))
    assert sorted(first) != sorted(third) or list(first) != list(third)
    assert [len(chosen) for chosen in islice(batches(np.random.default_rng(0), 11, 4), 5)] == 5 * [4]


def test_the_split_keeps_every_image_once(sklearn):
    from sklearn.datasets import load_digits

    data = digits.load()
    assert (len(data.train_images), len(data.test_images)) == (digits.TRAIN_IMAGES, digits.TEST_IMAGES)
    images = np.concatenate([data.train_images, data.test_images]).reshape(-1, 64)
    labels = np.concatenate([data.train_labels, data.test_labels])
    assert (images.min(), images.max(), images.dtype) == (-1.0, 1.0, np.float32)
    bundled, truth = load_digits(return_X_y=True)
    rows = np.column_stack([8 * (images + 1), labels])
    bundled = np.column_stack([bundled, truth])
    assert sorted(map(tuple, rows)) == sorted(map(tuple, bundled))
    assert np.bincount(data.test_labels).min() > 20  # no digit is missing from the test


def test_one_seed_gives_the_same_numbers_twice_and_another_gives_others(sklearn):
    first, again, other = (train(with_bn=True, rate=0.3, steps=15, seed=seed, test_every=5) for seed in (1, 1, 2))
    for name in ("steps", "loss", "accuracy", "percentiles"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert not np.array_equal(first.loss[1:], other.loss[1:])


# What batch normalisation does to it


def test_with_batch_normalisation_the_network_reaches_97_percent(sklearn):
    history = train(with_bn=True, rate=1.0)
    assert history.final_accuracy >= 0.97
    assert history.steps_to(0.95) <= 250
    assert history.loss[-1] < 0.1 < 1.0 < history.loss[1]


def test_at_a_high_rate_only_batch_normalisation_learns(sklearn):
    plain, normalised = (train(with_bn=with_bn, rate=3.0, steps=150) for with_bn in (False, True))
    assert plain.accuracy.max() < 0.3
    assert normalised.accuracy.max() > 0.75


# What is recorded


def test_the_history_holds_the_percentiles_of_every_batch_since_the_last_test(sklearn, monkeypatch):
    inputs, losses = [], []
    cross_entropy = training.softmax_cross_entropy

    class Spied(Network):
        def backward(self, dy):
            inputs.append(self.last_sigmoid.x.copy())
            return super().backward(dy)

    def spied(xp, logits, labels):
        loss, dlogits = cross_entropy(xp, logits, labels)
        losses.append(loss)
        return loss, dlogits

    monkeypatch.setattr(training, "Network", Spied)
    monkeypatch.setattr(training, "softmax_cross_entropy", spied)
    history = train(with_bn=True, rate=0.5, steps=7, batch=20, test_every=3)

    assert history.steps.tolist() == [0, 3, 6, 7]
    assert history.percentiles.shape == (4, 3, HIDDEN)
    assert np.isnan(history.percentiles[0]).all()
    assert np.isnan(history.loss[0])
    for row, span in enumerate((slice(0, 3), slice(3, 6), slice(6, 7)), start=1):
        expected = np.percentile(np.concatenate(inputs[span]), [15, 50, 85], axis=0)
        np.testing.assert_allclose(history.percentiles[row], expected, rtol=1e-6)
        assert history.loss[row] == pytest.approx(np.mean(losses[span]))


def test_testing_uses_the_running_statistics_and_leaves_them_alone(sklearn):
    data = digits.load()
    network = Network(np, np.random.default_rng(0), with_bn=True)
    network(data.train_images[:60])
    layers = [layer for layer in network.layers if isinstance(layer, BatchNorm)]
    before = [layer.state_dict() for layer in layers]
    accuracy = training.test(network, data)

    for layer, state in zip(layers, before, strict=True):
        assert layer.training
        for key, values in layer.state_dict().items():
            np.testing.assert_array_equal(values, state[key])
    network.eval()
    one_by_one = [int(network(data.test_images[i : i + 1]).argmax()) for i in range(40)]
    together = network(data.test_images).argmax(axis=1)
    assert one_by_one == together[:40].tolist()  # the batch around an image does not matter
    assert accuracy == np.mean(together == data.test_labels)


def test_a_run_that_diverges_stops_and_says_so(sklearn):
    steps = 0

    def count():
        nonlocal steps
        steps += 1

    history = train(with_bn=False, rate=1e38, steps=50, on_step=count)
    assert history.diverged
    assert history.steps[-1] == steps < 50
    assert "diverged" in repr(history)
    assert history.steps_to(0.95) is None


def test_the_progress_callback_is_called_once_a_step(sklearn):
    calls = []
    train(with_bn=False, rate=0.1, steps=5, on_step=lambda: calls.append(1))
    assert len(calls) == 5


def test_steps_to_is_the_first_test_that_reached_it():
    history = made_up(with_bn=True, rate=1.0, accuracy=[0.1, 0.9, 0.95, 0.5, 0.97])
    assert history.steps_to(0.95) == 20
    assert history.steps_to(0.96) == 40
    assert history.steps_to(0.98) is None
    assert history.final_accuracy == 0.97


# One text for NumPy and CuPy


def test_the_demo_computes_with_the_given_namespace_alone(sklearn, monkeypatch):
    """On an array that, as CuPy's do, refuses NumPy's functions and NumPy's arrays beside it."""
    monkeypatch.setattr(training, "namespace", lambda device: foreign_numpy)
    foreign = train(with_bn=False, rate=0.3, steps=4, test_every=2)
    monkeypatch.undo()
    ours = train(with_bn=False, rate=0.3, steps=4, test_every=2)
    assert type(foreign.percentiles) is np.ndarray
    np.testing.assert_array_equal(foreign.loss, ours.loss)
    np.testing.assert_array_equal(foreign.percentiles, ours.percentiles)


def test_that_foreign_array_refuses_numpy():
    x = foreign_numpy.asarray(np.ones(3))
    assert type(foreign_numpy.exp(x) + 1.0) is type(x)
    with pytest.raises(TypeError, match="NumPy function"):
        np.concatenate([x, x])
    with pytest.raises(TypeError, match="NumPy array"):
        x + np.ones(3)
    with pytest.raises(TypeError, match="NumPy array"):
        x[np.arange(2)]
    with pytest.raises(TypeError, match="NumPy array"):
        foreign_numpy.exp(np.ones(3))


class Foreign(np.ndarray):
    """A NumPy array that behaves as if it lived elsewhere."""

    def __array_function__(self, function, types, args, kwargs):
        raise TypeError(f"NumPy function {function.__name__} on a foreign array")

    def __array_ufunc__(self, ufunc, method, *args, out=None, **kwargs):
        if out is not None:
            kwargs["out"] = tuple(map(at_home, out))
        result = getattr(ufunc, method)(*map(at_home, args), **kwargs)
        return abroad(result) if out is None else out[0]

    def __getitem__(self, key):
        return abroad(self.view(np.ndarray)[at_home(key)])

    def get(self):
        return self.view(np.ndarray)


def at_home(value):
    if isinstance(value, list | tuple):
        return type(value)(map(at_home, value))
    if isinstance(value, Foreign):
        return value.view(np.ndarray)
    if isinstance(value, np.ndarray) and value.ndim > 0:
        raise TypeError("NumPy array beside a foreign one")
    return value


def abroad(result):
    return np.asarray(result).view(Foreign) if isinstance(result, np.ndarray | np.generic) else result


class ForeignNamespace(types.ModuleType):
    """NumPy's functions, for foreign arrays only."""

    def __init__(self, module):
        super().__init__(module.__name__)
        self.module = module

    def __getattr__(self, name):
        found = getattr(self.module, name)
        if isinstance(found, types.ModuleType):
            return ForeignNamespace(found)

        def function(*args, **kwargs):
            if name != "asarray":
                args = map(at_home, args)
            return abroad(found(*args, **kwargs))

        return function


foreign_numpy = ForeignNamespace(np)


# The figure


def made_up(*, with_bn, rate, accuracy, travel=None):
    """A history whose unit u has the percentiles (-1, 0, 1) + travel[u] * (0 at first, 1 at the end)."""
    count = len(accuracy)
    travel = np.arange(HIDDEN, dtype=float) if travel is None else travel
    percentiles = np.array([-1.0, 0.0, 1.0])[None, :, None] + np.linspace(0, 1, count)[:, None, None] * travel
    percentiles[0] = np.nan
    return History(with_bn, rate, 10 * np.arange(count), np.ones(count), np.array(accuracy, float), percentiles, False)


def test_the_typical_sigmoid_is_the_middle_one_of_the_best_network_without_batch_normalisation():
    travel = np.random.default_rng(0).permutation(HIDDEN).astype(float)
    histories = [
        made_up(with_bn=True, rate=0.1, accuracy=[0.1, 0.5, 0.99]),
        made_up(with_bn=False, rate=0.1, accuracy=[0.1, 0.5, 0.8]),
        made_up(with_bn=True, rate=1.0, accuracy=[0.1, 0.5, 0.6]),
        made_up(with_bn=False, rate=1.0, accuracy=[0.1, 0.5, 0.9], travel=travel),
    ]
    rate, unit = figure.typical_sigmoid(histories)
    assert rate == 1.0
    assert travel[unit] == HIDDEN // 2


@pytest.mark.parametrize("count", [1, 2, 7])
def test_the_figure_has_a_panel_for_each_rate_and_shows_what_was_recorded(matplotlib, count):
    rates = [0.1 * 2**k for k in range(count)]
    histories = [
        made_up(with_bn=with_bn, rate=rate, accuracy=[0.1, 0.7 + 0.26 * with_bn, 0.98])
        for rate in rates
        for with_bn in (False, True)
    ]
    drawn = figure.draw(histories)
    above, below = drawn.subfigs
    panels = [panel for panel in above.axes if panel.axison]
    assert [panel.get_title(loc="left") for panel in panels] == [f"rate {rate:g}" for rate in rates]
    for panel in panels:
        shown = [line.get_ydata() for line in panel.lines if len(line.get_ydata()) == 3]
        assert [list(y) for y in shown] == [[0.1, 0.7, 0.98], [0.1, 0.96, 0.98]]
        assert {text.get_text() for text in panel.texts} == {"20", "10"}
    rate, unit = figure.typical_sigmoid(histories)
    for panel, with_bn in zip(below.axes, (False, True), strict=True):
        (history,) = (h for h in histories if (h.with_bn, h.rate) == (with_bn, rate))
        shown = [line.get_ydata() for line in panel.lines if len(line.get_ydata()) == 3]
        np.testing.assert_array_equal(shown, history.percentiles[:, :, unit].T)
        assert [text.get_text() for text in panel.texts] == [f"{p}th percentile" for p in (15, 50, 85)]


def test_the_figure_survives_runs_that_diverged(matplotlib, tmp_path):
    from dataclasses import replace

    histories = []
    for with_bn in (False, True):
        history = made_up(with_bn=with_bn, rate=9.0, accuracy=[0.1, 0.1])
        broken = history.percentiles.copy()
        broken[1, :, ::2], broken[1, :, 1::2] = np.nan, np.inf
        histories.append(replace(history, percentiles=broken, diverged=True))
    drawn = figure.draw(histories)
    assert [list(panel.texts) for panel in drawn.subfigs[1].axes] == [[], []]  # no line ends anywhere
    drawn.savefig(tmp_path / "broken.png")
    assert (tmp_path / "broken.png").stat().st_size > 5_000
