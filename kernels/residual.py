"""The token that replaces a rejected sampled draft: inversion of the residual of one pair of rows per request.

Every program adds up its tiles' residual; the last one of a request picks a tile, and then a token within it.
"""

import triton
import triton.language as tl

from .bounds import CAPACITY
from .candidates import Candidates, draw_row
from .constants import (
    BAD_ROW,
    BLOCK,
    CARRY,
    DRAFT_SCALE,
    DRAFT_TOP,
    LOG2_E,
    NO_TOKEN,
    NUM_CANDIDATES,
    RESIDUAL,
    ROW_COLUMNS,
    SIGMOID,
    TARGET_SCALE,
    TARGET_TOP,
    THRESHOLD,
    UNALIGNED,
)
from .draw import pick, row_maximum
from .load import (
    Noise,
    Tiles,
    exp2,
    follows_rule,
    load_logits,
    load_position,
    load_request,
    row_shift,
    weights,
)
from .noise import draw_uniform
from .output import Output, load_drafts, write_tokens
from .rules import block, exact, sigmoid


@triton.jit
def _exact_residual(x, y, scale, row_ptr, DRAFT_IS_PROBS: tl.constexpr, RULE: tl.constexpr):
    """Residual of a block of logits ``x`` and draft logits or probabilities ``y``, times the target row's mass.

    Where blocks are verified it is that of the target's probabilities times the prefix's carry, over the carry.
    """
    top = tl.load(row_ptr + TARGET_TOP)
    shift = row_shift(top, scale)
    inverse = tl.load(row_ptr + TARGET_SCALE)
    if DRAFT_IS_PROBS:
        draft_top = tl.full((), 0.0, tl.float32)
        ratio = 1.0 / inverse
        draft = tl.maximum(y, 0.0)
    else:
        draft_top = tl.load(row_ptr + DRAFT_TOP)
        ratio = tl.load(row_ptr + DRAFT_SCALE) / inverse
        draft = weights(y, scale, row_shift(draft_top, scale))
    if RULE == BLOCK:
        ratio = ratio / tl.load(row_ptr + CARRY)
    # NaN becomes 0 in the residual's maximum.
    result = exact.residual(exp2(tl.fma(x, scale, tl.zeros_like(x) - shift)), draft, ratio)
    if (top == float("inf")) | (draft_top == float("inf")):
        target = weights(x, scale, shift)
        if top == float("inf"):
            target = (x == float("inf")).to(tl.float32)
        if draft_top == float("inf"):
            draft = (y == float("inf")).to(tl.float32)
        result = exact.residual(target, draft, ratio)
    return result


@triton.jit
def tile_residual(
    tile,
    logits_row_ptr,
    draft_probs_row_ptr,
    draft_logits_row_ptr,
    row_ptr,
    constants_ptr,
    temp,
    scale,
    row_top,
    by_rule,
    vocab_size,
    TILE: tl.constexpr,
    RULE: tl.constexpr,
):
    """Residual weights of a tile, ``[TILE]``."""
    token_ids = tile * TILE + tl.arange(0, TILE)
    mask = token_ids < vocab_size
    x = load_logits(logits_row_ptr, token_ids, mask)
    if draft_probs_row_ptr is not None:
        y = tl.load(draft_probs_row_ptr + token_ids, mask=mask, other=0.0).to(tl.float32)
    else:
        y = load_logits(draft_logits_row_ptr, token_ids, mask)
    threshold = tl.load(row_ptr + THRESHOLD)
    kept = x >= threshold
    result = tl.zeros([TILE], tl.float32)
    is_scored = tl.full((), False, tl.int1)
    if RULE == SIGMOID:
        is_scored = by_rule
    if is_scored:
        if RULE == SIGMOID:
            result = sigmoid.residual(x, y, temp, row_top, constants_ptr, draft_probs_row_ptr is not None)
    else:
        result = _exact_residual(x, y, scale, row_ptr, draft_probs_row_ptr is not None, RULE)
    return tl.where(kept, result, 0.0), token_ids


@triton.jit
def _end_of_block(noise, request, masses_ptr, row_ptr, num_tiles, PADDED_TILES: tl.constexpr):
    """How many tokens a request keeps, given the residual masses of its rows that were read again."""
    kept = tl.full((), 0, tl.int32)
    tile_ids = tl.arange(0, PADDED_TILES)
    for length in range(request.num_drafts):
        row = request.start_row + length
        carry = tl.load(row_ptr + row * ROW_COLUMNS + CARRY)
        if carry > 0.0:
            offsets = row * num_tiles + tile_ids
            masses = tl.load(masses_ptr + offsets, mask=tile_ids < num_tiles, other=0.0).to(tl.float64)
            inverse = tl.load(row_ptr + row * ROW_COLUMNS + TARGET_SCALE)
            mass = tl.sum(masses, axis=0).to(tl.float32) * inverse * carry
            if block.may_stand(carry, mass, block.prefix_uniform(noise, request, tl.zeros_like(kept) + length)):
                kept = tl.zeros_like(kept) + length
    return kept


