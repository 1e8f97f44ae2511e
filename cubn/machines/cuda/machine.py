"""The machine of the kernels, written once over what launches them: CuPy on a GPU, the executor of the tests without.

Tensors are read in place where they are dense but for the distance between their outermost rows, which covers
every memory order and slices of the batch and of the channels; anything else is copied once.  Masks are read as
dense bytes.

Memory: forward allocates y and one block of (3, channels) doubles (mean, m2, rstd; a further row for the counts under a
mask or for the running statistics), backward dx and one block of (2, channels), inference y and one of two rows of
doubles; `active` and `dresidual` where they are asked for; and a workspace that is kept.

Forward and backward are passes (`passes.py`), prepared once for each form of tensors and called with any of that form.

`active` has a byte for each element, in the shape of x, or is packed: then it has one axis, and a byte for the
elements of 16 bytes of x.
"""

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar, cast

import numpy as np

from cubn.layout import MemoryOrder
from cubn.machines import Backward, Forward, GradientSums, Running
from cubn.machines.cuda.backend import Backend, with_workspace
from cubn.machines.cuda.passes import DOUBLE, BackwardPass, ForwardPass, InferencePass, Left, active_shape
from cubn.machines.cuda.plan import (
    BYTES,
    ITEM_BYTES,
    KERNELS,
    MERGING,
    PACKED,
    VECTOR_BYTES,
    Choice,
    LaunchPlan,
    Memory,
    backward_choices,
    fewer_teams,
    forward_choices,
    gradient_sums_plan,
    input_gradient_plan,
    moments_plan,
    normalize_plan,
)
from cubn.moments import Moments, towards
from cubn.namespace import Array, is_static_count
from cubn.problem import Problem

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
        self._passes: dict[Any, Any] = {}

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
        y = _Result(self.backend, problem, x.dtype, out)
        found = None
        if y.array.size:
            tensors = _Tensors(self.backend, problem, x=x, residual=residual, y=y.array)
            found = self._forward_pass(problem, tensors, x.dtype, gamma, beta, where, running, y.memory)
        if found is None:
            batch, rstd = self._moments(problem, x, where, with_rstd=True)
            _, active = self.normalize(problem, x, batch.wide_mean, rstd, gamma, beta, residual, where, y.array)
            moved = None if running is None else towards(running.mean, running.var, batch, running.weight)
            return Forward(y.deliver(), batch, rstd, active, moved)
        gamma, beta = self._narrow(problem, gamma), self._narrow(problem, beta)
        if running is not None:
            running = Running(self._narrow(problem, running.mean), self._narrow(problem, running.var), running.weight)
        x, residual = tensors.arguments["x"], tensors.arguments["residual"]
        _, left = found(x, gamma, beta, residual, y.array, running, self._mask(where))
        return Forward(y.deliver(), *found.statistics(left), found.active(left), found.moved(left))

    @_on_its_device
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
    ) -> ForwardPass | None:
        """As in `cubn.machines.Preparing`."""
        per_channel = [gamma, beta, *(() if running is None else running[:2])]
        if not (_as_they_are(x, residual, out) and all(self._is_narrow(problem, array) for array in per_channel)):
            return None
        tensors = _Tensors(self.backend, problem, x=x, residual=residual, y=NEW if out is None else out)
        return self._forward_pass(problem, tensors, x.dtype, gamma, beta, None, running, memory)

    def _forward_pass(
        self,
        problem: Problem,
        tensors: "_Tensors",
        dtype: Any,
        gamma: Array | None,
        beta: Array | None,
        where: Array | None,
        running: Running | None,
        memory: MemoryOrder,
    ) -> ForwardPass | None:
        """None where the running statistics have to be moved apart from the kernels."""
        residual = tensors.arguments["residual"] is not None
        options = {"residual": residual, "where": where is not None}
        options["keep"] = keep = residual and problem.activation is not None

        def make() -> ForwardPass | None:
            limits = self.backend.limits()
            plan = self._in_one(forward_choices(problem, limits, tensors.memory, **options))
            plans: tuple[LaunchPlan, ...]
            if plan is not None:
                plans = (plan,)
            elif running is None:
                plans = (
                    moments_plan(problem, limits, tensors.memory_of("x"), where=where is not None),
                    normalize_plan(problem, limits, tensors.memory, **options),
                )
            else:
                return None
            return ForwardPass(
                self.backend,
                problem,
                dtype,
                memory,
                plans,
                tensors.strides,
                gamma=gamma is not None,
                beta=beta is not None,
                residual=residual,
                where=where is not None,
                keep=keep,
                running=running is not None,
            )

        given = gamma is None, beta is None, where is None, running is None
        key = ("forward", self.backend.current_device(), problem, tensors.places, given, memory)
        return cast(ForwardPass | None, self._pass(key, make))

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
        found = self._backward_pass(
            problem, tensors, x.dtype, gamma, beta, count, where, active, dx.memory, kept=False
        )  # fmt: skip
        dense = tensors.arguments
        _, dy_xhat, dy_sum, _ = found(
            dense["dy"],
            dense["x"],
            self._narrow(problem, gamma),
            self._narrow(problem, beta),
            (None, active),
            dx.array,
            mean=self._dense(mean, DOUBLE),
            rstd=self._dense(rstd, DOUBLE),
            counts=self._counts(count)["counts"],
            where=self._mask(where),
            dresidual=dresidual,
        )
        return Backward(dx.deliver(), dresidual, GradientSums(dy_sum, dy_xhat))

    @_on_its_device
    def prepare_backward(
        self,
        problem: Problem,
        dy: Array,
        x: Array,
        gamma: Array | None,
        beta: Array | None,
        left: Left,
        residual: bool,
        out: Array | None,
        memory: MemoryOrder,
    ) -> BackwardPass | None:
        """As in `cubn.machines.Preparing`."""
        if not _as_they_are(dy, x, out):
            return None
        dresidual = NEW if residual else None
        tensors = _Tensors(self.backend, problem, dy=dy, x=x, dx=NEW if out is None else out, dresidual=dresidual)
        return self._backward_pass(
            problem, tensors, x.dtype, gamma, beta, problem.samples, None, left[1], memory, kept=True
        )  # fmt: skip

    def _backward_pass(
        self,
        problem: Problem,
        tensors: "_Tensors",
        dtype: Any,
        gamma: Array | None,
        beta: Array | None,
        count: Any,
        where: Array | None,
        active: Array | None,
        memory: MemoryOrder,
        *,
        kept: bool,
    ) -> BackwardPass:
        """`kept` says whether the statistics lie where a forward pass has left them."""
        residual = tensors.arguments["dresidual"] is not None
        form = _form(active)
        only: dict[str, Any] = {"where": where is not None, "active": form}
        options = {"train": count is not None, "residual": residual, **only}
        static = count is None or is_static_count(count)

        def make() -> BackwardPass:
            limits = self.backend.limits()
            plan = self._in_one(backward_choices(problem, limits, tensors.memory, **options))
            plans: tuple[LaunchPlan, ...]
            if plan is not None:
                plans = (plan,)
            else:
                plans = (
                    gradient_sums_plan(problem, limits, tensors.memory_of("dy", "x"), **only),
                    input_gradient_plan(problem, limits, tensors.memory, **options),
                )
            return BackwardPass(
                self.backend,
                problem,
                dtype,
                memory,
                plans,
                tensors.strides,
                gamma=gamma is not None,
                beta=beta is not None,
                where=where is not None,
                active=active is not None,
                residual=residual,
                count=(count or 0) if static else 0,
                counts=not static,
                kept=kept,
            )

        given = gamma is None, beta is None, where is None, form, kept, count if static else "counts"
        key = ("backward", self.backend.current_device(), problem, tensors.places, given, memory)
        return cast(BackwardPass, self._pass(key, make))

    @_on_its_device
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
    ) -> InferencePass | None:
        """As in `cubn.machines.Preparing`."""
        per_channel = (mean, var, gamma, beta)
        if not (_as_they_are(x, residual, out) and all(self._is_narrow(problem, array) for array in per_channel)):
            return None
        tensors = _Tensors(self.backend, problem, x=x, residual=residual, y=NEW if out is None else out)
        given = {"gamma": gamma is not None, "beta": beta is not None, "residual": residual is not None}

        def make() -> InferencePass:
            plan = normalize_plan(problem, self.backend.limits(), tensors.memory, residual=residual is not None)
            return InferencePass(self.backend, problem, x.dtype, memory, plan, tensors.strides, **given)

        key = ("inference", self.backend.current_device(), problem, tensors.places, tuple(given.values()), memory)
        return cast(InferencePass, self._pass(key, make))

    def _in_one(self, choices: tuple[Choice, ...]) -> LaunchPlan | None:
        """The plan of the best fused kernel that the device has room for; None where two kernels are better."""
        for choice in choices:
            if choice.team is None:
                return None
            plan = self._with_room(choice.plans[0])
            if plan is not None:
                return plan
        return None

    def _with_room(self, plan: LaunchPlan) -> LaunchPlan | None:
        """The plan with as many teams as the device holds at once, where they wait for one another."""
        if plan.cooperative:
            blocks = self.backend.resident(plan)
            return plan if blocks >= plan.grid else fewer_teams(plan, blocks)
        return plan if plan.cluster == 1 or self.backend.resident(plan) >= plan.cluster else None

    def _pass(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` makes for a form, made once."""
        found = self._passes.get(key, make)
        if found is make:
            if len(self._passes) >= MOST_PASSES:
                self._passes.clear()
            found = self._passes[key] = make()
        return found

    def _active(self, problem: Problem, plan: LaunchPlan) -> Array:
        """Memory for what ReLU let pass."""
        return self.backend.empty(active_shape(problem, packed=plan.packed), np.uint8)

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

    def _narrow(self, problem: Problem, array: Array | None) -> Array | None:
        return self._dense(array, np.dtype(problem.statistics_dtype))

    def _is_narrow(self, problem: Problem, array: Array | None) -> bool:
        """True if `_narrow` would give the array itself."""
        dtype = np.dtype(problem.statistics_dtype)
        return array is None or (array.dtype == dtype and array.strides == (dtype.itemsize,))

    def _launch(self, plan: LaunchPlan, **arguments: Any) -> None:
        self.backend.launch(plan, with_workspace(self.backend, plan, arguments))


MOST_PASSES = 4096
"""Passes that are remembered; a program has that many only if its shapes never repeat."""

_WIDE = {"mean": DOUBLE, "rstd": DOUBLE}


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


NEW: Any = object()
"""Stands for a tensor that will be allocated: dense, and at a vector boundary."""


class _Tensors:
    """The tensors of one call as the kernels take them, and how they lie in memory together.

    Attributes
    ----------
    arguments : dict
        Tensors and their row strides, by the kernels' names.
    places : tuple of (int, int) or None
        For each tensor that there is, its distance from a vector boundary in bytes and its row stride in elements.
    """

    def __init__(self, backend: Backend, problem: Problem, **tensors: Array | None) -> None:
        self.arguments: dict[str, Any] = {}
        self._row_length = row_length = problem.channels * problem.inner
        self._itemsize = ITEM_BYTES[problem.dtype]
        places: dict[str, tuple[int, int] | None] = {}
        for name, tensor in tensors.items():
            stride, phase = row_length, 0
            if tensor is not None and tensor is not NEW:
                given = row_stride(tensor)
                if given is None:
                    tensor = backend.contiguous(tensor, tensor.dtype)
                else:
                    stride = given
                phase = backend.address(tensor) % VECTOR_BYTES
            places[name] = None if tensor is None else (phase, stride)
            self.arguments[name] = tensor
            self.arguments[f"{name}_stride"] = stride
        self._places = places
        self.places = tuple(places.values())

    @property
    def memory(self) -> Memory:
        """Of all tensors."""
        return self.memory_of(*self._places)

    def memory_of(self, *names: str) -> Memory:
        """Of some."""
        places = tuple(place for name in names if (place := self._places[name]) is not None)
        return _memory(places, self._row_length, self._itemsize)

    @property
    def strides(self) -> dict[str, int]:
        """Row strides by the kernels' names."""
        return {name: value for name, value in self.arguments.items() if name.endswith("_stride")}


_memory = lru_cache(maxsize=4096)(Memory.of)


class _Result:
    """Memory that a kernel can write into, and its way back into `out` where that is something else."""

    def __init__(self, backend: Backend, problem: Problem, dtype: Any, out: Array | None) -> None:
        self.out = out
        self.array: Array = out
        self.memory = MemoryOrder(_shape(problem), None)
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


def _as_they_are(*tensors: Array | None) -> bool:
    """True if kernels can read and write all of these in place."""
    return all(tensor is None or row_stride(tensor) is not None for tensor in tensors)
