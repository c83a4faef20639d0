"""From statistics to tokens: one program per row finds its token, the last one of a request writes the output.

The token of a row is a function of (seed, absolute position, logits, sampling parameters) alone. A draft token that
was chosen, not sampled, survives where it is that token. One that was sampled is tested by the ratio of its
probabilities; where it fails, the token that replaces it comes from the residual (``residual.py``).
"""

import triton
import triton.language as tl

from .constants import (
    BUDGET,
    SIGMOID,
    UNALIGNED,
)
from .load import (
    Drafts,
    Noise,
    Rows,
    Tiles,
    follows_rule,
    is_filtered,
    load_draft_token,
    load_filters,
    load_request,
)
from .outcome import find_outcome
from .output import Output, end_request, load_outcomes
from .rules import budget, sigmoid


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
    constants_ptr,  # the rule's constants, or None
    rule_requests_ptr,  # [max_reqs] or None
    tile_max_ptr,  # [num_rows, num_tiles], see statistics.py
    tile_sum_ptr,  # [num_rows, num_tiles]; of rows with a filter it becomes that of what is kept
    tile_entropy_ptr,  # [num_rows, num_tiles] or None
    draft_tile_max_ptr,  # [num_rows, num_tiles] or None
    draft_tile_sum_ptr,  # [num_rows, num_tiles] or None
    tile_list_ptr,  # [num_rows, num_tiles + CAPACITY] scratch: tiles, then ids of candidates; None where none filters
    candidates_ptr,  # [num_rows, CAPACITY] scratch: their logits, or None
    outcome_ptr,  # [num_rows] scratch: what each row found
    row_ptr,  # [num_rows, ROW_COLUMNS] out: what a residual or an audit needs; None where none filters or is sampled
    arrived_ptr,  # [num_reqs, 2] zeros, then [num_rows] out: zeros for an audit
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
    KEY_BITS: tl.constexpr,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RULE: tl.constexpr,
):
    """One program per (row, request)."""
    pos, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    request = load_request(index, cu_num_logits_ptr, state_indices_ptr, temperature_ptr)
    num_drafts = request.num_drafts
    if pos > num_drafts:
        return
    rows = Rows(logits_ptr, logits_stride, vocab_size)
    tiles = Tiles(tile_max_ptr, tile_sum_ptr, tile_entropy_ptr, num_tiles)
    draft_tiles = Tiles(draft_tile_max_ptr, draft_tile_sum_ptr, None, num_tiles)
    drafts = Drafts(
        draft_token_ids_ptr,
        draft_probs_ptr,
        draft_probs_stride,
        draft_logits_ptr,
        draft_logits_stride_0,
        draft_logits_stride_1,
    )
    noise = Noise(seeds_ptr, positions_ptr)
    row = request.start_row + pos
    token = load_draft_token(drafts, request, pos, vocab_size, COMPACT_DRAFTS)
    by_rule = follows_rule(request, rule_requests_ptr, RULE)
    delta = tl.full((), 0.0, tl.float32)
    if RULE == BUDGET:
        delta = budget.delta_of(request, constants_ptr, rule_requests_ptr)
    filters = load_filters(top_k_ptr, top_p_ptr, min_p_ptr, request.state)
    swept = tl.full((), 0, tl.int32)
    is_needed = tl.full((), True, tl.int1)
    if bonus_token_ids_ptr is not None:
        is_needed = pos < num_drafts
    if RULE == SIGMOID:
        if by_rule & (is_filtered(filters, vocab_size) == 0):
            # One row was swept; those behind it are not needed.
            swept = tl.full((), 1, tl.int32)
            emitting = sigmoid.first_rejection(rows, drafts, noise, constants_ptr, request, COMPACT_DRAFTS, BLOCK_K)
            is_needed = is_needed & (pos <= emitting)
    outcome = find_outcome(
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
        KEY_BITS,
        TILE,
        PADDED_TILES,
        RULE,
    )
    tl.store(outcome_ptr + row, outcome)
    tl.store(arrived_ptr + 2 * tl.num_programs(1) + row, 0)

    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr + 2 * index, 1, sem="acq_rel") == num_drafts:
        tl.debug_barrier()
        end_request(
            request,
            noise,
            Output(
                token_ids_ptr,
                token_ids_stride,
                num_sampled_ptr,
                bonus_token_ids_ptr,
                bad_row_counter_ptr,
                counters_ptr,
            ),
            draft_token_ids_ptr,
            load_outcomes(request, outcome_ptr, BLOCK_K),
            row_ptr,
            pending_ptr,
            by_rule,
            swept,
            rows_per_req,
            vocab_size,
            COMPACT_DRAFTS,
            BLOCK_K,
            RULE,
        )
