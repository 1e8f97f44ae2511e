"""The passes of batch normalisation on tensors: posed as a problem, computed by the tensor's machine.

Nothing here is recorded by autograd.  `cubn.torch.autograd` and `cubn.torch.operators` are, with these inside.
"""

from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cubn.dispatch import machine_for
from cubn.errors import ShapeError
from cubn.machines import Running
from cubn.moments import reciprocal_std, towards
from cubn.namespace import Array, dtype_name, widest_float
from cubn.problem import Call, pose, require_training_samples
from cubn.sync import Sync
from cubn.sync.exchange import gather_moments, gather_sums, together
from cubn.torch.tensors import NOTHING, array_of, empty_like, statistics_dtype, stream_of, widest_dtype


class Options(NamedTuple):
    """What a pass is told besides its tensors.

    Attributes
    ----------
    training : bool
        Take the statistics of the batch, not the running ones.
    momentum : float
        The weight of the new batch in the running statistics.
    eps : float
        Added to the variance.
    activation : {None, "relu"}
        Applied last.
    sync : Sync or None
        Takes the statistics over the samples of all its ranks.
    """

    training: bool
    momentum: float
    eps: float
    activation: str | None
    sync: Sync | None = None


class Normalised(NamedTuple):
    """What the forward pass found.

    Attributes
    ----------
    y : Tensor
        Like x.
    statistics : Tensor (2, C) or None
        Of a batch, mean and reciprocal standard deviation in the widest float of the device; otherwise the running mean
        and variance as they were.
    active : Tensor or None
        Where ReLU let the gradient pass, as the machine has written it down.
    running : (array (C,), array (C,)) or None
        Running mean and variance with this batch in them.
    samples : int or None
        Samples per channel that the statistics were taken over; None where they are constants.
    """

    y: Tensor
    statistics: Tensor | None
    active: Tensor | None
    running: tuple[Array, Array] | None
    samples: int | None


class Asked(NamedTuple):
    """Which gradients are wanted."""

    x: bool
    weight: bool
    bias: bool
    residual: bool


