"""Where a row's tiles are, seen from one rank, and what the ranks have sent of them."""

from typing import NamedTuple

import triton
import triton.language as tl

from .. import constants
from ..constants import BAD_ROW, NO_TOKEN, NOT_HELD
from ..draw import choose_tile, load_tiles, token_within

UNALIGNED = (
    *constants.UNALIGNED,
    "places_ptr",
    "row_places_ptr",
    "cut_tiles_ptr",
    "part_columns_ptr",
    "part_places_ptr",
    "parts_ptr",
    "sent_parts_ptr",
    "target_logit_ptr",
    "sent_logit_ptr",
    "sent_max_ptr",
    "sent_sum_ptr",
    "sent_draft_max_ptr",
    "sent_draft_sum_ptr",
    "sent_outcome_ptr",
    "sent_masses_ptr",
    "sent_token_ptr",
    "sent_count_ptr",
    "sent_values_ptr",
    "sent_ids_ptr",
    "count_ptr",
    "values_ptr",
    "ids_ptr",
    "flat_pos_ptr",
    "cut_max_ptr",
    "cut_sum_ptr",
    "cut_draft_max_ptr",
    "cut_draft_sum_ptr",
    "cut_masses_ptr",
    "masses_ptr",
)
"""As ``constants.UNALIGNED``: what is exchanged lies in sections of one buffer."""


class Pieces(NamedTuple):
    """The logits that a rank can read: its own columns, and the cut tiles; see ``geometry.py``.

    places_ptr: ``[num_tiles]``. own_ptr: Own columns of the batch's rows. first: The first of them. cut_ptr:
    ``[num_rows, num_cut, TILE]``, None where no tile is cut.
    """

    places_ptr: tl.tensor
    most_whole: tl.tensor
    first_tile: tl.tensor
    end_tile: tl.tensor
    own_ptr: tl.tensor
    own_stride: tl.tensor
    first: tl.tensor
    cut_ptr: tl.tensor
    num_cut: tl.tensor


@triton.jit
def cut_row(cut_ptr, num_cut, row, number, tile, TILE: tl.constexpr):
    """Where a row of logits would begin if all of it lay as its cut tile ``number`` does, which is ``tile`` of it."""
    return cut_ptr + ((row * num_cut + number) * TILE - tile * TILE)


@triton.jit
def locate(pieces, row, tile, TILE: tl.constexpr):
    """Whether this rank can read a tile of a row, and where the row would begin if all of it lay as that tile does."""
    is_held = (tile >= pieces.first_tile) & (tile < pieces.end_tile)
    row_ptr = pieces.own_ptr + row * pieces.own_stride - pieces.first
    if pieces.cut_ptr is not None:
        place = tl.load(pieces.places_ptr + tile)
        is_held = is_held | (place < 0)
        row_ptr = tl.where(place < 0, cut_row(pieces.cut_ptr, pieces.num_cut, row, -1 - place, tile, TILE), row_ptr)
    return is_held, row_ptr


@triton.jit
def collect(sent_ptr, sent_stride, cut_ptr, pieces, row, num_tiles, PADDED_TILES: tl.constexpr):
    """A number for each tile of a row, ``[PADDED_TILES]``, 0 beyond the last.

    sent_ptr: What each rank sent of its whole tiles, ``[num_rows, most_whole]`` each, ``sent_stride`` apart. cut_ptr:
    ``[num_rows, num_cut]``, or None.
    """
    tile_ids = tl.arange(0, PADDED_TILES)
    place = tl.load(pieces.places_ptr + tile_ids, mask=tile_ids < num_tiles, other=0)
    rank = (place // pieces.most_whole).to(tl.int64)
    offsets = rank * sent_stride + row * pieces.most_whole + place % pieces.most_whole
    numbers = tl.load(sent_ptr + offsets, mask=(tile_ids < num_tiles) & (place >= 0), other=0.0)
    if cut_ptr is not None:
        cut = tl.load(cut_ptr + row * pieces.num_cut - 1 - place, mask=place < 0, other=0.0)
        numbers = tl.where(place < 0, cut, numbers)
    return numbers


@triton.jit
def collect_row(
    sent_max_ptr,
    sent_sum_ptr,
    sent_stride,
    cut_max_ptr,
    cut_sum_ptr,
    pieces,
    tiles,
    row,
    PADDED_TILES: tl.constexpr,
):
    """Put the statistics of a row's tiles together, where a single rank would have left them."""
    tile_ids = tl.arange(0, PADDED_TILES)
    maxima = collect(sent_max_ptr, sent_stride, cut_max_ptr, pieces, row, tiles.count, PADDED_TILES)
    sums = collect(sent_sum_ptr, sent_stride, cut_sum_ptr, pieces, row, tiles.count, PADDED_TILES)
    tl.store(tiles.max_ptr + row * tiles.count + tile_ids, maxima, mask=tile_ids < tiles.count)
    tl.store(tiles.sum_ptr + row * tiles.count + tile_ids, sums, mask=tile_ids < tiles.count)
    tl.debug_barrier()


@triton.jit
def draw_held(
    pieces, tiles, row, scale, threshold, uniform, vocab_size, TILE: tl.constexpr, PADDED_TILES: tl.constexpr
):
    """As ``draw.draw_token``; NOT_HELD where the chosen tile is another rank's."""
    maxima, sums = load_tiles(tiles, row, PADDED_TILES)
    top, tile, share = choose_tile(maxima, sums, scale, threshold, uniform, PADDED_TILES)
    token = tl.full((), BAD_ROW, tl.int32)
    if tile != NO_TOKEN:
        token = tl.full((), NOT_HELD, tl.int32)
        is_held, row_ptr = locate(pieces, row, tile, TILE)
        if is_held:
            token = token_within(
                row_ptr, tile, share, maxima, top, scale, threshold, -1, vocab_size, TILE, PADDED_TILES, False
            )
    return token


@triton.jit
def merge(sent_ptr, sent_stride, offsets, mask, other, RANKS: tl.constexpr):
    """The largest of what the ranks sent for the same places."""
    largest = tl.load(sent_ptr + offsets, mask=mask, other=other)
    for rank in tl.static_range(1, RANKS):
        sent = tl.load(sent_ptr + rank * sent_stride + offsets, mask=mask, other=other)
        largest = tl.maximum(largest, sent)
    return largest
