"""Sweeps over one row: what they leave behind is one number per tile, never anything of the size of the row."""

import numpy as np

from vllm_specopt.cpu.lanes import (
    WIDTH,
    at_least,
    larger,
    largest,
    load_bf16_pairs,
    multiply_add,
    splat,
    store,
    total,
    trailing_zeros,
)
from vllm_specopt.cpu.memory import BF16, INF, ZERO, inline, jit, load, prefetch, read_float, size_of, write_float
from vllm_specopt.cpu.rows import LARGEST_REFERENCE, TILE, Row, frame_at, power, tile_at

# Weights may grow to 2^HEADROOM before the reference follows: a tile's sum stays far from overflowing.
HEADROOM = 64.0
# Bytes ahead: processors' own prefetching ends with each page of memory.
AHEAD = 2048


@inline
def _accumulate(accumulator, x, scale, rounding):
    near_one, exponent = power(x, scale, rounding)
    return multiply_add(near_one, exponent, accumulator)


@jit
def _sum_tile(address, kind, frame):
    """Sum of a tile's weights, and the largest of every sixteenth logit (none below the frame's lowest)."""
    scale, rounding, lowest = splat(frame.scale), splat(frame.rounding), splat(frame.lowest)
    accumulator, tops = splat(ZERO), lowest
    if kind == BF16:
        for i in range(0, TILE, 2 * WIDTH):
            prefetch(address + 2 * i + AHEAD)
            even, odd = load_bf16_pairs(address + 2 * i)
            even, odd = larger(even, lowest), larger(odd, lowest)
            tops = larger(tops, larger(even, odd))
            accumulator = _accumulate(accumulator, even, scale, rounding)
            accumulator = _accumulate(accumulator, odd, scale, rounding)
    else:
        size = size_of(kind)
        for i in range(0, TILE, WIDTH):
            prefetch(address + size * i + AHEAD)
            x = larger(load(address + size * i, kind), lowest)
            tops = larger(tops, x)
            accumulator = _accumulate(accumulator, x, scale, rounding)
    return total(accumulator), tops


@jit
def _largest_of_tile(address, kind, least):
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
        tile_top = _largest_of_tile(address, kind, top)
        if tile_top > top:
            top, first = tile_top, np.int64(start)
    if top == -INF:
        return top, first
    address, kind = tile_at(row, first, buffer)
    size = size_of(kind)
    for i in range(0, TILE, WIDTH):
        found = at_least(load(address + size * i, kind), splat(top))
        if found:
            return top, first + i + trailing_zeros(found)
    return top, first


@inline
def _is_large(top, scale):
    return not abs(np.float64(top) * np.float64(scale)) < LARGEST_REFERENCE


@inline
def _frame_below(top, scale):
    """The frame whose reference is a logit, and the logit at which the reference has to follow."""
    frame = frame_at(scale, np.rint(np.float64(top) * np.float64(scale)))
    return frame, np.float32((frame.reference + HEADROOM) / scale)


@jit
def _sweep(row, scale, sums, tops, tops_stride, buffer):
    """As :func:`sweep`, without shifting the row: whether that went well, the frame, the sum of all weights."""
    frame, limit, mass = frame_at(scale, 0.0), np.float32(HEADROOM / scale), 0.0
    has_reference = row.is_shifted != 0
    for start in range(0, row.vocab, TILE):
        tile = start // TILE
        address, kind = tile_at(row, start, buffer)
        if not has_reference:
            top = _largest_of_tile(address, kind, -INF)
            if top == -INF:
                write_float(sums, tile, ZERO)
                store(tops + tile * tops_stride, splat(-INF))
                continue
            if _is_large(top, scale):
                return False, frame, mass
            frame, limit = _frame_below(top, scale)
            has_reference = True
        tile_sum, tile_tops = _sum_tile(address, kind, frame)
        if at_least(tile_tops, splat(limit)):
            top = largest(tile_tops)
            if _is_large(top, scale):
                return False, frame, mass
            before = frame.reference
            frame, limit = _frame_below(top, scale)
            factor = 2.0 ** (before - frame.reference)
            mass *= factor
            for i in range(tile):
                write_float(sums, i, np.float32(read_float(sums, i) * factor))
            tile_sum, tile_tops = _sum_tile(address, kind, frame)
        write_float(sums, tile, tile_sum)
        store(tops + tile * tops_stride, tile_tops)
        mass += np.float64(tile_sum)
    return True, frame, mass


@jit
def sweep(row, scale, sums, tops, tops_stride, buffer):
    """Read a row once.

    Leaves the sum of each tile's weights at ``sums`` (fp32), and at ``tops`` (fp32, ``WIDTH`` per tile, tiles
    ``tops_stride`` bytes apart) the largest of every sixteenth logit of each tile.

    Returns:
        The row, shifted if its logits are too large for a reference of its own; its frame; the sum of all weights, 0 if
        the row has no usable logit.
    """
    went_well, frame, mass = _sweep(row, scale, sums, tops, tops_stride, buffer)
    if not went_well:
        origin, _ = largest_logit(row, buffer)
        row = Row(row.address, row.kind, row.vocab, origin, np.int64(1))
        _, frame, mass = _sweep(row, scale, sums, tops, tops_stride, buffer)
    return row, frame, mass
