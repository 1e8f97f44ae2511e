"""The layer: parameters, running statistics and a mode, over the functions of `cubn.functional`."""

from collections.abc import Mapping, Sequence
from math import prod
from operator import index
from os import PathLike
from types import ModuleType
from typing import Any

import numpy as np

from cubn import archive
from cubn.errors import DeviceError, DTypeError, ShapeError
from cubn.functional import (
    Saved,
    batch_norm_backward,
    batch_norm_inference,
    batch_norm_inference_backward,
    training_forward,
)
from cubn.layout import is_integer
from cubn.namespace import Array, dtype_name, is_array, library_of, may_overlap, namespace
from cubn.problem import require_activation, require_eps
from cubn.state import RunningStatistics, require_momentum
from cubn.sync import Sync
from cubn.sync.exchange import together


class BatchNorm:
    """A batch-normalisation layer for NumPy and CuPy.

    In training it normalises with the statistics of the batch and moves its running statistics towards them;
    in evaluation it normalises with the running statistics.

        running_mean = (1 - momentum) * running_mean + momentum * mean of the batch
        running_var  = (1 - momentum) * running_var  + momentum * unbiased variance of the batch

    It holds 4 * C numbers: gamma and beta are learned, running_mean and running_var are tracked.

    Parameters
    ----------
    features : int or tuple of int
        C: the sizes of the channel axes.
    channel_axis : int or tuple of int
        The axis of x, or axes, that keep their own statistics: 1 for (N, C, H, W), -1 for (N, H, W, C).
    eps : float
        Added to the variance.
    momentum : float or None
        The weight of the *new* batch, as in PyTorch (Keras, Flax and ONNX mean the weight of the old value).
        None averages over all batches alike.
    affine : bool
        Learn gamma and beta.
    track_running_stats : bool
        Without, evaluation too normalises with the statistics of its batch.
    activation : {None, "relu"}
        Applied last.
    dtype : {"float32", "float64"}
        Of gamma, beta and the running statistics.  A float32 layer takes x of every dtype.
    device : {"cpu", "cuda", "auto"}
        Where they live: NumPy or CuPy.
    sync : Sync, optional
        Takes the batch's statistics over several ranks; see `cubn.sync`.

    Attributes
    ----------
    gamma, beta : array (C,) or None
        Ones and zeros at first.
    running_mean, running_var : array (C,) or None
        Zeros and ones at first.
    num_batches_tracked : int
        Batches that entered the running statistics.
    gamma_grad, beta_grad : array (C,) or None
        Set by `backward`.
    residual_grad : array like x, or None
        Set by `backward` after a call with a residual.
    training : bool
        The mode.

    Examples
    --------
    >>> import numpy as np, cubn
    >>> bn = cubn.BatchNorm(3)
    >>> x = np.random.default_rng(0).normal(5.0, 2.0, size=(8, 3, 4, 4)).astype("float32")
    >>> y = bn(x)
    >>> bool(np.abs(y.mean(axis=(0, 2, 3))).max() < 1e-6)
    True
    >>> bn.running_mean.round(1)
    array([0.5, 0.5, 0.5], dtype=float32)
    >>> dx = bn.backward(np.ones_like(y))
    >>> bn.beta_grad
    array([128., 128., 128.], dtype=float32)
    >>> bn.eval()(x[:1]).shape                 # one sample will do for inference
    (1, 3, 4, 4)
    """

    gamma: Array | None
    beta: Array | None

    def __init__(
        self,
        features: int | Sequence[int],
        *,
        channel_axis: int | Sequence[int] = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        activation: str | None = None,
        dtype: Any = "float32",
        device: str = "cpu",
        sync: Sync | None = None,
    ) -> None:
        self.channel_axis = _require_channel_axis(channel_axis)
        self.features = _require_features(features, self.channel_axis)
        require_eps(eps)
        require_momentum(momentum)
        require_activation(activation)
        self.dtype = _require_state_dtype(dtype)
        self.eps = float(eps)
        self.momentum = None if momentum is None else float(momentum)
        self.affine = bool(affine)
        self.track_running_stats = bool(track_running_stats)
        self.activation = activation
        self.sync = sync
        self.training = True

        xp, shape = namespace(device), self.channel_shape
        self.gamma = xp.ones(shape, dtype=self.dtype) if affine else None
        self.beta = xp.zeros(shape, dtype=self.dtype) if affine else None
        self._running = RunningStatistics.initial(xp, shape, self.dtype) if track_running_stats else None
        self._xp: ModuleType = xp
        self.gamma_grad: Array | None = None
        self.beta_grad: Array | None = None
        self.residual_grad: Array | None = None
        self._saved: Saved | _Constant | None = None

    # The state, by its public names

    @property
    def channel_shape(self) -> tuple[int, ...]:
        """Shape of every per-channel array of this layer."""
        return (self.features,) if isinstance(self.features, int) else self.features

    @property
    def running_mean(self) -> Array | None:
        """Estimate of the population's mean; None without `track_running_stats`."""
        return None if self._running is None else self._running.mean

    @running_mean.setter
    def running_mean(self, values: Array) -> None:
        self._replace_running(mean=values)

    @property
    def running_var(self) -> Array | None:
        """Estimate of the population's variance; None without `track_running_stats`."""
        return None if self._running is None else self._running.var

    @running_var.setter
    def running_var(self, values: Array) -> None:
        self._replace_running(var=values)

    @property
    def num_batches_tracked(self) -> int:
        """Batches that entered the running statistics."""
        return 0 if self._running is None else self._running.num_batches_tracked

    @property
    def device(self) -> str:
        """ "cpu" or "cuda"."""
        return "cpu" if self._xp is np else "cuda"

    # Forward and backward

    def __call__(
        self,
        x: Array,
        *,
        residual: Array | None = None,
        where: Array | None = None,
        out: Array | None = None,
    ) -> Array:
        """Normalise x: with its own statistics in training, with the running ones in evaluation.

        Parameters
        ----------
        x : array
            With the layer's features along its `channel_axis`.  A batch of no samples gives an empty y and
            leaves the running statistics and the counter as they were.
        residual, where, out
            As in `cubn.batch_norm`.  In evaluation `where` only sets y to 0 where it is False.

        Returns
        -------
        y : array like x
        """
        with_batch = self.training or self._running is None
        with together(self.sync if with_batch else None):
            x = self._require_input(x)
        if with_batch:
            y, self._saved, self._running = training_forward(
                x, self.gamma, self.beta, self.channel_axis, self.eps, self.activation, residual, where, self.sync, out,
                self._running, self.momentum, empty_allowed=True,
            )  # fmt: skip
            return y
        return self._infer(x, residual, where, out)

    def _infer(self, x: Array, residual: Array | None, where: Array | None, out: Array | None) -> Array:
        assert self._running is not None
        constant = _Constant(x, self._running, self.gamma, self.beta, residual, where)
        y = batch_norm_inference(
            x, constant.running.mean, constant.running.var, self.gamma, self.beta, channel_axis=self.channel_axis,
            eps=self.eps, activation=self.activation, residual=residual, where=where, out=out,
        )  # fmt: skip
        written_over = out is not None and any(may_overlap(out, a) for a in (x, residual) if a is not None)
        self._saved = None if written_over else constant
        return y

    def backward(self, dy: Array, *, out: Array | None = None, reduce_parameters: bool = False) -> Array:
        """Gradient of the last call with respect to x; sets `gamma_grad` and `beta_grad`.

        Parameters
        ----------
        dy : array like x
            Gradient of the loss with respect to y.
        out : array like x, optional
            Memory for dx.
        reduce_parameters : bool
            With `sync`, set the gradients of all ranks together; by default those of this rank's samples alone.

        Returns
        -------
        dx : array like x

        Raises
        ------
        RuntimeError
            If the layer has not been called yet, or its last call wrote y over x or the residual.
        """
        saved = self._saved
        if saved is None:
            with together(self.sync if self.training else None):
                raise RuntimeError(
                    "backward was called before forward, or after one that wrote y over its input, but a gradient is "
                    "taken at an x; call the layer on x first."
                )
        if isinstance(saved, Saved):
            grads = batch_norm_backward(dy, saved, sync=self.sync, reduce_parameters=reduce_parameters, out=out)
        else:
            grads = batch_norm_inference_backward(
                dy, saved.x, saved.running.mean, saved.running.var, saved.gamma, saved.beta,
                channel_axis=self.channel_axis, eps=self.eps, activation=self.activation,
                residual=saved.residual, where=saved.where, out=out,
            )  # fmt: skip
        self.gamma_grad, self.beta_grad, self.residual_grad = grads.dgamma, grads.dbeta, grads.dresidual
        return grads.dx

    # Modes and places

    def train(self, mode: bool = True) -> "BatchNorm":
        """Normalise with the batch's statistics from now on; returns the layer."""
        self.training = bool(mode)
        return self

    def eval(self) -> "BatchNorm":
        """Normalise with the running statistics from now on; returns the layer."""
        return self.train(False)

    def to(self, device: str) -> "BatchNorm":
        """Move parameters and running statistics to "cpu" or "cuda"; returns the layer."""
        xp = namespace(device)
        state = {key: _moved(values, xp) for key, values in self._arrays().items()}
        self._xp = xp
        self._set_arrays(state, self.num_batches_tracked)
        self._saved = self.gamma_grad = self.beta_grad = self.residual_grad = None
        return self

    # State in and out

    def state_dict(self) -> dict[str, Any]:
        """Copies of gamma, beta, running_mean, running_var (as far as the layer has them) and the counter."""
        state: dict[str, Any] = {key: values.copy() for key, values in self._arrays().items()}
        if self._running is not None:
            state["num_batches_tracked"] = self._running.num_batches_tracked
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of another layer, wherever its arrays live.

        Parameters
        ----------
        state : mapping
            With exactly the keys of `state_dict`.

        Raises
        ------
        ValueError
            If keys are missing or left over, or the counter is no number of batches.
        ShapeError, DTypeError
            If an array does not fit the layer.  Whatever is raised, the layer stays as it was.
        """
        wanted = list(self.state_dict())
        missing = [key for key in wanted if key not in state]
        extra = [key for key in state if key not in wanted]
        if missing or extra:
            raise ValueError(
                f"the state dict {_listed('lacks', missing)}{' and ' if missing and extra else ''}"
                f"{_listed('has', extra)}, but this layer (affine={self.affine}, "
                f"track_running_stats={self.track_running_stats}) holds {', '.join(wanted)}; "
                f"pass exactly these keys."
            )
        arrays = {key: self._fitting(key, state[key]) for key in wanted if key != "num_batches_tracked"}
        if "running_var" in arrays and bool((arrays["running_var"] < 0).any()):
            raise ValueError(
                "running_var has a negative entry, but a variance is a mean of squares; "
                "check whether running_mean and running_var were swapped."
            )
        batches = self.num_batches_tracked
        if "num_batches_tracked" in wanted:
            batches = _require_batches(state["num_batches_tracked"])
        self._set_arrays(arrays, batches)

    def save(self, path: str | PathLike[str]) -> None:
        """Write the layer, options and state, to an .npz file; an older file survives a failed write.

        Parameters
        ----------
        path : path
            Written exactly there: no suffix is added.
        """
        state = {key: _moved(values, np) for key, values in self._arrays().items()}
        if self._running is not None:
            state["num_batches_tracked"] = np.asarray(self.num_batches_tracked, np.int64)
        archive.write(path, self._options(), state)

    @classmethod
    def load(cls, path: str | PathLike[str], *, device: str = "cpu") -> "BatchNorm":
        """Read a layer that `save` has written.

        Parameters
        ----------
        path : path
            Of the file.
        device : {"cpu", "cuda", "auto"}
            Where the layer shall live.

        Returns
        -------
        BatchNorm
            In training mode, as a new one.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If it is no such file, or damaged; says what was found.
        """
        namespace(device)  # a device that is not there is no fault of the file
        options, state = archive.read(path)
        try:
            _require_sizes(options.get("features"), state)
            layer = cls(**options, device=device)
            if layer._options() != options:
                raise ValueError(f"its options are {options}")
            layer.load_state_dict(state)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path} holds a layer that cannot be made ({error}), but a file written by save can; "
                f"pass a file that was not changed since."
            ) from error
        return layer

    def __getstate__(self) -> dict[str, Any]:
        """For `copy` and `pickle`: all but the last call, whose arrays are its caller's."""
        return {**vars(self), "_xp": self.device, "_saved": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _xp=namespace(state["_xp"]))

    # How it looks

    def __repr__(self) -> str:
        options = [f"{key}={value!r}" for key, value in self._options().items() if key != "features"]
        mode = "training" if self.training else "evaluation"
        return f"BatchNorm({self.features}, {', '.join(options)})  # {self._census()}; {mode}"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th style='text-align:left'>{name}</th><td>{prod(self.channel_shape)}</td>"
            f"<td style='text-align:left'>{role}</td></tr>"
            for name, role in (
                ("gamma", "learned: scale"),
                ("beta", "learned: shift"),
                ("running_mean", "tracked: for evaluation"),
                ("running_var", "tracked: for evaluation"),
            )
            if getattr(self, name) is not None
        )
        convention = (
            "average over all batches"
            if self.momentum is None
            else f"{1 - self.momentum:.4g} · old + {self.momentum:.4g} · batch"
        )
        return (
            f"<div><strong>BatchNorm({self.features}, channel_axis={self.channel_axis})</strong> on {self.device}, "
            f"{'training' if self.training else 'evaluation'}<table><thead><tr><th>array</th><th>numbers</th>"
            f"<th>role</th></tr></thead><tbody>{rows}</tbody></table><p>{self._census()}. "
            f"Running statistics: {convention}; batches so far: {self.num_batches_tracked}.</p></div>"
        )

    def _census(self) -> str:
        each = prod(self.channel_shape)
        learned, tracked = 2 * each * self.affine, 2 * each * self.track_running_stats
        kinds = 2 * self.affine + 2 * self.track_running_stats
        return f"{kinds}·{each} = {learned + tracked} numbers: {learned} learned, {tracked} tracked"

    # Inside

    def _options(self) -> dict[str, Any]:
        return {
            "features": self.features, "channel_axis": self.channel_axis, "eps": self.eps,
            "momentum": self.momentum, "affine": self.affine, "track_running_stats": self.track_running_stats,
            "activation": self.activation, "dtype": self.dtype,
        }  # fmt: skip

    def _arrays(self) -> dict[str, Array]:
        named = {
            "gamma": self.gamma, "beta": self.beta,
            "running_mean": self.running_mean, "running_var": self.running_var,
        }  # fmt: skip
        return {key: values for key, values in named.items() if values is not None}

    def _set_arrays(self, arrays: Mapping[str, Array], batches: int) -> None:
        self.gamma, self.beta = arrays.get("gamma"), arrays.get("beta")
        if self._running is not None:
            self._running = RunningStatistics(arrays["running_mean"], arrays["running_var"], batches)

    def _replace_running(self, **values: Array) -> None:
        if self._running is None:
            raise ValueError(
                "running statistics were assigned, but this layer has track_running_stats=False; "
                "make one that tracks them."
            )
        (name, array), = values.items()  # fmt: skip
        array = self._fitting(f"running_{name}", array)
        old = self._running
        self._running = RunningStatistics(
            array if name == "mean" else old.mean, array if name == "var" else old.var, old.num_batches_tracked
        )

    def _fitting(self, key: str, values: Any) -> Array:
        """A copy of `values` as an array of this layer; `ShapeError` or `DTypeError` if it cannot be one."""
        moved = _moved(values, self._xp)
        if dtype_name(moved.dtype) not in ("float16", "bfloat16", "float32", "float64"):
            raise DTypeError(
                f"{key} has dtype {dtype_name(moved.dtype)}, but this layer holds {self.dtype}; pass a floating array."
            )
        if tuple(moved.shape) != self.channel_shape:
            raise ShapeError(
                f"{key} has shape {tuple(moved.shape)}, but this layer has features {self.features}; "
                f"pass an array of shape {self.channel_shape}."
            )
        return moved.astype(self.dtype)

    def _require_input(self, x: Any) -> Array:
        """x as an array whose channels are this layer's features."""
        if not is_array(x):
            x = np.asarray(x)
        library = library_of(x).name
        holds_arrays = self.gamma is not None or self._running is not None
        if holds_arrays and library != self._xp.__name__:
            raise DeviceError(
                f"x is an array of {library}, but this layer lives on {self.device} and holds arrays of "
                f"{self._xp.__name__}; pass x as one of those, or move the layer with to()."
            )
        shape = tuple(x.shape)
        axes = self.channel_axis if isinstance(self.channel_axis, tuple) else (self.channel_axis,)
        try:
            found = tuple([shape[axis] for axis in axes])
        except IndexError:
            found = self.channel_shape  # the axis is what is wrong, and will be spoken of
        if found != self.channel_shape:
            raise ShapeError(self._wrong_channels(shape, found))
        if self.dtype == "float64" and dtype_name(x.dtype) in ("float16", "bfloat16", "float32"):
            raise DTypeError(
                f"x has dtype {dtype_name(x.dtype)}, but this layer holds float64, which is not narrowed silently; "
                f'pass x as float64, or make the layer with dtype="float32".'
            )
        return x

    def _wrong_channels(self, shape: tuple[int, ...], found: tuple[int, ...]) -> str:
        hint = ""
        if len(self.channel_shape) == 1 and self.channel_shape[0] in shape:
            axis = shape.index(self.channel_shape[0])
            axis = -1 if shape[-1] == self.channel_shape[0] else axis
            hint = f" (did you mean channel_axis={axis}?)"
        size = found[0] if len(found) == 1 else found
        return (
            f"x of shape {shape} has {size} channels along channel_axis={self.channel_axis}, but this layer has "
            f"features {self.features}; pass x with {self.features} there, or make another layer{hint}."
        )


