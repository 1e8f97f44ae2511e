"""Vectors for kernels: sixteen numbers at a time.

Numba leaves it to the compiler to find vectors in a loop; here they are written down, so that sums keep one
order, stores can bypass the cache and float16 and bfloat16 need no library.  A `Wide` is sixteen float64, a
`Single` sixteen float32, a `Mask` sixteen truth values.  They live in registers only: a kernel makes them with
`load` and `splat`, combines them with ``+ - *``, `fma` and `select`, and hands them back with `store` or `stream`.
Whatever the processor has (AVX-512, AVX2, NEON), LLVM splits sixteen lanes into as many registers as that takes.

Sums are taken in `Wide`, whatever the element type.  What is done to every element on its own is done in
the *own* arithmetic of an array, which is `Wide` for float64 and `Single` for all others: `load_own`, `own`.

An array's dtype says how its elements are stored.  The two half precisions have no NumPy-Numba type of their
own, so their bits travel as integers:

    float64, float32    themselves
    uint16              float16
    int16               bfloat16

Offsets (`at`) are in bytes from the array's first element.  Every operation is one IEEE 754 operation (`fma` is
two where the processor has no fused one): nothing is reassociated and NaN is never assumed away.
"""

# mypy: disable-error-code="untyped-decorator"
# Numba has no type hints, so its decorators hide those of what they decorate.

import operator
import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

LANES = 16

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_HALF, _FLOAT, _DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()
_X86 = platform.machine().lower() in ("x86_64", "amd64", "i386", "i686")


class WideType(types.Type):  # type: ignore[misc]  # numba has no type hints
    """Sixteen float64."""

    def __init__(self) -> None:
        super().__init__("Wide")


class SingleType(types.Type):  # type: ignore[misc]  # numba has no type hints
    """Sixteen float32."""

    def __init__(self) -> None:
        super().__init__("Single")


class MaskType(types.Type):  # type: ignore[misc]  # numba has no type hints
    """Sixteen truth values."""

    def __init__(self) -> None:
        super().__init__("Mask")


WIDE, SINGLE, MASK = WideType(), SingleType(), MaskType()


def _lanes(scalar: Any) -> Any:
    return ir.VectorType(scalar, LANES)


@register_model(WideType)
class _WideModel(models.PrimitiveModel):  # type: ignore[misc]  # numba has no type hints
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _lanes(_DOUBLE))


@register_model(SingleType)
class _SingleModel(models.PrimitiveModel):  # type: ignore[misc]  # numba has no type hints
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _lanes(_FLOAT))


@register_model(MaskType)
class _MaskModel(models.PrimitiveModel):  # type: ignore[misc]  # numba has no type hints
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _lanes(_I1))


def _operator(function: Any, kind: Any, instruction: str) -> None:
    """Give `kind` a binary operator that is one LLVM instruction."""

    @infer_global(function)
    class Operator(AbstractTemplate):  # type: ignore[misc]  # numba has no type hints
        def generic(self, args: Any, kws: Any) -> Any:
            return signature(kind, kind, kind) if args == (kind, kind) else None

    @lower_builtin(function, type(kind), type(kind))  # type: ignore[untyped-decorator]  # numba
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return getattr(builder, instruction)(*args)


for _kind in (WIDE, SINGLE):
    _operator(operator.add, _kind, "fadd")
    _operator(operator.sub, _kind, "fsub")
    _operator(operator.mul, _kind, "fmul")
    _operator(operator.truediv, _kind, "fdiv")
_operator(operator.and_, MASK, "and_")


def _constant(scalar: Any, value: Any) -> Any:
    return ir.Constant(_lanes(scalar), [value] * LANES)


def _splat(builder: Any, value: Any) -> Any:
    kind = _lanes(value.type)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), _constant(_I32, 0))


def _call(builder: Any, name: str, result: Any, args: Any) -> Any:
    kind = ir.FunctionType(result, [value.type for value in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), args)


@intrinsic
def apart(typing: Any) -> Any:
    """Compile the function that this stands in once, instead of into each of its callers: shorter waits."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.none(), lower


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """One number in all lanes."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _splat(builder, args[0])

    return WIDE(types.float64), lower


