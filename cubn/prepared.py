"""Passes that machines have prepared, by the form of the calls that they are for.

A call that has been checked is *learnt*: if its machine prepares passes, and nothing of the call has to be copied, its
machine is asked for one.  A call of the same form finds it, and needs no other check than that of `Reach`.
"""

from collections.abc import Hashable
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias, cast

from cubn.dispatch import chosen
from cubn.forms import Form, Reach, Remembered, admits, form_of
from cubn.machines import BackwardPass, ForwardPass, InferencePass, Machine, Preparing, Running
from cubn.namespace import Array
from cubn.problem import Call


class PreparedBackward(NamedTuple):
    """A pass of `batch_norm_backward`."""

    run: BackwardPass
    reach: Reach


class PreparedForward(NamedTuple):
    """A pass of `batch_norm`, the call that it was made for, and the backward passes that follow it."""

    machine: Preparing
    call: Call
    run: ForwardPass
    reach: Reach
    backward: Remembered[PreparedBackward]


class PreparedInference(NamedTuple):
    """A pass of `batch_norm_inference`, and the call that it was made for."""

    call: Call
    run: InferencePass
    reach: Reach


Kept: TypeAlias = tuple[PreparedForward, Any, Array | None, Array | None, bool]
"""What a call of a prepared forward pass keeps for the backward pass: the pass, what it left, gamma and beta, and
whether there was a residual."""


FORWARD: Remembered[PreparedForward] = Remembered()
INFERENCE: Remembered[PreparedInference] = Remembered()


def preparing(machine: Machine) -> Preparing | None:
    """The machine, if it prepares passes."""
    return cast(Preparing, machine) if _prepares(cast(Hashable, machine)) else None


@lru_cache(maxsize=64)
def _prepares(machine: Hashable) -> bool:
    return hasattr(machine, "prepare_forward")


def forward_options(channel_axis: Any, eps: Any, activation: Any) -> Form:
    """What the form of a call has beside its arrays.  True equals 1 but is no axis, hence the classes."""
    return chosen(), channel_axis.__class__, channel_axis, eps.__class__, eps, activation


def inference_options(
    channel_axis: Any, eps: Any, activation: Any, x: Array, residual: Array | None, out: Array | None
) -> Form:
    """Likewise.  Inference may write over x or the residual itself."""
    itself = 0 if out is None else (out is x) + 2 * (out is residual)
    return chosen(), channel_axis.__class__, channel_axis, eps.__class__, eps, activation, itself


def learn_forward(
    machine: Preparing,
    call: Call,
    options: Form,
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    residual: Array | None,
    out: Array | None,
    running: Running | None,
) -> PreparedForward | None:
    """The pass of a call that has been checked; None where it has none."""
    tracked = (None, None) if running is None else (running.mean, running.var)
    if not _good(call, options, (x, residual, out), (gamma, beta, *tracked)):
        return None
    run = machine.prepare_forward(
        call.problem, call.canonical(x), gamma, beta, _view(call, residual), _view(call, out), running,
        call.layout.memory,
    )  # fmt: skip
    form, _ = form_of(options, x, gamma, beta, residual, out, *tracked)
    if run is None or form is None:
        return None
    found = PreparedForward(machine, call, run, Reach(form, 4, range(4)), Remembered())
    FORWARD.add(form, found)
    return found


def learn_backward(
    machine: Preparing, call: Call, kept: Kept, dy: Array, x: Array, out: Array | None, wants_dresidual: bool
) -> PreparedBackward | None:
    """The pass of a backward call that has been checked; None where it has none."""
    forward, left, gamma, beta, _ = kept
    if forward.machine is not machine or not _good(call, None, (dy, x, out), ()):
        return None
    run = machine.prepare_backward(
        call.problem, call.canonical(dy), call.canonical(x), gamma, beta, left, wants_dresidual,
        _view(call, out), call.layout.memory,
    )  # fmt: skip
    form, _ = form_of((chosen(),), dy, out)
    whole, _ = form_of((), dy, out, x, gamma, beta)
    if run is None or form is None or whole is None:
        return None
    found = PreparedBackward(run, Reach(whole, 1, (0, 2, 3, 4)))
    forward.backward.add(form, found)
    return found


def learn_inference(
    machine: Preparing,
    call: Call,
    options: Form,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None,
    beta: Array | None,
    residual: Array | None,
    out: Array | None,
) -> PreparedInference | None:
    """The pass of a call that has been checked; None where it has none."""
    if not (call.problem.samples and _good(call, options, (x, residual, out), (mean, var, gamma, beta))):
        return None
    run = machine.prepare_inference(
        call.problem, call.canonical(x), mean, var, gamma, beta, _view(call, residual), _view(call, out),
        call.layout.memory,
    )  # fmt: skip
    form, _ = form_of(options, x, residual, mean, var, gamma, beta, out)
    if run is None or form is None:
        return None
    itself = [place for place, array in enumerate((x, residual)) if array is out]  # which may be written over
    found = PreparedInference(call, run, Reach(form, 6, [place for place in range(6) if place not in itself]))
    INFERENCE.add(form, found)
    return found


def _good(
    call: Call, options: Form | None, tensors: tuple[Array | None, ...], per_channel: tuple[Array | None, ...]
) -> bool:
    """True if a pass can be prepared for these arrays as they are."""
    if call.problem.channels == 0:
        return False
    if options is not None and options[1] is not int:  # a tuple of True equals one of 1
        return False
    if not all(array is None or (admits(array) and call.sees(array)) for array in tensors):
        return False
    return all(array is None or call.takes(array) for array in per_channel)


def _view(call: Call, array: Array | None) -> Array | None:
    return None if array is None else call.canonical(array)
