"""Statistics over ranks: what one process would compute on the whole batch, in the same bits on every rank."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import numpy as np
import oracle
import pytest

import cubn
from cubn.sync import exchange, rounds
from cubn.sync.rounds import EqualRounds

# Ranks that are threads, and what became of each


def outcomes(function, size, *, shape=None, timeout=20.0, missing=(), ranks=None):
    """function(rank, communicator) on a thread each; in rank order, what it returned or the exception it raised."""

    def attempt(rank, communicator):
        try:
            return function(rank, communicator)
        except Exception as error:
            return error

    if ranks is None:
        ranks = [sync for sync in cubn.sync.threads(size, shape=shape, timeout=timeout) if sync.rank not in missing]
    ranks = [(sync.rank, sync) for sync in ranks]
    with ThreadPoolExecutor(size) as pool:
        # A thread starts without its parent's context, and that holds which machine computes.
        return list(pool.map(lambda one: one[0].run(attempt, *one[1]), [(copy_context(), one) for one in ranks]))


def results(function, size, **options):
    """As `outcomes`, and every rank must have returned."""
    found = outcomes(function, size, **options)
    failed = {rank: one for rank, one in enumerate(found) if isinstance(one, Exception)}
    assert not failed, f"{len(failed)} of {size} ranks raised: {failed}"
    return found


def assert_all_raise(function, size, error, *words, **options):
    """Every rank raises exactly this class, with all of the words."""
    for rank, found in enumerate(outcomes(function, size, **options)):
        assert type(found) is error, f"rank {rank}: {found!r}"
        for word in words:
            assert word in str(found), f"rank {rank}: {word!r} is not in: {found}"


def test_a_rank_that_raises_is_seen():
    def third_fails(rank, _):
        if rank == 2:
            raise ValueError("the third")
        return rank

    assert results(lambda rank, _: rank, 3) == [0, 1, 2]
    with pytest.raises(AssertionError, match=r"1 of 3 ranks raised.*the third"):
        results(third_fails, 3)
    with pytest.raises(AssertionError, match="rank 0"):
        assert_all_raise(third_fails, 3, ValueError)


# One batch over all ranks


SHARES = {
    "one rank": (12,),
    "two unequal": (1, 11),
    "three, one empty": (5, 0, 7),
    "three, the first empty": (0, 3, 9),
    "seven": (1, 2, 0, 3, 1, 4, 1),
}
CHANNELS = 3


def cut(values, shares):
    """The share of each rank, by rows."""
    return np.split(values, np.cumsum(shares)[:-1])


def whole_batch(dtype="float64", seed=1):
    rng = np.random.default_rng(seed)
    x, dy, residual = rng.normal(0.5, 1.5, (3, 12, CHANNELS, 5)).astype(dtype)
    return x, dy, residual, rng.random(x.shape) < 0.6


def roundoff(x, ranks):
    """What stands for u in the bounds of `oracle`, which are those of one sum per channel, when k sets are merged.

    A merge adds 3 u W + u |mean| to the error of the mean (W = max - min <= 2 R) and, through the gap between two
    means, 2 (R / sigma) (|mean| / sigma + 2 (M + 2) R / sigma) u to the relative error of the variance, where one sum
    has 4 (M + 3) (R / sigma) u.  With R <= 4 sigma and |mean| <= sigma that is less than 5 times as much per merge, and
    the backward sums gain one addition per rank.
    """
    axes = (0, *range(2, x.ndim))
    mean, sigma = x.mean(axes, "float64"), x.std(axes, "float64")
    reach = np.abs(x - mean.reshape(1, -1, *(1,) * (x.ndim - 2))).max(axes)
    assert (reach <= 4 * sigma).all()
    assert (np.abs(mean) <= sigma).all()
    return (1 + 5 * ranks) * oracle.ARITHMETIC[x.dtype.name]


def assert_same_bits(values):
    first, *others = (np.asarray(value) for value in values)
    for value in others:
        assert (value.tobytes(), value.shape, value.dtype) == (first.tobytes(), first.shape, first.dtype)


OPTIONS = {
    "plain": {},
    "affine": {"affine": True},
    "everything": {"affine": True, "activation": "relu", "residual": True},
    "masked": {"affine": True, "where": "all"},
    "masked on one rank": {"affine": True, "where": "last"},
    "a rank masked away": {"where": "nothing on the last", "residual": True},
}


def mask(kind, everywhere, counts):
    """`where` of the whole batch, and the ranks that are given one."""
    on_last = (np.arange(sum(counts)) >= sum(counts) - counts[-1])[:, None, None]
    last = len(counts) - 1
    if kind == "all":
        return everywhere, range(len(counts))
    if kind == "last":
        return everywhere | ~on_last, (last,)
    if kind == "nothing on the last":
        first_row = np.arange(sum(counts))[:, None, None] == 0  # one rank alone keeps something, too
        return np.broadcast_to(~on_last | first_row, everywhere.shape), (last,)
    return None, ()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shares", SHARES)
def test_ranks_compute_what_one_process_does_on_the_whole_batch(machine, shares, options, dtype):
    """Against extended precision on the whole batch, to the bounds of `oracle` with the u of `roundoff`."""
    counts, options = SHARES[shares], OPTIONS[options]
    size = len(counts)
    x, dy, residual, random_mask = whole_batch(dtype)
    gamma, beta = (np.array([1.5, -0.5, 2.0]), np.array([0.1, 0.2, -0.3])) if options.get("affine") else (None, None)
    if gamma is not None:
        gamma, beta = gamma.astype(dtype), beta.astype(dtype)
    where, masked_ranks = mask(options.get("where"), random_mask, counts)
    residual = residual if options.get("residual") else None
    activation = options.get("activation")

    def one_rank(rank, sync):
        mine = [None if values is None else cut(values, counts)[rank] for values in (x, dy, residual, where)]
        y, saved = cubn.batch_norm(
            mine[0], gamma, beta, activation=activation, residual=mine[2], sync=sync,
            where=mine[3] if rank in masked_ranks else None,
        )  # fmt: skip
        return y, saved, cubn.batch_norm_backward(mine[1], saved, sync=sync)

    found = results(one_rank, size)
    exact = oracle.batch_norm(
        x, gamma, beta, activation=activation, residual=residual, where=where, dy=dy, roundoff=roundoff(x, size)
    )
    oracle.assert_within(np.concatenate([y for y, _, _ in found]), exact.y.rounded_to(dtype), "y")
    oracle.assert_within(np.concatenate([g.dx for _, _, g in found]), exact.dx.rounded_to(dtype), "dx")
    for _, saved, _ in found:
        oracle.assert_within(saved.moments.mean, exact.mean.rounded_to(dtype), "mean")
        oracle.assert_within(saved.moments.var, exact.var.rounded_to(dtype), "var")
        oracle.assert_within(saved.rstd, exact.rstd.rounded_to(dtype), "rstd")
        wanted = x[:, 0].size if where is None else where.sum(axis=(0, 2))
        assert np.array_equal(np.broadcast_to(saved.moments.count, CHANNELS), np.broadcast_to(wanted, CHANNELS))
    for name in ("wide_mean", "wide_m2", "count"):
        assert_same_bits([getattr(saved.moments, name) for _, saved, _ in found])
    assert_same_bits([saved.rstd for _, saved, _ in found])
    if gamma is not None:
        for name in ("dgamma", "dbeta"):
            each = [getattr(g, name) for _, _, g in found]
            exact_sum = getattr(exact, name)
            rounded = oracle.Exact(
                exact_sum.value, exact_sum.bound + sum(oracle.ROUNDOFF[dtype] * np.abs(e) for e in each)
            )
            oracle.assert_within(np.sum([e.astype("float64") for e in each], axis=0), rounded, name)


def test_a_rank_that_normalises_by_itself_is_seen(machine):
    """The teeth: the same comparison without sync fails by far."""
    x, *_ = whole_batch()
    y = np.concatenate([cubn.batch_norm(share)[0] for share in cut(x, (5, 7))])
    with pytest.raises(AssertionError, match="y at"):
        oracle.assert_within(y, oracle.batch_norm(x, roundoff=roundoff(x, 2)).y, "y")


def test_the_parameter_gradients_of_a_rank_are_its_own():
    """Data-parallel training adds them up with every other parameter's: dbeta is the sum over the share alone."""
    x, dy, *_ = whole_batch()

    def one_rank(rank, sync):
        _, saved = cubn.batch_norm(cut(x, (4, 8))[rank], np.ones(3), np.zeros(3), sync=sync)
        return cubn.batch_norm_backward(cut(dy, (4, 8))[rank], saved, sync=sync).dbeta

    for rank, dbeta in enumerate(results(one_rank, 2)):
        np.testing.assert_allclose(dbeta, cut(dy, (4, 8))[rank].sum(axis=(0, 2)), rtol=1e-13, atol=1e-13)


