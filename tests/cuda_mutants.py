"""What `python -m host.mutants cuda_mutants:subjects` breaks, and what has to notice: one place at a time.

Run from tests/.  Each file of kernels/ is broken by itself and pasted into the kernels that reach all of it.  A mutant
is checked by launches of a few milliseconds, chosen to reach every line: both maps, ragged and whole, alone and in
many tiles, held and read again, with options and without; and by those tests of the suite that look at what such
launches cannot see, like digits.  What costs time is to compile, so regimes with the same constants come for little.
"""

from dataclasses import replace
from functools import cache, lru_cache

import host_machine
import test_cuda_kernels
import test_cuda_teams
from host.mutants import Check, Subject, places
from host.nvrtc import compile_ptx

from cubn.machines.cuda.source import kernel_folder, translation_unit

CASES = {
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
        ("planes", {"residual": True, "relu": True}),
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
        ("block, planes read again", {}),
        ("block, planes read again", {"residual": True, "relu": True}),
        ("block, ragged planes read again", {"residual": True, "relu": True, "where": True}),
        ("block, columns, the last tile narrower", {}),
        ("cluster, columns", {}),
    ],
    "forward, teams": [
        ("block, planes", {}),
        ("block, columns", {}),
        ("cluster, planes", {}),
        ("cluster, more channels than clusters", {}),
        ("cluster, columns", {}),
        ("cluster, columns of short runs", {}),
        ("cluster, columns folded from rows", {}),
        ("grid, more ragged planes than teams", {}),
        ("grid, columns", {}),
        ("grid, more columns than teams, read again", {}),
        ("grid, columns folded from rows", {}),
    ],
    "backward": [
        ("block, planes, less than registers hold", {}),
        ("block, planes in shared memory", {"residual": True, "relu": True}),
        ("block, planes read again", {}),
        ("block, planes read again", {"relu": True}),
        ("block, ragged planes read again", {"residual": True, "relu": True, "where": True}),
        ("block, columns, the last tile narrower", {"where": True}),
    ],
    "backward, held": [
        ("block, planes in shared memory", {"residual": True, "relu": True}),
        ("block, planes in shared memory before sm_80", {"dtype": "float16"}),
        ("block, planes read again", {}),
        ("block, columns", {"where": True}),
    ],
}
"""Kernel, perhaps with what of it is looked at -> regimes of its tests, with options of a case."""

TINY, ALONE, POOR, TIGHT = host_machine.TINY, test_cuda_teams.ALONE, test_cuda_teams.POOR, test_cuda_teams.TIGHT
OLD = replace(TINY, arch=75)
far_from_zero = test_cuda_kernels.test_float64_far_from_zero_keeps_the_digits_of_its_distances
first_masked = test_cuda_kernels.test_a_masked_first_sample_of_float64_is_not_what_means_count_from
in_place = test_cuda_kernels.test_tensors_are_read_and_written_where_they_lie
in_every_dtype = test_cuda_kernels.test_every_regime_is_exact
large_mean = test_cuda_kernels.test_a_large_mean_costs_the_distance_from_it_no_digit
on_the_kink = test_cuda_kernels.test_relu_stops_the_gradient_at_exactly_zero
packed_bits = test_cuda_kernels.test_packed_bits_are_read_by_windows_of_any_kind
subnormal = test_cuda_kernels.test_a_subnormal_constant_is_its_own_mean
nan_in_one = test_cuda_kernels.test_nan_stays_in_its_channel_on_the_way_back
sums_of_32 = test_cuda_kernels.test_a_thread_sums_at_most_32_terms_at_a_time
tiny_eps = test_cuda_kernels.test_eps_far_below_float32_does_not_turn_a_constant_into_nan

