"""The same values in every memory layout that a user may hold them in."""

from collections.abc import Callable

import numpy as np


def c_order(values, kept):
    return np.ascontiguousarray(values)


def fortran_order(values, kept):
    return np.asfortranarray(values)


def channels_last(values, kept):
    """The kept axes innermost in memory, the shape as it was."""
    axes = [axis for axis in range(values.ndim) if axis not in kept] + list(kept)
    return np.ascontiguousarray(values.transpose(axes)).transpose(np.argsort(axes))


def every_second(values, kept):
    """Every second element along the last axis of something larger."""
    larger = np.full((*values.shape[:-1], 2 * values.shape[-1] + 1), 77, values.dtype)
    larger[..., 1::2] = values
    return larger[..., 1::2]


def cut_out(values, kept):
    """The middle of something larger along every axis."""
    larger = np.full([size + 3 for size in values.shape], 77, values.dtype)
    middle = tuple(slice(1, 1 + size) for size in values.shape)
    larger[middle] = values
    return larger[middle]


def backwards(values, kept):
    """Negative steps along all axes."""
    steps = tuple(slice(None, None, -1) for _ in values.shape)
    return values[steps].copy()[steps]


def half_backwards(values, kept):
    """A negative step along the last axis alone."""
    return values[..., ::-1].copy()[..., ::-1]


def read_only(values, kept):
    values = values.copy()
    values.flags.writeable = False
    return values


def unaligned(values, kept):
    """One byte off."""
    memory = np.zeros(values.nbytes + 1, np.uint8)
    view = memory[1:].view(values.dtype).reshape(values.shape)
    view[...] = values
    assert view.size == 0 or values.dtype.itemsize == 1 or not view.flags.aligned
    return view


LAYOUTS: tuple[Callable, ...] = (
    c_order, fortran_order, channels_last, every_second, cut_out, backwards, half_backwards, read_only, unaligned,
)  # fmt: skip
DENSE = (c_order, fortran_order, channels_last)


def dtype_of(name):
    """A NumPy dtype by name, bfloat16 included; None where ml_dtypes is not installed."""
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError:
        return None
    return np.dtype(ml_dtypes.bfloat16)
