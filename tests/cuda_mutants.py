"""What `python -m host.mutants cuda_mutants:subjects` breaks, and what has to notice: one place at a time.

Run from tests/.  A mutant of a kernel is checked by launches small enough for a second and chosen to reach every
line: both maps, ragged and whole, alone and in many tiles, with options and without.
"""

import host_machine
import test_cuda_kernels
from host.mutants import Subject
from host.nvrtc import compile_ptx

from cubn.machines.cuda.source import translation_unit

CHECKS = {
    "moments": [
        ("planes, one channel in many tiles", {}),
        ("planes, ragged", {}),
        ("planes, shorter than a block", {}),
        ("columns, odd and many tiles", {}),
        ("columns of short odd runs", {"where": True}),
        ("columns of short runs", {}),
    ],
    "normalize": [
        ("planes, ragged", {"residual": True, "where": True}),
        ("planes, ragged", {}),
        ("planes, shorter than a block", {"residual": True, "relu": True, "where": True}),
        ("columns, odd and many tiles", {}),
        ("columns, the last tile narrower", {}),
        ("columns of short odd runs", {"relu": True}),
        ("columns of short runs", {}),
    ],
    "gradient_sums": [
        ("planes, one channel in many tiles", {}),
        ("planes", {"relu": True}),
        ("planes, ragged", {"where": True}),
        ("columns, odd and many tiles", {}),
        ("columns of short odd runs", {"residual": True, "relu": True}),
    ],
    "input_gradient": [
        ("planes, ragged", {"residual": True, "where": True}),
        ("planes", {"relu": True, "frozen": True}),
        ("columns of short odd runs", {"residual": True, "relu": True}),
        ("columns, odd", {}),
        ("columns of short runs", {"where": True}),
    ],
}
FILES = {
    "moments": ("moments.cu", "union.cuh", "moments.cuh"),
    "normalize": ("normalize.cu", "affine.cuh", "tiles.cuh"),
    "gradient_sums": ("gradient_sums.cu",),
    "input_gradient": ("input_gradient.cu",),
}
"""Each header is broken in one kernel that reaches all of it."""


class OneBroken(host_machine.HostBackend):
    """Launches one kernel from another text."""

    def __init__(self, kernel, text):
        super().__init__()
        self.broken, self.text = kernel, text
        self._sound = host_machine.BACKEND

    def kernel(self, plan):
        if plan.kernel != self.broken:
            return self._sound.kernel(plan)
        if plan not in self._kernels:
            self._kernels[plan] = host_machine.Kernel(self.text, plan.kernel, defines=dict(plan.constants))
        return self._kernels[plan]


def check(kernel):
    def run(text):
        machine = host_machine.KernelMachine("host", OneBroken(kernel, text))
        for regime, options in CHECKS[kernel]:
            shape = test_cuda_kernels.REGIMES[regime]
            seed = test_cuda_kernels.kink_free_seed(shape, options)
            for schedule in (0, 1, 5):
                machine.backend.seed = schedule
                test_cuda_kernels.Case(shape, seed=seed, **options).check(machine)

    return run


def same(kernel):
    """What NVRTC makes of a text for every specialisation that is checked."""
    plans = []
    for regime, options in CHECKS[kernel]:
        shape = test_cuda_kernels.REGIMES[regime]
        case = test_cuda_kernels.Case(shape, seed=test_cuda_kernels.kink_free_seed(shape, options), **options)
        backend = host_machine.HostBackend()
        backend._kernels = host_machine.BACKEND._kernels
        case.check(host_machine.KernelMachine("host", backend))
        plans += [launch.plan for launch in backend.launches if launch.plan.kernel == kernel]
    constants = {plan.constants for plan in plans}
    return lambda text: tuple(compile_ptx(text, kernel, dict(each), 80) for each in sorted(constants))


def subjects():
    return [
        Subject(kernel, translation_unit(f"{kernel}.cu"), check(kernel), same(kernel), FILES[kernel])
        for kernel in CHECKS
    ]  # fmt: skip
