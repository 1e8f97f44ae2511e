"""The functions of batch normalisation: check the call, let a machine compute, hand out the result."""

from collections.abc import Sequence
from math import inf
from typing import Any, NamedTuple

import numpy as np

from cubn.chunks import as_dask, is_dask, map_chunks
from cubn.dispatch import chosen, machine_for
from cubn.forms import FORMS, addresses_of, form_of
from cubn.machines import Backward, Running
from cubn.moments import Moments, reciprocal_std
from cubn.namespace import Array, dtype_name, is_static_count, widest_float
from cubn.prepared import (
    FORWARD,
    INFERENCE,
    Kept,
    PreparedBackward,
    PreparedForward,
    forward_options,
    inference_options,
    learn_backward,
    learn_forward,
    learn_inference,
    preparing,
)
from cubn.problem import Call, Problem, pose, require_training_samples, require_variance
from cubn.state import RunningStatistics
from cubn.sync import Sync
from cubn.sync.exchange import gather_moments, gather_sums, together


class Gradients(NamedTuple):
    """What the backward functions return; None where there was no such input.

    Attributes
    ----------
    dx : array like x
    dgamma : array of the shape of gamma, or None
        In the statistics' dtype.
    dbeta : array of the shape of beta, or None
        Likewise.
    dresidual : array like x, or None

    Examples
    --------
    >>> import numpy as np, cubn
    >>> y, saved = cubn.batch_norm(np.array([[1.0], [3.0]]))
    >>> dx, dgamma, dbeta, dresidual = cubn.batch_norm_backward(np.ones((2, 1)), saved)
    >>> dx.tolist(), dgamma, dresidual     # a shift of all samples changes no y, and there was no gamma
    ([[0.0], [0.0]], None, None)
    """

    dx: Array
    dgamma: Array | None
    dbeta: Array | None
    dresidual: Array | None


class Saved:
    """What `batch_norm_backward` needs of the forward pass.

    Attributes
    ----------
    x : array
        The input itself, not a copy: writing to it before the backward pass changes the gradients.
    moments : Moments
        Of the batch; of all ranks together where `sync` was given.
    rstd : array (C,)
        (var + eps) ** -1/2, in the statistics' dtype.

    Examples
    --------
    >>> import numpy as np, cubn
    >>> x = np.array([[1.0], [5.0]])
    >>> y, saved = cubn.batch_norm(x, eps=0.0)
    >>> saved.x is x, saved.moments.mean, saved.rstd
    (True, array([3.]), array([0.5]))
    """

    __slots__ = ("_call", "_found", "_kept", "_x")

    def __init__(
        self, x: Array, call: Call, kept: Kept | None, found: "tuple[Moments, Operands] | None" = None
    ) -> None:
        """`found` is made when somebody looks, out of what a prepared pass has kept."""
        self._x = x
        self._call = call
        self._kept = kept
        self._found = found

    @property
    def x(self) -> Array:
        """The input itself."""
        return self._x

    @property
    def moments(self) -> Moments:
        """Of the batch; of all ranks together where `sync` was given."""
        return self._look()[0]

    @property
    def rstd(self) -> Array:
        """(var + eps) ** -1/2 per channel."""
        return self._call.user_channels(self.operands.rstd)

    @property
    def call(self) -> Call:
        """The call of the forward pass."""
        return self._call

    @property
    def operands(self) -> "Operands":
        """Its arrays."""
        return self._look()[1]

    def _look(self) -> "tuple[Moments, Operands]":
        if self._found is None:
            assert self._kept is not None
            (_, call, run, *_), left, gamma, beta, has_residual = self._kept
            batch, rstd = run.statistics(left)
            operands = Operands(
                call.canonical(self._x), batch.wide_mean, rstd, gamma, beta, batch.count, None, run.active(left),
                has_residual, None,
            )  # fmt: skip
            self._found = batch, operands
        return self._found

    def __repr__(self) -> str:
        problem = self.call.problem
        return f"Saved(shape={self.call.layout.shape}, dtype={problem.dtype}, channels={problem.channels})"


