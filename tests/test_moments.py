"""Moments as a value: exact to rounding, and a union that is associative, has an identity, and keeps its bits."""

import copy
import pickle
from fractions import Fraction

import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cubn
from cubn import Moments
from cubn.moments import EMPTY, union

U = 2.0**-53


def exact_moments(column):
    """Mean and sum of squared distances of a few numbers, as fractions."""
    values = [Fraction(float(value)) for value in column]
    mean = sum(values) / len(values)
    return mean, sum((value - mean) ** 2 for value in values)


def same_bits(a: Moments, b: Moments) -> bool:
    pairs = [(np.asarray(getattr(m, name)) for m in (a, b)) for name in ("count", "wide_mean", "wide_m2")]
    return all((p.tobytes(), p.shape, p.dtype) == (q.tobytes(), q.shape, q.dtype) for p, q in pairs)


# One set


OFFSETS_AND_SPREADS = ((0.0, 1.0), (1e6, 1.0), (-1e15, 1e8), (1e-30, 1e-31), (7.0, 1e-4))
WITHIN_REACH = [
    (dtype, offset, spread)
    for dtype in ("float64", "float32", "float16")
    for offset, spread in OFFSETS_AND_SPREADS
    if abs(offset) < float(np.finfo(dtype).max)
]


@pytest.mark.parametrize(("dtype", "offset", "spread"), WITHIN_REACH)
def test_moments_are_the_fractions_up_to_rounding(machine, dtype, offset, spread):
    """`oracle` derives the bounds for sums in float64; float32 results are rounded once more, by 2**-24 relative."""
    x = np.random.default_rng(1).normal(offset, spread, (23, 2)).astype(dtype)
    found, bounds = cubn.moments(x), oracle.batch_norm(x)
    last = 2.0**-24 if dtype != "float64" else 0.0
    smallest = Fraction(float(np.finfo(found.m2.dtype).smallest_subnormal))
    assert found.count == 23
    for c in range(2):
        mean, m2 = exact_moments(x[:, c])
        e_mean = Fraction(float(bounds.mean.bound[c])) + Fraction(last) * abs(mean) + smallest
        assert abs(Fraction(float(found.mean[c])) - mean) <= e_mean
        e_var = Fraction(float(bounds.var.bound[c]))
        for values, divisor in ((found.m2, 1), (found.var, 23), (found.var_unbiased, 22)):
            bound = e_var * 23 / divisor + Fraction(last + 2 * U) * m2 / divisor + smallest
            assert abs(Fraction(float(values[c])) - m2 / divisor) <= bound


def test_the_shortcut_would_fail_that_bound():
    """The teeth: E[x^2] - E[x]^2 in float64 at mean 1e6 is off by about 1e12 * 2**-53, a hundred times the bound."""
    x = np.random.default_rng(1).normal(1e6, 1.0, 23)
    _, m2 = exact_moments(x)
    bound = oracle.batch_norm(x[:, None]).var
    shortcut = Fraction(float((x * x).mean() - x.mean() ** 2))
    assert abs(shortcut - m2 / 23) > Fraction(float(bound.bound[0]))


@pytest.mark.parametrize(("dtype", "wanted"), [("float16", "float32"), ("float32", "float32"), ("float64", "float64")])
def test_moments_come_in_the_dtype_of_statistics_and_in_the_shape_of_the_kept_axes(machine, dtype, wanted):
    x = np.random.default_rng(2).normal(size=(4, 3, 5, 2)).astype(dtype)
    for axes, shape in ((1, (3,)), ((1, 2, 3), (3, 5, 2)), ((0, 2), (4, 5)), ((0, 1, 2, 3), x.shape), ((), ())):
        found = cubn.moments(x, channel_axis=axes)
        assert found.count == x.size // int(np.prod(shape))
        for values in (found.mean, found.m2, found.var):
            assert (values.shape, values.dtype) == (shape, np.dtype(wanted))