class _Constant:
    """What the backward pass of evaluation needs: the input and the constants it was normalised with."""

    __slots__ = ("beta", "gamma", "residual", "running", "where", "x")

    def __init__(
        self,
        x: Array,
        running: RunningStatistics,
        gamma: Array | None,
        beta: Array | None,
        residual: Array | None,
        where: Array | None,
    ) -> None:
        self.x, self.running, self.gamma, self.beta = x, running, gamma, beta
        self.residual, self.where = residual, where


def _require_channel_axis(channel_axis: Any) -> int | tuple[int, ...]:
    """One axis, or several in ascending order.  How many x has is not known yet."""
    given = tuple(channel_axis) if isinstance(channel_axis, Sequence) else (channel_axis,)
    if isinstance(channel_axis, str) or not all(is_integer(axis) for axis in given):
        raise ShapeError(
            f"channel_axis is {channel_axis!r}, but an axis is an integer; "
            f"pass the axis of x that keeps its own statistics, or a tuple of them."
        )
    axes = tuple(index(axis) for axis in given)
    if len(set(axes)) < len(axes):
        raise ShapeError(f"channel_axis is {channel_axis!r}, but it names an axis twice; pass every axis once.")
    if list(axes) != sorted(axes, key=lambda axis: (axis < 0, axis)):
        raise ShapeError(
            f"channel_axis is {channel_axis!r}, but features follow the axes of x in ascending order; "
            f"pass both in that order."
        )
    return axes if isinstance(channel_axis, Sequence) else axes[0]


