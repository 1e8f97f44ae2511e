"""Running statistics as a value: what a batch-norm layer remembers for inference."""

import warnings
from dataclasses import dataclass
from numbers import Real
from typing import Any

from cubn.moments import Moments, towards
from cubn.namespace import Array, is_static_count, namespace_of


@dataclass(frozen=True, eq=False)
class RunningStatistics:
    """Estimates of a population's mean and variance, and of how many batches they are made.

    Attributes
    ----------
    mean, var : array (C,)
        In the unit of x and of x squared.
    num_batches_tracked : int
        How many batches with samples in them have been absorbed.

    Examples
    --------
    >>> import numpy as np, cubn
    >>> running = cubn.RunningStatistics.initial(np, (1,), "float64")
    >>> running = running.absorb(cubn.moments(np.array([[2.0], [6.0]])), momentum=0.25)
    >>> running.mean, running.var, running.num_batches_tracked
    (array([1.]), array([2.75]), 1)
    """

    mean: Array
    var: Array
    num_batches_tracked: int

    @classmethod
    def initial(cls, xp: Any, shape: tuple[int, ...], dtype: Any) -> "RunningStatistics":
        """Mean 0, variance 1, no batch: with these, inference before any training changes x by eps alone."""
        return cls(xp.zeros(shape, dtype=dtype), xp.ones(shape, dtype=dtype), 0)

    def absorb(self, batch: Moments, momentum: float | None) -> "RunningStatistics":
        """A new value that has seen one more batch.

        running = running + weight * (batch - running), with the mean and the *unbiased* variance of the batch
        (Ioffe & Szegedy 2015, Algorithm 2, step 10).  `momentum` is the weight of the new batch; None weighs
        all batches alike: 1 / num_batches_tracked, this one counted.

        A channel with fewer than two samples has no unbiased variance and stays as it was.  A batch in which
        that is every channel changes nothing, the counter included.
        """
        if is_static_count(batch.count):
            if batch.count < 2:
                return self
            admitted = None
        else:
            xp = namespace_of(self.mean)
            admitted = batch.count >= 2
            if not bool(xp.any(admitted)):
                return self
        mean, var = towards(self.mean, self.var, batch, self.weight(momentum))
        if admitted is not None:
            mean, var = (xp.asarray(xp.where(admitted, *pair)) for pair in ((mean, self.mean), (var, self.var)))
        return RunningStatistics(mean, var, self.num_batches_tracked + 1)

    def weight(self, momentum: float | None) -> float:
        """Of the next batch."""
        return 1.0 / (self.num_batches_tracked + 1) if momentum is None else momentum


def require_momentum(momentum: Any) -> None:
    """Raise unless momentum is None or in [0, 1]; warn where it looks like the other convention."""
    if momentum is None:
        return
    if not isinstance(momentum, Real) or isinstance(momentum, bool):
        raise TypeError(
            f"momentum is {momentum!r}, but it is the weight of the new batch in the running statistics; "
            f"pass a number from 0 to 1, or None for the average over all batches."
        )
    try:
        share = 0 <= float(momentum) <= 1
    except OverflowError:  # an integer of more than 308 digits
        share = False
    if not share:
        raise ValueError(
            f"momentum is {momentum!r}, but it is the weight of the new batch in the running statistics; "
            f"pass a number from 0 to 1, such as 0.1."
        )
    if float(momentum) >= 0.5:
        warnings.warn(
            f"momentum={float(momentum):g} gives the new batch half the weight or more: in cubn, as in PyTorch, "
            f"momentum is the weight of the new batch (Keras, Flax and ONNX mean the weight of the old value); "
            f"for theirs of {float(momentum):g} pass {1 - float(momentum):.4g}.",
            stacklevel=3,
        )
