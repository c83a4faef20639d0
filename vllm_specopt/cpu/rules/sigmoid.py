"""Sigmoid verification (Wagner et al. 2406.11016): scores in place of probabilities. Not lossless.

A draft token is tested by two numbers. Its row is read only where the request filters, or where it is rejected.
Constants are packed as in ``vllm_specopt.verify``: scale, shift and two limits of the target, the same of the draft,
then the differences of scale and shift.
"""

import math
from typing import NamedTuple

import numpy as np

from vllm_specopt.cpu.lanes import WIDTH, load_fp32, splat, store, where_at_least
from vllm_specopt.cpu.memory import INF, ONE, ZERO, floats, jit, read, read_float, write_float
from vllm_specopt.cpu.noise import RESIDUAL, draw_uniform
from vllm_specopt.cpu.plan import ONE_HOT, PROBS
from vllm_specopt.cpu.rows import LOWEST, TILE, Row, copy_tile, weigh_tile
from vllm_specopt.cpu.target import drawing_from, gather, place_of, sum_of_weights

DRAFT_SIDE, DIFFERENCE = 4, 8
HALF = np.float32(0.5)
LOG2_E = np.float32(1.4426950408889634)
EXP2_LOWEST = np.float32(-125.0)
# Adding 1.5 * 2^23 rounds to a whole number and leaves it in the low bits of the sum.
EXP2_ROUND = np.float32(12582912.0)
# Minimax coefficients of 2^f on [-1/2, 1/2], relative error 2e-9; the constant term is 1 in single precision.
E1, E2, E3 = np.float32(6.9314720574e-01), np.float32(2.4022646891e-01), np.float32(5.5503287770e-02)
E4, E5, E6 = np.float32(9.6184889579e-03), np.float32(1.3399931218e-03), np.float32(1.5345811807e-04)
# Cephes' logf: coefficients, and ln 2 in two parts so that its multiples are exact.
SQRT_HALF, LN2_HIGH, LN2_LOW = np.float32(0.70710678), np.float32(0.693359375), np.float32(-2.12194440e-4)
L0, L1, L2 = np.float32(7.0376836292e-2), np.float32(-1.1514610310e-1), np.float32(1.1676998740e-1)
L3, L4, L5 = np.float32(-1.2420140846e-1), np.float32(1.4249322787e-1), np.float32(-1.6668057665e-1)
L6, L7, L8 = np.float32(2.0000714765e-1), np.float32(-2.4999993993e-1), np.float32(3.3333331174e-1)


class Scores(NamedTuple):
    """What scores are computed from: the rows as they came, the constants' address, the temperature."""

    target: Row
    mode: int
    draft: Row
    constants: int
    temperature: float


@jit
def sigmoid_test(scores, token, uniform):
    """Whether a draft token survives: uniform <= target score / draft score, both above 0."""
    temperature, constants = scores.temperature, scores.constants
    value = read(scores.target.address, scores.target.kind, token)
    draft_score = 1.0
    if scores.mode != ONE_HOT:
        draft_value = read(scores.draft.address, scores.draft.kind, token)
        if scores.mode == PROBS:
            log_prob = math.log(np.float64(draft_value)) if draft_value > ZERO else -np.inf
            draft_score = _score(constants, DRAFT_SIDE, max(draft_value, ZERO), log_prob, 1.0)
        else:
            draft_score = _score(constants, DRAFT_SIDE, draft_value, np.float64(draft_value) / temperature, temperature)
    target_score = _score(constants, 0, value, np.float64(value) / temperature, temperature)
    return draft_score > 0 and uniform * draft_score <= target_score


@jit
def _weigh_without(target, place, start, scratch):
    """Write the target's weights of a tile without one place."""
    weigh_tile(target.row, target.frame, start, target.floor, scratch.tile, scratch.weights)
    if start <= place < start + TILE:
        write_float(scratch.weights, place - start, ZERO)


