"""State from and to the BatchNormalization nodes of an ONNX model."""

from collections.abc import Mapping
from typing import Any

import numpy as np

import cubn
from cubn.interop.conventions import CONVENTIONS, State, fill, read, write
from cubn.namespace import Array

CONVENTION = CONVENTIONS["onnx"]


def from_onnx(source: Any, node: str | None = None, **options: Any) -> "cubn.BatchNorm":
    """A layer of cubn from a BatchNormalization node of an ONNX model, or from its inputs by name.

    Parameters
    ----------
    source : onnx.ModelProto, onnx.GraphProto, or mapping
        A mapping has the keys scale, B, input_mean, input_var: the names of the operator's inputs after x, in order.
    node : str, optional
        Name of the node, or of its first output.  Needed where a model has several.
    **options
        epsilon and momentum (the weight of the *old* value), where source is a mapping.

    Returns
    -------
    cubn.BatchNorm

    Raises
    ------
    TypeError, ValueError, ShapeError, DTypeError
        If there is no such node, or its inputs are computed and no initializers.

    Examples
    --------
    >>> import numpy as np
    >>> from cubn.interop import from_onnx
    >>> inputs = dict(scale=np.ones(2), B=np.zeros(2), input_mean=np.zeros(2), input_var=np.ones(2))
    >>> bn = from_onnx(inputs)
    >>> bn.eps, bn.momentum, bn.channel_axis
    (1e-05, 0.1, 1)
    """
    if isinstance(source, Mapping):
        return read(CONVENTION, {key: np.asarray(values) for key, values in source.items()}, options)
    graph, found = _find(source, node)
    import onnx

    tensors = _initializers(graph, found)
    arrays = {path[0]: onnx.numpy_helper.to_array(tensors[own]) for own, path in CONVENTION.arrays.items()}
    attributes = {attribute.name: _rounded(attribute.f) for attribute in found.attribute}
    taken = {name: attributes[name] for name in ("epsilon", "momentum") if name in attributes}
    return read(CONVENTION, arrays, {**taken, **options})


def to_onnx(layer: "cubn.BatchNorm", into: Any = None, node: str | None = None) -> Any:
    """The state of a layer as ONNX writes it down, or written into a BatchNormalization node of a model.

    Parameters
    ----------
    layer : cubn.BatchNorm
    into : onnx.ModelProto or onnx.GraphProto, optional
        Whose node gets the arrays and attributes, in place.
    node : str, optional
        As in `from_onnx`.

    Returns
    -------
    State or the model
        (arrays, options) without `into`: inputs of the operator in order, scale and B always, and its attributes.

    Raises
    ------
    TypeError, ValueError, ShapeError, DTypeError
        If the state has no place there, or an initializer is shared with another node.  Then nothing was changed.

    Examples
    --------
    >>> import cubn
    >>> arrays, options = cubn.interop.to_onnx(cubn.BatchNorm(2, affine=False))
    >>> list(arrays), arrays["scale"], options
    (['scale', 'B', 'input_mean', 'input_var'], array([1., 1.], dtype=float32), {'epsilon': 1e-05, 'momentum': 0.9})
    """
    state = write(CONVENTION, layer)
    if into is None:
        like = state.arrays["input_mean"]
        neutral = {"scale": np.ones_like(like), "B": np.zeros_like(like)}  # the operator demands all four
        return State(
            {path[0]: {**neutral, **state.arrays}[path[0]] for path in CONVENTION.arrays.values()}, state.options
        )
    graph, found = _find(into, node)
    import onnx

    tensors = _initializers(graph, found)
    for tensor in tensors.values():
        if sum(tensor.name in other.input for other in graph.node) > 1:
            raise ValueError(
                f"{tensor.name} is an input of several nodes, but it would change for all of them; "
                f"give the node initializers of its own."
            )
    places = {
        own: (tuple(tensor.dims), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name)
        for own, tensor in tensors.items()
    }

    def assign(own: str, values: Array) -> None:
        tensor = tensors[own]
        narrowed = values.astype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
        tensor.CopyFrom(onnx.numpy_helper.from_array(narrowed, tensor.name))

    fill(CONVENTION, layer, places, assign)
    kept = [attribute for attribute in found.attribute if attribute.name not in state.options]
    del found.attribute[:]
    found.attribute.extend([*kept, *(onnx.helper.make_attribute(key, value) for key, value in state.options.items())])
    return into


def _find(source: Any, node: str | None) -> tuple[Any, Any]:
    """The graph, and its batch norm of that name."""
    graph = getattr(source, "graph", source)
    if not hasattr(graph, "initializer"):
        raise TypeError(
            f"a {type(source).__name__} is no ONNX model; pass an onnx.ModelProto, or a mapping with scale, B, "
            f"input_mean and input_var."
        )
    nodes = [one for one in graph.node if one.op_type == "BatchNormalization"]
    chosen = nodes if node is None else [one for one in nodes if node in (one.name, *one.output[:1])]
    if len(chosen) != 1:
        names = ", ".join(repr(one.name or one.output[0]) for one in nodes) or "none"
        raise ValueError(
            f"node is {node!r}, but the model's batch norms are {names}; pass the name of one of them as node."
        )
    return graph, chosen[0]


def _initializers(graph: Any, node: Any) -> dict[str, Any]:
    """cubn's name -> the tensor that holds its numbers."""
    known = {tensor.name: tensor for tensor in graph.initializer}
    found = {}
    for own, name in zip(CONVENTION.arrays, node.input[1:5], strict=True):
        if name not in known:
            raise ValueError(
                f"{name} is computed by the model or passed to it, but only what lies in the model can be taken; "
                f"pass a mapping of arrays."
            )
        found[own] = known[name]
    return found


def _rounded(value: float) -> float:
    """An attribute is float32; the shortest decimal number that it stands for is what was written."""
    return float(str(np.float32(value)))
