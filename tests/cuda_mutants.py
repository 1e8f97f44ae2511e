"""What `python -m host.mutants cuda_mutants:subjects` breaks, and what has to notice: one place at a time.

Run from tests/.  A mutant of a kernel is checked by launches small enough for a second and chosen to reach every
line: both maps, ragged and whole, alone and in many tiles, with options and without.
"""

import host_machine
import test_cuda_kernels
import test_cuda_teams
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
    "forward": [
        ("block, planes in shared memory", {}),
        ("block, columns", {}),
        ("cluster, more channels than clusters", {}),
        ("cluster, columns", {}),
        ("grid, more ragged planes than teams", {}),
        ("grid, columns", {}),
    ],
    "backward": [
        ("block, planes in shared memory", {"residual": True, "relu": True}),
        ("block, planes read again", {}),
        ("block, columns", {"where": True}),
    ],
}
FILES = {
    "moments": ("moments.cu", "union.cuh", "moments.cuh"),
    "normalize": ("normalize.cu", "affine.cuh", "tiles.cuh"),
    "gradient_sums": ("gradient_sums.cu",),
    "input_gradient": ("input_gradient.cu",),
    "forward": ("team.cuh", "held.cuh", "samples.cuh", "forward.cu"),
    "backward": ("sums.cuh", "pull.cuh", "marks.cuh", "backward.cu"),
}
"""Each header is broken in one kernel that reaches all of it."""

ROUNDS = "(32 + UNROLL * VEC - 1) / (UNROLL * VEC);"
REDUNDANT = {
    "forward": {"delete __threadfence(); in: __threadfence();": "of the second: the load before it acquires already"},
    "moments": {
        "< -> <= in: for (int i = 0; i < WORDS; ++i) raw.word[i] = "
        "__shfl_down_sync(0xffffffffu, raw.word[i], distance);": "a word that no set has; the compiler drops it",
        "< -> <= in: while (team < WARP && team < length && 2 * team * jobs <= BLOCK) team *= 2;": "only speed",
        "<= -> < in: while (team < WARP && team < length && 2 * team * jobs <= BLOCK) team *= 2;": "only speed",
        "< -> <= in: for (int first = 0; first < runs; first += BLOCK / team) {": "a round without runs",
        "< -> <= in: for (index_t first = begin; first < end; first += BLOCK / crew) {": "a round without channels",
        "delete __threadfence(); in: __threadfence();": "the reader's half of the fence: CUDA's memory model asks for "
        "it, the executor's loads are in order",
        "< -> <= in: return {count, widen(pivot) - origin + shift, m2 < 0 ? 0 : m2};  // NaN stays": "0 is 0",
        "negate X_TYPE != 3 || (WHERE && !whe in: if (X_TYPE != 3 || (WHERE && !where[first])) return 0;":
        "only the last digits of float64, which test_moments.py looks at",
        f"- 1 -> nothing in: constexpr int ROUNDS = COLUMN ? 32 / UNROLL : {ROUNDS}": "sums of 64 instead of 32",
        "< -> <= in: for (int round = 0; round < ROUNDS && walk.step < walk.steps; ++round) {": "a round of no windows",
        "< -> <= in: for (int l = 0; l < LANES; ++l) samples[l].settle();": "a lane that no thread has",
    },
    "normalize": {
        "<= -> < in: __device__ inline bool passes(ACC_T z) { return !(z <= ACC_T(0)); }": "only at exactly 0, which "
        "test_promises.py looks at",
        "< -> <= in: __device__ bool any() const { return first < last; }": "a window that holds nothing",
        "< -> <= in: const bool inside = down < row_step && window < tiles.windows && row < end;": "0 steps, too",
        "> -> >= in: row_step = tiles.windows > BLOCK ? 0 : BLOCK / int(tiles.windows);": "a block further on is a row "
        "further on",
        "< -> <= in: steps = begin < end ? (int(end - begin) + BLOCK - 1) / BLOCK : 0;": "begin == end is 0 steps",
        "< -> <= in: if (COLUMN && RAGGED && step < steps && row == tiles.rows - 1)": "after the last row comes none",
        "< -> <= in: for (int i = 0; i < VEC; ++i)": "no window holds an element VEC",
        "- 1 -> nothing in: for (int tile = tiles.count() - 1 - blockIdx.x; tile >= 0; tile -= gridDim.x) {":
        "a tile of no windows",
        "> -> >= in: for (int l = 0; walk.steps > 0 && l < LANES; ++l)": "maps that no window uses",
        "< -> <= in: for (int l = 0; walk.steps > 0 && l < LANES; ++l)": "a lane that no thread has",
        "< -> <= in: while (walk.step < walk.steps) {": "a round of no windows",
    },
    "gradient_sums": {
        f"- 1 -> nothing in: constexpr int ROUNDS = COLUMN ? 32 / UNROLL : {ROUNDS}": "sums of 64 instead of 32",
        "> -> >= in: for (int l = 0; walk.steps > 0 && l < LANES; ++l) {": "maps that no window uses",
        "< -> <= in: for (int l = 0; walk.steps > 0 && l < LANES; ++l) {": "a lane that no thread has",
        "< -> <= in: for (int round = 0; round < ROUNDS && walk.step < walk.steps; ++round) {": "a round of no windows",
        "< -> <= in: for (int l = 0; l < LANES; ++l) terms[l].settle();": "a lane that no thread has",
    },
    "input_gradient": {
        "- 1 -> nothing in: for (int tile = tiles.count() - 1 - blockIdx.x; tile >= 0; tile -= gridDim.x) {":
        "a tile of no windows",
        "> -> >= in: for (int l = 0; walk.steps > 0 && l < LANES; ++l) {": "maps that no window uses",
        "< -> <= in: for (int l = 0; walk.steps > 0 && l < LANES; ++l) {": "a lane that no thread has",
        "< -> <= in: while (walk.step < walk.steps) {": "a round of no windows",
    },
}  # fmt: skip
"""Mutants of kinds barriers, bounds and conditions that change nothing anybody could see, each with its reason."""


