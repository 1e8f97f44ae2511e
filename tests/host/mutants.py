"""Are the checks awake?  Breaks a kernel in one place at a time and reports which breaks no check notices.

A mutant is the kernel with one barrier deleted, one bound shifted, one operator swapped or one condition negated.
A check runs the text and raises when something is wrong with it: `Fault`, `AssertionError`, whatever.  A mutant that
all checks let pass has survived: a test is missing, or what was broken is redundant.

    python -m host.mutants module:function [--only moments] [--kinds barriers bounds] [--processes 2] [--survivors-only]

`module.function()` returns the `Subject`s.  The exit status is 1 if a mutant survived that its subject does not
declare redundant, or if something declared redundant was caught or does not exist.

Nearly all of the time goes into compilers, so a check is left out where it would run the code that the unbroken
kernel has, and those come first that have caught most so far.
"""

import argparse
import importlib
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context

from .nvrtc import CompileError

DELETED = {
    "barriers": r"(?:__syncthreads|__syncwarp|__threadfence|__cluster_barrier_(?:arrive|wait))\([^()]*\);"
    r'|asm volatile\("(?:cp\.async\.(?:wait|commit)|barrier|bar\.|fence|membar)[^;]*;"[^;]*\);',
}
SWAPPED = {
    "bounds": ((" < ", " <= "), (" <= ", " < "), (" > ", " >= "), (" >= ", " > "), (" + 1", ""), (" - 1", "")),
    "logic": ((" == ", " != "), (" != ", " == "), (" && ", " || "), (" || ", " && ")),
    "arithmetic": (
        (" + ", " - "), (" - ", " + "), (" * ", " / "), (" / ", " * "), (" % ", " / "),
        (" += ", " -= "), (" += ", " = "),
    ),
}  # fmt: skip
KINDS = ("barriers", "bounds", "logic", "arithmetic", "conditions")
"""What can be broken.  Operators are found by the spaces around them, which templates and pointers do not have."""


@dataclass(frozen=True)
class Mutant:
    """A kernel's text with one change."""

    place: str  # "moments.cu(73)"
    change: str  # "delete __syncthreads();"
    line: str  # as it was
    text: str = field(repr=False)
    number: int = 1  # among those of the text with this change in such a line

    @property
    def key(self) -> str:
        """What names the mutant as long as its line stays as it is, wherever it moves past lines that differ."""
        return f"{self.change} in: {self.line}" + (f" #{self.number}" if self.number > 1 else "")


@dataclass(frozen=True)
class Check:
    """One look at a kernel.

    Attributes
    ----------
    run : function of the text
        Raises when something is wrong.
    code : function of the text, optional
        What the compiler makes of it for this check, for example `compile_ptx(...)`.  A mutant for which that is
        what it is for the original would pass as the original does, and is not run.
    """

    run: Callable[[str], object]
    code: Callable[[str], Hashable] | None = None


@dataclass(frozen=True)
class Subject:
    """A kernel and what is checked of it.

    Attributes
    ----------
    name : str
        For the report.
    text : str
        The kernel, headers pasted in; `#line` marks say where its lines come from.
    checks : sequence of Check
        What has to notice.
    files : sequence of str
        Break only lines of these files; all of them when empty.
    redundant : mapping of `Mutant.key` to str
        Mutants that no check can notice, each with the reason.
    """

    name: str
    text: str
    checks: Sequence[Check]
    files: Sequence[str] = ()
    redundant: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: "caught", "survived", "redundant", "same code" or "does not compile".

    "same code" is what no check could notice because the compiler made of it what it made of the original, always.
    """

    mutant: Mutant
    outcome: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.outcome:17s} {self.mutant.place:26s} {self.mutant.change:36s} {self.reason}"


def mutants(text: str, kinds: Iterable[str] = KINDS, files: Sequence[str] = ()) -> Iterator[Mutant]:
    """Every mutant of a text, in the order of its lines."""
    code = _blank_comments(text)
    origins, lines = places(text), text.splitlines()
    alike: Counter[tuple[str, str]] = Counter()
    changes = sorted(change for kind in kinds for change in _changes(code, kind))
    for start, end, new, label in changes:
        number = text.count("\n", 0, start)
        file, line = origins[number]
        if line and (not files or file in files):
            whole = lines[number].strip()
            alike[label, whole] += 1
            yield Mutant(f"{file}({line})", label, whole, text[:start] + new + text[end:], alike[label, whole])


def _changes(code: str, kind: str) -> Iterator[tuple[int, int, str, str]]:
    """(start, end, replacement, description)"""
    if kind in DELETED:
        for match in re.finditer(DELETED[kind], code):
            yield *match.span(), ";", f"delete {match[0]}"
    for old, new in SWAPPED.get(kind, ()):
        # "x + 1" but not "x + 10", nor "x + 1.5"
        pattern = re.escape(old) + (r"(?![\w.])" if old[-1].isdigit() else "")
        for match in re.finditer(pattern, code):
            yield *match.span(), new, f"{old.strip()} -> {new.strip() or 'nothing'}"
    if kind == "conditions":
        for match in re.finditer(r"\bif \(", code):
            end = _closing(code, match.end())
            condition = code[match.end() : end]
            yield match.end(), end, f"!({condition})", f"negate {condition}"[:36]


def _closing(code: str, start: int) -> int:
    """Where the parenthesis closes that opens just before `start`."""
    depth = 1
    for position in range(start, len(code)):
        depth += {"(": 1, ")": -1}.get(code[position], 0)
        if depth == 0:
            return position
    raise ValueError("unbalanced parentheses")


def _blank_comments(text: str) -> str:
    """The text with comments and preprocessor lines blanked, every character that is left where it was."""

    def blank(match: re.Match) -> str:
        return re.sub(r"[^\n]", " ", match[0])

    return re.sub(r"//[^\n]*|/\*.*?\*/|^[ \t]*#[^\n]*", blank, text, flags=re.DOTALL | re.MULTILINE)


def places(text: str) -> list[tuple[str, int]]:
    """For each line of the text, the file and line that it comes from; line 0 for the marks themselves."""
    origins, file, number = [], "kernel.cu", 0
    for line in text.splitlines():
        if mark := re.fullmatch(r'#line (\d+) "(.+)"', line):
            file, number = mark[2], int(mark[1]) - 1
            origins.append((file, 0))
        else:
            number += 1
            origins.append((file, number))
    return origins


def judge(subject: Subject, mutant: Mutant) -> Verdict:
    """Run the subject's checks on a mutant until one fails."""
    differs = False
    for check in sorted(subject.checks, key=_catches.__getitem__, reverse=True):
        try:
            if check.code and check.code(mutant.text) == check.code(subject.text):
                continue
            differs = True
            check.run(mutant.text)
        except CompileError:
            return Verdict(mutant, "does not compile")
        except Exception as error:
            _catches[check] += 1
            reason = " ".join(str(error).split())[:90]
            return Verdict(mutant, "caught", f"{type(error).__name__}: {reason}")
    if mutant.key in subject.redundant:
        return Verdict(mutant, "redundant", subject.redundant[mutant.key])
    return Verdict(mutant, "survived" if differs else "same code", mutant.line)


