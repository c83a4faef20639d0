"""What a rank sends of its columns, and the statistics of tiles that a boundary cuts, made from what all have sent."""

import triton
import triton.language as tl

from ..constants import GREEDY_BELOW, LOG2_E
from ..load import Drafts, draft_offset, load_draft_token, load_logits, load_request
from ..statistics import sweep
from .pieces import UNALIGNED, cut_row

COPIED = tl.constexpr(512)
"""Tokens copied at once: more take registers that the sweeps need."""

COUNTS = ["num_cut", "num_groups", "part_width", "most_whole", "first_tile", "end_tile", "sent_stride"]


@triton.jit
def _send_parts(row_ptr, parts_ptr, part_columns_ptr, part_width):
    """Copy what a rank holds of a row's cut tiles."""
    for start in range(0, part_width, COPIED):
        places = start + tl.arange(0, COPIED)
        columns = tl.load(part_columns_ptr + places, mask=places < part_width, other=-1)
        parts = tl.load(row_ptr + columns, mask=columns >= 0, other=0.0)
        tl.store(parts_ptr + places, parts, mask=places < part_width)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=UNALIGNED)
def shard_sweep_kernel(
    logits_ptr,  # [num_rows, columns]: this rank's
    logits_stride,
    cu_num_logits_ptr,  # [num_reqs + 1]
    draft_token_ids_ptr,  # [num_rows] or [num_rows - num_reqs]
    state_indices_ptr,  # [num_reqs] or None
    temperature_ptr,  # [max_reqs] or None
    draft_logits_ptr,  # [max_reqs, max_drafts, draft_vocab] or None
    draft_logits_stride_0,
    draft_logits_stride_1,
    part_columns_ptr,  # [part_width]
    tile_max_ptr,  # [num_rows, most_whole] out
    tile_sum_ptr,  # [num_rows, most_whole] out
    draft_tile_max_ptr,  # [num_rows, most_whole] out, or None
    draft_tile_sum_ptr,  # [num_rows, most_whole] out, or None
    target_logit_ptr,  # [num_rows] out: the draft token's, -inf on other ranks; None where drafts are one-hot
    parts_ptr,  # [num_rows, part_width] out
    first,
    columns,
    first_tile,
    end_tile,
    end,
    most_whole,
    part_width,
    num_groups,
    vocab_size,
    COMPACT_DRAFTS: tl.constexpr,
    TILE: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One program per (group of STEPS whole tiles, row, request), and with draft logits one more for the draft's row.

    The last group sends the row's parts of cut tiles, and the logit of its draft token.
    """
    group, pos, index = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    is_draft_row = tl.full((), 0, tl.int32) != 0
    if draft_logits_ptr is not None:
        is_draft_row = pos % 2 == 1
        pos = pos // 2
    request = load_request(index, cu_num_logits_ptr, state_indices_ptr, temperature_ptr)
    if pos > request.num_drafts:
        return
    greedy = request.temperature < GREEDY_BELOW
    scale = LOG2_E / request.temperature
    row = request.start_row + pos
    row_ptr = logits_ptr + row * logits_stride
    out = row * most_whole - first_tile
    if group == num_groups:
        if is_draft_row == 0:
            _send_parts(row_ptr, parts_ptr + row * part_width, part_columns_ptr, part_width)
            if target_logit_ptr is not None:
                drafts = Drafts(draft_token_ids_ptr, None, 0, None, 0, 0)
                token = load_draft_token(drafts, request, pos, vocab_size, COMPACT_DRAFTS)
                is_held = (token >= first) & (token < first + columns)
                logit = load_logits(row_ptr, token - first, is_held)
                tl.store(target_logit_ptr + row, tl.where(logit > float("-inf"), logit, float("-inf")))
    elif is_draft_row:
        if draft_logits_ptr is not None:
            if (pos < request.num_drafts) & (greedy == 0):
                drafts = Drafts(None, None, 0, draft_logits_ptr, draft_logits_stride_0, draft_logits_stride_1)
                sweep(
                    draft_logits_ptr + draft_offset(drafts, request, pos),
                    scale,
                    draft_tile_max_ptr + out,
                    draft_tile_sum_ptr + out,
                    None,
                    first_tile + group * STEPS,
                    end_tile,
                    end,
                    greedy,
                    TILE,
                    STEPS,
                )
    else:
        sweep(
            row_ptr - first,
            scale,
            tile_max_ptr + out,
            tile_sum_ptr + out,
            None,
            first_tile + group * STEPS,
            end_tile,
            end,
            greedy,
            TILE,
            STEPS,
        )


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=UNALIGNED)
def cut_tiles_kernel(
    sent_parts_ptr,  # [ranks, num_rows, part_width], ranks sent_stride apart
    sent_stride,
    cu_num_logits_ptr,  # [num_reqs + 1]
    state_indices_ptr,  # [num_reqs] or None
    temperature_ptr,  # [max_reqs] or None
    draft_logits_ptr,  # [max_reqs, max_drafts, draft_vocab] or None
    draft_logits_stride_0,
    draft_logits_stride_1,
    cut_tiles_ptr,  # [num_cut]
    part_places_ptr,  # [num_cut * TILE]
    cut_ptr,  # [num_rows, num_cut, TILE] out: their logits
    cut_max_ptr,  # [num_rows, num_cut] out
    cut_sum_ptr,  # [num_rows, num_cut] out
    cut_draft_max_ptr,  # [num_rows, num_cut] out, or None
    cut_draft_sum_ptr,  # [num_rows, num_cut] out, or None
    num_cut,
    part_width,
    vocab_size,
    TILE: tl.constexpr,
):
    """One program per (cut tile, row, request), and with draft logits one more for the draft's row."""
    number, pos, index = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    is_draft_row = tl.full((), 0, tl.int32) != 0
    if draft_logits_ptr is not None:
        is_draft_row = pos % 2 == 1
        pos = pos // 2
    request = load_request(index, cu_num_logits_ptr, state_indices_ptr, temperature_ptr)
    if pos > request.num_drafts:
        return
    greedy = request.temperature < GREEDY_BELOW
    scale = LOG2_E / request.temperature
    row = request.start_row + pos
    tile = tl.load(cut_tiles_ptr + number)
    out = row * num_cut + number - tile
    if is_draft_row:
        if draft_logits_ptr is not None:
            if (pos < request.num_drafts) & (greedy == 0):
                drafts = Drafts(None, None, 0, draft_logits_ptr, draft_logits_stride_0, draft_logits_stride_1)
                sweep(
                    draft_logits_ptr + draft_offset(drafts, request, pos),
                    scale,
                    cut_draft_max_ptr + out,
                    cut_draft_sum_ptr + out,
                    None,
                    tile,
                    tile + 1,
                    vocab_size,
                    greedy,
                    TILE,
                    1,
                )
    else:
        columns = tl.arange(0, TILE)
        places = tl.load(part_places_ptr + number * TILE + columns)
        offsets = (places // part_width).to(tl.int64) * sent_stride + row * part_width + places % part_width
        parts = tl.load(sent_parts_ptr + offsets, mask=places >= 0, other=float("-inf"))
        row_ptr = cut_row(cut_ptr, num_cut, row, number, tile, TILE)
        tl.store(row_ptr + tile * TILE + columns, parts)
        tl.debug_barrier()
        sweep(
            row_ptr,
            scale,
            cut_max_ptr + out,
            cut_sum_ptr + out,
            None,
            tile,
            tile + 1,
            vocab_size,
            greedy,
            TILE,
            1,
        )