class OneBroken(host_machine.HostBackend):
    """Launches one kernel from another text."""

    def __init__(self, kernel, text, device):
        super().__init__(device)
        self.broken, self.text = kernel, text
        self._sound = host_machine.HostBackend(device)
        self._sound._kernels = host_machine.BACKEND._kernels

    def kernel(self, plan):
        if plan.kernel != self.broken:
            return self._sound.kernel(plan)
        if plan.constants not in self._kernels:
            arch = 90 if plan.cluster > 1 else 80
            self._kernels[plan.constants] = host_machine.Kernel(self.text, plan.kernel, dict(plan.constants), arch)
        return self._kernels[plan.constants]


def machine_and_case(kernel, regime, options, text=None):
    """What runs the regime with a kernel from another text; the fused kernels on the devices of their tests."""
    teams = kernel in ("forward", "backward")
    device, shape = test_cuda_teams.REGIMES[regime] if teams else (host_machine.TINY, test_cuda_kernels.REGIMES[regime])
    backend = OneBroken(kernel, translation_unit(f"{kernel}.cu") if text is None else text, device)
    machine = (host_machine.KernelMachine if teams else host_machine.Apart)("host", backend)
    seed = test_cuda_kernels.kink_free_seed(shape, options)
    return machine, lambda: test_cuda_kernels.Case(shape, seed=seed, **options)


def check(kernel):
    def run(text):
        for regime, options in CHECKS[kernel]:
            machine, case = machine_and_case(kernel, regime, options, text)
            for schedule in (0, 1, 5):
                machine.backend.seed = schedule
                case().check(machine)

    return run


def same(kernel):
    """What NVRTC makes of a text for every specialisation that is checked."""
    constants = set()
    for regime, options in CHECKS[kernel]:
        machine, case = machine_and_case(kernel, regime, options)
        case().check(machine)
        launched = [launch.plan for launch in machine.backend.launches]
        constants |= {(plan.constants, 90 if plan.cluster > 1 else 80) for plan in launched if plan.kernel == kernel}
    return lambda text: tuple(compile_ptx(text, kernel, dict(each), arch) for each, arch in sorted(constants))


def subjects():
    return [
        Subject(kernel, translation_unit(f"{kernel}.cu"), check(kernel), same(kernel), FILES[kernel],
                REDUNDANT.get(kernel, {}))
        for kernel in CHECKS
    ]  # fmt: skip
