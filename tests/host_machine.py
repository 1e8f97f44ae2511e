"""The machine named `host`: the CUDA kernels' own text, executed thread for thread on the CPU.

What NumPy holds is copied into the executor's device memory at the same distance from a vector boundary, with
poison instead of what a result held before, and results are copied back.
"""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from host.executor import Kernel, device_array, device_empty, unwritten

from cubn.machines.cuda.backend import WORKSPACE, LaunchByName, Part
from cubn.machines.cuda.backend import Launch as Bound
from cubn.machines.cuda.machine import KernelMachine, typed_arguments
from cubn.machines.cuda.plan import KERNELS, Choice, DeviceLimits, LaunchPlan, blocks_at_once
from cubn.machines.cuda.source import translation_unit
from cubn.problem import Problem

TINY = DeviceLimits("tiny", arch=80, processors=2, threads_per_block=64, grid=3)
"""No such device exists: small tensors meet several tiles per channel, and more tiles than blocks."""

BOUNDARY = 256


class Launch(NamedTuple):
    """One launch: its plan, and the bytes read from and written to each argument."""

    plan: LaunchPlan
    read: dict[str, int]
    written: dict[str, int]


class HostBackend:
    """Launches on the executor; remembers what it launched.

    Attributes
    ----------
    seed : int
        Schedule of the blocks and threads: 0 ascending, 1 descending, others random.
    checked : bool
        Whether races and uninitialised reads are looked for.
    replace : tuple of (str, str)
        Changes to the kernels' text, to see tests fail.
    launches : list of Launch
        Everything that was launched since the list was last cleared.
    allocated : list of int
        Bytes of everything that the machine allocated, likewise.
    """

    def __init__(self, limits: DeviceLimits = TINY, *, checked: bool = True) -> None:
        self.device = limits
        self.checked = checked
        self.seed = 0
        self.replace: tuple[tuple[str, str], ...] = ()
        self.launches: list[Launch] = []
        self.allocated: list[int] = []
        self._kernels: dict[Any, Kernel] = {}
        self._arrivals = np.zeros(0, np.uint32)
        self._barriers = np.zeros(0, np.uint32)

    def current_device(self) -> int:
        return 0

    def on_device_of(self, array: np.ndarray) -> Any:
        return nullcontext()

    def limits(self) -> DeviceLimits:
        return self.device

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        self.allocated.append(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return device_empty(shape, dtype, "result")

    def block(self, size: int) -> np.ndarray:
        return self.empty((size,), np.uint8)

    scratch = block

    def view(self, block: np.ndarray, part: Part) -> np.ndarray:
        return np.ndarray(part.shape, part.dtype, block, part.offset)

    def contiguous(self, array: np.ndarray, dtype: Any) -> np.ndarray:
        array = np.ascontiguousarray(array, dtype)
        return array if array.ctypes.data % 16 == 0 else device_array(array, "copy")

    def address(self, array: np.ndarray) -> int:
        return array.ctypes.data

    def workspace(self, plan: LaunchPlan) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self._arrivals.size < plan.arrivals:
            self._arrivals = device_array(np.zeros(plan.arrivals, np.uint32), "arrivals")
        if self._barriers.size < plan.barriers:
            self._barriers = device_array(np.zeros(plan.barriers, np.uint32), "barriers")
        return device_empty(plan.partial_bytes, np.uint8, "partials"), self._arrivals, self._barriers

    def resident(self, plan: LaunchPlan) -> int:
        return blocks_at_once(plan, self.device)

    def kernel(self, plan: LaunchPlan) -> Kernel:
        key = (plan.kernel, plan.constants, min(80, self.device.arch), self.checked, self.replace)
        if key not in self._kernels:
            text = translation_unit(f"{plan.kernel}.cu")
            for old, new in self.replace:
                text = text.replace(old, new)
            arch = 90 if plan.cluster > 1 else min(80, self.device.arch)
            self._kernels[key] = Kernel(text, plan.kernel, dict(plan.constants), arch, self.checked)
        return self._kernels[key]

    def bind(self, plan: LaunchPlan, arguments: Mapping[str, Any]) -> Bound:
        return LaunchByName(self, plan, arguments)

    def widening(self, problem: Problem) -> Callable[[np.ndarray, np.ndarray, np.ndarray], None]:
        return partial(widen, problem.eps)

    def launch(self, plan: LaunchPlan, arguments: dict[str, Any]) -> None:
        results = KERNELS[plan.kernel][1].split()
        workspace = WORKSPACE  # in device memory already, and kept
        arrays = {
            name: value for name, value in arguments.items() if isinstance(value, np.ndarray) and name not in workspace
        }
        inputs = {name: _Mirror(array, copied=True) for name, array in arrays.items() if name not in results}
        outputs = {}
        for name in arrays.keys() & set(results):
            twins = [mirror for mirror in inputs.values() if mirror.covers(arrays[name])]
            outputs[name] = twins[0].of(arrays[name]) if twins else _Mirror(arrays[name], copied=False)
        mirrored = {name: mirror.view for name, mirror in (inputs | outputs).items()}
        kernel = self.kernel(plan)
        kernel(
            (plan.grid,),
            (plan.block,),
            typed_arguments(plan, arguments | mirrored),
            shared_mem=plan.dynamic_bytes,
            cooperative=plan.cooperative,
            seed=self.seed,
        )
        launched = {name: arguments[name] for name in workspace if arguments.get(name) is not None} | mirrored
        traffic = {name: kernel.traffic.of(array) for name, array in launched.items()}
        self.launches.append(
            Launch(plan, {name: t[0] for name, t in traffic.items()}, {name: t[1] for name, t in traffic.items()})
        )
        assert not self._arrivals.any(), "a counter was left behind"
        assert not (self._barriers & 0x7FFFFFFF).any(), "a barrier was left behind"
        for name, mirror in outputs.items():
            mirror.fetch_into(arrays[name])


def widen(eps: float, mean: np.ndarray, var: np.ndarray, block: np.ndarray) -> None:
    """What `Backend.widening` says, in NumPy."""
    wide = np.ndarray((2, *mean.shape), np.float64, block)
    wide[0] = mean
    total = var.astype(np.float64) + eps
    with np.errstate(all="ignore"):
        wide[1] = np.where(total == 0, 0, 1 / np.sqrt(total))


class _Mirror:
    """A NumPy array's place in device memory: all bytes between its first and its last element."""

    def __init__(self, array: np.ndarray, *, copied: bool, memory: Any = None) -> None:
        self.low, self.high = np.lib.array_utils.byte_bounds(array) if array.size else (array.ctypes.data,) * 2
        size, offset = self.high - self.low, self.low % BOUNDARY
        if memory is None and copied:
            memory = (self.low, device_array(np.full(size, 0xFF, np.uint8), "input", offset=offset))
        elif memory is None:
            memory = (self.low, device_empty(size, np.uint8, "output", offset=offset))
        self.memory = memory
        self.start = array.ctypes.data - memory[0]
        self.view = np.ndarray(array.shape, array.dtype, memory[1].data, self.start, array.strides)
        if copied:
            self.view[...] = array

    def covers(self, array: np.ndarray) -> bool:
        low, high = np.lib.array_utils.byte_bounds(array)
        return array.size > 0 and self.low <= low and high <= self.high

    def of(self, array: np.ndarray) -> "_Mirror":
        return _Mirror(array, copied=False, memory=self.memory)

    def fetch_into(self, array: np.ndarray) -> None:
        missed = np.ndarray(array.shape, np.bool_, unwritten(self.memory[1]).data, self.start, array.strides)
        assert not missed.any(), f"{missed.sum()} of {missed.size} elements were not written"
        array[...] = self.view


class Apart(KernelMachine):
    """Takes the two kernels of a pass one after the other, as a device does that is too small for a team."""

    def _in_one(self, choices: tuple[Choice, ...]) -> None:
        return None


BACKEND = HostBackend(replace(TINY, in_flight=2))  # half as much to compile for every test of the suite
MACHINE = KernelMachine("host", BACKEND)
name = MACHINE.name
moments = MACHINE.moments
normalize = MACHINE.normalize
gradient_sums = MACHINE.gradient_sums
input_gradient = MACHINE.input_gradient
forward = MACHINE.forward
backward = MACHINE.backward
prepare_forward = MACHINE.prepare_forward
prepare_backward = MACHINE.prepare_backward
prepare_inference = MACHINE.prepare_inference