TESTS = {
    "moments": [
        (TINY, large_mean, (8, 3, 512)),
        (TINY, large_mean, (1024, 3, 1)),
        (TINY, far_from_zero, (3, 2, 512), False),
        (TINY, far_from_zero, (3, 2, 512), True),
        (TINY, first_masked, (3, 2, 512)),
        (TINY, subnormal),
        (TINY, sums_of_32, (3, 16, 2048)),
        (TINY, sums_of_32, (300, 512, 1)),
    ],
    "normalize": [
        (TINY, in_place, "columns", "unaligned alike", "float16"),
        (TINY, in_place, "planes, ragged", "with gaps that leave vectors", "float32"),
        (TINY, large_mean, (8, 3, 512)),
        (TINY, on_the_kink, (4, 3, 256), True),
        (TINY, subnormal),
        (TINY, tiny_eps),
        (OLD, in_every_dtype, "planes", "bfloat16"),
    ],
    "gradient_sums": [
        (TINY, packed_bits, "planes"),
        (TINY, nan_in_one, (1, 3, 128)),
        (TINY, sums_of_32, (3, 16, 2048)),
        (TINY, sums_of_32, (300, 512, 1)),
    ],
    "forward": [
        (ALONE, large_mean, (3, 5, 256)),
        (ALONE, large_mean, (100, 16, 1)),
        (POOR, large_mean, (3, 1, 1200)),
        (ALONE, tiny_eps),
        (ALONE, on_the_kink, (4, 3, 256), True),
        (ALONE, test_cuda_teams.running_statistics_move, (6, 3, 256), "float32"),
        (ALONE, test_cuda_teams.one_sample_moves_nothing),
        (ALONE, test_cuda_teams.sums_of_32, "float32", True),
        (TIGHT, test_cuda_teams.sums_of_32, "float32", False),
        (TIGHT, test_cuda_teams.sums_of_32, "float32", True),
    ],
    "backward": [
        (ALONE, tiny_eps),
        (ALONE, nan_in_one, (5, 8, 1)),
        (ALONE, on_the_kink, (4, 3, 256), False),
        (ALONE, test_cuda_teams.sums_of_32, "float32", False),
        (TIGHT, test_cuda_teams.sums_of_32, "float32", False),
    ],
    "backward, held": [
        (ALONE, in_place, "planes, ragged", "unaligned alike", "float32"),
        (ALONE, in_place, "planes, ragged", "with gaps that leave vectors", "float32"),
    ],
}
"""Kernel -> a device, a test for whatever machine it is given, and what else it takes."""

CHECKED_WITH = {
    "scalar.cuh": ("moments", "normalize"),
    "tiles.cuh": ("normalize", "backward, held"),
    "union.cuh": ("moments",),
    "moments.cuh": ("moments",),
    "samples.cuh": ("moments", "forward"),
    "moments.cu": ("moments",),
    "affine.cuh": ("normalize",),
    "marks.cuh": ("normalize", "gradient_sums", "backward, held"),
    "normalize.cu": ("normalize",),
    "sums.cuh": ("gradient_sums", "backward"),
    "gradient_sums.cu": ("gradient_sums",),
    "pull.cuh": ("input_gradient",),
    "input_gradient.cu": ("input_gradient",),
    "team.cuh": ("forward, teams",),
    "held.cuh": ("backward, held",),
    "chunk.cuh": ("forward",),
    "output.cuh": ("normalize",),
    "widening.cu": ("widening",),
    "forward.cu": ("forward",),
    "backward.cu": ("backward",),
}
"""File that is broken -> whose checks reach all of it between them."""

TILE_AFTER_THE_LAST = (
    "- 1 -> nothing in: for (int tile = tiles.count() - 1 - blockIdx.x; tile >= 0; tile -= gridDim.x) {"
)
BESIDE = "beside a local array: undefined, and NVRTC leaves it out"
NO_WINDOW = "a window that is not there; the next line looks at how many there are"
NO_LONGER = "sums that end elsewhere, none longer than 32 terms"
NO_USE = "maps that no window of the thread uses"

