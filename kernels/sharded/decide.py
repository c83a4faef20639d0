"""From the statistics of whole rows to tokens: every rank decides alike, and the one that holds the tile finds it."""

import triton
import triton.language as tl

from ..bounds import CAPACITY
from ..candidates import Candidates
from ..constants import (
    BAD_ROW,
    DRAW,
    EXACT,
    GREEDY_BELOW,
    LOG2_E,
    NEEDS_RESIDUAL,
    NO_TOKEN,
    NOT_HELD,
    NUM_CANDIDATES,
    ROW_COLUMNS,
    THRESHOLD,
)
from ..draw import first_within, largest_tile
from ..load import Drafts, Noise, Request, Tiles, load_draft_token, load_position, load_request
from ..noise import draw_uniform
from ..outcome import ratio_test
from ..output import Output, end_request
from .filters import ROOM, filters_of, find_candidates
from .flat import flat_end
from .pieces import UNALIGNED, Pieces, collect_row, draw_held, locate, merge

COUNTS = ["num_tiles", "num_cut", "most_whole", "first_tile", "end_tile", "begun_tile", "end_begun", "sent_stride"]


@triton.jit
def _greedy_outcome(pieces, tiles, row, token, vocab_size, TILE: tl.constexpr, PADDED_TILES: tl.constexpr):
    """The first token with the row's largest logit; a row without a usable one has its first token as argmax."""
    top, tile = largest_tile(tiles, row, PADDED_TILES)
    outcome = tl.where(token == 0, 0, BAD_ROW)
    if tile != NO_TOKEN:
        outcome = tl.full((), NOT_HELD, tl.int32)
        is_held, row_ptr = locate(pieces, row, tile, TILE)
        if is_held:
            outcome = first_within(row_ptr, tile, top, vocab_size, TILE)
    return outcome


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=UNALIGNED)
def shard_decide_kernel(
    logits_ptr,  # [num_rows, columns]: this rank's
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
    sent_max_ptr,  # [ranks, num_rows, most_whole], ranks sent_stride apart, as the three below
    sent_sum_ptr,
    sent_draft_max_ptr,  # or None
    sent_draft_sum_ptr,  # or None
    sent_logit_ptr,  # [ranks, num_rows], ranks sent_stride apart, or None
    sent_stride,
    places_ptr,  # [num_tiles]
    cut_ptr,  # [num_rows, num_cut, TILE], or None
    cut_max_ptr,  # [num_rows, num_cut], or None, as the three below
    cut_sum_ptr,
    cut_draft_max_ptr,
    cut_draft_sum_ptr,
    tile_max_ptr,  # [num_rows, num_tiles] out, of whole rows, as the three below
    tile_sum_ptr,
    draft_tile_max_ptr,  # or None
    draft_tile_sum_ptr,  # or None
    outcome_ptr,  # [num_rows] out: what each row without filters found, NOT_HELD where another rank finds it
    row_ptr,  # [num_rows, ROW_COLUMNS] out: what a residual needs, where drafts are sampled
    tile_list_ptr,  # [num_rows, num_tiles + CAPACITY] scratch, None where none filters, as the three below
    count_ptr,  # [num_rows] out: candidates of filtered rows that this rank holds; above ROOM: too many
    values_ptr,  # [num_rows, ROOM] out: their logits, in their dtype
    ids_ptr,  # [num_rows, ROOM] out: their tokens, ascending
    first,
    first_tile,
    end_tile,
    begun_tile,
    end_begun,
    most_whole,
    num_cut,
    vocab_size,
    num_tiles,
    COMPACT_DRAFTS: tl.constexpr,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    RANKS: tl.constexpr,
):
    """One program per (row, request); what a row with filters finds, ``shard_filter_kernel`` says."""
    pos, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    request = load_request(index, cu_num_logits_ptr, state_indices_ptr, temperature_ptr)
    if pos > request.num_drafts:
        return
    pieces = Pieces(places_ptr, most_whole, first_tile, end_tile, logits_ptr, logits_stride, first, cut_ptr, num_cut)
    tiles = Tiles(tile_max_ptr, tile_sum_ptr, None, num_tiles)
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
    IS_ONE_HOT: tl.constexpr = draft_probs_ptr is None and draft_logits_ptr is None
    row = request.start_row + pos
    token = load_draft_token(drafts, request, pos, vocab_size, COMPACT_DRAFTS)
    is_needed = tl.full((), True, tl.int1)
    if bonus_token_ids_ptr is not None:
        is_needed = pos < request.num_drafts
    outcome = tl.full((), BAD_ROW, tl.int32)
    if is_needed:
        collect_row(sent_max_ptr, sent_sum_ptr, sent_stride, cut_max_ptr, cut_sum_ptr, pieces, tiles, row, PADDED_TILES)
        scale = LOG2_E / request.temperature
        if request.temperature < GREEDY_BELOW:
            outcome = _greedy_outcome(pieces, tiles, row, token, vocab_size, TILE, PADDED_TILES)
        elif seeds_ptr is not None:
            is_drawn, applies = tl.full((), True, tl.int1), tl.full((), False, tl.int1)
            if not IS_ONE_HOT:
                is_drawn = token < 0
                tl.store(row_ptr + row * ROW_COLUMNS + THRESHOLD, float("-inf"))
                tl.store(row_ptr + row * ROW_COLUMNS + NUM_CANDIDATES, CAPACITY + 1.0)
                if draft_logits_ptr is not None:
                    if is_drawn == 0:
                        collect_row(
                            sent_draft_max_ptr,
                            sent_draft_sum_ptr,
                            sent_stride,
                            cut_draft_max_ptr,
                            cut_draft_sum_ptr,
                            pieces,
                            draft_tiles,
                            row,
                            PADDED_TILES,
                        )
            if tile_list_ptr is not None:
                filters, applies = filters_of(request, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size)
                if applies:
                    found = find_candidates(
                        pieces,
                        begun_tile,
                        end_begun,
                        tiles,
                        row,
                        filters,
                        scale,
                        tile_list_ptr + row * (num_tiles + CAPACITY),
                        values_ptr + row * ROOM,
                        ids_ptr + row * ROOM,
                        vocab_size,
                        TILE,
                        PADDED_TILES,
                    )
                    tl.store(count_ptr + row, found)
            if applies == 0:
                if is_drawn:
                    uniform = draw_uniform(tl.load(seeds_ptr + request.state), load_position(noise, request, pos), DRAW)
                    outcome = draw_held(
                        pieces, tiles, row, scale, float("-inf"), uniform, vocab_size, TILE, PADDED_TILES
                    )
                elif not IS_ONE_HOT:
                    logit = merge(sent_logit_ptr, sent_stride, row, token >= 0, float("-inf"), RANKS)
                    survives = ratio_test(
                        logit,
                        tiles,
                        draft_tiles,
                        drafts,
                        noise,
                        request,
                        pos,
                        token,
                        float("-inf"),
                        Candidates(None, None, None),
                        row_ptr,
                        PADDED_TILES,
                        EXACT,
                    )
                    outcome = tl.where(survives, token, NEEDS_RESIDUAL)
    tl.store(outcome_ptr + row, outcome)


