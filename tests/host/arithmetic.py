"""Instructions on registers: each method returns the C++ statement of one instruction."""

from .operands import Operands, parts_of, unsigned
from .ptx import Instruction, UnsupportedPtxError, size_of

FLOAT = {"rn", "ftz", "sat"}
APPROXIMATE = {"approx", "ftz", "rn", "full"}
ARITHMETIC: dict[str, tuple[str, set[str]]] = {  # instruction: function, the modifiers it may have
    "add": ("add", FLOAT), "sub": ("sub", FLOAT), "mul": ("mul", FLOAT), "fma": ("fma_", FLOAT), "mad": ("fma_", FLOAT),
    "div": ("div", APPROXIMATE), "rem": ("rem", set()), "neg": ("neg", {"ftz"}), "abs": ("abs_", {"ftz"}),
    "min": ("min_", {"ftz"}), "max": ("max_", {"ftz"}), "copysign": ("copysign_", set()),
    "rcp": ("rcp", APPROXIMATE), "sqrt": ("sqrt_", APPROXIMATE), "rsqrt": ("rsqrt_", APPROXIMATE),
    "ex2": ("ex2", APPROXIMATE), "lg2": ("lg2", APPROXIMATE), "sin": ("sin_", APPROXIMATE),
    "cos": ("cos_", APPROXIMATE), "tanh": ("tanh_", APPROXIMATE),
    "and": ("and_", set()), "or": ("or_", set()), "xor": ("xor_", set()), "not": ("not_", set()),
    "popc": ("popc", set()), "clz": ("clz", set()), "brev": ("brev", set()),
}  # fmt: skip
OPERATORS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"}
UNSIGNED_COMPARISONS = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
ROUNDS = {"rni": "nearest", "rmi": "down", "rpi": "up", "rzi": "zero"}