def test_ranks_may_hold_their_shares_in_different_memory_order(machine):
    """Channels-last and Fortran memory permute the channels of a tuple of axes; what is exchanged must not be."""
    rng = np.random.default_rng(1)
    x, dy = rng.normal(size=(2, 12, 2, 3, 4))
    gamma, beta = rng.normal(size=(2, 2, 3))
    orders = [
        np.ascontiguousarray,
        lambda v: np.ascontiguousarray(v.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2),
        np.asfortranarray,
    ]
    counts = (3, 5, 4)

    def one_rank(rank, sync):
        mine, mine_dy = (orders[rank](cut(values, counts)[rank]) for values in (x, dy))
        y, saved = cubn.batch_norm(mine, gamma, beta, channel_axis=(1, 2), sync=sync)
        return y, saved.moments, cubn.batch_norm_backward(mine_dy, saved, sync=sync).dx

    found = results(one_rank, 3)
    flat = x.reshape(12, 6, 4)
    exact = oracle.batch_norm(x, gamma, beta, channel_axis=(1, 2), dy=dy, roundoff=roundoff(flat, 3))
    oracle.assert_within(np.concatenate([y for y, _, _ in found]), exact.y, "y")
    oracle.assert_within(np.concatenate([dx for _, _, dx in found]), exact.dx, "dx")
    assert_same_bits([np.ascontiguousarray(m.wide_mean) for _, m, _ in found])
    assert_same_bits([np.ascontiguousarray(m.wide_m2) for _, m, _ in found])