@triton.jit(
    do_not_specialize=["sent_outcome_stride", "rows_per_req", "token_ids_stride"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def shard_end_kernel(
    sent_outcome_ptr,  # [ranks, num_rows]
    sent_outcome_stride,
    cu_num_logits_ptr,  # [num_reqs + 1]
    draft_token_ids_ptr,  # [num_rows] or [num_rows - num_reqs]
    state_indices_ptr,  # [num_reqs] or None
    temperature_ptr,  # [max_reqs] or None
    bonus_token_ids_ptr,  # [num_reqs] or None
    pending_ptr,  # [num_reqs] out: position of the row to draw a residual from, -1 if none; or None
    token_ids_ptr,  # [num_reqs, max_num_draft_tokens + 1] out
    token_ids_stride,
    num_sampled_ptr,  # [num_reqs] out
    bad_row_counter_ptr,  # [1] or None
    counters_ptr,  # [num_methods, 8] or None
    vocab_size,
    rows_per_req,
    COMPACT_DRAFTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RANKS: tl.constexpr,
    IS_FILTERED: tl.constexpr,
):
    """One program per request."""
    index = tl.program_id(0).to(tl.int64)
    request = load_request(index, cu_num_logits_ptr, state_indices_ptr, temperature_ptr)
    columns = tl.arange(0, BLOCK_K)
    is_row = columns <= request.num_drafts
    outcomes = merge(sent_outcome_ptr, sent_outcome_stride, request.start_row + columns, is_row, BAD_ROW, RANKS)
    swept, end = tl.full((), 0, tl.int32), tl.full((), -1, tl.int32)
    if IS_FILTERED:
        # A flat row that did not travel: what survives before it is emitted, and no more.
        end = flat_end(request, draft_token_ids_ptr, outcomes, COMPACT_DRAFTS, BLOCK_K)
        swept = request.num_drafts + 1
        num_drafts = tl.where(end >= 0, end - 1, request.num_drafts)
        request = Request(index, request.state, request.start_row, num_drafts, request.temperature)
    end_request(
        request,
        Noise(None, None),
        Output(
            token_ids_ptr, token_ids_stride, num_sampled_ptr, bonus_token_ids_ptr, bad_row_counter_ptr, counters_ptr
        ),
        draft_token_ids_ptr,
        outcomes,
        None,
        pending_ptr,
        tl.full((), False, tl.int1),
        swept,
        rows_per_req,
        vocab_size,
        COMPACT_DRAFTS,
        BLOCK_K,
        EXACT,
    )
    if IS_FILTERED:
        if counters_ptr is not None:
            # The last token that such a request emits is a draft token, too, not one drawn behind them.
            places = tl.arange(0, 8)
            more = tl.where((places == 0) & (end >= 0), 1, tl.where((places == 2) & (end >= 2), -1, 0))
            tl.atomic_add(counters_ptr + places, more.to(tl.int64), mask=more != 0, sem="relaxed")
