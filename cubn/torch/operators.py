"""`torch.ops.cubn.batch_norm`: batch normalisation as an operator of PyTorch, for whatever wants to see operators.

`torch.compile` and `torch.export` put it into their graphs as one node, `FakeTensorMode` and the meta device ask it
for shapes alone, `torch.func.vmap` folds the mapped axis into the channels, `torch.func.grad` differentiates it as
often as asked.  It has no side effects: moved running statistics are results, which the caller copies into the
buffers.  Code that runs as it is written goes through `cubn.torch.autograd`, which costs less per call.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cubn.torch import passes
from cubn.torch.passes import Asked, Options
from cubn.torch.tensors import array_of, statistics_dtype, widest_dtype

LIBRARY = torch.library.Library("cubn", "DEF")
LIBRARY.define(
    "batch_norm(Tensor x, Tensor? weight, Tensor? bias, Tensor? running_mean, Tensor? running_var, bool training, "
    "float momentum, float eps, bool relu) -> (Tensor y, Tensor statistics, Tensor moved_mean, Tensor moved_var)"
)
LIBRARY.define(
    "batch_norm_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor statistics, bool training, "
    "float eps, bool relu, bool[] asked) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)


def _options(training: bool, momentum: float, eps: float, relu: bool) -> Options:
    return Options(training, momentum, eps, "relu" if relu else None)


def _asked(of: Sequence[bool]) -> Asked:
    x, weight, bias = of
    return Asked(x, weight, bias, residual=False)


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    found = passes.forward(x, weight, bias, None, running_mean, running_var, _options(training, momentum, eps, relu))
    assert found.statistics is not None
    moved = x.new_empty((2, 0 if found.running is None else x.shape[1]), dtype=statistics_dtype(x))
    if found.running is not None:
        held = array_of(moved)
        held[0], held[1] = found.running
    return found.y, found.statistics, moved[0].clone(), moved[1].clone()


def _batch_norm_shapes(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    moved = x.shape[1] if training and running_mean is not None else 0
    return (
        torch.empty_like(x),
        x.new_empty((2, x.shape[1]), dtype=_statistics_dtype(x, running_mean, running_var, training)),
        x.new_empty((moved,), dtype=statistics_dtype(x)),
        x.new_empty((moved,), dtype=statistics_dtype(x)),
    )


def _statistics_dtype(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, training: bool
) -> torch.dtype:
    if training or running_mean is None or running_var is None:
        return widest_dtype(x.device)
    return torch.promote_types(running_mean.dtype, running_var.dtype)


def _batch_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    training: bool,
    eps: float,
    relu: bool,
    asked: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    options = _options(training, 0.0, eps, relu)
    found = passes.backward(dy, x, weight, bias, statistics, None, options, _asked(asked))
    return tuple(_or_nothing(gradient, x) for gradient in found[:3])


def _batch_norm_backward_shapes(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    training: bool,
    eps: float,
    relu: bool,
    asked: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = asked
    parameter = statistics_dtype(x)
    return (
        torch.empty_like(x) if dx else _or_nothing(None, x),
        x.new_empty((x.shape[1],), dtype=parameter) if dweight else _or_nothing(None, x),
        x.new_empty((x.shape[1],), dtype=parameter) if dbias else _or_nothing(None, x),
    )


def _or_nothing(gradient: Tensor | None, x: Tensor) -> Tensor:
    """An operator's results are tensors: one without elements stands for None."""
    return x.new_empty((0,)) if gradient is None else gradient


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, _, training, momentum, eps, relu = inputs
    ctx.save_for_backward(x, weight, bias if relu else None, output[1])
    ctx.options = _options(training, momentum, eps, relu)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dy: Tensor | None, *of_the_rest: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of y alone: statistics and moved statistics are no function to learn through, as in PyTorch."""
    if dy is None:
        return (None,) * 9
    x, weight, bias, statistics = ctx.saved_tensors
    asked = _asked(ctx.needs_input_grad[:3])
    if torch.is_grad_enabled():  # somebody will differentiate again
        found: tuple[Tensor | None, ...] = passes.differentiable_backward(
            dy, x, weight, bias, statistics, None, ctx.options, asked
        )[:3]
    else:
        options: Options = ctx.options
        gradients = torch.ops.cubn.batch_norm_backward(
            dy, x, weight, bias, statistics, options.training, options.eps, options.activation is not None,
            list(asked[:3]),
        )  # fmt: skip
        found = tuple(own if want else None for own, want in zip(gradients, asked, strict=False))
    return *found, *(None,) * 6


def _mapped(
    info: Any,
    in_dims: tuple[int | None, ...],
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    relu: bool,
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """A batch of layers is one layer with as many times the channels."""
    if training and running_mean is not None and in_dims[0] is not None and in_dims[3] is None:
        raise RuntimeError(
            "input is mapped over by torch.func.vmap, but running_mean and running_var are not, and one buffer cannot "
            "hold the statistics of every batch; map over the buffers too, evaluate, or make the layer with "
            "track_running_stats=False."
        )
    size = info.batch_size
    x = _mapped_in_front(x, in_dims[0], size).movedim(0, 1)
    batch, _, channels, *rest = x.shape

    def per_channel(values: Tensor | None, at: int | None) -> Tensor | None:
        return None if values is None else _mapped_in_front(values, at, size).reshape(-1)

    y, statistics, moved_mean, moved_var = TransformedBatchNorm.apply(
        x.reshape(batch, size * channels, *rest), per_channel(weight, in_dims[1]), per_channel(bias, in_dims[2]),
        per_channel(running_mean, in_dims[3]), per_channel(running_var, in_dims[4]), training, momentum, eps, relu,
    )  # fmt: skip
    return (
        y.reshape(batch, size, channels, *rest),
        statistics.reshape(2, size, channels),
        moved_mean.reshape(size, -1),
        moved_var.reshape(size, -1),
    ), (1, 1, 0, 0)


def _mapped_backward(
    info: Any,
    in_dims: tuple[int | None, ...],
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    training: bool,
    eps: float,
    relu: bool,
    asked: Sequence[bool],
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    size = info.batch_size
    dy, x = (_mapped_in_front(t, at, size).movedim(0, 1) for t, at in ((dy, in_dims[0]), (x, in_dims[1])))
    batch, _, channels, *rest = x.shape
    weight, bias = (
        None if values is None else _mapped_in_front(values, at, size).reshape(-1)
        for values, at in ((weight, in_dims[2]), (bias, in_dims[3]))
    )
    folded = (batch, size * channels, *rest)
    dx, dweight, dbias = torch.ops.cubn.batch_norm_backward(
        dy.reshape(folded), x.reshape(folded), weight, bias,
        _mapped_in_front(statistics, in_dims[4], size).movedim(0, 1).reshape(2, -1), training, eps, relu, asked,
    )  # fmt: skip
    dx = dx.reshape(x.shape) if asked[0] else dx.new_empty((0, size))
    return (dx, dweight.reshape(size, -1), dbias.reshape(size, -1)), (1, 0, 0)


def _mapped_in_front(tensor: Tensor, at: int | None, size: int) -> Tensor:
    """The tensor with the mapped axis first, repeated along it where it had none."""
    return tensor.expand(size, *tensor.shape) if at is None else tensor.movedim(at, 0)


class TransformedBatchNorm(torch.autograd.Function):
    """The operator for the transforms of `torch.func`, which differentiate and map functions of this form alone."""

    vmap = staticmethod(_mapped)
    setup_context = staticmethod(_save)
    backward = staticmethod(_differentiate)

    @staticmethod
    def forward(*arguments: Any) -> Any:
        """As the operator."""
        return torch.ops.cubn.batch_norm(*arguments)


LIBRARY.impl("batch_norm", _batch_norm, "CompositeExplicitAutograd")
LIBRARY.impl("batch_norm_backward", _batch_norm_backward, "CompositeExplicitAutograd")
torch.library.register_fake("cubn::batch_norm", _batch_norm_shapes, lib=LIBRARY)
torch.library.register_fake("cubn::batch_norm_backward", _batch_norm_backward_shapes, lib=LIBRARY)
torch.library.register_autograd("cubn::batch_norm", _differentiate, setup_context=_save, lib=LIBRARY)
torch.library.register_vmap("cubn::batch_norm", _mapped, lib=LIBRARY)
torch.library.register_vmap("cubn::batch_norm_backward", _mapped_backward, lib=LIBRARY)