_catches: Counter[Check] = Counter()


def survey(subject: Subject, kinds: Iterable[str] = KINDS) -> list[Verdict]:
    """The verdict on every mutant, after a look at whether the checks pass the unbroken kernel."""
    for check in subject.checks:
        check.run(subject.text)
    return [judge(subject, mutant) for mutant in mutants(subject.text, kinds, subject.files)]


def complaints(subject: Subject, verdicts: Iterable[Verdict], kinds: Iterable[str] = KINDS) -> list[str]:
    """What is wrong with the checks, or with what the subject declares redundant among the kinds surveyed."""
    verdicts = list(verdicts)
    excused = {verdict.mutant.key for verdict in verdicts if verdict.outcome == "redundant"}
    unseen = mutants(subject.text, set(KINDS) - set(kinds), subject.files)
    excused |= {mutant.key for mutant in unseen}
    found = [f"survived: {v.mutant.place}: {v.mutant.key}" for v in verdicts if v.outcome == "survived"]
    return found + [f"declared redundant, but is not: {key}" for key in subject.redundant if key not in excused]


def _load(target: str) -> list[Subject]:
    module, _, function = target.partition(":")
    return list(getattr(importlib.import_module(module), function)())


def _judge_numbered(job: tuple[str, int, int, tuple[str, ...]]) -> Verdict:
    """For another process, which cannot be sent a check and so loads the subjects itself."""
    target, subject_number, mutant_number, kinds = job
    if target not in _loaded:
        _loaded[target] = [(s, list(mutants(s.text, kinds, s.files))) for s in _load(target)]
    subject, broken = _loaded[target][subject_number]
    return judge(subject, broken[mutant_number])


_loaded: dict[str, list[tuple[Subject, list[Mutant]]]] = {}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m host.mutants", description=__doc__.splitlines()[0])
    parser.add_argument("target", help="module:function that returns the subjects")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="the subjects to break; all of them when not given")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="what to break")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--survivors-only", action="store_true", help="do not print the mutants that were caught")
    options = parser.parse_args(arguments)
    kinds, wrong = tuple(options.kinds), []
    subjects = _load(options.target)
    names = [subject.name for subject in subjects]
    if strangers := sorted(set(options.only or ()) - set(names)):
        parser.error(f"there is no subject {', '.join(strangers)}; there are {', '.join(names)}")
    with ProcessPoolExecutor(options.processes, get_context("spawn")) as pool:
        for place, subject in enumerate(subjects):
            if subject.name not in (options.only or names):
                continue
            start = time.monotonic()
            for check in subject.checks:
                check.run(subject.text)
            count = sum(1 for _ in mutants(subject.text, kinds, subject.files))
            verdicts = []
            for verdict in pool.map(_judge_numbered, ((options.target, place, i, kinds) for i in range(count))):
                verdicts.append(verdict)
                if verdict.outcome == "survived" or not options.survivors_only:
                    print(verdict, flush=True)
            outcomes = Counter(verdict.outcome for verdict in verdicts)
            became = ", ".join(f"{number} {outcome}" for outcome, number in sorted(outcomes.items())) or "none"
            print(f"{subject.name}: {count} mutants: {became}; {time.monotonic() - start:.0f} s", flush=True)
            wrong += [f"{subject.name}: {complaint}" for complaint in complaints(subject, verdicts, kinds)]
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