class Operands(NamedTuple):
    """The arrays of a forward pass as a machine takes them again in the backward pass."""

    x: Array
    mean: Array
    rstd: Array
    gamma: Array | None
    beta: Array | None
    count: Any
    where: Array | None
    active: Any
    has_residual: bool
    ranks: int | None


def batch_norm(
    x: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    channel_axis: int | Sequence[int] = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Array | None = None,
    where: Array | None = None,
    sync: Sync | None = None,
    out: Array | None = None,
) -> tuple[Array, Saved]:
    """Normalise `x` over every axis except `channel_axis`, with the statistics of this batch.

    For each channel, over its M = x.size / C samples (Ioffe & Szegedy 2015, Algorithm 1):

        y = act(gamma * (x - mean) * rstd + beta + residual),    rstd = (var + eps) ** -1/2

    Parameters
    ----------
    x : array (N, C, *S), floating
        Of any rank from 1 and any strides.  Read in place where its averaged and kept axes lie together in
        memory (C order, channels-last, Fortran order, any transpose of these); copied once otherwise.
    gamma, beta : array (C,), optional
        Scale and shift, in the unit of y.  None is 1 and 0.
    channel_axis : int or tuple of int
        The axis, or axes, that keep their own statistics; all others are averaged over.
    eps : float
        Added to the variance, so in the unit of x squared.  Zero is allowed.
    activation : {None, "relu"}
        Applied last.  NaN stays NaN.
    residual : array like x, optional
        Added before the activation.
    where : boolean array, broadcastable to x, optional
        Elements where it is False do not enter the statistics, and their y and dx are 0.  A channel that it
        leaves one sample gives beta; one that it leaves none has a count of 0 and only zeros.
    sync : Sync, optional
        Takes the statistics over the samples of all ranks; see `cubn.sync`.
    out : array like x, optional
        Memory for y.  NumPy and CuPy; elsewhere an array that can be assigned to.

    Returns
    -------
    y : array like x
        With the memory order of x.
    saved : Saved
        What `batch_norm_backward` needs: x itself, not a copy, the moments and rstd.

    Raises
    ------
    ShapeError
        If an array does not fit x, an axis is out of range, or a channel has fewer than two samples.
    DTypeError
        If x is not floating, or an array's dtype does not go with it.
    DeviceError
        If the arrays live in two libraries or on two devices.
    ValueError
        If eps, activation or `out` cannot be used.

    Notes
    -----
    Statistics are float32, or float64 for float64 x; sums are taken wider and never as E[x^2] - E[x]^2.
    A constant channel gives exactly beta, with eps = 0 too.  NaN or infinity stays in its channel.

    Examples
    --------
    >>> import numpy as np
    >>> from cubn import batch_norm
    >>> y, saved = batch_norm(np.array([[1.0], [3.0]]), eps=0.0)
    >>> y
    array([[-1.],
           [ 1.]])
    >>> saved.moments.mean, saved.moments.var
    (array([2.]), array([1.]))
    """
    y, saved, _ = training_forward(x, gamma, beta, channel_axis, eps, activation, residual, where, sync, out)
    return y, saved


