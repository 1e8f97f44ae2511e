"""Every specialisation of the kernels, compiled by the real compiler for every architecture; no GPU is needed.

Each run compiles a covering set: every kernel, element type, map and tail on every architecture's turn, the options
in rotation.  More, with a record of registers and shared memory in benchmarks/results/compile-matrix.json:

    python tests/test_cuda_compile.py [--architectures 75 80 90] [--kernels moments] [--everything]

That is all of the general kernels, two minutes of two cores for each architecture, and of the fused kernels all where
registers are scarcest, twenty minutes: the widest block, the sizes of clusters taking turns.  `--everything` has all
sizes and narrower blocks, too, which may have twice the registers.
"""

import argparse
import itertools
import json
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

from host.nvrtc import architectures, compile_cubin, compile_ptx, toolkit_for, toolkits

from cubn.machines.cuda.plan import (
    BYTES,
    DEVICES,
    ITEM_BYTES,
    KERNELS,
    PACKED,
    LaunchPlan,
    Memory,
    backward_choices,
    forward_choices,
    gradient_sums_plan,
    input_gradient_plan,
    moments_plan,
    normalize_plan,
)
from cubn.machines.cuda.source import translation_unit
from cubn.problem import Problem

OLDEST = 70
RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "compile-matrix.json"

GEOMETRIES = (
    ((8, 4, 4096), Memory()),
    ((8, 4, 4097), Memory()),
    ((8, 4, 4096), Memory(None, None, False)),
    ((96, 64, 1), Memory()),
    ((97, 27, 1), Memory()),
    ((96, 64, 1), Memory(None, None, False)),
)
"""A shape and a memory for each map, whole, ragged and without vectors."""

TEAMED = (
    ((1, 1, 2**16), Memory()),
    ((1, 1, 2**16 + 1), Memory()),
    ((1, 1, 2**16), Memory(None, None, False)),
    ((2**16, 16, 1), Memory()),
    ((2**16 + 1, 27, 1), Memory()),
    ((2**16, 16, 1), Memory(None, None, False)),
    ((2**16, 2, 1), Memory()),
    ((2**16, 2, 1), Memory(None, None, False)),
    ((8, 4, 512), Memory()),
    ((1, 4, 1024), Memory()),
)
"""The same for teams, whose blocks are narrow where there is little for each thread to do."""

BOTH = (False, True)

EVERYTHING = DEVICES["h200"]
"""A device whose plans use whatever a plan can use."""


@cache
def specialisations() -> tuple[LaunchPlan, ...]:
    """A plan for every set of constants that a plan can have.  The options vary fastest."""
    plans = []
    for dtype, (shape, memory) in itertools.product(ITEM_BYTES, (*GEOMETRIES, *TEAMED)):
        for relu in BOTH:
            problem = Problem(*shape, dtype, 1e-5, "relu" if relu else None)
            plans += list(options_of(problem, memory))
    unique = {(plan.kernel, plan.constants): plan for plan in plans}
    unique |= {(plan.kernel, plan.constants): plan for plan in widths_of(tuple(unique.values()))}
    return tuple(sorted(unique.values(), key=order))


def order(plan):
    """Kernel and geometry first, then the team, then the options."""
    constants = dict(plan.constants)
    first = ("X_TYPE", "COLUMN", "VEC", "RAGGED", "TEAM", "RANKS", "BLOCK")
    return plan.kernel, [constants.pop(name, 0) for name in first], sorted(constants.items())


def widths_of(plans):
    """Fused kernels in blocks of every width that a plan may choose; the rest of their constants stays."""
    for plan in plans:
        if plan.fused:
            for block in (64, 128, 256):
                if block < plan.block:
                    constants = tuple((name, block if name == "BLOCK" else value) for name, value in plan.constants)
                    yield replace(plan, block=block, constants=constants)


def options_of(problem, memory, limits=EVERYTHING):
    """All plans for one problem, of all teams."""
    for where in BOTH:
        yield moments_plan(problem, limits, memory, where=where)
        for residual, keep in itertools.product(BOTH, BOTH):
            yield normalize_plan(problem, limits, memory, residual=residual, where=where, keep=keep)
            yield from fused(forward_choices(problem, limits, memory, residual=residual, where=where, keep=keep))
        for active in (0, BYTES, PACKED):
            yield gradient_sums_plan(problem, limits, memory, where=where, active=active)
            for train, residual in itertools.product(BOTH, (False,) if problem.activation and not active else BOTH):
                options = {"train": train, "where": where, "active": active, "residual": residual}
                yield input_gradient_plan(problem, limits, memory, **options)
                yield from fused(backward_choices(problem, limits, memory, **options))


def fused(choices):
    return (choice.plans[0] for choice in choices if choice.team)


def runs_on(plan: LaunchPlan, arch: int) -> bool:
    """Clusters there are from sm_90 on."""
    return arch >= 90 or plan.cluster == 1


def targets() -> tuple[int, ...]:
    return tuple(arch for arch in architectures() if arch >= OLDEST and arch != 72)  # sm_72 is sm_70 on a Jetson


