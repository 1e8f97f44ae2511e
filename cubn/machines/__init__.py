"""The seam between the interface and what computes: six entry points, the same on every machine.

A *machine* is a module with the functions of `Machine` below.  Everything above it (checks, running
statistics, synchronisation) is written once; everything below it sees one form of input only:

* ``x``, ``dy``, ``residual``, ``out`` and ``where`` have the shape (outer, channels, inner), the
  *canonical form* of `cubn.layout`, with any strides; ``where`` is boolean;
* ``mean`` and ``rstd`` have the shape (channels,) and are as wide as the machine's own `moments` or
  `forward` gave them, or float64 where they came from the caller;
* ``gamma`` and ``beta`` have the shape (channels,) and the statistics' dtype, or are None;
* ``out`` is memory to write the result into, or None: then the machine allocates.  `out` may be the
  very same memory as an input of the same call (inference in place), never a shifted part of it;
* nothing is left to check, any size may be 0, and no input is ever written to.

`active` is what a machine keeps to know where ReLU let the gradient pass when it cannot be computed again
from x alone (with a residual).  Its form is the machine's own business; it is given back together with the
x and the `where` that it was made with.
"""

from typing import Any, NamedTuple, Protocol

from cubn.layout import MemoryOrder
from cubn.moments import Moments
from cubn.namespace import Array
from cubn.problem import Problem


class Running(NamedTuple):
    """Running statistics that a forward pass brings nearer to those of its batch, and the batch's weight.

    Both arrays have the shape (channels,) and the statistics' dtype.  They are never written to: a machine
    returns new ones, made as `cubn.moments.towards` does.  There is no mask then, and there are two samples.
    """

    mean: Array
    var: Array
    weight: float


class Forward(NamedTuple):
    """What the fused forward pass of a machine returns; `running` is (mean, var), None where none were given."""

    y: Array
    moments: Moments
    rstd: Array
    active: Any
    running: tuple[Array, Array] | None


class GradientSums(NamedTuple):
    """The two sums over a channel that its gradients need, both of shape (channels,)."""

    dy: Array
    dy_xhat: Array


class Backward(NamedTuple):
    """What the fused backward pass of a machine returns."""

    dx: Array
    dresidual: Array | None
    sums: GradientSums


class Machine(Protocol):
    """The four verbs and two fusions of batch normalisation.

    With a = gamma * rstd, xhat = (x - mean) * rstd and M the count of a channel:

        normalize        y  = act(a * (x - mean) + beta + residual)
        gradient_sums    s0 = sum dz,  s1 = sum dz * xhat,  where dz = dy wherever act let it pass, else 0
        input_gradient   dx = a * (dz - s0 / M - xhat * s1 / M),  or a * dz when `sums` is None
    """

    name: str

    def moments(self, problem: Problem, x: Array, where: Array | None = None) -> Moments:
        """Count, mean and sum of squared distances per channel, over the samples that `where` admits."""

    def normalize(
        self,
        problem: Problem,
        x: Array,
        mean: Array,
        rstd: Array,
        gamma: Array | None,
        beta: Array | None,
        residual: Array | None = None,
        where: Array | None = None,
        out: Array | None = None,
        keep: bool = True,
    ) -> tuple[Array, Any]:
        """Return y, and `active` where there is both a residual and an activation and `keep` asks for it."""

    def gradient_sums(
        self,
        problem: Problem,
        dy: Array,
        x: Array,
        mean: Array,
        rstd: Array,
        gamma: Array | None,
        beta: Array | None,
        where: Array | None = None,
        active: Any = None,
    ) -> GradientSums:
        """Return the sums of dz and of dz * xhat over each channel."""

    def input_gradient(
        self,
        problem: Problem,
        dy: Array,
        x: Array,
        mean: Array,
        rstd: Array,
        gamma: Array | None,
        beta: Array | None,
        count: Any,
        sums: GradientSums | None,
        where: Array | None = None,
        active: Any = None,
        residual: bool = False,
        out: Array | None = None,
    ) -> tuple[Array, Array | None]:
        """Return dx, and dz as the gradient of the residual when `residual` asks for it (else None)."""

    def forward(
        self,
        problem: Problem,
        x: Array,
        gamma: Array | None,
        beta: Array | None,
        residual: Array | None = None,
        where: Array | None = None,
        out: Array | None = None,
        running: Running | None = None,
    ) -> Forward:
        """`moments` and `normalize` in one, for statistics that need nobody else's samples."""

    def backward(
        self,
        problem: Problem,
        dy: Array,
        x: Array,
        mean: Array,
        rstd: Array,
        gamma: Array | None,
        beta: Array | None,
        count: Any,
        where: Array | None = None,
        active: Any = None,
        residual: bool = False,
        out: Array | None = None,
    ) -> Backward:
        """`gradient_sums` and `input_gradient` in one; `count` None means the statistics are constants."""


