"""One sweep over the judged rows: what acceptance and the residual need to know of each, per vocabulary tile.

A row's statistics are the largest scaled logit and the sum of exponentials relative to it (for greedy requests the
largest logit and its token), kept per tile of the vocabulary so that a row is read by many programs at once. Readers
merge the tiles of a row in a fixed order.
"""

import triton
import triton.language as tl

from .arguments import UNALIGNED
from .filters import load_logits
from .sigmoid import uses_sigmoid


@triton.jit
def state_index(state_indices_ptr, req_idx):
    """Where a request keeps its sampling parameters."""
    if state_indices_ptr is None:  # noqa: SIM108 (a choice at compile time)
        state = req_idx
    else:
        state = tl.load(state_indices_ptr + req_idx)
    return state.to(tl.int64)


@triton.jit
def max_and_sumexp(scaled):
    """Maximum, and sum of exp(scaled - maximum); a +inf maximum counts its occurrences."""
    largest = tl.max(scaled, axis=0)
    shift = tl.where(largest > float("-inf"), largest, 0.0)
    return largest, tl.sum(tl.where(scaled == shift, 1.0, tl.exp(scaled - shift)), axis=0)


@triton.jit
def merge_tiles(max_ptr, sum_ptr, rows, mask, num_tiles, PADDED_TILES: tl.constexpr):
    """Row maxima and log-sum-exp; where the maximum is +inf, the logarithm of its number of occurrences instead.

    rows, mask: ``[ROWS]``. Returns two blocks ``[ROWS]``; a row without a usable logit has maximum -inf.
    """
    tiles = tl.arange(0, PADDED_TILES)
    offsets = rows[:, None] * num_tiles + tiles[None, :]
    mask = mask[:, None] & (tiles < num_tiles)[None, :]
    maxima = tl.load(max_ptr + offsets, mask=mask, other=float("-inf"))
    sums = tl.load(sum_ptr + offsets, mask=mask, other=0.0)
    largest = tl.max(maxima, axis=1)
    shift = tl.where(largest > float("-inf"), largest, 0.0)
    scale = tl.where(maxima == shift[:, None], 1.0, tl.exp(maxima - shift[:, None]))
    total = tl.sum(sums * scale, axis=1)
    base = tl.where(largest == float("inf"), 0.0, shift)
    return largest, base + tl.log(tl.where(total > 0.0, total, 1.0))


@triton.jit
def log_prob(scaled, largest, log_sum_exp):
    """Log-probability of a scaled logit in a row with the given statistics; +inf takes all, -inf has none."""
    one_hot = tl.where(scaled == float("inf"), 0.0, float("-inf"))
    return tl.where(largest == float("inf"), one_hot, scaled) - log_sum_exp


@triton.jit(do_not_specialize=["num_tiles", "rows_per_req"], do_not_specialize_on_alignment=UNALIGNED)
def row_statistics_kernel(
    logits_ptr,  # [num_rows, vocab]
    logits_stride,
    cu_num_logits_ptr,  # [num_reqs + 1]
    state_indices_ptr,  # [num_reqs] or None
    temperature_ptr,  # [max_reqs] or None
    draft_logits_ptr,  # [max_reqs, max_drafts, draft_vocab] or None
    draft_logits_stride_0,
    draft_logits_stride_1,
    top_k_ptr,  # [max_reqs] or None
    top_p_ptr,  # [max_reqs] or None
    min_p_ptr,  # [max_reqs] or None
    sigmoid_ptr,  # [10] or None, see sigmoid.py
    sigmoid_requests_ptr,  # [max_reqs] or None
    tile_max_ptr,  # [num_rows, num_tiles] out: largest logit / temperature of the tile
    tile_sum_ptr,  # [num_rows, num_tiles] out: sum of exp(logit / temperature - tile maximum)
    tile_argmax_ptr,  # [num_rows, num_tiles] out, greedy requests only
    draft_tile_max_ptr,  # [num_rows, num_tiles] out, or None
    draft_tile_sum_ptr,  # [num_rows, num_tiles] out, or None
    vocab_size,
    num_tiles,
    rows_per_req,
    GREEDY_BELOW: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per (request, row, tile).

    Rows that need no statistics are skipped: bonus rows of sampled requests, and all rows of those verified by scores.
    """
    req_idx = tl.program_id(0) // rows_per_req
    pos = tl.program_id(0) % rows_per_req
    tile = tl.program_id(1)
    row = tl.load(cu_num_logits_ptr + req_idx).to(tl.int64) + pos
    end_row = tl.load(cu_num_logits_ptr + req_idx + 1)
    if row >= end_row:
        return
    state = state_index(state_indices_ptr, req_idx)
    temp = tl.full((), 0.0, tl.float32) if temperature_ptr is None else tl.load(temperature_ptr + state)
    is_bonus = row == end_row - 1
    token_ids = tile * TILE + tl.arange(0, TILE)
    mask = token_ids < vocab_size
    out = row * num_tiles + tile
    row_ptr = logits_ptr + row * logits_stride
    if temp < GREEDY_BELOW:
        logits = load_logits(row_ptr, token_ids, mask)
        largest, index = tl.max(logits, axis=0, return_indices=True, return_indices_tie_break_left=True)
        tl.store(tile_max_ptr + out, largest)
        tl.store(tile_argmax_ptr + out, tile * TILE + index)
    elif not (is_bonus | uses_sigmoid(sigmoid_ptr, sigmoid_requests_ptr, state)):
        has_filter = tl.full((), False, tl.int1)
        if top_k_ptr is not None:
            top_k = tl.load(top_k_ptr + state)
            has_filter = has_filter | ((top_k >= 1) & (top_k < vocab_size))
        if top_p_ptr is not None:
            has_filter = has_filter | (tl.load(top_p_ptr + state) < 1.0)
        if min_p_ptr is not None:
            has_filter = has_filter | (tl.load(min_p_ptr + state) > 0.0)
        if not has_filter:
            largest, total = max_and_sumexp(load_logits(row_ptr, token_ids, mask) / temp)
            tl.store(tile_max_ptr + out, largest)
            tl.store(tile_sum_ptr + out, total)
        if draft_logits_ptr is not None:
            draft_row_ptr = draft_logits_ptr + state * draft_logits_stride_0 + pos.to(tl.int64) * draft_logits_stride_1
            largest, total = max_and_sumexp(load_logits(draft_row_ptr, token_ids, mask) / temp)
            tl.store(draft_tile_max_ptr + out, largest)
            tl.store(draft_tile_sum_ptr + out, total)
