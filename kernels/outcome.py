"""What one row of a request finds: its token, or that its draft token survives or needs a residual."""

import triton
import triton.language as tl

from .bounds import CAPACITY
from .candidates import Candidates, draw_row, kept_mass
from .constants import (
    BAD_ROW,
    BLOCK,
    BUDGET,
    CARRY,
    DRAFT_SCALE,
    DRAFT_TOP,
    DRAW,
    GREEDY_BELOW,
    LOG2_E,
    NEEDS_RESIDUAL,
    NUM_CANDIDATES,
    REJECTED,
    RESIDUAL,
    ROW_COLUMNS,
    SIGMOID,
    SPENT,
    TARGET_SCALE,
    TARGET_TOP,
    THRESHOLD,
    TYPICAL,
)
from .draw import argmax_token, row_mass, token_prob
from .filters import filter_row
from .load import (
    draft_offset,
    is_filtered,
    load_logits,
    load_position,
)
from .noise import acceptance_uniform, draw_uniform
from .rules import budget, exact, sigmoid, typical


@triton.jit
def ratio_test(
    logit,
    tiles,
    draft_tiles,
    drafts,
    noise,
    request,
    pos,
    token,
    threshold,
    candidates,
    row_ptr,
    PADDED_TILES: tl.constexpr,
    RULE: tl.constexpr,
):
    """Whether a sampled draft token survives; leaves what its residual would need, and a block's rule its ratio.

    logit: The token's own, in the target's row.
    """
    row = request.start_row + pos
    scale = LOG2_E / request.temperature
    row_ptr += row * ROW_COLUMNS
    top, mass = kept_mass(tiles, candidates, row, scale, threshold, PADDED_TILES)
    target_prob, target_scale = token_prob(logit, scale, top, mass, threshold)
    if drafts.probs_ptr is not None:
        draft_prob = tl.load(drafts.probs_ptr + (row - request.index) * drafts.probs_stride + token).to(tl.float32)
    else:
        draft_top, draft_mass = row_mass(draft_tiles, row, scale, float("-inf"), PADDED_TILES)
        draft_logit = load_logits(drafts.logits_ptr, draft_offset(drafts, request, pos) + token, token >= 0)
        draft_prob, draft_scale = token_prob(draft_logit, scale, draft_top, draft_mass, float("-inf"))
        tl.store(row_ptr + DRAFT_TOP, draft_top)
        tl.store(row_ptr + DRAFT_SCALE, draft_scale)
    tl.store(row_ptr + TARGET_TOP, top)
    tl.store(row_ptr + TARGET_SCALE, target_scale)
    if RULE == BLOCK:
        ratio = target_prob / tl.where(draft_prob > 0.0, draft_prob, 1.0)
        # Finite: it is multiplied by a carry that may be 0.
        tl.store(row_ptr + CARRY, tl.where(draft_prob > 0.0, tl.minimum(ratio, 3.4e38), 0.0))
    uniform = acceptance_uniform(tl.load(noise.seeds_ptr + request.state), load_position(noise, request, pos))
    return exact.passes(uniform, target_prob, draft_prob)


@triton.jit
def _within_budget(rows, tiles, noise, request, pos, token, threshold, candidates, delta, row_ptr, PADDED_TILES):
    """Whether a chosen draft token replaces another one that its row drew; leaves what verifying it spends."""
    row = request.start_row + pos
    scale = LOG2_E / request.temperature
    top, mass = kept_mass(tiles, candidates, row, scale, threshold, PADDED_TILES)
    logit = load_logits(rows.ptr, row * rows.stride + token, token >= 0)
    prob, _inverse = token_prob(logit, scale, top, mass, threshold)
    prob = tl.minimum(prob, 1.0)
    tl.store(row_ptr + row * ROW_COLUMNS + SPENT, tl.where(token >= 0, budget.spent(prob, delta), 0.0))
    uniform = acceptance_uniform(tl.load(noise.seeds_ptr + request.state), load_position(noise, request, pos))
    return (token >= 0) & budget.passes(uniform, prob, delta)


