"""`batch_norm` with the signature of `torch.nn.functional.batch_norm`."""

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from cubn.errors import ShapeError
from cubn.torch import operators
from cubn.torch.autograd import is_plain, normalise
from cubn.torch.passes import Options


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Normalise each channel of `input` as `torch.nn.functional.batch_norm` does, and what often follows with it.

        y = act(weight * (x - mean) * (var + eps) ** -1/2 + bias + residual)

    Parameters
    ----------
    input : Tensor (N, C, *S)
        float16, bfloat16, float32 or float64, on any device, in any memory format.  CPU tensors are computed by the CPU
        machine and CUDA tensors by the CUDA kernels, both in place; others by the reference.
    running_mean, running_var : Tensor (C,) or None
        Moved towards the batch's in training, in place; normalised with otherwise.
    weight, bias : Tensor (C,), optional
        gamma and beta.  Half input goes with float32 or half parameters.
    training : bool
        Take the statistics of the batch.
    momentum : float
        The weight of the new batch in the running statistics.
    eps : float
        Added to the variance.
    activation : {None, "relu"}
        Applied last.
    residual : Tensor like input, optional
        Added before the activation.

    Returns
    -------
    Tensor
        Like input, in its memory format.

    Raises
    ------
    ValueError
        If eps is not positive in training; as `ShapeError`, if a channel has one sample in training or a tensor does
        not fit input.
    DTypeError, DeviceError
        If tensors do not go together.

    Notes
    -----
    Gradients of any order; only those that somebody requires are computed.

    Examples
    --------
    >>> import torch, cubn.torch
    >>> x = torch.tensor([[1.0], [3.0]], requires_grad=True)
    >>> y = cubn.torch.batch_norm(x, None, None, training=True)
    >>> y.detach().round(decimals=3)
    tensor([[-1.],
            [ 1.]])
    """
    tensors = (input, running_mean, running_var, weight, bias, residual)
    if has_torch_function_variadic(*tensors):
        return handle_torch_function(
            batch_norm, tensors, input, running_mean, running_var, weight=weight, bias=bias, training=training,
            momentum=momentum, eps=eps, activation=activation, residual=residual,
        )  # fmt: skip
    if training:
        require_trainable(input, eps)
    if input.numel() == 0:
        return _of_nothing(
            input, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual
        )
    if training and (running_mean is None) != (running_var is None):  # one of them alone is moved
        running_mean, running_var = (
            torch.zeros_like(other) if own is None and other is not None else own
            for own, other in ((running_mean, running_var), (running_var, running_mean))
        )
    if not torch.compiler.is_compiling() and is_plain(*tensors):
        options = Options(training, momentum, eps, activation)
        return normalise(input, weight, bias, residual, (running_mean, running_var), options)
    return _by_operator(input, running_mean, running_var, weight, bias, training, momentum, eps, activation, residual)


def require_trainable(input: Tensor, eps: float) -> None:
    """Raise unless eps is positive and a channel has more than one sample, as PyTorch does and with its words."""
    require_positive(eps)
    shape = input.shape
    if len(shape) > 1 and input.numel() == shape[1] and shape[0] * shape[2:].numel() == 1:
        raise ShapeError(
            f"Expected more than 1 value per channel when training, got input size {shape}: the variance of one sample "
            f"is zero whatever it holds; pass at least two samples, or evaluate."
        )


def require_positive(eps: float) -> None:
    """Raise unless eps is positive, as PyTorch does and with its words."""
    if eps <= 0.0:
        raise ValueError(
            f"batch_norm eps must be positive during training, but got {eps}: PyTorch takes no other; pass eps > 0, or "
            f"call cubn.batch_norm, which takes zero."
        )


def _by_operator(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """The same through the registered operator; what follows a residual is left to the compiler to fuse."""
    relu = activation is not None
    transformed = torch._C._are_functorch_transforms_active()
    operator = operators.TransformedBatchNorm.apply if transformed else torch.ops.cubn.batch_norm
    y, _, moved_mean, moved_var = operator(
        input, weight, bias, running_mean, running_var, training, momentum, eps, relu and residual is None
    )
    if residual is not None:
        y = y + residual
        y = torch.relu(y) if relu else y
    if training and running_mean is not None and running_var is not None:
        _merge(running_mean, moved_mean)
        _merge(running_var, moved_var)
    return y


def _merge(running: Tensor, moved: Tensor) -> None:
    """Copy moved statistics into a buffer that nobody differentiates."""
    with torch.no_grad():
        running.copy_(moved)


def _of_nothing(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    activation: str | None,
    residual: Tensor | None,
) -> Tensor:
    """A batch without elements has nothing to normalise: PyTorch's own answer, with its gradients of zero."""
    y = torch.nn.functional.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    y = y if residual is None else y + residual
    return y if activation is None else torch.relu(y)