class Arithmetic(Operands):
    """Arithmetic, comparisons, conversions, bits and moves."""

    def arithmetic(self, instruction: Instruction) -> str:
        base, kind = instruction.opcode[0], instruction.opcode[-1]
        function, allowed = ARITHMETIC[base]
        nan = {"NaN"} if base in ("min", "max") else set()
        modifiers = self.allow(instruction, allowed, nan)
        if "NaN" in modifiers:
            function += "nan"
        to, *sources = instruction.operands
        if kind in ("f16x2", "bf16x2"):
            if modifiers - {"rn"}:
                raise UnsupportedPtxError
            half = kind[:-2]
            low, high = (
                f"u32({function}<{half}>({', '.join(f'as<{half}>({self.raw(s)} >> {shift})' for s in sources)}).bits)"
                for shift in (0, 16)
            )
            return self.assign(to, f"{low} | {high} << 16")
        kind = unsigned(kind)
        flush = "ftz" in modifiers
        if flush and kind not in ("f32", "f64"):
            raise UnsupportedPtxError("ftz of 16-bit numbers")
        values = [f"flush({self.value(s, kind)})" if flush else self.value(s, kind) for s in sources]
        result = f"{function}<{kind}>({', '.join(values)})"
        if "sat" in modifiers:
            result = f"saturate({result})"
        return self.assign(to, f"flush({result})" if flush else result, kind)

    def op_mul(self, instruction: Instruction) -> str:
        base, part, kind = instruction.opcode
        values = [self.value(operand, kind) for operand in instruction.operands[1:3]]
        if base == "mad":
            twice = f"{kind[0]}{2 * int(kind[1:])}"
            values.append(self.value(instruction.operands[3], twice if part == "wide" else kind))
        return self.assign(instruction.operands[0], f"{base}_{part}<{kind}>({', '.join(values)})")

    op_mad = op_mul

    def op_setp(self, instruction: Instruction) -> str:
        kind = unsigned(instruction.opcode[-1])
        comparison = instruction.opcode[1]
        modifiers = self.allow(instruction, {comparison, "ftz", "and", "or", "xor"})
        if comparison in UNSIGNED_COMPARISONS:
            comparison = UNSIGNED_COMPARISONS[comparison]
        elif comparison not in COMPARISONS:
            raise UnsupportedPtxError
        to, first, second, *more = instruction.operands
        values = [self.value(operand, kind) for operand in (first, second)]
        if "ftz" in modifiers:
            if kind != "f32":
                raise UnsupportedPtxError
            values = [f"flush({value})" for value in values]
        if kind[0] in "us" and comparison in OPERATORS:
            met = f" {OPERATORS[comparison]} ".join(values)
        else:
            met = f"{'nan_' if comparison == 'nan' else comparison}<{kind}>({', '.join(values)})"
        if "|" not in to and not more:
            return self.assign(to, met)
        lines = [f"const bool met = {met};"]
        yes, no = "met", "!met"
        if more:
            combine = {"and": "&", "or": "|", "xor": "^"}[next(iter(modifiers & {"and", "or", "xor"}))]
            lines.append(f"const bool other = {self.raw(more[0])};")
            yes, no = f"{yes} {combine} other", f"{no} {combine} other"
        target, _, complement = to.partition("|")
        lines += [self.assign(register, result) for register, result in ((target, yes), (complement, no)) if register]
        return " ".join(lines)

    def op_selp(self, instruction: Instruction) -> str:
        self.allow(instruction)
        to, yes, no, choice = instruction.operands
        return self.assign(to, f"{self.raw(choice)} ? {self.raw(yes)} : {self.raw(no)}")

    def op_cvt(self, instruction: Instruction) -> str:
        target, source = instruction.opcode[-2:]
        modifiers = self.allow(instruction, {"rn", "ftz", "sat"}, set(ROUNDS), types=2)
        to, *sources = instruction.operands
        if target in ("f16x2", "bf16x2"):
            if modifiers - {"rn"}:
                raise UnsupportedPtxError
            high, low = (f"u32(cvt<{target[:-2]}, Round::none>({self.value(s, 'f32')}).bits)" for s in sources)
            return self.assign(to, f"{high} << 16 | {low}")
        value = self.value(sources[0], source)
        integers = target[0] in "su" and source[0] in "su"
        if integers and "sat" in modifiers:
            return self.assign(to, f"clamp<{target}>({value})")
        if integers:
            return self.assign(to, f"{target}({value})")
        rounding = next((ROUNDS[mode] for mode in ROUNDS if mode in modifiers), "none")
        if target[0] in "su" and source[0] not in "su" and rounding == "none":
            raise UnsupportedPtxError("no rounding to an integer")
        if "ftz" in modifiers:
            value = f"flush({value})"
        result = f"cvt<{target}, Round::{rounding}>({value})"
        if "sat" in modifiers and target[0] not in "su":
            result = f"saturate({result})"
        if "ftz" in modifiers:
            result = f"flush({result})"
        return self.assign(to, result, target)

    def op_shl(self, instruction: Instruction) -> str:
        self.allow(instruction)
        base, kind = instruction.opcode[0], unsigned(instruction.opcode[-1])
        to, value, by = instruction.operands
        return self.assign(to, f"{base}<{kind}>({self.value(value, kind)}, u32({self.raw(by)}))")

    op_shr = op_shl

    def op_shf(self, instruction: Instruction) -> str:
        _, direction, mode, _ = instruction.opcode
        to, low, high, by = instruction.operands
        amount = f"u32({self.raw(by)}) & 31" if mode == "wrap" else f"min_<u32>(u32({self.raw(by)}), 32)"
        return self.assign(to, f"shf_{direction}({self.value(low, 'u32')}, {self.value(high, 'u32')}, {amount})")

    def op_bfi(self, instruction: Instruction) -> str:
        self.allow(instruction)
        base, kind = instruction.opcode[0], unsigned(instruction.opcode[-1])
        to, *sources = instruction.operands
        count = 2 if base == "bfi" else 1
        values = [self.value(source, kind) for source in sources[:count]]
        values += [f"u32({self.raw(source)})" for source in sources[count:]]
        return self.assign(to, f"{base}<{kind}>({', '.join(values)})")

    op_bfe = op_bfi

    def op_bfind(self, instruction: Instruction) -> str:
        amount = "shiftamt" in self.allow(instruction, {"shiftamt"})
        kind = instruction.opcode[-1]
        to, source = instruction.operands
        return self.assign(to, f"bfind<{kind}>({self.value(source, kind)}, {str(amount).lower()})")

    def op_lop3(self, instruction: Instruction) -> str:
        self.allow(instruction)
        to, *sources = instruction.operands
        return self.assign(to, f"{instruction.opcode[0]}({', '.join(self.value(s, 'u32') for s in sources)})")

    op_prmt = op_lop3

    def op_testp(self, instruction: Instruction) -> str:
        test = {"finite": "isfinite", "infinite": "isinf", "notanumber": "isnan", "normal": "isnormal"}
        function, kind = test.get(instruction.opcode[1]), instruction.opcode[-1]
        if not function:
            raise UnsupportedPtxError
        to, source = instruction.operands
        return self.assign(to, f"std::{function}({self.value(source, kind)})")

    def op_mov(self, instruction: Instruction) -> str:
        self.allow(instruction)
        to, source = instruction.operands
        bits = 8 * size_of(instruction.opcode[-1])
        if to.startswith("{"):
            parts = parts_of(to)
            each = bits // len(parts)
            return f"const u64 whole = {self.raw(source)}; " + " ".join(
                self.assign(part, f"u{each}(whole >> {each * i})") for i, part in enumerate(parts) if part != "_"
            )
        if source.startswith("{"):
            parts = parts_of(source)
            each = bits // len(parts)
            whole = " | ".join(f"u64(u{each}({self.raw(part)})) << {each * i}" for i, part in enumerate(parts))
            return self.assign(to, whole)
        return self.assign(to, self.raw(source))

    def op_cvta(self, instruction: Instruction) -> str:
        modifiers = self.allow(
            instruction, {"to", "global", "local", "const", "param", "shared", "shared::cta", "shared::cluster"}
        )
        to, source = instruction.operands
        value = f"u64({self.raw(source)})"
        if "shared::cluster" in modifiers and "to" in modifiers:
            value = f"machine::cluster_address({value}, {instruction.site})"
        elif modifiers & {"shared", "shared::cta"} and "to" in modifiers:
            value = f"generic_to_shared({value})"
        elif modifiers & {"shared", "shared::cta", "shared::cluster"}:
            value = f"shared_to_generic({value}, {instruction.site})"
        return self.assign(to, value)

    def op_mapa(self, instruction: Instruction) -> str:
        modifiers = self.allow(instruction, {"shared::cluster"})
        to, source, rank = instruction.operands
        value, rank = f"u64({self.raw(source)})", f"u32({self.raw(rank)})"
        if not modifiers:
            value = f"generic_to_shared({value})"
        mapped = f"map_shared({value}, {rank})"
        return self.assign(to, mapped if modifiers else f"shared_to_generic({mapped}, {instruction.site})")