def test_the_same_ranks_give_the_same_bits_again():
    x, dy, *_ = whole_batch()
    counts = SHARES["seven"]

    def one_rank(rank, sync):
        y, saved = cubn.batch_norm(cut(x, counts)[rank], sync=sync)
        return y, cubn.batch_norm_backward(cut(dy, counts)[rank], saved, sync=sync).dx

    runs = [results(one_rank, 7) for _ in range(3)]
    for rank in range(7):
        for part in range(2):
            assert_same_bits([run[rank][part] for run in runs])


def test_another_library_of_the_standard_works_over_ranks_too():
    strict = pytest.importorskip("array_api_strict")
    x, *_ = whole_batch()

    def one_rank(rank, sync):
        return np.asarray(cubn.batch_norm(strict.asarray(cut(x, (5, 0, 7))[rank]), sync=sync)[0])

    y = np.concatenate(results(one_rank, 3))
    oracle.assert_within(y, oracle.batch_norm(x, roundoff=roundoff(x, 3)).y)


# The layer


@pytest.mark.parametrize("shares", SHARES)
def test_layers_on_all_ranks_keep_the_running_statistics_of_the_whole_batch(machine, shares):
    """After one step: 0.1 times the batch's mean; 0.9 + 0.1 times its unbiased variance.  The factors round thrice."""
    x, dy, *_ = whole_batch()
    counts = SHARES[shares]

    def one_rank(rank, sync):
        bn = cubn.BatchNorm(CHANNELS, dtype="float64", sync=sync)
        y = bn(cut(x, counts)[rank])
        return bn, y, bn.backward(cut(dy, counts)[rank])

    found = results(one_rank, len(counts))
    exact = oracle.batch_norm(x, np.ones(3), np.zeros(3), dy=dy, roundoff=roundoff(x, len(counts)))
    m = x[:, 0].size
    for bn, _, _ in found:
        mean, var = 0.1 * exact.mean.value, 0.9 + 0.1 * exact.var.value * m / (m - 1)
        oracle.assert_within(bn.running_mean, oracle.Exact(mean, 0.1 * exact.mean.bound + 4 * 2.0**-53 * np.abs(mean)))
        oracle.assert_within(bn.running_var, oracle.Exact(var, 0.2 * exact.var.bound + 4 * 2.0**-53 * var))
        assert bn.num_batches_tracked == 1
    assert_same_bits([bn.running_mean for bn, _, _ in found])
    assert_same_bits([bn.running_var for bn, _, _ in found])
    oracle.assert_within(np.concatenate([y for _, y, _ in found]), exact.y)
    oracle.assert_within(np.concatenate([dx for _, _, dx in found]), exact.dx)