def training_forward(
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    channel_axis: int | Sequence[int],
    eps: float,
    activation: str | None,
    residual: Array | None,
    where: Array | None,
    sync: Sync | None,
    out: Array | None,
    running: RunningStatistics | None = None,
    momentum: float | None = None,
    empty_allowed: bool = False,
) -> tuple[Array, Saved, RunningStatistics | None]:
    """`batch_norm` as a layer needs it: `running` absorbs the batch, and a batch may be of no samples at all."""
    if sync is None and where is None and x.__class__ in FORMS:
        mean, var = (None, None) if running is None else (running.mean, running.var)
        options = forward_options(channel_axis, eps, activation)
        form, addresses = form_of(options, x, gamma, beta, residual, out, mean, var)
        prepared = FORWARD.get(form)
        if prepared is not None and prepared.reach.apart(addresses):
            if running is not None:
                return _pass_forward(prepared, x, gamma, beta, residual, out, running, momentum)
            y, left = prepared.run(x, gamma, beta, residual, out, None)
            return y, Saved(x, prepared.call, (prepared, left, gamma, beta, residual is not None)), None
    with together(sync):  # what is wrong here is raised on every rank
        x, call = pose(x, channel_axis=channel_axis, eps=eps, activation=activation)
        problem = call.problem
        gamma_c, beta_c = _parameters(call, gamma, beta)
        residual_c = None if residual is None else call.values("residual", residual)
        where_c = None if where is None else call.mask(where)
        if out is not None:
            call.require_out(out, x=x, gamma=gamma, beta=beta, residual=residual, where=where)
        if sync is None and not (empty_allowed and problem.samples == 0):
            require_training_samples(problem.samples, call.layout)

        machine = machine_for(call.library)
        x_c = call.canonical(x)
        at_once = None
        if running is not None and sync is None and where is None:
            at_once = _running(call, running, momentum)
        able = preparing(machine)
        if able is not None and sync is None and where is None and (running is None) == (at_once is None):
            options = forward_options(channel_axis, eps, activation)
            prepared = learn_forward(able, call, options, x, gamma, beta, residual, out, at_once)
            if prepared is not None:
                return _pass_forward(prepared, x, gamma, beta, residual, out, running, momentum)
        target, view = call.destination(out)
        if sync is not None:
            with np.errstate(all="ignore"):
                share = machine.moments(problem, x_c, where_c)
    with np.errstate(all="ignore"):  # NaN and infinity are results here, not accidents
        moved = None
        if sync is None:
            result, batch, rstd, active, moved = machine.forward(
                problem, x_c, gamma_c, beta_c, residual_c, where_c, view, at_once
            )
        else:
            batch = gather_moments(sync, call, share)
            if is_static_count(batch.count) and not (empty_allowed and batch.count == 0):
                require_training_samples(batch.count, call.layout)
            rstd = reciprocal_std(batch.wide_var, problem.eps)
            result, active = machine.normalize(
                problem, x_c, batch.wide_mean, rstd, gamma_c, beta_c, residual_c, where_c, view
            )
    operands = Operands(
        x_c, batch.wide_mean, rstd, gamma_c, beta_c, batch.count, where_c, active, residual is not None,
        None if sync is None else sync.size,
    )  # fmt: skip
    saved = Saved(x, call, None, (_for_user(call, batch), operands))
    if running is not None:
        if moved is None:
            running = running.absorb(saved.moments, momentum)
        else:
            running = RunningStatistics(*moved, running.num_batches_tracked + 1)
    return call.deliver(result, target, view), saved, running


