"""Sigmoid scores around an estimate of each row's normaliser: the calibrated form of the paper's method.

score(z) = sigmoid(z / T - alpha) with alpha = estimate + tail. Far down its tail the sigmoid is an exponential, so the
ratio of two scores is the ratio of two probabilities, up to the estimate's error. The estimate reads, per judged row, a
calibrated set of vocabulary blocks (and a one-hot draft's token, which other drafts must not depend on):

    partial = log-sum-exp of z / T over these,   estimate = partial + log(1 + exp(a0 + a1 T + a2 partial + a3 extra))

where the last term stands for what was not read, and extra is what the draft says of it: the log odds of its unread
probability, or its own partial log-sum-exp. A drafted row is accepted or rejected by that alone. The one row that emits
is swept anyway, so its true normaliser is known there, and the recovered token is drawn from
max(target_prob - min(draft_prob, cap * target_prob), 0), cap = estimated / true acceptance ratio: exactly what the
accepted tokens left of the target's law. A row whose ratio is estimated too small costs acceptance and no accuracy.

Two launches beside those of exact.py: one program per judged row writes ``row_shift`` ``[num_rows, 2]`` (minus alpha of
the target and of the draft); one per (request, tile) judges by it and sweeps the row that follows. Coefficients arrive
as fp32 ``[10]``: tail, a0..a3 of the target, a0..a3 of the draft (logits only), 0. The definition in float64 is in
``reference.py``.
"""

import triton
import triton.language as tl

from .arguments import UNALIGNED
from .filters import load_logits
from .noise import acceptance_uniform
from .row_statistics import max_and_sumexp, state_index
from .sigmoid import uses_sigmoid

# Minus alpha of a row without a usable estimate: every finite logit scores 0.
NO_ESTIMATE = tl.constexpr(-1e30)
LARGEST_LOG_CAP = tl.constexpr(60.0)


