"""From row statistics to candidates: where each request stops, and which tokens it may emit there.

Every program of a request repeats the acceptance decision, which reads a few numbers per draft token, and then sweeps
its own tile of the one emitting row. The token is drawn by an exponential race: argmax of log weight - log noise.
"""

import triton
import triton.language as tl

from .arguments import UNALIGNED
from .filters import load_logits
from .noise import BONUS, RECOVERED, acceptance_uniform, log_exponential, row_words
from .row_statistics import log_prob, merge_tiles, state_index
from .sigmoid import best_by_score_residual, judged_scores, uses_sigmoid
from .token_output import INF_FLAG, NO_TOKEN


@triton.jit
def _greedy_accepted(tokens, judged, rows, tile_max_ptr, tile_argmax_ptr, num_tiles, PADDED_TILES: tl.constexpr):
    """Which draft tokens ``[BLOCK_K]`` are their row's argmax (the first one on a tie)."""
    tiles = tl.arange(0, PADDED_TILES)
    offsets = rows[:, None] * num_tiles + tiles[None, :]
    mask = judged[:, None] & (tiles < num_tiles)[None, :]
    maxima = tl.load(tile_max_ptr + offsets, mask=mask, other=float("-inf"))
    argmaxes = tl.load(tile_argmax_ptr + offsets, mask=mask, other=NO_TOKEN)
    best = tl.min(tl.where(maxima == tl.max(maxima, axis=1)[:, None], argmaxes, NO_TOKEN), axis=1)
    return judged & (tokens == best)