def test_variances_are_nan_where_there_is_nothing_to_divide_by(machine):
    none, one, two = (cubn.moments(np.full((m, 2), 3.0)) for m in (0, 1, 2))
    assert np.isnan(none.var).all()
    assert np.isnan(none.var_unbiased).all()
    assert np.isnan(one.var_unbiased).all()
    assert one.var.tolist() == two.var.tolist() == two.var_unbiased.tolist() == [0, 0]
    assert (none.count, none.m2.tolist()) == (0, [0, 0])


def test_a_mask_gives_every_channel_its_own_count(machine):
    """Masked NumPy arithmetic in extended precision is the oracle; `oracle` derives the bounds."""
    x = np.random.default_rng(3).normal(2.0, 3.0, (6, 4, 5))
    where = np.random.default_rng(4).random(x.shape) < 0.5
    where[:, 1], where[:, 2] = False, False
    where[3, 2, 1] = True
    x[~where] = np.nan
    found, exact = cubn.moments(x, where=where), oracle.batch_norm(x, where=where)
    assert found.count.tolist() == where.sum(axis=(0, 2)).tolist()
    assert found.count[1:3].tolist() == [0, 1]
    oracle.assert_within(found.mean, exact.mean)
    oracle.assert_within(found.var[[0, 2, 3]], oracle.Exact(exact.var.value[[0, 2, 3]], exact.var.bound[[0, 2, 3]]))
    assert np.isnan(found.var[1])
    assert np.isnan(found.var_unbiased).tolist() == [False, True, True, False]
    assert np.isnan(cubn.moments(x, where=where | True).mean).all()  # the mask is what kept NaN out


# The union


def tolerance(x, parts):
    """First-order bounds of mean and m2 after merging k parts of M samples in any order, to |x| <= A, range W.

    A part: mean u A + 2 (M + 2) u W, as in `oracle`.  A merge keeps the larger of two errors (the mean is a convex
    combination) and adds gap, share, product (3 u of at most 2 A) and the sum (u A): 7 u A.  So

        E = (7 k + 1) u A + 2 (M + 2) u W

    m2 of a part: sum 2 |d| e with e = 2 (M + 3) u W, and (M + 2) u m2.  A merge adds gap^2 * (count * share), with
    count * share <= M / 4, gap <= W and an error of gap of 2 E + u A: that is M W E + M W u A / 2, and 8 roundings of
    values up to M W^2 / 4: 2 M u W^2.  So

        k M W (E + u A + 2 u W) + 4 M (M + 3) u W^2 + M (M + 2) u W^2 / 4

    The rounding u of the difference of two inputs is in A, since an input that was shifted is rounded, too.
    """
    m, k = len(x), max(parts, 1)
    a, w = np.abs(x).max(axis=0), np.ptp(x, axis=0)
    e = (7 * k + 1) * U * a + 2 * (m + 2) * U * w
    m2 = k * m * w * (e + U * a + 2 * U * w) + 4 * m * (m + 3) * U * w**2 + m * (m + 2) * U * w**2 / 4
    smallest = 1e-300  # squares of differences below 1e-162 underflow
    return e + smallest, m2 + smallest


def assert_are_moments_of(found: Moments, x, parts: int) -> None:
    e_mean, e_m2 = tolerance(x, parts)
    assert found.count == len(x)
    for c in range(x.shape[1]):
        mean, m2 = exact_moments(x[:, c])
        assert abs(Fraction(float(found.wide_mean[c])) - mean) <= Fraction(float(e_mean[c])), "mean"
        assert abs(Fraction(float(found.wide_m2[c])) - m2) <= Fraction(float(e_m2[c])), "m2"


@st.composite
def partitions(draw):
    """Samples of two channels, cut into parts of any size, none included."""
    offset = draw(st.sampled_from([0.0, 1.0, 1e6, -1e15]))
    values = st.floats(-8, 8, allow_subnormal=False) | st.integers(-4, 4).map(float)
    rows = draw(st.lists(st.tuples(values, values), min_size=1, max_size=12))
    x = np.array(rows, np.float64) * (1e8 if offset < 0 else 1) + offset
    cuts = sorted(draw(st.lists(st.integers(0, len(rows)), max_size=6)))
    return x, np.split(x, cuts)


