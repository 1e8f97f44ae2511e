"""Inference as one affine map, and that map inside the layer before it."""

from decimal import Decimal, localcontext

import numpy as np
import pytest

import cubn

U = {"float64": 2.0**-53, "float32": 2.0**-24, "float16": 2.0**-11}


def statistics(channels, dtype="float64", seed=0, gamma=True, beta=True):
    rng = np.random.default_rng(seed)
    mean, var = rng.normal(1.0, 2.0, channels), rng.gamma(2.0, 1.0, channels) + 0.1
    given = [mean, var, rng.normal(size=channels) if gamma else None, rng.normal(size=channels) if beta else None]
    return [None if values is None else values.astype(dtype) for values in given]


def exact_fold(mean, var, gamma, beta, eps):
    """(scale, shift) with fifty digits."""
    scales, shifts = [], []
    with localcontext() as context:
        context.prec = 50
        for c in range(len(mean)):
            m, v, g, b = (
                Decimal(default if values is None else float(values[c]))
                for values, default in ((mean, 0), (var, 0), (gamma, 1), (beta, 0))
            )
            scales.append(g / (v + Decimal(eps)).sqrt())
            shifts.append(b - m * scales[-1])
    return scales, shifts


def errors(found, exact):
    return np.array([float(abs(Decimal(float(f)) - e)) for f, e in zip(found, exact, strict=True)])