def batch_norm_backward(
    dy: Array,
    saved: Saved,
    *,
    sync: Sync | None = None,
    reduce_parameters: bool = False,
    out: Array | None = None,
) -> Gradients:
    """Gradients of `batch_norm`, the paths through mean and variance included.

    With dz = dy where the activation let it pass and 0 elsewhere, and xhat = (x - mean) * rstd
    (Ioffe & Szegedy 2015, section 3, with its six partial derivatives brought together):

        dx = gamma * rstd * (dz - mean(dz) - xhat * mean(dz * xhat))
        dgamma = sum(dz * xhat),    dbeta = sum(dz),    dresidual = dz

    Parameters
    ----------
    dy : array like x
        Gradient of the loss with respect to y, in any memory order.
    saved : Saved
        From `batch_norm`.  It may be used more than once.
    sync : Sync, optional
        The ranks of the forward pass.  dx takes the sums over all of them; dgamma and dbeta stay those of
        this rank, as data-parallel training adds them up with every other parameter's.  Every rank calls, also
        one without samples and one that needs no dx.
    reduce_parameters : bool
        Return dgamma and dbeta summed over all ranks: the same bits on each, and no further message.
    out : array like x, optional
        Memory for dx.

    Returns
    -------
    Gradients
        (dx, dgamma, dbeta, dresidual), None where the input was None.  Without activation and mask
        dresidual is dy itself.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, ValueError
        If dy or `out` does not go with x.  With `sync`, on all ranks if on one.
    SyncError
        If the ranks are in different calls, or one of them did not come in time.

    Examples
    --------
    >>> import numpy as np
    >>> from cubn import batch_norm, batch_norm_backward
    >>> x = np.array([[1.0, 0.0], [2.0, 0.0], [6.0, 3.0]])
    >>> y, saved = batch_norm(x, np.ones(2), np.zeros(2))
    >>> grads = batch_norm_backward(np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), saved)
    >>> grads.dbeta
    array([1., 1.])
    >>> bool(np.abs(grads.dx.sum(axis=0)).max() < 1e-12)     # the mean was taken away
    True
    """
    kept = saved._kept if isinstance(saved, Saved) else None
    if sync is None and kept is not None and dy.__class__ in FORMS:
        forward, _, gamma, beta, _ = kept
        form, addresses = form_of((chosen(),), dy, out)
        prepared = forward.backward.get(form)
        x = saved._x
        if out is not None:
            addresses += addresses_of(x, gamma, beta)
        if prepared is not None and prepared.reach.apart(addresses):
            return _pass_backward(prepared, kept, dy, x, out)
    with together(sync):
        if not isinstance(saved, Saved):
            raise TypeError(
                f"saved is a {type(saved).__name__}, but the gradients are taken from what the forward pass has kept; "
                f"pass the second value that batch_norm returned."
            )
        call, operands = saved.call, saved.operands
        if (None if sync is None else sync.size) != operands.ranks:
            taken_over = "this process alone" if operands.ranks is None else f"{operands.ranks} ranks"
            raise ValueError(
                f"sync is {sync!r}, but the forward pass took its statistics over {taken_over}; "
                f"pass the sync of the forward pass to the backward pass."
            )
        dy_c = call.values("dy", dy)
        if out is not None:
            call.require_out(
                out, dy=dy, x=saved.x, gamma=operands.gamma, beta=operands.beta, where=operands.where
            )  # fmt: skip
        machine = machine_for(call.library)
        wants_dresidual = operands.has_residual and _changes_gradient(call.problem, operands.where)
        if sync is None and kept is not None and (able := preparing(machine)) is not None:
            prepared = learn_backward(able, call, kept, dy, saved.x, out, wants_dresidual)
            if prepared is not None:
                return _pass_backward(prepared, kept, dy, saved.x, out)
        target, view = call.destination(out)
        problem, count = call.problem, operands.count
        x, mean, rstd, gamma, beta = operands[:5]
        where, active = operands.where, operands.active
        if sync is not None:
            with np.errstate(all="ignore"):
                sums = machine.gradient_sums(problem, dy_c, x, mean, rstd, gamma, beta, where, active)
    with np.errstate(all="ignore"):
        if sync is None:
            found = machine.backward(
                problem, dy_c, x, mean, rstd, gamma, beta, count, where, active, wants_dresidual, view
            )
        else:
            total = gather_sums(sync, call, sums)
            dx, dresidual = machine.input_gradient(
                problem, dy_c, x, mean, rstd, gamma, beta, count, total, where, active, wants_dresidual, view
            )
            found = Backward(dx, dresidual, total if reduce_parameters else sums)
    return Gradients(
        call.deliver(found.dx, target, view),
        None if gamma is None else call.user_channels(found.sums.dy_xhat),
        None if beta is None else call.user_channels(found.sums.dy),
        _residual_gradient(call, dy, found.dresidual) if operands.has_residual else None,
    )