def covering(plans: tuple[LaunchPlan, ...], archs: tuple[int, ...]) -> list[tuple[LaunchPlan, int]]:
    """Every kernel, element type, map and tail with two sets of options, and with each team once; all architectures.

    The options of the fused kernels, whose compilation takes longest, take turns over the teams.
    """

    def key(plan):
        kernel, geometry, _ = order(plan)
        return kernel, geometry[: 5 if plan.fused else 4]

    chosen = []
    for number, (_, group) in enumerate(itertools.groupby(plans, key=key)):
        options = list(group)
        each = 1 if options[0].fused else 2
        for turn in range(each):
            option = options[(7 * number + turn * (len(options) // each)) % len(options)]
            possible = [arch for arch in archs if runs_on(option, arch)]
            chosen.append((option, possible[(number * each + turn) % len(possible)]))
    return chosen


def scarcest(plans: tuple[LaunchPlan, ...]) -> tuple[LaunchPlan, ...]:
    """All plans but, of the fused kernels, those that differ from one of them in the block or the cluster alone."""

    def key(plan):
        constants = dict(plan.constants)
        if plan.fused:
            del constants["BLOCK"], constants["RANKS"]
        return plan.kernel, sorted(constants.items())

    chosen = []
    for number, (_, group) in enumerate(itertools.groupby(sorted(plans, key=key), key=key)):
        alike = list(group)
        widest = [plan for plan in alike if plan.block == max(plan.block for plan in alike)]
        chosen.append(widest[number % len(widest)])
    return tuple(chosen)


def use(plan: LaunchPlan, arch: int) -> dict[str, object]:
    """Compile; one row of the record."""
    usage = compile_cubin(translation_unit(f"{plan.kernel}.cu"), plan.kernel, dict(plan.constants), arch)
    return {
        "kernel": plan.kernel,
        "constants": dict(plan.constants),
        "arch": arch,
        "registers": usage.registers,
        "shared": usage.shared,
        "spill": usage.spill_stores + usage.spill_loads,
        "stack": usage.stack,
        "warnings": usage.warnings,
    }


def complaints(row: dict, plan: LaunchPlan) -> list[str]:
    """What is wrong with a compiled specialisation; nothing, if it is as the plan claims."""
    found = []
    if row["warnings"]:
        found.append(row["warnings"])
    if row["spill"] or row["stack"]:
        found.append(f"{row['spill']} bytes spilled, {row['stack']} bytes of stack")
    if row["registers"] > plan.registers:
        found.append(f"{row['registers']} registers, planned {plan.registers}")
    if row["shared"] > plan.shared_bytes:
        found.append(f"{row['shared']} bytes of shared memory, planned {plan.shared_bytes}")
    return [f"{plan.kernel} {row['constants']} sm_{row['arch']}: {complaint}" for complaint in found]


def compile_all(pairs, processes=2):
    """Rows and complaints.  Threads are enough: the compiler runs outside of Python's lock."""
    with ThreadPoolExecutor(processes) as pool:
        rows = list(pool.map(lambda pair: use(*pair), pairs))
    return rows, [text for row, (plan, _) in zip(rows, pairs, strict=True) for text in complaints(row, plan)]


needs_compiler = pytest.mark.skipif(not toolkits(), reason="needs NVRTC; pip install nvidia-cuda-nvrtc")


@needs_compiler
def test_a_covering_set_compiles_without_warning_and_without_spill():
    pairs = covering(specialisations(), targets())
    assert {arch for _, arch in pairs} == set(targets())
    assert {plan.kernel for plan, _ in pairs} == set(KERNELS)
    _, wrong = compile_all(pairs)
    assert not wrong, "\n".join(wrong)


@needs_compiler
@pytest.mark.parametrize("x_type", [2, 3])
def test_given_statistics_are_widened_on_every_architecture(x_type):
    """The one kernel without a plan."""
    for arch in targets():
        usage = compile_cubin(translation_unit("widening.cu"), "widening", {"X_TYPE": x_type}, arch)
        assert (usage.spill_stores, usage.spill_loads, usage.stack, usage.warnings) == (0, 0, 0, "")


@needs_compiler
def test_a_spill_and_a_warning_would_be_noticed():
    """The teeth: 16 registers for the widest kernel, and a variable that nobody uses."""
    plan = next(p for p in specialisations() if p.kernel == "gradient_sums" and dict(p.constants)["VEC"] == 8)
    text = translation_unit("gradient_sums.cu").replace("__launch_bounds__(BLOCK, 2)", "__launch_bounds__(1024, 2)")
    usage = compile_cubin(text, plan.kernel, dict(plan.constants), 90)
    assert usage.spill_stores + usage.spill_loads > 0
    text = translation_unit("moments.cu").replace("Samples samples", "int nobody; Samples samples")
    plan = next(p for p in specialisations() if p.kernel == "moments")
    assert "nobody" in compile_cubin(text, plan.kernel, dict(plan.constants), 90).warnings


TENSORS = {"moments": (1, 0), "normalize": (1, 1), "gradient_sums": (2, 0), "input_gradient": (2, 1)}
"""Kernel without options -> tensors that it reads and writes."""


@needs_compiler
@pytest.mark.parametrize("dtype", ITEM_BYTES)
@pytest.mark.parametrize("shape", [(32, 64, 4096), (4096, 512, 1)], ids=str)
@pytest.mark.parametrize("kernel", TENSORS)
def test_whole_windows_are_moved_by_one_instruction_of_16_bytes(kernel, shape, dtype):
    """In the PTX: as many such loads and stores as windows in flight, and no store of a tensor in pieces.

    What a structure of small elements looks like in CUDA C does not matter; compilers have taken such stores apart.
    """
    problem = Problem(*shape, dtype, 1e-5, None)
    arguments = (problem, DEVICES["h200"], Memory())
    choices = (forward_choices(*arguments), backward_choices(*arguments))
    apart = [plan for found in choices for choice in found if choice.team is None for plan in choice.plans]
    plan = next(plan for plan in apart if plan.kernel == kernel)
    text = compile_ptx(translation_unit(f"{kernel}.cu"), kernel, dict(plan.constants), 80)
    read, written = TENSORS[kernel]
    in_flight = dict(plan.constants)["UNROLL"] + 1  # the last windows are taken one by one
    assert len(re.findall(r"ld\.global(?:\.nc)?\.v(?:4\.[ubf]32|2\.[ubf]64)", text)) == read * in_flight
    stores = re.findall(r"st\.global\S*", text)
    if written:
        assert [store.endswith((".v4.u32", ".v4.f32", ".v2.f64", ".v2.u64")) for store in stores] == [True] * in_flight


sizes = st.integers(1, 5000)


@settings(max_examples=500, deadline=None)
@given(
    st.tuples(sizes, sizes, sizes),
    st.sampled_from(tuple(ITEM_BYTES)),
    st.sampled_from(("relu", None)),
    st.builds(
        Memory, st.sampled_from((None, 0, 1)), st.sampled_from((None, 0, 1)), st.booleans()
    ),
    st.sampled_from(tuple(DEVICES.values())),
)  # fmt: skip
def test_no_plan_has_constants_that_are_not_in_the_matrix(shape, dtype, activation, memory, limits):
    known = {(plan.kernel, plan.constants) for plan in specialisations()}
    problem = Problem(*shape, dtype, 1e-5, activation)
    for plan in options_of(problem, memory, limits):
        assert (plan.kernel, plan.constants) in known, plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--architectures", type=int, nargs="+", default=targets())
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS))
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--covering", action="store_true", help="what the tests compile; writes no record")
    extent.add_argument("--everything", action="store_true", help="all blocks and clusters of the fused kernels")
    options = parser.parse_args()
    archs = options.architectures
    plans = tuple(plan for plan in specialisations() if plan.kernel in options.kernels)
    compiled = plans if options.everything else scarcest(plans)
    pairs = [pair for pair in itertools.product(compiled, archs) if runs_on(*pair)]
    if options.covering:
        pairs = covering(plans, archs)
    rows, wrong = compile_all(pairs, options.processes)
    print("\n".join(wrong) or f"{len(rows)} compilations: no error, no warning, no spill")
    print(table(rows))
    if not options.covering:
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        of = Counter((plan.kernel, arch) for plan, arch in itertools.product(plans, archs) if runs_on(plan, arch))
        RECORD.write_text(json.dumps(record(rows, archs, of), indent=1) + "\n")
    sys.exit(bool(wrong))


def record(rows, archs, of):
    """Ranges over all specialisations for each kernel and architecture; what was not compiled stays as it was."""
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {"compilers": {}, "rows": []}
    renewed = {(row["kernel"], row["arch"]) for row in rows}
    kept = [row for row in known["rows"] if (row["kernel"], row["arch"]) not in renewed]
    new = [row | {"of": of[row["kernel"], row["arch"]]} for row in summary(rows)]
    return {
        "compilers": known["compilers"] | {str(arch): str(toolkit_for(arch)) for arch in archs},
        "rows": sorted(kept + new, key=lambda row: (row["arch"], row["kernel"])),
    }


def summary(rows):
    def key(row):
        return row["kernel"], row["arch"]

    found = []
    for (kernel, arch), group in itertools.groupby(sorted(rows, key=key), key):
        group = list(group)
        registers = sorted(row["registers"] for row in group)
        found.append({
            "kernel": kernel,
            "arch": arch,
            "specialisations": len(group),
            "registers": [registers[0], registers[len(registers) // 2], registers[-1]],
            "shared": max(row["shared"] for row in group),
            "spill": max(row["spill"] for row in group),
            "warnings": sum(bool(row["warnings"]) for row in group),
        })  # fmt: skip
    return found


def table(rows):
    lines = ["kernel           arch  specialisations  registers (least, median, most)  shared  spill  warnings"]
    for row in summary(rows):
        least, median, most = row["registers"]
        lines.append(
            f"{row['kernel']:16} {row['arch']:4} {row['specialisations']:16} {least:14} {median:8} {most:8} "
            f"{row['shared']:7} {row['spill']:6} {row['warnings']:9}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
