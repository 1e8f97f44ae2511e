"""What other libraries call the numbers of a batch-norm layer, and what they mean by them: the one table.

Everything in `cubn.interop` is made from `CONVENTIONS`.  Values are copied, never rescaled, so that a layer computes
the same inference on either side and comes back with the same bits.  What cannot be copied is said: whether a
running variance was averaged from biased or unbiased variances depends on the batches that went by, and matters
only to who goes on training.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from math import isfinite
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

import cubn
from cubn.errors import DTypeError, ShapeError
from cubn.namespace import STATISTICS_DTYPE, Array, dtype_name

Path = tuple[str, ...]
"""Where an array lies in a library's (nested) dictionary."""

NEUTRAL = {"gamma": 1.0, "beta": 0.0}
"""What a missing array stands for."""


@dataclass(frozen=True)
class Convention:
    """How one library writes a batch-norm layer down.

    Attributes
    ----------
    library : str
        For messages.
    arrays : dict of str to Path
        cubn's name -> theirs, in the order of their arguments.
    eps, momentum, axis : str or None
        Their names of the options; None where an option cannot be chosen.
    defaults : dict
        Of those options, in their meaning.
    weight_of_old : bool
        Their momentum is the weight of the old value; cubn's is that of the new batch.
    unbiased : bool
        Their running variance is averaged from unbiased variances, as cubn's.
    counter : Path or None
        Where they count batches.
    """

    library: str
    arrays: Mapping[str, Path]
    eps: str
    momentum: str
    axis: str | None
    defaults: Mapping[str, Any]
    weight_of_old: bool
    unbiased: bool
    counter: Path | None = None


CONVENTIONS = {
    "torch": Convention(
        library="PyTorch",
        arrays={
            "gamma": ("weight",),
            "beta": ("bias",),
            "running_mean": ("running_mean",),
            "running_var": ("running_var",),
        },
        eps="eps",
        momentum="momentum",
        axis=None,
        defaults={"eps": 1e-5, "momentum": 0.1},
        weight_of_old=False,
        unbiased=True,
        counter=("num_batches_tracked",),
    ),
    "keras": Convention(
        library="Keras",
        arrays={
            "gamma": ("gamma",),
            "beta": ("beta",),
            "running_mean": ("moving_mean",),
            "running_var": ("moving_variance",),
        },
        eps="epsilon",
        momentum="momentum",
        axis="axis",
        defaults={"epsilon": 1e-3, "momentum": 0.99, "axis": -1},
        weight_of_old=True,
        unbiased=False,
    ),
    "flax": Convention(
        library="Flax",
        arrays={
            "gamma": ("params", "scale"),
            "beta": ("params", "bias"),
            "running_mean": ("batch_stats", "mean"),
            "running_var": ("batch_stats", "var"),
        },
        eps="epsilon",
        momentum="momentum",
        axis="axis",
        defaults={"epsilon": 1e-5, "momentum": 0.99, "axis": -1},
        weight_of_old=True,
        unbiased=False,
    ),
    "onnx": Convention(
        library="ONNX",
        arrays={
            "gamma": ("scale",),
            "beta": ("B",),
            "running_mean": ("input_mean",),
            "running_var": ("input_var",),
        },
        eps="epsilon",
        momentum="momentum",
        axis=None,
        defaults={"epsilon": 1e-5, "momentum": 0.9},
        weight_of_old=True,
        unbiased=False,
    ),
}
"""Library -> its convention."""


class State(NamedTuple):
    """A layer as another library would write it down.

    Attributes
    ----------
    arrays : dict
        NumPy arrays by the library's names, nested as the library nests them.
    options : dict
        By the library's names and in its meaning, for the constructor of its layer.
    """

    arrays: dict[str, Any]
    options: dict[str, Any]


