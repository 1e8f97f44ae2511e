"""Every gradient against central differences in float64 (promise 7).

A central difference with step h has an error of h^2 |f'''| / 6 + u |f| / h; h = 1e-5 leaves about 1e-10 for the
functions here, whose third derivatives are of the order of 1 to 10, so 1e-6 relative to the largest gradient is
kept with room to spare and would not be kept by any formula with a term missing.
"""

import numpy as np
import pytest

import cubn

STEP = 1e-5

CASES = {
    "dense": ((6, 3), 1, {}),
    "maps": ((3, 2, 2, 3), 1, {}),
    "channels last": ((4, 3, 2), -1, {}),
    "per location": ((3, 4, 2), 2, {}),
    "per activation": ((5, 2, 2), (1, 2), {}),
    "all one channel": ((3, 4), (), {}),
    "relu": ((6, 3), 1, {"activation": "relu"}),
    "residual": ((6, 3), 1, {"residual": True}),
    "residual and relu": ((4, 2, 3), 1, {"activation": "relu", "residual": True}),
    "mask": ((5, 3, 2), 1, {"where": True}),
    "everything": ((5, 2, 4), 1, {"activation": "relu", "residual": True, "where": True}),
}


def away_from_the_kink(operands, run, seed):
    """New data until no value lies within 100 steps of ReLU's kink."""
    rng = np.random.default_rng(seed)
    while True:
        for name, values in operands.items():
            if name != "gamma":
                values[...] = rng.normal(size=values.shape)
        y = run(operands)
        if not ((np.abs(y) > 0) & (np.abs(y) < 100 * STEP)).any():
            return


def central_differences(loss, values):
    slopes = np.empty_like(values)
    for index in np.ndindex(values.shape):
        kept = values[index]
        values[index] = kept + STEP
        above = loss()
        values[index] = kept - STEP
        below = loss()
        values[index] = kept
        slopes[index] = (above - below) / (2 * STEP)
    return slopes


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", ["training", "inference"])
def test_every_gradient_agrees_with_central_differences(machine, case, mode):
    shape, axis, options = CASES[case]
    rng = np.random.default_rng(20)
    kept = axis if isinstance(axis, tuple) else (axis,)
    channels = tuple(shape[a] for a in kept)
    operands = {
        "x": np.empty(shape),
        "gamma": rng.uniform(0.5, 2.0, channels),
        "beta": np.empty(channels),
    }
    if options.get("residual"):
        operands["residual"] = np.empty(shape)
    where = rng.random(shape) < 0.7 if options.get("where") else None
    mean, var = rng.normal(size=channels), rng.uniform(0.5, 2.0, channels)
    weights = rng.normal(size=shape)
    activation = options.get("activation")

    def run(values, saved_too=False):
        common = {
            "channel_axis": axis, "activation": activation, "residual": values.get("residual"), "where": where,
            "eps": 1e-2,
        }  # fmt: skip
        if mode == "inference":
            return cubn.batch_norm_inference(values["x"], mean, var, values["gamma"], values["beta"], **common)
        y, saved = cubn.batch_norm(values["x"], values["gamma"], values["beta"], **common)
        return (y, saved) if saved_too else y

    away_from_the_kink(operands, run, 21)
    if mode == "inference":
        grads = cubn.batch_norm_inference_backward(
            weights, operands["x"], mean, var, operands["gamma"], operands["beta"], channel_axis=axis, eps=1e-2,
            activation=activation, residual=operands.get("residual"), where=where,
        )  # fmt: skip
    else:
        grads = cubn.batch_norm_backward(weights, run(operands, saved_too=True)[1])

    def loss():
        return float((run(operands) * weights).sum())

    found = {"x": grads.dx, "gamma": grads.dgamma, "beta": grads.dbeta, "residual": grads.dresidual}
    for name, values in operands.items():
        slopes = central_differences(loss, values)
        np.testing.assert_allclose(found[name], slopes, rtol=0, atol=1e-6 * max(1, np.abs(slopes).max()), err_msg=name)


def test_the_comparison_sees_a_missing_path(machine):
    """Its teeth: the inference gradient of a training pass lacks the paths through mean and variance."""
    x, dy = np.random.default_rng(22).normal(size=(2, 6, 3))
    found = cubn.moments(x)
    constant = cubn.batch_norm_inference_backward(dy, x, found.mean, found.var).dx
    slopes = central_differences(lambda: float((cubn.batch_norm(x)[0] * dy).sum()), x)
    with pytest.raises(AssertionError):
        np.testing.assert_allclose(constant, slopes, rtol=0, atol=1e-6 * np.abs(slopes).max())


def test_the_gradient_is_orthogonal_to_shift_and_scale_of_the_input(machine):
    """y does not change under x + b and (eps = 0) a x, so dx sums to 0 and is orthogonal to x - mean."""
    x, dy = np.random.default_rng(23).normal(2, 3, (2, 64, 5))
    _, saved = cubn.batch_norm(x, eps=0.0)
    dx = cubn.batch_norm_backward(dy, saved).dx
    size = 64 * 8 * 2**-53 * np.abs(dx).max()
    assert np.abs(dx.sum(0)).max() <= size
    assert np.abs((dx * (x - x.mean(0))).sum(0)).max() <= size * np.abs(x - x.mean(0)).max()


def test_saved_can_be_used_twice_and_keeps_x_itself(machine):
    x, dy = np.random.default_rng(24).normal(size=(2, 6, 3)).astype("float32")
    _, saved = cubn.batch_norm(x, np.ones(3, "float32"))
    first, second = (cubn.batch_norm_backward(dy, saved) for _ in range(2))
    np.testing.assert_array_equal(first.dx, second.dx)
    assert saved.x is x
    assert first.dbeta is None
    assert first.dresidual is None
    assert first.dgamma.dtype == "float32"


def test_without_activation_and_mask_the_residuals_gradient_is_dy_itself(machine):
    x, residual, dy = np.random.default_rng(25).normal(size=(3, 6, 3))
    _, saved = cubn.batch_norm(x, residual=residual)
    assert cubn.batch_norm_backward(dy, saved).dresidual is dy


def test_a_changed_residual_does_not_change_the_gradient_afterwards(machine):
    """Residual streams are updated in place; where ReLU let the gradient pass was decided in the forward pass."""
    x, residual, dy = np.random.default_rng(26).normal(size=(3, 6, 3))
    _, saved = cubn.batch_norm(x, residual=residual, activation="relu")
    before = cubn.batch_norm_backward(dy, saved).dx
    residual -= 100
    np.testing.assert_array_equal(cubn.batch_norm_backward(dy, saved).dx, before)