def test_a_batch_that_is_empty_on_every_rank_passes_the_layer_and_leaves_it():
    def one_rank(_, sync):
        bn = cubn.BatchNorm(CHANNELS, sync=sync)
        y = bn(np.ones((0, CHANNELS, 5), np.float32))
        return y.shape, bn.backward(y).shape, bn.num_batches_tracked, bn.running_mean.tolist(), bn.gamma_grad.tolist()

    assert results(one_rank, 3) == [((0, 3, 5), (0, 3, 5), 0, [0, 0, 0], [0, 0, 0])] * 3


def test_evaluation_needs_nobody_else():
    x, *_ = whole_batch("float32")
    alone, _ = cubn.sync.threads(2, timeout=0.5)
    assert cubn.BatchNorm(CHANNELS, sync=alone).eval()(x).shape == x.shape


# Ranks that disagree, and ranks that are lost


def odd_one_out(usual, odd):
    """The second of three ranks calls with `odd`, the others with `usual`."""

    def one_rank(rank, sync):
        options = odd if rank == 1 else usual
        return cubn.batch_norm(options.get("x", np.ones((4, 3))), eps=options.get("eps", 1e-5), sync=sync)

    return one_rank


@pytest.mark.parametrize(
    ("odd", "words"),
    [
        ({"x": np.ones((4, 5))}, ("rank 1", "another channels than rank 0", "5 against 3")),
        ({"eps": 1e-3}, ("rank 1", "another eps than rank 0", "0.001 against 1e-05")),
        ({"x": np.ones((4, 3), np.float32)}, ("rank 1", "another dtype than rank 0", "float32 against float64")),
        ({"x": np.ones((0, 5))}, ("rank 1", "another channels than rank 0")),
    ],
)
def test_ranks_that_disagree_about_the_call_all_hear_of_it(odd, words):
    assert_all_raise(odd_one_out({}, odd), 3, cubn.SyncError, *words, "; call batch_norm with the same")


def test_ranks_that_agree_hear_of_nothing():
    results(odd_one_out({"eps": 1e-3}, {"eps": 1e-3}), 3)


def test_ranks_that_go_back_through_different_layers_all_hear_of_it():
    def one_rank(rank, sync):
        layers = [np.random.default_rng(0).normal(size=(4, channels)) for channels in (3, 4)]
        saved = [cubn.batch_norm(x, sync=sync)[1] for x in layers]
        return cubn.batch_norm_backward(layers[rank], saved[rank], sync=sync)

    assert_all_raise(one_rank, 2, cubn.SyncError, "4 against 3", "call batch_norm_backward with the same channels")


def test_a_rank_that_goes_back_while_others_go_on_is_heard_of_everywhere():
    def one_rank(rank, sync):
        x = np.random.default_rng(rank).normal(size=(4, 3))
        _, saved = cubn.batch_norm(x, sync=sync)
        if rank == 2:
            return cubn.batch_norm_backward(x, saved, sync=sync)
        return cubn.batch_norm(x, sync=sync)

    words = ("rank 2 is in batch_norm_backward while rank 0 is in batch_norm", "the same layers in the same order")
    assert_all_raise(one_rank, 3, cubn.SyncError, *words)


@pytest.mark.parametrize(("counts", "words"), [((1, 0), "one sample per channel"), ((0, 0, 0), "empty batch")])
def test_too_few_samples_on_all_ranks_together_are_refused_on_all_of_them(counts, words):
    def one_rank(rank, sync):
        return cubn.batch_norm(np.ones((counts[rank], 3)), sync=sync)

    assert_all_raise(one_rank, len(counts), cubn.ShapeError, words)


def test_one_sample_on_each_of_two_ranks_is_enough():
    """1 and 3: mean 2, variance 1."""

    def one_rank(rank, sync):
        return cubn.batch_norm(np.array([[1.0 + 2 * rank]]), eps=0.0, sync=sync)[0].tolist()

    assert results(one_rank, 2) == [[[-1.0]], [[1.0]]]


