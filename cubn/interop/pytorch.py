"""State from and to PyTorch's layers and state dicts."""

from collections.abc import Mapping
from typing import Any

import numpy as np

import cubn
from cubn.interop.conventions import CONVENTIONS, State, fill, read, write
from cubn.namespace import Array

CONVENTION = CONVENTIONS["torch"]


def from_torch(source: Any, **options: Any) -> "cubn.BatchNorm":
    """A layer of cubn from one of PyTorch, or from its state dict.

    Parameters
    ----------
    source : torch.nn.BatchNorm1d, 2d, 3d, SyncBatchNorm, or mapping
        A mapping has the keys weight, bias, running_mean, running_var, num_batches_tracked; tensors or NumPy arrays.
    **options
        eps and momentum, where source is a mapping: a state dict has neither.

    Returns
    -------
    cubn.BatchNorm
        Of float64 if one of the arrays is, else of float32; in the mode of source.

    Raises
    ------
    TypeError, ValueError, ShapeError, DTypeError
        If source is no batch norm, has no running statistics, or its arrays do not go together.

    Examples
    --------
    >>> import numpy as np
    >>> from cubn.interop import from_torch
    >>> state = {"running_mean": np.array([1.0, 2.0]), "running_var": np.array([4.0, 9.0])}
    >>> from_torch(state, eps=0.0).eval()(np.array([[3.0, 5.0]]))
    array([[1., 1.]])
    """
    if isinstance(source, Mapping):
        return read(CONVENTION, {key: as_numpy(values) for key, values in source.items()}, options)
    _require_layer(source)
    arrays = {path[0]: as_numpy(getattr(source, path[0])) for path in CONVENTION.arrays.values()}
    arrays["num_batches_tracked"] = as_numpy(source.num_batches_tracked)
    layer = read(CONVENTION, arrays, {"eps": source.eps, "momentum": source.momentum, **options})
    return layer.train(source.training)


def to_torch(layer: "cubn.BatchNorm", into: Any = None) -> Any:
    """The state of a layer as PyTorch writes it down, or written into a layer of PyTorch.

    Parameters
    ----------
    layer : cubn.BatchNorm
    into : torch.nn.BatchNorm1d, 2d, 3d or SyncBatchNorm, optional
        Gets the arrays in place, eps, momentum and the mode.  Its dtype must hold the numbers.

    Returns
    -------
    State or the layer
        (arrays, options) without `into`; `into` itself with it.

    Raises
    ------
    TypeError, ValueError, ShapeError, DTypeError
        If the state has no place there.  Then nothing was changed.

    Examples
    --------
    >>> import cubn
    >>> arrays, options = cubn.interop.to_torch(cubn.BatchNorm(2, momentum=0.25))
    >>> list(arrays), options
    (['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'], {'eps': 1e-05, 'momentum': 0.25})
    """
    state = write(CONVENTION, layer)
    if into is None:
        return State(*state)
    _require_layer(into)
    import torch

    tensors = {own: getattr(into, path[0]) for own, path in CONVENTION.arrays.items()}

    def assign(own: str, values: Array) -> None:
        with torch.no_grad():
            tensors[own].copy_(torch.from_numpy(np.ascontiguousarray(values)))

    places = {
        own: None if tensor is None else (tuple(tensor.shape), str(tensor.dtype).rpartition(".")[2])
        for own, tensor in tensors.items()
    }
    fill(CONVENTION, layer, places, assign)
    if into.num_batches_tracked is not None:
        into.num_batches_tracked.fill_(layer.num_batches_tracked)
    into.eps, into.momentum = state.options["eps"], state.options["momentum"]
    return into.train(layer.training)


def as_numpy(values: Any) -> Any:
    """A tensor or array as NumPy's, bfloat16 widened; None stays."""
    if values is None or not hasattr(values, "detach"):
        return values
    tensor = values.detach().cpu()
    return (tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor).numpy()


def _require_layer(layer: Any) -> None:
    missing = [name for name in ("running_mean", "running_var", "weight", "bias", "eps") if not hasattr(layer, name)]
    normalises = any(kind.__name__ == "_BatchNorm" or kind.__name__ == "_NormBase" for kind in type(layer).__mro__)
    if missing or not normalises or type(layer).__name__.startswith("InstanceNorm"):
        raise TypeError(
            f"a {type(layer).__name__} is no batch norm of PyTorch; pass a BatchNorm1d, 2d, 3d, a SyncBatchNorm, or a "
            f"mapping with their keys."
        )
