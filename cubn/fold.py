"""Inference as one affine map, and that map folded into the layer before it."""

from typing import Any, NamedTuple

import numpy as np

from cubn.errors import DTypeError, ShapeError
from cubn.moments import reciprocal_std
from cubn.namespace import (
    STATISTICS_DTYPE,
    Array,
    Library,
    adopt,
    dtype_name,
    is_array,
    require_same_library,
    widest_float,
)
from cubn.problem import require_eps, require_variance


class Affine(NamedTuple):
    """y = scale * x + shift, per channel."""

    scale: Array
    shift: Array


class Folded(NamedTuple):
    """Weight and bias of a layer that includes its batch normalisation."""

    weight: Array
    bias: Array


def fold(
    mean: Array, var: Array, gamma: Array | None = None, beta: Array | None = None, *, eps: float = 1e-5
) -> Affine:
    """Inference as one affine map per channel (Ioffe & Szegedy 2015, Algorithm 2, step 11).

        scale = gamma * (var + eps) ** -1/2,    shift = beta - mean * scale

    Computed in float64 and rounded once.  Where |mean| is much larger than the standard deviation,
    ``scale * x + shift`` loses digits that `batch_norm_inference` keeps.

    Parameters
    ----------
    mean, var : array (C,) or of the shape of the kept axes
        Of the population.
    gamma, beta : array like mean, optional
        None is 1 and 0.
    eps : float
        As in the layer that was trained.

    Returns
    -------
    scale, shift : array like mean
        float64 for float64 statistics, else float32.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, ValueError
        If the arrays do not go together or eps cannot be used.

    Examples
    --------
    >>> import cubn
    >>> cubn.fold(mean=[2.0], var=[4.0], gamma=[6.0], beta=[1.0], eps=0.0)
    Affine(scale=array([3.]), shift=array([-5.]))
    """
    scale, shift, mean, _ = _fold_wide(mean, var, gamma, beta, eps)
    dtype = getattr(scale[1], STATISTICS_DTYPE[dtype_name(mean.dtype)])
    xp = scale[1]
    return Affine(xp.astype(scale[0], dtype), xp.astype(shift, dtype))


def fold_into(
    weight: Array,
    bias: Array | None,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    eps: float = 1e-5,
    out_axis: int = 0,
) -> Folded:
    """Fold a batch normalisation into the dense or convolutional layer before it.

        weight' = weight * scale,    bias' = (bias - mean) * scale + beta,    scale = gamma * (var + eps) ** -1/2

    Parameters
    ----------
    weight : array
        With one axis of C output features: (C, C_in, kh, kw) with ``out_axis=0``, (C_in, C) with ``out_axis=-1``.
    bias : array (C,) or None
        None is 0.
    mean, var, gamma, beta : array (C,)
        As in `fold`.
    eps : float
        As in the layer that was trained.
    out_axis : int
        The axis of `weight` that runs over output features.

    Returns
    -------
    weight, bias : array
        New arrays with the dtype of `weight`.  The bias exists even where there was none.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, ValueError
        If the arrays do not go together.

    Examples
    --------
    >>> import numpy as np, cubn
    >>> weight = np.array([[1.0, 2.0]])                  # one output, two inputs
    >>> cubn.fold_into(weight, None, mean=[2.0], var=[4.0], eps=0.0)
    Folded(weight=array([[0.5, 1. ]]), bias=array([-1.]))
    """
    weight, library = adopt(weight, "weight")
    if dtype_name(weight.dtype) not in STATISTICS_DTYPE:
        raise DTypeError(
            f"weight has dtype {dtype_name(weight.dtype)}, but a layer's weight is floating; "
            f"pass it as float16, bfloat16, float32 or float64."
        )
    rank = len(weight.shape)
    if not (hasattr(out_axis, "__index__") and -rank <= out_axis < rank):
        raise ShapeError(
            f"out_axis is {out_axis!r}, but weight has shape {tuple(weight.shape)}; "
            f"pass the axis of weight that runs over output features, from {-rank} to {rank - 1}."
        )
    out_axis %= rank
    (scale, xp), _, mean, beta = _fold_wide(mean, var, gamma, beta, eps)
    require_same_library("mean", mean, library, "weight")
    channels = weight.shape[out_axis]
    if tuple(scale.shape) != (channels,):
        raise ShapeError(
            f"mean has shape {tuple(mean.shape)}, but weight of shape {tuple(weight.shape)} has {channels} output "
            f"features along out_axis={out_axis}; pass statistics of shape ({channels},), or another out_axis."
        )
    before = -xp.astype(mean, scale.dtype)
    if bias is not None:
        before = before + _wide_like("bias", bias, mean, library)
    along = tuple(channels if axis == out_axis else 1 for axis in range(rank))
    with np.errstate(all="ignore"):  # what a narrow weight cannot hold is infinite in it, as everywhere
        new_bias = before * scale
        if beta is not None:
            new_bias = new_bias + beta
        new_weight = xp.astype(weight, scale.dtype) * xp.reshape(scale, along)
        return Folded(xp.astype(new_weight, weight.dtype), xp.astype(new_bias, weight.dtype))


def _fold_wide(
    mean: Array, var: Array, gamma: Array | None, beta: Array | None, eps: float
) -> tuple[tuple[Array, Any], Array, Array, Array | None]:
    """(scale, namespace), shift, mean as an array, beta: wide."""
    require_eps(eps)
    mean, library = adopt(mean, "mean")
    if dtype_name(mean.dtype) not in STATISTICS_DTYPE:
        raise DTypeError(
            f"mean has dtype {dtype_name(mean.dtype)}, but statistics are floating; pass it as float32 or float64."
        )
    wide_var = _wide_like("var", var, mean, library)
    require_variance(wide_var, library)
    with np.errstate(all="ignore"):
        scale = reciprocal_std(wide_var, eps)
        if gamma is not None:
            scale = scale * _wide_like("gamma", gamma, mean, library)
        shift = -library.xp.astype(mean, scale.dtype) * scale
        if beta is not None:
            beta = _wide_like("beta", beta, mean, library)
            shift = shift + beta
    return (scale, library.xp), shift, mean, beta


def _wide_like(name: str, values: Array, mean: Array, library: Library) -> Array:
    if is_array(values):
        values, _ = adopt(values, name)
        require_same_library(name, values, library, "mean")
        if dtype_name(values.dtype) not in STATISTICS_DTYPE:
            raise DTypeError(
                f"{name} has dtype {dtype_name(values.dtype)}, but what goes with a mean is floating; "
                f"pass {name} as float32 or float64."
            )
    else:
        values = library.asarray(values)
    if tuple(values.shape) != tuple(mean.shape):
        raise ShapeError(
            f"{name} has shape {tuple(values.shape)}, but mean has shape {tuple(mean.shape)}; "
            f"pass one number per channel in each."
        )
    return library.xp.astype(values, widest_float(library))