@triton.jit(
    do_not_specialize=["num_tiles", "num_row_tiles", "rows_per_req", "token_ids_stride"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def residual_kernel(
    logits_ptr,  # [num_rows, vocab]
    logits_stride,
    cu_num_logits_ptr,  # [num_reqs + 1]
    draft_token_ids_ptr,  # [num_rows] or [num_rows - num_reqs]
    state_indices_ptr,  # [num_reqs] or None
    temperature_ptr,  # [max_reqs]
    seeds_ptr,  # [max_reqs]
    positions_ptr,  # [num_rows] or None
    draft_probs_ptr,  # [num_rows - num_reqs, draft_vocab] or None
    draft_probs_stride,
    draft_logits_ptr,  # [max_reqs, max_drafts, draft_vocab] or None
    draft_logits_stride_0,
    draft_logits_stride_1,
    bonus_token_ids_ptr,  # [num_reqs] or None
    constants_ptr,  # the rule's constants, or None
    rule_requests_ptr,  # [max_reqs] or None
    tile_max_ptr,  # [num_rows, num_row_tiles], see statistics.py
    tile_sum_ptr,  # [num_rows, num_row_tiles]
    tile_list_ptr,  # [num_rows, num_row_tiles + CAPACITY], see decide.py; None where no request filters
    candidates_ptr,  # [num_rows, CAPACITY], or None
    residual_ptr,  # [num_reqs, num_tiles] scratch; [num_rows, num_tiles] where blocks are verified
    row_ptr,  # [num_rows, ROW_COLUMNS], see decide.py
    arrived_ptr,  # [num_reqs, 2]
    pending_ptr,  # [num_reqs], see output.py
    token_ids_ptr,  # [num_reqs, max_num_draft_tokens + 1] out
    token_ids_stride,
    num_sampled_ptr,  # [num_reqs] out
    bad_row_counter_ptr,  # [1] or None
    counters_ptr,  # [num_methods, 8] or None
    vocab_size,
    num_tiles,
    num_row_tiles,
    rows_per_req,
    COMPACT_DRAFTS: tl.constexpr,
    TILE: tl.constexpr,
    STEPS: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    ROW_TILE: tl.constexpr,
    PADDED_ROW_TILES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RULE: tl.constexpr,
):
    """One program per (group of STEPS tiles, row, request); the row's statistics may have tiles of another size.

    One row per request, the rejected one; where blocks are verified one per draft token, of which few are needed.
    """
    group, req_idx = tl.program_id(0), tl.program_id(2).to(tl.int64)
    pending = tl.load(pending_ptr + req_idx)
    pos = pending
    expected = tl.num_programs(0)
    is_needed = pos >= 0
    if RULE == BLOCK:
        # Rows of other requests, and those that are settled, have nothing there.
        pos = tl.program_id(1)
        expected = tl.num_programs(0) * pending
        place = (tl.load(cu_num_logits_ptr + req_idx).to(tl.int64) + pos) * ROW_COLUMNS + CARRY
        num_rows = tl.load(cu_num_logits_ptr + req_idx + 1) - tl.load(cu_num_logits_ptr + req_idx)
        is_needed = (pending > 0) & (pos + 1 < num_rows)
        is_needed = tl.load(row_ptr + place, mask=is_needed, other=0.0) > 0.0
    if is_needed == 0:
        return
    request = load_request(req_idx, cu_num_logits_ptr, state_indices_ptr, temperature_ptr)
    state = request.state
    temp = request.temperature
    scale = LOG2_E / temp
    row = request.start_row + pos
    all_rows_ptr = row_ptr
    row_ptr += row * ROW_COLUMNS
    by_rule = follows_rule(request, rule_requests_ptr, RULE)
    noise = Noise(seeds_ptr, positions_ptr)
    logits_row_ptr = logits_ptr + row * logits_stride
    draft_probs_row_ptr = None
    draft_logits_row_ptr = None
    if draft_probs_ptr is not None:
        draft_probs_row_ptr = draft_probs_ptr + (row - req_idx) * draft_probs_stride
    else:
        draft_logits_row_ptr = (
            draft_logits_ptr + state * draft_logits_stride_0 + pos.to(tl.int64) * draft_logits_stride_1
        )
    tiles = Tiles(tile_max_ptr, tile_sum_ptr, None, num_row_tiles)
    row_top = tl.full((), 0.0, tl.float32)
    if RULE == SIGMOID:
        row_top = row_maximum(tiles, row, PADDED_ROW_TILES)

    steps = tl.arange(0, STEPS)
    sums = tl.zeros([STEPS], tl.float32)
    for step in range(STEPS):
        w, _token_ids = tile_residual(
            group * STEPS + step,
            logits_row_ptr,
            draft_probs_row_ptr,
            draft_logits_row_ptr,
            row_ptr,
            constants_ptr,
            temp,
            scale,
            row_top,
            by_rule,
            vocab_size,
            TILE,
            RULE,
        )
        sums = tl.where(steps == step, tl.sum(w, axis=0), sums)
    places = group * STEPS + steps
    own = row if RULE == BLOCK else req_idx
    tl.store(residual_ptr + own * num_tiles + places, sums, mask=places < num_tiles)

    tl.debug_barrier()
    arrived = tl.atomic_add(arrived_ptr + 2 * req_idx + 1, 1, sem="acq_rel")
    if arrived == expected - 1:
        tl.debug_barrier()
        if RULE == BLOCK:
            pos = _end_of_block(noise, request, residual_ptr, all_rows_ptr, num_tiles, PADDED_TILES)
            row = request.start_row + pos
            own = row
            row_ptr = all_rows_ptr + row * ROW_COLUMNS
            logits_row_ptr = logits_ptr + row * logits_stride
            if draft_probs_ptr is not None:
                draft_probs_row_ptr = draft_probs_ptr + (row - req_idx) * draft_probs_stride
            else:
                draft_logits_row_ptr = (
                    draft_logits_ptr + state * draft_logits_stride_0 + pos.to(tl.int64) * draft_logits_stride_1
                )
        uniform = draw_uniform(tl.load(seeds_ptr + state), load_position(noise, request, pos), RESIDUAL)
        tile_ids = tl.arange(0, PADDED_TILES)
        masses = tl.load(residual_ptr + own * num_tiles + tile_ids, mask=tile_ids < num_tiles, other=0.0)
        masses = masses.to(tl.float64)
        tile, share = pick(masses, tile_ids, uniform * tl.sum(masses, axis=0))
        if tile != NO_TOKEN:
            w, token_ids = tile_residual(
                tile,
                logits_row_ptr,
                draft_probs_row_ptr,
                draft_logits_row_ptr,
                row_ptr,
                constants_ptr,
                temp,
                scale,
                row_top,
                by_rule,
                vocab_size,
                TILE,
                RULE,
            )
            fine = w.to(tl.float64)
            token, _share = pick(fine, token_ids, share * tl.sum(fine, axis=0))
        else:
            # An empty residual: the full target row takes its place.
            candidates = Candidates(None, None, None)
            if candidates_ptr is not None:
                ids_ptr = tile_list_ptr + row * (num_row_tiles + CAPACITY) + num_row_tiles
                count = tl.load(row_ptr + NUM_CANDIDATES).to(tl.int32)
                candidates = Candidates(candidates_ptr + row * CAPACITY, ids_ptr, count)
            token = draw_row(
                logits_row_ptr,
                tiles,
                candidates,
                row,
                scale,
                tl.load(row_ptr + THRESHOLD),
                tl.full((), -1, tl.int32),
                uniform,
                vocab_size,
                ROW_TILE,
                PADDED_ROW_TILES,
                False,
            )
        if RULE == BLOCK:
            output = Output(
                token_ids_ptr,
                token_ids_stride,
                num_sampled_ptr,
                bonus_token_ids_ptr,
                bad_row_counter_ptr,
                counters_ptr,
            )
            drafts = load_drafts(request, draft_token_ids_ptr, COMPACT_DRAFTS, BLOCK_K)
            swept = tl.full((), 0, tl.int32)
            write_tokens(
                request, output, drafts, pos, token.to(tl.int64), by_rule, swept, 0.0, rows_per_req, BLOCK_K, RULE
            )
        else:
            if bad_row_counter_ptr is not None:
                tl.atomic_add(bad_row_counter_ptr, 1, mask=token == BAD_ROW, sem="relaxed")
            tl.store(token_ids_ptr + req_idx * token_ids_stride + pos, tl.maximum(token, 0).to(tl.int64))
