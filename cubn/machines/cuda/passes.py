"""A pass through forward, backward or inference on tensors of one form: everything is decided but the addresses.

A pass holds its plans, the kernels they name and the arguments that are the same in every call, packed.  A call brings
its operands; then memory for the results is taken, addresses are filled in, and the kernels are launched.  A pass
holds nothing of a call, so any number of threads may be in it at once.

Only the memory of an operand counts here, not its shape: it may be the canonical view or the array behind it.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from cubn.layout import MemoryOrder
from cubn.machines import Running
from cubn.machines.cuda.backend import Backend, Block, Launch, Number, Operand, Part
from cubn.machines.cuda.plan import ITEM_BYTES, KERNELS, VECTOR_BYTES, LaunchPlan
from cubn.moments import Moments
from cubn.namespace import Array
from cubn.problem import Problem

DOUBLE = np.dtype(np.float64)

NOT_RUNNING: tuple[None, None, float] = (None, None, 0.0)

Left: TypeAlias = tuple[Block, Array | None]
"""What a forward pass leaves for the backward pass: a block of statistics, and what ReLU let pass."""


class Pass:
    """What the passes have in common: results, a block for values per channel, and launches."""

    def __init__(
        self,
        backend: Backend,
        problem: Problem,
        dtype: Any,
        memory: MemoryOrder,
        plans: Iterable[LaunchPlan],
        arguments: dict[str, Any],
        rows: "Rows",
    ) -> None:
        self._backend = backend
        self._device = backend.current_device()
        self._problem = problem
        self._dtype = dtype.type  # which CuPy takes sooner than the dtype itself
        self._memory = memory
        self._bytes = rows.bytes
        self._launches: tuple[Launch, ...] = tuple(
            backend.bind(plan, {name: arguments[name] for name in " ".join(KERNELS[plan.kernel]).split()})
            for plan in plans
        )

    def _result(self) -> Array:
        shape, axes = self._memory
        result = self._backend.empty(shape, self._dtype)
        return result if axes is None else result.transpose(axes)


class Rows:
    """Arrays of one value per channel, one after the other in the block that is operand `index`."""

    def __init__(self, index: int, channels: int) -> None:
        self._index, self._channels = index, channels
        self.bytes = 0

    def add(self, dtype: Any) -> Part:
        """One more."""
        part = Part(self._index, self.bytes, (self._channels,), dtype.type)
        self.bytes += self._channels * dtype.itemsize
        return part


class Statistics(NamedTuple):
    """Where a forward pass leaves its statistics; the backward pass reads them there."""

    rows: Rows
    mean: Part
    m2: Part
    rstd: Part

    @classmethod
    def of(cls, index: int, channels: int) -> "Statistics":
        """In the block that is operand `index`."""
        rows = Rows(index, channels)
        return cls(rows, rows.add(DOUBLE), rows.add(DOUBLE), rows.add(DOUBLE))


class ForwardPass(Pass):
    """`cubn.machines.ForwardPass` on kernels: `forward` alone, or `moments` and `normalize`."""

    def __init__(
        self,
        backend: Backend,
        problem: Problem,
        dtype: Any,
        memory: MemoryOrder,
        plans: tuple[LaunchPlan, ...],
        strides: dict[str, int],
        *,
        gamma: bool,
        beta: bool,
        residual: bool,
        where: bool,
        keep: bool,
        running: bool,
    ) -> None:
        place = Places("x residual where gamma beta running_mean running_var y active statistics weight")
        narrow = np.dtype(problem.statistics_dtype)
        rows, self._mean, self._m2, self._rstd = Statistics.of(place["statistics"], problem.channels)
        self._count = rows.add(np.dtype(np.int64)) if where else None
        self._moved = (rows.add(narrow), rows.add(narrow)) if running else None
        self._active: tuple[int, ...] | None = None
        if keep:
            self._active = active_shape(problem, packed=plans[-1].packed)
        arguments = {
            **strides,
            **place.operands("x y"),
            **place.operands("residual", given=residual),
            **place.operands("where", given=where),
            **place.operands("gamma", given=gamma),
            **place.operands("beta", given=beta),
            **place.operands("running_mean running_var", given=running),
            **place.operands("active", given=keep),
            "eps": problem.eps,
            "weight": Number(place["weight"]) if running else 0.0,
            "mean": self._mean,
            "m2": self._m2,
            "rstd": self._rstd,
            "count": self._count,
            "new_mean": self._moved[0] if self._moved else None,
            "new_var": self._moved[1] if self._moved else None,
        }
        super().__init__(backend, problem, dtype, memory, plans, arguments, rows)

    def __call__(
        self,
        x: Array,
        gamma: Array | None,
        beta: Array | None,
        residual: Array | None = None,
        out: Array | None = None,
        running: Running | None = None,
        where: Array | None = None,
    ) -> tuple[Array, Left]:
        """y, and what is left for the backward pass."""
        backend = self._backend
        if backend.current_device() != self._device:
            with backend.on_device_of(x):
                return self(x, gamma, beta, residual, out, running, where)
        y = self._result() if out is None else out
        active = None if self._active is None else backend.empty(self._active, np.uint8)
        block = backend.block(self._bytes)
        mean, var, weight = running or NOT_RUNNING
        operands = (x, residual, where, gamma, beta, mean, var, y, active, block, weight)
        for launch in self._launches:
            launch(operands)
        return y, (block, active)

    def statistics(self, left: Left) -> tuple[Moments, Array]:
        """Moments of the batch and rstd, as wide as they were summed."""
        view, block, problem = self._backend.view, left[0], self._problem
        count = problem.samples if self._count is None else view(block, self._count)
        batch = Moments(count, view(block, self._mean), view(block, self._m2), np.dtype(problem.statistics_dtype))
        return batch, view(block, self._rstd)

    def active(self, left: Left) -> Array | None:
        """What ReLU let pass."""
        return left[1]

    def moved(self, left: Left) -> tuple[Array, Array] | None:
        """Mean and variance of the running statistics after this batch; None where there were none."""
        if self._moved is None:
            return None
        mean, var = self._moved
        return self._backend.view(left[0], mean), self._backend.view(left[0], var)


class BackwardPass(Pass):
    """`cubn.machines.BackwardPass` on kernels: `backward` alone, or `gradient_sums` and `input_gradient`.

    `kept` says whether the statistics are what a `ForwardPass` has left, or arrays of their own.
    """

    def __init__(
        self,
        backend: Backend,
        problem: Problem,
        dtype: Any,
        memory: MemoryOrder,
        plans: tuple[LaunchPlan, ...],
        strides: dict[str, int],
        *,
        gamma: bool,
        beta: bool,
        where: bool,
        active: bool,
        residual: bool,
        count: int,
        counts: bool,
        kept: bool,
    ) -> None:
        place = Places("dy x where active mean rstd statistics gamma beta counts dx dresidual sums")
        narrow = np.dtype(problem.statistics_dtype)
        rows = Rows(place["sums"], problem.channels)
        sum_dy, sum_dy_xhat = rows.add(narrow), rows.add(narrow)
        self._dgamma = sum_dy_xhat if gamma or not kept else None
        self._dbeta = sum_dy if beta or not kept else None
        self._block = backend.block if self._dgamma or self._dbeta else backend.scratch
        self._residual = residual
        statistics = Statistics.of(place["statistics"], problem.channels)
        arguments = {
            **strides,
            **place.operands("dy x dx"),
            **place.operands("where", given=where),
            **place.operands("active", given=active),
            **place.operands("gamma", given=gamma),
            **place.operands("beta", given=beta),
            **place.operands("dresidual", given=residual),
            **(({"mean": statistics.mean, "rstd": statistics.rstd}) if kept else place.operands("mean rstd")),
            **place.operands("counts", given=counts),
            "count": count,
            "sum_dy": sum_dy,
            "sum_dy_xhat": sum_dy_xhat,
        }
        super().__init__(backend, problem, dtype, memory, plans, arguments, rows)

    def __call__(
        self,
        dy: Array,
        x: Array,
        gamma: Array | None,
        beta: Array | None,
        left: Left,
        out: Array | None = None,
        mean: Array | None = None,
        rstd: Array | None = None,
        counts: Array | None = None,
        where: Array | None = None,
        dresidual: Array | None = None,
    ) -> tuple[Array, Array | None, Array | None, Array | None]:
        """dx, dgamma, dbeta and dresidual; the sums are there without gamma and beta where statistics are arrays."""
        backend = self._backend
        if backend.current_device() != self._device:
            with backend.on_device_of(x):
                return self(dy, x, gamma, beta, left, out, mean, rstd, counts, where, dresidual)
        dx = self._result() if out is None else out
        if self._residual and dresidual is None:
            dresidual = self._result()
        sums = self._block(self._bytes)
        statistics, active = left
        operands = (dy, x, where, active, mean, rstd, statistics, gamma, beta, counts, dx, dresidual, sums)
        for launch in self._launches:
            launch(operands)
        dgamma, dbeta = self._dgamma, self._dbeta
        return (
            dx,
            None if dgamma is None else backend.view(sums, dgamma),
            None if dbeta is None else backend.view(sums, dbeta),
            dresidual,
        )


class InferencePass(Pass):
    """`cubn.machines.InferencePass` on kernels: what widens the statistics, and `normalize`."""

    def __init__(
        self,
        backend: Backend,
        problem: Problem,
        dtype: Any,
        memory: MemoryOrder,
        plan: LaunchPlan,
        strides: dict[str, int],
        *,
        gamma: bool,
        beta: bool,
        residual: bool,
    ) -> None:
        place = Places("x gamma beta residual y statistics")
        rows = Rows(place["statistics"], problem.channels)
        self._widen = backend.widening(problem)
        arguments = {
            **strides,
            **place.operands("x y"),
            **place.operands("gamma", given=gamma),
            **place.operands("beta", given=beta),
            **place.operands("residual", given=residual),
            "where": None,
            "active": None,
            "mean": rows.add(DOUBLE),
            "rstd": rows.add(DOUBLE),
        }
        super().__init__(backend, problem, dtype, memory, (plan,), arguments, rows)

    def __call__(
        self,
        x: Array,
        mean: Array,
        var: Array,
        gamma: Array | None,
        beta: Array | None,
        residual: Array | None = None,
        out: Array | None = None,
    ) -> Array:
        """y."""
        backend = self._backend
        if backend.current_device() != self._device:
            with backend.on_device_of(x):
                return self(x, mean, var, gamma, beta, residual, out)
        y = self._result() if out is None else out
        block = backend.scratch(self._bytes)
        self._widen(mean, var, block)
        for launch in self._launches:
            launch((x, gamma, beta, residual, y, block))
        return y


class Places(dict[str, int]):
    """Names of operands -> their places."""

    def __init__(self, names: str) -> None:
        super().__init__((name, place) for place, name in enumerate(names.split()))

    def operands(self, names: str, *, given: bool = True) -> dict[str, Operand | None]:
        """Those names as arguments; None where calls of this form do not have them."""
        return {name: Operand(self[name]) if given else None for name in names.split()}


def active_shape(problem: Problem, *, packed: bool) -> tuple[int, ...]:
    """Of the array that keeps what ReLU let pass, in the form in which a plan keeps it."""
    if not packed:
        return problem.outer, problem.channels, problem.inner
    elements = problem.outer * problem.channels * problem.inner
    return (elements * ITEM_BYTES[problem.dtype] // VECTOR_BYTES,)
