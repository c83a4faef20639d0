"""Exact verification of a sampled draft (Leviathan et al. 2211.17192, Chen et al. 2302.01318)."""

from typing import NamedTuple

import numpy as np

from vllm_specopt.cpu.lanes import WIDTH, larger, load_fp32, multiply, multiply_subtract, splat, store
from vllm_specopt.cpu.memory import ZERO, jit, load, size_of
from vllm_specopt.cpu.noise import RESIDUAL, acceptance_uniform, draw_uniform
from vllm_specopt.cpu.plan import PROBS
from vllm_specopt.cpu.rows import TILE, Frame, Row, tile_at, value_at, weigh, weigh_tile, weight_of
from vllm_specopt.cpu.target import drawing_from, gather, is_kept


class Draft(NamedTuple):
    """The distribution a token was drafted from: probabilities, or logits with their frame and mass."""

    mode: int
    row: Row
    frame: Frame
    mass: float


@jit
def _weigh_residual(target, draft, start, scratch):
    """Write max(target probability - draft probability, 0) of a tile."""
    weigh_tile(target.row, target.frame, start, target.floor, scratch.tile, scratch.weights)
    address, kind = tile_at(draft.row, start, scratch.draft_tile)
    size, inverse, zero = size_of(kind), splat(np.float32(1.0 / target.mass)), splat(ZERO)
    draft_inverse = splat(np.float32(1.0 / draft.mass) if draft.mass > 0.0 else ZERO)
    for i in range(0, TILE, WIDTH):
        x = load(address + size * i, kind)
        prob = larger(x, zero) if draft.mode == PROBS else multiply(weigh(x, draft.frame), draft_inverse)
        weight = load_fp32(scratch.weights + 4 * i)
        store(scratch.weights + 4 * i, larger(multiply_subtract(weight, inverse, prob), zero))


_draw_residual = drawing_from(_weigh_residual)


@jit
def exact_rule(target, draft, token, seed, position, scratch):
    """-1 if the draft token survives (u <= target probability / draft probability), else the token that follows."""
    target_prob = np.float64(weight_of(value_at(target.source, token), target.frame)) / target.mass
    if not is_kept(target, token):
        target_prob = 0.0
    value = value_at(draft.row, token)
    draft_prob = np.float64(value)
    if draft.mode != PROBS:
        draft_prob = np.float64(weight_of(value, draft.frame)) / draft.mass if draft.mass > 0.0 else 0.0
    if draft_prob > 0.0 and acceptance_uniform(seed, position) * draft_prob <= target_prob:
        return np.int64(-1)
    draft = Draft(draft.mode, gather(target, draft.row, scratch.pool_draft, scratch), draft.frame, draft.mass)
    return _draw_residual(target, draft, draw_uniform(seed, position, RESIDUAL), scratch)
