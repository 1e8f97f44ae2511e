"""The oracle itself, against exact fractions and against results that are wrong by a little."""

from fractions import Fraction

import numpy as np
import oracle
import pytest


def exact_column(column, eps):
    """Mean, variance and squared normalised values of a few numbers, as fractions."""
    values = [Fraction(float(v)) for v in column]
    mean = sum(values) / len(values)
    var = sum((v - mean) ** 2 for v in values) / len(values)
    return mean, var, [(v - mean) ** 2 / (var + Fraction(eps)) for v in values]


def test_the_oracle_agrees_with_exact_fractions():
    """Extended precision has 64 bits of mantissa on x86-64, so 2**-60 relative is what 20 additions leave at worst;
    elsewhere longdouble may be float64, and 2**-48 is left."""
    x = np.random.default_rng(3).normal(3.0, 2.0, (20, 4))
    result = oracle.batch_norm(x, eps=1e-3)
    tolerance = 2.0**-57 if np.finfo(np.longdouble).nmant >= 63 else 2.0**-48
    for c in range(4):
        mean, var, squares = exact_column(x[:, c], 1e-3)
        assert abs(Fraction(*result.mean.value[c].as_integer_ratio()) - mean) <= tolerance * abs(mean)
        assert abs(Fraction(*result.var.value[c].as_integer_ratio()) - var) <= tolerance * var
        for y, square in zip(result.y.value[:, c], squares, strict=True):
            assert abs(Fraction(*y.as_integer_ratio()) ** 2 - square) <= 8 * tolerance * max(square, 1)


def test_an_error_beyond_the_bound_is_seen():
    exact = oracle.Exact(np.ones(3, np.longdouble), np.full(3, 1e-6))
    oracle.assert_within(np.array([1.0, 1.0, 1 + 9e-7]), exact)
    with pytest.raises(AssertionError, match=r"at \(2,\)"):
        oracle.assert_within(np.array([1.0, 1.0, 1 + 2e-6]), exact)


def test_nan_is_never_within_a_bound():
    with pytest.raises(AssertionError):
        oracle.assert_within(np.array([np.nan]), oracle.Exact(np.ones(1, np.longdouble), np.full(1, np.inf)))


def test_a_result_of_another_shape_is_seen():
    with pytest.raises(AssertionError, match="shape"):
        oracle.assert_within(np.ones((1, 3)), oracle.Exact(np.ones(3, np.longdouble), np.ones(3)))
