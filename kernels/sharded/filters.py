"""Rows whose requests filter: the ranks exchange the few tokens that may be kept.

The bound above which they lie follows from the statistics of the whole row, so that all ranks' candidates together are
those that a single rank gathers, in the same order. Rows with too many are left to ``flat.py``.
"""

import triton
import triton.language as tl

from ..bounds import CAPACITY
from ..candidates import Candidates, draw_candidate, gather, list_tiles, threshold_among
from ..constants import (
    BAD_ROW,
    DRAW,
    EXACT,
    FLAT,
    GREEDY_BELOW,
    LOG2_E,
    NEEDS_RESIDUAL,
    NUM_CANDIDATES,
    ROW_COLUMNS,
    THRESHOLD,
)
from ..draw import load_tiles, tile_masses
from ..filters import bound_of
from ..load import Drafts, Noise, Tiles, is_filtered, load_draft_token, load_filters, load_position, load_request
from ..noise import draw_uniform
from ..outcome import ratio_test
from .pieces import UNALIGNED, cut_row, merge

ROOM = tl.constexpr(256)
"""Candidates of a row that a rank sends at most."""


@triton.jit
def filters_of(request, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size):
    """A request's filters, and whether its rows are drawn with them."""
    filters = load_filters(top_k_ptr, top_p_ptr, min_p_ptr, request.state)
    return filters, is_filtered(filters, vocab_size) & (request.temperature >= GREEDY_BELOW)


@triton.jit
def _gather_held(
    pieces,
    begun_tile,
    end_begun,
    row,
    list_ptr,
    values_ptr,
    ids_ptr,
    maxima,
    low,
    top,
    vocab_size,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
):
    """Collect a row's candidates in this rank's tiles and in the cut ones that begin there; the count of ``gather``."""
    tile_ids = tl.arange(0, PADDED_TILES)
    found = tl.full((), 0, tl.int32)
    is_own = (tile_ids >= pieces.first_tile) & (tile_ids < pieces.end_tile)
    num_listed = list_tiles(list_ptr, tl.where(is_own, maxima, float("-inf")), low, PADDED_TILES)
    own_ptr = pieces.own_ptr + row * pieces.own_stride - pieces.first
    found = gather(own_ptr, list_ptr, num_listed, values_ptr, ids_ptr, low, top, found, vocab_size, TILE, ROOM).count
    if pieces.cut_ptr is not None:
        if begun_tile >= 0:
            is_begun = (tile_ids >= begun_tile) & (tile_ids < end_begun)
            begun = tl.where(is_begun, maxima, float("-inf"))
            num_listed = list_tiles(list_ptr, begun, low, PADDED_TILES)
            number = -1 - tl.load(pieces.places_ptr + begun_tile)
            cut_ptr = cut_row(pieces.cut_ptr, pieces.num_cut, row, number, begun_tile, TILE)
            found = gather(
                cut_ptr, list_ptr, num_listed, values_ptr, ids_ptr, low, top, found, vocab_size, TILE, ROOM
            ).count
    return found


@triton.jit
def find_candidates(
    pieces,
    begun_tile,
    end_begun,
    tiles,
    row,
    filters,
    scale,
    list_ptr,
    values_ptr,
    ids_ptr,
    vocab_size,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
):
    """How many candidates of a row this rank holds, above ROOM: too many.

    values_ptr, ids_ptr: ``[ROOM]`` out: their logits in their dtype, their tokens, ascending. list_ptr: Scratch for
    numbers of tiles.
    """
    maxima, sums = load_tiles(tiles, row, PADDED_TILES)
    top, masses = tile_masses(maxima, sums, scale, float("-inf"))
    found = tl.full((), ROOM + 1, tl.int32)
    if (top > float("-inf")) & (top < float("inf")):
        bound = bound_of(maxima, masses, top, filters, scale, vocab_size, TILE)
        found = _gather_held(
            pieces,
            begun_tile,
            end_begun,
            row,
            list_ptr,
            values_ptr,
            ids_ptr,
            maxima,
            bound.low,
            top,
            vocab_size,
            TILE,
            PADDED_TILES,
        )
    return found


@triton.jit
def _join(
    sent_count_ptr,
    sent_values_ptr,
    sent_ids_ptr,
    stride,
    values_stride,
    values_ptr,
    ids_ptr,
    row,
    RANKS: tl.constexpr,
):
    """Put all ranks' candidates of a row together; a count above CAPACITY where some rank or all have too many."""
    places = tl.arange(0, ROOM)
    total = tl.full((), 0, tl.int32)
    for rank in tl.static_range(RANKS):
        count = tl.load(sent_count_ptr + rank * stride + row)
        total = tl.where((count > ROOM) | (total + count > CAPACITY), CAPACITY + 1, total)
        fits = places < tl.where(total <= CAPACITY, count, 0)
        x = tl.load(sent_values_ptr + rank * values_stride + row * ROOM + places, mask=fits, other=0.0)
        ids = tl.load(sent_ids_ptr + rank * stride + row * ROOM + places, mask=fits, other=0)
        tl.store(values_ptr + total + places, x.to(tl.float32), mask=fits)
        tl.store(ids_ptr + total + places, ids, mask=fits)
        total = tl.where(total <= CAPACITY, total + count, total)
    tl.debug_barrier()
    return Candidates(values_ptr, ids_ptr, total)


