"""Statistics of a data set: two estimators, each against NumPy written out, from any iterable of batches."""

import contextlib
import io
import sys

import numpy as np
import pytest

import cubn

RTOL = 1e-12
"""Both sides are float64 means and variances of at most 200 well-conditioned samples: error <= 8 * 200 u = 2e-13."""


def batches_of(*sizes, channels=3, spatial=(4,), seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal(i, 1.0 + i, (size, channels, *spatial)) for i, size in enumerate(sizes)]


def samples(batch):
    """(N, C, *S) as one row per sample."""
    return np.moveaxis(batch, 1, -1).reshape(-1, batch.shape[1])


def pooled(batches):
    together = np.concatenate([samples(batch) for batch in batches])
    return together.mean(axis=0), together.var(axis=0, ddof=1)


def paper(batches):
    """Algorithm 2, step 10: E_B[mean_B] and E_B[m / (m - 1) var_B], each batch alike."""
    rows = [samples(batch) for batch in batches if batch.size]
    means = [r.mean(axis=0) for r in rows]
    variances = [len(r) / (len(r) - 1) * r.var(axis=0) for r in rows]
    return np.mean(means, axis=0), np.mean(variances, axis=0)


ESTIMATORS = {"pooled": pooled, "paper": paper}

DATA_SETS = {
    "equal": batches_of(5, 5, 5),
    "unequal": batches_of(2, 9, 5),
    "one": batches_of(7),
    "with empty ones": [np.ones((0, 3, 4)), *batches_of(4, 2), np.ones((0, 3, 4)), np.ones((3, 3, 0))],
    "of different sizes": [*batches_of(2, 3, spatial=(2, 5)), *batches_of(4, spatial=(3, 3), seed=9)],
    "dense": batches_of(6, 8, spatial=()),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("data_set", DATA_SETS)
@pytest.mark.parametrize(
    "kind", [list, tuple, iter, lambda b: (batch for batch in b)], ids=["list", "tuple", "iterator", "generator"]
)
def test_the_population_is_numpy_written_out(machine, estimator, data_set, kind):
    batches = DATA_SETS[data_set]
    found = cubn.population(kind(batches), estimator=estimator)
    mean, var = ESTIMATORS[estimator](batches)
    np.testing.assert_allclose(found.mean, mean, rtol=RTOL, atol=1e-13)
    np.testing.assert_allclose(found.var_unbiased, var, rtol=RTOL)
    assert found.count == sum(len(samples(batch)) for batch in batches)
    n = found.count
    np.testing.assert_allclose(found.var, var * (n - 1) / n, rtol=RTOL)


def test_the_two_estimators_differ_on_batches_that_differ():
    """0, 2 and 10, 12: around 6 the four scatter by 104 / 3; each pair scatters by 2 around its own mean."""
    batches = [np.array([[0.0], [2.0]]), np.array([[10.0], [12.0]])]
    assert cubn.population(batches).var_unbiased.tolist() == [pytest.approx(104 / 3, rel=RTOL)]
    assert cubn.population(batches, estimator="paper").var_unbiased.tolist() == [2.0]


def test_the_two_means_differ_on_batches_of_unequal_size():
    batches = [np.array([[0.0], [0.0]]), np.array([[3.0]] * 4)]
    assert cubn.population(batches).mean.tolist() == [2.0]
    assert cubn.population(batches, estimator="paper").mean.tolist() == [1.5]


def test_the_pooled_population_does_not_depend_on_the_cuts():
    x = np.random.default_rng(1).normal(3.0, 2.0, (60, 2))
    whole = cubn.population(x)
    for sizes in ([10, 20, 30], [59], [1] * 59, [0, 30]):
        cut = cubn.population(np.split(x, np.cumsum(sizes)))
        np.testing.assert_allclose(cut.mean, whole.mean, rtol=RTOL)
        np.testing.assert_allclose(cut.var, whole.var, rtol=RTOL)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_single_array_is_one_batch(estimator):
    (batch,) = DATA_SETS["one"]
    found, listed = (cubn.population(b, estimator=estimator) for b in (batch, [batch]))
    assert found.mean.tobytes() == listed.mean.tobytes()
    assert found.var.tobytes() == listed.var.tobytes()


def test_the_channel_axes_are_those_of_batch_norm():
    x = np.random.default_rng(2).normal(size=(6, 4, 5, 3))
    last = cubn.population([x[:2], x[2:]], channel_axis=-1)
    np.testing.assert_allclose(last.mean, x.mean(axis=(0, 1, 2)), rtol=RTOL, atol=1e-13)
    each = cubn.population([x[:2], x[2:]], channel_axis=(1, 2, 3))
    np.testing.assert_allclose(each.var_unbiased, x.var(axis=0, ddof=1), rtol=RTOL)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_float32_batches_far_from_zero_keep_their_digits(estimator):
    """Means around 1e6, std 1: float32 shows 2**-24 relative of what float64 finds."""
    batches = [b.astype("float32") for b in np.random.default_rng(3).normal(1e6, 1.0, (5, 50, 2))]
    found = cubn.population(batches, estimator=estimator)
    mean, var = ESTIMATORS[estimator]([b.astype("float64") for b in batches])
    assert found.mean.dtype == found.var.dtype == np.float32
    np.testing.assert_allclose(found.mean, mean, rtol=2.0**-23)
    np.testing.assert_allclose(found.var_unbiased, var, rtol=2.0**-22)


def test_the_population_normalises_its_data_to_mean_zero_and_variance_one():
    batches = DATA_SETS["unequal"]
    p = cubn.population(batches)
    y = np.concatenate([samples(cubn.batch_norm_inference(b, p.mean, p.var, eps=0.0)) for b in batches])
    np.testing.assert_allclose(y.mean(axis=0), 0, atol=1e-13)
    np.testing.assert_allclose(y.var(axis=0), 1, rtol=RTOL)


def test_batches_are_consumed_one_at_a_time():
    """A reader may fill the same memory again and again: a batch that is asked for is one that was used up."""
    wanted = cubn.population(DATA_SETS["equal"])
    memory = np.empty_like(DATA_SETS["equal"][0])

    def reader():
        for batch in DATA_SETS["equal"]:
            memory[...] = batch
            yield memory

    found = cubn.population(reader())
    assert found.mean.tobytes() == wanted.mean.tobytes()
    assert found.var.tobytes() == wanted.var.tobytes()


def test_a_progress_bar_counts_the_batches_on_stderr():
    pytest.importorskip("tqdm")
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        found = cubn.population(DATA_SETS["equal"], progress=True)
    assert "3/3" in shown.getvalue()
    assert found.count == 60


def test_without_progress_nothing_is_printed(capsys):
    cubn.population(DATA_SETS["equal"])
    assert capsys.readouterr() == ("", "")


def test_a_progress_bar_without_tqdm_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"needs tqdm, but it is not installed; pip install tqdm"):
        cubn.population(DATA_SETS["equal"], progress=True)
    assert cubn.population(DATA_SETS["equal"]).count == 60