def test_a_rank_that_never_comes_is_missed_within_the_timeout():
    def one_rank(rank, sync):
        return cubn.batch_norm(np.ones((4, 3)), sync=sync)

    start = time.perf_counter()
    found = outcomes(one_rank, 3, timeout=0.2, missing=(1,))
    assert time.perf_counter() - start < 5
    for error in found:
        assert type(error) is cubn.SyncError
        assert "waited for 3 ranks" in str(error)
        assert "within 0.2 s" in str(error)
        assert "; call from all ranks" in str(error)
    assert {str(error)[:6] for error in found} == {"rank 0", "rank 2"}


def test_a_lost_rank_leaves_every_layer_as_it_was():
    layers = [cubn.BatchNorm(3) for _ in range(3)]

    def one_rank(rank, sync):
        layers[rank].sync = sync
        return layers[rank](np.random.default_rng(rank).normal(size=(4, 3)).astype("float32"))

    assert all(isinstance(e, cubn.SyncError) for e in outcomes(one_rank, 3, timeout=0.2, missing=(2,)))
    for bn in layers:
        assert (bn.num_batches_tracked, bn.running_mean.tolist()) == (0, [0, 0, 0])
        with pytest.raises(RuntimeError, match="before forward"):
            bn.backward(np.ones((4, 3), np.float32))


BAD_CALLS = {
    "gamma": (lambda x, y: cubn.batch_norm(x, np.ones(4), sync=y), cubn.ShapeError, "gamma has shape (4,)"),
    "a list of words": (lambda x, y: cubn.batch_norm(["a", "b"], sync=y), cubn.DTypeError, "x has dtype"),
    "eps": (lambda x, y: cubn.batch_norm(x, eps=-1.0, sync=y), ValueError, "eps is -1.0"),
    "eps of no number": (lambda x, y: cubn.batch_norm(x, eps="1", sync=y), TypeError, "eps is '1'"),
    "out": (lambda x, y: cubn.batch_norm(x, out=x, sync=y), ValueError, "out overlaps x"),
    "a layer's x": (lambda x, y: cubn.BatchNorm(5, sync=y)(x), cubn.ShapeError, "5"),
    "dy": (
        lambda x, y: cubn.batch_norm_backward(x[:1], cubn.batch_norm(x, sync=y)[1], sync=y),
        cubn.ShapeError, "dy has shape (1, 3)",
    ),
    "saved": (
        lambda x, y: cubn.batch_norm_backward(x, cubn.batch_norm(x, sync=y), sync=y), TypeError, "saved is a tuple",
    ),
    "saved by one process": (
        lambda x, y: (cubn.batch_norm(x, sync=y), cubn.batch_norm_backward(x, cubn.batch_norm(x)[1], sync=y)),
        ValueError, "pass the sync of the forward pass",
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 3)], ids=str)
@pytest.mark.parametrize("call", BAD_CALLS)
def test_what_is_refused_on_one_rank_is_raised_on_all_at_once(call, shape):
    """The refusal travels in the all-gather that the others wait in: nobody waits for the timeout."""
    bad, error, words = BAD_CALLS[call]

    def one_rank(rank, sync):
        x = np.random.default_rng(rank).normal(size=(4, 3))
        if rank == 1:
            return bad(x, sync)
        _, saved = cubn.batch_norm(x, sync=sync)
        return cubn.batch_norm_backward(x, saved, sync=sync)

    start = time.perf_counter()
    found = outcomes(one_rank, 3, shape=shape)
    assert time.perf_counter() - start < 10
    assert [type(one) for one in found] == [error] * 3
    assert all(words in str(one) for one in found)
    assert str(found[0]) == str(found[2]) == f"rank 1: {found[1]}"


def test_what_nobody_expects_on_one_rank_is_out_of_step_on_the_others():
    class Broken:
        def __array__(self, *_, **__):
            raise OSError("disk on fire")

    def one_rank(rank, sync):
        return cubn.batch_norm(Broken() if rank == 0 else np.ones((4, 3)), sync=sync)

    first, *others = outcomes(one_rank, 3)
    assert type(first) is OSError
    for one in others:
        assert type(one) is cubn.SyncError
        assert str(one) == "rank 0: it met a OSError (disk on fire) and is out of step"