REDUNDANT = {
    "scalar.cuh": {
        "< -> <= in: return isinf(near) && !isinf(v) ? ACC_T(v < 0 ? -3.402823466e38 : 3.402823466e38) : near;":
        "0 does not become infinite",
        "<= -> < in: __device__ inline ACC_T relu(ACC_T v) { return v <= ACC_T(0) ? ACC_T(0) : v; }":
        "0 and -0 are returned for what they are, and are equal",
    },
    "tiles.cuh": {
        "< -> <= in: const bool inside = down < row_step && window < tiles.windows && row < end; #3":
        "row == end makes 0 steps, too",
        "> -> >= in: constexpr bool PAIRS = sizeof(X_T) == 2 && VEC > 1;  // elements lie two to a register":
        "one element is the lower half of a pair, whose upper half is cut off",
        "> -> >= in: if (DIRECTION == BACK && steps > 0) begin += index_t(steps - 1) * BLOCK;":
        "a thread that goes nowhere, from wherever",
        "> -> >= in: row_step = tiles.windows > BLOCK ? 0 : BLOCK / int(tiles.windows);":
        "BLOCK windows further on is one row further on, however it is counted",
        "< -> <= in: steps = begin < end ? (int(end - begin) + BLOCK - 1) / BLOCK : 0;": "begin == end makes 0 steps",
        "< -> <= in: for (int i = 0; i < VEC; ++i)": "no window holds an element VEC",
    },
    "union.cuh": {
        "< -> <= in: for (int i = 0; i < WORDS; ++i) raw.word[i] = "
        "__shfl_down_sync(0xffffffffu, raw.word[i], distance);": "a word that no set has",
        "< -> <= in: while (team < WARP && team < length && 2 * team * jobs <= BLOCK) team *= 2; #2": "only speed",
        "<= -> < in: while (team < WARP && team < length && 2 * team * jobs <= BLOCK) team *= 2;": "only speed",
        "< -> <= in: for (int first = 0; first < runs; first += BLOCK / team) {": "one more round, without runs",
        "< -> <= in: for (index_t first = begin; first < end; first += BLOCK / crew) {":
        "one more round, without channels",
        "delete __threadfence(); in: __threadfence(); #2": "the reader's half of the fence: CUDA's memory model asks "
        "for it, the executor's loads are in order",
    },
    "samples.cuh": {
        "< -> <= in: return {count, widen(pivot) - origin + shift, m2 < 0 ? 0 : m2};  // NaN stays": "0 is 0",
        "< -> <= in: for (int l = 0; l < LANES; ++l) {": BESIDE,
        "< -> <= in: for (int u = 0; u < N; ++u) {": NO_WINDOW,
        "< -> <= in: for (int l = 0; l < LANES; ++l) without |= lanes[l].count == 0;": BESIDE,
        "negate (u + 1) % AT_A_TIME == 0 in: if ((u + 1) % AT_A_TIME == 0) settle(lanes);": NO_LONGER,
        "+ 1 -> nothing in: if ((u + 1) % AT_A_TIME == 0) settle(lanes);": NO_LONGER,
        "negate (first + N) % AT_A_TIME == 0 in: if ((first + N) % AT_A_TIME == 0) settle(lanes);": NO_LONGER,
    },
    "sums.cuh": {
        "< -> <= in: for (int l = 0; l < LANES; ++l) {": BESIDE,
        "> -> >= in: const index_t c = steps > 0 ? channel.next(tiles) : 0;": NO_USE,
        "< -> <= in: for (int u = 0; (RELU || WHERE) && u < N; ++u) {": NO_WINDOW,
        ">= -> > in: if (u >= count) continue;": "a window that is not there, and is not looked at",
        "< -> <= in: for (int u = 0; u < N; ++u) {": NO_WINDOW,
        "negate (u + 1) % AT_A_TIME == 0 in: if ((u + 1) % AT_A_TIME == 0) settle(lanes);": NO_LONGER,
        "+ 1 -> nothing in: if ((u + 1) % AT_A_TIME == 0) settle(lanes);": NO_LONGER,
        "negate (first + N) % AT_A_TIME == 0 in: if ((first + N) % AT_A_TIME == 0) settle(lanes);": NO_LONGER,
    },
    "held.cuh": {
        "< -> <= in: for (int u = 0; u < N; ++u)": BESIDE,
        '< -> <= in: for (int i = 0; i < VEC / 2; ++i) asm volatile("" : "+r"(vectors[u].word[i]));': BESIDE,
    },
    "chunk.cuh": {
        "< -> <= in: for (int l = 0; l < LANES; ++l) lanes[l].settle();": BESIDE,
        "> -> >= in: for (; UNROLL > 1 && first < count; ++first) {": "nothing is left of single ones",
    },
    "affine.cuh": {
        "< -> <= in: return sizeof(ACC_T) == 4 && fabs(mean) < 0x1p-126 ? 0 : mean - ACC_T(mean);":
        "2^-126 is a float, so that nothing is lost",
    },
    "normalize.cu": {
        TILE_AFTER_THE_LAST: "a tile without windows",
        "< -> <= in: for (int l = 0; l < LANES; ++l)": BESIDE,
        "> -> >= in: maps[l] = normalizing(walk.steps > 0 ? channel.next(tiles) : 0, mean, rstd, gamma, beta);": NO_USE,
    },
    "output.cuh": {"< -> <= in: for (int i = 0; i < VEC; ++i) {": BESIDE},
    "input_gradient.cu": {
        TILE_AFTER_THE_LAST: "a tile without windows",
        "< -> <= in: for (int l = 0; l < LANES; ++l) {": BESIDE,
        "> -> >= in: const index_t c = walk.steps > 0 ? channel.next(tiles) : 0;": NO_USE,
    },
    "team.cuh": {
        "delete __threadfence(); in: __threadfence(); #2": "the loads before it acquire already",
        "< -> <= in: for (int first = 0; first < mine_of; first += BLOCK / crew) {": "one more round, without channels",
    },
    "marks.cuh": {
        "< -> <= in: for (int i = 0; i < VEC; ++i) bits |= bytes.at[i] ? 1u << i : 0;": "a bit that nobody looks at",
    },
    "forward.cu": {
        "< -> <= in: for (int u = 0; u < chunk.WINDOWS; ++u) {": NO_WINDOW,
        "< -> <= in: for (int l = 0; l < LANES; ++l) {": BESIDE,
        "> -> >= in: for (int l = 0; walk.steps > 0 && l < LANES; ++l) "
        "maps[l] = board.maps[again.next(tiles) - first];":
        NO_USE,
        "< -> <= in: for (int l = 0; walk.steps > 0 && l < LANES; ++l) "
        "maps[l] = board.maps[again.next(tiles) - first];":
        BESIDE,
    },
    "backward.cu": {
        "< -> <= in: for (int u = 0; u < chunk.WINDOWS; ++u) {": NO_WINDOW,
        "< -> <= in: for (int l = 0; l < LANES; ++l) {": BESIDE,
        "> -> >= in: for (int l = 0; walk.steps > 0 && l < LANES; ++l) "
        "pulls[l] = board.maps[again.next(tiles) - first];": NO_USE,
        "< -> <= in: for (int l = 0; walk.steps > 0 && l < LANES; ++l) "
        "pulls[l] = board.maps[again.next(tiles) - first];": BESIDE,
        "> -> >= in: if (places.streamed > 0) {": NO_USE,
    },
}  # fmt: skip
"""File -> mutants of kinds barriers, bounds and conditions that nobody could notice, each with its reason."""


