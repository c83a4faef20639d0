"""Exact verification of a sampled draft (Leviathan et al. 2211.17192, Chen et al. 2302.01318)."""

from typing import NamedTuple

import numpy as np

from vllm_specopt.cpu.lanes import WIDTH, add, larger, multiply, multiply_subtract, splat, store, total, where_at_least
from vllm_specopt.cpu.memory import BF16, FP32, INF, ZERO, inline, jit, load, prefetch, size_of
from vllm_specopt.cpu.noise import RESIDUAL, acceptance_uniform, draw_uniform
from vllm_specopt.cpu.plan import LOGITS, PROBS
from vllm_specopt.cpu.rows import TILE, Frame, Row, power, tile_at, value_at, weigh, weight_of
from vllm_specopt.cpu.sweeps import AHEAD
from vllm_specopt.cpu.target import drawing_from, gather, is_kept


class Draft(NamedTuple):
    """The distribution a token was drafted from: probabilities, or logits with their frame and mass."""

    mode: int
    row: Row
    frame: Frame
    mass: float


class Rest(NamedTuple):
    """A draft's row at the places of the target's, one over its mass, and what the target's probabilities count for."""

    mode: int
    row: Row
    frame: Frame
    inverse: np.float32
    carry: float


@inline
def _residual(target, draft, mode, has_floor, x, y):
    """max(carry target probability - draft probability, 0) of eight logits and what the draft has there."""
    inverse = np.float32(draft.carry / target.mass)
    near_inverse, exponent = power(larger(x, splat(target.frame.lowest)), target.frame, inverse)
    if has_floor:
        exponent = where_at_least(x, splat(target.floor), exponent)
    prob = larger(y, splat(ZERO)) if mode == PROBS else multiply(weigh(y, draft.frame), splat(draft.inverse))
    return larger(multiply_subtract(near_inverse, exponent, prob), splat(ZERO))


@inline
def _sum_pair(target, draft, mode, has_floor, address, kind, draft_address, draft_kind):
    """Sum of the residual of a pair of tiles."""
    size, draft_size, accumulator = size_of(kind), size_of(draft_kind), splat(ZERO)
    for i in range(0, TILE, WIDTH):
        prefetch(draft_address + draft_size * i + AHEAD)
        x, y = load(address + size * i, kind), load(draft_address + draft_size * i, draft_kind)
        accumulator = add(accumulator, _residual(target, draft, mode, has_floor, x, y))
    return total(accumulator)


@jit
def sum_residual(target, draft, start, scratch):
    """Sum of a tile's residual; the usual pairs of dtypes have loops of their own."""
    address, kind = tile_at(target.row, start, scratch.tile)
    draft_address, draft_kind = tile_at(draft.row, start, scratch.draft_tile)
    if target.floor == -INF:
        if draft.mode == PROBS and draft_kind == FP32:
            if kind == BF16:
                return _sum_pair(target, draft, PROBS, False, address, BF16, draft_address, FP32)
            if kind == FP32:
                return _sum_pair(target, draft, PROBS, False, address, FP32, draft_address, FP32)
        if draft.mode == LOGITS and kind == BF16 and draft_kind == BF16:
            return _sum_pair(target, draft, LOGITS, False, address, BF16, draft_address, BF16)
    return _sum_pair(target, draft, draft.mode, True, address, kind, draft_address, draft_kind)


@jit
def weigh_residual(target, draft, start, scratch):
    """Write a tile's residual."""
    address, kind = tile_at(target.row, start, scratch.tile)
    draft_address, draft_kind = tile_at(draft.row, start, scratch.draft_tile)
    size, draft_size = size_of(kind), size_of(draft_kind)
    for i in range(0, TILE, WIDTH):
        x, y = load(address + size * i, kind), load(draft_address + draft_size * i, draft_kind)
        store(scratch.weights + 4 * i, _residual(target, draft, draft.mode, True, x, y))


_draw_residual = drawing_from(sum_residual, weigh_residual)


@jit
def probabilities(target, draft, token):
    """Those that the target and the draft give a token."""
    target_prob = np.float64(weight_of(value_at(target.source, token), target.frame)) / target.mass
    if not is_kept(target, token):
        target_prob = 0.0
    return target_prob, draft_probability(draft, token)


@jit
def draft_probability(draft, token):
    """That which the draft gives a token."""
    value = value_at(draft.row, token)
    draft_prob = np.float64(value)
    if draft.mode != PROBS:
        draft_prob = np.float64(weight_of(value, draft.frame)) / draft.mass if draft.mass > 0.0 else 0.0
    return draft_prob


@jit
def passes(target_prob, draft_prob, seed, position):
    """u <= target probability / draft probability."""
    return draft_prob > 0.0 and acceptance_uniform(seed, position) * draft_prob <= target_prob


@jit
def rest_of(target, draft, carry, scratch):
    """What the residual of a pair of rows is computed from."""
    inverse = np.float32(1.0 / draft.mass) if draft.mass > 0.0 else ZERO
    return Rest(draft.mode, gather(target, draft.row, scratch.pool_draft, scratch), draft.frame, inverse, carry)


@jit
def exact_rule(target, draft, token, seed, position, scratch):
    """-1 if the draft token survives (u <= target probability / draft probability), else the token that follows."""
    target_prob, draft_prob = probabilities(target, draft, token)
    if passes(target_prob, draft_prob, seed, position):
        return np.int64(-1)
    rest = rest_of(target, draft, 1.0, scratch)
    return _draw_residual(target, rest, draw_uniform(seed, position, RESIDUAL), scratch)
