"""A row after temperature and filters, and tokens drawn from it or from weights derived from it."""

from typing import NamedTuple

import numpy as np

from vllm_specopt.cpu.draw import find_in_tile, find_tile
from vllm_specopt.cpu.lanes import WIDTH, add, load_fp32, splat, total
from vllm_specopt.cpu.memory import FP32, ZERO, jit, read_int, write_float
from vllm_specopt.cpu.rows import TILE, Frame, Row, value_at, weigh_tile


class Target(NamedTuple):
    """A row after temperature and filters.

    row, frame, mass, floor: weights are those of the row in its frame, none below the floor; mass is their sum, and the
        sums of its tiles are at ``scratch.left.sums``.
    source, threshold: the row as it was before a filter gathered it, and the smallest logit that is kept.
    gathered: number of logits a filter gathered, in which case ``row`` holds those alone; else -1.
    """

    row: Row
    frame: Frame
    mass: float
    floor: np.float32
    source: Row
    threshold: np.float32
    gathered: int


@jit
def is_kept(target, token):
    """Whether the filters keep a token."""
    return value_at(target.source, token) >= target.threshold


@jit
def draw_target(target, uniform, scratch):
    """A token of the row, by inversion."""
    goal = uniform * target.mass
    tile, before = find_tile(scratch.left.sums, (target.row.vocab + TILE - 1) // TILE, goal)
    return _token_of(target, place_in_tile(target, tile, goal - before, scratch), scratch)


@jit
def place_in_tile(target, tile, goal, scratch):
    """The first place of a row, within a tile, at which the running sum of the tile's weights passes ``goal``."""
    weigh_tile(target.row, target.frame, tile * TILE, target.floor, scratch.tile, scratch.weights)
    return tile * TILE + find_in_tile(scratch.weights, goal)


def weighing_by(sum_tile):
    """Compile a function that adds up other weights than the target's.

    Args:
        sum_tile: Compiled; called with (target, other, first place of a tile, scratch), returns the sum of its weights.

    Returns:
        A compiled function of (target, other, scratch). It leaves the tiles' sums for :func:`picking_by`.
    """

    @jit
    def total_of(target, other, scratch):
        mass = 0.0
        for tile in range((target.row.vocab + TILE - 1) // TILE):
            tile_sum = sum_tile(target, other, tile * TILE, scratch)
            write_float(scratch.other_sums, tile, tile_sum)
            mass += np.float64(tile_sum)
        return mass

    return total_of


def picking_by(weigh):
    """Compile a function that draws a token by inversion of weights that were just added up.

    Args:
        weigh: Compiled; called as ``sum_tile`` is, writes a tile's weights to ``scratch.weights``.

    Returns:
        A compiled function of (target, other, mass, uniform, scratch); the mass must be positive.
    """

    @jit
    def pick(target, other, mass, uniform, scratch):
        goal = uniform * mass
        tile, before = find_tile(scratch.other_sums, (target.row.vocab + TILE - 1) // TILE, goal)
        weigh(target, other, tile * TILE, scratch)
        return _token_of(target, tile * TILE + find_in_tile(scratch.weights, goal - before), scratch)

    return pick


def drawing_from(sum_tile, weigh):
    """Compile a function that does both: (target, other, uniform, scratch).

    It draws from the target where no weight is positive.
    """
    total_of, pick = weighing_by(sum_tile), picking_by(weigh)

    @jit
    def draw(target, other, uniform, scratch):
        mass = total_of(target, other, scratch)
        if not mass > 0.0:
            return draw_target(target, uniform, scratch)
        return pick(target, other, mass, uniform, scratch)

    return draw


@jit
def sum_of_weights(weights):
    """Sum of a tile of weights, in single precision."""
    accumulator = splat(ZERO)
    for i in range(0, TILE, WIDTH):
        accumulator = add(accumulator, load_fp32(weights + 4 * i))
    return total(accumulator)


@jit
def _token_of(target, place, scratch):
    """The token at a place of the row, which a filter may have gathered."""
    return read_int(scratch.pool_tokens, place, True) if target.gathered >= 0 else place


@jit
def place_of(target, token, scratch):
    """The place of a token in the row, which a filter may have gathered; -1 if it is not in there."""
    if target.gathered < 0:
        return token
    for i in range(target.gathered):
        if read_int(scratch.pool_tokens, i, True) == token:
            return np.int64(i)
    return np.int64(-1)


@jit
def gather(target, row, out, scratch):
    """Another row of the same vocabulary at the places of the target's: itself, or what is at the gathered tokens."""
    if target.gathered < 0:
        return row
    for i in range(target.gathered):
        write_float(out, i, value_at(row, read_int(scratch.pool_tokens, i, True)))
    return Row(out, np.int64(FP32), target.gathered, ZERO, np.int64(0))
