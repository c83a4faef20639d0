"""Counter-based random numbers, drawn where they are used: no noise tensor is ever written.

A draw is a pure function of (request seed, absolute position, purpose): Philox4x32-10 (Salmon et al., SC'11) turns them
into 128 bits. The definition in plain integers is in ``reference/noise.py``.
"""

import triton
import triton.language as tl

from .constants import ACCEPTANCE, STREAM


@triton.jit
def row_words(seed, position, purpose):
    """Four 32-bit words for (seed, position, purpose); arguments may be scalars or blocks of one shape."""
    position = position.to(tl.int64)
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = low ^ low
    return tl.philox(seed, zero + purpose, low, high, zero + STREAM)


@triton.jit
def acceptance_uniform(seed, position, purpose=ACCEPTANCE):
    """u in (0, 1) of the acceptance test: 23 bits centred in their cells, exact in single precision."""
    word, _, _, _ = row_words(seed, position, purpose)
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def draw_uniform(seed, position, purpose):
    """u in (0, 1) of a draw by inversion: 52 bits centred in their cells, fp64."""
    high, low, _, _ = row_words(seed, position, purpose)
    return ((high >> 6).to(tl.float64) * 67108864.0 + (low >> 6).to(tl.float64) + 0.5) * 2.220446049250313e-16