def batch_norm_inference(
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    channel_axis: int | Sequence[int] = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Array | None = None,
    where: Array | None = None,
    out: Array | None = None,
) -> Array:
    """Normalise `x` with statistics that are given (Ioffe & Szegedy 2015, Algorithm 2, step 11).

        y = act(gamma * (x - mean) * (var + eps) ** -1/2 + beta + residual)

    Parameters
    ----------
    x : array (N, C, *S), floating
        Of any size, one sample and none included.
    mean, var : array (C,)
        Of the population, in the unit of x and of x squared: running statistics, or those of
        `cubn.population`.
    gamma, beta, channel_axis, eps, activation, residual
        As in `batch_norm`.
    where : boolean array, broadcastable to x, optional
        Elements where it is False have y = 0.
    out : array like x, optional
        Memory for y.  It may be x itself.

    Returns
    -------
    y : array like x
        Of a Dask array one of the same chunks, still to be computed; the other arrays may then be those of its
        blocks, and the machine of the blocks computes.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, ValueError
        As `batch_norm`, and ValueError if `var` is known to hold a negative number (NumPy only).

    Examples
    --------
    >>> import numpy as np
    >>> from cubn import batch_norm_inference
    >>> batch_norm_inference(np.array([[4.0], [0.0]]), mean=[2.0], var=[4.0], eps=0.0)
    array([[ 1.],
           [-1.]])
    """
    if where is None and x.__class__ in FORMS:
        options = inference_options(channel_axis, eps, activation, x, residual, out)
        form, addresses = form_of(options, x, residual, mean, var, gamma, beta, out)
        prepared = INFERENCE.get(form)
        if prepared is not None and prepared.reach.apart(addresses):
            require_variance(var, prepared.call.library)
            return prepared.run(x, mean, var, gamma, beta, residual, out)
    x, call = pose(x, channel_axis=channel_axis, eps=eps, activation=activation)
    mean_c, rstd_c = _constants(call, mean, var)
    gamma_c, beta_c = _parameters(call, gamma, beta)
    residual_c = None if residual is None else call.values("residual", residual)
    where_c = None if where is None else call.mask(where)
    if out is not None:
        call.require_out(
            out, x=None if _same(out, x) else x, mean=mean, var=var, gamma=gamma, beta=beta,
            residual=None if _same(out, residual) else residual, where=where,
        )  # fmt: skip
    elif is_dask(x):
        return _by_chunks(x, call, mean=mean, var=var, gamma=gamma, beta=beta, residual=residual, where=where)
    machine = machine_for(call.library)
    able = preparing(machine)
    if able is not None and where is None:
        options = inference_options(channel_axis, eps, activation, x, residual, out)
        prepared = learn_inference(able, call, options, x, mean, var, gamma, beta, residual, out)
        if prepared is not None:
            return prepared.run(x, mean, var, gamma, beta, residual, out)
    target, view = call.destination(out)
    with np.errstate(all="ignore"):
        result, _ = machine.normalize(
            call.problem, call.canonical(x), mean_c, rstd_c, gamma_c, beta_c, residual_c, where_c, view, keep=False
        )
    return call.deliver(result, target, view)


