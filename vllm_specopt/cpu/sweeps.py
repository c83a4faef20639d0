"""Sweeps over one row: what they leave is a few numbers per tile, never anything of the size of the row."""

from typing import NamedTuple

import numpy as np

from vllm_specopt.cpu.lanes import (
    WIDTH,
    add,
    at_least,
    larger,
    largest,
    load_bf16_pairs,
    load_fp32,
    multiply,
    multiply_add,
    splat,
    store,
    total,
    trailing_zeros,
)
from vllm_specopt.cpu.memory import (
    BF16,
    FP16,
    FP32,
    INF,
    ONE,
    ZERO,
    inline,
    jit,
    load,
    prefetch,
    size_of,
    write_float,
)
from vllm_specopt.cpu.rows import LARGEST_REFERENCE, TILE, Row, frame_at, power, tile_at


class Left(NamedTuple):
    """Addresses of what a sweep leaves, fp32.

    sums: the sum of each tile's weights. group_sums, tops: of ``WIDTH`` groups of each tile the sum of the weights and
    the largest logit (none below the frame's lowest); those of the next tile are ``stride`` bytes on.
    """

    sums: int
    group_sums: int
    tops: int
    stride: int


# Weights may grow to 2^HEADROOM before the reference follows: a tile's sum stays far from overflowing.
HEADROOM = 64.0
# Bytes ahead: processors' own prefetching ends with each page of memory.
AHEAD = 2048


@inline
def _accumulate(accumulator, x, frame):
    near_one, exponent = power(x, frame, ONE)
    return multiply_add(near_one, exponent, accumulator)


@jit
def sum_tile(address, kind, frame):
    """Of eight groups of a tile: the sums of their weights, and their largest logits, none below the frame's lowest."""
    if kind == FP32:
        return _sum_in_order(address, FP32, frame)
    if kind == FP16:
        return _sum_in_order(address, FP16, frame)
    lowest = splat(frame.lowest)
    accumulator, other, tops = splat(ZERO), splat(ZERO), lowest
    for i in range(0, TILE, 2 * WIDTH):
        prefetch(address + 2 * i + AHEAD)
        even, odd = load_bf16_pairs(address + 2 * i)
        even, odd = larger(even, lowest), larger(odd, lowest)
        tops = larger(odd, larger(even, tops))
        accumulator = _accumulate(accumulator, even, frame)
        other = _accumulate(other, odd, frame)
    return add(accumulator, other), tops


@inline
def _sum_in_order(address, kind, frame):
    lowest = splat(frame.lowest)
    accumulator, other, tops = splat(ZERO), splat(ZERO), lowest
    size = size_of(kind)
    for i in range(0, TILE, 2 * WIDTH):
        prefetch(address + size * i + AHEAD)
        left = larger(load(address + size * i, kind), lowest)
        right = larger(load(address + size * (i + WIDTH), kind), lowest)
        tops = larger(right, larger(left, tops))
        accumulator = _accumulate(accumulator, left, frame)
        other = _accumulate(other, right, frame)
    return add(accumulator, other), tops


@jit
def largest_of_tile(address, kind, least):
    """The largest logit of a tile, or ``least`` if that is larger."""
    tops = splat(least)
    if kind == BF16:
        for i in range(0, TILE, 2 * WIDTH):
            prefetch(address + 2 * i + AHEAD)
            even, odd = load_bf16_pairs(address + 2 * i)
            tops = larger(odd, larger(even, tops))
    else:
        size = size_of(kind)
        for i in range(0, TILE, WIDTH):
            prefetch(address + size * i + AHEAD)
            tops = larger(load(address + size * i, kind), tops)
    return largest(tops)


@jit
def largest_logit(row, buffer):
    """The row's largest logit, and the first token that has it; -inf and 0 if the row has none."""
    top, first = -INF, np.int64(0)
    for start in range(0, row.vocab, TILE):
        address, kind = tile_at(row, start, buffer)
        tile_top = largest_of_tile(address, kind, top)
        if tile_top > top:
            top, first = tile_top, np.int64(start)
    return top, first_in_tile(row, first, top, buffer) if top > -INF else first


@jit
def first_in_tile(row, start, top, buffer):
    """The first token of a tile whose logit is at least ``top``, its largest; ``start`` is the tile's first token."""
    address, kind = tile_at(row, start, buffer)
    size = size_of(kind)
    for i in range(0, TILE, WIDTH):
        found = at_least(load(address + size * i, kind), splat(top))
        if found:
            return start + i + trailing_zeros(found)
    return start


@inline
def is_large(top, scale):
    """Whether a logit is too large for the reference of a row that is not shifted."""
    return not abs(np.float64(top) * np.float64(scale)) < LARGEST_REFERENCE


@inline
def frame_below(top, scale):
    """The frame whose reference is a logit, and the logit at which the reference has to follow."""
    frame = frame_at(scale, np.rint(np.float64(top) * np.float64(scale)))
    return frame, np.float32((frame.reference + HEADROOM) / scale)


@jit
def _sweep(row, scale, left, buffer):
    """As :func:`sweep`, without shifting the row: whether that went well, the frame, the sum of all weights."""
    frame, limit, mass = frame_at(scale, 0.0), np.float32(HEADROOM / scale), 0.0
    has_reference = row.is_shifted != 0
    for start in range(0, row.vocab, TILE):
        tile = start // TILE
        address, kind = tile_at(row, start, buffer)
        if not has_reference:
            top = largest_of_tile(address, kind, -INF)
            if top == -INF:
                leave(left, tile, splat(ZERO), splat(-INF))
                continue
            if is_large(top, scale):
                return False, frame, mass
            frame, limit = frame_below(top, scale)
            has_reference = True
        sums, tops = sum_tile(address, kind, frame)
        if at_least(tops, splat(limit)):
            top = largest(tops)
            if is_large(top, scale):
                return False, frame, mass
            frame, limit, factor = follow(frame, top, scale, left, tile)
            mass *= factor
            sums, tops = sum_tile(address, kind, frame)
        mass += np.float64(leave(left, tile, sums, tops))
    return True, frame, mass


@jit
def follow(frame, top, scale, left, num_tiles):
    """Move the reference up to ``top``, and what the first tiles have left with it: frame, next limit, and factor."""
    before = frame.reference
    frame, limit = frame_below(top, scale)
    factor = 2.0 ** (before - frame.reference)
    for i in range(num_tiles):
        sums = multiply(load_fp32(left.group_sums + left.stride * i), splat(np.float32(factor)))
        leave(left, i, sums, load_fp32(left.tops + left.stride * i))
    return frame, limit, factor


@inline
def leave(left, tile, sums, tops):
    """Write what a tile leaves; its sum."""
    tile_sum = total(sums)
    write_float(left.sums, tile, tile_sum)
    store(left.group_sums + left.stride * tile, sums)
    store(left.tops + left.stride * tile, tops)
    return tile_sum


@jit
def sweep(row, scale, left, buffer):
    """Read a row once.

    Args:
        left: Where to write what the sweep leaves.
        buffer: Memory for a tile.

    Returns:
        The row, shifted if its logits are too large for a reference of its own; its frame; the sum of all weights, 0 if
        the row has no usable logit.
    """
    went_well, frame, mass = _sweep(row, scale, left, buffer)
    if not went_well:
        origin, _ = largest_logit(row, buffer)
        row = Row(row.address, row.kind, row.vocab, origin, np.int64(1))
        _, frame, mass = _sweep(row, scale, left, buffer)
    return row, frame, mass
