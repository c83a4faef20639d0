"""Host side of what follows the decisions where drafts are sampled: the tokens that replace those rejected."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton

from ..shapes import Shapes
from ..variants import Launcher
from .geometry import Geometry, Parcel, Section
from .residual import shard_recover_kernel, shard_residual_kernel, shard_write_kernel

_residual, _recover, _write = map(Launcher, (shard_residual_kernel, shard_recover_kernel, shard_write_kernel))


class Decided(NamedTuple):
    """What the decisions leave, as in ``decide.py``.

    tile_max, tile_sum: ``[num_rows, num_tiles]`` of whole rows. row_data: ``[num_rows, ROW_COLUMNS]``. pending:
    ``[num_reqs]``. cut: ``[num_rows, num_cut, tile]``, None where no tile is cut. tile_list, candidates: As in
    ``Filtered``, None where no request filters.
    """

    tile_max: torch.Tensor
    tile_sum: torch.Tensor
    row_data: torch.Tensor
    pending: torch.Tensor
    cut: torch.Tensor | None
    tile_list: torch.Tensor | None
    candidates: torch.Tensor | None


def recover_tokens(
    logits: torch.Tensor,  # [num_rows, columns]: this rank's
    requests: tuple[torch.Tensor | None, ...],
    noise: tuple[torch.Tensor | None, ...],
    draft_forms: tuple,
    decided: Decided,
    *,
    held: Geometry,
    of_rows: Geometry,
    shapes: Shapes,
    variant: tuple,
    gather: Callable[[torch.Tensor], torch.Tensor],
    token_ids: torch.Tensor,  # [num_reqs, max_num_draft_tokens + 1]
    bad_row_counter: torch.Tensor | None,  # [1]
) -> None:
    """Draw from the residuals of rejected rows, in two exchanges, and write the tokens.

    requests: First rows, states, temperatures. noise: Seeds, positions. draft_forms: As the kernels take them. held,
    of_rows: Tiles of the residual, and of the rows' statistics; of one ``part_tile``.
    """
    num_reqs, device = len(token_ids), logits.device
    padded_tiles = triton.next_power_of_2(held.num_tiles)
    steps = min(shapes.residual_steps, padded_tiles)
    num_groups = triton.cdiv(held.end_tile - held.first_tile, steps)
    parcel = Parcel(device, Section(num_reqs, held.most_whole))
    cut_masses = torch.empty(num_reqs, held.num_cut, dtype=torch.float32, device=device) if held.num_cut else None
    if num_groups + held.num_cut:
        _residual(
            variant,
            (num_groups + held.num_cut, num_reqs),
            {"num_warps": shapes.residual_warps},
            logits,
            logits.stride(0),
            *requests,
            *draft_forms,
            held.places,
            held.cut_tiles,
            decided.cut,
            decided.row_data,
            decided.pending,
            parcel.section(0),
            cut_masses,
            held.first,
            held.first_tile,
            held.end_tile,
            held.end,
            held.most_whole,
            held.num_cut,
            num_groups,
            held.vocab_size,
            TILE=held.tile,
            STEPS=steps,
        )
    masses = parcel.section(0, gather(parcel.buffer))
    found = torch.empty(num_reqs, dtype=torch.int32, device=device)
    _recover(
        variant,
        (num_reqs,),
        {"num_warps": shapes.residual_warps},
        logits,
        logits.stride(0),
        *requests,
        *noise,
        *draft_forms,
        masses,
        masses.stride(0),
        held.places,
        decided.cut,
        cut_masses,
        decided.tile_max,
        decided.tile_sum,
        decided.tile_list,
        decided.candidates,
        of_rows.places,
        decided.row_data,
        decided.pending,
        found,
        held.first,
        held.first_tile,
        held.end_tile,
        held.most_whole,
        held.num_cut,
        of_rows.first_tile,
        of_rows.end_tile,
        of_rows.most_whole,
        of_rows.num_cut,
        held.vocab_size,
        held.num_tiles,
        of_rows.num_tiles,
        TILE=held.tile,
        PADDED_TILES=padded_tiles,
        ROW_TILE=of_rows.tile,
        PADDED_ROW_TILES=triton.next_power_of_2(of_rows.num_tiles),
    )
    tokens = gather(found.view(torch.float32)).view(torch.int32)
    _write(
        variant,
        (num_reqs,),
        {"num_warps": 1},
        tokens,
        tokens.stride(0),
        decided.pending,
        token_ids,
        token_ids.stride(0),
        bad_row_counter,
        RANKS=held.ranks,
    )
