"""Branches, barriers, fences and warp operations: each method returns the C++ statement of one instruction."""

from .memory import SCOPES
from .operands import Operands
from .ptx import Entry, Instruction, UnsupportedPtxError


class Control(Operands):
    """Everything that decides who runs what, and when."""

    def __init__(self, entry: Entry) -> None:
        super().__init__(entry)
        self.labels_seen: set[str] = set()

    def op_bra(self, instruction: Instruction) -> str:
        return self.jump(instruction.operands[0], instruction.site)

    def jump(self, target: str, site: int) -> str:
        return (f"step({site}); " if target in self.labels_seen else "") + f"goto {self.label(target)};"

    def op_brx(self, instruction: Instruction) -> str:
        index, table = instruction.operands
        cases = "".join(
            f"case {i}: {self.jump(t, instruction.site)} " for i, t in enumerate(self.entry.tables[table].targets)
        )
        return f"switch ({self.raw(index)}) {{ {cases}}}"

    def op_ret(self, instruction: Instruction) -> str:
        return "return;"

    op_exit = op_ret

    def op_trap(self, instruction: Instruction) -> str:
        return f'machine::fault({instruction.site}, "trap");'

    def op_call(self, instruction: Instruction) -> str:
        raise UnsupportedPtxError("device functions must be inlined")

    def op_nanosleep(self, instruction: Instruction) -> str:
        return f"machine::let_others_run({instruction.site});"

    def op_bar(self, instruction: Instruction) -> str:
        modifiers, operands, site = set(instruction.opcode[1:]), instruction.operands, instruction.site
        if "cluster" in modifiers:
            if "arrive" in modifiers:
                return f"machine::cluster_arrive({str('relaxed' in modifiers).lower()}, {site});"
            return f"machine::cluster_wait({site});"
        if "warp" in modifiers:
            return f"machine::warp(machine::WarpOperation::sync, u32({self.raw(operands[0])}), 0, 0, 0, {site});"
        if modifiers <= {"sync", "cta", "aligned"} and operands == ("0",):
            return f"machine::block_barrier(machine::BlockOperation::sync, false, {site});"
        if "red" in modifiers and operands[1] == "0" and len(operands) == 3:
            operation = {"popc": "count", "and": "all", "or": "any"}[next(iter(modifiers & {"popc", "and", "or"}))]
            vote = f"machine::block_barrier(machine::BlockOperation::{operation}, {self.raw(operands[2])}, {site})"
            return self.assign(operands[0], vote)
        raise UnsupportedPtxError("a barrier other than that of the whole block")

    op_barrier = op_bar

    def warp(
        self, to: str, operation: str, mask: str, value: str, site: int, argument: str = "0", segment: str = "0"
    ) -> str:
        operands = f"u32({self.raw(mask)}), {value}, {argument}, {segment}, {site}"
        call = f"machine::warp(machine::WarpOperation::{operation}, {operands})"
        return self.assign(to, f"{'bool' if self.entry.registers[to] == 'pred' else 'u32'}({call})")

    def op_shfl(self, instruction: Instruction) -> str:
        kinds = {"bfly": "shuffle_xor", "up": "shuffle_up", "down": "shuffle_down", "idx": "shuffle_index"}
        to, value, lane, control, mask = instruction.operands
        to, _, in_range = to.partition("|")
        control = f"(u32({self.raw(control)}) >> 8 & 31)"
        line = self.warp(
            to,
            kinds[instruction.opcode[2]],
            mask,
            self.value(value, "u32"),
            instruction.site,
            f"u32({self.raw(lane)})",
            control,
        )
        return line + (self.assign(in_range, "machine::source_in_range()") if in_range else "")

    def op_vote(self, instruction: Instruction) -> str:
        to, value, mask = instruction.operands
        return self.warp(to, instruction.opcode[2], mask, self.raw(value), instruction.site)

    def op_match(self, instruction: Instruction) -> str:
        if instruction.opcode[1] != "any":
            raise UnsupportedPtxError
        to, value, mask = instruction.operands
        return self.warp(to, "match_any", mask, self.raw(value), instruction.site)

    def op_redux(self, instruction: Instruction) -> str:
        _, _, operation, kind = instruction.opcode
        names = {"and": "bit_and", "or": "bit_or", "xor": "bit_xor"}
        name = names.get(operation, f"u{operation}" if kind == "u32" and operation != "add" else operation)
        to, value, mask = instruction.operands
        return self.warp(to, name, mask, self.value(value, "u32"), instruction.site)

    def op_activemask(self, instruction: Instruction) -> str:
        return self.assign(instruction.operands[0], "machine::active_lanes()")

    def op_membar(self, instruction: Instruction) -> str:
        modifiers = set(instruction.opcode[1:])
        if modifiers - {"sc", "acq_rel", "gl", *SCOPES}:
            raise UnsupportedPtxError
        return "" if "cta" in modifiers else "machine::fence();"

    op_fence = op_membar