@settings(deadline=None, max_examples=150)
@given(partitions(), st.randoms(use_true_random=False))
def test_the_union_of_any_parts_in_any_nesting_is_the_whole(case, random):
    """Left fold, right fold and a random tree: each within `tolerance` of the fractions, whatever the cuts."""
    x, parts = case
    found = [cubn.moments(part) for part in parts]
    right = EMPTY
    for part in reversed(found):
        right = part | right
    forest = list(found)
    while len(forest) > 1:
        at = random.randrange(len(forest) - 1)
        forest[at : at + 2] = [forest[at] | forest[at + 1]]
    for merged in (union(found), right, forest[0]):
        assert_are_moments_of(merged, x, len(parts))


@pytest.mark.parametrize(
    "broken",
    [
        lambda p, q: (p.wide_mean, p.wide_m2 + q.wide_m2),
        lambda p, q: ((p.wide_mean + q.wide_mean) / 2, p.wide_m2 + q.wide_m2 + (p.wide_mean - q.wide_mean) ** 2),
        lambda p, q: ((p.wide_mean * p.count + q.wide_mean * q.count) / (p.count + q.count), p.wide_m2 + q.wide_m2),
    ],
    ids=["left only", "unweighted", "no gap"],
)
def test_a_union_that_is_a_little_wrong_is_seen(broken):
    x = np.random.default_rng(5).normal(size=(5, 2))
    p, q = cubn.moments(x[:2]), cubn.moments(x[2:])
    assert_are_moments_of(p | q, x, 2)
    with pytest.raises(AssertionError, match=r"mean|m2"):
        assert_are_moments_of(Moments(5, *broken(p, q)), x, 2)


def masked(x, where):
    return cubn.moments(x, where=where)


X = np.random.default_rng(6).normal(1e3, 1.0, (7, 3))
SOME = np.random.default_rng(7).random((7, 3)) < 0.5
SOME[:, 1] = False


@pytest.mark.parametrize("empty", [EMPTY, cubn.moments(X[:0]), cubn.moments(X.astype("float32")[:0])])
@pytest.mark.parametrize("some", [cubn.moments(X), masked(X, SOME), cubn.moments(X[:1]), cubn.moments(X[:0])])
def test_the_empty_set_is_the_identity_bit_for_bit(some, empty):
    assert same_bits(some | empty, some)
    assert same_bits(empty | some, some)


def test_channels_that_a_mask_emptied_are_an_identity_each():
    p, nothing = masked(X, SOME), masked(X, np.zeros_like(SOME))
    assert same_bits(p | nothing, p)
    assert same_bits(nothing | p, p)
    whole = cubn.moments(X)
    for merged in (nothing | whole, whole | nothing):
        assert merged.wide_mean.tobytes() == whole.wide_mean.tobytes()
        assert merged.wide_m2.tobytes() == whole.wide_m2.tobytes()
        assert merged.count.tolist() == [7, 7, 7]


def test_an_infinite_mean_stays_what_it_is_beside_an_empty_channel():
    """inf - 0 times a share of 0 would be NaN."""
    p = Moments(np.array([2, 2]), np.array([np.inf, 1e200]), np.array([np.nan, 1e300]))
    nothing = Moments(np.array([0, 0]), np.zeros(2), np.zeros(2))
    assert same_bits(p | nothing, p)
    assert same_bits(nothing | p, p)


def test_infinity_in_a_union_warns_of_nothing_and_stays_in_its_channel():
    bad = X.copy()
    bad[0, 2] = np.inf
    for merged in (cubn.moments(bad) | cubn.moments(X), cubn.moments(bad) | cubn.moments(bad)):
        assert np.isfinite(merged.mean).tolist() == [True, True, False]


def test_nothing_united_with_nothing_is_nothing():
    assert (EMPTY | EMPTY).count == 0
    assert union([]).count == 0
    assert np.isnan((cubn.moments(X[:0]) | EMPTY).var).all()