@jit
def _sum_without(target, place, start, scratch):
    """Sum of a tile's weights, which the sweep has left, without one place."""
    if start <= place < start + TILE:
        _weigh_without(target, place, start, scratch)
        return sum_of_weights(scratch.weights)
    return read_float(scratch.left.sums, start // TILE)


@jit
def _weigh_scores(target, scores, start, scratch):
    """Write max(target score - draft score, 0) of a tile, 0 for what the filters remove."""
    copy_tile(scores.target, start, scratch.tile)
    copy_tile(scores.draft, start, scratch.draft_tile)
    x, draft = floats(scratch.tile, TILE), floats(scratch.draft_tile, TILE)
    _score_residual(x, draft, scores.mode, scores.constants, scores.temperature, floats(scratch.weights, TILE))
    copy_tile(target.row, start, scratch.tile)
    floor = splat(max(target.floor, LOWEST))
    for i in range(0, TILE, WIDTH):
        weight = load_fp32(scratch.weights + 4 * i)
        store(scratch.weights + 4 * i, where_at_least(load_fp32(scratch.tile + 4 * i), floor, weight))


@jit
def _sum_scores(target, scores, start, scratch):
    """Sum of what :func:`_weigh_scores` writes."""
    _weigh_scores(target, scores, start, scratch)
    return sum_of_weights(scratch.weights)


@jit
def _score(constants, side, value, scaled, unit):
    """Score of one token; value: what the limits (times ``unit``) apply to, scaled: logit / temperature."""
    if value < np.float32(np.float64(read_float(constants, side + 2)) * unit):
        return 0.0
    if value > np.float32(np.float64(read_float(constants, side + 3)) * unit):
        return 1.0
    argument = scaled * np.float64(read_float(constants, side)) + np.float64(read_float(constants, side + 1))
    return 1.0 / (1.0 + math.exp(-argument)) if argument > -700.0 else 0.0


@jit
def _score_residual(x, draft, mode, constants, temperature, weights):
    """max(target score - draft score, 0) of a tile, as sigmoid(a) sigmoid(-b) (1 - exp(b - a)), which does not cancel.

    x: target logits; draft: the draft's logits or probabilities.
    """
    unit = 1.0 if mode == PROBS else temperature
    inverse = 1.0 / temperature
    draft_inverse = 1.0 if mode == PROBS else inverse
    own, own_shift = np.float64(read_float(constants, 0)), read_float(constants, 1)
    low = np.float32(np.float64(read_float(constants, 2)) * temperature)
    high = np.float32(np.float64(read_float(constants, 3)) * temperature)
    draft_low = np.float32(np.float64(read_float(constants, DRAFT_SIDE + 2)) * unit)
    draft_high = np.float32(np.float64(read_float(constants, DRAFT_SIDE + 3)) * unit)
    scale = np.float32(own * inverse)
    draft_scale = np.float32(np.float64(read_float(constants, DRAFT_SIDE)) * draft_inverse)
    draft_shift = read_float(constants, DRAFT_SIDE + 1)
    more_scale = np.float32(np.float64(read_float(constants, DIFFERENCE)) * draft_inverse)
    more_shift = read_float(constants, DIFFERENCE + 1)
    # Logits are subtracted before they are scaled, and logarithms of probabilities after.
    inside = ONE if mode == PROBS else scale
    outside = np.float32(own) if mode == PROBS else ONE
    target_unit = np.float32(inverse) if mode == PROBS else ONE
    for i in range(TILE):
        value = draft[i]
        zero = value < draft_low
        one = value > draft_high
        if mode == PROBS:
            value = _log(value)
        gap = np.float32((value - x[i] * target_unit) * inside) * outside + (value * more_scale + more_shift)
        above = x[i] > high
        above |= x[i] == INF
        zero |= value == -INF
        one |= value == INF
        score = ONE if above else _sigmoid(np.float32(x[i] * scale + own_shift))
        rest = ONE if zero else _sigmoid(np.float32(-(value * draft_scale + draft_shift)))
        factor = _one_minus_exp(gap) if gap < ZERO else ZERO
        factor = ONE if above | zero else factor
        weight = score * rest * factor
        weights[i] = ZERO if one | (x[i] < low) | (x[i] == -INF) else weight


@jit(fastmath={"contract"})
def _exp2(y):
    """2^y for y <= 0, within 2 units in the last place; 0 below 2^-125 and for NaN, which is +inf - +inf here."""
    y = y if y < ZERO else ZERO
    shifted = np.float32(y + EXP2_ROUND)
    f = y - (shifted - EXP2_ROUND)
    poly = (((((E6 * f + E5) * f + E4) * f + E3) * f + E2) * f + E1) * f + ONE
    power = np.int32(np.float32(poly).view(np.int32) + np.int32(shifted.view(np.int32) << 23)).view(np.float32)
    return power if y > EXP2_LOWEST else ZERO


@jit(fastmath={"contract"})
def _log(value):
    """Natural logarithm of a positive normal number, within 1e-7 of its size or of 1; -inf for anything smaller."""
    bits = np.float32(value).view(np.int32)
    exponent = np.int32((bits >> 23) - 126)
    mantissa = np.int32((bits & 0x007FFFFF) | 0x3F000000).view(np.float32)
    small = mantissa < SQRT_HALF
    x = (mantissa + mantissa if small else mantissa) - ONE
    e = np.float32(exponent - np.int32(small))
    square = x * x
    poly = ((((((((L0 * x + L1) * x + L2) * x + L3) * x + L4) * x + L5) * x + L6) * x + L7) * x + L8) * x * square
    log = x + (poly + LN2_LOW * e - HALF * square) + LN2_HIGH * e
    return log if value > np.float32(2e-38) else -INF


@jit
def _sigmoid(x):
    size = x if x >= ZERO else -x
    power = _exp2(np.float32(-size * LOG2_E))
    return (ONE if x >= ZERO else power) / (ONE + power)


@jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0, with full relative accuracy down to x = 0."""
    series = ONE + x * np.float32(1 / 8)
    series = ONE + x * np.float32(1 / 7) * series
    series = ONE + x * np.float32(1 / 6) * series
    series = ONE + x * np.float32(1 / 5) * series
    series = ONE + x * np.float32(1 / 4) * series
    series = ONE + x * np.float32(1 / 3) * series
    series = ONE + x * np.float32(1 / 2) * series
    return -x * series if x > -HALF else ONE - _exp2(np.float32(x * LOG2_E))


_draw_without = drawing_from(_sum_without, _weigh_without)
_draw_by_scores = drawing_from(_sum_scores, _weigh_scores)


@jit
def recover_by_scores(target, scores, token, seed, position, scratch):
    """The token that follows a rejected one."""
    uniform = draw_uniform(seed, position, RESIDUAL)
    if scores.mode == ONE_HOT:
        return _draw_without(target, place_of(target, token, scratch), uniform, scratch)
    scores = Scores(
        gather(target, scores.target, scratch.pool_raw, scratch),
        scores.mode,
        gather(target, scores.draft, scratch.pool_draft, scratch),
        scores.constants,
        scores.temperature,
    )
    return _draw_by_scores(target, scores, uniform, scratch)