def batch_norm_inference_backward(
    dy: Array,
    x: Array,
    mean: Array,
    var: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    *,
    channel_axis: int | Sequence[int] = 1,
    eps: float = 1e-5,
    activation: str | None = None,
    residual: Array | None = None,
    where: Array | None = None,
    out: Array | None = None,
) -> Gradients:
    """Gradients of `batch_norm_inference`: the statistics are constants, as in a frozen layer.

        dx = gamma * rstd * dz,    dgamma = sum(dz * xhat),    dbeta = sum(dz),    dresidual = dz

    Parameters
    ----------
    dy : array like x
        Gradient of the loss with respect to y.
    x, mean, var, gamma, beta, channel_axis, eps, activation, residual, where
        As they were given to `batch_norm_inference`.
    out : array like x, optional
        Memory for dx.

    Returns
    -------
    Gradients
        (dx, dgamma, dbeta, dresidual), None where the input was None.

    Raises
    ------
    ShapeError, DTypeError, DeviceError, ValueError
        As `batch_norm_inference`.

    Examples
    --------
    >>> import numpy as np
    >>> from cubn import batch_norm_inference_backward
    >>> x, dy = np.array([[4.0], [0.0]]), np.array([[1.0], [1.0]])
    >>> batch_norm_inference_backward(dy, x, mean=[2.0], var=[4.0], gamma=[3.0], eps=0.0).dx
    array([[1.5],
           [1.5]])
    """
    x, call = pose(x, channel_axis=channel_axis, eps=eps, activation=activation)
    mean_c, rstd_c = _constants(call, mean, var)
    gamma_c, beta_c = _parameters(call, gamma, beta)
    residual_c = None if residual is None else call.values("residual", residual)
    where_c = None if where is None else call.mask(where)
    dy_c = call.values("dy", dy)
    if out is not None:
        call.require_out(
            out, dy=dy, x=x, mean=mean, var=var, gamma=gamma, beta=beta, residual=residual, where=where
        )  # fmt: skip
    machine = machine_for(call.library)
    problem, x_c = call.problem, call.canonical(x)
    target, view = call.destination(out)
    with np.errstate(all="ignore"):
        active = None
        if residual_c is not None and activation is not None:
            _, active = machine.normalize(problem, x_c, mean_c, rstd_c, gamma_c, beta_c, residual_c, where_c)
        wants_dresidual = residual is not None and _changes_gradient(problem, where)
        found = machine.backward(
            problem, dy_c, x_c, mean_c, rstd_c, gamma_c, beta_c, None, where_c, active, wants_dresidual, view
        )
    return Gradients(
        call.deliver(found.dx, target, view),
        None if gamma is None else call.user_channels(found.sums.dy_xhat),
        None if beta is None else call.user_channels(found.sums.dy),
        None if residual is None else _residual_gradient(call, dy, found.dresidual),
    )


def moments(x: Array, *, channel_axis: int | Sequence[int] = 1, where: Array | None = None) -> Moments:
    """Count, mean and sum of squared distances of each channel of `x`.

    Parameters
    ----------
    x : array (N, C, *S), floating
        An empty array is allowed and has the moments of the empty set.
    channel_axis : int or tuple of int
        The axis, or axes, that keep their own statistics.
    where : boolean array, broadcastable to x, optional
        Elements where it is False are left out; the count is then an array, one number per channel.

    Returns
    -------
    Moments
        Merge those of disjoint sets with `|`.

    Raises
    ------
    ShapeError, DTypeError, DeviceError
        If x or where cannot be used.

    Examples
    --------
    >>> import numpy as np
    >>> from cubn import moments
    >>> m = moments(np.array([[1.0, 5.0], [3.0, 5.0]]))
    >>> m.count, m.mean, m.var, m.var_unbiased
    (2, array([2., 5.]), array([1., 0.]), array([2., 0.]))
    """
    x, call = pose(x, channel_axis=channel_axis)
    where_c = None if where is None else call.mask(where)
    with np.errstate(all="ignore"):
        result = machine_for(call.library).moments(call.problem, call.canonical(x), where_c)
    return _for_user(call, result)


def _by_chunks(x: Array, call: Call, *, residual: Array | None, where: Array | None, **constants: Any) -> Array:
    """`batch_norm_inference` of a Dask array, checked and still to be computed, in the chunks of x."""
    layout, xp = call.layout, call.library.xp
    per_channel = {
        name: layout.unflatten(call.per_channel(name, values), xp)
        for name, values in constants.items()
        if values is not None
    }
    like_x = {
        name: values if is_dask(values) else as_dask(np.asarray(values))
        for name, values in (("residual", residual), ("where", where))
        if values is not None
    }
    return map_chunks(
        batch_norm_inference, x, layout.channel_axes, per_channel, like_x,
        channel_axis=layout.channel_axes, eps=call.problem.eps, activation=call.problem.activation,
    )  # fmt: skip


