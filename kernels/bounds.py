"""Where a filter's threshold may lie, from a row's tiles or from a sample of the row; and floats as ordered keys."""

import triton
import triton.language as tl

from .load import load_logits, scaled, weights

CAPACITY = tl.constexpr(1024)
"""Values of a row that are resolved in registers."""

BISECTIONS = tl.constexpr(12)

SLACK = tl.constexpr(0.04)
"""Share of the mass by which a sample may be wrong: about three of its standard deviations."""


@triton.jit
def order_key(x):
    """int32 keys in the order of the floats; -0 and 0 are one."""
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    return tl.where(bits < 0, -magnitude, magnitude)


@triton.jit
def key_value(key):
    """The float of a key."""
    return tl.where(key < 0, -key | -2147483648, key).to(tl.float32, bitcast=True)


@triton.jit
def top_k_bound(maxima, top_k):
    """A value below the k-th largest logit: at least k tiles, so at least k tokens, lie above it; -inf if too few."""
    usable = maxima > float("-inf")
    low = tl.full((), float("-inf"), tl.float32)
    if tl.sum(usable.to(tl.int32), axis=0) >= top_k:
        below = tl.min(tl.where(usable, maxima, float("inf")), axis=0)
        below = key_value(order_key(below) - 1)
        above = tl.max(maxima, axis=0)
        for _ in range(BISECTIONS):
            middle = below + 0.5 * (above - below)
            enough = tl.sum((maxima > middle).to(tl.int32), axis=0) >= top_k
            below = tl.where(enough, middle, below)
            above = tl.where(enough, above, middle)
        low = below
    return low


@triton.jit
def top_p_bound(maxima, masses, scale, top, goal, total, vocab_size, TILE: tl.constexpr):
    """A value such that what lies above it weighs at least ``goal``, from the tiles' maxima and masses alone.

    A tile whose maximum lies above a value c has there at least the weight of its maximum, and at least its mass less
    TILE tokens as heavy as c.
    """
    shift = scaled(top, scale)
    rest = tl.maximum((total - goal) / vocab_size, 1e-30)
    below = tl.minimum(top, (tl.log2(rest) + shift) / scale) - 1e-3 / scale
    below = key_value(order_key(below) - 1)
    above = top
    peaks = weights(maxima, scale, shift)
    masses = masses.to(tl.float32)
    for _ in range(BISECTIONS):
        middle = below + 0.5 * (above - below)
        least = tl.maximum(peaks, masses - TILE * weights(middle, scale, shift))
        enough = tl.sum(tl.where(maxima > middle, least, 0.0), axis=0) >= goal * 1.00001
        below = tl.where(enough, middle, below)
        above = tl.where(enough, above, middle)
    return below


@triton.jit
def guess(row_ptr, low, high, share, scale, shift, vocab_size):
    """Ascending pivots between which a sample of the row leaves ``share`` of what it has in (low, high]."""
    x = load_logits(row_ptr, tl.arange(0, CAPACITY) * (vocab_size // CAPACITY), tl.arange(0, CAPACITY) < vocab_size)
    w = tl.where((x > low) & (x <= high), weights(x, scale, shift), 0.0)
    total = tl.sum(w, axis=0)
    pivot1, pivot3 = low, low
    step = high - low
    for _ in range(BISECTIONS):
        step *= 0.5
        above1 = tl.sum(tl.where(x > pivot1 + step, w, 0.0), axis=0)
        above3 = tl.sum(tl.where(x > pivot3 + step, w, 0.0), axis=0)
        pivot1 = tl.where(above1 >= (share + SLACK) * total, pivot1 + step, pivot1)
        pivot3 = tl.where(above3 > (share - SLACK) * total, pivot3 + step, pivot3)
    pivot3 += step
    return pivot1, 0.5 * (pivot1 + pivot3), pivot3
