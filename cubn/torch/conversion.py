"""`convert` a model's batch-norm layers to cubn's, and `revert` them, in place."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from cubn.torch.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, BatchNormReLU
from cubn.torch.synchronised import SyncBatchNorm

LAYERS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.BatchNorm1d: BatchNorm1d,
    torch.nn.BatchNorm2d: BatchNorm2d,
    torch.nn.BatchNorm3d: BatchNorm3d,
    torch.nn.SyncBatchNorm: SyncBatchNorm,
}
"""PyTorch's layer -> cubn's.  The only such table."""

PLAIN = {own: theirs for theirs, own in LAYERS.items()}

HOOKS = (
    "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


@dataclass(frozen=True)
class Report:
    """What `convert` or `revert` has done, by the names of the layers in the model.

    Attributes
    ----------
    changed : dict of str to str
        Layer -> the class that it has now.
    fused : dict of str to str
        ReLU -> the layer before it that applies it now (`convert`) or no longer (`revert`).
    left : dict of str to str
        Batch-norm layer that was left alone -> why.
    """

    changed: dict[str, str] = field(default_factory=dict)
    fused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.changed)} layers changed, {len(self.fused)} ReLUs fused, {len(self.left)} left alone"]
        lines += [f"  {name or '(the model)'}: now {kind}" for name, kind in self.changed.items()]
        lines += [f"  {name}: part of {layer}" for name, layer in self.fused.items()]
        lines += [f"  {name or '(the model)'}: left alone, {why}" for name, why in self.left.items()]
        return "\n".join(lines)


class FusedReLU(torch.nn.Identity):
    """What stands where a ReLU stood that the layer before it now applies: the same place, and the ReLU itself."""

    def __init__(self, relu: torch.nn.ReLU, plain: type[torch.nn.Module]) -> None:
        super().__init__()
        self.training = relu.training
        self._kept = (relu, plain)  # in a tuple, so that it is no submodule

    def extra_repr(self) -> str:
        """Says where the ReLU is."""
        return "ReLU is applied by the layer before"


def convert(model: torch.nn.Module, *, fuse: bool = False) -> Report:
    """Let cubn compute every batch-norm layer of a model: each gets another class, in place.

    Parameters, buffers, hooks and mode are untouched, and so are the keys of `state_dict`, the optimiser and
    everybody who holds a layer.

    Parameters
    ----------
    model : Module
        Or a single layer.
    fuse : bool
        Also join every batch norm with the ReLU right after it in the same `torch.nn.Sequential`.  The ReLU's place
        is taken by an identity.  Whoever looks at the output of such a layer (a hook, a slice of the Sequential) then
        sees it after ReLU, which is why this is only done on request, and not for layers that have hooks.

    Returns
    -------
    Report
        What was changed, and what was left alone and why: layers whose class is not exactly PyTorch's own
        (subclasses, parametrised, lazy and scripted ones) or that have a `forward` of their own.

    Raises
    ------
    TypeError
        If `model` is no module.

    Examples
    --------
    >>> import torch, cubn.torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3), torch.nn.ReLU())
    >>> print(cubn.torch.convert(model))
    1 layers changed, 0 ReLUs fused, 0 left alone
      1: now BatchNorm1d
    >>> print(cubn.torch.convert(model, fuse=True))
    1 layers changed, 1 ReLUs fused, 0 left alone
      1: now BatchNormReLU
      2: part of 1
    >>> print(cubn.torch.revert(model))
    1 layers changed, 1 ReLUs fused, 0 left alone
      1: now BatchNorm1d
      2: part of 1
    >>> type(model[1])
    <class 'torch.nn.modules.batchnorm.BatchNorm1d'>
    """
    _require_module(model)
    report = Report()
    for name, module in model.named_modules():
        if type(module) in LAYERS:
            own = _forward_of_its_own(module)
            if own:
                report.left[name] = own
            else:
                _become(module, LAYERS[type(module)], name, report)
        elif isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and not _is_ours(module):
            report.left[name] = _why_not(module)
    if fuse:
        for name, sequence in list(model.named_modules()):
            for layer, relu in _pairs(sequence):
                _fuse(sequence, layer, relu, name, report)
    return report


def revert(model: torch.nn.Module) -> Report:
    """Give every layer that `convert` has changed its class back, and every fused ReLU its place.

    Layers that were made as cubn's become PyTorch's too where PyTorch has the same: all but `BatchNormReLU` and
    `BatchNormAddReLU`, which are left alone and listed.

    Parameters
    ----------
    model : Module
        Or a single layer.

    Returns
    -------
    Report

    Raises
    ------
    TypeError
        If `model` is no module.
    """
    _require_module(model)
    report = Report()
    for name, sequence in list(model.named_modules()):
        for key, child in list(sequence._modules.items()):
            if isinstance(child, FusedReLU):
                relu, plain = child._kept
                before = _before(sequence, key)
                relu.train(child.training)
                sequence._modules[key] = relu
                _become(sequence._modules[before], plain, _joined(name, before), report)
                report.fused[_joined(name, key)] = _joined(name, before)
    for name, module in model.named_modules():
        if type(module) in PLAIN:
            _become(module, PLAIN[type(module)], name, report)
        elif _is_ours(module):
            report.left[name] = f"PyTorch has no layer like {type(module).__name__}"
    return report


def _require_module(model: Any) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, but layers are found in modules; pass a torch.nn.Module.")


def _become(module: Any, kind: type[torch.nn.Module], name: str, report: Report) -> None:
    module.__class__ = kind
    report.changed[name] = kind.__name__


def _is_ours(module: torch.nn.Module) -> bool:
    return type(module) in PLAIN or type(module).__module__.startswith("cubn.torch")


def _forward_of_its_own(module: torch.nn.Module) -> str | None:
    if "forward" in vars(module):
        return "it has a forward of its own, which a change of class would not reach"
    return None


def _why_not(module: torch.nn.Module) -> str:
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "it is parametrised, and its class made for that; convert before parametrising"
    if isinstance(module, torch.nn.modules.lazy.LazyModuleMixin):
        return "it does not know its features yet; convert after the first batch"
    return f"{type(module).__name__} is a subclass, whose own rules cubn does not know"


def _pairs(sequence: torch.nn.Module) -> Iterator[tuple[str, str]]:
    """Keys of neighbours in a Sequential: a batch norm of cubn's that nobody listens to, and a ReLU likewise."""
    if type(sequence) is not torch.nn.Sequential:
        return
    keys = list(sequence._modules)
    for layer, relu in pairwise(keys):
        first, second = sequence._modules[layer], sequence._modules[relu]
        if type(first) not in (BatchNorm1d, BatchNorm2d, BatchNorm3d) or type(second) is not torch.nn.ReLU:
            continue
        if "forward" in vars(second) or any(vars(one).get(hooks) for one in (first, second) for hooks in HOOKS):
            continue
        yield layer, relu


def _fuse(sequence: torch.nn.Module, layer: str, relu: str, name: str, report: Report) -> None:
    first, second = sequence._modules[layer], sequence._modules[relu]
    assert isinstance(second, torch.nn.ReLU)
    sequence._modules[relu] = FusedReLU(second, PLAIN[type(first)])
    _become(first, BatchNormReLU, _joined(name, layer), report)
    report.fused[_joined(name, relu)] = _joined(name, layer)


def _before(sequence: torch.nn.Module, key: str) -> str:
    keys: list[str] = list(sequence._modules)
    return keys[keys.index(key) - 1]


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