def _require_features(features: int | Sequence[int], channel_axis: int | tuple[int, ...]) -> int | tuple[int, ...]:
    sizes = tuple(features) if isinstance(features, Sequence) else (features,)
    if isinstance(features, str) or not all(
        isinstance(size, int | np.integer) and not isinstance(size, bool) and size >= 0 for size in sizes
    ):
        raise ShapeError(
            f"features is {features!r}, but it is the number of channels; "
            f"pass a non-negative integer, or one for each channel axis."
        )
    axes = channel_axis if isinstance(channel_axis, tuple) else (channel_axis,)
    if len(axes) != len(sizes):
        raise ShapeError(
            f"features is {features!r} with {len(sizes)} sizes, but channel_axis={channel_axis!r} names {len(axes)} "
            f"axes; pass one size for each axis."
        )
    return int(sizes[0]) if isinstance(features, int | np.integer) else tuple(int(size) for size in sizes)


def _require_state_dtype(dtype: Any) -> str:
    try:
        name = "None" if dtype is None else str(np.dtype(dtype).name)  # for NumPy, None is float64
    except (TypeError, ValueError):
        name = str(dtype)
    if name not in ("float32", "float64"):
        raise DTypeError(
            f"dtype is {name}, but parameters and running statistics are kept in float32 or float64; "
            f'pass "float32", whose layer takes x of float16 and bfloat16 as well.'
        )
    return name


def _require_batches(value: Any) -> int:
    number = np.asarray(value.get() if hasattr(value, "get") else value)
    if number.shape != () or number.dtype.kind not in "iu" or number < 0:
        raise ValueError(f"num_batches_tracked is {value!r}, but it counts batches; pass a non-negative integer.")
    return int(number)


def _require_sizes(features: Any, state: Mapping[str, Any]) -> None:
    """Raise unless the arrays are as large as `features` claims: before a false claim takes the memory."""
    for key, values in state.items():
        if key != "num_batches_tracked" and values.shape not in (features, (features,)):
            raise ShapeError(f"{key} has shape {values.shape} where features is {features}")


def _moved(values: Any, xp: ModuleType) -> Array:
    """A copy of an array in NumPy or CuPy, from whichever of the two it is in."""
    if is_array(values) and library_of(values).name == "cupy" and xp is np:
        return values.get()
    return xp.array(values)


def _listed(verb: str, keys: Sequence[str]) -> str:
    return f"{verb} {', '.join(map(repr, keys))}" if keys else ""