@triton.jit
def _softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _block_tokens(index, token, blocks_ptr, num_blocks, vocab_size, BLOCK: tl.constexpr):
    """Token ids of flat indices into the blocks, and which of them count: ``token`` is added elsewhere."""
    mask = index < num_blocks * BLOCK
    token_ids = tl.load(blocks_ptr + index // BLOCK, mask=mask, other=0) + index % BLOCK
    return token_ids, mask & (token_ids < vocab_size) & (token_ids != token)


@triton.jit
def _partial_log_sum_exp(
    row_ptr, token, temp, blocks_ptr, num_blocks, vocab_size, BLOCK: tl.constexpr, STEP: tl.constexpr
):
    """log-sum-exp of logits / temp over the blocks and ``token`` (-1: none); -inf or +inf where a row has no other."""
    largest = load_logits(row_ptr, token, token >= 0) / temp
    total = tl.full((), 1.0, tl.float32)
    for first in range(0, num_blocks * BLOCK, STEP):
        index = first + tl.arange(0, STEP)
        token_ids, mask = _block_tokens(index, token, blocks_ptr, num_blocks, vocab_size, BLOCK)
        scaled = load_logits(row_ptr, token_ids, mask) / temp
        step_largest, step_total = max_and_sumexp(scaled)
        merged = tl.maximum(largest, step_largest)
        shift = tl.where(merged > float("-inf"), merged, 0.0)
        total = total * tl.exp(largest - shift) + step_total * tl.exp(step_largest - shift)
        largest = merged
    is_finite = (largest > float("-inf")) & (largest < float("inf"))
    return tl.where(is_finite, largest + tl.log(tl.where(is_finite, total, 1.0)), largest)


@triton.jit
def _unread_log_odds(row_ptr, blocks_ptr, num_blocks, vocab_size, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """Log odds of the draft probability outside the blocks."""
    read = tl.full((), 0.0, tl.float32)
    for first in range(0, num_blocks * BLOCK, STEP):
        index = first + tl.arange(0, STEP)
        token_ids, mask = _block_tokens(index, -1, blocks_ptr, num_blocks, vocab_size, BLOCK)
        probs = tl.load(row_ptr + token_ids, mask=mask, other=0.0).to(tl.float32)
        read += tl.sum(tl.where(probs > 0.0, probs, 0.0), axis=0)
    read = tl.minimum(tl.maximum(read, 1e-6), 1.0 - 1e-4)
    return tl.log(1.0 - read) - tl.log(read)


@triton.jit
def _unread(coefficients_ptr, temp, partial, extra):
    """log(1 + exp(r)): how far the whole log-sum-exp is estimated to lie above the partial one."""
    r = tl.load(coefficients_ptr) + tl.load(coefficients_ptr + 1) * temp
    return _softplus(r + tl.load(coefficients_ptr + 2) * partial + tl.load(coefficients_ptr + 3) * extra)


@triton.jit(do_not_specialize=["num_blocks", "rows_per_req"], do_not_specialize_on_alignment=UNALIGNED)
def row_shift_kernel(
    logits_ptr,  # [num_rows, vocab]
    logits_stride,
    cu_num_logits_ptr,  # [num_reqs + 1]
    draft_token_ids_ptr,  # [num_rows] or [num_rows - num_reqs]
    state_indices_ptr,  # [num_reqs] or None
    temperature_ptr,  # [max_reqs]
    draft_probs_ptr,  # [num_rows - num_reqs, draft_vocab] or None
    draft_probs_stride,
    draft_logits_ptr,  # [max_reqs, max_drafts, draft_vocab] or None
    draft_logits_stride_0,
    draft_logits_stride_1,
    sigmoid_ptr,  # [10]
    sigmoid_requests_ptr,  # [max_reqs] or None
    blocks_ptr,  # [num_blocks] first token of each block
    num_blocks,
    row_shift_ptr,  # [num_rows, 2] out
    vocab_size,
    rows_per_req,
    COMPACT_DRAFTS: tl.constexpr,
    GREEDY_BELOW: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program per (request, row): minus alpha of the target and of the draft, for rows judged by scores."""
    req_idx = (tl.program_id(0) // rows_per_req).to(tl.int64)
    pos = tl.program_id(0) % rows_per_req
    start_row = tl.load(cu_num_logits_ptr + req_idx).to(tl.int64)
    row = start_row + pos
    if row >= tl.load(cu_num_logits_ptr + req_idx + 1) - 1:
        return
    state = state_index(state_indices_ptr, req_idx)
    temp = tl.load(temperature_ptr + state)
    token = tl.load(draft_token_ids_ptr + (row - req_idx if COMPACT_DRAFTS else row + 1)).to(tl.int64)
    if (temp < GREEDY_BELOW) | (token < 0) | (token >= vocab_size):
        return
    if not uses_sigmoid(sigmoid_ptr, sigmoid_requests_ptr, state):
        return

    tail = tl.load(sigmoid_ptr)
    if draft_probs_ptr is not None or draft_logits_ptr is not None:
        token = tl.full((), -1, tl.int64)
    partial = _partial_log_sum_exp(
        logits_ptr + row * logits_stride, token, temp, blocks_ptr, num_blocks, vocab_size, BLOCK, STEP
    )
    usable = (partial > float("-inf")) & (partial < float("inf"))
    extra = tl.full((), 0.0, tl.float32)
    draft_shift = -tail
    if draft_probs_ptr is not None:
        draft_row_ptr = draft_probs_ptr + (row - req_idx) * draft_probs_stride
        extra = _unread_log_odds(draft_row_ptr, blocks_ptr, num_blocks, vocab_size, BLOCK, STEP)
    elif draft_logits_ptr is not None:
        draft_row_ptr = draft_logits_ptr + state * draft_logits_stride_0 + pos.to(tl.int64) * draft_logits_stride_1
        extra = _partial_log_sum_exp(draft_row_ptr, token, temp, blocks_ptr, num_blocks, vocab_size, BLOCK, STEP)
        usable = usable & (extra > float("-inf")) & (extra < float("inf"))
        draft_shift = -(extra + _unread(sigmoid_ptr + 5, temp, partial, extra) + tail)
        draft_shift = tl.where(usable, draft_shift, NO_ESTIMATE)
    shift = -(partial + _unread(sigmoid_ptr + 1, temp, partial, extra) + tail)
    tl.store(row_shift_ptr + 2 * row, tl.where(usable, shift, NO_ESTIMATE))
    tl.store(row_shift_ptr + 2 * row + 1, draft_shift)


@triton.jit
def log_cap(log_sum_exp, draft_log_sum_exp, row_shift_ptr, row):
    """Logarithm of the estimated acceptance ratio over the true one; the tails of the two sides cancel."""
    error = (log_sum_exp + tl.load(row_shift_ptr + 2 * row)) - (
        draft_log_sum_exp + tl.load(row_shift_ptr + 2 * row + 1)
    )
    return tl.minimum(tl.maximum(error, -LARGEST_LOG_CAP), LARGEST_LOG_CAP)


@triton.jit
def _passes(
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
    seeds_ptr,
    positions_ptr,
    threshold_ptr,
    row_shift_ptr,
):
    """Which draft tokens ``[BLOCK_K]`` pass u <= target score / draft score."""
    logits = load_logits(logits_ptr, rows * logits_stride + tokens, valid)
    target_score = _sigmoid(logits / temp + tl.load(row_shift_ptr + 2 * rows, mask=valid, other=0.0))
    if threshold_ptr is not None:
        threshold = tl.load(threshold_ptr + rows, mask=valid, other=float("-inf"))
        target_score = tl.where(logits >= threshold, target_score, 0.0)
    draft_shift = tl.load(row_shift_ptr + 2 * rows + 1, mask=valid, other=0.0)
    if draft_probs_ptr is not None:
        offsets = (rows - req_idx) * draft_probs_stride + tokens
        probs = tl.load(draft_probs_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        log_probs = tl.where(probs > 0.0, tl.log(tl.where(probs > 0.0, probs, 1.0)), float("-inf"))
        draft_score = _sigmoid(log_probs + draft_shift)
    elif draft_logits_ptr is not None:
        offsets = state * draft_logits_stride_0 + pos.to(tl.int64) * draft_logits_stride_1 + tokens
        draft_score = _sigmoid(load_logits(draft_logits_ptr, offsets, valid) / temp + draft_shift)
    else:
        draft_score = _sigmoid(draft_shift)
    row_positions = pos.to(tl.int64)
    if positions_ptr is not None:
        row_positions = tl.load(positions_ptr + rows, mask=valid, other=0).to(tl.int64)
    u = acceptance_uniform(tl.load(seeds_ptr + state), row_positions)
    return valid & (draft_score > 0.0) & (u * draft_score <= target_score)


@triton.jit(do_not_specialize=["num_tiles"], do_not_specialize_on_alignment=UNALIGNED)
def emitting_row_kernel(
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
    threshold_ptr,  # [num_rows] or None
    sigmoid_ptr,  # [10]
    sigmoid_requests_ptr,  # [max_reqs] or None
    row_shift_ptr,  # [num_rows, 2]
    num_accepted_ptr,  # [num_reqs] out, requests judged by scores only
    tile_max_ptr,  # [num_rows, num_tiles] out, as in row_statistics.py, of the one row
    tile_sum_ptr,  # [num_rows, num_tiles] out
    draft_tile_max_ptr,  # [num_rows, num_tiles] out, or None
    draft_tile_sum_ptr,  # [num_rows, num_tiles] out, or None
    vocab_size,
    num_tiles,
    COMPACT_DRAFTS: tl.constexpr,
    GREEDY_BELOW: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per (request, tile): find where the request stops, and take this tile's statistics of that row."""
    req_idx = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    start_row = tl.load(cu_num_logits_ptr + req_idx).to(tl.int64)
    num_drafts = (tl.load(cu_num_logits_ptr + req_idx + 1) - start_row - 1).to(tl.int32)
    state = state_index(state_indices_ptr, req_idx)
    temp = tl.load(temperature_ptr + state)
    if temp < GREEDY_BELOW:
        return
    if not uses_sigmoid(sigmoid_ptr, sigmoid_requests_ptr, state):
        return

    draft_start = start_row - req_idx if COMPACT_DRAFTS else start_row + 1
    num_accepted = num_drafts
    for first in range(0, num_drafts, BLOCK_K):
        if num_accepted == num_drafts:
            pos = first + tl.arange(0, BLOCK_K)
            tokens = tl.load(draft_token_ids_ptr + draft_start + pos, mask=pos < num_drafts, other=-1).to(tl.int64)
            valid = (pos < num_drafts) & (tokens >= 0) & (tokens < vocab_size)
            accepted = _passes(
                tokens,
                valid,
                pos,
                start_row + pos,
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
                seeds_ptr,
                positions_ptr,
                threshold_ptr,
                row_shift_ptr,
            )
            num_accepted = tl.min(tl.where(accepted | (pos >= num_drafts), num_drafts, pos), axis=0)
    if tile == 0:
        tl.store(num_accepted_ptr + req_idx, num_accepted)
    if num_accepted == num_drafts:
        return

    row = start_row + num_accepted
    out = row * num_tiles + tile
    token_ids = tile * TILE + tl.arange(0, TILE)
    mask = token_ids < vocab_size
    # What a filter keeps has its statistics already.
    threshold = tl.full((), float("-inf"), tl.float32)
    if threshold_ptr is not None:
        threshold = tl.load(threshold_ptr + row)
    if threshold == float("-inf"):
        largest, total = max_and_sumexp(load_logits(logits_ptr + row * logits_stride, token_ids, mask) / temp)
        tl.store(tile_max_ptr + out, largest)
        tl.store(tile_sum_ptr + out, total)
    if draft_logits_ptr is not None:
        draft_row_ptr = (
            draft_logits_ptr + state * draft_logits_stride_0 + num_accepted.to(tl.int64) * draft_logits_stride_1
        )
        largest, total = max_and_sumexp(load_logits(draft_row_ptr, token_ids, mask) / temp)
        tl.store(draft_tile_max_ptr + out, largest)
        tl.store(draft_tile_sum_ptr + out, total)
