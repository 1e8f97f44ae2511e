"""The batch norms of a whole network in a safetensors file, folded into the layers before them where names say so.

A file of weights has names and shapes, no order and no graph.  Two ways of naming say that a batch norm comes right
after a convolution or dense layer:

    stage.0.conv2, stage.0.bn2     the same name and number                    (torchvision, timm)
    downsample.0, downsample.1     neighbours in a Sequential                  (torchvision, timm, and by hand)

Both can mislead: pre-activation networks call the batch norm *before* ``conv1`` ``bn1``, and a list of modules is
numbered like a Sequential.  So shapes must bear a way of naming out, in the whole file: every pair must fit, and at
least one must fit at the output of its layer alone.  Where they do not, all layers named in this way are left alone.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from cubn.fold import fold_into
from cubn.interop.conventions import CONVENTIONS

KEYS = {own: path[0] for own, path in CONVENTIONS["torch"].arrays.items()}
COUNTER = "num_batches_tracked"
DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
"""Element types in the words of safetensors that a batch norm and its layer can have."""

NUMBERED = "the same name and number"
NEIGHBOURS = "neighbours in a Sequential"


@dataclass(frozen=True)
class Pair:
    """A batch norm and the layer that its name says is right before it."""

    norm: str
    layer: str
    naming: str


@dataclass(frozen=True)
class Plan:
    """What will be done with the batch norms of a file.

    Attributes
    ----------
    pairs : list of Pair
        To be folded.
    left : dict of str to str
        Batch norm that is left alone -> why.
    """

    pairs: list[Pair] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        count = len(self.pairs) + len(self.left)
        lines = [f"{count} batch norm{'s' * (count != 1)}: {len(self.pairs)} to fold, {len(self.left)} left alone"]
        lines += [f"  {pair.norm} into {pair.layer} ({pair.naming})" for pair in self.pairs]
        lines += [f"  {norm} left alone: {why}" for norm, why in self.left.items()]
        return "\n".join(lines)


def plan_folding(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str] | None = None) -> Plan:
    """Which batch norms can be folded into which layers, from names and shapes of all arrays of a network.

    Parameters
    ----------
    shapes : mapping of str to tuple of int
        Array -> its shape, with the names that a PyTorch state dict has.
    dtypes : mapping of str to str, optional
        Array -> its element type in the words of safetensors; floating ones can be folded.

    Returns
    -------
    Plan

    Examples
    --------
    >>> from cubn.interop import plan_folding
    >>> norm = ("weight", "bias", "running_mean", "running_var")
    >>> shapes = {"conv1.weight": (8, 3, 3, 3), **{f"bn1.{key}": (8,) for key in norm}}
    >>> print(plan_folding(shapes))
    1 batch norm: 1 to fold, 0 left alone
      bn1 into conv1 (the same name and number)
    """
    plan, candidates = Plan(), []
    for norm in _batch_norms(shapes):
        features = shapes[f"{norm}.{KEYS['running_mean']}"]
        why = _unusable(norm, features, shapes, dtypes)
        pair = None if why else _by_name(norm, shapes)
        if pair is None:
            plan.left[norm] = why or "no name says which layer is right before it"
        else:
            candidates.append(pair)
    for naming in (NUMBERED, NEIGHBOURS):
        named = [pair for pair in candidates if pair.naming == naming]
        doubt = _doubt(named, shapes)
        for pair in named:
            rivals = [other.norm for other in candidates if other.layer == pair.layer and other != pair]
            unfit = _unusable_layer(pair.layer, shapes, dtypes)
            if doubt or rivals or unfit:
                plan.left[pair.norm] = doubt or unfit or f"{', '.join(rivals)} would be folded into {pair.layer} too"
            else:
                plan.pairs.append(pair)
    plan.pairs.sort(key=lambda pair: _natural(pair.norm))
    return plan


def fold_safetensors(
    path: str | PathLike[str], output: str | PathLike[str] | None = None, *, eps: float = 1e-5
) -> Plan:
    """Fold the batch norms of a safetensors file into the layers before them, where names and shapes say which.

    Parameters
    ----------
    path : path
        Of weights as PyTorch names them.
    output : path, optional
        Where the folded weights go.  Without it nothing is written.  Written whole or not at all.
    eps : float
        Of the batch norms; a file of weights does not say.  PyTorch's default is 1e-5, Keras' 1e-3.

    Returns
    -------
    Plan
        What is folded, and what is left alone and why.

    Raises
    ------
    ValueError
        If the file is no safetensors file, or damaged, or an array cannot be folded.
    ImportError
        If safetensors is missing.

    Notes
    -----
    A folded layer has a bias, also where it had none, and its batch norm is gone: load the weights into a network whose
    batch norms are identities and whose layers before them have biases.  Arrays are computed in float64 and rounded
    once to the element type that they had; all others are written as they were read.
    """
    safetensors = _library()
    arrays, metadata = _read(safetensors, Path(path))
    plan = plan_folding(
        {name: tuple(entry["shape"]) for name, entry in arrays.items()},
        {name: entry["dtype"] for name, entry in arrays.items()},
    )
    if output is None:
        return plan
    for pair in plan.pairs:
        weight, bias = f"{pair.layer}.weight", f"{pair.layer}.bias"
        statistics = {own: _array(arrays.get(f"{pair.norm}.{key}")) for own, key in KEYS.items()}
        try:
            folded = fold_into(
                _array(arrays[weight]), _array(arrays.get(bias)), statistics["running_mean"], statistics["running_var"],
                statistics["gamma"], statistics["beta"], eps=eps,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(
                f"{pair.norm} cannot be folded into {pair.layer} ({error}); nothing was written."
            ) from error
        if not (
            np.isfinite(folded.weight.astype(np.float64)).all() and np.isfinite(folded.bias.astype(np.float64)).all()
        ):
            raise ValueError(
                f"{pair.norm} folded into {pair.layer} is not finite in {folded.weight.dtype.name}, but a weight is a "
                f"number; nothing was written: convert the file to float32 first."
            )
        kind = arrays[weight]["dtype"]
        arrays[weight] = {**arrays[weight], "data": folded.weight.tobytes()}
        arrays[bias] = {"dtype": kind, "shape": list(folded.bias.shape), "data": folded.bias.tobytes()}
        for key in (*KEYS.values(), COUNTER):
            arrays.pop(f"{pair.norm}.{key}", None)
    _write(Path(output), arrays, metadata)
    return plan


def _batch_norms(shapes: Mapping[str, Any]) -> list[str]:
    """Prefixes that hold running statistics, as people count."""
    mean = f".{KEYS['running_mean']}"
    found = [name.removesuffix(mean) for name in shapes if name.endswith(mean)]
    return sorted(found, key=_natural)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _unusable(
    norm: str, features: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str] | None
) -> str | None:
    """Why these arrays are not one batch norm."""
    if f"{norm}.{KEYS['running_var']}" not in shapes:
        return "it has a running_mean and no running_var"
    for key in KEYS.values():
        name = f"{norm}.{key}"
        if name not in shapes:
            continue
        if shapes[name] != features or len(features) != 1:
            return f"{key} has shape {shapes[name]} and running_mean {features}"
        if dtypes is not None and dtypes[name] not in DTYPES:
            return f"{key} is stored as {dtypes[name]}"
    extra = {
        name.removeprefix(f"{norm}.") for name in shapes if name.startswith(f"{norm}.")
    } - {*KEYS.values(), COUNTER}  # fmt: skip
    return f"it holds {min(extra)} as well" if extra else None


def _unusable_layer(layer: str, shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, str] | None) -> str | None:
    """Why nothing can be folded into these arrays."""
    weight, bias = f"{layer}.weight", f"{layer}.bias"
    extra = {name for name in shapes if name.startswith(f"{layer}.")} - {weight, bias}
    if extra:
        return f"{layer} is no plain layer: it holds {min(extra).removeprefix(f'{layer}.')} as well"
    for name in (weight, bias):
        if name in shapes and dtypes is not None and dtypes[name] not in DTYPES:
            return f"{name} is stored as {dtypes[name]}"
    if shapes.get(bias, shapes[weight][:1]) != shapes[weight][:1]:
        return f"{bias} has shape {shapes[bias]}"
    return None


def _by_name(norm: str, shapes: Mapping[str, tuple[int, ...]]) -> Pair | None:
    """The pair that a name makes with a layer of the file."""
    above, _, name = norm.rpartition(".")
    prefix = f"{above}." if above else ""
    numbered = re.fullmatch(r"bn(\d*)", name)
    if numbered:
        layer, naming = f"{prefix}conv{numbered[1]}", NUMBERED
    elif name.isdigit() and int(name) > 0:
        layer, naming = f"{prefix}{int(name) - 1}", NEIGHBOURS
    else:
        return None
    return Pair(norm, layer, naming) if len(shapes.get(f"{layer}.weight", ())) > 1 else None


def _doubt(named: list[Pair], shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Why the pairs of one way of naming are not what they seem."""
    borne_out = False
    for pair in named:
        weight = shapes[f"{pair.layer}.weight"]
        features = shapes[f"{pair.norm}.{KEYS['running_mean']}"][0]
        if weight[0] != features:
            return (
                f"{pair.norm} has {features} features and {pair.layer} {weight[0]} outputs, so that {pair.naming} "
                f"do not mean in this file that one follows the other"
            )
        borne_out = borne_out or weight[1] != features
    if named and not borne_out:
        return "it has as many features as its layer has inputs, so that it might as well come before it"
    return None