class Gradients(NamedTuple):
    """Of x, weight, bias and residual; None where not asked for.

    Those of weight and bias have the statistics' dtype; autograd narrows them to a narrower parameter's.
    """

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    options: Options,
    *,
    keep: bool = True,
) -> Normalised:
    """Normalise x; `keep` says whether a backward pass will come, for which `statistics` and `active` are made."""
    with stream_of(x):
        with _heard(options.sync):
            x_array, call = pose(array_of(x), channel_axis=1, eps=options.eps, activation=options.activation)
            gamma, beta = _per_channel(call, "weight", weight), _per_channel(call, "bias", bias)
            added = None if residual is None else call.values("residual", array_of(_as_laid_out(call, residual, x)))
            mean, var = _per_channel(call, "running_mean", running_mean), _per_channel(call, "running_var", running_var)
            if not options.training and (mean is None or var is None):
                raise ShapeError(
                    "running_mean and running_var are missing, but evaluation normalises with them; "
                    "pass both, or training=True for the statistics of the batch."
                )
            machine, problem, x_c = machine_for(call.library), call.problem, call.canonical(x_array)
        y = empty_like(x)
        target, view = _destination(call, y, x)
        samples = problem.samples if options.training else None
        with np.errstate(all="ignore"):  # NaN and infinity are results here, not accidents
            if options.training and options.sync is None:
                running = None if mean is None or var is None else Running(mean, var, options.momentum)
                result, batch, rstd, active, moved = machine.forward(
                    problem, x_c, gamma, beta, added, None, view, running
                )
                mean = batch.wide_mean
            else:
                moved = None
                if options.sync is not None:
                    batch = gather_moments(options.sync, call, machine.moments(problem, x_c))
                    samples = batch.count
                    require_training_samples(samples, call.layout)
                    rstd = reciprocal_std(batch.wide_var, options.eps)
                    if mean is not None and var is not None:
                        moved = towards(mean, var, batch, options.momentum)
                    mean = batch.wide_mean
                else:
                    mean, rstd = _constants(call, mean, var)
                result, active = machine.normalize(problem, x_c, mean, rstd, gamma, beta, added, None, view, keep=keep)
            call.deliver(result, target, view)
        if not keep:
            return Normalised(y, None, None, moved, samples)
        if options.training:
            statistics = torch.empty((2, problem.channels), dtype=widest_dtype(x.device), device=x.device)
            held = array_of(statistics)
            held[0], held[1] = mean, rstd
        else:
            statistics = torch.stack((running_mean, running_var))
        return Normalised(y, statistics, None if active is None else _tensor_of(active), moved, samples)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    active: Tensor | None,
    options: Options,
    asked: Asked,
    count: int | None = None,
) -> Gradients:
    """The gradients that are asked for, and no pass over the data for others.

    `count` is how many samples the statistics are of; by default, those of x.  With ranks to meet, the sums over the
    data are taken and sent whatever is asked for here: others may ask for more.
    """
    with stream_of(x):
        with _heard(options.sync):
            x_array, call = pose(array_of(x), channel_axis=1, eps=options.eps, activation=options.activation)
            machine, problem, x_c = machine_for(call.library), call.problem, call.canonical(x_array)
            gamma, beta = _per_channel(call, "weight", weight), _per_channel(call, "bias", bias)
            dy_c = call.canonical(array_of(_as_laid_out(call, dy, x)))
        mean, rstd = array_of(statistics)
        if not options.training:
            mean, rstd = _constants(call, mean, rstd)
        notes = None if active is None else array_of(active)
        residual = asked.residual and options.activation is not None  # without, it is dy itself
        dx = dresidual = sums = None
        with np.errstate(all="ignore"):
            if options.sync is not None:
                sums = machine.gradient_sums(problem, dy_c, x_c, mean, rstd, gamma, beta, None, notes)
                total = gather_sums(options.sync, call, sums)
                if asked.x or residual:
                    dx = empty_like(x)
                    target, view = _destination(call, dx, x)
                    found, dresidual = machine.input_gradient(
                        problem, dy_c, x_c, mean, rstd, gamma, beta, count, total, None, notes, residual, view
                    )
                    call.deliver(found, target, view)
            elif not (asked.x or residual):
                sums = machine.gradient_sums(problem, dy_c, x_c, mean, rstd, gamma, beta, None, notes)
            else:
                dx = empty_like(x)
                target, view = _destination(call, dx, x)
                count = (count or problem.samples) if options.training else None
                if options.training or asked.weight or asked.bias:
                    found, dresidual, sums = machine.backward(
                        problem, dy_c, x_c, mean, rstd, gamma, beta, count, None, notes, residual, view
                    )
                else:
                    found, dresidual = machine.input_gradient(
                        problem, dy_c, x_c, mean, rstd, gamma, beta, None, None, None, notes, residual, view
                    )
                call.deliver(found, target, view)
            return Gradients(
                dx if asked.x else None,
                _parameter_gradient(x, sums.dy_xhat) if asked.weight and sums is not None else None,
                _parameter_gradient(x, sums.dy) if asked.bias and sums is not None else None,
                _residual_gradient(call, dy, x, dresidual) if asked.residual else None,
            )


