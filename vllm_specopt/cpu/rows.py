"""A row of logits in tiles, and the weights 2^(logit * scale - reference) that stand for its probabilities.

The reference is a whole number near the row's largest scaled logit. Eight weights then take eleven instructions: the
logit's own multiplication rounds to the nearest power of two, and the power enters by its exponent bits. A change of
reference multiplies all weights of a row by a power of two, so it rounds nothing.
"""

from typing import NamedTuple

import numpy as np

from vllm_specopt.cpu.lanes import (
    WIDTH,
    larger,
    multiply,
    multiply_add,
    multiply_subtract,
    power_of_two,
    splat,
    store,
    subtract,
    total,
    where_at_least,
)
from vllm_specopt.cpu.memory import FP32, INF, ONE, ZERO, inline, jit, load, read, size_of, write_float

TILE = 512
"""Tokens that are summed in single precision; a multiple of 32. Their logits fit in the first-level cache."""
LOWEST = np.float32(np.finfo(np.float32).min)
LARGEST_REFERENCE = 2.0**18
"""Scaled logits beyond this are taken relative to the row's largest, or the reference would cost them precision."""
# Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits; 127 is the exponent's bias.
ROUND = 1.5 * 2.0**23 + 127.0
# Minimax coefficients of 2^f on [-1/2, 1/2], relative error 9e-8, with rounding 1.7e-7; 2^0 is exact.
C1, C2, C3 = np.float32(6.9314697760e-01), np.float32(2.4022242082e-01), np.float32(5.5507337456e-02)
C4, C5 = np.float32(9.6715128612e-03), np.float32(1.3264727091e-03)


class Row(NamedTuple):
    """Logits of one row: address, dtype and number; with ``is_shifted`` they count relative to ``origin``."""

    address: int
    kind: int
    vocab: int
    origin: np.float32
    is_shifted: int


class Frame(NamedTuple):
    """What turns the logits of a row into weights.

    scale: log2(e) / temperature. reference: see above. rounding: a constant of the weights.
    lowest: logits at or below it weigh nothing.
    """

    scale: np.float32
    reference: float
    rounding: np.float32
    lowest: np.float32


@jit
def frame_at(scale, reference):
    """The frame of a scale and a whole-numbered reference."""
    return Frame(scale, reference, np.float32(ROUND - reference), np.float32((reference - 127.0) / scale))


@inline
def power(x, frame, factor):
    """factor * 2^(x * scale - reference) of eight logits, none below the lowest, in two parts.

    A number near the factor, and a power of two, which is 0 where x is the lowest logit.
    """
    scale, rounding = splat(frame.scale), splat(frame.rounding)
    rounded = multiply_add(x, scale, rounding)
    f = multiply_subtract(x, scale, subtract(rounded, rounding))
    poly = multiply_add(splat(factor * C5), f, splat(factor * C4))
    poly = multiply_add(poly, f, splat(factor * C3))
    poly = multiply_add(poly, f, splat(factor * C2))
    poly = multiply_add(poly, f, splat(factor * C1))
    return multiply_add(poly, f, splat(factor)), power_of_two(rounded)


@inline
def weigh(x, frame):
    """Weights of eight logits; NaN and -inf weigh nothing."""
    near_one, exponent = power(larger(x, splat(frame.lowest)), frame, ONE)
    return multiply(near_one, exponent)


@jit
def weight_of(value, frame):
    """Weight of one logit."""
    return total(weigh(splat(value), frame)) / np.float32(WIDTH)


@jit
def value_at(row, token):
    """One logit of a row, relative to the row's origin; NaN becomes -inf."""
    return relative(row, read(row.address, row.kind, token))


@jit
def relative(row, value):
    """A logit that is not NaN, relative to a row's origin."""
    if row.is_shifted:
        return ZERO if value == row.origin else np.float32(value - row.origin)
    return value


@jit
def tile_at(row, start, buffer):
    """Address and dtype of the full tile of logits that begins at a token.

    The last tile is filled up with -inf, in ``buffer``, and so is a tile of a row that is shifted.
    """
    if row.vocab - start >= TILE and not row.is_shifted:
        return row.address + start * size_of(row.kind), row.kind
    count = min(row.vocab - start, TILE)
    for i in range(count):
        write_float(buffer, i, value_at(row, start + i))
    for i in range(count, TILE):
        write_float(buffer, i, -INF)
    return buffer, np.int64(FP32)


@jit
def copy_tile(row, start, out):
    """Write a tile of logits in single precision, NaN as -inf, filled up with -inf."""
    address, kind = tile_at(row, start, out)
    size, lowest = size_of(kind), splat(-INF)
    for i in range(0, TILE, WIDTH):
        store(out + 4 * i, larger(load(address + size * i, kind), lowest))


@jit
def weigh_tile(row, frame, start, floor, buffer, weights):
    """Write the weights of a tile, 0 for logits below ``floor``; ``buffer`` and ``weights`` hold a tile each."""
    address, kind = tile_at(row, start, buffer)
    size, bound = size_of(kind), splat(floor)
    for i in range(0, TILE, WIDTH):
        x = load(address + size * i, kind)
        store(weights + 4 * i, where_at_least(x, bound, weigh(x, frame)))
