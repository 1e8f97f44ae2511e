"""What the machine of the kernels runs on: memory, a workspace and launches.  CuPy's on a GPU, the tests' without.

A launch is either made with arguments by name, or *bound*: then all arguments are given at once but those that differ
from call to call, and these stand as

    Operand   an array among the operands of a call
    Part      a part of a block among them: the statistics of a call lie one after the other in one piece of memory
    Number    a float among them
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, TypeAlias

from cubn.machines.cuda.plan import MERGING, DeviceLimits, LaunchPlan
from cubn.namespace import Array
from cubn.problem import Problem

Block: TypeAlias = Any
"""Memory without a shape, in its backend's own terms."""

Launch: TypeAlias = Callable[[Sequence[Any]], None]
"""A bound launch, called with the operands."""


class Operand(NamedTuple):
    """An array that each call brings, by its place among the operands."""

    place: int


class Part(NamedTuple):
    """An array within a block that each call brings: `offset` in bytes, shape and dtype."""

    place: int
    offset: int
    shape: tuple[int, ...]
    dtype: Any


class Number(NamedTuple):
    """A float that each call brings."""

    place: int


class Backend(Protocol):
    """What allocates memory and launches kernels."""

    def current_device(self) -> int:
        """Number of the current device, to which everything below refers."""

    def on_device_of(self, array: Array) -> AbstractContextManager[Any]:
        """Makes the array's device the current one."""

    def limits(self) -> DeviceLimits:
        """What the device can do."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Uninitialised memory, C-contiguous and aligned to a vector."""

    def block(self, size: int) -> Block:
        """So many bytes of uninitialised memory, aligned to a vector."""

    def scratch(self, size: int) -> Block:
        """A block that no caller is given, and that a captured graph may write to at every replay."""

    def view(self, block: Block, part: Part) -> Array:
        """The array of that place, shape and dtype in a block, which it keeps alive."""

    def contiguous(self, array: Array, dtype: Any) -> Array:
        """The same values, C-contiguous and aligned to a vector: the array itself if it is all that."""

    def address(self, array: Array) -> int:
        """Of the first element, in bytes."""

    def workspace(self, plan: LaunchPlan) -> tuple[Array, Array, Array]:
        """Partials of any content, arrivals that are zero, and barriers that were zero when they were made.

        All three are the current stream's and are kept from call to call.
        """

    def resident(self, plan: LaunchPlan) -> int:
        """How many blocks of a plan with a cluster or a cooperative launch the device holds at once."""

    def launch(self, plan: LaunchPlan, arguments: dict[str, Any]) -> None:
        """Run the plan's kernel with arguments by name: arrays, None, int and float."""

    def bind(self, plan: LaunchPlan, arguments: Mapping[str, Any]) -> Launch:
        """The plan's launch on this device, with an `Operand`, `Part` or `Number` for what calls bring.

        The workspace is not among the arguments: each call takes the one of its stream.
        """

    def widening(self, problem: Problem) -> Callable[[Array, Array, Block], None]:
        """Fills a block with mean and (var + eps) ** -1/2 as doubles, from arrays of the statistics' dtype."""


WORKSPACE = ("partials", "arrivals", "barriers")


def with_workspace(backend: Backend, plan: LaunchPlan, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, and memory for what blocks leave to one another if the plan's do."""
    if plan.kernel not in MERGING:
        return arguments
    workspace = backend.workspace(plan) if plan.partials else (None, None, None)
    return arguments | dict(zip(WORKSPACE, workspace, strict=True))


class LaunchByName:
    """A bound launch of a backend that is given arrays rather than addresses, by way of its `launch`."""

    def __init__(self, backend: Backend, plan: LaunchPlan, arguments: Mapping[str, Any]) -> None:
        self._backend, self._plan, self._arguments = backend, plan, arguments

    def __call__(self, operands: Sequence[Any]) -> None:
        """Launch with these operands."""
        arguments = {name: self._value(argument, operands) for name, argument in self._arguments.items()}
        self._backend.launch(self._plan, with_workspace(self._backend, self._plan, arguments))

    def _value(self, argument: Any, operands: Sequence[Any]) -> Any:
        if isinstance(argument, Part):
            return self._backend.view(operands[argument.place], argument)
        return operands[argument.place] if isinstance(argument, Operand | Number) else argument
