"""The token that replaces a rejected sampled draft: masses by every rank, then the token by the one that holds it."""

import triton
import triton.language as tl

from ..bounds import CAPACITY
from ..candidates import Candidates, draw_candidate
from ..constants import (
    BAD_ROW,
    EXACT,
    LOG2_E,
    NO_TOKEN,
    NOT_HELD,
    NUM_CANDIDATES,
    RESIDUAL,
    ROW_COLUMNS,
    THRESHOLD,
)
from ..draw import pick
from ..load import Noise, Tiles, load_position, load_request
from ..noise import draw_uniform
from ..residual import tile_residual
from .pieces import UNALIGNED, Pieces, collect, draw_held, locate, merge

COUNTS = ["num_tiles", "num_cut", "num_groups", "most_whole", "first_tile", "end_tile", "sent_stride"]
ROW_COUNTS = ["num_row_tiles", "num_cut_row", "most_whole_row", "first_row_tile", "end_row_tile"]


@triton.jit
def _held_residual(
    tile,
    logits_row_ptr,
    request,
    pos,
    draft_probs_ptr,
    draft_probs_stride,
    draft_logits_ptr,
    draft_logits_stride_0,
    draft_logits_stride_1,
    row_ptr,
    vocab_size,
    TILE: tl.constexpr,
):
    """Residual weights of a tile of a request's rejected row, and its tokens, ``[TILE]`` each."""
    row = request.start_row + pos
    draft_probs_row_ptr = None
    draft_logits_row_ptr = None
    if draft_probs_ptr is not None:
        draft_probs_row_ptr = draft_probs_ptr + (row - request.index) * draft_probs_stride
    else:
        offset = request.state * draft_logits_stride_0 + pos.to(tl.int64) * draft_logits_stride_1
        draft_logits_row_ptr = draft_logits_ptr + offset
    return tile_residual(
        tile,
        logits_row_ptr,
        draft_probs_row_ptr,
        draft_logits_row_ptr,
        row_ptr + row * ROW_COLUMNS,
        None,
        request.temperature,
        LOG2_E / request.temperature,
        0.0,
        False,
        vocab_size,
        TILE,
        EXACT,
    )


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=UNALIGNED)
def shard_residual_kernel(
    logits_ptr,  # [num_rows, columns]: this rank's
    logits_stride,
    cu_num_logits_ptr,  # [num_reqs + 1]
    state_indices_ptr,  # [num_reqs] or None
    temperature_ptr,  # [max_reqs]
    draft_probs_ptr,  # [num_rows - num_reqs, draft_vocab] or None
    draft_probs_stride,
    draft_logits_ptr,  # [max_reqs, max_drafts, draft_vocab] or None
    draft_logits_stride_0,
    draft_logits_stride_1,
    places_ptr,  # [num_tiles]
    cut_tiles_ptr,  # [num_cut]
    cut_ptr,  # [num_rows, num_cut, TILE], or None
    row_ptr,  # [num_rows, ROW_COLUMNS], see decide.py
    pending_ptr,  # [num_reqs]
    masses_ptr,  # [num_reqs, most_whole] out
    cut_masses_ptr,  # [num_reqs, num_cut] out, or None
    first,
    first_tile,
    end_tile,
    end,
    most_whole,
    num_cut,
    num_groups,
    vocab_size,
    TILE: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One program per (group of STEPS whole tiles, or cut tile; request)."""
    group, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    pos = tl.load(pending_ptr + index)
    if pos < 0:
        return
    request = load_request(index, cu_num_logits_ptr, state_indices_ptr, temperature_ptr)
    pieces = Pieces(places_ptr, most_whole, first_tile, end_tile, logits_ptr, logits_stride, first, cut_ptr, num_cut)
    steps = tl.arange(0, STEPS)
    tile, count, limit = first_tile + group * STEPS, STEPS, end
    if cut_ptr is not None:
        if group >= num_groups:
            tile, count, limit = tl.load(cut_tiles_ptr + group - num_groups), 1, vocab_size
    _is_held, logits_row_ptr = locate(pieces, request.start_row + pos, tile, TILE)
    sums = tl.zeros([STEPS], tl.float32)
    for step in range(count):
        w, _token_ids = _held_residual(
            tile + step,
            logits_row_ptr,
            request,
            pos,
            draft_probs_ptr,
            draft_probs_stride,
            draft_logits_ptr,
            draft_logits_stride_0,
            draft_logits_stride_1,
            row_ptr,
            limit,
            TILE,
        )
        sums = tl.where(steps == step, tl.sum(w, axis=0), sums)
    if group < num_groups:
        places = index * most_whole + tile - first_tile + steps
        tl.store(masses_ptr + places, sums, mask=tile + steps < end_tile)
    elif cut_ptr is not None:
        tl.store(cut_masses_ptr + index * num_cut + group - num_groups + steps, sums, mask=steps < 1)


@triton.jit(do_not_specialize=COUNTS + ROW_COUNTS, do_not_specialize_on_alignment=UNALIGNED)
def shard_recover_kernel(
    logits_ptr,  # [num_rows, columns]: this rank's
    logits_stride,
    cu_num_logits_ptr,  # [num_reqs + 1]
    state_indices_ptr,  # [num_reqs] or None
    temperature_ptr,  # [max_reqs]
    seeds_ptr,  # [max_reqs]
    positions_ptr,  # [num_rows] or None
    draft_probs_ptr,  # [num_rows - num_reqs, draft_vocab] or None
    draft_probs_stride,
    draft_logits_ptr,  # [max_reqs, max_drafts, draft_vocab] or None
    draft_logits_stride_0,
    draft_logits_stride_1,
    sent_masses_ptr,  # [ranks, num_reqs, most_whole], ranks sent_stride apart
    sent_stride,
    places_ptr,  # [num_tiles]
    cut_ptr,  # [num_rows, num_cut, TILE], or None
    cut_masses_ptr,  # [num_reqs, num_cut], or None
    tile_max_ptr,  # [num_rows, num_row_tiles], of whole rows
    tile_sum_ptr,  # [num_rows, num_row_tiles]
    tile_list_ptr,  # [num_rows, num_row_tiles + CAPACITY], see filters.py; None where no request filters
    candidates_ptr,  # [num_rows, CAPACITY], or None
    row_places_ptr,  # [num_row_tiles]
    row_ptr,  # [num_rows, ROW_COLUMNS], see decide.py
    pending_ptr,  # [num_reqs]
    token_ptr,  # [num_reqs] out: the token, NOT_HELD where another rank finds it or none is wanted
    first,
    first_tile,
    end_tile,
    most_whole,
    num_cut,
    first_row_tile,
    end_row_tile,
    most_whole_row,
    num_cut_row,
    vocab_size,
    num_tiles,
    num_row_tiles,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    ROW_TILE: tl.constexpr,
    PADDED_ROW_TILES: tl.constexpr,
):
    """One program per request: pick a tile by the masses, and the token in it where this rank holds it.

    Names with ``row`` are of the tiles of rows' statistics, which are smaller where a request filters.
    """
    index = tl.program_id(0).to(tl.int64)
    pos = tl.load(pending_ptr + index)
    token = tl.full((), NOT_HELD, tl.int32)
    if pos >= 0:
        request = load_request(index, cu_num_logits_ptr, state_indices_ptr, temperature_ptr)
        pieces = Pieces(
            places_ptr, most_whole, first_tile, end_tile, logits_ptr, logits_stride, first, cut_ptr, num_cut
        )
        row = request.start_row + pos
        position = load_position(Noise(seeds_ptr, positions_ptr), request, pos)
        uniform = draw_uniform(tl.load(seeds_ptr + request.state), position, RESIDUAL)
        masses = collect(sent_masses_ptr, sent_stride, cut_masses_ptr, pieces, index, num_tiles, PADDED_TILES)
        masses = masses.to(tl.float64)
        tile, share = pick(masses, tl.arange(0, PADDED_TILES), uniform * tl.sum(masses, axis=0))
        if tile != NO_TOKEN:
            is_held, logits_row_ptr = locate(pieces, row, tile, TILE)
            if is_held:
                w, token_ids = _held_residual(
                    tile,
                    logits_row_ptr,
                    request,
                    pos,
                    draft_probs_ptr,
                    draft_probs_stride,
                    draft_logits_ptr,
                    draft_logits_stride_0,
                    draft_logits_stride_1,
                    row_ptr,
                    vocab_size,
                    TILE,
                )
                fine = w.to(tl.float64)
                token, _share = pick(fine, token_ids, share * tl.sum(fine, axis=0))
        else:
            # An empty residual: the target row, filtered, takes its place.
            scale = LOG2_E / request.temperature
            threshold = tl.load(row_ptr + row * ROW_COLUMNS + THRESHOLD)
            is_gathered = tl.full((), False, tl.int1)
            if candidates_ptr is not None:
                count = tl.load(row_ptr + row * ROW_COLUMNS + NUM_CANDIDATES).to(tl.int32)
                is_gathered = count <= CAPACITY
                if is_gathered:
                    ids_ptr = tile_list_ptr + row * (num_row_tiles + CAPACITY) + num_row_tiles
                    candidates = Candidates(candidates_ptr + row * CAPACITY, ids_ptr, count)
                    token = draw_candidate(candidates, scale, threshold, tl.full((), -1, tl.int32), uniform)
            if is_gathered == 0:
                row_pieces = Pieces(
                    row_places_ptr,
                    most_whole_row,
                    first_row_tile,
                    end_row_tile,
                    logits_ptr,
                    logits_stride,
                    first,
                    cut_ptr,
                    num_cut_row,
                )
                tiles = Tiles(tile_max_ptr, tile_sum_ptr, None, num_row_tiles)
                token = draw_held(
                    row_pieces, tiles, row, scale, threshold, uniform, vocab_size, ROW_TILE, PADDED_ROW_TILES
                )
    tl.store(token_ptr + index, token)


@triton.jit(do_not_specialize=["sent_token_stride", "token_ids_stride"], do_not_specialize_on_alignment=UNALIGNED)
def shard_write_kernel(
    sent_token_ptr,  # [ranks, num_reqs]
    sent_token_stride,
    pending_ptr,  # [num_reqs]
    token_ids_ptr,  # [num_reqs, max_num_draft_tokens + 1] out
    token_ids_stride,
    bad_row_counter_ptr,  # [1] or None
    RANKS: tl.constexpr,
):
    """One program per request: write the token that some rank found."""
    index = tl.program_id(0).to(tl.int64)
    pos = tl.load(pending_ptr + index)
    if pos >= 0:
        token = merge(sent_token_ptr, sent_token_stride, index, pos >= 0, BAD_ROW, RANKS)
        if bad_row_counter_ptr is not None:
            tl.atomic_add(bad_row_counter_ptr, 1, mask=token == BAD_ROW, sem="relaxed")
        tl.store(token_ids_ptr + index * token_ids_stride + pos, tl.maximum(token, 0).to(tl.int64))