class Preparing(Machine, Protocol):
    """A machine that can also prepare a *pass*: decide, once for all calls of a form, whatever their addresses.

    `prepare_forward`, `prepare_backward` and `prepare_inference` are given the operands of one such call in canonical
    form, all of them views of what the user passed (or None), and the memory order of results.  They return None where
    the machine would have to copy an operand; nothing is computed yet.  A pass is then called with the users' own
    arrays of that form, on the current stream, by any number of threads; it allocates results that it is not given.
    What it leaves of the statistics is opaque, and is looked at through it.
    """

    def prepare_forward(
        self,
        problem: Problem,
        x: Array,
        gamma: Array | None,
        beta: Array | None,
        residual: Array | None,
        out: Array | None,
        running: Running | None,
        memory: MemoryOrder,
    ) -> "ForwardPass | None":
        """A pass for `forward` without a mask."""

    def prepare_backward(
        self,
        problem: Problem,
        dy: Array,
        x: Array,
        gamma: Array | None,
        beta: Array | None,
        left: Any,
        residual: bool,
        out: Array | None,
        memory: MemoryOrder,
    ) -> "BackwardPass | None":
        """A pass for `backward` of what a forward pass has `left`; `residual` asks for its gradient."""

    def prepare_inference(
        self,
        problem: Problem,
        x: Array,
        mean: Array,
        var: Array,
        gamma: Array | None,
        beta: Array | None,
        residual: Array | None,
        out: Array | None,
        memory: MemoryOrder,
    ) -> "InferencePass | None":
        """A pass for `normalize` with mean and var in the statistics' dtype."""


class ForwardPass(Protocol):
    """`forward` for calls of one form."""

    def __call__(
        self,
        x: Array,
        gamma: Array | None,
        beta: Array | None,
        residual: Array | None,
        out: Array | None,
        running: Running | None,
    ) -> tuple[Array, Any]:
        """Return y, and what is left of the statistics."""

    def statistics(self, left: Any) -> tuple[Moments, Array]:
        """Moments and rstd, as `forward` gives them."""

    def moved(self, left: Any) -> tuple[Array, Array] | None:
        """The running statistics after the batch."""

    def active(self, left: Any) -> Any:
        """`active`, as `forward` gives it."""


class BackwardPass(Protocol):
    """`backward` for calls of one form."""

    def __call__(
        self, dy: Array, x: Array, gamma: Array | None, beta: Array | None, left: Any, out: Array | None
    ) -> tuple[Array, Array | None, Array | None, Array | None]:
        """Return dx, dgamma, dbeta and dresidual; None where there was no gamma or beta, or nobody asked."""


class InferencePass(Protocol):
    """`normalize` for calls of one form."""

    def __call__(
        self,
        x: Array,
        mean: Array,
        var: Array,
        gamma: Array | None,
        beta: Array | None,
        residual: Array | None,
        out: Array | None,
    ) -> Array:
        """Return y."""
