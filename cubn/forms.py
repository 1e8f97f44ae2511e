"""Calls that were made before: what follows from the form of a call is looked up once, and not decided again.

The *form* of a call is what its checks, its layout and its launches depend on: the options, and of every array the
class, dtype, shape, strides, device and distance from a vector boundary.  Values and addresses are no part of it.
What was found out about a form is remembered if the call was good and its machine has prepared a pass for it (see
`cubn.machines.Preparing`).  Calls with an error and calls that need a copy are not remembered.

What depends on addresses is asked in every call: whether `out` overlaps an input.
"""

import sys
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np

from cubn.namespace import Array

VECTOR_BYTES = 16  # the widest load and store of any machine

MOST = 4096
"""Forms of each kind of call that are remembered; a program has that many only if its shapes never repeat."""

Form: TypeAlias = tuple[Any, ...]


def form_of_cupy(options: Form, arrays: tuple[Array | None, ...]) -> tuple[Form, list[int]]:
    """Of each array dtype, shape, strides, device and distance from a vector boundary; and the addresses."""
    form: list[Any] = [options]
    addresses = []
    for array in arrays:
        if array is None:
            form.append(None)
        else:
            memory = array.data
            address = memory.ptr
            addresses.append(address)
            form.append((array.dtype, array.shape, array.strides, memory.device_id, address % VECTOR_BYTES))
    return tuple(form), addresses


def form_of_numpy(options: Form, arrays: tuple[Array | None, ...]) -> tuple[Form, list[int]]:
    """Likewise; an array may be read-only, and one of a class of its own has rules of its own."""
    given = [array for array in arrays if array is not None]
    addresses = [array.ctypes.data for array in given]
    forms = (
        (array.dtype, array.shape, array.strides, array.__class__, address % VECTOR_BYTES, array.flags.writeable)
        for array, address in zip(given, addresses, strict=True)
    )
    return (options, *(None if array is None else next(forms) for array in arrays)), addresses


FORMS: dict[type, Callable[[Form, tuple[Array | None, ...]], tuple[Form, list[int]]]] = {}
"""Class of arrays -> what reads the form of a call with them, for the classes of which a form may be remembered."""

ADDRESSES: dict[type, Callable[[Array], int]] = {}
"""Class of arrays -> what reads their address, for the same classes."""


def admits(x: Array) -> bool:
    """True if forms of arrays of x's class are remembered; they are looked up from now on."""
    if type(x) not in FORMS:
        cupy = sys.modules.get("cupy")
        if type(x) is np.ndarray:
            FORMS[np.ndarray], ADDRESSES[np.ndarray] = form_of_numpy, attrgetter("ctypes.data")
        elif cupy is not None and type(x) is cupy.ndarray:
            FORMS[type(x)], ADDRESSES[type(x)] = form_of_cupy, attrgetter("data.ptr")
    return type(x) in FORMS


def form_of(options: Form, *arrays: Array | None) -> tuple[Form | None, list[int]]:
    """The form of a call, and the addresses of the arrays that there are.

    The class of the first array is in `FORMS`.  None is the form of a call with a list or another library's array.
    """
    try:
        return FORMS[arrays[0].__class__](options, arrays)
    except AttributeError:
        return None, []


def addresses_of(*arrays: Array | None) -> list[int]:
    """Of arrays of one class in `FORMS`, as far as they are given."""
    address = ADDRESSES[arrays[0].__class__]
    return [address(array) for array in arrays if array is not None]


Found = TypeVar("Found")


class Remembered(Generic[Found]):
    """What was found out about calls of one kind, by their form."""

    def __init__(self) -> None:
        self._found: dict[Form | None, Found] = {}

    def get(self, form: Form | None) -> Found | None:
        """What is known of the form, if anything is."""
        try:
            return self._found.get(form)
        except TypeError:  # an option that has no hash, and so is wrong
            return None

    def add(self, form: Form, found: Found) -> None:
        """Remember it."""
        if len(self._found) >= MOST:
            self._found.clear()
        self._found[form] = found


class Reach:
    """How far the arrays of a form reach from their first elements, and so whether one of them may overlap others.

    Parameters
    ----------
    form : Form
        Of a call.
    written : int
        The place among its arrays of the one that is written to, if there is one.
    read : iterable of int
        The places of those that it must not meet, likewise.
    """

    __slots__ = ("_others", "_written")

    def __init__(self, form: Form, written: int, read: Iterable[int]) -> None:
        _, *arrays = form
        given = [place for place, array in enumerate(arrays) if array is not None]  # whose addresses there are
        spans = {place: (given.index(place), *_span(arrays[place])) for place in given}
        self._written = spans.get(written)
        self._others = tuple(spans[place] for place in read if place in spans)

    def apart(self, addresses: list[int]) -> bool:
        """True if no byte of what is written to, from the lowest to the highest, is between those of another array."""
        if self._written is None:
            return True
        place, low, high = self._written
        start = addresses[place]
        low, high = start + low, start + high
        for place, lowest, highest in self._others:
            start = addresses[place]
            if start + lowest < high and low < start + highest:
                return False
        return True


def _span(array: Form) -> tuple[int, int]:
    """Bytes from the first element to the lowest byte, and to the one after the highest."""
    dtype, shape, strides, *_ = array
    ways = [(size - 1) * stride for size, stride in zip(shape, strides, strict=True)]
    return sum(way for way in ways if way < 0), sum(way for way in ways if way > 0) + dtype.itemsize
