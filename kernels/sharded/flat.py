"""Rows of which more tokens may be kept than ranks exchange: of each request the first one that is needed travels.

It is judged whole, as a single rank judges it. The request ends before the next flat row.
"""

import triton
import triton.language as tl

from ..constants import EXACT, FLAT
from ..load import Drafts, Noise, Rows, Tiles, load_draft_token, load_filters, load_request
from ..outcome import find_outcome
from ..output import load_drafts, load_outcomes
from .pieces import UNALIGNED

CHUNK = tl.constexpr(1024)
"""Tokens that one program sends of a flat row."""


@triton.jit
def flat_end(request, draft_token_ids_ptr, outcomes, COMPACT_DRAFTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """How many of a request's draft tokens survive before a flat row that is needed; -1 if none is."""
    columns = tl.arange(0, BLOCK_K)
    drafts = load_drafts(request, draft_token_ids_ptr, COMPACT_DRAFTS, BLOCK_K)
    survives = (columns < request.num_drafts) & (drafts == outcomes.to(tl.int64)) & (drafts >= 0)
    end = tl.min(tl.where(survives, BLOCK_K, columns), axis=0)
    outcome = tl.sum(tl.where(columns == end, outcomes, 0), axis=0)
    return tl.where(outcome == FLAT, end, -1)


@triton.jit(do_not_specialize=["columns", "flat_width"], do_not_specialize_on_alignment=UNALIGNED)
def shard_pack_kernel(
    logits_ptr,  # [num_rows, columns]: this rank's
    logits_stride,
    cu_num_logits_ptr,  # [num_reqs + 1]
    draft_token_ids_ptr,  # [num_rows] or [num_rows - num_reqs]
    outcome_ptr,  # [num_rows]
    flat_ptr,  # [num_reqs, flat_width] out: this rank's columns of a request's flat row
    flat_pos_ptr,  # [num_reqs] out: its position, -1 if none is needed
    columns,
    flat_width,
    COMPACT_DRAFTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per (CHUNK columns, request)."""
    chunk, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    request = load_request(index, cu_num_logits_ptr, None, None)
    outcomes = load_outcomes(request, outcome_ptr, BLOCK_K)
    pos = flat_end(request, draft_token_ids_ptr, outcomes, COMPACT_DRAFTS, BLOCK_K)
    if chunk == 0:
        tl.store(flat_pos_ptr + index, pos)
    if pos >= 0:
        places = chunk * CHUNK + tl.arange(0, CHUNK)
        row_ptr = logits_ptr + (request.start_row + pos) * logits_stride
        x = tl.load(row_ptr + places, mask=places < columns, other=float("-inf"))
        tl.store(flat_ptr + index * flat_width + places, x, mask=places < flat_width)


@triton.jit(do_not_specialize=["num_tiles"], do_not_specialize_on_alignment=UNALIGNED)
def shard_flat_kernel(
    flat_ptr,  # [num_reqs, vocab]: whole flat rows
    flat_stride,
    flat_pos_ptr,  # [num_reqs]: their positions, -1 for none
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
    top_k_ptr,  # [max_reqs] or None
    top_p_ptr,  # [max_reqs] or None
    min_p_ptr,  # [max_reqs] or None
    tile_max_ptr,  # [num_rows, num_tiles], of whole rows
    tile_sum_ptr,  # [num_rows, num_tiles]; of flat rows it becomes that of what is kept
    draft_tile_max_ptr,  # [num_rows, num_tiles] or None
    draft_tile_sum_ptr,  # [num_rows, num_tiles] or None
    tile_list_ptr,  # [num_rows, num_tiles + CAPACITY] scratch
    candidates_ptr,  # [num_rows, CAPACITY] scratch
    row_ptr,  # [num_rows, ROW_COLUMNS] out: what a residual needs
    outcome_ptr,  # [num_rows] out: of flat rows
    vocab_size,
    num_tiles,
    COMPACT_DRAFTS: tl.constexpr,
    KEY_BITS: tl.constexpr,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
):
    """One program per request: what its flat row finds, as on a single rank."""
    index = tl.program_id(0).to(tl.int64)
    pos = tl.load(flat_pos_ptr + index)
    if pos < 0:
        return
    request = load_request(index, cu_num_logits_ptr, state_indices_ptr, temperature_ptr)
    drafts = Drafts(
        draft_token_ids_ptr,
        draft_probs_ptr,
        draft_probs_stride,
        draft_logits_ptr,
        draft_logits_stride_0,
        draft_logits_stride_1,
    )
    row = request.start_row + pos
    outcome = find_outcome(
        Rows(flat_ptr + (index - row) * flat_stride, flat_stride, vocab_size),
        Tiles(tile_max_ptr, tile_sum_ptr, None, num_tiles),
        Tiles(draft_tile_max_ptr, draft_tile_sum_ptr, None, num_tiles),
        drafts,
        Noise(seeds_ptr, positions_ptr),
        load_filters(top_k_ptr, top_p_ptr, min_p_ptr, request.state),
        request,
        pos,
        load_draft_token(drafts, request, pos, vocab_size, COMPACT_DRAFTS),
        tl.full((), True, tl.int1),
        tl.full((), False, tl.int1),
        None,
        tl.full((), 0.0, tl.float32),
        tile_list_ptr,
        candidates_ptr,
        row_ptr,
        KEY_BITS,
        TILE,
        PADDED_TILES,
        EXACT,
    )
    tl.store(outcome_ptr + row, outcome)
