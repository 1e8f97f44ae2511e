"""Reads SASS, what a GPU really executes: the loops of a kernel, and how many instructions each takes for 16 bytes.

`nvdisasm` of NVIDIA's pip package takes a cubin apart, without a GPU.  A loop is what lies between a label and a
branch back to it that has no such branch inside; what it is for is told by the 16-byte accesses that it makes.
"""

import importlib.util
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\d+\s+)?([A-Z][\w.]*)\s*([^;]*);")
LABEL = re.compile(r"(\.L_x_\d+):")
ACCESSES = {"copies": r"LDGSTS.*\.128", "loads": r"LDG\..*128", "kept": r"LDS\..*128", "stores": r"STG\..*128"}


class Instruction(NamedTuple):
    """`branch` is the label that it may go to, "" if it goes on; `always` that it cannot go on."""

    operation: str
    branch: str
    always: bool


@dataclass(frozen=True)
class Loop:
    """An innermost loop, as a turn goes through it that makes all of its accesses and else takes every short cut.

    Attributes
    ----------
    instructions, most : int
        Of such a turn, and of the whole loop.
    copies, loads, kept, stores : int
        Accesses of 16 bytes: from global to shared memory, from global memory, from shared memory, to global memory.
    """

    instructions: int
    most: int
    copies: int
    loads: int
    kept: int
    stores: int


def disassembler() -> Path | None:
    """The program, or None where its package is not installed."""
    spec = importlib.util.find_spec("nvidia")
    places = (Path(root, "cu13", "bin", "nvdisasm") for root in (spec.submodule_search_locations or ())) if spec else ()
    return next((place for place in places if place.is_file()), None)


def instructions(cubin: bytes) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions in order, and where each label is."""
    program = disassembler()
    assert program, "needs nvdisasm; pip install nvidia-cuda-nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([program, "-c", file.name], check=True, capture_output=True, text=True).stdout
    return parse(text)


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """What nvdisasm has printed."""
    found: list[Instruction] = []
    labels = {}
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(found)
        elif match := INSTRUCTION.match(line):
            guard, operation, operands = match.groups()
            target = re.search(r"\.L_x_\d+", operands) if operation.startswith("BRA") else None
            free = operation == "BRA" and not guard and re.match(r"U?P\d|!", operands) is None
            found.append(Instruction(operation, target[0] if target else "", free))
    return found, labels


def loops(cubin: bytes) -> Iterator[Loop]:
    """The innermost loops of a kernel, in order."""
    yield from innermost(*instructions(cubin))


def innermost(code: list[Instruction], labels: dict[str, int]) -> Iterator[Loop]:
    """The same of instructions."""
    spans = {
        (labels[each.branch], end)
        for end, each in enumerate(code)
        if each.branch and labels.get(each.branch, end + 1) <= end
    }
    for span in sorted(spans):
        if not any(other != span and span[0] <= other[0] and other[1] <= span[1] for other in spans):
            yield _turn(code, labels, *span)


def _turn(code: list[Instruction], labels: dict[str, int], start: int, end: int) -> Loop:
    """The way from the first to the last instruction with the most accesses, and of those ways the shortest."""
    best: dict[int, tuple[int, int, Counter[str]]] = {start: (0, 0, Counter())}
    for place in range(start, end + 1):
        if place not in best:
            continue
        accesses, length, counts = best[place]
        made = Counter(name for name, form in ACCESSES.items() if re.match(form, code[place].operation))
        there = accesses + made.total(), length - 1, counts + made  # the shorter, the greater
        if place == end:
            return Loop(-there[1], end + 1 - start, **{name: there[2][name] for name in ACCESSES})
        targets = [] if code[place].always else [place + 1]
        if code[place].branch and place < labels.get(code[place].branch, -1) <= end:
            targets.append(labels[code[place].branch])
        for target in targets:
            if target not in best or best[target][:2] < there[:2]:
                best[target] = there
    raise AssertionError("no way through a loop")
