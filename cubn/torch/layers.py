"""PyTorch's batch-normalisation layers, computed by cubn."""

import torch
from torch import Tensor

from cubn.torch.functional import batch_norm, require_trainable


class Layer(torch.nn.modules.batchnorm._NormBase):
    """What all layers share: `forward` as PyTorch's, with its rules for buffers, counter and momentum."""

    activation: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Normalise: with the batch's statistics in training, with the running ones in evaluation."""
        return self._normalise(input, None)

    def _normalise(self, input: Tensor, residual: Tensor | None) -> Tensor:
        self._check_input_dim(input)
        training, tracks = self.training, self.track_running_stats
        running_mean, running_var = self.running_mean, self.running_var
        by_batch = training or (running_mean is None and running_var is None)
        if by_batch:
            self._require_trainable(input)  # before anything is counted
        if training and not tracks:
            running_mean = running_var = None
        momentum = self.momentum
        counter = self.num_batches_tracked if training and tracks else None
        if counter is not None:
            counter.add_(1)
        if momentum is None:
            if counter is not None and torch.compiler.is_compiling():
                return self._averaged(input, residual, counter)
            momentum = 0.0 if counter is None else 1.0 / float(counter)
        return self._compute(input, residual, running_mean, running_var, by_batch, momentum)

    def _require_trainable(self, input: Tensor) -> None:
        require_trainable(input, self.eps)

    def _compute(
        self,
        input: Tensor,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        by_batch: bool,
        momentum: float,
    ) -> Tensor:
        return batch_norm(
            input, running_mean, running_var, self.weight, self.bias, by_batch, momentum, self.eps,
            activation=self.activation, residual=residual,
        )  # fmt: skip

    def _averaged(self, input: Tensor, residual: Tensor | None, counter: Tensor) -> Tensor:
        """`momentum=None` without asking a tensor for its value, which would break the graph of a compiler."""
        mean, var = self.running_mean, self.running_var
        assert mean is not None
        assert var is not None
        batch_mean, batch_var = torch.zeros_like(mean), torch.zeros_like(var)
        y = self._compute(input, residual, batch_mean, batch_var, True, 1.0)
        if input.numel():
            with torch.no_grad():
                mean.lerp_(batch_mean, (1.0 / counter).to(mean.dtype))
                var.lerp_(batch_var, (1.0 / counter).to(var.dtype))
        return y


class BatchNorm1d(Layer, torch.nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d`, computed by cubn: (N, C) and (N, C, L).

    Examples
    --------
    >>> import torch, cubn.torch
    >>> bn = cubn.torch.BatchNorm1d(3)
    >>> isinstance(bn, torch.nn.BatchNorm1d), list(bn.state_dict())
    (True, ['weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked'])
    >>> bn(torch.randn(8, 3)).mean(0).abs().max() < 1e-6
    tensor(True)
    """


class BatchNorm2d(Layer, torch.nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d`, computed by cubn: (N, C, H, W), contiguous and channels-last.

    Examples
    --------
    >>> import torch, cubn.torch
    >>> bn = cubn.torch.BatchNorm2d(3)
    >>> y = bn(torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last))
    >>> y.is_contiguous(memory_format=torch.channels_last), bn.num_batches_tracked
    (True, tensor(1))
    """


class BatchNorm3d(Layer, torch.nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d`, computed by cubn: (N, C, D, H, W).

    Examples
    --------
    >>> import torch, cubn.torch
    >>> cubn.torch.BatchNorm3d(3)(torch.randn(2, 3, 4, 4, 4)).shape
    torch.Size([2, 3, 4, 4, 4])
    """


class FusedLayer(Layer):
    """A layer that PyTorch has none of.

    No subclass of PyTorch's batch norms, because what looks for those (`torch.nn.SyncBatchNorm.convert_sync_batchnorm`,
    for one) puts other layers in their place, and the activation would be lost.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"input has {input.dim()} dimensions, but the channels are the second; pass (N, C, ...).")


class BatchNormReLU(FusedLayer):
    """Batch normalisation and ReLU in one pass, for input of any rank from (N, C).

    Takes the parameters and has the state of `torch.nn.BatchNorm2d`.

    Examples
    --------
    >>> import torch, cubn.torch
    >>> bn = cubn.torch.BatchNormReLU(3)
    >>> bool((bn(torch.randn(8, 3, 4, 4)) >= 0).all())
    True
    """

    activation = "relu"


class BatchNormAddReLU(FusedLayer):
    """Batch normalisation, the sum with a residual and ReLU in one pass: the end of a residual block.

    Takes the parameters and has the state of `torch.nn.BatchNorm2d`; called as ``bn(x, residual)``.

    Examples
    --------
    >>> import torch, cubn.torch
    >>> bn = cubn.torch.BatchNormAddReLU(3)
    >>> x, shortcut = torch.randn(2, 8, 3, 4, 4)
    >>> bn(x, shortcut).shape
    torch.Size([8, 3, 4, 4])
    """

    activation = "relu"

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]  # takes one more
        """Normalise `input`, add `residual`, and let pass what is above zero."""
        return self._normalise(input, residual)