def _for_user(call: Call, batch: Moments) -> Moments:
    """Moments with the channels' own shape and order; still as wide as they were summed."""
    if len(call.layout.channel_axes) == 1:
        return batch
    layout, xp = call.layout, call.library.xp
    count = batch.count if is_static_count(batch.count) else layout.unflatten(batch.count, xp)
    return Moments(count, layout.unflatten(batch.wide_mean, xp), layout.unflatten(batch.wide_m2, xp), batch.dtype)


def _parameters(call: Call, gamma: Array | None, beta: Array | None) -> tuple[Array | None, Array | None]:
    return (
        None if gamma is None else call.per_channel("gamma", gamma),
        None if beta is None else call.per_channel("beta", beta),
    )


def _pass_forward(
    prepared: PreparedForward,
    x: Array,
    gamma: Array | None,
    beta: Array | None,
    residual: Array | None,
    out: Array | None,
    running: RunningStatistics | None,
    momentum: float | None,
) -> tuple[Array, Saved, RunningStatistics | None]:
    """What `training_forward` returns, by a prepared pass."""
    _, call, run, *_ = prepared
    moving = None if running is None else Running(running.mean, running.var, float(running.weight(momentum)))
    y, left = run(x, gamma, beta, residual, out, moving)
    saved = Saved(x, call, (prepared, left, gamma, beta, residual is not None))
    if running is not None:
        moved = run.moved(left)
        assert moved is not None
        running = RunningStatistics(*moved, running.num_batches_tracked + 1)
    return y, saved, running


def _pass_backward(prepared: PreparedBackward, kept: Kept, dy: Array, x: Array, out: Array | None) -> Gradients:
    """What `batch_norm_backward` returns, by a prepared pass."""
    run = prepared.run
    _, left, gamma, beta, has_residual = kept
    dx, dgamma, dbeta, dresidual = run(dy, x, gamma, beta, left, out)
    return Gradients(dx, dgamma, dbeta, dy if has_residual and dresidual is None else dresidual)


def _constants(call: Call, mean: Array, var: Array) -> tuple[Array, Array]:
    """The given mean and the reciprocal standard deviation of the given var, wide and canonical."""
    mean_c, var_c = call.per_channel("mean", mean), call.per_channel("var", var)
    if call.library.is_numpy:
        total = var_c.astype(np.float64)
        total += call.problem.eps
        if np.minimum.reduce(total, initial=inf) > call.problem.eps:  # nothing is negative, zero or NaN
            return mean_c.astype(np.float64), 1.0 / np.sqrt(total)
    xp, wide = call.library.xp, widest_float(call.library)
    require_variance(var_c, call.library)
    with np.errstate(all="ignore"):
        return xp.astype(mean_c, wide), reciprocal_std(xp.astype(var_c, wide), call.problem.eps)


def _running(call: Call, running: RunningStatistics, momentum: float | None) -> Running | None:
    """The running statistics as a machine takes them along, or None where they are not of x's form and dtype."""
    fits = len(call.layout.channel_axes) == 1 and call.problem.samples > 1
    if not fits or dtype_name(running.mean.dtype) != call.problem.statistics_dtype:
        return None
    return Running(running.mean, running.var, running.weight(momentum))


def _changes_gradient(problem: Problem, where: Array | None) -> bool:
    """True if the gradient before the activation is not dy itself."""
    return problem.activation is not None or where is not None


def _residual_gradient(call: Call, dy: Array, dresidual: Array | None) -> Array:
    return dy if dresidual is None else call.layout.restore(dresidual, call.library.xp)


def _same(out: Array, other: Array | None) -> bool:
    """True if two arrays are one and the same memory, element for element."""
    if out is other:
        return True
    return (
        isinstance(out, np.ndarray)
        and isinstance(other, np.ndarray)
        and out.__array_interface__["data"][0] == other.__array_interface__["data"][0]
        and out.strides == other.strides
        and out.shape == other.shape
        and out.dtype == other.dtype
    )