@triton.jit
def _sampled_outcome(
    rows,
    tiles,
    draft_tiles,
    drafts,
    noise,
    request,
    pos,
    token,
    threshold,
    candidates,
    constants_ptr,
    by_rule,
    is_typical,
    delta,
    row_ptr,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    RULE: tl.constexpr,
):
    """What a row of a sampled request found: its token, or that the draft token survives or needs a residual.

    is_typical, delta: whether the rule of that name keeps the draft token, and what the request may spend on it.
    """
    outcome = tl.full((), BAD_ROW, tl.int32)
    excluded = tl.full((), -1, tl.int32)
    purpose = tl.full((), DRAW, tl.int32)
    IS_ONE_HOT: tl.constexpr = drafts.probs_ptr is None and drafts.logits_ptr is None
    is_drawn = token < 0
    if RULE == TYPICAL:
        is_drawn = is_drawn | by_rule
    if IS_ONE_HOT:
        if RULE == SIGMOID:
            is_drawn = is_drawn | (by_rule == 0)
        else:
            is_drawn = tl.full((), True, tl.int1)
    if is_drawn == 0:
        is_scored = tl.full((), False, tl.int1)
        if RULE == SIGMOID:
            is_scored = by_rule
        if is_scored:
            if RULE == SIGMOID:
                logit = load_logits(rows.ptr, (request.start_row + pos) * rows.stride + token, token >= 0)
                survives = (logit >= threshold) & sigmoid.passes(
                    rows, drafts, noise, constants_ptr, request, pos, token
                )
                outcome = tl.where(survives, token, NEEDS_RESIDUAL)
                if IS_ONE_HOT:
                    is_drawn = survives == 0
                    excluded = token
                    purpose = tl.full((), RESIDUAL, tl.int32)
        else:
            if not IS_ONE_HOT:
                survives = ratio_test(
                    load_logits(rows.ptr, (request.start_row + pos) * rows.stride + token, token >= 0),
                    tiles,
                    draft_tiles,
                    drafts,
                    noise,
                    request,
                    pos,
                    token,
                    threshold,
                    candidates,
                    row_ptr,
                    PADDED_TILES,
                    RULE,
                )
                outcome = tl.where(survives, token, NEEDS_RESIDUAL)
    if is_drawn:
        row = request.start_row + pos
        scale = LOG2_E / request.temperature
        uniform = draw_uniform(tl.load(noise.seeds_ptr + request.state), load_position(noise, request, pos), purpose)
        outcome = draw_row(
            rows.ptr + row * rows.stride,
            tiles,
            candidates,
            row,
            scale,
            threshold,
            excluded,
            uniform,
            rows.vocab_size,
            TILE,
            PADDED_TILES,
            IS_ONE_HOT and RULE == SIGMOID,
        )
        if RULE == TYPICAL:
            outcome = tl.where(is_typical & (outcome != BAD_ROW), token, outcome)
        if RULE == BUDGET:
            if by_rule:
                replaces = _within_budget(
                    rows, tiles, noise, request, pos, token, threshold, candidates, delta, row_ptr, PADDED_TILES
                )
                outcome = tl.where(replaces & (outcome != BAD_ROW), token, outcome)
        # Nothing was left without the draft token.
        outcome = tl.where((outcome == excluded) & (excluded >= 0), REJECTED - excluded, outcome)
    return outcome


@triton.jit
def find_outcome(
    rows,
    tiles,
    draft_tiles,
    drafts,
    noise,
    filters,
    request,
    pos,
    token,
    is_needed,
    by_rule,
    constants_ptr,
    delta,
    tile_list_ptr,
    candidates_ptr,
    row_ptr,
    KEY_BITS: tl.constexpr,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    RULE: tl.constexpr,
):
    """What a swept row found; BAD_ROW where it is not needed.

    tile_list_ptr, candidates_ptr: scratch of the batch's rows, None where no request filters.
    """
    IS_ONE_HOT: tl.constexpr = drafts.probs_ptr is None and drafts.logits_ptr is None
    row = request.start_row + pos
    logits_ptr = rows.ptr + row * rows.stride
    greedy = request.temperature < GREEDY_BELOW
    outcome = tl.full((), BAD_ROW, tl.int32)
    if is_needed & greedy:
        outcome = argmax_token(logits_ptr, tiles, row, rows.vocab_size, TILE, PADDED_TILES)
        # A row without a usable logit has its first token as argmax.
        outcome = tl.where((outcome == BAD_ROW) & (token == 0), 0, outcome)
    elif is_needed:
        if noise.seeds_ptr is not None:
            threshold = tl.full((), float("-inf"), tl.float32)
            candidates = Candidates(None, None, None)
            is_typical = tl.full((), False, tl.int1)
            if RULE == TYPICAL:
                if by_rule & (token >= 0):
                    # Before a filter changes the row's statistics.
                    logit = load_logits(logits_ptr, token, token >= 0)
                    scale = LOG2_E / request.temperature
                    is_typical = typical.passes(logit, tiles, row, scale, constants_ptr, PADDED_TILES)
            if tile_list_ptr is not None:
                list_ptr = tile_list_ptr + row * (tiles.count + CAPACITY)
                values_ptr = candidates_ptr + row * CAPACITY
                count = tl.full((), CAPACITY + 1, tl.int32)
                if is_filtered(filters, rows.vocab_size):
                    threshold, count = filter_row(
                        logits_ptr,
                        tiles,
                        row,
                        filters,
                        LOG2_E / request.temperature,
                        list_ptr,
                        values_ptr,
                        rows.vocab_size,
                        KEY_BITS,
                        TILE,
                        PADDED_TILES,
                    )
                    if IS_ONE_HOT:
                        tl.store(row_ptr + row * ROW_COLUMNS + THRESHOLD, threshold)
                        tl.store(row_ptr + row * ROW_COLUMNS + NUM_CANDIDATES, count.to(tl.float32))
                candidates = Candidates(values_ptr, list_ptr + tiles.count, count)
            if RULE == TYPICAL:
                is_typical = is_typical & (load_logits(logits_ptr, token, token >= 0) >= threshold)
            outcome = _sampled_outcome(
                rows,
                tiles,
                draft_tiles,
                drafts,
                noise,
                request,
                pos,
                token,
                threshold,
                candidates,
                constants_ptr,
                by_rule,
                is_typical,
                delta,
                row_ptr,
                TILE,
                PADDED_TILES,
                RULE,
            )
            # The same store earlier costs registers that the filters need.
            if not IS_ONE_HOT:
                tl.store(row_ptr + row * ROW_COLUMNS + THRESHOLD, threshold)
                if candidates.values_ptr is not None:
                    tl.store(row_ptr + row * ROW_COLUMNS + NUM_CANDIDATES, candidates.count.to(tl.float32))
    return outcome
