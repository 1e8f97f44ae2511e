"""What cubn asks of a message-passing library, and what every adapter says in the same words."""

from collections.abc import Sequence
from math import inf, prod
from numbers import Real
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from cubn.errors import SyncError
from cubn.namespace import Array


class Sync(Protocol):
    """What an adapter to a message-passing library must offer.

    Attributes
    ----------
    rank : int
        Number of this worker, from 0.
    size : int
        How many workers there are.
    """

    rank: int
    size: int

    def all_gather(self, payload: Array) -> Sequence[Array]:
        """The payloads of all ranks in rank order, each as it was sent.

        A payload is one-dimensional and of the widest float of its library.  Lengths differ where ranks
        disagree, and must arrive all the same: this is how the ranks hear of it.  The arrays returned may be
        NumPy's, whatever was sent.
        """


def lost(rank: int, size: int, timeout: float, what: str = "one of them did not arrive") -> SyncError:
    """The error of a rank that waited in vain."""
    return SyncError(
        f"rank {rank} waited for {size} ranks, but {what} within {timeout:g} s or gave up; "
        f"call from all ranks, and make new communicators after an error."
    )


def unusable(rank: int) -> SyncError:
    """The error of a communicator that has lost a rank before."""
    return SyncError(
        f"rank {rank} has lost another rank of this communicator before, and messages are still on their way in it; "
        f"make new communicators after an error."
    )


def require_timeout(timeout: Any) -> float:
    """`timeout` in seconds; ValueError unless it is above zero."""
    if not (isinstance(timeout, Real) and not isinstance(timeout, bool) and 0 < float(timeout) < inf):
        raise ValueError(f"timeout is {timeout!r}, but ranks wait for one another; pass seconds above zero.")
    return float(timeout)


def require_shape(shape: Sequence[int], size: int) -> tuple[int, ...]:
    """The shape of a grid of `size` ranks; ValueError if it is none."""
    sides = tuple(shape)
    if not sides or not all(isinstance(side, int) and side > 0 for side in sides) or prod(sides) != size:
        raise ValueError(
            f"shape is {shape!r}, but {size} ranks are laid out in it; pass positive integers whose product is {size}."
        )
    return sides


def patience(timeout: float, side: int) -> float:
    """How long to wait along a side of a grid: one who has lost a rank on a side before still comes and says so."""
    return timeout * (1 + side)


def lines(rank: int, shape: Sequence[int]) -> list[tuple[int, list[int]]]:
    """For each side of a grid, the place of a rank in its line along that side, and the ranks of this line.

    Neighbouring ranks lie along the first side.

    Examples
    --------
    >>> lines(4, (3, 2))
    [(1, [3, 4, 5]), (1, [1, 4])]
    """
    found, stride = [], 1
    for side in shape:
        place = rank // stride % side
        first = rank - place * stride
        found.append((place, list(range(first, first + side * stride, stride))))
        stride *= side
    return found


def on_host(values: Array) -> npt.NDArray[Any]:
    """A one-dimensional array of any library as NumPy's; of a device, once the device has come there."""
    if isinstance(values, np.ndarray):
        return values
    if hasattr(values, "get"):  # CuPy
        return np.asarray(values.get())
    if hasattr(values, "detach"):  # PyTorch
        return np.asarray(values.detach().cpu())
    try:
        return np.asarray(values)
    except (RuntimeError, TypeError, BufferError):  # a device that gives its memory to nobody
        return np.asarray([float(values[place]) for place in range(int(values.shape[0]))])
