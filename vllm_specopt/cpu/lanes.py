"""Eight single-precision numbers as one value of compiled code: a type for numba, and what can be done with it.

Loops written with it come out the same on every CPU: LLVM puts the lanes into registers of the width it finds, and
the order of additions is the one written here, so that two machines, or two versions of the compiler, agree bit for
bit. Left to the compiler, a sum's order would depend on the width it chooses.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

WIDTH = 8


class Lanes(types.Type):
    """Type of a value of ``WIDTH`` single-precision numbers."""

    def __init__(self):
        super().__init__(name=f"float32x{WIDTH}")


lanes = Lanes()
_F32, _I32 = ir.FloatType(), ir.IntType(32)
_FLOATS, _INTS = ir.VectorType(_F32, WIDTH), ir.VectorType(_I32, WIDTH)


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager, numba_type):
        super().__init__(manager, numba_type, _FLOATS)


def _constant(vector_type, value):
    return ir.Constant(vector_type, [value] * vector_type.count)


def _pick(builder, vector, places):
    """The lanes of a vector at ``places``, as a vector."""
    mask = ir.Constant(ir.VectorType(_I32, len(places)), list(places))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def _splat(builder, scalar):
    vector = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), scalar, ir.Constant(_I32, 0))
    return _pick(builder, vector, [0] * WIDTH)


def _load(builder, address, vector_type):
    loaded = builder.load(builder.inttoptr(address, vector_type.as_pointer()))
    loaded.align = 1
    return loaded


def _larger(builder, left, right):
    return builder.select(builder.fcmp_ordered(">", left, right), left, right)


def _fused(builder, left, right, addend):
    kind = ir.FunctionType(_FLOATS, [_FLOATS] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{WIDTH}f32")
    return builder.call(function, [left, right, addend])


def _tree(builder, vector, combine):
    """Combine the lanes pairwise, the upper half with the lower, down to one."""
    while vector.type.count > 1:
        half = vector.type.count // 2
        low, high = (_pick(builder, vector, range(first, first + half)) for first in (0, half))
        vector = combine(builder, low, high)
    return builder.extract_element(vector, ir.Constant(_I32, 0))


def _high_half(builder, halves):
    """bf16 as the integers they are: the upper halves of single-precision numbers."""
    wide = builder.zext(halves, _INTS)
    return builder.bitcast(builder.shl(wide, _constant(_INTS, 16)), _FLOATS)


@intrinsic
def splat(typing_context, value):
    """All lanes alike."""
    return lanes(types.float32), lambda context, builder, signature, args: _splat(builder, args[0])


@intrinsic
def load_fp32(typing_context, address):
    """Eight numbers in a row from an address, which need not be aligned."""
    return lanes(types.int64), lambda context, builder, signature, args: _load(builder, args[0], _FLOATS)


@intrinsic
def load_fp16(typing_context, address):
    """As :func:`load_fp32`, of half precision."""

    def generate(context, builder, signature, args):
        return builder.fpext(_load(builder, args[0], ir.VectorType(ir.HalfType(), WIDTH)), _FLOATS)

    return lanes(types.int64), generate


@intrinsic
def load_bf16(typing_context, address):
    """As :func:`load_fp32`, of bf16."""

    def generate(context, builder, signature, args):
        return _high_half(builder, _load(builder, args[0], ir.VectorType(ir.IntType(16), WIDTH)))

    return lanes(types.int64), generate


@intrinsic
def load_bf16_pairs(typing_context, address):
    """Sixteen bf16: those at even places, and those at odd ones. Cheaper than two loads in order."""

    def generate(context, builder, signature, args):
        words = _load(builder, args[0], _INTS)
        even = builder.bitcast(builder.shl(words, _constant(_INTS, 16)), _FLOATS)
        odd = builder.bitcast(builder.and_(words, _constant(_INTS, 0xFFFF0000)), _FLOATS)
        return context.make_tuple(builder, signature.return_type, [even, odd])

    return types.UniTuple(lanes, 2)(types.int64), generate


@intrinsic
def store(typing_context, address, value):
    """Write eight numbers in a row to an address, which need not be aligned."""

    def generate(context, builder, signature, args):
        builder.store(args[1], builder.inttoptr(args[0], _FLOATS.as_pointer())).align = 1
        return context.get_dummy_value()

    return types.void(types.int64, lanes), generate


@intrinsic
def add(typing_context, left, right):
    """left + right."""
    return lanes(lanes, lanes), lambda context, builder, signature, args: builder.fadd(*args)


@intrinsic
def subtract(typing_context, left, right):
    """left - right."""
    return lanes(lanes, lanes), lambda context, builder, signature, args: builder.fsub(*args)


@intrinsic
def multiply(typing_context, left, right):
    """left * right."""
    return lanes(lanes, lanes), lambda context, builder, signature, args: builder.fmul(*args)


@intrinsic
def multiply_add(typing_context, left, right, addend):
    """left * right + addend, rounded once."""

    def generate(context, builder, signature, args):
        return _fused(builder, *args)

    return lanes(lanes, lanes, lanes), generate


@intrinsic
def multiply_subtract(typing_context, left, right, subtrahend):
    """left * right - subtrahend, rounded once."""

    def generate(context, builder, signature, args):
        return _fused(builder, args[0], args[1], builder.fneg(args[2]))

    return lanes(lanes, lanes, lanes), generate


@intrinsic
def larger(typing_context, left, right):
    """The larger of the two, ``right`` where ``left`` is NaN."""
    return lanes(lanes, lanes), lambda context, builder, signature, args: _larger(builder, *args)


@intrinsic
def power_of_two(typing_context, exponent):
    """2^(n - 127) where the lowest 9 bits of the number's representation are n; 0 where n is 0."""

    def generate(context, builder, signature, args):
        bits = builder.shl(builder.bitcast(args[0], _INTS), _constant(_INTS, 23))
        return builder.bitcast(bits, _FLOATS)

    return lanes(lanes), generate


