"""Instructions on memory: each method returns the C++ statement of one instruction."""

import re

from .operands import Operands, parts_of, unsigned
from .ptx import Instruction, UnsupportedPtxError, size_of

CACHE_HINTS = {"ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc", "weak"}
SCOPES = {"cta", "cluster", "gpu", "sys"}
ORDERS = {"volatile", "relaxed", "acquire", "release", "acq_rel", "mmio"}
ATOMICS = {"add": "add", "exch": "exch", "cas": "cas", "min": "min", "max": "max", "inc": "inc", "dec": "dec"} | {
    name: f"{name}_" for name in ("and", "or", "xor")
}


class Memory(Operands):
    """Loads, stores, atomic operations, asynchronous copies, and addresses between spaces."""

    def space(self, modifiers: set[str], element: int) -> str:
        if any(modifier.startswith("shared") for modifier in modifiers):
            self.granule = min(self.granule, element)
            return "Space::shared"
        for space in ("global", "local"):
            if space in modifiers:
                return f"Space::{space}"
        if "const" not in modifiers:  # a generic address may be one of shared memory
            self.granule = min(self.granule, element)
        return "Space::generic"

    def memory_modifiers(self, instruction: Instruction) -> set[str]:
        modifiers = {m for m in instruction.opcode[1:-1] if not m.startswith(("L1::", "L2::"))}
        known = CACHE_HINTS | SCOPES | ORDERS | {"global", "local", "const", "param", "v2", "v4", "v8"}
        known |= {"shared", "shared::cta", "shared::cluster"}
        if unknown := modifiers - known:
            raise UnsupportedPtxError(f"modifier {', '.join(sorted(unknown))}")
        return modifiers

    def op_ld(self, instruction: Instruction) -> str:
        kind, modifiers = instruction.opcode[-1], self.memory_modifiers(instruction)
        to, source = instruction.operands
        if "param" in modifiers:
            return self.load_parameter(kind, parts_of(to), source)
        access = "atomic_read" if modifiers & ORDERS else "read"
        space = self.space(modifiers, size_of(kind))
        registers = ", ".join(self.raw(register) for register in parts_of(to))
        return f"load<{kind}, {space}, Access::{access}>({self.address(source)}, {instruction.site}, {registers});"

    op_ldu = op_ld

    def load_parameter(self, kind: str, registers: list[str], source: str) -> str:
        match = re.fullmatch(r"\[([\w$]+)(?:\+(\d+))?\]", source)
        number = [parameter.name for parameter in self.entry.parameters].index(match[1])
        loads = []
        for i, register in enumerate(registers):
            where = f"static_cast<char *>(parameters[{number}]) + {int(match[2] or 0) + i * size_of(kind)}"
            store = self.assign(register, "bits")  # through a signed type, a small one fills the register with its sign
            bits = kind if kind[0] == "s" else f"u{8 * size_of(kind)}"
            loads.append(f"{{ {bits} bits; memcpy(&bits, {where}, sizeof bits); {store} }}")
        return " ".join(loads)

    def op_st(self, instruction: Instruction) -> str:
        kind, modifiers = instruction.opcode[-1], self.memory_modifiers(instruction)
        to, source = instruction.operands
        access = "atomic_write" if modifiers & ORDERS else "write"
        space = self.space(modifiers, size_of(kind))
        registers = ", ".join(self.raw(register) for register in parts_of(source))
        fence = "machine::fence(); " if "release" in modifiers else ""
        return f"{fence}store<{kind}, {space}, Access::{access}>({self.address(to)}, {instruction.site}, {registers});"

    def op_atom(self, instruction: Instruction) -> str:
        kind = unsigned(instruction.opcode[-1])
        modifiers = self.allow(
            instruction, set(ATOMICS), SCOPES, ORDERS, {"global", "shared", "shared::cta", "shared::cluster"}
        )
        operation = next(iter(modifiers & set(ATOMICS)))
        if kind not in ("u32", "s32", "u64", "s64", "f32", "f64"):
            raise UnsupportedPtxError
        to, source, *operands = (
            instruction.operands if instruction.opcode[0] == "atom" else ("_", *instruction.operands)
        )
        space = self.space(modifiers, size_of(kind))
        values = ", ".join(self.value(operand, kind) for operand in operands)
        address = self.address(source)
        call = f"atomic<{kind}, {space}, Atomic::{ATOMICS[operation]}>({address}, {instruction.site}, {values})"
        fence = "machine::fence(); " if modifiers & {"release", "acq_rel"} else ""
        return f"{fence}{call};" if to == "_" else fence + self.assign(to, call, kind)

    op_red = op_atom

    def op_cp(self, instruction: Instruction) -> str:
        if instruction.opcode[1] != "async":
            raise UnsupportedPtxError
        modifiers = {m for m in instruction.opcode[2:] if not m.startswith("L2::")}
        operands = instruction.operands
        if "commit_group" in modifiers:
            return "machine::copy_commit();"
        if "wait_group" in modifiers:
            return f"machine::copy_wait({self.raw(operands[0])}, {instruction.site});"
        if "wait_all" in modifiers:
            return f"machine::copy_commit(); machine::copy_wait(0, {instruction.site});"
        if modifiers - {"ca", "cg", "shared", "shared::cta", "global"}:
            raise UnsupportedPtxError
        self.granule = min(self.granule, 4)
        size = self.raw(operands[2])
        source_size = self.raw(operands[3]) if len(operands) > 3 else size
        to = f"at<Space::shared>({self.address(operands[0])}, {instruction.site})"
        source = f"at<Space::global>({self.address(operands[1])}, {instruction.site})"
        return f"machine::copy_async({to}, {source}, u32({size}), u32({source_size}), {instruction.site});"

    def op_prefetch(self, instruction: Instruction) -> str:
        return ""
