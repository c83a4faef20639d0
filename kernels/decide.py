"""From statistics to tokens: one program per row finds its token, the last one of a request writes the output.

The token of a row is a function of (seed, absolute position, logits, sampling parameters) alone. A draft token that
was chosen, not sampled, survives where it is that token. One that was sampled is tested by the ratio of its
probabilities; where it fails, the token that replaces it comes from the residual (``residual.py``).
"""

import triton
import triton.language as tl

from .constants import (
    BAD_ROW,
    DRAFT_SCALE,
    DRAFT_TOP,
    DRAW,
    GREEDY_BELOW,
    LOG2_E,
    NEEDS_RESIDUAL,
    REJECTED,
    RESIDUAL,
    ROW_COLUMNS,
    TARGET_SCALE,
    TARGET_TOP,
    THRESHOLD,
    UNALIGNED,
)
from .draw import argmax_token, draw_token, row_mass, token_weight
from .filters import filter_row
from .load import Tiles, is_filtered, load_filters, load_logits, load_state
from .noise import acceptance_uniform, draw_uniform
from .output import write_request
from .rules.exact import passes
from .rules.sigmoid import first_rejection, passes_alone, uses_sigmoid


@triton.jit(
    do_not_specialize=["num_tiles", "rows_per_req", "token_ids_stride"], do_not_specialize_on_alignment=UNALIGNED
)
def decide_kernel(
    logits_ptr,  # [num_rows, vocab]
    logits_stride,
    cu_num_logits_ptr,  # [num_reqs + 1]
    draft_token_ids_ptr,  # [num_rows] or [num_rows - num_reqs]
    state_indices_ptr,  # [num_reqs] or None
    temperature_ptr,  # [max_reqs] or None
    seeds_ptr,  # [max_reqs] or None
    positions_ptr,  # [num_rows] or None
    draft_probs_ptr,  # [num_rows - num_reqs, draft_vocab] or None
    draft_probs_stride,
    draft_logits_ptr,  # [max_reqs, max_drafts, draft_vocab] or None
    draft_logits_stride_0,
    draft_logits_stride_1,
    top_k_ptr,  # [max_reqs] or None
    top_p_ptr,  # [max_reqs] or None
    min_p_ptr,  # [max_reqs] or None
    bonus_token_ids_ptr,  # [num_reqs] or None
    sigmoid_ptr,  # [10] or None
    sigmoid_requests_ptr,  # [max_reqs] or None
    tile_max_ptr,  # [num_rows, num_tiles], see statistics.py
    tile_sum_ptr,  # [num_rows, num_tiles]; of rows with a filter it becomes that of what is kept
    draft_tile_max_ptr,  # [num_rows, num_tiles] or None
    draft_tile_sum_ptr,  # [num_rows, num_tiles] or None
    tile_list_ptr,  # [num_rows, num_tiles] scratch, or None where no request filters
    candidates_ptr,  # [num_rows, CAPACITY] scratch, or None
    outcome_ptr,  # [num_rows] scratch: the token of each row
    row_ptr,  # [num_rows, ROW_COLUMNS] out: what the residual needs, or None
    arrived_ptr,  # [num_reqs, 2] zeros
    pending_ptr,  # [num_reqs] out: position of the row to draw a residual from, -1 if none; or None
    token_ids_ptr,  # [num_reqs, max_num_draft_tokens + 1] out
    token_ids_stride,
    num_sampled_ptr,  # [num_reqs] out
    bad_row_counter_ptr,  # [1] or None
    counters_ptr,  # [num_methods, 8] or None
    vocab_size,
    num_tiles,
    rows_per_req,
    COMPACT_DRAFTS: tl.constexpr,
    KEY_STEP: tl.constexpr,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per (request, row)."""
    req_idx = (tl.program_id(0) // rows_per_req).to(tl.int64)
    pos = tl.program_id(0) % rows_per_req
    start_row = tl.load(cu_num_logits_ptr + req_idx).to(tl.int64)
    num_drafts = (tl.load(cu_num_logits_ptr + req_idx + 1) - start_row - 1).to(tl.int32)
    if pos > num_drafts:
        return
    state = load_state(state_indices_ptr, req_idx)
    temp = tl.full((), 0.0, tl.float32) if temperature_ptr is None else tl.load(temperature_ptr + state)
    scale = LOG2_E / temp
    row = start_row + pos
    logits_row_ptr = logits_ptr + row * logits_stride
    tiles = Tiles(tile_max_ptr, tile_sum_ptr, num_tiles)
    is_bonus = pos == num_drafts
    token = tl.full((), -1, tl.int32)
    if not is_bonus:
        offset = row - req_idx if COMPACT_DRAFTS else row + 1
        draft = tl.load(draft_token_ids_ptr + offset).to(tl.int64)
        token = tl.where((draft >= 0) & (draft < vocab_size), draft, -1).to(tl.int32)

    outcome = tl.full((), BAD_ROW, tl.int32)
    greedy = temp < GREEDY_BELOW
    by_scores = uses_sigmoid(sigmoid_ptr, sigmoid_requests_ptr, state) & (greedy == 0)
    swept = tl.full((), 0, tl.int32)
    is_given = tl.full((), bonus_token_ids_ptr is not None, tl.int1) & is_bonus
    if is_given:
        outcome = tl.full((), 0, tl.int32)
    elif greedy:
        outcome = argmax_token(logits_row_ptr, tiles, row, vocab_size, TILE, PADDED_TILES)
        # The first of equals is token 0, as an argmax has it.
        outcome = tl.where((outcome == BAD_ROW) & (token == 0), 0, outcome)
    if (greedy | is_given) == 0:
        seed = tl.load(seeds_ptr + state)
        position = pos.to(tl.int64)
        if positions_ptr is not None:
            position = tl.load(positions_ptr + row).to(tl.int64)
        threshold = tl.full((), float("-inf"), tl.float32)
        filtered = tl.full((), 0, tl.int32) != 0
        if tile_list_ptr is not None:
            filters = load_filters(top_k_ptr, top_p_ptr, min_p_ptr, state)
            filtered = is_filtered(filters, vocab_size)
            if filtered:
                threshold = filter_row(
                    logits_row_ptr,
                    tiles,
                    row,
                    filters,
                    scale,
                    tile_list_ptr + row * num_tiles,
                    candidates_ptr + row * 1024,
                    vocab_size,
                    KEY_STEP,
                    TILE,
                    PADDED_TILES,
                )
        logit = load_logits(logits_row_ptr, token, token >= 0)
        draws = tl.full((), 1, tl.int32) != 0
        excluded = tl.full((), -1, tl.int32)
        purpose = tl.full((), DRAW, tl.int32)
        if sigmoid_ptr is not None:
            if by_scores & (token >= 0):
                draft_value = tl.full((), 0.0, tl.float32)
                if draft_probs_ptr is not None:
                    draft_value = tl.load(draft_probs_ptr + (row - req_idx) * draft_probs_stride + token).to(tl.float32)
                elif draft_logits_ptr is not None:
                    draft_offset = state * draft_logits_stride_0 + pos.to(tl.int64) * draft_logits_stride_1
                    draft_value = tl.load(draft_logits_ptr + draft_offset + token).to(tl.float32)
                survives = (logit >= threshold) & passes_alone(
                    logit,
                    draft_value,
                    temp,
                    acceptance_uniform(seed, position),
                    sigmoid_ptr,
                    draft_probs_ptr is not None,
                    draft_logits_ptr is not None,
                )
                draws = survives == 0
                outcome = tl.where(survives, token, NEEDS_RESIDUAL)
                if (draft_probs_ptr is None) & (draft_logits_ptr is None):
                    excluded = token
                    purpose = tl.full((), RESIDUAL, tl.int32)
                else:
                    draws = tl.full((), 0, tl.int32) != 0
                    tl.store(row_ptr + row * ROW_COLUMNS + THRESHOLD, threshold)
            if by_scores & (filtered == 0):
                swept = tl.full((), 1, tl.int32)
                emitting = first_rejection(
                    logits_ptr,
                    logits_stride,
                    draft_token_ids_ptr,
                    draft_probs_ptr,
                    draft_probs_stride,
                    draft_logits_ptr,
                    draft_logits_stride_0,
                    draft_logits_stride_1,
                    seeds_ptr,
                    positions_ptr,
                    sigmoid_ptr,
                    req_idx,
                    state,
                    start_row,
                    num_drafts,
                    temp,
                    vocab_size,
                    COMPACT_DRAFTS,
                    BLOCK_K,
                )
                # No other row was swept.
                draws = draws & (pos == emitting)
        if (draft_probs_ptr is not None) | (draft_logits_ptr is not None):
            if (by_scores == 0) & (token >= 0):
                draws = tl.full((), 0, tl.int32) != 0
                top, mass = row_mass(tiles, row, scale, threshold, PADDED_TILES)
                target_scale = (1.0 / tl.where(mass > 0.0, mass, 1.0)).to(tl.float32)
                target_prob = token_weight(logit, scale, top, threshold) * target_scale
                target_prob = tl.where(mass > 0.0, target_prob, 0.0)
                if draft_probs_ptr is not None:
                    draft_prob = tl.load(draft_probs_ptr + (row - req_idx) * draft_probs_stride + token).to(tl.float32)
                else:
                    draft_offset = state * draft_logits_stride_0 + pos.to(tl.int64) * draft_logits_stride_1
                    draft_tiles = Tiles(draft_tile_max_ptr, draft_tile_sum_ptr, num_tiles)
                    draft_top, mass = row_mass(draft_tiles, row, scale, float("-inf"), PADDED_TILES)
                    draft_scale = (1.0 / tl.where(mass > 0.0, mass, 1.0)).to(tl.float32)
                    draft_logit = load_logits(draft_logits_ptr + draft_offset, token, token >= 0)
                    draft_prob = token_weight(draft_logit, scale, draft_top, float("-inf")) * draft_scale
                    draft_prob = tl.where(mass > 0.0, draft_prob, 0.0)
                    tl.store(row_ptr + row * ROW_COLUMNS + DRAFT_TOP, draft_top)
                    tl.store(row_ptr + row * ROW_COLUMNS + DRAFT_SCALE, draft_scale)
                tl.store(row_ptr + row * ROW_COLUMNS + THRESHOLD, threshold)
                tl.store(row_ptr + row * ROW_COLUMNS + TARGET_TOP, top)
                tl.store(row_ptr + row * ROW_COLUMNS + TARGET_SCALE, target_scale)
                survives = passes(acceptance_uniform(seed, position), target_prob, draft_prob)
                outcome = tl.where(survives, token, NEEDS_RESIDUAL)
        if draws:
            outcome = draw_token(
                logits_row_ptr,
                tiles,
                row,
                scale,
                threshold,
                excluded,
                draw_uniform(seed, position, purpose),
                vocab_size,
                TILE,
                PADDED_TILES,
                sigmoid_ptr is not None,
            )
            if sigmoid_ptr is not None:
                if (outcome == BAD_ROW) & (excluded >= 0):
                    # Nothing is left without the draft token.
                    outcome = draw_token(
                        logits_row_ptr,
                        tiles,
                        row,
                        scale,
                        threshold,
                        tl.full((), -1, tl.int32),
                        draw_uniform(seed, position, purpose),
                        vocab_size,
                        TILE,
                        PADDED_TILES,
                        False,
                    )
                    outcome = tl.where(outcome == token, REJECTED - token, outcome)
    tl.store(outcome_ptr + row, outcome)

    tl.debug_barrier()
    arrived = tl.atomic_add(arrived_ptr + 2 * req_idx, 1, sem="acq_rel")
    if arrived == num_drafts:
        tl.debug_barrier()
        write_request(
            req_idx,
            start_row,
            num_drafts,
            draft_token_ids_ptr,
            outcome_ptr,
            bonus_token_ids_ptr,
            pending_ptr,
            token_ids_ptr,
            token_ids_stride,
            num_sampled_ptr,
            bad_row_counter_ptr,
            counters_ptr,
            by_scores.to(tl.int32),
            swept,
            rows_per_req,
            COMPACT_DRAFTS,
            BLOCK_K,
        )