def test_a_layer_that_goes_back_before_it_went_forward_is_heard_of_everywhere():
    def one_rank(rank, sync):
        layer = cubn.BatchNorm(CHANNELS, dtype="float64", sync=sync)
        x = np.random.default_rng(rank).normal(size=(4, CHANNELS))
        return layer.backward(x) if rank == 1 else layer(x)

    first, odd, _ = outcomes(one_rank, 3, timeout=5)
    assert type(odd) is RuntimeError
    assert type(first) is cubn.SyncError
    assert "rank 1: it met a RuntimeError (backward was called before forward" in str(first)


def test_ranks_that_have_all_raised_may_go_on_together():
    x, *_ = whole_batch()
    counts = (5, 0, 7)

    def one_rank(rank, sync):
        layer = cubn.BatchNorm(CHANNELS, dtype="float64", sync=sync)
        for attempt in (np.ones((4, 2)) if rank == 1 else cut(x, counts)[rank], np.ones((int(rank == 0), CHANNELS))):
            with pytest.raises(cubn.ShapeError):
                layer(attempt)
            assert (layer.num_batches_tracked, layer.running_mean.tolist()) == (0, [0.0] * CHANNELS)
        return layer(cut(x, counts)[rank])

    y = np.concatenate(results(one_rank, 3))
    oracle.assert_within(y, oracle.batch_norm(x, np.ones(3), np.zeros(3), roundoff=roundoff(x, 3)).y)


def test_gradients_of_the_parameters_are_those_of_all_ranks_where_asked(machine):
    x, dy, *_ = whole_batch()
    counts = (4, 0, 8)
    exact = oracle.batch_norm(x, np.ones(3), np.zeros(3), dy=dy, roundoff=roundoff(x, 3))

    def one_rank(rank, sync):
        layer = cubn.BatchNorm(CHANNELS, dtype="float64", sync=sync)
        layer(cut(x, counts)[rank])
        layer.backward(cut(dy, counts)[rank], reduce_parameters=True)
        return layer.gamma_grad, layer.beta_grad

    found = results(one_rank, 3)
    for each, name in zip(zip(*found, strict=True), ("dgamma", "dbeta"), strict=True):
        assert_same_bits(each)
        oracle.assert_within(each[0], getattr(exact, name), name)


# Grids of ranks


@pytest.mark.parametrize("options", ["everything", "masked on one rank"])
@pytest.mark.parametrize("shape", [(7,), (7, 1), (3, 2), (2, 2, 2), (1, 4)], ids=str)
def test_a_grid_of_ranks_computes_what_one_process_does(shape, options):
    size = int(np.prod(shape))
    counts = tuple(np.bincount(np.arange(12) * 5 % 7 % size, minlength=size))
    x, dy, residual, random_mask = whole_batch()
    where, masked_ranks = mask(OPTIONS[options].get("where"), random_mask, counts)
    residual = residual if OPTIONS[options].get("residual") else None
    gamma, beta = np.array([1.5, -0.5, 2.0]), np.array([0.1, 0.2, -0.3])

    def one_rank(rank, sync):
        assert (sync.rank, sync.size) == (rank, size)
        mine = [None if values is None else cut(values, counts)[rank] for values in (x, dy, residual, where)]
        y, saved = cubn.batch_norm(
            mine[0], gamma, beta, residual=mine[2], sync=sync, where=mine[3] if rank in masked_ranks else None
        )
        return y, saved.moments, cubn.batch_norm_backward(mine[1], saved, sync=sync).dx

    found = results(one_rank, size, shape=shape)
    exact = oracle.batch_norm(x, gamma, beta, residual=residual, where=where, dy=dy, roundoff=roundoff(x, size))
    oracle.assert_within(np.concatenate([y for y, _, _ in found]), exact.y, "y")
    oracle.assert_within(np.concatenate([dx for _, _, dx in found]), exact.dx, "dx")
    for name in ("wide_mean", "wide_m2", "count"):
        assert_same_bits([getattr(moments, name) for _, moments, _ in found])


