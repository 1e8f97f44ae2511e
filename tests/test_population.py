"""Statistics of a data set: two estimators, each against NumPy written out, from any iterable of batches."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cubn
from cubn import chunks as chunked
from cubn.population import merge

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


# Arrays that are read block by block

ROWS = np.random.default_rng(5).normal(1e3, 1.0, (40, 6, 5, 4)).astype("float32")
EXACT = ROWS.astype("float64")


def memory_mapped(tmp_path, x, chunks):
    np.save(tmp_path / "x.npy", x)
    return np.load(tmp_path / "x.npy", mmap_mode="r")


def in_zarr(tmp_path, x, chunks):
    zarr = pytest.importorskip("zarr", reason="zarr is not installed")
    stored = zarr.open(str(tmp_path / "x.zarr"), mode="w", shape=x.shape, chunks=chunks, dtype=x.dtype)
    stored[...] = x
    return stored


def in_hdf5(tmp_path, x, chunks):
    h5py = pytest.importorskip("h5py", reason="h5py is not installed")
    file = h5py.File(tmp_path / "x.h5", "w")
    return file.create_dataset("x", data=x, chunks=chunks)


class Slices:
    """An array that is only known by its slices, and remembers how often every element was read."""

    def __init__(self, x, chunks=None):
        self.shape, self.dtype, self.chunks = x.shape, x.dtype, chunks
        self.x, self.reads, self.largest = x, np.zeros(x.shape, int), 0

    def __getitem__(self, key):
        self.reads[key] += 1
        self.largest = max(self.largest, self.x[key].nbytes)
        return self.x[key]


STORED = {
    "memory-mapped": memory_mapped,
    "zarr": in_zarr,
    "hdf5": in_hdf5,
    "slices": lambda _, x, chunks: Slices(x, chunks),
}


def assert_moments(found, x, channel_axis):
    """float32 shows 2**-24 of what float64 finds; the variance of values near 1,000 too."""
    kept = (channel_axis,) if isinstance(channel_axis, int) else channel_axis
    averaged = tuple(axis for axis in range(x.ndim) if axis not in [k % x.ndim for k in kept])
    wide = x.astype("float64")
    np.testing.assert_allclose(found.wide_mean, wide.mean(averaged), rtol=RTOL)
    np.testing.assert_allclose(
        found.wide_var, wide.var(averaged), rtol=1e-9
    )  # (mean / std)**2 u = 1e6 * 1e-16, times 8
    assert found.count == x.size // found.wide_mean.size
    assert found.mean.dtype == x.dtype


@pytest.mark.parametrize("channel_axis", [1, -1, (1, 2), (3, 1), 0], ids=str)
@pytest.mark.parametrize("block", [1, 700, 1 << 24])
@pytest.mark.parametrize("chunks", [(7, 4, 5, 3), None], ids=["chunks", "no chunks"])
@pytest.mark.parametrize("kind", STORED)
def test_a_stored_array_is_read_in_blocks_cut_along_any_axis(tmp_path, monkeypatch, kind, chunks, block, channel_axis):
    if kind == "zarr" and chunks is None:
        chunks = ROWS.shape
    monkeypatch.setattr(chunked, "BLOCK_BYTES", block)
    x = ROWS[:9] if block == 1 else ROWS
    assert_moments(cubn.population(STORED[kind](tmp_path, x, chunks), channel_axis=channel_axis), x, channel_axis)


@pytest.mark.parametrize("block", [1, 3000, 10**9])
@pytest.mark.parametrize("chunks", [(7, 4, 5, 3), (40, 6, 5, 4), (1, 1, 1, 4), None], ids=str)
def test_every_element_is_read_once_and_few_at_a_time(monkeypatch, chunks, block):
    monkeypatch.setattr(chunked, "BLOCK_BYTES", block)
    x = Slices(ROWS, chunks)
    cubn.population(x)
    assert (x.reads == 1).all()
    assert x.largest <= max(block, 4 * int(np.prod(chunks or (1, 1, 1, 1))))


@pytest.mark.parametrize("block", [1, 500, 3000])
def test_a_stored_array_is_read_at_chunk_borders_alone(monkeypatch, block):
    """A chunk that is read twice is unpacked twice."""
    monkeypatch.setattr(chunked, "BLOCK_BYTES", block)
    chunks = (7, 4, 5, 3)
    corners = [corner for corner, _ in chunked.stored_blocks(Slices(ROWS, chunks), (0, 1, 2, 3))]
    assert len(corners) > 5
    for axis, size in enumerate(chunks):
        assert {corner[axis] % size for corner in corners} == {0}


def test_a_progress_bar_counts_the_blocks(monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(chunked, "BLOCK_BYTES", ROWS[:10].nbytes)
    shown = io.StringIO()
    with contextlib.redirect_stderr(shown):
        cubn.population(Slices(ROWS), progress=True)
    assert "4/4" in shown.getvalue()


def test_an_empty_stored_array_is_no_population():
    with pytest.raises(ValueError, match="hold no sample"):
        cubn.population(Slices(ROWS[:0]))
    with pytest.raises(TypeError, match="int64"):
        cubn.population(Slices(ROWS.astype(int)))


def test_only_dask_arrays_are_computed_later():
    for batches in (ROWS, [ROWS], Slices(ROWS)):
        with pytest.raises(ValueError, match="compute is False, but batches is a"):
            cubn.population(batches, compute=False)


def test_a_tree_is_the_same_whether_its_leaves_come_or_are_there():
    """Pairs of neighbours, the pairs in pairs; groups of eight first give the same bits."""
    rng = np.random.default_rng(6)
    leaves = [cubn.moments(rng.normal(3.0, 1.0, (5, 2))) for _ in range(37)]
    for count in range(1, 38):
        level = list(leaves[:count])
        while len(level) > 1:
            pairs = [one | other for one, other in zip(level[0::2], level[1::2], strict=False)]
            level = pairs + (level[-1:] if len(level) % 2 else [])
        eights = [merge(leaves[first : min(first + 8, count)]) for first in range(0, count, 8)]
        for other in (merge(leaves[:count]), merge(eights)):
            assert other.wide_m2.tobytes() == level[0].wide_m2.tobytes()


def test_batches_may_be_stored_and_dask_arrays_too():
    da = pytest.importorskip("dask.array", reason="dask is not installed")
    found = cubn.population([ROWS[:5], Slices(ROWS[5:20]), da.from_array(ROWS[20:], chunks=(3, 4, 5, 4))])
    assert_moments(found, ROWS, 1)


# Dask


@pytest.fixture
def da():
    return pytest.importorskip("dask.array", reason="dask is not installed")


CHUNKINGS = {"whole": -1, "rows": (3, 6, 5, 4), "all axes": (7, 4, 2, 3), "channels alone": (40, 1, 5, 4)}


@pytest.mark.parametrize("channel_axis", [1, -1, (1, 2), (3, 1), 0, (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_the_population_of_a_dask_array_is_that_of_its_elements(da, chunking, channel_axis):
    x = da.from_array(ROWS, chunks=CHUNKINGS[chunking])
    found = cubn.population(x, channel_axis=channel_axis)
    assert isinstance(found.mean, np.ndarray)
    assert_moments(found, ROWS, channel_axis)


def test_the_schedule_changes_no_bit(da):
    import dask

    x = da.from_array(ROWS, chunks=(1, 4, 5, 2))
    first = cubn.population(x)
    for scheduler in ("synchronous", "threads", "threads"):
        with dask.config.set(scheduler=scheduler, num_workers=5):
            again = cubn.population(x)
        assert again.wide_mean.tobytes() == first.wide_mean.tobytes()
        assert again.wide_m2.tobytes() == first.wide_m2.tobytes()
    batches = [ROWS[row : row + 1] for row in range(len(ROWS))]
    rows = cubn.population(da.from_array(ROWS, chunks=(1, 6, 5, 4)))
    assert cubn.population(batches).wide_m2.tobytes() == rows.wide_m2.tobytes()


def counting(da, x, chunks):
    """A Dask array whose chunks say when they are computed."""
    computed = []

    def chunk(block_info=None):
        place = tuple(slice(*each) for each in block_info[None]["array-location"])
        computed.append(place)
        return x[place]

    sizes = da.core.normalize_chunks(chunks, x.shape)
    return da.map_blocks(chunk, chunks=sizes, dtype=x.dtype, meta=x[:0]), computed


def test_every_chunk_is_computed_once_and_only_when_asked(da):
    x, computed = counting(da, ROWS, (7, 4, 5, 3))
    later = cubn.population(x, compute=False)
    assert computed == []
    assert later.count == 40 * 5 * 4
    assert (later.mean.shape, later.mean.dtype, later.wide_m2.dtype) == ((6,), np.float32, np.float64)
    mean, var = da.compute(later.mean, later.var_unbiased)
    assert len(computed) == len(set(map(str, computed))) == x.npartitions
    now = cubn.population(x)
    assert mean.tobytes() == now.mean.tobytes()
    assert var.tobytes() == now.var_unbiased.tobytes()


def test_dask_shows_its_own_progress_bar(da, capsys):
    cubn.population(da.from_array(ROWS, chunks=(7, 6, 5, 4)), progress=True)
    assert "100%" in capsys.readouterr().out


def test_chunks_of_unknown_size_are_refused(da):
    x = da.from_array(ROWS, chunks=(7, 6, 5, 4))
    x = x[x[:, 0, 0, 0] > 1000]
    for call in (cubn.population, cubn.moments, lambda a: cubn.batch_norm_inference(a, np.zeros(6), np.ones(6))):
        with pytest.raises(cubn.ShapeError, match=r"chunks of unknown size .*; call x\.compute_chunk_sizes\(\) first"):
            call(x)
    assert cubn.population(x.compute_chunk_sizes()).count == 20 * (ROWS[:, 0, 0, 0] > 1000).sum()


def test_a_dask_array_of_no_samples_is_no_population(da):
    with pytest.raises(ValueError, match="hold no sample"):
        cubn.population(da.zeros((0, 3), chunks=2))
    with pytest.raises(cubn.ShapeError, match="one sample per channel"):
        cubn.population(da.zeros((1, 3), chunks=2), estimator="paper")


@pytest.mark.parametrize("given", ["numpy", "dask", "lists"])
@pytest.mark.parametrize("channel_axis", [1, -1, (1, 3)], ids=str)
@pytest.mark.parametrize("chunking", CHUNKINGS)
def test_inference_on_a_dask_array_stays_lazy_and_keeps_its_chunks(da, machine, chunking, channel_axis, given):
    """The same function on the same numbers, chunk by chunk: the same bits where channels are innermost, and two
    roundings to float32 elsewhere."""
    rng = np.random.default_rng(7)
    kept = (channel_axis,) if isinstance(channel_axis, int) else channel_axis
    shape = tuple(ROWS.shape[axis] for axis in kept)
    mean, var, gamma, beta = rng.uniform(0.5, 2.0, (4, *shape)).astype("float32")
    residual, where = rng.normal(size=ROWS.shape).astype("float32"), rng.random((6, 1, 4)) < 0.7
    options = {"channel_axis": channel_axis, "eps": 1e-3, "activation": "relu"}
    wanted = cubn.batch_norm_inference(ROWS, mean, var, gamma, beta, residual=residual, where=where, **options)

    convert = {"numpy": np.asarray, "dask": lambda v: da.from_array(v, chunks=2), "lists": np.ndarray.tolist}[given]
    x, computed = counting(da, ROWS, CHUNKINGS[chunking])
    like_x = np.asarray if given == "lists" else convert
    y = cubn.batch_norm_inference(
        x, *map(convert, (mean, var, gamma, beta)), residual=like_x(residual), where=like_x(where), **options
    )
    assert computed == []
    assert (y.chunks, y.dtype, y.shape) == (x.chunks, x.dtype, x.shape)
    # Not .compute(): Dask's threads do not inherit the context that holds which machine computes.
    np.testing.assert_allclose(y.compute(scheduler="synchronous"), wanted, rtol=2.0**-21, atol=2.0**-12)
    assert len(computed) == x.npartitions


def test_inference_on_a_dask_array_is_checked_before_anything_is_computed(da):
    x, computed = counting(da, ROWS, (7, 4, 5, 3))
    zeros, ones = np.zeros(6, "float32"), np.ones(6, "float32")
    for error, arguments, options in (
        (cubn.ShapeError, (np.zeros(5), ones), {}),
        (cubn.DTypeError, (zeros, ones), {"residual": np.zeros(ROWS.shape)}),
        (cubn.DTypeError, (zeros.astype("float64"), ones), {}),
        (ValueError, (zeros, ones), {"eps": -1}),
        (cubn.DTypeError, (zeros, ones), {"where": ones}),
    ):
        with pytest.raises(error):
            cubn.batch_norm_inference(x, *arguments, **options)
    assert computed == []


def test_the_statistics_of_a_dask_array_normalise_it(da):
    x = da.from_array(ROWS, chunks=(7, 4, 5, 3))
    later = cubn.population(x, compute=False)
    y = cubn.batch_norm_inference(x, later.mean, later.var, eps=0.0).compute().astype("float64")
    np.testing.assert_allclose(y.mean(axis=(0, 2, 3)), 0, atol=1e-4)  # the mean is a float32 near 1,000
    np.testing.assert_allclose(y.var(axis=(0, 2, 3)), 1, rtol=1e-5)


@pytest.fixture(scope="module")
def cluster_report(tmp_path_factory):
    """tests/cluster.py in a process of its own: it starts others, and one of these is killed."""
    pytest.importorskip("distributed", reason="dask.distributed is not installed")
    folder = tmp_path_factory.mktemp("blocks")
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, str(root / "tests" / "cluster.py"), str(folder)],
        capture_output=True, text=True, timeout=240, env=environment, cwd=folder, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_four_gigabytes_on_two_workers_need_less_than_one_and_a_half(cluster_report):
    """Integers, so that mean and variance are known exactly; merging 128 blocks in 7 levels rounds 1e-14 at most."""
    assert cluster_report["gigabytes"] > 4
    assert cluster_report["large"]["count"]
    assert cluster_report["large"]["mean"] < 1e-14
    assert cluster_report["large"]["var"] < 1e-14
    assert len(cluster_report["megabytes"]) == 3
    assert sum(cluster_report["megabytes"]) < 1500


def test_a_worker_that_dies_in_the_middle_changes_no_bit(cluster_report):
    assert 8 <= cluster_report["blocks before the death"] < 40
    assert cluster_report["another worker"]
    assert cluster_report["after a death"]["count"]
    assert cluster_report["after a death"]["mean"] < 1e-14
    assert cluster_report["same bits"]
