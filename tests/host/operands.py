"""What PTX's instructions work on, as C++ expressions: registers, constants, special registers, addresses.

A register is a C++ variable that holds raw bits.  An integer is viewed as a type by a cast and stored by an
assignment, which compiles faster than the templates as<T>() and put() that floating-point numbers need.
"""

import re

from .ptx import Entry, Instruction, UnsupportedPtxError

REGISTERS = {"pred": "bool"} | dict.fromkeys(("b8", "u8", "s8", "b16", "u16", "s16", "f16", "bf16"), "u16")

SPECIAL = {
    f"%{ptx}.{axis}": f"machine::view.{name}.{axis}"
    for ptx, name in (("tid", "thread"), ("ntid", "block_size"), ("ctaid", "block"), ("nctaid", "grid_size"))
    for axis in "xyz"
} | {
    "%laneid": "machine::view.lane",
    "%warpid": "machine::view.warp",
    "%cluster_ctarank": "machine::view.cluster_rank",
    "%cluster_nctarank": "machine::view.cluster_size",
    "%cluster_ctaid.x": "machine::view.cluster_rank",
    "%cluster_nctaid.x": "machine::view.cluster_size",
    "%lanemask_lt": "((1u << machine::view.lane) - 1)",
    "%lanemask_le": "((2u << machine::view.lane) - 1)",
    "%lanemask_gt": "~((2u << machine::view.lane) - 1)",
    "%lanemask_ge": "~((1u << machine::view.lane) - 1)",
    "%lanemask_eq": "(1u << machine::view.lane)",
    "%clock": "0u",
    "%clock64": "0ull",
    "%globaltimer": "0ull",
    "WARP_SZ": "32u",
}  # fmt: skip


def unsigned(type_name: str) -> str:
    """The type that an untyped one (.b32) is computed with."""
    return "u" + type_name[1:] if type_name.startswith("b") and type_name != "bf16" else type_name


def parts_of(operand: str) -> list[str]:
    """The registers of a vector operand {a, b}, or the one register."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


class Operands:
    """The operands of one kernel.

    Attributes
    ----------
    entry : Entry
        The kernel.
    addresses : dict
        Of its variables, as C++ expressions.
    granule : int
        The finest grain at which it touches shared memory, in bytes.
    used : set
        The registers that were spoken of.
    """

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.addresses: dict[str, str] = {}
        self.granule = 16
        self.used: set[str] = set()

    @staticmethod
    def identifier(name: str) -> str:
        return "v_" + name.lstrip("%").replace("$", "_")

    def label(self, name: str) -> str:
        return "label_" + name.replace("$", "_")

    def raw(self, operand: str) -> str:
        """The bits of a register, constant or address."""
        if operand.startswith("!"):
            return f"!{self.raw(operand[1:])}"
        if operand in SPECIAL:
            return SPECIAL[operand]
        if operand in self.entry.registers:
            self.used.add(operand)
            return self.identifier(operand)
        if match := re.fullmatch(r"0[fF]([0-9A-Fa-f]{8})", operand):
            return f"0x{match[1]}u"
        if match := re.fullmatch(r"0[dD]([0-9A-Fa-f]{16})", operand):
            return f"0x{match[1]}ull"
        if match := re.fullmatch(r"(-?(?:0x[0-9a-fA-F]+|\d+))U?", operand):
            return f"({match[1]}ll)" if operand.startswith("-") else f"{match[1]}ull"
        name, _, offset = operand.partition("+")
        if name in self.addresses:
            return f"({self.addresses[name]} + {int(offset)}u)" if offset else self.addresses[name]
        raise UnsupportedPtxError(f"operand {operand}")

    def value(self, operand: str, type_name: str) -> str:
        """An operand viewed as a type: for an integer or predicate a cast, which compiles faster than a template."""
        return (
            f"{type_name}({self.raw(operand)})"
            if type_name[0] in "usbp" and type_name != "bf16"
            else f"as<{type_name}>({self.raw(operand)})"
        )

    def assign(self, register: str, value: str, type_name: str = "b64") -> str:
        """The statement that stores a value of the type in a register."""
        if type_name[0] in "usbp" and type_name != "bf16":
            return f"{self.raw(register)} = {value};"
        return f"put({self.raw(register)}, {value});"

    def address(self, operand: str) -> str:
        match = re.fullmatch(r"\[\s*([^+\]\s]+)\s*(?:\+\s*(-?\d+))?\s*\]", operand)
        if not match:
            raise UnsupportedPtxError(f"address {operand}")
        base = f"u64({self.raw(match[1])})"
        return f"{base} + u64({match[2]}ll)" if match[2] else base

    @staticmethod
    def allow(instruction: Instruction, *allowed: set[str], types: int = 1) -> set[str]:
        """The modifiers, after a look at whether each is among those allowed."""
        modifiers = set(instruction.opcode[1 : len(instruction.opcode) - types])
        if unknown := modifiers - set().union(*allowed):
            raise UnsupportedPtxError(f"modifier {', '.join(sorted(unknown))}")
        return modifiers