@pytest.mark.parametrize("first_masked", [True, False])
@pytest.mark.parametrize("second_masked", [True, False])
def test_masked_and_whole_sets_unite_channel_by_channel(first_masked, second_masked):
    """Two parts of 7 samples: `tolerance` with every channel's own samples as the whole."""
    masks = [SOME if use else np.ones_like(SOME) for use in (first_masked, second_masked)]
    other = np.random.default_rng(8).normal(1e3, 2.0, X.shape)
    p = masked(X, SOME) if first_masked else cubn.moments(X)
    q = masked(other, SOME) if second_masked else cubn.moments(other)
    merged = p | q
    for c in range(3):
        samples = np.concatenate([X[masks[0][:, c], c], other[masks[1][:, c], c]])[:, None]
        count = np.broadcast_to(merged.count, 3)[c]
        assert count == len(samples)
        if count:
            channel = Moments(int(count), merged.wide_mean[c : c + 1], merged.wide_m2[c : c + 1])
            assert_are_moments_of(channel, samples, 2)


def test_counts_are_whole_numbers_where_float_has_stopped_counting():
    one, many = (Moments(count, np.zeros(1), np.zeros(1)) for count in (1, 2**60))
    assert (many | one).count == 2**60 + 1


def test_nan_stays_in_its_channel_through_a_union():
    bad = X.copy()
    bad[0, 2] = np.nan
    merged, good = cubn.moments(bad) | cubn.moments(X), cubn.moments(X) | cubn.moments(X)
    assert np.isnan(merged.mean).tolist() == [False, False, True]
    assert merged.wide_mean[:2].tobytes() == good.wide_mean[:2].tobytes()


def test_equal_parts_in_equal_order_give_equal_bits():
    parts = [cubn.moments(X[i : i + 2]) for i in range(0, 7, 2)]
    assert same_bits(union(parts), union(copy.deepcopy(parts)))


def test_a_union_changes_neither_side():
    p, q = cubn.moments(X[:3]), cubn.moments(X[3:])
    before = copy.deepcopy((p, q))
    p | q
    assert same_bits(p, before[0])
    assert same_bits(q, before[1])


def test_one_channel_of_everything_unites_like_any_other():
    """channel_axis=(0, 1) keeps every element, () keeps none: both shapes must come back from a union."""
    whole = cubn.moments(X, channel_axis=())
    merged = cubn.moments(X[:3], channel_axis=()) | cubn.moments(X[3:], channel_axis=())
    assert (merged.mean.shape, merged.var.shape, merged.count) == ((), (), 21)
    np.testing.assert_allclose(merged.var, whole.var, rtol=1e-12)
    assert same_bits(whole | EMPTY, whole)
    assert same_bits(EMPTY | whole, whole)
    each = cubn.moments(X, channel_axis=(0, 1)) | cubn.moments(X + 2, channel_axis=(0, 1))
    np.testing.assert_allclose(each.var, np.ones(X.shape), rtol=1e-12)


@pytest.mark.parametrize("other", [3, None, (1, 2, 3), np.ones(3)])
def test_only_moments_unite_with_moments(other):
    with pytest.raises(TypeError):
        cubn.moments(X) | other


@pytest.mark.parametrize("some", [cubn.moments(X.astype("float32")), masked(X, SOME), EMPTY])
@pytest.mark.parametrize("clone", [lambda m: pickle.loads(pickle.dumps(m)), copy.copy, copy.deepcopy])
def test_moments_survive_pickling_and_copying(some, clone):
    twin = clone(some)
    assert np.array_equal(twin.count, some.count)
    for name in ("wide_mean", "wide_m2", "mean", "var"):
        a, b = np.asarray(getattr(twin, name)), np.asarray(getattr(some, name))
        assert (a.tobytes(), a.dtype) == (b.tobytes(), b.dtype)
    assert repr(twin) == repr(some)


def test_float32_moments_are_merged_wider_than_they_are_shown():
    """1000 parts of float32 samples at mean 1e4: merged in float32, the mean would drift by many units in 2**-24."""
    x = np.random.default_rng(9).normal(1e4, 1.0, (4000, 1)).astype("float32")
    merged = union(cubn.moments(x[i : i + 4]) for i in range(0, 4000, 4))
    wide = x.astype("float64")
    assert merged.mean.dtype == np.float32
    assert merged.mean[0] == np.float32(wide.mean())
    assert abs(merged.wide_m2[0] - ((wide - wide.mean()) ** 2).sum()) < 1e-9 * merged.wide_m2[0]
