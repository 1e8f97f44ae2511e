"""Batch normalisation as autograd records it outside of `torch.compile`: one node, with its second derivative."""

from typing import Any

import torch
from torch import Tensor

from cubn.torch import passes
from cubn.torch.passes import Asked, Options
from cubn.torch.tensors import statistics_dtype, widest_dtype

PLAIN = (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer)
"""Classes whose instances are nothing but tensors."""

Buffers = tuple[Tensor | None, Tensor | None]
"""Running mean and variance."""


def normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: Buffers,
    options: Options,
) -> Tensor:
    """Normalise, move the running statistics in training, and let autograd know where somebody wants a gradient."""
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        return BatchNormFunction.apply(x, weight, bias, residual, running, options)
    return _forward(x, weight, bias, residual, running, options, keep=False).y


def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running: Buffers,
    options: Options,
    keep: bool,
) -> passes.Normalised:
    found = passes.forward(x, weight, bias, residual, *running, options, keep=keep)
    if found.running is not None:
        for buffer, moved in zip(running, found.running, strict=True):
            assert buffer is not None
            passes.merged(buffer, moved)
    return found


class BatchNormFunction(torch.autograd.Function):
    """y from (x, weight, bias, residual).

    Saved are x, weight, the statistics, bias where ReLU needs it to know itself again, and the machine's notes of
    where ReLU let the gradient pass after a residual.  In evaluation with frozen parameters and no activation, x is
    not needed and not saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running: Buffers,
        options: Options,
    ) -> Tensor:
        """As `passes.forward`."""
        found = _forward(x, weight, bias, residual, running, options, keep=True)
        asked = ctx.needs_input_grad
        frozen = not (options.training or options.activation or asked[1] or asked[2])
        ctx.save_for_backward(
            None if frozen else x,
            weight,
            bias if options.activation is not None and residual is None else None,
            found.statistics,
            found.active,
        )
        ctx.options, ctx.count = options, found.samples
        return found.y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        """As `passes.backward`; recorded where somebody will differentiate it again."""
        x, weight, bias, statistics, active = ctx.saved_tensors
        options, asked = ctx.options, Asked(*ctx.needs_input_grad[:4])
        if x is None:
            dx = None
            if asked.x:
                dx = _scaled(dy, weight, statistics, options.eps)
            return dx, None, None, dy if asked.residual else None, None, None
        if not is_plain(dy):
            mask = None if active is None else passes.passing(x, weight, bias, statistics, active, options)
            found = passes.differentiable_backward(dy, x, weight, bias, statistics, mask, options, asked)
        elif torch.is_grad_enabled():
            if options.sync is not None:
                raise NotImplementedError(
                    "a gradient of a gradient was asked for, but through synchronised statistics it needs a third "
                    "exchange between the ranks, which there is not; take it in evaluation, or without SyncBatchNorm."
                )
            return *GradientFunction.apply(dy, x, weight, bias, statistics, active, options, asked), None, None
        else:
            found = passes.backward(dy, x, weight, bias, statistics, active, options, asked, ctx.count)
        return *found, None, None


class GradientFunction(torch.autograd.Function):
    """The gradients as a function of dy, x, weight and bias, for gradients of gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        statistics: Tensor,
        active: Tensor | None,
        options: Options,
        asked: Asked,
    ) -> passes.Gradients:
        """As `passes.backward`."""
        ctx.save_for_backward(dy, x, weight, bias, statistics, active)
        ctx.options, ctx.asked = options, asked
        ctx.set_materialize_grads(False)
        return passes.backward(dy, x, weight, bias, statistics, active, options, asked)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Any, ...]:
        """Differentiate the same gradients, written in PyTorch's operations.

        They are taken at aliases of the saved tensors, so that nothing flows along the way that dy depends on x,
        which autograd follows by itself.
        """
        dy, x, weight, bias, statistics, active = ctx.saved_tensors
        options: Options = ctx.options
        asked: Asked = ctx.asked
        wanted = ctx.needs_input_grad[:4]
        again = torch.is_grad_enabled()
        mask = None if active is None else passes.passing(x, weight, bias, statistics, active, options)
        with torch.enable_grad():
            places = [
                tensor if tensor is None or not want else tensor.view_as(tensor) if again else _leaf(tensor)
                for tensor, want in zip((dy, x, weight, bias), wanted, strict=True)
            ]
            at_dy, at_x, at_weight, at_bias = places
            found = passes.differentiable_backward(at_dy, at_x, at_weight, at_bias, statistics, mask, options, asked)
            pairs = [
                (own, given) for own, given in zip(found, outer, strict=True) if own is not None and given is not None
            ]
            inputs = [place for place, want in zip(places, wanted, strict=True) if want]
            pairs = [(own, given) for own, given in pairs if own.requires_grad]
            if not pairs:
                return (None,) * 8
            gradients = iter(
                torch.autograd.grad(
                    [own for own, _ in pairs],
                    inputs,
                    [given for _, given in pairs],
                    create_graph=again,
                    allow_unused=True,
                )
            )
        return *(next(gradients) if want else None for want in wanted), None, None, None, None


def is_plain(*tensors: Tensor | None) -> bool:
    """True if these are tensors with memory, and nobody wants to see the operations on them.

    Somebody does while compiling, tracing and under a dispatch mode (`FakeTensorMode`, `make_fx`); there is no memory
    to read in the tensors of `torch.func` and of subclasses.
    """
    if (
        torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    ):
        return False
    return all(
        tensor is None
        or (type(tensor) in PLAIN and not tensor.is_meta and not torch._C._functorch.is_legacy_batchedtensor(tensor))
        for tensor in tensors
    )


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _scaled(dy: Tensor, weight: Tensor | None, statistics: Tensor, eps: float) -> Tensor:
    """dx = weight * rstd * dy: evaluation is an affine map, in operations that can be differentiated again."""
    scale = (statistics[1].to(widest_dtype(dy.device)) + eps) ** -0.5
    scale = torch.where(scale.isinf(), 0, scale)  # as forward: nothing varies there
    if weight is not None:
        scale = scale * weight
    return (dy * scale.to(statistics_dtype(dy)).view(-1, *(1,) * (dy.dim() - 2))).to(dy.dtype)
