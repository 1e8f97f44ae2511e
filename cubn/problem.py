"""One call of batch normalisation, checked once and brought into canonical form.

`Problem` is what a machine plans by: sizes, element type, eps and activation; frozen and hashable.
`Call` is a problem together with where it came from: the layout of x and the library that owns it.  Every
error that a user can make with arrays is raised here, before any arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import inf
from numbers import Real
from typing import Any

import array_api_compat
import numpy as np

from cubn.chunks import as_dask
from cubn.errors import DTypeError, ShapeError
from cubn.layout import Layout, arrange, normalise_axes
from cubn.namespace import (
    STATISTICS_DTYPE,
    Array,
    Library,
    adopt,
    broadcastable,
    dtype_name,
    is_array,
    library_of,
    may_overlap,
    require_same_library,
)

ACTIVATIONS = (None, "relu")


@dataclass(frozen=True)
class Problem:
    """What is to be computed, without the arrays.

    Attributes
    ----------
    outer, channels, inner : int
        Sizes of the canonical form of x.
    dtype : str
        Element type of x, y, dy, dx: "float16", "bfloat16", "float32" or "float64".
    eps : float
        Added to the variance.
    activation : {None, "relu"}
        Applied last.
    """

    outer: int
    channels: int
    inner: int
    dtype: str
    eps: float
    activation: str | None

    @property
    def samples(self) -> int:
        """M: how many numbers each channel's statistics are taken over."""
        return self.outer * self.inner

    @property
    def statistics_dtype(self) -> str:
        """Element type of statistics, gamma, beta and running state."""
        return STATISTICS_DTYPE[self.dtype]