def read(convention: Convention, arrays: Mapping[str, Any], options: Mapping[str, Any]) -> "cubn.BatchNorm":
    """A layer from arrays and options by the library's names; both are checked before anything is made."""
    unknown = set(options) - set(convention.defaults)
    if unknown:
        raise TypeError(
            f"{min(unknown)} is no option of a batch norm of {convention.library}; "
            f"pass {', '.join(convention.defaults)}, as its layer has them."
        )
    taken = {**convention.defaults, **options}
    found = {own: _dig(arrays, path) for own, path in convention.arrays.items()}
    for own in ("running_mean", "running_var"):
        if found[own] is None:
            raise ValueError(
                f"the state has no {'.'.join(convention.arrays[own])}, but cubn's layer is made for inference with "
                f"running statistics; pass a layer that tracks them."
            )
    left = _leaves(arrays) - {*convention.arrays.values(), convention.counter}
    if left:
        raise ValueError(
            f"the state has {'.'.join(min(left))}, but a batch norm of {convention.library} holds "
            f"{', '.join('.'.join(path) for path in convention.arrays.values())}; pass the state of one layer."
        )
    numbers = {own: _floating(own, values) for own, values in found.items() if values is not None}
    shape = numbers["running_mean"].shape
    for own, values in numbers.items():
        if values.shape != shape:
            raise ShapeError(
                f"{'.'.join(convention.arrays[own])} has shape {values.shape}, but "
                f"{'.'.join(convention.arrays['running_mean'])} has shape {shape}; pass the arrays of one layer."
            )
    axis = taken[convention.axis] if convention.axis else 1
    axis = tuple(axis) if isinstance(axis, list | tuple) else axis
    wide = any(STATISTICS_DTYPE[dtype_name(values.dtype)] == "float64" for values in numbers.values())
    layer = cubn.BatchNorm(
        shape if isinstance(axis, tuple) else int(np.prod(shape)),
        channel_axis=axis,
        eps=taken[convention.eps],
        momentum=None,
        affine="gamma" in numbers or "beta" in numbers,
        dtype="float64" if wide else "float32",
    )
    momentum = taken[convention.momentum]
    layer.momentum = complement(momentum) if convention.weight_of_old else _share(momentum)
    state = layer.state_dict()
    for own in state:
        if own in numbers:
            state[own] = numbers[own].astype(layer.dtype)
    batches = None if convention.counter is None else _dig(arrays, convention.counter)
    if batches is not None:
        state["num_batches_tracked"] = int(np.asarray(batches))
    layer.load_state_dict(state)
    return layer


def write(convention: Convention, layer: "cubn.BatchNorm") -> State:
    """The layer's arrays and options by the library's names."""
    state = on_host(layer)
    if "running_mean" not in state:
        raise ValueError(
            f"this layer has track_running_stats=False, but a batch norm of {convention.library} is written down with "
            f"running statistics; make one that tracks them."
        )
    arrays: dict[str, Any] = {}
    for own, path in convention.arrays.items():
        if own in state:
            _place(arrays, path, state[own])
    if convention.counter is not None:
        _place(arrays, convention.counter, np.asarray(layer.num_batches_tracked, np.int64))
    options: dict[str, Any] = {convention.eps: layer.eps}
    if not convention.weight_of_old:
        options[convention.momentum] = layer.momentum
    elif layer.momentum is not None:  # None averages over all batches alike, which only PyTorch has a word for
        options[convention.momentum] = complement(layer.momentum)
    if convention.axis is not None:
        options[convention.axis] = layer.channel_axis
    elif isinstance(layer.channel_axis, tuple):  # of a single one, only its place in x differs, not its numbers
        raise ValueError(
            f"this layer has channel_axis={layer.channel_axis}, but {convention.library} keeps one axis; "
            f"pass a layer with one."
        )
    return State(arrays, options)


