"""One sweep over the rows: what acceptance and the draw need to know of each, per tile of the vocabulary.

A row's statistics are the largest logit of each tile and the sum of exponentials relative to it. Tiles are small, so
that a later step finds the token it looks for by reading one of them; a program of one warp sweeps several, so that no
reduction crosses a warp.
"""

import triton
import triton.language as tl

from .constants import GREEDY_BELOW, LOG2_E, SIGMOID, TYPICAL, UNALIGNED
from .load import (
    Drafts,
    Noise,
    Rows,
    follows_rule,
    is_filtered,
    load_filters,
    load_logits,
    load_request,
    tile_statistics,
)
from .rules.sigmoid import first_rejection
from .rules.typical import tile_entropy

BLOCK = tl.constexpr(1024)
"""Tokens that a program reads at once: a large tile, or several small ones."""


@triton.jit
def sweep(
    row_ptr,
    scale,
    max_ptr,
    sum_ptr,
    entropy_ptr,
    first_tile,
    num_tiles,
    vocab_size,
    greedy,
    TILE: tl.constexpr,
    STEPS: tl.constexpr,
):
    """Statistics of STEPS tiles of a row; a greedy request needs maxima only. entropy_ptr: None where not needed."""
    FITTING: tl.constexpr = BLOCK // TILE if TILE < BLOCK else 1
    TOGETHER: tl.constexpr = FITTING if FITTING < STEPS else STEPS
    for step in range(0, STEPS, TOGETHER):
        tile_ids = first_tile + step + tl.arange(0, TOGETHER)
        token_ids = tile_ids[:, None] * TILE + tl.arange(0, TILE)[None, :]
        x = load_logits(row_ptr, token_ids, token_ids < vocab_size)
        if greedy:
            largest = tl.max(x, axis=1)
            largest = tl.where(largest > float("-inf"), largest, float("-inf"))
            total = tl.zeros([TOGETHER], tl.float32)
        else:
            largest, total = tile_statistics(x, scale)
        tl.store(max_ptr + tile_ids, largest, mask=tile_ids < num_tiles)
        tl.store(sum_ptr + tile_ids, total, mask=tile_ids < num_tiles)
        if entropy_ptr is not None:
            tl.store(entropy_ptr + tile_ids, tile_entropy(x, largest, scale), mask=tile_ids < num_tiles)


@triton.jit(do_not_specialize=["num_tiles"], do_not_specialize_on_alignment=UNALIGNED)
def statistics_kernel(
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
    constants_ptr,  # the rule's constants, or None
    rule_requests_ptr,  # [max_reqs] or None
    tile_max_ptr,  # [num_rows, num_tiles] out
    tile_sum_ptr,  # [num_rows, num_tiles] out
    tile_entropy_ptr,  # [num_rows, num_tiles] out, or None
    draft_tile_max_ptr,  # [num_rows, num_tiles] out, or None
    draft_tile_sum_ptr,  # [num_rows, num_tiles] out, or None
    arrived_ptr,  # [num_reqs, 2] out: zeros
    vocab_size,
    num_tiles,
    COMPACT_DRAFTS: tl.constexpr,
    TILE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RULE: tl.constexpr,
):
    """One program per (group of STEPS tiles, row, request), and with ``draft_logits_ptr`` one more for the draft's row.

    A request verified by scores needs the statistics of one row only, the one that emits, unless it filters.
    """
    group, pos, index = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    is_draft_row = tl.full((), 0, tl.int32) != 0
    if draft_logits_ptr is not None:
        is_draft_row = pos % 2 == 1
        pos = pos // 2
    request = load_request(index, cu_num_logits_ptr, state_indices_ptr, temperature_ptr)
    if pos > request.num_drafts:
        return
    if (pos == 0) & (group == 0) & (is_draft_row == 0):
        tl.store(arrived_ptr + 2 * index + tl.arange(0, 2), tl.zeros([2], tl.int32))
    temp = request.temperature
    greedy = temp < GREEDY_BELOW
    by_rule = follows_rule(request, rule_requests_ptr, RULE)
    if RULE == SIGMOID:
        filters = load_filters(top_k_ptr, top_p_ptr, min_p_ptr, request.state)
        if by_rule & (is_filtered(filters, vocab_size) == 0):
            rows = Rows(logits_ptr, logits_stride, vocab_size)
            drafts = Drafts(
                draft_token_ids_ptr,
                draft_probs_ptr,
                draft_probs_stride,
                draft_logits_ptr,
                draft_logits_stride_0,
                draft_logits_stride_1,
            )
            noise = Noise(seeds_ptr, positions_ptr)
            if pos != first_rejection(rows, drafts, noise, constants_ptr, request, COMPACT_DRAFTS, BLOCK_K):
                return
    row = request.start_row + pos
    scale = LOG2_E / temp
    out = row * num_tiles
    if is_draft_row:
        if draft_logits_ptr is not None:
            is_needed = (pos < request.num_drafts) & (greedy == 0)
            if RULE == SIGMOID:
                is_needed = is_needed & (by_rule == 0)
            if RULE == TYPICAL:
                is_needed = is_needed & (by_rule == 0)
            if is_needed:
                offset = request.state * draft_logits_stride_0 + pos.to(tl.int64) * draft_logits_stride_1
                sweep(
                    draft_logits_ptr + offset,
                    scale,
                    draft_tile_max_ptr + out,
                    draft_tile_sum_ptr + out,
                    None,
                    group * STEPS,
                    num_tiles,
                    vocab_size,
                    greedy,
                    TILE,
                    STEPS,
                )
    else:
        sweep(
            logits_ptr + row * logits_stride,
            scale,
            tile_max_ptr + out,
            tile_sum_ptr + out,
            None if tile_entropy_ptr is None else tile_entropy_ptr + out,
            group * STEPS,
            num_tiles,
            vocab_size,
            greedy,
            TILE,
            STEPS,
        )