@dataclass(frozen=True)
class Call:
    """A problem, the layout of its x, and the library and dtype object it came with."""

    problem: Problem
    layout: Layout
    library: Library
    dtype: Any

    @property
    def statistics_dtype(self) -> Any:
        """The library's dtype object of the statistics."""
        return self.library.dtype(self.problem.statistics_dtype)

    @cached_property
    def _numpy_channels(self) -> bool:
        """True if values per channel are NumPy arrays of one axis, which need no rearranging."""
        return self.library.is_numpy and len(self.layout.channel_axes) == 1

    @cached_property
    def _ready(self) -> Any:
        """The dtype in which such arrays are used as they are; None where there are none."""
        return np.dtype(self.problem.statistics_dtype) if self._numpy_channels else None

    def canonical(self, array: Array) -> Array:
        """An array of x's shape as (outer, channels, inner), in native byte order and aligned."""
        if not _plain(array):
            array = np.require(array, array.dtype.newbyteorder("="), "A")
        with self.library.here():
            return self.layout.canonical(array, self.library.xp)

    def values(self, name: str, array: Any) -> Array:
        """An array that has the shape, dtype and library of x, in canonical form."""
        array = self._of_this_library(name, array)
        if tuple(array.shape) != self.layout.shape:
            raise ShapeError(
                f"{name} has shape {tuple(array.shape)}, but x has shape {self.layout.shape}; "
                f"pass {name} with the shape of x."
            )
        if dtype_name(array.dtype) != self.problem.dtype:
            raise DTypeError(
                f"{name} has dtype {dtype_name(array.dtype)}, but x has dtype {self.problem.dtype}; "
                f"pass {name} as {self.problem.dtype}."
            )
        return self.canonical(array)

    def mask(self, where: Any) -> Array:
        """`where` broadcast to x, in canonical form."""
        where = self._of_this_library("where", where)
        if dtype_name(where.dtype) != "bool":
            raise DTypeError(
                f"where has dtype {dtype_name(where.dtype)}, but it says which elements of x count; "
                f"pass a boolean array, such as where != 0."
            )
        if not broadcastable(where.shape, self.layout.shape):
            raise ShapeError(
                f"where has shape {tuple(where.shape)}, which does not broadcast to x of shape {self.layout.shape}; "
                f"pass one whose trailing axes have the sizes of x or 1."
            )
        with self.library.here():
            return self.layout.canonical(self.library.xp.broadcast_to(where, self.layout.shape), self.library.xp)

    def per_channel(self, name: str, values: Any) -> Array:
        """One number per channel, (channels,) in canonical order and in the statistics' dtype."""
        if (
            type(values) is np.ndarray
            and values.dtype is self._ready
            and values.shape == self.layout.channel_shape
            and values.flags.aligned
        ):
            return values  # what a training loop passes, thousands of times a second
        if self.takes(values):
            return values
        layout, wanted = self.layout, self.problem.statistics_dtype
        weak = not is_array(values)
        values = self._of_this_library(name, values)
        if tuple(values.shape) != layout.channel_shape:
            raise ShapeError(_channel_mismatch(name, tuple(values.shape), layout))
        given = dtype_name(values.dtype)
        if given != wanted:
            if not weak and (given not in STATISTICS_DTYPE or given == "float64"):
                raise DTypeError(
                    f"{name} has dtype {given}, but x of {self.problem.dtype} has statistics and parameters in "
                    f"{wanted}, to which only narrower floats are widened; pass {name} as {wanted}."
                )
            with self.library.here():
                values = self.library.xp.astype(values, self.statistics_dtype)
        return layout.flatten(values, self.library.xp)

    def takes(self, values: Any) -> bool:
        """True if values per channel are used as they are: memory of NumPy or CuPy, and nothing to rearrange in it."""
        return bool(
            len(self.layout.channel_axes) == 1
            and self.library.strided
            and is_array(values)
            and values.shape == (self.problem.channels,)
            and dtype_name(values.dtype) == self.problem.statistics_dtype
            and library_of(values) is self.library
            and (type(values) is np.ndarray or not self.library.is_numpy)
            and _plain(values)
        )

    def sees(self, array: Array) -> bool:
        """True if the canonical form of an array of x's shape is a view of it."""
        return self.library.strided and self.layout.in_place and self.layout.admits(array.strides) and _plain(array)

    def user_channels(self, values: Array | None) -> Array | None:
        """Per-channel results in the shape and dtype that users see."""
        if values is None:
            return None
        if self._numpy_channels:
            return values.astype(self._ready, copy=False)
        if values.dtype != self.statistics_dtype:
            with self.library.here():
                values = self.library.xp.astype(values, self.statistics_dtype)
        return self.layout.unflatten(values, self.library.xp)

    def require_out(self, out: Any, **inputs: Array | None) -> None:
        """Check a preallocated result against x and against the inputs it must not overwrite."""
        if not is_array(out):
            raise TypeError(
                f"out is a {type(out).__name__}, but a result needs memory to be written into; "
                f"pass an array like x, or leave out away."
            )
        require_same_library("out", out, self.library)
        if tuple(out.shape) != self.layout.shape:
            raise ShapeError(
                f"out has shape {tuple(out.shape)}, but x has shape {self.layout.shape}; pass out with the shape of x."
            )
        if dtype_name(out.dtype) != self.problem.dtype:  # byte order is no difference
            raise DTypeError(
                f"out has dtype {dtype_name(out.dtype)}, but x has dtype {self.problem.dtype}; "
                f"pass out with the dtype of x."
            )
        if not _writeable(out):
            raise ValueError("out is read-only, but the result is written into it; pass a writeable array.")
        for name, array in inputs.items():
            if array is not None and may_overlap(out, array):
                raise ValueError(
                    f"out overlaps {name} in memory, but {name} is still needed after the first element of out "
                    f"is written; pass memory of its own for out."
                )

    def destination(self, out: Array | None) -> tuple[Array | None, Array | None]:
        """Where the result goes, and its canonical view for the machine to write into (None: it has none)."""
        if not self.library.strided:
            return out, None
        view: Array | None = None
        if out is None:
            out, view = self.layout.allocate(self.library, self.dtype)
        elif self.layout.admits(out.strides):
            view = self.layout.canonical(out, self.library.xp)
        return out, view if view is None or _plain(view) else None

    def deliver(self, result: Array, target: Array | None, view: Array | None) -> Array:
        """The machine's canonical result as the user's array."""
        if view is not None:
            return target
        restored = self.layout.restore(result, self.library.xp)
        if target is None:
            return restored
        with self.library.here():
            target[...] = restored
        return target

    def _of_this_library(self, name: str, values: Any) -> Array:
        if not is_array(values):
            return self.library.asarray(values)
        values, library = adopt(values, name)
        if self.library.name == "dask" and library.strided:
            return as_dask(values)  # the blocks of x are such arrays
        require_same_library(name, values, self.library)
        return values


def pose(
    x: Any, *, channel_axis: int | Sequence[int], eps: float = 0.0, activation: str | None = None
) -> tuple[Array, Call]:
    """Check x and the options, and return x as an array with the call it makes."""
    if type(x) is np.ndarray and type(channel_axis) is int:
        try:
            return x, _numpy_call(x.shape, x.strides, x.dtype, channel_axis, eps, activation)
        except TypeError:
            pass  # what cannot be looked up; what is wrong with it is said below
    x, library = adopt(x)
    return x, _posed(x, library, channel_axis, eps, activation)


@lru_cache(maxsize=4096, typed=True)
def _numpy_call(
    shape: tuple[int, ...], strides: tuple[int, ...], dtype: Any, channel_axis: int, eps: float, activation: str | None
) -> Call:
    """What `_posed` gives for arrays of this form: a training loop asks for the same thousands of times a second."""
    like = np.lib.stride_tricks.as_strided(np.empty(0, dtype), shape, strides)  # has no memory, and is not read
    return _posed(like, adopt(like)[1], channel_axis, eps, activation)