@intrinsic
def fma(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = args[0].type
        return _call(builder, f"llvm.fmuladd.{_code(kind.element)}", kind, args)

    return a(a, a, a), lower


@intrinsic
def root(typing: Any, values: Any) -> Any:
    """The square root of every lane."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(builder, "llvm.sqrt.v16f64", _lanes(_DOUBLE), args)

    return WIDE(WIDE), lower


@intrinsic
def total(typing: Any, values: Any) -> Any:
    """The sum over the lanes, by halves: one order on every processor."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        part, width = args[0], LANES
        while width > 1:
            width //= 2
            low, high = (
                builder.shuffle_vector(
                    part, part, ir.Constant(ir.VectorType(_I32, width), list(range(start, start + width)))
                )
                for start in (0, width)
            )
            part = builder.fadd(low, high)
        return builder.extract_element(part, ir.Constant(_I32, 0))

    return types.float64(WIDE), lower


@intrinsic
def magnitude(typing: Any, values: Any) -> Any:
    """The absolute value of every lane."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _call(builder, "llvm.fabs.v16f64", _lanes(_DOUBLE), args)

    return WIDE(WIDE), lower


@intrinsic
def power_of_two(typing: Any, values: Any) -> Any:
    """The largest power of two not above a positive number; 0 of 0 and infinity of NaN."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], _lanes(_I64))
        return builder.bitcast(builder.and_(bits, _constant(_I64, 0x7FF << 52)), _lanes(_DOUBLE))

    return WIDE(WIDE), lower


@intrinsic
def clip(typing: Any, values: Any, low: Any, high: Any) -> Any:
    """The nearest number between two others, `high` for NaN."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values, low, high = args
        values = builder.select(builder.fcmp_ordered("<", values, high), values, high)
        return builder.select(builder.fcmp_ordered(">", values, low), values, low)

    return WIDE(WIDE, WIDE, WIDE), lower


@intrinsic
def select(typing: Any, mask: Any, chosen: Any, otherwise: Any) -> Any:
    """`chosen` where the mask is true, `otherwise` elsewhere."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(*args)

    return chosen(MASK, chosen, chosen), lower


@intrinsic
def passes_relu(typing: Any, z: Any) -> Any:
    """Where z is above zero or NaN: ReLU must not hide NaN."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fcmp_unordered(">", args[0], ir.Constant(args[0].type, None))

    return MASK(z), lower


@intrinsic
def positive(typing: Any, z: Any) -> Any:
    """Where z is above zero, NaN not included."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.fcmp_ordered(">", args[0], _constant(_DOUBLE, 0.0))

    return MASK(WIDE), lower


@intrinsic
def first(typing: Any, count: Any) -> Any:
    """True in the first `count` lanes, all of them from sixteen up."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        numbers = ir.Constant(_lanes(_I64), list(range(LANES)))
        return builder.icmp_signed("<", numbers, _splat(builder, args[0]))

    return MASK(types.int64), lower


@intrinsic
def lanes_in(typing: Any, mask: Any) -> Any:
    """How many lanes are true."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = builder.bitcast(args[0], _I16)
        return builder.zext(builder.ctpop(bits), _I64)

    return types.int64(MASK), lower


@intrinsic
def ones_of(typing: Any, mask: Any) -> Any:
    """1.0 where the mask is true, 0.0 elsewhere."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.uitofp(args[0], _lanes(_DOUBLE))

    return WIDE(MASK), lower


# --- memory ---------------------------------------------------------------------------------------------


def _pointer(context: Any, builder: Any, array_type: Any, array: Any, at: Any, pointee: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    moved = builder.gep(builder.bitcast(data, _I8.as_pointer()), [at])
    return builder.bitcast(moved, pointee.as_pointer())


def _element(array_type: Any) -> Any:
    """What lies in memory, as LLVM sees it, for each of the four dtypes."""
    return {types.float64: _DOUBLE, types.float32: _FLOAT, types.uint16: _I16, types.int16: _I16}[array_type.dtype]


def has_half_instructions() -> bool:
    """True if the processor converts float16 itself; x86 before 2012 does not."""
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return not _X86 or "+f16c" in features


def _own(dtype: Any) -> Any:
    """The arithmetic for what is done to every element of such an array on its own."""
    return WIDE if dtype == types.float64 else SINGLE


def _convert(builder: Any, dtype: Any, stored: Any, kind: Any) -> Any:
    """From what lies in memory to a `Wide`, a `Single`, or the scalar of either."""
    vector = isinstance(stored.type, ir.VectorType)

    def shaped(scalar: Any) -> Any:
        return _lanes(scalar) if vector else scalar

    if dtype == types.float64:
        return stored
    if dtype == types.float32:
        single = stored
    elif dtype == types.int16:
        single = _bfloat16_to_float32(builder, stored, shaped)
    elif has_half_instructions():
        single = builder.fpext(builder.bitcast(stored, shaped(_HALF)), shaped(_FLOAT))
    else:
        single = _float16_to_float32(builder, stored, shaped)
    return single if kind is SINGLE else builder.fpext(single, shaped(_DOUBLE))


def _narrow(builder: Any, dtype: Any, values: Any) -> Any:
    """From a `Wide` or a `Single` to what lies in memory, to the nearest, ties to even."""
    double = values.type.element == _DOUBLE
    if dtype == types.float64:
        return values if double else builder.fpext(values, _lanes(_DOUBLE))
    single = builder.fptrunc(values, _lanes(_FLOAT)) if double else values
    if dtype == types.float32:
        return single
    if dtype == types.int16:
        return _float32_to_bfloat16(builder, single)
    if has_half_instructions():
        return builder.bitcast(builder.fptrunc(single, _lanes(_HALF)), _lanes(_I16))
    return _float32_to_float16(builder, single)


def _bfloat16_to_float32(builder: Any, bits: Any, shaped: Any) -> Any:
    """The sixteen bits are the upper half of a float32."""
    wide = builder.zext(bits, shaped(_I32))
    return builder.bitcast(builder.shl(wide, ir.Constant(shaped(_I32), _filled(shaped, 16))), shaped(_FLOAT))


def _float32_to_bfloat16(builder: Any, single: Any) -> Any:
    """Add just under half a unit, or just half one where the last bit is odd, and cut; NaN stays NaN."""
    bits = builder.bitcast(single, _lanes(_I32))
    sixteen = _constant(_I32, 16)
    odd = builder.and_(builder.lshr(bits, sixteen), _constant(_I32, 1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, _constant(_I32, 0x7FFF))), sixteen)
    quiet = builder.or_(builder.lshr(bits, sixteen), _constant(_I32, 0x40))
    is_nan = builder.fcmp_unordered("uno", single, single)
    return builder.trunc(builder.select(is_nan, quiet, rounded), _lanes(_I16))


def _float16_to_float32(builder: Any, bits: Any, shaped: Any) -> Any:
    """Exponent and fraction moved into place, then scaled by 2**112, which subnormals need as well."""

    def same(value: int) -> Any:
        return ir.Constant(shaped(_I32), _filled(shaped, value))

    wide = builder.zext(bits, shaped(_I32))
    magnitude = builder.shl(builder.and_(wide, same(0x7FFF)), same(13))
    scale = builder.bitcast(same((127 + 112) << 23), shaped(_FLOAT))
    scaled = builder.bitcast(builder.fmul(builder.bitcast(magnitude, shaped(_FLOAT)), scale), shaped(_I32))
    special = builder.icmp_unsigned(">=", magnitude, same(0x7C00 << 13))
    finished = builder.select(special, builder.or_(magnitude, same(0x7F800000)), scaled)
    sign = builder.shl(builder.and_(wide, same(0x8000)), same(16))
    return builder.bitcast(builder.or_(finished, sign), shaped(_FLOAT))


def _float32_to_float16(builder: Any, single: Any) -> Any:
    """Normal numbers round by an integer addition, subnormal ones by the float addition of a half."""

    def same(value: int) -> Any:
        return _constant(_I32, value)

    bits = builder.bitcast(single, _lanes(_I32))
    sign = builder.and_(bits, same(0x80000000))
    magnitude = builder.xor(bits, sign)

    odd = builder.and_(builder.lshr(magnitude, same(13)), same(1))
    rebiased = builder.add(builder.sub(magnitude, same(112 << 23)), builder.add(odd, same(0xFFF)))
    normal = builder.lshr(rebiased, same(13))

    half = same(((127 - 15) + (23 - 10) + 1) << 23)
    added = builder.fadd(builder.bitcast(magnitude, _lanes(_FLOAT)), builder.bitcast(half, _lanes(_FLOAT)))
    subnormal = builder.sub(builder.bitcast(added, _lanes(_I32)), half)

    is_nan = builder.icmp_unsigned(">", magnitude, same(0x7F800000))
    special = builder.select(is_nan, same(0x7E00), same(0x7C00))
    is_subnormal = builder.icmp_unsigned("<", magnitude, same(113 << 23))
    is_special = builder.icmp_unsigned(">=", magnitude, same((127 + 16) << 23))
    result = builder.select(is_special, special, builder.select(is_subnormal, subnormal, normal))
    return builder.trunc(builder.or_(result, builder.lshr(sign, same(16))), _lanes(_I16))


def _filled(shaped: Any, value: Any) -> Any:
    return [value] * LANES if isinstance(shaped(_I32), ir.VectorType) else value


def _code(element: Any) -> str:
    """The suffix of LLVM's intrinsics for sixteen of these."""
    return {_DOUBLE: "v16f64", _FLOAT: "v16f32", _I16: "v16i16", _I8: "v16i8"}[element]


@intrinsic
def number(typing: Any, array: Any, at: Any) -> Any:
    """One element as float64."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = sig.args[0]
        element = _element(kind)
        pointer = _pointer(context, builder, kind, args[0], args[1], element)
        return _convert(builder, kind.dtype, builder.load(pointer, align=kind.dtype.bitwidth // 8), WIDE)

    return types.float64(array, types.int64), lower


def _load(array: Any, kind: Any) -> Any:
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        dtype = sig.args[0].dtype
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1], _lanes(_element(sig.args[0])))
        return _convert(builder, dtype, builder.load(pointer, align=dtype.bitwidth // 8), kind)

    return kind(array, types.int64), lower


def _load_some(array: Any, kind: Any) -> Any:
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        dtype, element, mask = sig.args[0].dtype, _element(sig.args[0]), args[2]
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1], _lanes(element))
        align, zero = ir.Constant(_I32, dtype.bitwidth // 8), ir.Constant(_lanes(element), None)
        name = f"llvm.masked.load.{_code(element)}.p0"
        return _convert(builder, dtype, _call(builder, name, _lanes(element), [pointer, align, mask, zero]), kind)

    return kind(array, types.int64, MASK), lower


@intrinsic
def load(typing: Any, array: Any, at: Any) -> Any:
    """Sixteen neighbours in memory, as a `Wide`."""
    return _load(array, WIDE)


@intrinsic
def load_own(typing: Any, array: Any, at: Any) -> Any:
    """Sixteen neighbours in memory, in the arithmetic of the array."""
    return _load(array, _own(array.dtype))


@intrinsic
def load_some(typing: Any, array: Any, at: Any, mask: Any) -> Any:
    """As `load`, but lanes outside the mask are 0 and their memory is not touched."""
    return _load_some(array, WIDE)


@intrinsic
def load_some_own(typing: Any, array: Any, at: Any, mask: Any) -> Any:
    """As `load_own`, but lanes outside the mask are 0 and their memory is not touched."""
    return _load_some(array, _own(array.dtype))


@intrinsic
def own(typing: Any, array: Any, values: Any) -> Any:
    """A `Wide` rounded to the arithmetic of an array."""
    kind = _own(array.dtype)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return args[1] if kind is WIDE else builder.fptrunc(args[1], _lanes(_FLOAT))

    return kind(array, WIDE), lower


@intrinsic
def spread(typing: Any, array: Any, at: Any) -> Any:
    """One element in all lanes, in the arithmetic of the array."""
    kind = _own(array.dtype)

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        dtype = sig.args[0].dtype
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1], _element(sig.args[0]))
        one = _convert(builder, dtype, builder.load(pointer, align=dtype.bitwidth // 8), kind)
        return _splat(builder, one)

    return kind(array, types.int64), lower


@intrinsic
def widen(typing: Any, values: Any) -> Any:
    """The same numbers as a `Wide`."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return args[0] if sig.args[0] == WIDE else builder.fpext(args[0], _lanes(_DOUBLE))

    return WIDE(values), lower


@intrinsic
def store(typing: Any, array: Any, at: Any, values: Any) -> Any:
    """Sixteen neighbours into memory."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind, (data, at, values) = sig.args[0], args
        pointer = _pointer(context, builder, kind, data, at, _lanes(_element(kind)))
        builder.store(_narrow(builder, kind.dtype, values), pointer, align=kind.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(array, types.int64, values), lower


@intrinsic
def stream(typing: Any, array: Any, at: Any, values: Any) -> Any:
    """As `store`, past the cache: for results too large to be found there when they are read.

    A plain store fetches the line it is about to overwrite; this one does not, which saves a third of the
    traffic of a copy.  The address must be a multiple of the vector's size in memory.
    """

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind, (data, at, values) = sig.args[0], args
        pointer = _pointer(context, builder, kind, data, at, _lanes(_element(kind)))
        align = LANES * kind.dtype.bitwidth // 8
        instruction = builder.store(_narrow(builder, kind.dtype, values), pointer, align=align)
        instruction.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))
        return context.get_dummy_value()

    return types.none(array, types.int64, values), lower


@intrinsic
def prefetch(typing: Any, array: Any, at: Any) -> Any:
    """Have the line at this offset brought into the second-level cache.  It may lie outside of the array."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1], _I8)
        read, second_level, data = (ir.Constant(_I32, number) for number in (0, 2, 1))
        _call(builder, "llvm.prefetch.p0", ir.VoidType(), [pointer, read, second_level, data])
        return context.get_dummy_value()

    return types.none(array, types.int64), lower


@intrinsic
def store_some(typing: Any, array: Any, at: Any, values: Any, mask: Any) -> Any:
    """As `store`, for the lanes in the mask; the memory of the others is not touched."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind, (data, at, values, mask) = sig.args[0], args
        element = _element(kind)
        pointer = _pointer(context, builder, kind, data, at, _lanes(element))
        align = ir.Constant(_I32, kind.dtype.bitwidth // 8)
        stored = _narrow(builder, kind.dtype, values)
        _call(builder, f"llvm.masked.store.{_code(element)}.p0", ir.VoidType(), [stored, pointer, align, mask])
        return context.get_dummy_value()

    return types.none(array, types.int64, values, MASK), lower


@intrinsic
def load_mask(typing: Any, array: Any, at: Any, step: Any, mask: Any) -> Any:
    """Sixteen booleans `step` bytes apart (0: one for all); False outside `mask`, where none is read."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data, at, step, mask = args
        pointer = _pointer(context, builder, sig.args[0], data, at, _I8)
        numbers = ir.Constant(_lanes(_I64), list(range(LANES)))
        offsets = builder.mul(numbers, _splat(builder, step))
        inside = builder.select(mask, offsets, ir.Constant(_lanes(_I64), None))  # the first is always there
        result = ir.Constant(_lanes(_I8), ir.Undefined)
        for lane in range(LANES):
            lane_number = ir.Constant(_I32, lane)
            byte = builder.load(builder.gep(pointer, [builder.extract_element(inside, lane_number)]), align=1)
            result = builder.insert_element(result, byte, lane_number)
        return builder.and_(mask, builder.icmp_unsigned("!=", result, ir.Constant(_lanes(_I8), None)))

    return MASK(array, types.int64, types.int64, MASK), lower


@intrinsic
def pack(typing: Any, array: Any, at: Any, mask: Any) -> Any:
    """Sixteen truth values into the sixteen bits at this offset."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        data, at, mask = args
        pointer = _pointer(context, builder, sig.args[0], data, at, _I16)
        builder.store(builder.bitcast(mask, _I16), pointer, align=2)
        return context.get_dummy_value()

    return types.none(array, types.int64, MASK), lower


@intrinsic
def unpack(typing: Any, array: Any, at: Any) -> Any:
    """The inverse of `pack`."""

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, sig.args[0], args[0], args[1], _I16)
        return builder.bitcast(builder.load(pointer, align=2), _lanes(_I1))

    return MASK(array, types.int64), lower
