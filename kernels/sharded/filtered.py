"""Host side of rows whose requests filter: two exchanges, of candidates, and of one flat row per request."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton

from ..bounds import CAPACITY
from ..launch import KEY_BITS, decide_options
from ..shapes import Shapes
from ..variants import Launcher
from .filters import ROOM, shard_filter_kernel
from .flat import CHUNK, shard_flat_kernel, shard_pack_kernel
from .geometry import ALIGNMENT, Geometry, Parcel, Section

_filter, _pack, _flat = map(Launcher, (shard_filter_kernel, shard_pack_kernel, shard_flat_kernel))


class Found(NamedTuple):
    """What a rank finds of each row before filters are applied, to be sent.

    parcel: Its sections are what rows without filters found, ``[num_rows, 1]`` int32, then of the others how many
        candidates this rank holds, ``[num_rows, 1]`` int32, their logits and their tokens, ``[num_rows, ROOM]``.
    tile_list: ``[num_rows, num_tiles + CAPACITY]`` int32.
    """

    parcel: Parcel
    tile_list: torch.Tensor

    @classmethod
    def empty(cls, logits: torch.Tensor, num_tiles: int) -> Found:
        """To be filled by ``shard_decide_kernel``."""
        num_rows, ints, device = len(logits), torch.int32, logits.device
        sections = [Section(num_rows, 1, ints)] * 2
        sections += [Section(num_rows, ROOM.value, dtype) for dtype in (logits.dtype, ints)]
        tile_list = torch.empty(num_rows, num_tiles + CAPACITY.value, dtype=ints, device=device)
        return cls(Parcel(device, *sections), tile_list)


class Swept(NamedTuple):
    """What is known of the batch's whole rows.

    tile_max, tile_sum: ``[num_rows, num_tiles]``; draft_tile_max, draft_tile_sum: of draft logits, or None. sent_logit:
    ``[ranks, num_rows, 1]``, the draft tokens' as ranks sent them; None where drafts are one-hot. row_data:
    ``[num_rows, ROW_COLUMNS]``.
    """

    tile_max: torch.Tensor
    tile_sum: torch.Tensor
    draft_tile_max: torch.Tensor | None
    draft_tile_sum: torch.Tensor | None
    sent_logit: torch.Tensor | None
    found: Found
    row_data: torch.Tensor


class Filtered(NamedTuple):
    """What the filters leave, alike on all ranks.

    outcomes: ``[1, num_rows]`` int32, what each row found; FLAT behind a request's first flat row. tile_list:
    ``[num_rows, num_tiles + CAPACITY]``, ids of candidates behind the tiles. candidates: ``[num_rows, CAPACITY]``.
    """

    outcomes: torch.Tensor
    tile_list: torch.Tensor
    candidates: torch.Tensor


def filter_rows(
    logits: torch.Tensor,  # [num_rows, columns]: this rank's
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    draft_token_ids: torch.Tensor,  # [num_rows] or [num_rows - num_reqs]
    requests: tuple[torch.Tensor | None, ...],
    noise: tuple[torch.Tensor | None, ...],
    draft_forms: tuple,
    filters: tuple[torch.Tensor | None, ...],
    swept: Swept,
    *,
    held: Geometry,
    widths: tuple[int, ...],
    shapes: Shapes,
    variant: tuple,
    gather: Callable[[torch.Tensor], torch.Tensor],
    block_k: int,
    rows_per_req: int,
    compact: bool,
) -> Filtered:
    """What each row found; the statistics and the data of rows become those of what they keep.

    requests: States, temperatures. noise: Seeds, positions. draft_forms: As the kernels take them. filters: top-k,
    top-p, min-p.
    """
    num_rows, num_reqs, device = len(logits), len(cu_num_logits) - 1, logits.device
    padded_tiles = triton.next_power_of_2(held.num_tiles)
    options = decide_options(shapes, True)
    candidates = torch.empty(num_rows, CAPACITY.value, device=device)
    received = gather(swept.found.parcel.buffer)
    sent = [swept.found.parcel.section(number, received) for number in range(4)]
    outcome, tile_list = torch.empty(num_rows, dtype=torch.int32, device=device), swept.found.tile_list
    _filter(
        variant,
        (rows_per_req, num_reqs),
        options,
        *sent,
        received.stride(0),
        sent[2].stride(0),
        swept.sent_logit,
        0 if swept.sent_logit is None else swept.sent_logit.stride(0),
        cu_num_logits,
        draft_token_ids,
        *requests,
        *noise,
        *draft_forms,
        *filters,
        swept.tile_max,
        swept.tile_sum,
        swept.draft_tile_max,
        swept.draft_tile_sum,
        tile_list,
        candidates,
        swept.row_data,
        outcome,
        held.vocab_size,
        held.num_tiles,
        COMPACT_DRAFTS=compact,
        KEY_BITS=KEY_BITS[logits.dtype],
        TILE=held.tile,
        PADDED_TILES=padded_tiles,
        RANKS=held.ranks,
    )
    width = -(-max(widths) // ALIGNMENT) * ALIGNMENT
    parcel = Parcel(device, Section(num_reqs, width, logits.dtype))
    flat_pos = torch.empty(num_reqs, dtype=torch.int32, device=device)
    _pack(
        variant,
        (triton.cdiv(width, CHUNK.value), num_reqs),
        {"num_warps": shapes.decide_warps},
        logits,
        logits.stride(0),
        cu_num_logits,
        draft_token_ids,
        outcome,
        parcel.section(0),
        flat_pos,
        held.columns,
        width,
        COMPACT_DRAFTS=compact,
        BLOCK_K=block_k,
    )
    flat = _side_by_side(parcel.section(0, gather(parcel.buffer)), widths)
    _flat(
        variant,
        (num_reqs,),
        options,
        flat,
        flat.stride(0),
        flat_pos,
        cu_num_logits,
        draft_token_ids,
        *requests,
        *noise,
        *draft_forms,
        *filters,
        swept.tile_max,
        swept.tile_sum,
        swept.draft_tile_max,
        swept.draft_tile_sum,
        tile_list,
        candidates,
        swept.row_data,
        outcome,
        held.vocab_size,
        held.num_tiles,
        COMPACT_DRAFTS=compact,
        KEY_BITS=KEY_BITS[logits.dtype],
        TILE=held.tile,
        PADDED_TILES=padded_tiles,
    )
    return Filtered(outcome[None], tile_list, candidates)


def _side_by_side(sent: torch.Tensor, widths: tuple[int, ...]) -> torch.Tensor:
    """``[num_reqs, vocab]``, rows a multiple of 16 elements apart, from all ranks' ``[ranks, num_reqs, width]``."""
    vocab_size = sum(widths)
    rows = sent.new_empty(sent.shape[1], -(-vocab_size // 16) * 16)[:, :vocab_size]
    return torch.cat([sent[rank, :, :width] for rank, width in enumerate(widths)], dim=1, out=rows)