def _posed(x: Array, library: Library, channel_axis: int | Sequence[int], eps: float, activation: str | None) -> Call:
    require_eps(eps)
    require_activation(activation)
    name = dtype_name(x.dtype)
    if name not in STATISTICS_DTYPE:
        raise DTypeError(
            f"x has dtype {name}, but batch normalisation is defined for float16, bfloat16, float32 and float64; "
            f"pass x as one of these{_remedy(name)}."
        )
    shape = tuple(x.shape)
    if library.name == "dask" and any(size != size for size in shape):  # NaN
        raise ShapeError(
            f"x is a Dask array with chunks of unknown size (shape {shape}), but a mean is taken over a number of "
            f"samples; call x.compute_chunk_sizes() first."
        )
    axes = _one_axis(channel_axis, shape) if type(channel_axis) is int else normalise_axes(channel_axis, shape)
    strides = tuple(x.strides) if library.strided else None
    return _call(shape, strides, axes, name, float(eps), activation, library, x.dtype)


@lru_cache(maxsize=4096)
def _one_axis(channel_axis: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return normalise_axes(channel_axis, shape)


@lru_cache(maxsize=4096)
def _call(
    shape: tuple[int, ...],
    strides: tuple[int, ...] | None,
    axes: tuple[int, ...],
    dtype: str,
    eps: float,
    activation: str | None,
    library: Library,
    dtype_object: Any,
) -> Call:
    layout = arrange(shape, strides, axes)
    problem = Problem(layout.outer, layout.channels, layout.inner, dtype, eps, activation)
    return Call(problem, layout, library, dtype_object)


def require_eps(eps: Any) -> None:
    """Raise unless eps is a finite number, zero or more."""
    if not isinstance(eps, Real) or isinstance(eps, bool):
        raise TypeError(f"eps is {eps!r}, but it is added to the variance; pass a number such as 1e-5.")
    try:
        finite = 0 <= float(eps) < inf
    except OverflowError:  # an integer of more than 308 digits
        finite = False
    if not finite:
        raise ValueError(f"eps is {eps!r}, but it keeps the variance away from zero; pass a finite number >= 0.")


def require_activation(activation: Any) -> None:
    """Raise unless the activation is one that there is."""
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation is {activation!r}, but cubn knows None and "relu"; pass one of these.')


def require_variance(var: Array, library: Library) -> None:
    """Raise if a variance is known to be negative.  NumPy only: elsewhere looking would wait for the device."""
    if library.is_numpy and (var < 0).any():
        raise ValueError(
            f"var has a negative entry ({var.min()}), but a variance is a mean of squares; "
            f"pass mean and var in this order."
        )


def require_training_samples(samples: int, layout: Layout) -> None:
    """Raise unless a channel has the two samples that a variance needs.  `samples` counts all ranks."""
    if samples > 1:
        return
    averaged = tuple(axis for axis in range(len(layout.shape)) if axis not in layout.channel_axes)
    if samples == 0:
        raise ShapeError(
            f"x of shape {layout.shape} is an empty batch: it has no sample along the averaged axes {averaged}, "
            f"but the statistics are taken over them; pass at least two samples, or use batch_norm_inference."
        )
    raise ShapeError(
        f"x of shape {layout.shape} has one sample per channel along the averaged axes {averaged}, "
        f"but its variance would be zero whatever it holds; pass at least two samples, "
        f"or use batch_norm_inference (layer: eval())."
    )


def _channel_mismatch(name: str, shape: tuple[int, ...], layout: Layout) -> str:
    axes = layout.channel_axes[0] if len(layout.channel_axes) == 1 else layout.channel_axes
    hint = ""
    if len(shape) == 1:
        fitting = [axis for axis, size in enumerate(layout.shape) if size == shape[0] and axis != axes]
        if fitting:
            negative = fitting[-1] - len(layout.shape)
            hint = f" (did you mean channel_axis={negative if negative == -1 else fitting[-1]}?)"
    return (
        f"{name} has shape {shape}, but x of shape {layout.shape} has channels of shape {layout.channel_shape} "
        f"with channel_axis={axes}; pass {name} with shape {layout.channel_shape}{hint}."
    )


def _remedy(dtype: str) -> str:
    if dtype.startswith(("int", "uint", "bool")):
        return ", such as x.astype('float32')"
    if dtype.startswith("complex"):
        return ", its real and imaginary parts apart"
    return ""


def _writeable(out: Array) -> bool:
    if isinstance(out, np.ndarray):
        return bool(out.flags.writeable)
    return bool(array_api_compat.is_writeable_array(out))


def _plain(out: Array) -> bool:
    return not isinstance(out, np.ndarray) or (out.flags.aligned and out.dtype.isnative)
