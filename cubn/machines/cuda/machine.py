"""The machine of the kernels, written once over what launches them: CuPy on a GPU, the executor of the tests without.

Tensors are read in place where they are dense but for the distance between their outermost rows, which covers
every memory order and slices of the batch and of the channels; anything else is copied once.  Masks are read as
dense bytes.

Memory: forward allocates y and one (3, channels) array (mean, m2, rstd; a further row for the counts under a mask or
for the running statistics), backward dx and one (2, channels); `active` and `dresidual` where they are asked for; and
a workspace that is kept.

`active` has a byte for each element, in the shape of x, or is packed: then it has one axis, and a byte for the
elements of 16 bytes of x.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache, wraps
from typing import Any, Protocol, TypeVar, cast

import numpy as np

from cubn.machines import Backward, Forward, GradientSums, Running
from cubn.machines.cuda.plan import (
    BYTES,
    ITEM_BYTES,
    KERNELS,
    MERGING,
    PACKED,
    VECTOR_BYTES,
    DeviceLimits,
    LaunchPlan,
    Memory,
    backward_plans,
    fewer_teams,
    forward_plans,
    gradient_sums_plan,
    input_gradient_plan,
    moments_plan,
    normalize_plan,
)
from cubn.moments import Moments, towards
from cubn.namespace import Array, is_static_count
from cubn.problem import Problem


class Backend(Protocol):
    """What allocates memory and launches kernels."""

    def on_device_of(self, array: Array) -> AbstractContextManager[Any]:
        """Makes the array's device the current one, to which everything below refers."""

    def limits(self) -> DeviceLimits:
        """What the device can do."""

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """Uninitialised memory, C-contiguous and aligned to a vector."""

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


Verb = TypeVar("Verb", bound=Callable[..., Any])


def _on_its_device(verb: Verb) -> Verb:
    """The verb with the device of its first tensor as the current one; all tensors of a call live on one."""

    @wraps(verb)
    def on_its_device(self: "KernelMachine", problem: Problem, tensor: Array, *rest: Any, **options: Any) -> Any:
        with self.backend.on_device_of(tensor):
            return verb(self, problem, tensor, *rest, **options)

    return cast(Verb, on_its_device)