def test_a_grid_names_a_rank_that_disagrees_by_its_own_number():
    def one_rank(rank, sync):
        return cubn.batch_norm(np.ones((4, 5 if rank == 5 else 3)), sync=sync)

    found = outcomes(one_rank, 6, shape=(2, 3))
    assert {type(one) for one in found} == {cubn.SyncError}
    assert len({str(one) for one in found}) == 1
    assert "rank 5 has another channels than rank 4" in str(found[0])


def test_a_rank_that_is_missing_from_a_grid_is_missed_everywhere():
    """Rank 2 misses its neighbour 3, and tells those across."""

    def one_rank(rank, sync):
        return cubn.batch_norm(np.ones((4, 3)), sync=sync)

    start = time.perf_counter()
    communicators = cubn.sync.threads(6, shape=(2, 3), timeout=1.0)
    found = outcomes(one_rank, 6, ranks=[sync for sync in communicators if sync.rank != 3])
    assert time.perf_counter() - start < 10
    assert [type(one) for one in found] == [cubn.SyncError] * 5
    assert str(found[0]) == str(found[2]) == str(found[3])
    assert "on side 0 of the grid around rank 2, rank 0 waited for 2 ranks" in str(found[2])


def test_a_grid_gathers_what_every_rank_has_sent():
    def one_rank(rank, sync):
        return [part.tolist() for part in sync.all_gather(np.arange(float(rank)))]

    wanted = [list(map(float, range(rank))) for rank in range(6)]
    assert results(one_rank, 6, shape=(3, 2)) == [wanted] * 6


def test_a_grid_along_its_sides_receives_fewer_payloads():
    """24 ranks: 23 payloads at once, 3 + 5 in a grid of 4 by 6."""
    received = {None: 0, (4, 6): 0}
    for shape in received:

        def one_rank(rank, sync, shape=shape):
            for stage in getattr(sync, "stages", (sync,)):
                gather = stage.all_gather

                def counted(payload, gather=gather):
                    rows = gather(payload)
                    received[shape] += (len(rows) - 1) * (rank == 0)
                    return rows

                stage.all_gather = counted
            return cubn.batch_norm(np.full((1, 3), float(rank)), sync=sync)[1].moments.mean.tolist()

        assert results(one_rank, 24, shape=shape) == [[11.5] * 3] * 24
    assert received == {None: 23, (4, 6): 8}


@pytest.mark.parametrize("shape", [(), (2,), (2, 2), (3, -1), (1.5, 2), "3"])
def test_a_grid_of_another_number_of_ranks_is_refused(shape):
    with pytest.raises(ValueError, match=r"3 ranks are laid out.*whose product is 3"):
        cubn.sync.threads(3, shape=shape)
    with pytest.raises(ValueError, match="one side at least"):
        cubn.sync.grid([])


# Adapters whose library knows one length only


class Equal(EqualRounds):
    """Ranks that are threads, and a library that breaks where lengths differ."""

    def __init__(self, sync):
        super().__init__()
        self.rank, self.size, self._sync = sync.rank, sync.size, sync
        self.rounds = []

    def _gather_equal(self, row):
        rows = self._sync.all_gather(row)
        assert len({len(one) for one in rows}) == 1, "ranks sent rows of different lengths"
        self.rounds.append(len(row))
        return np.stack(rows)


def test_every_payload_arrives_as_it_was_sent_however_lengths_change():
    rng = np.random.default_rng(0)
    lengths = rng.choice([0, 3, 511, 512, 513, 900, 2000], size=(60, 3))

    def one_rank(rank, sync):
        sync = Equal(sync)
        for step, each in enumerate(lengths):
            found = sync.all_gather(np.full(each[rank], 10.0 * step + rank))
            assert [len(part) for part in found] == list(each)
            assert all((part == 10.0 * step + other).all() for other, part in enumerate(found))

    results(one_rank, 3)


RESNET = [64, *[64, 64, 256, 256], *[64, 64, 256] * 2, *[128, 128, 512, 512], *[128, 128, 512] * 3,
          *[256, 256, 1024, 1024], *[256, 256, 1024] * 5, *[512, 512, 2048, 2048], *[512, 512, 2048] * 2]  # fmt: skip


