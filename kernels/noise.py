"""Counter-based random numbers, drawn where they are used: no noise tensor is ever written.

A draw is a pure function of (request seed, absolute position, purpose, token id). Philox4x32-10 (Salmon et al., SC'11)
turns the first three into 128 bits per row; a token's noise is a hash of its id keyed by two of those words. The
definition in plain integers is in ``reference.py``.
"""

import triton
import triton.language as tl

ACCEPTANCE = tl.constexpr(0)
RECOVERED = tl.constexpr(1)
BONUS = tl.constexpr(2)
STREAM = tl.constexpr(0x53504543)


@triton.jit
def row_words(seed, position, purpose):
    """Four 32-bit words for (seed, position, purpose); arguments may be scalars or blocks of one shape."""
    position = position.to(tl.int64)
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low ^ low
    return tl.philox(seed, zero + purpose, low, high, zero + STREAM)


@triton.jit
def acceptance_uniform(seed, position):
    """u in (0, 1) of the acceptance test: 23 bits centred in their cells, exact in single precision."""
    word, _, _, _ = row_words(seed, position, ACCEPTANCE)
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def _mix32(x):
    """lowbias32, a bijective 32-bit finaliser (C. Wellons, hash-prospector)."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def log_exponential(key0, key1, token_ids):
    """Logarithm of the standard exponential noise of each token id, fp32 ``[BLOCK]``.

    The race is won by small noise, so -log(1 - v) is evaluated with full relative accuracy for small v: log(w) with
    w = 1 - v rounded, times v / (1 - w), undoes the rounding of w.
    """
    bits = _mix32(_mix32(token_ids.to(tl.uint32) + key0) ^ key1)
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.9999999403953552)
    w = 1.0 - v
    lost = 1.0 - w
    exponential = tl.where(lost == 0.0, v, -tl.log(w) * (v / tl.where(lost == 0.0, 1.0, lost)))
    return tl.log(exponential)