@pytest.mark.parametrize(("dtype", "wanted"), [("float64", "float64"), ("float32", "float32"), ("float16", "float32")])
@pytest.mark.parametrize(("gamma", "beta"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("eps", [1e-5, 0.0, 1.0])
def test_fold_is_the_exact_affine_map_but_for_rounding(dtype, wanted, gamma, beta, eps):
    """In float64: eps + var, the power (2 u: libm is not correctly rounded) and the product with gamma make
    4 u |scale|; shift has that times |mean|, and one product and one sum more.  Then one rounding to the result."""
    mean, var, gamma, beta = statistics(40, dtype, gamma=gamma, beta=beta)
    found = cubn.fold(mean, var, gamma, beta, eps=eps)
    scale, shift = exact_fold(mean, var, gamma, beta, eps)
    assert found.scale.dtype == found.shift.dtype == np.dtype(wanted)
    assert (found.scale, found.shift) == tuple(found)
    wide, last = U["float64"], U[wanted]
    size = np.abs(np.array(scale, float))
    total = size * np.abs(mean.astype(float)) + np.abs(np.array(shift, float))
    assert (errors(found.scale, scale) <= (4 * wide + last) * size).all()
    assert (errors(found.shift, shift) <= 6 * wide * total + last * np.abs(np.array(shift, float))).all()


def test_a_fold_without_eps_or_with_the_variance_for_the_deviation_is_seen():
    """The teeth of the bound above."""
    mean, var, gamma, beta = statistics(40)
    scale, _ = exact_fold(mean, var, gamma, beta, 1e-5)
    size = np.abs(np.array(scale, float))
    for wrong in (gamma / np.sqrt(var), gamma / (var + 1e-5), 1 / np.sqrt(var + 1e-5)):
        assert (errors(wrong, scale) > 5 * U["float64"] * size).any()


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_the_folded_map_is_inference(machine, dtype):
    """scale * x + shift in x's dtype, scale and shift rounded: 2 u |scale x| + 2 u |shift| for these, u more for the
    sum; inference itself rounds once at the end."""
    mean, var, gamma, beta = statistics(3, dtype)
    x = np.random.default_rng(1).normal(1.0, 2.0, (8, 3, 4)).astype(dtype)
    scale, shift = (values[:, None] for values in cubn.fold(mean, var, gamma, beta))
    y = cubn.batch_norm_inference(x, mean, var, gamma, beta)
    bound = 4 * U[dtype] * (np.abs(scale * x) + np.abs(shift) + np.abs(y))
    assert (np.abs(scale * x + shift - y) <= bound).all()


def test_a_channel_without_variance_folds_to_beta():
    """As inference does with eps = 0: a scale of 0, not infinity."""
    found = cubn.fold([3.0, 3.0], [0.0, 4.0], beta=[7.0, 0.0], eps=0.0)
    assert found.scale.tolist() == [0.0, 0.5]
    assert found.shift.tolist() == [7.0, -1.5]


def test_statistics_of_several_axes_fold_in_their_own_shape():
    mean, var, gamma, beta = (values.reshape(3, 4) for values in statistics(12))
    flat = cubn.fold(mean.ravel(), var.ravel(), gamma.ravel(), beta.ravel())
    found = cubn.fold(mean, var, gamma, beta)
    assert np.array_equal(found.scale, flat.scale.reshape(3, 4))
    assert np.array_equal(found.shift, flat.shift.reshape(3, 4))


def test_folding_changes_none_of_its_inputs():
    given = [np.ones((3, 2)), np.ones(3), *statistics(3)]
    before = [values.copy() for values in given]
    cubn.fold_into(*given)
    cubn.fold(*given[2:])
    assert all(np.array_equal(a, b) for a, b in zip(given, before, strict=True))


# Into the layer before


def dense(x, weight, bias):
    """(N, C_in) and (C, C_in)."""
    return np.einsum("ni,ci->nc", x, weight) + bias


def dense_transposed(x, weight, bias):
    """(N, C_in) and (C_in, C)."""
    return np.einsum("ni,ic->nc", x, weight) + bias


def convolution(x, weight, bias):
    """(N, C_in, H, W) and (C, C_in, kh, kw), no padding, written out."""
    kh, kw = weight.shape[2:]
    rows, columns = x.shape[2] - kh + 1, x.shape[3] - kw + 1
    y = np.zeros((len(x), len(weight), rows, columns), np.result_type(x, weight))
    for i in range(rows):
        for j in range(columns):
            y[:, :, i, j] = np.einsum("nihw,cihw->nc", x[:, :, i : i + kh, j : j + kw], weight) + bias
    return y


LAYERS = {
    "dense": (dense, (5, 7), 0, (6, 7)),
    "dense transposed": (dense_transposed, (7, 5), -1, (6, 7)),
    "dense transposed by number": (dense_transposed, (7, 5), 1, (6, 7)),
    "convolution": (convolution, (5, 2, 3, 2), 0, (3, 2, 6, 5)),
    "convolution from the end": (convolution, (5, 2, 3, 2), -4, (3, 2, 6, 5)),
}


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_the_folded_layer_is_the_layer_and_its_normalisation(dtype, kind, has_bias, affine):
    """Both sides evaluated in float64, so all that is left is the rounding of weight' and bias' to their dtype: u of
    every |x weight'| and of |bias'|, and twice the float64 rounding of k + 8 operations on either side."""
    layer, shape, out_axis, x_shape = LAYERS[kind]
    rng = np.random.default_rng(2)
    weight = rng.normal(size=shape).astype(dtype)
    bias = rng.normal(size=5).astype(dtype) if has_bias else None
    x = rng.normal(size=x_shape)
    mean, var, gamma, beta = statistics(5, "float32" if dtype == "float16" else dtype, gamma=affine, beta=affine)
    folded = cubn.fold_into(weight, bias, mean, var, gamma, beta, out_axis=out_axis)
    assert folded.weight.dtype == folded.bias.dtype == weight.dtype
    assert (folded.weight.shape, folded.bias.shape) == (weight.shape, (5,))

    z = layer(x, weight.astype("float64"), 0.0 if bias is None else bias.astype("float64"))
    along = (5,) + (1,) * (z.ndim - 2)
    m, v, g, b = (
        np.asarray(default if values is None else values, "float64").reshape(-1, *along[1:])
        for values, default in ((mean, 0), (var, 0), (gamma, 1), (beta, 0))
    )
    wanted = (z - m) / np.sqrt(v + 1e-5) * g + b
    found = layer(x, folded.weight.astype("float64"), folded.bias.astype("float64"))

    reach = layer(np.abs(x), np.abs(folded.weight).astype("float64"), np.abs(folded.bias).astype("float64"))
    terms = reach + np.abs(m) / np.sqrt(v + 1e-5) * np.abs(g) + np.abs(b)
    bound = U[dtype] * reach + 2 * (weight.size // 5 + 8) * U["float64"] * terms
    subnormal = 1e-7 if dtype == "float16" else 0.0  # float16 loses relative precision below 6e-5
    assert (np.abs(found - wanted) <= bound + subnormal * np.abs(x).sum()).all()


def test_the_layer_is_folded_as_inference_computes(machine):
    """The same through `batch_norm_inference`, to the float64 part of the bound above: 2 * (7 + 8) u of all terms."""
    rng = np.random.default_rng(3)
    x, weight, bias = rng.normal(size=(6, 7)), rng.normal(size=(5, 7)), rng.normal(size=5)
    given = statistics(5)
    wanted = cubn.batch_norm_inference(dense(x, weight, bias), *given)
    folded = cubn.fold_into(weight, bias, *given)
    terms = dense(np.abs(x), np.abs(folded.weight), np.abs(folded.bias) + 2 * np.abs(cubn.fold(*given).shift))
    assert (np.abs(dense(x, *folded) - wanted) <= 30 * U["float64"] * terms).all()


def test_the_axis_decides_where_both_would_fit():
    weight = np.arange(9.0).reshape(3, 3)
    given = ([0.0, 0.0, 0.0], [1.0, 4.0, 16.0])
    rows, columns = (cubn.fold_into(weight, None, *given, eps=0.0, out_axis=axis).weight for axis in (0, 1))
    assert np.array_equal(rows, weight / np.array([[1.0], [2.0], [4.0]]))
    assert np.array_equal(columns, weight / np.array([1.0, 2.0, 4.0]))


def test_a_missing_bias_is_a_bias_of_zero():
    weight, given = np.ones((3, 2)), statistics(3)
    without, with_zero = (cubn.fold_into(weight, bias, *given) for bias in (None, np.zeros(3)))
    assert np.array_equal(without.bias, with_zero.bias)
    assert np.array_equal(without.weight, with_zero.weight)
