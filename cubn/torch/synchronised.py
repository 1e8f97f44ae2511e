"""`SyncBatchNorm`: one batch over all processes of a `torch.distributed` group."""

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

import cubn.sync
from cubn.sync import Sync
from cubn.torch.autograd import normalise
from cubn.torch.functional import require_positive
from cubn.torch.layers import Layer
from cubn.torch.passes import Options

_ranks: "WeakKeyDictionary[Any, Sync]" = WeakKeyDictionary()
"""Process group -> its ranks as cubn meets them: one for all layers, because it learns their sequence."""


class SyncBatchNorm(Layer, torch.nn.SyncBatchNorm):
    """`torch.nn.SyncBatchNorm`, computed by cubn: the statistics are those of the batch over all processes.

    Takes CPU tensors too, over gloo.  Shares of the batch may differ, and be empty.  Every rank sends float64 moments
    in one all-gather forward and two sums in one backward, and all merge them in rank order, so that they hold
    the same bits.  Without a process group, with one process, and in evaluation it is `BatchNorm2d` for any rank.

    Under `torch.compile` the graph is broken where the ranks meet.  Gradients of gradients raise an error.

    Examples
    --------
    >>> import torch, cubn.torch
    >>> bn = cubn.torch.SyncBatchNorm(3)
    >>> isinstance(bn, torch.nn.SyncBatchNorm), bn(torch.randn(8, 3)).shape      # one process: its own batch
    (True, torch.Size([8, 3]))
    """

    def _require_trainable(self, input: Tensor) -> None:
        self._check_non_zero_input_channels(input)
        if self._group() is None:
            super()._require_trainable(input)
        else:
            require_positive(self.eps)

    def _group(self) -> Any:
        """The processes to meet, None for this one alone."""
        distributed = torch.distributed
        if not (self.training and distributed.is_available() and distributed.is_initialized()):
            return None
        group = self.process_group or distributed.group.WORLD
        return group if distributed.get_world_size(group) > 1 else None

    def _compute(
        self,
        input: Tensor,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        by_batch: bool,
        momentum: float,
    ) -> Tensor:
        if self._group() is None:
            return super()._compute(input, residual, running_mean, running_var, by_batch, momentum)
        return self._together(input, residual, running_mean, running_var, momentum)

    @torch.compiler.disable
    def _together(
        self,
        input: Tensor,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
    ) -> Tensor:
        options = Options(True, momentum, self.eps, self.activation, ranks_of(self._group()))
        return normalise(input, self.weight, self.bias, residual, (running_mean, running_var), options)

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """Put a `cubn.torch.SyncBatchNorm` in the place of every batch norm, as PyTorch's method of this name."""
        converted: torch.nn.Module = torch.nn.SyncBatchNorm.convert_sync_batchnorm(module, process_group)
        for layer in converted.modules():
            if type(layer) is torch.nn.SyncBatchNorm:
                layer.__class__ = cls
        return converted


def ranks_of(group: Any) -> Sync:
    """The ranks of a process group."""
    if group not in _ranks:
        _ranks[group] = cubn.sync.torch(group)
    return _ranks[group]
