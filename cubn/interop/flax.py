"""State from and to Flax: the variables of `flax.linen.BatchNorm`, and `flax.nnx.BatchNorm` itself."""

from collections.abc import Mapping
from typing import Any

import numpy as np

import cubn
from cubn.interop.conventions import CONVENTIONS, State, fill, read, write
from cubn.namespace import Array

CONVENTION = CONVENTIONS["flax"]


def from_flax(source: Any, **options: Any) -> "cubn.BatchNorm":
    """A layer of cubn from one of Flax, or from its variables.

    Parameters
    ----------
    source : flax.nnx.BatchNorm, or mapping
        A mapping has the variables of `flax.linen.BatchNorm`: {"params": {"scale", "bias"}, "batch_stats": {"mean",
        "var"}}.
    **options
        epsilon, momentum (the weight of the *old* value) and axis, where source is a mapping: those of the module.

    Returns
    -------
    cubn.BatchNorm
        With the complement of their momentum, and their running variance, number for number (they average biased
        variances).

    Raises
    ------
    TypeError, ValueError, ShapeError, DTypeError
        If source is no batch norm, has no running statistics, or its arrays do not go together.

    Examples
    --------
    >>> import numpy as np
    >>> from cubn.interop import from_flax
    >>> bn = from_flax({"batch_stats": {"mean": np.zeros(2), "var": np.ones(2)}}, momentum=0.9)
    >>> bn.eps, bn.momentum, bn.affine
    (1e-05, 0.1, False)
    """
    if isinstance(source, Mapping):
        return read(CONVENTION, _plain(source), options)
    _require_layer(source)
    arrays: dict[str, Any] = {}
    for collection, name in CONVENTION.arrays.values():
        arrays.setdefault(collection, {})[name] = _value(getattr(source, name))
    taken = {"epsilon": source.epsilon, "momentum": source.momentum, "axis": source.axis, **options}
    return read(CONVENTION, arrays, taken)


def to_flax(layer: "cubn.BatchNorm", into: Any = None) -> Any:
    """The state of a layer as Flax writes it down, or written into a layer of `flax.nnx`.

    Parameters
    ----------
    layer : cubn.BatchNorm
    into : flax.nnx.BatchNorm, optional
        Gets the arrays, epsilon and momentum; its axis stays.

    Returns
    -------
    State or the layer
        (arrays, options) without `into`, where arrays are the variables of `flax.linen.BatchNorm`; `into` with it.

    Raises
    ------
    TypeError, ValueError, ShapeError, DTypeError
        If the state has no place there.  Then nothing was changed.

    Examples
    --------
    >>> import cubn
    >>> variables, options = cubn.interop.to_flax(cubn.BatchNorm(2, channel_axis=-1))
    >>> {collection: list(arrays) for collection, arrays in variables.items()}
    {'params': ['scale', 'bias'], 'batch_stats': ['mean', 'var']}
    >>> options
    {'epsilon': 1e-05, 'momentum': 0.9, 'axis': -1}
    """
    state = write(CONVENTION, layer)
    if into is None:
        return State(*state)
    _require_layer(into)
    variables = {own: getattr(into, path[1]) for own, path in CONVENTION.arrays.items()}
    current = {own: _value(variable) for own, variable in variables.items()}

    def assign(own: str, values: Array) -> None:
        like = variables[own].get_value()
        import jax

        variables[own].set_value(jax.numpy.asarray(values, dtype=like.dtype))

    places = {
        own: None if values is None else (tuple(values.shape), str(values.dtype)) for own, values in current.items()
    }
    fill(CONVENTION, layer, places, assign)
    into.epsilon = state.options["epsilon"]
    into.momentum = state.options.get("momentum", into.momentum)
    return into


def _plain(source: Any) -> Any:
    """Nested mappings of arrays as NumPy's."""
    if isinstance(source, Mapping):
        return {key: _plain(value) for key, value in source.items()}
    return np.asarray(source)


def _value(variable: Any) -> Any:
    if variable is None:
        return None
    value = variable.get_value() if hasattr(variable, "get_value") else variable
    return None if value is None else np.asarray(value)


def _require_layer(layer: Any) -> None:
    if type(layer).__name__ != "BatchNorm" or not hasattr(layer, "use_running_average") or not hasattr(layer, "var"):
        hint = ", whose variables are apart from it; pass those" if hasattr(layer, "use_running_average") else ""
        raise TypeError(
            f"a {type(layer).__name__} is no batch norm with state{hint}; "
            f"pass a flax.nnx.BatchNorm, or the variables of a flax.linen.BatchNorm."
        )
