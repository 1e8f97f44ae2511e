"""PTX to C++: one function that runs one CUDA thread of a kernel, instruction by instruction.

The instructions themselves are C++ templates in machine/arithmetic.h and machine/memory.h; arithmetic.py, memory.py
and control.py choose among them.  A modifier that is not listed for its instruction raises `UnsupportedPtxError`.
"""

import json
import re
from collections.abc import Callable

from .arithmetic import ARITHMETIC, Arithmetic
from .control import Control
from .memory import Memory
from .operands import REGISTERS
from .ptx import Instruction, Label, Program, UnsupportedPtxError, Variable, size_of

RED_ZONE = 64  # bytes that belong to nobody behind every shared variable
FIRST_SHARED = 1024  # so that an index a little below zero meets nobody's bytes either
MOST_SHARED = 227 << 10  # what a block can have on the largest device, sm_90


def translate(program: Program) -> str:
    """The C++ of a kernel, with a description of how to launch it as JSON inside."""
    return _Translator(program).result()


class _Translator(Arithmetic, Memory, Control):
    def __init__(self, program: Program) -> None:
        super().__init__(program.entry)
        self.program = program
        self.shared: list[tuple[int, int]] = []  # (offset, size)
        self.module_variables = [v for v in program.variables if self.mentions(v.name)]
        self.declarations: list[str] = []
        self.dynamic_offset = self.place_variables()

    def mentions(self, name: str) -> bool:
        word = re.compile(rf"(?<![\w$]){re.escape(name)}(?![\w$])")
        return any(
            word.search(operand)
            for item in self.entry.body
            if isinstance(item, Instruction)
            for operand in item.operands
        )

    def place_variables(self) -> int:
        """Shared variables get offsets, others C++ arrays.  Returns the offset of dynamic shared memory.

        An address is a multiple of the alignment that the kernel declares but of no higher power of two, so that
        a vector access to something declared without enough alignment is seen.
        """

        def place(top: int, align: int) -> int:
            return (top + 2 * align - 1) // (2 * align) * (2 * align) + align

        top = FIRST_SHARED
        for variable in self.entry.variables:
            if variable.space == "shared":
                offset = place(top, variable.align)
                self.addresses[variable.name] = f"{offset}u"
                self.shared.append((offset, variable.size))
                top = offset + variable.size + RED_ZONE
            else:
                identifier = self.identifier(variable.name)
                self.declarations.append(f"alignas({variable.align}) char {identifier}[{variable.size}];")
                self.addresses[variable.name] = f"reinterpret_cast<u64>({identifier})"
        for variable in self.module_variables:
            self.addresses[variable.name] = f"reinterpret_cast<u64>({self.identifier(variable.name)})"
        align = max(self.program.dynamic.values(), default=16)
        dynamic = place(top, align)
        for name in self.program.dynamic:
            self.addresses[name] = f"{dynamic}u"
        return dynamic

    def result(self) -> str:
        lines = [self.item(item) for item in self.entry.body]
        registers: dict[str, list[str]] = {}
        for name in sorted(self.used):
            type_name = self.entry.registers[name]
            wide = REGISTERS.get(type_name) or ("u64" if type_name.endswith("64") else "u32")
            registers.setdefault(wide, []).append(self.identifier(name))
        declared = [f"{kind} {', '.join(names)};" for kind, names in sorted(registers.items())]
        sites = ", ".join(json.dumps(site) for site in self.entry.sites)
        description = json.dumps(
            {
                "parameters": [(p.type, p.size, bool(p.count)) for p in self.entry.parameters],
                "max_threads": self.entry.max_threads,
                "cluster": self.entry.cluster,
                "shared": self.shared,
                "dynamic_offset": self.dynamic_offset,
                "granule": self.granule,
                "variables": [(self.identifier(v.name), v.size, v.name) for v in self.module_variables],
            }
        )
        code = [
            '#include "memory.h"',
            'extern "C" {',
            *(self.module_variable(variable) for variable in self.module_variables),
            f"const char *kernel_sites[] = {{{sites}}};",
            f"extern const char kernel_description[] = {json.dumps(description)};",
            "void kernel_run([[maybe_unused]] void **parameters)",
            "{",
            *declared,
            *self.declarations,
            *lines,
            "}",
            "}",
        ]
        return "\n".join(code) + "\n"

    def module_variable(self, variable: Variable) -> str:
        unit = f"u{8 * size_of(variable.type)}"
        values = ", ".join(self.raw(value) for value in variable.initial)
        name = self.identifier(variable.name)
        return f"alignas({max(variable.align, 16)}) {unit} {name}[{variable.count}] = {{{values}}};"

    def item(self, item: Instruction | Label) -> str:
        if isinstance(item, Label):
            self.labels_seen.add(item.name)
            return f"{self.label(item.name)}:;"
        try:
            statement = self.statement(item)
        except UnsupportedPtxError as error:
            where = self.entry.sites[item.site]
            raise UnsupportedPtxError(f"{item} at {where}: {error}" if str(error) else f"{item} at {where}") from None
        guard = f"if ({self.raw(item.guard)}) " if item.guard else ""
        return f"    {guard}{{ {statement} }}"

    def statement(self, instruction: Instruction) -> str:
        base = instruction.opcode[0]
        if base in ARITHMETIC and instruction.opcode[1:2] not in (("lo",), ("hi",), ("wide",)):
            return self.arithmetic(instruction)
        handler: Callable[[Instruction], str] | None = getattr(self, f"op_{base}", None)
        if handler is None:
            raise UnsupportedPtxError
        return handler(instruction)
