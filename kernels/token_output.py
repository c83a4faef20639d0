"""The last step: each request's tokens, from its candidates of every vocabulary tile."""

import triton
import triton.language as tl

from .arguments import UNALIGNED

# Added to a candidate of a tile that holds +inf, which rules out the candidates of other tiles.
INF_FLAG = tl.constexpr(1 << 30)
NO_TOKEN = tl.constexpr(2147483647)


@triton.jit
def _best_candidate(score_ptr, token_ptr, req_idx, num_tiles, PADDED_TILES: tl.constexpr):
    """Token with the largest score over the tiles, first one on a tie; and whether there was any."""
    tiles = tl.arange(0, PADDED_TILES)
    mask = tiles < num_tiles
    scores = tl.load(score_ptr + req_idx * num_tiles + tiles, mask=mask, other=float("-inf"))
    tokens = tl.load(token_ptr + req_idx * num_tiles + tiles, mask=mask, other=0)
    flagged = tokens >= INF_FLAG
    any_flagged = tl.max(flagged.to(tl.int32), axis=0) == 1
    scores = tl.where(any_flagged & (flagged == 0), float("-inf"), scores)
    best = tl.max(scores, axis=0)
    tokens = tl.where(flagged, tokens - INF_FLAG, tokens)
    return tl.min(tl.where(mask & (scores == best), tokens, NO_TOKEN), axis=0), best > float("-inf")


@triton.jit(do_not_specialize=["num_tiles", "width", "token_ids_stride"], do_not_specialize_on_alignment=UNALIGNED)
def token_output_kernel(
    token_ids_ptr,  # [num_reqs, max_num_draft_tokens + 1] out
    token_ids_stride,
    num_sampled_ptr,  # [num_reqs] out
    num_accepted_ptr,  # [num_reqs]
    candidate_score_ptr,  # [num_reqs, num_tiles]
    candidate_token_ptr,  # [num_reqs, num_tiles]
    target_score_ptr,  # [num_reqs, num_tiles] or None
    target_token_ptr,  # [num_reqs, num_tiles] or None
    bonus_token_ids_ptr,  # [num_reqs] or None
    bad_row_counter_ptr,  # [1] or None
    cu_num_logits_ptr,  # [num_reqs + 1]
    draft_token_ids_ptr,  # [num_rows] or [num_rows - num_reqs]
    num_tiles,
    width,
    COMPACT_DRAFTS: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    PADDED_WIDTH: tl.constexpr,
):
    """One program per request: accepted draft tokens, the best candidate, then -1."""
    req_idx = tl.program_id(0).to(tl.int64)
    start_row = tl.load(cu_num_logits_ptr + req_idx).to(tl.int64)
    num_drafts = (tl.load(cu_num_logits_ptr + req_idx + 1) - start_row - 1).to(tl.int32)
    num_accepted = tl.load(num_accepted_ptr + req_idx)
    token, found = _best_candidate(candidate_score_ptr, candidate_token_ptr, req_idx, num_tiles, PADDED_TILES)
    if target_score_ptr is not None:
        target_token, target_found = _best_candidate(
            target_score_ptr, target_token_ptr, req_idx, num_tiles, PADDED_TILES
        )
        token = tl.where(found, token, target_token)
        found = found | target_found
    token = tl.where(found, token, 0).to(tl.int64)
    counted = not found
    if bonus_token_ids_ptr is not None:  # noqa: SIM102 (the pointer test is made at compile time)
        if num_accepted == num_drafts:
            token = tl.load(bonus_token_ids_ptr + req_idx).to(tl.int64)
            counted = tl.full((), False, tl.int1)
    if bad_row_counter_ptr is not None:
        tl.atomic_add(bad_row_counter_ptr, 1, mask=counted)

    columns = tl.arange(0, PADDED_WIDTH)
    draft_start = start_row - req_idx if COMPACT_DRAFTS else start_row + 1
    accepted = columns < num_accepted
    drafts = tl.load(draft_token_ids_ptr + draft_start + columns, mask=accepted, other=-1).to(tl.int64)
    tokens = tl.where(accepted, drafts, tl.where(columns == num_accepted, token, -1))
    tl.store(token_ids_ptr + req_idx * token_ids_stride + columns, tokens, mask=columns < width)
    tl.store(num_sampled_ptr + req_idx, num_accepted + 1)