def fill(
    convention: Convention,
    layer: "cubn.BatchNorm",
    places: Mapping[str, tuple[tuple[int, ...], str] | None],
    assign: Callable[[str, Array], None],
) -> None:
    """Write a layer's arrays into a library's object, or raise and change nothing.

    `places` says of cubn's names what shape and dtype their place there has, None where there is no such place; what
    has no place must be what its absence stands for.  `assign` puts an array into its place.
    """
    state = on_host(layer)
    values = {}
    for own, place in places.items():
        path = ".".join(convention.arrays[own])
        given = state.get(own)
        if place is None:
            if own in NEUTRAL and given is not None and not (given == NEUTRAL[own]).all():
                raise ValueError(
                    f"{own} is not {NEUTRAL[own]:g} throughout, but the layer of {convention.library} has no {path}; "
                    f"pass one that has."
                )
            if own not in NEUTRAL:
                raise ValueError(
                    f"the layer of {convention.library} has no {path}, but running statistics go there; "
                    f"pass one that tracks them."
                )
            continue
        shape, dtype = place
        if given is None:
            if own not in NEUTRAL:
                raise ValueError(f"this layer has track_running_stats=False, but {path} is asked of it; make another.")
            given = np.full(shape, NEUTRAL[own], layer.dtype)
        if given.shape != shape:
            raise ShapeError(
                f"{own} has shape {given.shape}, but {path} has shape {shape}; pass a layer of the same features."
            )
        if dtype != layer.dtype and not _survives(given, dtype):
            raise DTypeError(
                f"{own} holds numbers of {layer.dtype} that {path} of {dtype} cannot hold; "
                f"pass a layer of {layer.dtype}."
            )
        values[own] = given
    for own, given in values.items():
        assign(own, given)


def on_host(layer: "cubn.BatchNorm") -> dict[str, Any]:
    """The layer's arrays in NumPy, by cubn's names."""
    if not isinstance(layer, cubn.BatchNorm):
        raise TypeError(
            f"layer is a {type(layer).__name__}, but what is written is a layer of cubn; pass a cubn.BatchNorm."
        )
    return {
        own: values.get() if hasattr(values, "get") else values
        for own, values in layer.state_dict().items()
        if own != "num_batches_tracked"
    }


def complement(momentum: Any) -> float:
    """1 - momentum, in decimal, so that 0.1 and 0.9 are each other's.

    Examples
    --------
    >>> from cubn.interop.conventions import complement
    >>> complement(0.9), complement(complement(0.1)), 1 - (1 - 0.1)
    (0.1, 0.1, 0.09999999999999998)
    """
    return float(1 - Decimal(repr(_share(momentum))))


def _share(momentum: Any) -> Any:
    """Between 0 and 1, or PyTorch's None."""
    if momentum is None:
        return None
    if isinstance(momentum, bool) or not isinstance(momentum, Real) or not 0 <= float(momentum) <= 1:
        raise ValueError(
            f"momentum is {momentum!r}, but it is a weight in the running statistics; pass a number from 0 to 1."
        )
    assert isfinite(float(momentum))
    return float(momentum)


def _survives(values: Array, dtype: str) -> bool:
    """True if a narrower dtype holds these numbers."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
        return bool((bits & 0xFFFF == 0).all() and (bits.view(np.float32) == values).all())
    with np.errstate(over="ignore"):
        return bool(np.array_equal(values.astype(dtype).astype(values.dtype), values, equal_nan=True))


def _floating(own: str, values: Any) -> Any:
    array = np.asarray(values)
    if dtype_name(array.dtype) not in STATISTICS_DTYPE:
        raise DTypeError(f"{own} has dtype {dtype_name(array.dtype)}, but it holds real numbers; pass floats.")
    return array


def _dig(arrays: Mapping[str, Any], path: Path) -> Any:
    found: Any = arrays
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _place(arrays: dict[str, Any], path: Path, values: Any) -> None:
    for key in path[:-1]:
        arrays = arrays.setdefault(key, {})
    arrays[path[-1]] = values


def _leaves(arrays: Mapping[str, Any], before: Path = ()) -> set[Path]:
    found = set()
    for key, value in arrays.items():
        here = (*before, str(key))
        if isinstance(value, Mapping):
            found |= _leaves(value, here)
        elif value is not None:
            found.add(here)
    return found
