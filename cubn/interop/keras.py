"""State from and to Keras' layer and its weights."""

from collections.abc import Mapping
from typing import Any

import numpy as np

import cubn
from cubn.interop.conventions import CONVENTIONS, State, fill, read, write
from cubn.namespace import Array

CONVENTION = CONVENTIONS["keras"]


def from_keras(source: Any, **options: Any) -> "cubn.BatchNorm":
    """A layer of cubn from one of Keras, or from its weights by name.

    Parameters
    ----------
    source : keras.layers.BatchNormalization, or mapping
        A mapping has the keys gamma, beta, moving_mean, moving_variance.
    **options
        epsilon, momentum (the weight of the *old* value) and axis, where source is a mapping.

    Returns
    -------
    cubn.BatchNorm
        With the complement of their momentum.  Its running variance is theirs, number for number: they average
        biased variances, so that in further training it would move towards a slightly larger value.

    Raises
    ------
    TypeError, ValueError, ShapeError, DTypeError
        If source is no batch norm, is not built, or its arrays do not go together.

    Examples
    --------
    >>> import numpy as np
    >>> from cubn.interop import from_keras
    >>> bn = from_keras({"moving_mean": np.zeros(2), "moving_variance": np.ones(2)}, momentum=0.9)
    >>> bn.eps, bn.momentum, bn.channel_axis
    (0.001, 0.1, -1)
    """
    if isinstance(source, Mapping):
        return read(CONVENTION, {key: as_numpy(values) for key, values in source.items()}, options)
    _require_layer(source)
    arrays = {path[0]: as_numpy(getattr(source, path[0], None)) for path in CONVENTION.arrays.values()}
    axis = source.axis[0] if isinstance(source.axis, list | tuple) and len(source.axis) == 1 else source.axis
    return read(CONVENTION, arrays, {"epsilon": source.epsilon, "momentum": source.momentum, "axis": axis, **options})


def to_keras(layer: "cubn.BatchNorm", into: Any = None) -> Any:
    """The state of a layer as Keras writes it down, or written into a layer of Keras.

    Parameters
    ----------
    layer : cubn.BatchNorm
    into : keras.layers.BatchNormalization, optional
        A built layer.  Gets the weights, epsilon and momentum; its axis stays.

    Returns
    -------
    State or the layer
        (arrays, options) without `into`; `into` itself with it.  The order of the arrays is that of `set_weights`.

    Raises
    ------
    TypeError, ValueError, ShapeError, DTypeError
        If the state has no place there.  Then nothing was changed.

    Examples
    --------
    >>> import cubn
    >>> arrays, options = cubn.interop.to_keras(cubn.BatchNorm(2, channel_axis=-1))
    >>> list(arrays), options
    (['gamma', 'beta', 'moving_mean', 'moving_variance'], {'epsilon': 1e-05, 'momentum': 0.9, 'axis': -1})
    """
    state = write(CONVENTION, layer)
    if into is None:
        return State(*state)
    _require_layer(into)
    variables: dict[str, Any] = {own: getattr(into, path[0], None) for own, path in CONVENTION.arrays.items()}

    def assign(own: str, values: Array) -> None:
        variables[own].assign(values)

    places = {
        own: None if variable is None else (tuple(variable.shape), str(variable.dtype))
        for own, variable in variables.items()
    }
    fill(CONVENTION, layer, places, assign)
    into.epsilon = state.options["epsilon"]
    into.momentum = state.options.get("momentum", into.momentum)
    return into


def as_numpy(values: Any) -> Any:
    """A variable of any backend as a NumPy array; None stays."""
    if values is None:
        return None
    value = getattr(values, "value", values)
    return np.asarray(value.detach().cpu() if hasattr(value, "detach") else value)


def _require_layer(layer: Any) -> None:
    if not any(kind.__name__ == "BatchNormalization" for kind in type(layer).__mro__):
        raise TypeError(
            f"a {type(layer).__name__} is no batch norm of Keras; pass a BatchNormalization, or a mapping of its "
            f"weights by name."
        )
    if getattr(layer, "renorm", False):
        raise ValueError("this layer renormalises, which cubn does not; pass one with renorm=False.")
    if not layer.built:
        raise ValueError("this layer is not built, so it has no weights yet; call it once, or build it.")
