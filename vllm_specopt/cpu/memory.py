"""Reading and writing by address, and how the functions of this package are compiled.

Tensors arrive as addresses: one compiled version then serves all dtypes, and the compiler knows the unit stride.
"""

import numpy as np
from llvmlite import ir
from numba import carray, njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_specopt.cpu.lanes import load_bf16, load_fp16, load_fp32

BF16, FP16, FP32 = 0, 1, 2
INF = np.float32(np.inf)
ZERO, ONE = np.float32(0.0), np.float32(1.0)

_FLAGS = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True, "no_cpython_wrapper": True}


def jit(function=None, **flags):
    """Compile a function that is called by compiled code only."""
    compile_function = njit(**_FLAGS, **flags)
    return compile_function if function is None else compile_function(function)


def inline(function):
    """The same for a few lines that become part of their callers."""
    return jit(function, forceinline=True)


@intrinsic
def pointer(typing_context, address, dtype):
    """An address as a pointer to numbers of a numba type, for ``carray``."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.dtype)(types.int64, dtype), generate


@intrinsic
def fetch_add(typing_context, address, value):
    """Add to the int64 at an address, as one step for all threads; returns what was there before."""

    def generate(context, builder, signature, args):
        target = builder.inttoptr(args[0], context.get_value_type(types.CPointer(types.int64)))
        return builder.atomic_rmw("add", target, args[1], "monotonic")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def prefetch(typing_context, address):
    """Have the memory at an address fetched into the first-level cache; any address will do."""

    def generate(context, builder, signature, args):
        byte, word = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.inttoptr(args[0], byte), word(0), word(3), word(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@inline
def read_int(address, i, wide):
    """Element i of an int64 (``wide``) or int32 tensor, as int64."""
    if wide:
        return carray(pointer(address + 8 * i, types.int64), 1)[0]
    return np.int64(carray(pointer(address + 4 * i, types.int32), 1)[0])


@inline
def write_int(address, i, wide, value):
    """Set element i of an int64 (``wide``) or int32 tensor."""
    if wide:
        carray(pointer(address + 8 * i, types.int64), 1)[0] = value
    else:
        carray(pointer(address + 4 * i, types.int32), 1)[0] = value


@inline
def read_bool(address, i):
    """Element i of a bool tensor."""
    return carray(pointer(address + i, types.uint8), 1)[0] != 0


@inline
def read_float(address, i):
    """Element i of an fp32 tensor."""
    return carray(pointer(address + 4 * i, types.float32), 1)[0]


@inline
def write_float(address, i, value):
    """Set element i of an fp32 tensor."""
    carray(pointer(address + 4 * i, types.float32), 1)[0] = value


@inline
def read_double(address, i):
    """Element i of an fp64 array."""
    return carray(pointer(address + 8 * i, types.float64), 1)[0]


@inline
def write_double(address, i, value):
    """Set element i of an fp64 array."""
    carray(pointer(address + 8 * i, types.float64), 1)[0] = value


@inline
def floats(address, count):
    """``count`` numbers of an fp32 tensor, as an array."""
    return carray(pointer(address, types.float32), count)


@inline
def size_of(kind):
    """Bytes of one logit."""
    return 4 if kind == FP32 else 2


@inline
def load(address, kind):
    """Eight logits in a row from an address, in single precision."""
    if kind == BF16:
        return load_bf16(address)
    if kind == FP16:
        return load_fp16(address)
    return load_fp32(address)


@jit
def read(address, kind, i):
    """One logit, in single precision; NaN becomes -inf."""
    if kind == FP32:
        value = carray(pointer(address + 4 * i, types.float32), 1)[0]
    else:
        bits = np.uint32(carray(pointer(address + 2 * i, types.uint16), 1)[0])
        value = np.uint32(bits << 16).view(np.float32) if kind == BF16 else _from_fp16(bits)
    return value if value == value else -INF


@jit
def _from_fp16(bits):
    magnitude = np.uint32((bits & 0x7FFF) << 13)
    # The multiplication moves the exponent's bias and normalises subnormals; inf and NaN need an exponent of ones.
    finite = np.float32(magnitude.view(np.float32) * np.float32(2.0**112)).view(np.uint32)
    magnitude = finite if magnitude < 0x0F800000 else np.uint32(magnitude | 0x7F800000)
    return np.uint32(magnitude | ((bits & 0x8000) << 16)).view(np.float32)