def test_a_network_needs_one_round_a_layer_from_the_third_step_on_and_no_byte_more():
    """Forward 8 + 2 C numbers and backward the same, and one for the length."""
    network = RESNET + RESNET[::-1]
    assert (len(RESNET), sum(RESNET)) == (53, 26560)

    def one_rank(_, sync):
        sync = Equal(sync)
        for step in range(5):
            if step == 3:
                sync.rounds.clear()
            for channels in network:
                sync.all_gather(np.zeros(8 + 2 * channels))
        return sync.rounds

    assert results(one_rank, 2) == [[9 + 2 * channels for channels in network] * 2] * 2


def test_expectations_survive_the_end_of_their_memory(monkeypatch):
    monkeypatch.setattr(rounds, "MEMORY", 50)
    expected = rounds.Expectation()
    surprises = 0
    for step in range(40):
        for length in (600, 700, 700, 800, 700):
            surprises += (step > 2) * (expected.length != length)
            expected.learn(length)
    assert surprises == 0
    assert len(expected._past) <= 51


def test_ranks_that_disagree_hear_of_it_over_such_a_library_too():
    def one_rank(rank, sync):
        sync = Equal(sync)
        errors = []
        for channels, gamma in ((3, 3), (900 if rank == 1 else 3, None), (700, 5 if rank == 0 else 700), (700, 700)):
            x = np.random.default_rng(rank).normal(size=(4, channels))
            try:
                cubn.batch_norm(x, None if gamma is None else np.ones(gamma), sync=sync)
            except Exception as error:
                errors.append(type(error))
            else:
                errors.append(None)
        return errors

    assert results(one_rank, 3) == [[None, cubn.SyncError, cubn.ShapeError, None]] * 3


def test_one_forward_and_one_backward_pass_are_one_all_gather_each():
    def one_rank(rank, sync):
        sync = Equal(sync)
        _, saved = cubn.batch_norm(np.random.default_rng(rank).normal(size=(4, 16)), sync=sync)
        assert len(sync.rounds) == 1
        cubn.batch_norm_backward(np.ones((4, 16)), saved, sync=sync)
        return len(sync.rounds)

    assert results(one_rank, 3) == [2, 2, 2]


def test_counts_stay_exact_where_the_library_knows_float32_only():
    """2**24 + 1 is no float32; a rank that held so many samples would be one short."""
    strict = pytest.importorskip("array_api_strict")
    from cubn.problem import pose

    with strict.ArrayAPIStrictFlags(api_version="2024.12"):
        x = strict.zeros((2, 1), dtype=strict.float32, device=strict.Device("no_float64"))
    _, call = pose(x, channel_axis=1)
    own = cubn.Moments(2**24 + 1, x[0, :], x[0, :])

    def one_rank(_, sync):
        return exchange.gather_moments(sync, call, own).count

    assert results(one_rank, 2) == [2**25 + 2] * 2


def test_communicators_are_of_no_use_after_an_error():
    ranks = cubn.sync.threads(2, timeout=0.05)
    with pytest.raises(cubn.SyncError):
        ranks[0].all_gather(np.zeros(1))
    with pytest.raises(cubn.SyncError, match="make new communicators after an error"):
        ranks[1].all_gather(np.zeros(1))


# The communicator itself


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_payloads_arrive_in_rank_order_round_after_round(size):
    def one_rank(rank, sync):
        assert (sync.rank, sync.size) == (rank, size)
        rounds = (sync.all_gather(np.array([rank, step])) for step in range(50))
        return [np.concatenate(gathered).tolist() for gathered in rounds]

    wanted = [[number for rank in range(size) for number in (rank, step)] for step in range(50)]
    assert results(one_rank, size) == [wanted] * size


def test_a_communicator_says_which_rank_it_is():
    assert [repr(sync) for sync in cubn.sync.threads(2)] == ["<rank 0 of 2 threads>", "<rank 1 of 2 threads>"]
    assert len(cubn.sync.threads(np.int64(3))) == 3


def test_a_backward_pass_over_other_ranks_than_the_forward_pass_is_refused():
    """Without the sums of the other ranks dx would be wrong, and nobody would notice."""
    x = np.random.default_rng(0).normal(size=(4, 2))
    (alone,) = cubn.sync.threads(1)
    for first, second in ((alone, None), (None, alone)):
        _, saved = cubn.batch_norm(x, sync=first)
        with pytest.raises(ValueError, match="pass the sync of the forward pass"):
            cubn.batch_norm_backward(x, saved, sync=second)
