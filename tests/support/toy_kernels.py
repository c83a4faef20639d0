"""Kernels whose instruction counts are known by hand."""

import triton
import triton.language as tl

from vllm_specopt.kernels.constants import HAS_PTX


@triton.jit
def exp2_approx(x):
    """One instruction on a GPU; the interpreter has no inline assembly."""
    if HAS_PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.exp2(x)


@triton.jit
def sweep(x_ptr, lanes, rounds, BLOCK: tl.constexpr):
    """Sum of 2^x over ``rounds`` blocks; one exponential per element."""
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(rounds):
        total += exp2_approx(tl.load(x_ptr + step * BLOCK + lanes))
    return total


@triton.jit
def toy_kernel(x_ptr, rounds_ptr, out_ptr, BLOCK: tl.constexpr):
    """Program i does nothing where rounds[i] is 0; an odd number of rounds costs two more exponentials per element."""
    program = tl.program_id(0)
    rounds = tl.load(rounds_ptr + program)
    if rounds == 0:
        return
    lanes = tl.arange(0, BLOCK)
    total = sweep(x_ptr, lanes, rounds, BLOCK)
    if rounds % 2 == 1:
        total = exp2_approx(exp2_approx(total * 0.5) - 1.0)
        tl.store(out_ptr + program * BLOCK + lanes, total)
    else:
        tl.store(out_ptr + program * BLOCK + lanes, total + 1.0)


@triton.jit
def search_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """A loop of unknown length with a condition in it, through shared memory."""
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    low = 0
    high = n
    while low < high:
        middle = (low + high) // 2
        if tl.sum((x > middle).to(tl.int32), axis=0) > 3:
            low = middle + 1
        else:
            high = middle
    tl.store(out_ptr, low)
