"""What compiled code is told of a rank's part of the logits, and where it finds a tile."""

from typing import NamedTuple

import numpy as np
from numba import carray, types
from numba.np.unsafe.ndarray import to_fixed_tuple

from vllm_specopt.cpu.memory import jit, pointer, read_int, size_of
from vllm_specopt.cpu.rows import TILE, Row

NOT_HELD, NEEDS_RESIDUAL, BAD_ROW = np.int64(-(2**31)), np.int64(-2), np.int64(-1)
"""What a row found where it is not a token, as in ``kernels/constants.py``."""


class Share(NamedTuple):
    """Addresses of fp32 numbers, but for places, outcome, pending and found (int32) and frames (fp64).

    first, columns: Tokens that this rank holds. first_tile, end_tile, most_whole, num_cut, places: See
        ``kernels/sharded/geometry.py``.
    own_*: What this rank tells of its whole tiles, ``[num_rows, most_whole]``, masses by request. Without ``own``: of
        whole rows, ``[num_rows, num_tiles]``; cut tiles are written by every rank, the others collected in between.
    logit: ``[num_rows]``, the draft tokens' target logits: this rank's, then all ranks'.
    cut: ``[num_rows, num_cut, TILE]``, the logits of cut tiles, in their dtype.
    frames: ``[2, num_rows, FRAME]``, of the target's rows, then the draft's, see ``rows.py``.
    outcome, pending, found: ``[num_rows]``, ``[num_reqs]``, ``[num_reqs]``, as in ``kernels/sharded``.
    """

    first: int
    columns: int
    first_tile: int
    end_tile: int
    most_whole: int
    num_cut: int
    places: int
    own_tops: int
    own_sums: int
    own_draft_tops: int
    own_draft_sums: int
    own_masses: int
    tops: int
    sums: int
    draft_tops: int
    draft_sums: int
    masses: int
    logit: int
    cut: int
    frames: int
    outcome: int
    pending: int
    found: int


SHARE_LENGTH = len(Share._fields)


class Pieces(NamedTuple):
    """A row whose tiles this rank can read: its own, and the cut ones.

    row: Its address is where the row would begin if all of it lay as the own tiles do. cut: Address of its cut tiles;
    0 where they lie as the others do.
    """

    row: Row
    cut: int


@jit
def share_of(plan):
    """What the plan's ``shard`` points to."""
    return Share(*to_fixed_tuple(carray(pointer(plan.shard, types.int64), SHARE_LENGTH), SHARE_LENGTH))


@jit
def place_of_tile(share, tile):
    """Below 0 for a cut tile: -1 - its number among them."""
    return read_int(share.places, tile, False)


@jit
def is_held(share, tile):
    """Whether this rank can read a tile."""
    return place_of_tile(share, tile) < 0 or share.first_tile <= tile < share.end_tile


@jit
def source_of(share, pieces, tile):
    """The row from which to read a tile: as if all of it lay as that tile does."""
    row, place = pieces.row, place_of_tile(share, tile)
    if place < 0 and pieces.cut:
        address = pieces.cut + (-1 - place - tile) * TILE * size_of(row.kind)
        return Row(address, row.kind, row.vocab, row.origin, row.is_shifted)
    return row


@jit
def target_pieces(plan, share, index):
    """A row of target logits."""
    size = size_of(plan.kind)
    address = plan.logits + (index * plan.logits_stride - share.first) * size
    cut = share.cut + index * share.num_cut * TILE * size if share.num_cut else np.int64(0)
    return Pieces(Row(address, plan.kind, plan.vocab, np.float32(0.0), np.int64(0)), cut)


@jit
def shifted(pieces, origin, is_shifted):
    """A row whose logits count relative to an origin, or not."""
    row = pieces.row
    return Pieces(Row(row.address, row.kind, row.vocab, origin, is_shifted), pieces.cut)
