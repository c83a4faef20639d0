"""The last step of a request: how many draft tokens survive, its tokens, and its counters."""

import triton
import triton.language as tl

from .constants import BAD_ROW, NEEDS_RESIDUAL, REJECTED


@triton.jit
def write_request(
    request,
    draft_token_ids_ptr,
    outcome_ptr,
    bonus_token_ids_ptr,
    pending_ptr,
    token_ids_ptr,
    token_ids_stride,
    num_sampled_ptr,
    bad_row_counter_ptr,
    counters_ptr,
    method,
    swept,
    width,
    COMPACT_DRAFTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Accepted draft tokens, the token of the first row that did not accept, then -1.

    ``outcome_ptr``: the token each row found. A draft token survives where it is its row's. swept: rows read in full;
    0 stands for all of them. Leaves in ``pending_ptr`` the position of a row whose residual must be drawn from, or -1.
    """
    req_idx = request.index
    start_row = request.start_row
    num_drafts = request.num_drafts
    columns = tl.arange(0, BLOCK_K)
    draft_start = start_row - req_idx if COMPACT_DRAFTS else start_row + 1
    is_draft = columns < num_drafts
    drafts = tl.load(draft_token_ids_ptr + draft_start + columns, mask=is_draft, other=-1).to(tl.int64)
    outcomes = tl.load(outcome_ptr + start_row + columns, mask=columns <= num_drafts, other=BAD_ROW).to(tl.int64)
    survives = is_draft & (drafts == outcomes) & (drafts >= 0)
    num_accepted = tl.min(tl.where(is_draft & (survives == 0), columns, num_drafts), axis=0)
    token = tl.sum(tl.where(columns == num_accepted, outcomes, 0), axis=0)
    token = tl.where(token <= REJECTED, REJECTED - token, token)
    if bonus_token_ids_ptr is not None:
        if num_accepted == num_drafts:
            token = tl.load(bonus_token_ids_ptr + req_idx).to(tl.int64)
    if pending_ptr is not None:
        tl.store(pending_ptr + req_idx, tl.where(token == NEEDS_RESIDUAL, num_accepted, -1))
    if bad_row_counter_ptr is not None:
        tl.atomic_add(bad_row_counter_ptr, 1, mask=token == BAD_ROW, sem="relaxed")
    token = tl.maximum(token, 0)
    tokens = tl.where(columns < num_accepted, drafts, tl.where(columns == num_accepted, token, -1))
    tl.store(token_ids_ptr + req_idx * token_ids_stride + columns, tokens, mask=columns < width)
    tl.store(num_sampled_ptr + req_idx, num_accepted + 1)
    if counters_ptr is not None:
        num_rows = num_drafts + 1
        all_accepted = num_accepted == num_drafts
        read = tl.where(swept == 0, num_rows, swept)
        if bonus_token_ids_ptr is not None:
            read = read - tl.where((swept == 0) | all_accepted, 1, 0)
        places = tl.arange(0, 8)
        values = tl.where(places == 0, num_accepted, 0)
        values = tl.where((places == 1) & (all_accepted == 0), 1, values)
        values = tl.where((places == 2) & all_accepted & (num_drafts > 0), 1, values)
        values = tl.where(places == 3, read, values)
        values = tl.where(places == 4, num_rows - read, values)
        tl.atomic_add(counters_ptr + 8 * method + places, values.to(tl.int64), mask=values > 0, sem="relaxed")
