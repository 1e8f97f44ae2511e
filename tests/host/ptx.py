"""Reads PTX, the assembly that NVRTC makes: text to a `Program` of instructions, with their source lines.

Only what NVRTC emits for a kernel without device-function calls is understood; anything else raises
`UnsupportedPtxError`, so that nothing is ever executed as something it is not.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath


class UnsupportedPtxError(NotImplementedError):
    """The kernel uses an instruction that the host executor does not know yet."""


@dataclass(frozen=True)
class Parameter:
    name: str
    type: str
    count: int  # of bytes when it is a struct (.b8 name[count]), else 0

    @property
    def size(self) -> int:
        return self.count or size_of(self.type)


@dataclass(frozen=True)
class Variable:
    """A declaration outside of registers: in shared, local, global or constant memory."""

    space: str
    align: int
    type: str
    name: str
    count: int
    initial: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return self.count * size_of(self.type)


@dataclass(frozen=True)
class Instruction:
    opcode: tuple[str, ...]  # ld, global, v4, f32
    operands: tuple[str, ...]
    guard: str  # "", "%p1" or "!%p1"
    site: int  # which line of the source: an index into Entry.sites

    def __str__(self) -> str:
        return f"{'.'.join(self.opcode)} {', '.join(self.operands)}"


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class BranchTable:
    name: str
    targets: tuple[str, ...]


@dataclass
class Entry:
    """One kernel."""

    name: str
    parameters: tuple[Parameter, ...]
    max_threads: int | None  # __launch_bounds__
    cluster: tuple[int, ...] | None  # __cluster_dims__
    registers: dict[str, str] = field(default_factory=dict)  # name, type
    variables: list[Variable] = field(default_factory=list)  # shared and local ones
    body: list[Instruction | Label] = field(default_factory=list)
    tables: dict[str, BranchTable] = field(default_factory=dict)
    sites: list[str] = field(default_factory=lambda: [""])  # "moments.cu(26)"


@dataclass(frozen=True)
class Program:
    """One kernel and what its module declares."""

    entry: Entry
    variables: tuple[Variable, ...]  # of the module: __device__ and __constant__
    dynamic: dict[str, int]  # extern __shared__ arrays and their alignments


def size_of(type_name: str) -> int:
    """Bytes of a PTX type: 4 for f32, 1 for pred."""
    digits = re.sub(r"x2$", "", type_name).lstrip("abcdefghijklmnopqrstuvwxyz")
    return max(1, int(digits or 8) // 8) * (2 if type_name.endswith("x2") else 1)


PARAMETER = re.compile(
    r"\.param(?:\s+\.align\s+\d+)?\s+\.(\w+)(?:\s+\.ptr(?:\s+\.(?:global|const|shared|local))?(?:\s+\.align\s+\d+)?)?"
    r"\s+([\w$]+)(?:\[(\d+)\])?"
)
VARIABLE = re.compile(
    r"\.(shared|local|global|const)(?:\s+\.attribute\S*)?\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(?:\[(\d+)\])?(?:\s*=\s*(.*))?"
)
EXTERN = re.compile(r"\.extern\s+\.shared\s+\.align\s+(\d+)\s+\.\w+\s+([\w$]+)(?:\[\])?\s*;")
MODULE_VARIABLE = re.compile(r"^(?:\.visible |\.weak |\.common )?(\.(?:global|const)\s[^;]*);", re.MULTILINE)
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*)\{")


def parse(ptx: str, name: str) -> Program:
    """The kernel `name` of a PTX text."""
    files = {number: PurePosixPath(path).name for number, path in re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', ptx)}
    ptx = re.sub(r"//[^\n]*", "", ptx)
    variables = tuple(_variable(match[1]) for match in MODULE_VARIABLE.finditer(ptx))
    dynamic = {match[2]: int(match[1]) for match in EXTERN.finditer(ptx)}
    entries = {match[1]: match for match in ENTRY.finditer(ptx)}
    if name not in entries:
        raise UnsupportedPtxError(f"the PTX has no entry point {name!r}, but {sorted(entries)}")
    return Program(_entry(entries[name], _braced(ptx, entries[name].end()), files), variables, dynamic)


def _variable(text: str) -> Variable:
    match = VARIABLE.fullmatch(" ".join(text.split()))
    if not match:
        raise UnsupportedPtxError(text)
    space, align, type_name, name, count, initial = match.groups()
    values = tuple(value.strip() for value in initial.strip("{} ").split(",")) if initial else ()
    return Variable(space, int(align), type_name, name, int(count or 1), values)


def _braced(text: str, start: int) -> str:
    """The text from `start` up to the brace that closes the one before it."""
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[start : match.start()]
    raise UnsupportedPtxError("unbalanced braces")


def _entry(match: re.Match, body: str, files: dict[str, str]) -> Entry:
    name, parameters, directives = match.groups()

    def numbers(directive: str) -> tuple[int, ...] | None:
        found = re.search(rf"\.{directive}\s+([\d, ]+)", directives)
        return tuple(int(number) for number in found[1].split(",")) if found else None

    limit = numbers("maxntid") or numbers("reqntid")
    threads = 1
    for extent in limit or ():
        threads *= extent
    entry = Entry(
        name,
        tuple(Parameter(m[2], m[1], int(m[3] or 0)) for m in PARAMETER.finditer(parameters)),
        threads if limit else None,
        numbers("reqnctapercluster"),
    )
    _Body(entry, body, files).read()
    return entry


class _Body:
    """Reads the statements between a kernel's braces."""

    STATEMENT = re.compile(r"\s*(?:([$\w]+):(?!:)|([{}])|(\.loc\b[^\n;]*)\n|([^;]*);)")

    def __init__(self, entry: Entry, text: str, files: dict[str, str]) -> None:
        self.entry, self.text, self.files = entry, text, files
        self.scopes: list[dict[str, str]] = [{}]  # inline assembly declares registers of its own in braces
        self.site = 0
        self.renamed = 0

    def statements(self) -> Iterator[re.Match]:
        position, end = 0, len(self.text.rstrip())
        while position < end:
            match = self.STATEMENT.match(self.text, position)
            if not match:
                raise UnsupportedPtxError(self.text[position : position + 80])
            yield match
            position = match.end()

    def read(self) -> None:
        pending_table = None
        for match in self.statements():
            label, brace, location, text = match.groups()
            if label:
                pending_table = label
                self.entry.body.append(Label(label))
            elif brace == "{":
                self.scopes.append(dict(self.scopes[-1]))
            elif brace == "}":
                self.scopes.pop()
            elif location:
                self.locate(location)
            else:
                text = " ".join(text.split())
                if text.startswith(".branchtargets"):
                    targets = tuple(target.strip() for target in text.removeprefix(".branchtargets").split(","))
                    self.entry.body.pop()
                    self.entry.tables[pending_table] = BranchTable(pending_table, targets)
                elif text.startswith("."):
                    self.declare(text)
                elif text:
                    self.entry.body.append(self.instruction(text))

    def locate(self, text: str) -> None:
        """.loc file line column [, function_name label, inlined_at file line column]"""
        match = re.match(r"\.loc\s+(\d+)\s+(\d+)", text)
        site = f"{self.files.get(match[1], '?')}({match[2]})"
        if inlined := re.search(r"inlined_at\s+(\d+)\s+(\d+)", text):
            site += f", called from {self.files.get(inlined[1], '?')}({inlined[2]})"
        if site not in self.entry.sites:
            self.entry.sites.append(site)
        self.site = self.entry.sites.index(site)

    def declare(self, text: str) -> None:
        if text.startswith(".pragma"):
            return
        if match := re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text):
            for name in (part.strip() for part in match[2].split(",")):
                self.declare_register(match[1], name)
        elif text.startswith(".param"):
            raise UnsupportedPtxError("a call: device functions must be inlined")
        elif text.startswith((".shared", ".local")):
            self.entry.variables.append(_variable(text))
        else:
            raise UnsupportedPtxError(text)

    def declare_register(self, type_name: str, name: str) -> None:
        if many := re.fullmatch(r"(%\w+)<(\d+)>", name):
            for number in range(int(many[2])):
                self.entry.registers[f"{many[1]}{number}"] = type_name
        elif len(self.scopes) > 1:
            self.renamed += 1
            unique = f"%{name.lstrip('%')}_{self.renamed}"
            self.scopes[-1][name] = unique
            self.entry.registers[unique] = type_name
        else:
            self.entry.registers[name] = type_name

    def instruction(self, text: str) -> Instruction:
        guard = ""
        if match := re.match(r"@(!?\s*[%\w]+)\s+(.*)", text):
            guard, text = self.rename(match[1].replace(" ", "")), match[2]
        opcode, _, rest = text.partition(" ")
        operands = tuple(
            self.rename(operand.strip())
            for operand in re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)
            if operand.strip()
        )
        return Instruction(tuple(opcode.split(".")), operands, guard, self.site)

    def rename(self, operand: str) -> str:
        scope = self.scopes[-1]
        if not scope:
            return operand
        return re.sub(r"%?[A-Za-z_$][\w$]*", lambda match: scope.get(match[0], match[0]), operand)