class OneBroken(host_machine.HostBackend):
    """Launches one kernel from another text."""

    def __init__(self, kernel, text, device):
        super().__init__(device)
        self.broken, self.text = kernel, text
        self.compiled = {}
        self._sound = host_machine.HostBackend(device)
        self._sound._kernels = host_machine.BACKEND._kernels

    def kernel(self, plan):
        if plan.kernel != self.broken:
            return self._sound.kernel(plan)
        specialisation = plan.constants, 90 if plan.cluster > 1 else min(80, self.device.arch)
        if specialisation not in self.compiled:
            constants, arch = specialisation
            self.compiled[specialisation] = host_machine.Kernel(self.text, plan.kernel, dict(constants), arch)
            self.compiled[specialisation].most_steps = 1 << 23  # a mutant that never ends is soon found out
        return self.compiled[specialisation]


@cache
def case_of(shape, options):
    options = dict(options)
    return test_cuda_kernels.Case(shape, seed=test_cuda_kernels.kink_free_seed(shape, options), **options)


def looks(whose):
    """(device, function of a machine) for each entry of CASES and TESTS."""
    for regime, options in CASES[whose]:
        device, shape = test_cuda_teams.REGIMES.get(regime) or (TINY, test_cuda_kernels.REGIMES[regime])
        yield (
            device,
            lambda machine, shape=shape, options=options: case_of(shape, tuple(options.items())).check(machine),
        )
    for device, test, *arguments in TESTS.get(whose, ()):
        yield device, lambda machine, test=test, arguments=arguments: test(machine, *arguments)


def checks_of(file, whose):
    """What looks at a file in one kernel."""
    kernel = whose.partition(",")[0]
    if kernel == "widening":
        return [Check(lambda text: test_cuda_kernels.widen_exactly(kernel_text(kernel, file, text)))]
    return [check_of(file, kernel, *look) for look in looks(whose)]


def file_text(file):
    return f'#line 1 "{file}"\n' + (kernel_folder() / file).read_text(encoding="utf-8")


def kernel_text(kernel, file, text):
    """The kernel's translation unit with the lines of one file as they are in another text of it."""
    changed = {
        place: new
        for place, old, new in zip(places(text), file_text(file).splitlines(), text.splitlines(), strict=True)
        if old != new
    }
    unit = translation_unit(f"{kernel}.cu")
    lines = [changed.pop(place, line) for place, line in zip(places(unit), unit.splitlines(), strict=True)]
    assert not changed, f"{kernel}.cu has no lines {changed}"
    return "\n".join(lines) + "\n"


def check_of(file, kernel, device, look):
    """Takes one look at a kernel under several schedules, with one of its files as it is told."""

    def run(text, schedules=(0, 1, 5)):
        backend = OneBroken(kernel, kernel_text(kernel, file, text), device)
        machine = host_machine.KernelMachine if kernel in ("forward", "backward") else host_machine.Apart
        for schedule in schedules:
            backend.seed = schedule
            backend.launches.clear()
            look(machine("host", backend))
        return backend.compiled

    @cache
    def specialisations():
        found = sorted(run(file_text(file), schedules=(0,)))
        assert found, f"a check of {kernel} does not launch it"
        return found

    return Check(run, lambda text: [code(kernel_text(kernel, file, text), kernel, *each) for each in specialisations()])


@lru_cache(maxsize=256)
def code(text, kernel, constants, arch):
    """PTX without the marks of source columns, which most mutants move."""
    ptx = compile_ptx(text, kernel, dict(constants), arch)
    return "\n".join(line for line in ptx.splitlines() if not line.lstrip().startswith(".loc"))


def subjects():
    return [
        Subject(
            file,
            file_text(file),
            [check for whose in all_whose for check in checks_of(file, whose)],
            redundant=REDUNDANT.get(file, {}),
        )
        for file, all_whose in CHECKED_WITH.items()
    ]