@intrinsic
def where_at_least(typing_context, value, bound, kept):
    """``kept`` where value >= bound, else 0."""

    def generate(context, builder, signature, args):
        return builder.select(builder.fcmp_ordered(">=", args[0], args[1]), args[2], _constant(_FLOATS, 0.0))

    return lanes(lanes, lanes, lanes), generate


@intrinsic
def at_least(typing_context, value, bound):
    """Bit i is set where lane i of value >= lane i of bound."""

    def generate(context, builder, signature, args):
        bits = builder.bitcast(builder.fcmp_ordered(">=", *args), ir.IntType(WIDTH))
        return builder.zext(bits, ir.IntType(64))

    return types.int64(lanes, lanes), generate


@intrinsic
def largest(typing_context, value):
    """The largest lane; no lane may be NaN."""
    return types.float32(lanes), lambda context, builder, signature, args: _tree(builder, args[0], _larger)


@intrinsic
def total(typing_context, value):
    """The lanes' sum, in single precision, added pairwise."""

    def generate(context, builder, signature, args):
        return _tree(builder, args[0], lambda builder, low, high: builder.fadd(low, high))

    return types.float32(lanes), generate


@intrinsic
def total64(typing_context, value):
    """The lanes' sum in double precision, added pairwise."""

    def generate(context, builder, signature, args):
        wide = builder.fpext(args[0], ir.VectorType(ir.DoubleType(), WIDTH))
        return _tree(builder, wide, lambda builder, low, high: builder.fadd(low, high))

    return types.float64(lanes), generate


@intrinsic
def trailing_zeros(typing_context, bits):
    """Place of the lowest bit that is set; ``bits`` must not be 0."""

    def generate(context, builder, signature, args):
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.int64(types.int64), generate


@intrinsic
def count_bits(typing_context, bits):
    """Number of bits that are set."""
    return types.int64(types.int64), lambda context, builder, signature, args: builder.ctpop(args[0])