def differentiable_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    statistics: Tensor,
    mask: Tensor | None,
    options: Options,
    asked: Asked,
) -> Gradients:
    """The same gradients in PyTorch's own operations, by the reference, so that they can be differentiated again.

    `mask` is a boolean tensor like x: where ReLU let the gradient pass, if x alone does not tell.
    """
    x_array, call = pose(x, channel_axis=1, eps=options.eps, activation=options.activation)
    problem, machine = call.problem, machine_for(call.library)
    x_c, dy_c = call.canonical(x_array), call.values("dy", dy)
    gamma, beta = (
        None if values is None else call.per_channel(name, values)
        for name, values in (("weight", weight), ("bias", bias))
    )
    if options.training:
        batch = machine.moments(problem, x_c)
        mean, rstd = batch.wide_mean, reciprocal_std(batch.wide_var, options.eps)
    else:
        mean, rstd = _constants(call, statistics[0], statistics[1])
    active = None if mask is None else call.layout.canonical(mask, call.library.xp)
    found = machine.backward(
        problem, dy_c, x_c, mean, rstd, gamma, beta, problem.samples if options.training else None, None, active,
        asked.residual and options.activation is not None,
    )  # fmt: skip
    restore, xp = call.layout.restore, call.library.xp
    return Gradients(
        restore(found.dx, xp) if asked.x else None,
        found.sums.dy_xhat.to(statistics_dtype(x)) if asked.weight else None,
        found.sums.dy.to(statistics_dtype(x)) if asked.bias else None,
        (dy if found.dresidual is None else restore(found.dresidual, xp)) if asked.residual else None,
    )


def passing(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Tensor, active: Tensor, options: Options
) -> Tensor:
    """Where ReLU let the gradient pass, as a boolean tensor like x, from the notes of a machine."""
    ones = torch.ones_like(x)
    found = backward(ones, x, weight, bias, statistics, active, options, Asked(False, False, False, True))
    assert found.residual is not None
    return found.residual.bool()


def merged(running: Tensor, moved: Array) -> None:
    """Write moved statistics into a buffer, in place and in the buffer's dtype."""
    array_of(running)[...] = moved


def _heard(sync: Sync | None) -> AbstractContextManager[Any]:
    """Whatever is wrong in here is raised on every rank."""
    return NOTHING if sync is None else together(sync)


def _per_channel(call: Call, name: str, values: Tensor | None) -> Array | None:
    return None if values is None else call.per_channel(name, array_of(values))


def _constants(call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
    """Running mean and reciprocal standard deviation, wide."""
    xp, wide = call.library.xp, widest_float(call.library)
    return xp.astype(mean, wide), reciprocal_std(xp.astype(var, wide), call.problem.eps)


def _destination(call: Call, result: Tensor, x: Tensor) -> tuple[Array, Array | None]:
    """As `Call.destination`; memory that lies like x itself is seen like x."""
    array = array_of(result)
    if call.layout.in_place and result.stride() == x.stride():
        return array, call.layout.canonical(array, call.library.xp)
    return call.destination(array)


def _as_laid_out(call: Call, tensor: Tensor, x: Tensor) -> Tensor:
    """The tensor itself where it can be seen in the canonical form of x, else a copy in the memory order of x.

    PyTorch copies with all threads; NumPy, which would copy otherwise, with one.
    """
    if tensor.stride() == x.stride() and call.layout.in_place:
        return tensor
    if tensor.shape != x.shape or tensor.dtype != x.dtype or call.layout.admits(tensor.stride()):
        return tensor
    return empty_like(x).copy_(tensor.detach())


def _parameter_gradient(x: Tensor, values: Array) -> Tensor:
    gradient = torch.empty(x.shape[1], dtype=statistics_dtype(x), device=x.device)
    array_of(gradient)[...] = values
    return gradient


def _residual_gradient(call: Call, dy: Tensor, x: Tensor, dresidual: Array | None) -> Tensor:
    if dresidual is None:
        return dy
    return _tensor_of(call.layout.restore(dresidual, call.library.xp)).view(x.dtype)


def _tensor_of(array: Any) -> Tensor:
    """An array that a machine has allocated as a tensor in the same memory, bfloat16 by its bits."""
    if isinstance(array, Tensor):
        return array
    if dtype_name(array.dtype) == "bfloat16":
        array = array.view(np.int16)
    return torch.from_numpy(array) if isinstance(array, np.ndarray) else torch.from_dlpack(array)
