"""A row's tiles on one rank: their largest logits, then their sums in the frames that a sweep of the whole row takes.

A sweep of a whole row moves its reference as larger logits come up. Given the largest logit of every tile, a rank knows
where it would have been at each tile, so that its tiles' sums are those of the whole row, bit for bit.
"""

import numpy as np

from vllm_specopt.cpu.lanes import splat
from vllm_specopt.cpu.memory import INF, ZERO, jit, read_double, read_float, write_double, write_float
from vllm_specopt.cpu.rows import TILE, frame_at, tile_at
from vllm_specopt.cpu.sharded.plan import is_held, place_of_tile, shifted, source_of
from vllm_specopt.cpu.sweeps import HEADROOM, follow, frame_below, is_large, largest_of_tile, leave, sum_tile

FRAME = 4
"""Of a row: its reference, its origin, whether it is shifted, its mass."""


@jit
def tiles_of(row):
    """How many tiles a row has."""
    return (row.vocab + TILE - 1) // TILE


@jit
def find_tops(share, pieces, own_tops, buffer):
    """Write the largest logit of each of a row's whole tiles that this rank holds."""
    for tile in range(share.first_tile, share.end_tile):
        address, kind = tile_at(pieces.row, tile * TILE, buffer)
        write_float(own_tops, tile - share.first_tile, largest_of_tile(address, kind, -INF))


@jit
def find_cut_tops(share, pieces, tops, buffer):
    """The same of its cut tiles, each at its place in the row."""
    for tile in range(tiles_of(pieces.row)):
        if place_of_tile(share, tile) < 0:
            address, kind = tile_at(source_of(share, pieces, tile), tile * TILE, buffer)
            write_float(tops, tile, largest_of_tile(address, kind, -INF))


@jit
def largest_of_row(tops, num_tiles):
    """A row's largest logit, and the first tile that has it; -inf and 0 if no logit is usable."""
    top, first = -INF, np.int64(0)
    for tile in range(num_tiles):
        if read_float(tops, tile) > top:
            top, first = read_float(tops, tile), np.int64(tile)
    return top, first


@jit
def _sum_held(share, pieces, scale, tops, left, buffer):
    """As ``sweeps._sweep`` of the tiles that this rank can read: whether that went well, and the frame."""
    row = pieces.row
    frame, limit = frame_at(scale, 0.0), np.float32(HEADROOM / scale)
    has_reference = row.is_shifted != 0
    for tile in range(tiles_of(row)):
        top = read_float(tops, tile)
        if not has_reference:
            if top == -INF:
                leave(left, tile, splat(ZERO), splat(-INF))
                continue
            if is_large(top, scale):
                return False, frame
            frame, limit = frame_below(top, scale)
            has_reference = True
        elif top >= limit and not row.is_shifted:
            if is_large(top, scale):
                return False, frame
            frame, limit, _ = follow(frame, top, scale, left, tile)
        if is_held(share, tile):
            address, kind = tile_at(source_of(share, pieces, tile), tile * TILE, buffer)
            sums, held_tops = sum_tile(address, kind, frame)
            leave(left, tile, sums, held_tops)
    return True, frame


@jit
def sum_tiles(share, pieces, scale, tops, own_sums, sums, note, left, buffer):
    """Sum the weights of the tiles of a row that this rank can read.

    Args:
        tops: Of all tiles.
        own_sums: Where to write the sums of whole tiles. sums: The same for cut ones, each at its place in the row.
        note: Where to write the row's frame.
        left: Memory for what a sweep leaves.
    """
    went_well, frame = _sum_held(share, pieces, scale, tops, left, buffer)
    if not went_well:
        origin, _ = largest_of_row(tops, tiles_of(pieces.row))
        pieces = shifted(pieces, origin, np.int64(1))
        _, frame = _sum_held(share, pieces, scale, tops, left, buffer)
    write_double(note, 0, frame.reference)
    write_double(note, 1, np.float64(pieces.row.origin))
    write_double(note, 2, np.float64(pieces.row.is_shifted))
    for tile in range(tiles_of(pieces.row)):
        if place_of_tile(share, tile) < 0:
            write_float(sums, tile, read_float(left.sums, tile))
        elif is_held(share, tile):
            write_float(own_sums, tile - share.first_tile, read_float(left.sums, tile))


@jit
def framed(pieces, scale, note):
    """A row as its frame has it, and the frame."""
    pieces = shifted(pieces, np.float32(read_double(note, 1)), np.int64(read_double(note, 2)))
    return pieces, frame_at(scale, read_double(note, 0))


@jit
def mass_of(sums, num_tiles):
    """Sum over a row's tiles, in order."""
    mass = 0.0
    for tile in range(num_tiles):
        mass += np.float64(read_float(sums, tile))
    return mass