@triton.jit(
    do_not_specialize=["num_tiles", "sent_stride", "sent_values_stride", "sent_logit_stride"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def shard_filter_kernel(
    sent_outcome_ptr,  # [ranks, num_rows], ranks sent_stride apart, as all but the values
    sent_count_ptr,  # [ranks, num_rows]
    sent_values_ptr,  # [ranks, num_rows, ROOM], ranks sent_values_stride apart
    sent_ids_ptr,  # [ranks, num_rows, ROOM]
    sent_stride,
    sent_values_stride,
    sent_logit_ptr,  # [ranks, num_rows], ranks sent_logit_stride apart, or None
    sent_logit_stride,
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
    tile_sum_ptr,  # [num_rows, num_tiles]
    draft_tile_max_ptr,  # [num_rows, num_tiles] or None
    draft_tile_sum_ptr,  # [num_rows, num_tiles] or None
    tile_list_ptr,  # [num_rows, num_tiles + CAPACITY] out: ids of candidates, behind num_tiles
    candidates_ptr,  # [num_rows, CAPACITY] out: their logits
    row_ptr,  # [num_rows, ROW_COLUMNS] out: what a residual needs, where drafts are sampled
    outcome_ptr,  # [num_rows] out: what each row found, or FLAT
    vocab_size,
    num_tiles,
    COMPACT_DRAFTS: tl.constexpr,
    KEY_BITS: tl.constexpr,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    RANKS: tl.constexpr,
):
    """One program per (row, request): what it found, from what all ranks have sent."""
    pos, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    request = load_request(index, cu_num_logits_ptr, state_indices_ptr, temperature_ptr)
    if pos > request.num_drafts:
        return
    row = request.start_row + pos
    filters, applies = filters_of(request, top_k_ptr, top_p_ptr, min_p_ptr, vocab_size)
    IS_ONE_HOT: tl.constexpr = draft_probs_ptr is None and draft_logits_ptr is None
    outcome = merge(sent_outcome_ptr, sent_stride, row, pos >= 0, BAD_ROW, RANKS)
    if applies:
        outcome = tl.full((), FLAT, tl.int32)
        candidates = _join(
            sent_count_ptr,
            sent_values_ptr,
            sent_ids_ptr,
            sent_stride,
            sent_values_stride,
            candidates_ptr + row * CAPACITY,
            tile_list_ptr + row * (num_tiles + CAPACITY) + num_tiles,
            row,
            RANKS,
        )
        if candidates.count <= CAPACITY:
            scale = LOG2_E / request.temperature
            tiles, noise = Tiles(tile_max_ptr, tile_sum_ptr, None, num_tiles), Noise(seeds_ptr, positions_ptr)
            maxima, sums = load_tiles(tiles, row, PADDED_TILES)
            top, masses = tile_masses(maxima, sums, scale, float("-inf"))
            bound = bound_of(maxima, masses, top, filters, scale, vocab_size, TILE)
            threshold = threshold_among(candidates, filters, bound, scale, KEY_BITS)
            token = tl.full((), -1, tl.int32)
            drafts = Drafts(
                draft_token_ids_ptr,
                draft_probs_ptr,
                draft_probs_stride,
                draft_logits_ptr,
                draft_logits_stride_0,
                draft_logits_stride_1,
            )
            if not IS_ONE_HOT:
                token = load_draft_token(drafts, request, pos, vocab_size, COMPACT_DRAFTS)
            if token < 0:
                position = load_position(noise, request, pos)
                uniform = draw_uniform(tl.load(seeds_ptr + request.state), position, DRAW)
                outcome = draw_candidate(candidates, scale, threshold, tl.full((), -1, tl.int32), uniform)
            elif not IS_ONE_HOT:
                survives = ratio_test(
                    merge(sent_logit_ptr, sent_logit_stride, row, token >= 0, float("-inf"), RANKS),
                    tiles,
                    Tiles(draft_tile_max_ptr, draft_tile_sum_ptr, None, num_tiles),
                    drafts,
                    noise,
                    request,
                    pos,
                    token,
                    threshold,
                    candidates,
                    row_ptr,
                    PADDED_TILES,
                    EXACT,
                )
                outcome = tl.where(survives, token, NEEDS_RESIDUAL)
            if not IS_ONE_HOT:
                tl.store(row_ptr + row * ROW_COLUMNS + THRESHOLD, threshold)
                tl.store(row_ptr + row * ROW_COLUMNS + NUM_CANDIDATES, candidates.count.to(tl.float32))
    tl.store(outcome_ptr + row, outcome)