# The file


def _library() -> Any:
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(
            f"a safetensors file is read with safetensors, which cannot be imported ({error}); "
            f"pip install 'cubn[fold]'."
        ) from error
    return safetensors


def _read(safetensors: Any, path: Path) -> tuple[dict[str, dict[str, Any]], dict[str, str] | None]:
    """Name -> element type, shape and bytes; and the file's own notes."""
    try:
        data = path.read_bytes()
        arrays = dict(safetensors.deserialize(data))
        with safetensors.safe_open(path, framework="np") as file:
            metadata = file.metadata()
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}), so it is another kind of file or cut short; "
            f"pass a whole one."
        ) from error
    for name, entry in arrays.items():
        kind = DTYPES.get(entry["dtype"])
        if kind and len(entry["data"]) != prod(entry["shape"]) * _dtype(kind).itemsize:
            raise ValueError(f"{path} is damaged: {name} has not the bytes of its shape; pass a whole file.")
    return arrays, metadata


def _dtype(name: str) -> Any:
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as error:
        raise ImportError(
            f"the file holds bfloat16, which NumPy knows through ml_dtypes ({error}); pip install 'cubn[fold]'."
        ) from error
    return np.dtype(ml_dtypes.bfloat16)


def _array(entry: dict[str, Any] | None) -> Any:
    if entry is None:
        return None
    return np.frombuffer(entry["data"], _dtype(DTYPES[entry["dtype"]])).reshape(entry["shape"])


def _write(target: Path, arrays: Mapping[str, Mapping[str, Any]], metadata: dict[str, str] | None) -> None:
    """Beside the target, then into its place in one step.

    The format: the length of a header in eight bytes, the header in JSON, and the bytes of all arrays one after the
    other, those of the widest elements first, so that every one is aligned.
    """
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    names = sorted(arrays, key=lambda name: (-_width(arrays[name]["dtype"]), name))
    place = 0
    for name in names:
        entry, begin = arrays[name], place
        place += len(entry["data"])
        header[name] = {"dtype": entry["dtype"], "shape": list(entry["shape"]), "data_offsets": [begin, place]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                file.write(arrays[name]["data"])
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _width(dtype: str) -> int:
    """Bits of one element, by the number in its name."""
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8