@triton.jit
def _judged_probs(
    tokens,
    valid,
    pos,
    rows,
    req_idx,
    state,
    temp,
    logits_ptr,
    logits_stride,
    draft_probs_ptr,
    draft_probs_stride,
    draft_logits_ptr,
    draft_logits_stride_0,
    draft_logits_stride_1,
    threshold_ptr,
    tile_max_ptr,
    tile_sum_ptr,
    draft_tile_max_ptr,
    draft_tile_sum_ptr,
    num_tiles,
    PADDED_TILES: tl.constexpr,
):
    """Target and draft probabilities ``[BLOCK_K]`` of the draft tokens."""
    largest, log_sum_exp = merge_tiles(tile_max_ptr, tile_sum_ptr, rows, valid, num_tiles, PADDED_TILES)
    logits = load_logits(logits_ptr, rows * logits_stride + tokens, valid)
    log_target = log_prob(logits / temp, largest, log_sum_exp)
    if threshold_ptr is not None:
        threshold = tl.load(threshold_ptr + rows, mask=valid, other=float("-inf"))
        log_target = tl.where(logits >= threshold, log_target, float("-inf"))
    target_prob = tl.where(largest > float("-inf"), tl.exp(log_target), 0.0)
    if draft_probs_ptr is not None:
        offsets = (rows - req_idx) * draft_probs_stride + tokens
        draft_prob = tl.load(draft_probs_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    elif draft_logits_ptr is not None:
        draft_largest, draft_log_sum_exp = merge_tiles(
            draft_tile_max_ptr, draft_tile_sum_ptr, rows, valid, num_tiles, PADDED_TILES
        )
        offsets = state * draft_logits_stride_0 + pos.to(tl.int64) * draft_logits_stride_1 + tokens
        draft_scaled = load_logits(draft_logits_ptr, offsets, valid) / temp
        draft_prob = tl.exp(log_prob(draft_scaled, draft_largest, draft_log_sum_exp))
        draft_prob = tl.where(draft_largest > float("-inf"), draft_prob, 0.0)
    else:
        draft_prob = tl.where(valid, 1.0, 0.0)
    return target_prob, draft_prob


@triton.jit
def _sampled_accepted(valid, pos, rows, state, seeds_ptr, positions_ptr, target_prob, draft_prob):
    """Which draft tokens ``[BLOCK_K]`` pass u <= target_prob / draft_prob (or the same of scores)."""
    row_positions = pos.to(tl.int64)
    if positions_ptr is not None:
        row_positions = tl.load(positions_ptr + rows, mask=valid, other=0).to(tl.int64)
    u = acceptance_uniform(tl.load(seeds_ptr + state), row_positions)
    return valid & (draft_prob > 0.0) & (u * draft_prob <= target_prob)


@triton.jit
def _store_candidate(score_ptr, token_ptr, offset, log_weight, log_noise, first_token, flag):
    """Store the tile's winner of the race: the first token with the largest log_weight - log_noise."""
    score, index = tl.max(log_weight - log_noise, axis=0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(score_ptr + offset, score)
    tl.store(token_ptr + offset, first_token + index + flag)


@triton.jit
def _log_residual(
    scaled,
    token_ids,
    mask,
    row,
    req_idx,
    pos,
    state,
    temp,
    draft_probs_ptr,
    draft_probs_stride,
    draft_logits_ptr,
    draft_logits_stride_0,
    draft_logits_stride_1,
    tile_max_ptr,
    tile_sum_ptr,
    draft_tile_max_ptr,
    draft_tile_sum_ptr,
    num_tiles,
    PADDED_TILES: tl.constexpr,
):
    """log(max(target_prob - draft_prob, 0)) as log target_prob + log(1 - draft_prob / target_prob), ``[TILE]``."""
    rows = row + tl.zeros([1], tl.int64)
    largest, log_sum_exp = merge_tiles(tile_max_ptr, tile_sum_ptr, rows, rows == row, num_tiles, PADDED_TILES)
    log_target = log_prob(scaled, largest, log_sum_exp)
    if draft_probs_ptr is not None:
        draft_row_ptr = draft_probs_ptr + (row - req_idx) * draft_probs_stride
        draft_prob = tl.load(draft_row_ptr + token_ids, mask=mask, other=0.0).to(tl.float32)
        ratio = tl.where(draft_prob > 0.0, draft_prob, 0.0) / tl.exp(log_target)
    else:
        draft_largest, draft_log_sum_exp = merge_tiles(
            draft_tile_max_ptr, draft_tile_sum_ptr, rows, rows == row, num_tiles, PADDED_TILES
        )
        draft_row_ptr = draft_logits_ptr + state * draft_logits_stride_0 + pos.to(tl.int64) * draft_logits_stride_1
        draft_scaled = load_logits(draft_row_ptr, token_ids, mask) / temp
        log_draft = log_prob(draft_scaled, draft_largest, draft_log_sum_exp)
        ratio = tl.where(draft_scaled > float("-inf"), tl.exp(log_draft - log_target), 0.0)
    positive = mask & (log_target > float("-inf")) & (ratio < 1.0)
    return tl.where(positive, log_target + tl.log(tl.where(positive, 1.0 - ratio, 1.0)), float("-inf"))


@triton.jit
def _count_outcome(counters_ptr, num_drafts, num_accepted, is_greedy, is_scored, threshold):
    """Add one request to its method's counters ``[8]``: tokens accepted, recovered, bonus; rows swept, rows skipped."""
    columns = tl.arange(0, 8)
    is_bonus = (num_accepted == num_drafts).to(tl.int32)
    is_drafted = (num_drafts > 0).to(tl.int32)
    # The statistics leave out the bonus row of a sampled request, which is then read only to emit from it.
    num_swept = num_drafts + tl.where(is_greedy, 1, is_bonus)
    # Scores need no row but the emitting one, unless a filter's threshold had to be found.
    num_swept = tl.where(is_scored & (threshold == float("-inf")), 1, num_swept)
    values = tl.where(columns == 0, num_accepted, 0)
    values = tl.where(columns == 1, is_drafted * (1 - is_bonus), values)
    values = tl.where(columns == 2, is_drafted * is_bonus, values)
    values = tl.where(columns == 3, num_swept, values)
    values = tl.where(columns == 4, num_drafts + 1 - num_swept, values)
    method = tl.where(is_scored, 8, 0)
    tl.atomic_add(counters_ptr + method + columns, values.to(tl.int64), mask=values > 0)


@triton.jit(do_not_specialize=["num_tiles"], do_not_specialize_on_alignment=UNALIGNED)
def emission_kernel(
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
    threshold_ptr,  # [num_rows] or None
    tile_max_ptr,  # [num_rows, num_tiles]
    tile_sum_ptr,  # [num_rows, num_tiles]
    tile_argmax_ptr,  # [num_rows, num_tiles]
    draft_tile_max_ptr,  # [num_rows, num_tiles] or None
    draft_tile_sum_ptr,  # [num_rows, num_tiles] or None
    sigmoid_ptr,  # [10] or None, see sigmoid.py
    sigmoid_requests_ptr,  # [max_reqs] or None
    num_accepted_ptr,  # [num_reqs] out
    counters_ptr,  # [>= 2, 8] or None, added to
    candidate_score_ptr,  # [num_reqs, num_tiles] out
    candidate_token_ptr,  # [num_reqs, num_tiles] out, INF_FLAG added where the row has +inf
    target_score_ptr,  # [num_reqs, num_tiles] out, or None: candidates of the full target row
    target_token_ptr,  # [num_reqs, num_tiles] out, or None
    vocab_size,
    num_tiles,
    COMPACT_DRAFTS: tl.constexpr,
    GREEDY_BELOW: tl.constexpr,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per (request, tile): find the emitting row, then this tile's candidate for the token it emits."""
    req_idx = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    start_row = tl.load(cu_num_logits_ptr + req_idx).to(tl.int64)
    num_drafts = (tl.load(cu_num_logits_ptr + req_idx + 1) - start_row - 1).to(tl.int32)
    state = state_index(state_indices_ptr, req_idx)
    temp = tl.full((), 0.0, tl.float32) if temperature_ptr is None else tl.load(temperature_ptr + state)
    by_scores = uses_sigmoid(sigmoid_ptr, sigmoid_requests_ptr, state)
    # Compact drafts lack one bonus row per earlier request; otherwise row i judges entry i + 1.
    draft_start = start_row - req_idx if COMPACT_DRAFTS else start_row + 1

    num_accepted = num_drafts
    for first in range(0, num_drafts, BLOCK_K):
        if num_accepted == num_drafts:
            pos = first + tl.arange(0, BLOCK_K)
            judged = pos < num_drafts
            rows = start_row + pos
            tokens = tl.load(draft_token_ids_ptr + draft_start + pos, mask=judged, other=-1).to(tl.int64)
            valid = judged & (tokens >= 0) & (tokens < vocab_size)
            accepted = valid
            if temperature_ptr is None:
                accepted = _greedy_accepted(tokens, valid, rows, tile_max_ptr, tile_argmax_ptr, num_tiles, PADDED_TILES)
            else:
                if temp < GREEDY_BELOW:
                    accepted = _greedy_accepted(
                        tokens, valid, rows, tile_max_ptr, tile_argmax_ptr, num_tiles, PADDED_TILES
                    )
                else:
                    target_prob = tl.zeros([BLOCK_K], tl.float32)
                    draft_prob = tl.zeros([BLOCK_K], tl.float32)
                    if sigmoid_ptr is None or sigmoid_requests_ptr is not None:
                        target_prob, draft_prob = _judged_probs(
                            tokens,
                            valid,
                            pos,
                            rows,
                            req_idx,
                            state,
                            temp,
                            logits_ptr,
                            logits_stride,
                            draft_probs_ptr,
                            draft_probs_stride,
                            draft_logits_ptr,
                            draft_logits_stride_0,
                            draft_logits_stride_1,
                            threshold_ptr,
                            tile_max_ptr,
                            tile_sum_ptr,
                            draft_tile_max_ptr,
                            draft_tile_sum_ptr,
                            num_tiles,
                            PADDED_TILES,
                        )
                    if sigmoid_ptr is not None:
                        target_score, draft_score = judged_scores(
                            tokens,
                            valid,
                            pos,
                            rows,
                            req_idx,
                            state,
                            temp,
                            logits_ptr,
                            logits_stride,
                            draft_probs_ptr,
                            draft_probs_stride,
                            draft_logits_ptr,
                            draft_logits_stride_0,
                            draft_logits_stride_1,
                            threshold_ptr,
                            sigmoid_ptr,
                        )
                        target_prob = tl.where(by_scores, target_score, target_prob)
                        draft_prob = tl.where(by_scores, draft_score, draft_prob)
                    accepted = _sampled_accepted(
                        valid, pos, rows, state, seeds_ptr, positions_ptr, target_prob, draft_prob
                    )
            num_accepted = tl.min(tl.where(accepted | (pos >= num_drafts), num_drafts, pos), axis=0)
    if tile == 0:
        tl.store(num_accepted_ptr + req_idx, num_accepted)
        if counters_ptr is not None:
            threshold = tl.full((), float("-inf"), tl.float32)
            if threshold_ptr is not None:
                threshold = tl.load(threshold_ptr + start_row)
            is_scored = by_scores & (temp >= GREEDY_BELOW)
            _count_outcome(counters_ptr, num_drafts, num_accepted, temp < GREEDY_BELOW, is_scored, threshold)

    row = start_row + num_accepted
    out = req_idx * num_tiles + tile
    if temp < GREEDY_BELOW:
        tl.store(candidate_score_ptr + out, tl.load(tile_max_ptr + row * num_tiles + tile))
        tl.store(candidate_token_ptr + out, tl.load(tile_argmax_ptr + row * num_tiles + tile))
        if target_score_ptr is not None:
            tl.store(target_score_ptr + out, float("-inf"))
            tl.store(target_token_ptr + out, 0)
        return
    if temperature_ptr is not None:
        is_bonus = num_accepted == num_drafts
        rejected = tl.load(draft_token_ids_ptr + draft_start + num_accepted, mask=not is_bonus, other=-1).to(tl.int64)
        has_draft = (not is_bonus) & (rejected >= 0) & (rejected < vocab_size)
        token_ids = tile * TILE + tl.arange(0, TILE)
        mask = token_ids < vocab_size
        logits = load_logits(logits_ptr + row * logits_stride, token_ids, mask)
        if threshold_ptr is not None:
            logits = tl.where(logits >= tl.load(threshold_ptr + row), logits, float("-inf"))
        scaled = logits / temp

        row_position = num_accepted.to(tl.int64)
        if positions_ptr is not None:
            row_position = tl.load(positions_ptr + row).to(tl.int64)
        purpose = tl.where(is_bonus, BONUS, RECOVERED).to(tl.uint32)
        key0, key1, _, _ = row_words(tl.load(seeds_ptr + state), row_position, purpose)
        log_noise = log_exponential(key0, key1, token_ids)

        # +inf takes all: its tile drops the finite logits here, and the flag drops the other tiles later.
        is_inf = scaled == float("inf")
        has_inf = tl.max(is_inf.to(tl.int32), axis=0)
        log_target_weight = tl.where(has_inf == 1, tl.where(is_inf, 0.0, float("-inf")), scaled)
        if target_score_ptr is None:
            log_weight = tl.where(has_draft & (token_ids == rejected), float("-inf"), log_target_weight)
            _store_candidate(
                candidate_score_ptr, candidate_token_ptr, out, log_weight, log_noise, tile * TILE, has_inf * INF_FLAG
            )
        else:
            _store_candidate(
                target_score_ptr, target_token_ptr, out, log_target_weight, log_noise, tile * TILE, has_inf * INF_FLAG
            )
            if has_draft:
                if draft_probs_ptr is None and draft_logits_ptr is None:
                    log_weight = tl.where(token_ids == rejected, float("-inf"), log_target_weight)
                    flag = has_inf * INF_FLAG
                    _store_candidate(
                        candidate_score_ptr, candidate_token_ptr, out, log_weight, log_noise, tile * TILE, flag
                    )
                else:
                    if sigmoid_ptr is None or sigmoid_requests_ptr is not None:  # noqa: SIM102 (compile time)
                        if by_scores == 0:
                            log_weight = _log_residual(
                                scaled,
                                token_ids,
                                mask,
                                row,
                                req_idx,
                                num_accepted,
                                state,
                                temp,
                                draft_probs_ptr,
                                draft_probs_stride,
                                draft_logits_ptr,
                                draft_logits_stride_0,
                                draft_logits_stride_1,
                                tile_max_ptr,
                                tile_sum_ptr,
                                draft_tile_max_ptr,
                                draft_tile_sum_ptr,
                                num_tiles,
                                PADDED_TILES,
                            )
                            _store_candidate(
                                candidate_score_ptr, candidate_token_ptr, out, log_weight, log_noise, tile * TILE, 0
                            )
                    if sigmoid_ptr is not None:  # noqa: SIM102 (compile time)
                        if by_scores:
                            score, token = best_by_score_residual(
                                tile * TILE,
                                vocab_size,
                                has_inf,
                                key0,
                                key1,
                                row,
                                req_idx,
                                num_accepted,
                                state,
                                temp,
                                logits_ptr,
                                logits_stride,
                                draft_probs_ptr,
                                draft_probs_stride,
                                draft_logits_ptr,
                                draft_logits_stride_0,
                                draft_logits_stride_1,
                                threshold_ptr,
                                sigmoid_ptr,
                                TILE,
                            )
                            tl.store(candidate_score_ptr + out, score)
                            tl.store(candidate_token_ptr + out, token + has_inf * INF_FLAG)
            else:
                tl.store(candidate_score_ptr + out, float("-inf"))
                tl.store(candidate_token_ptr + out, 0)