class KernelMachine:
    """The six entry points of `cubn.machines.Machine`."""

    def __init__(self, name: str, backend: Backend) -> None:
        self.name = name
        self.backend = backend

    def moments(self, problem: Problem, x: Array, where: Array | None = None) -> Moments:
        """As in `cubn.machines.Machine`."""
        return self._moments(problem, x, where, with_rstd=False)[0]

    @_on_its_device
    def _moments(
        self, problem: Problem, x: Array, where: Array | None, with_rstd: bool
    ) -> tuple[Moments, Array | None]:
        rows = 2 + with_rstd + (where is not None)
        statistics = self.backend.empty((rows, problem.channels), np.float64)
        mean, m2 = statistics[0], statistics[1]
        rstd = statistics[2] if with_rstd else None
        count: Any = problem.samples if where is None else statistics[rows - 1].view(np.int64)
        if problem.samples == 0 or problem.channels == 0:
            statistics[...] = 0
            if rstd is not None:
                rstd[...] = np.nan  # nothing was there to take a deviation of
            return Moments(problem.samples, mean, m2, np.dtype(problem.statistics_dtype)), rstd
        tensors = _Tensors(self.backend, problem, x=x)
        plan = moments_plan(problem, self.backend.limits(), tensors.memory, where=where is not None)
        self._launch(
            plan,
            **tensors.arguments,
            where=self._mask(where),
            eps=problem.eps,
            mean=mean,
            m2=m2,
            rstd=rstd,
            count=None if where is None else count,
        )
        return Moments(count, mean, m2, np.dtype(problem.statistics_dtype)), rstd

    @_on_its_device
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
    ) -> tuple[Array, Array | None]:
        """As in `cubn.machines.Machine`."""
        keep = keep and residual is not None and problem.activation is not None
        y = _Result(self.backend, problem, x.dtype, out)
        active = None
        if y.array.size:
            tensors = _Tensors(self.backend, problem, x=x, residual=residual, y=y.array)
            plan = normalize_plan(
                problem,
                self.backend.limits(),
                tensors.memory,
                residual=residual is not None,
                where=where is not None,
                keep=keep,
            )
            active = self._active(problem, plan) if keep else None
            self._launch(
                plan,
                **tensors.arguments,
                where=self._mask(where),
                **self._per_channel(problem, mean=mean, rstd=rstd, gamma=gamma, beta=beta),
                active=active,
            )
        elif keep:
            active = self.backend.empty(_shape(problem), np.uint8)
        return y.deliver(), active

    @_on_its_device
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
        active: Array | None = None,
    ) -> GradientSums:
        """As in `cubn.machines.Machine`."""
        sums = self.backend.empty((2, problem.channels), np.dtype(problem.statistics_dtype))
        if problem.samples == 0 or problem.channels == 0:
            sums[...] = 0
            return GradientSums(sums[0], sums[1])
        tensors = _Tensors(self.backend, problem, dy=dy, x=x)
        plan = gradient_sums_plan(
            problem, self.backend.limits(), tensors.memory, where=where is not None, active=_form(active)
        )
        self._launch(
            plan,
            **tensors.arguments,
            where=self._mask(where),
            active=active,
            **self._per_channel(problem, mean=mean, rstd=rstd, gamma=gamma, beta=beta),
            sum_dy=sums[0],
            sum_dy_xhat=sums[1],
        )
        return GradientSums(sums[0], sums[1])

    @_on_its_device
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
        active: Array | None = None,
        residual: bool = False,
        out: Array | None = None,
    ) -> tuple[Array, Array | None]:
        """As in `cubn.machines.Machine`."""
        dx = _Result(self.backend, problem, x.dtype, out)
        dresidual = self.backend.empty(_shape(problem), x.dtype) if residual else None
        if dx.array.size:
            tensors = _Tensors(self.backend, problem, dy=dy, x=x, dx=dx.array, dresidual=dresidual)
            self._input_gradient(problem, tensors, mean, rstd, gamma, beta, count, sums, where, active)
        return dx.deliver(), dresidual

    def _input_gradient(
        self,
        problem: Problem,
        tensors: "_Tensors",
        mean: Array,
        rstd: Array,
        gamma: Array | None,
        beta: Array | None,
        count: Any,
        sums: GradientSums | None,
        where: Array | None,
        active: Array | None,
    ) -> None:
        plan = input_gradient_plan(
            problem,
            self.backend.limits(),
            tensors.memory,
            train=sums is not None,
            where=where is not None,
            active=_form(active),
            residual=tensors.arguments["dresidual"] is not None,
        )
        self._launch(
            plan,
            **tensors.arguments,
            where=self._mask(where),
            active=active,
            **self._per_channel(problem, mean=mean, rstd=rstd, gamma=gamma, beta=beta),
            **self._per_channel(
                problem,
                sum_dy=None if sums is None else sums.dy,
                sum_dy_xhat=None if sums is None else sums.dy_xhat,
            ),
            **self._counts(count),
        )

    def _counts(self, count: Any) -> dict[str, Any]:
        """Samples of the channels: one number, or an array; None of them where the statistics are constants."""
        if count is None or is_static_count(count):
            return {"counts": None, "count": count or 0}
        return {"counts": self.backend.contiguous(count, np.int64), "count": 0}

    @_on_its_device
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
        """As in `cubn.machines.Machine`: one launch where that moves less, else `moments`, then `normalize`."""
        keep = residual is not None and problem.activation is not None
        y = _Result(self.backend, problem, x.dtype, out)
        plan, tensors = None, None
        if y.array.size:
            tensors = _Tensors(self.backend, problem, x=x, residual=residual, y=y.array)
            options = {"residual": residual is not None, "where": where is not None, "keep": keep}
            plan = self._in_one(forward_plans(problem, self.backend.limits(), tensors.memory, **options))
        if plan is None or tensors is None:
            batch, rstd = self._moments(problem, x, where, with_rstd=True)
            _, active = self.normalize(problem, x, batch.wide_mean, rstd, gamma, beta, residual, where, y.array)
            moved = None if running is None else towards(running.mean, running.var, batch, running.weight)
            return Forward(y.deliver(), batch, rstd, active, moved)

        narrow = np.dtype(problem.statistics_dtype)
        rows_of_a_pair = 0 if running is None else 2 * narrow.itemsize // 8
        statistics = self.backend.empty((3 + (where is not None) + rows_of_a_pair, problem.channels), np.float64)
        mean, m2, rstd = statistics[0], statistics[1], statistics[2]
        counts = None if where is None else statistics[3].view(np.int64)
        moved = None
        if running is not None:
            pair = statistics[-rows_of_a_pair:].reshape(-1).view(narrow)
            moved = (pair[: problem.channels], pair[problem.channels :])
        active = self._active(problem, plan) if keep else None
        self._launch(
            plan,
            **tensors.arguments,
            where=self._mask(where),
            **self._per_channel(
                problem,
                gamma=gamma,
                beta=beta,
                running_mean=None if running is None else running.mean,
                running_var=None if running is None else running.var,
            ),
            eps=problem.eps,
            weight=0.0 if running is None else float(running.weight),
            active=active,
            mean=mean,
            m2=m2,
            rstd=rstd,
            count=counts,
            new_mean=None if moved is None else moved[0],
            new_var=None if moved is None else moved[1],
        )
        batch = Moments(problem.samples if counts is None else counts, mean, m2, narrow)
        return Forward(y.deliver(), batch, rstd, active, moved)

    @_on_its_device
    @_on_its_device
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
        active: Array | None = None,
        residual: bool = False,
        out: Array | None = None,
    ) -> Backward:
        """As in `cubn.machines.Machine`: one launch where that moves less, else the two verbs."""
        dx = _Result(self.backend, problem, x.dtype, out)
        dresidual = self.backend.empty(_shape(problem), x.dtype) if residual else None
        if not dx.array.size:
            return Backward(
                dx.deliver(), dresidual, self.gradient_sums(problem, dy, x, mean, rstd, gamma, beta, where, active)
            )
        tensors = _Tensors(self.backend, problem, dy=dy, x=x, dx=dx.array, dresidual=dresidual)
        plans = backward_plans(
            problem,
            self.backend.limits(),
            tensors.memory,
            train=count is not None,
            where=where is not None,
            active=_form(active),
            residual=residual,
        )
        plan = self._in_one(plans)
        if plan is None:
            sums = self.gradient_sums(problem, dy, x, mean, rstd, gamma, beta, where, active)
            taken = None if count is None else sums
            self._input_gradient(problem, tensors, mean, rstd, gamma, beta, count, taken, where, active)
            return Backward(dx.deliver(), dresidual, sums)
        pair = self.backend.empty((2, problem.channels), np.dtype(problem.statistics_dtype))
        self._launch(
            plan,
            **tensors.arguments,
            where=self._mask(where),
            active=active,
            **self._per_channel(problem, mean=mean, rstd=rstd, gamma=gamma, beta=beta),
            **self._counts(count),
            sum_dy=pair[0],
            sum_dy_xhat=pair[1],
        )
        return Backward(dx.deliver(), dresidual, GradientSums(pair[0], pair[1]))

    def _in_one(self, plans: tuple[LaunchPlan, ...]) -> LaunchPlan | None:
        """The plan of a fused kernel, with as many teams as the device holds; None for two kernels."""
        plan = plans[0]
        if not plan.fused:
            return None
        if plan.cooperative:
            blocks = self.backend.resident(plan)
            return plan if blocks >= plan.grid else fewer_teams(plan, blocks)
        return plan if plan.cluster == 1 or self.backend.resident(plan) >= plan.cluster else None

    def _active(self, problem: Problem, plan: LaunchPlan) -> Array:
        """Memory for what ReLU let pass, in the form in which the plan keeps it."""
        if not plan.packed:
            return self.backend.empty(_shape(problem), np.uint8)
        elements = problem.outer * problem.channels * problem.inner
        return self.backend.empty((elements * ITEM_BYTES[problem.dtype] // VECTOR_BYTES,), np.uint8)

    def _mask(self, where: Array | None) -> Array | None:
        return None if where is None else self.backend.contiguous(where, np.bool_)

    def _per_channel(self, problem: Problem, **values: Array | None) -> dict[str, Array | None]:
        """Dense, and in the type in which the kernels read them: double for the statistics, ACC_T for the rest.

        They are read one by one, so that a row of a larger array is read in place wherever it begins.
        """
        narrow = np.dtype(problem.statistics_dtype)
        return {name: self._dense(array, _WIDE.get(name, narrow)) for name, array in values.items()}

    def _dense(self, array: Array | None, dtype: Any) -> Array | None:
        if array is None or (array.dtype == dtype and array.strides == (dtype.itemsize,)):
            return array
        return self.backend.contiguous(array, dtype)

    def _launch(self, plan: LaunchPlan, **arguments: Any) -> None:
        if plan.kernel in MERGING:
            workspace = self.backend.workspace(plan) if plan.partials else (None, None, None)
            arguments |= dict(zip(WORKSPACE, workspace, strict=True))
        self.backend.launch(plan, arguments)


WORKSPACE = ("partials", "arrivals", "barriers")

_WIDE = {"mean": np.dtype(np.float64), "rstd": np.dtype(np.float64)}


def typed_arguments(plan: LaunchPlan, arguments: dict[str, Any]) -> list[Any]:
    """The arguments of a kernel in its order: arrays and None as they are, numbers in the kernel's own types.

    Integers are 64-bit but for the last four sizes and the room of a fused kernel; a scalar of another width would
    be read as garbage.  A row of the kernel is `fold` rows of its tensors, which are dense then.
    """
    before, after = KERNELS[plan.kernel]
    fold = plan.tiles.fold
    arguments = {name: fold * value if name.endswith("_stride") else value for name, value in arguments.items()}
    workspace: tuple[str, ...] = ("partials", "barriers") if plan.fused else ()
    if plan.kernel in MERGING and not plan.fused:
        workspace = ("partials", "arrivals")
    sizes = plan.tiles.sizes
    return [
        *(_typed(arguments[name]) for name in before.split()),
        *(np.int64(size) for size in sizes[:-4]),
        *(np.int32(size) for size in (*sizes[-4:], *((plan.room,) if plan.fused else ()))),
        *(_typed(arguments[name]) for name in (*workspace, *after.split())),
    ]


def _typed(value: Any) -> Any:
    if isinstance(value, int):
        return np.int64(value)
    return np.float64(value) if isinstance(value, float) else value


def _form(active: Array | None) -> int:
    """How `active` keeps what ReLU let pass: KEPT of kernels/marks.cuh."""
    if active is None:
        return 0
    return PACKED if active.ndim == 1 else BYTES


def _shape(problem: Problem) -> tuple[int, int, int]:
    return problem.outer, problem.channels, problem.inner


class _Tensors:
    """The tensors of one call as the kernels take them, and how they lie in memory together."""

    def __init__(self, backend: Backend, problem: Problem, **tensors: Array | None) -> None:
        self.arguments: dict[str, Any] = {}
        row_length = problem.channels * problem.inner
        places = []
        for name, tensor in tensors.items():
            stride = row_length
            if tensor is not None:
                given = row_stride(tensor)
                if given is None:
                    tensor = backend.contiguous(tensor, tensor.dtype)
                else:
                    stride = given
                places.append((backend.address(tensor) % VECTOR_BYTES, stride))
            self.arguments[name] = tensor
            self.arguments[f"{name}_stride"] = stride
        self.memory = _memory(tuple(places), row_length, ITEM_BYTES[problem.dtype])


_memory = lru_cache(maxsize=4096)(Memory.of)


class _Result:
    """Memory that a kernel can write into, and its way back into `out` where that is something else."""

    def __init__(self, backend: Backend, problem: Problem, dtype: Any, out: Array | None) -> None:
        self.out = out
        self.array: Array = out
        if out is None or row_stride(out) is None:
            self.array = backend.empty(_shape(problem), dtype)

    def deliver(self) -> Array:
        """The result, where the caller wants it."""
        if self.out is None or self.out is self.array:
            return self.array
        self.out[...] = self.array
        return self.out


def row_stride(tensor: Array) -> int | None:
    """Elements from row to row of a canonical tensor that is dense within its rows; None if it is not."""
    outer, channels, inner = tensor.shape
    along_outer, along_channels, along_inner = tensor.strides
    itemsize = tensor.dtype.itemsize
    if inner != 1 and along_inner != itemsize:
        return None
    if channels != 1 and along_channels != inner * itemsize:
        return None
    if outer == 1:
        return int(channels * inner)
    stride, rest = divmod(along_outer, itemsize)
    return None if rest else int(stride)
