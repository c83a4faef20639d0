"""Host side: what is exchanged when, and the launches in between.

With one-hot drafts two exchanges: statistics, then what each row found; a third where a request filters, flat rows.
With sampled ones two more: residual masses of the rejected rows, then the tokens that replace them. Nothing
synchronises with the host.
"""

from collections.abc import Callable
from functools import partial

import torch
import triton

from ..constants import ROW_COLUMNS
from ..launch import MOST_REQUESTS, decide_options, row_tiling, tiling
from ..shapes import shapes_of
from ..variants import Launcher, variant_of
from .decide import shard_decide_kernel, shard_end_kernel
from .filtered import Found, Swept, filter_rows
from .geometry import Parcel, Section, geometry_of
from .recover import Decided, recover_tokens
from .sweep import cut_tiles_kernel, shard_sweep_kernel

_sweep, _cut_tiles, _decide, _end = map(
    Launcher, (shard_sweep_kernel, cut_tiles_kernel, shard_decide_kernel, shard_end_kernel)
)


def verify_shard(
    logits: torch.Tensor,  # [num_rows, columns]: this rank's
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    draft_token_ids: torch.Tensor,  # [num_rows] or [num_rows - num_reqs]
    *,
    widths: tuple[int, ...],
    rank: int,
    gather: Callable[[torch.Tensor], torch.Tensor],
    token_ids: torch.Tensor,  # [num_reqs, max_num_draft_tokens + 1]
    num_sampled: torch.Tensor,  # [num_reqs]
    temperature: torch.Tensor | None = None,  # [max_reqs]
    seeds: torch.Tensor | None = None,  # [max_reqs]
    positions: torch.Tensor | None = None,  # [num_rows]
    state_indices: torch.Tensor | None = None,  # [num_reqs]
    draft_probs: torch.Tensor | None = None,  # [num_rows - num_reqs, draft_vocab]
    draft_logits: torch.Tensor | None = None,  # [max_reqs, max_drafts, draft_vocab]
    top_k: torch.Tensor | None = None,  # [max_reqs]
    top_p: torch.Tensor | None = None,  # [max_reqs]
    min_p: torch.Tensor | None = None,  # [max_reqs]
    bonus_token_ids: torch.Tensor | None = None,  # [num_reqs]
    bad_row_counter: torch.Tensor | None = None,  # [1]
    counters: torch.Tensor | None = None,  # [num_rules, 8]
) -> None:
    """Verify on the device of ``logits``; arguments and meaning as in :func:`vllm_specopt.sharded.verify_sharded`.

    ``widths``: columns of every rank. Writes every element of ``token_ids`` and ``num_sampled``.
    """
    given = [each for each in locals().values() if each is None or isinstance(each, torch.Tensor)]
    num_rows, vocab_size = logits.shape[0], sum(widths)
    num_reqs, width = token_ids.shape
    if num_reqs > MOST_REQUESTS:
        raise ValueError(f"the batch has {num_reqs} requests, expected at most {MOST_REQUESTS}")
    draft = draft_probs if draft_probs is not None else draft_logits
    if draft is not None:
        vocab_size = min(vocab_size, draft.shape[-1])
    if temperature is None:
        draft = draft_probs = draft_logits = top_k = top_p = min_p = None
    device, ranks = logits.device, len(widths)
    shapes = shapes_of(device)
    is_filtered = top_k is not None or top_p is not None or min_p is not None
    tile, steps, num_tiles, _, padded_tiles = row_tiling(vocab_size, shapes, is_filtered)
    # A residual's tiles are larger than those of filtered rows: what it reads of cut ones is exchanged, too.
    residual_tile = tile if draft is None else tiling(vocab_size, shapes.tile)[0]
    geometry = partial(geometry_of, widths, rank, vocab_size, device=device, part_tile=max(tile, residual_tile))
    held = geometry(tile)
    block_k = max(8, 1 << (width - 1).bit_length())
    compact = draft_token_ids.shape[0] != num_rows

    def empty(dtype, *size):
        return torch.empty(*size, dtype=dtype, device=device)

    floats, ints = torch.float32, torch.int32
    draft_strides = (0, 0) if draft_logits is None else draft_logits.stride()[:2]
    draft_forms = (draft_probs, 0 if draft_probs is None else draft_probs.stride(0), draft_logits, *draft_strides)
    variant = variant_of(
        given,
        [logits, draft_probs, draft_logits],
        (device, shapes, widths, rank, vocab_size, block_k, compact, logits.stride(0), draft_forms[1], *draft_strides),
    )
    per_tile = Section(num_rows, held.most_whole)
    per_draft_tile = Section(num_rows if draft_logits is not None else 0, held.most_whole)
    parcel = Parcel(
        device,
        per_tile,
        per_tile,
        per_draft_tile,
        per_draft_tile,
        Section(0 if draft is None else num_rows, 1),
        Section(num_rows, held.part_width, logits.dtype),
    )

    def sections(received=None):
        *found, parts = (parcel.section(number, received) for number in range(6))
        return [each if each.numel() else None for each in found], parts

    (tile_max, tile_sum, draft_tile_max, draft_tile_sum, logit), parts = sections()
    rows_per_pos = 1 if draft_logits is None else 2
    num_groups = triton.cdiv(held.end_tile - held.first_tile, steps)
    _sweep(
        variant,
        (num_groups + 1, width * rows_per_pos, num_reqs),
        {"num_warps": shapes.statistics_warps},
        logits,
        logits.stride(0),
        cu_num_logits,
        draft_token_ids,
        state_indices,
        temperature,
        draft_logits,
        *draft_strides,
        held.part_columns,
        tile_max,
        tile_sum,
        draft_tile_max,
        draft_tile_sum,
        logit,
        parts,
        held.first,
        held.columns,
        held.first_tile,
        held.end_tile,
        held.end,
        held.most_whole,
        held.part_width,
        num_groups,
        vocab_size,
        COMPACT_DRAFTS=compact,
        TILE=tile,
        STEPS=steps,
    )
    received = gather(parcel.buffer)
    sent, sent_parts = sections(received)
    sent_stride = received.stride(0)
    cut = cut_max = cut_sum = cut_draft_max = cut_draft_sum = None
    if held.num_cut:
        cut = empty(logits.dtype, num_rows, held.num_cut, tile)
        cut_max, cut_sum = empty(floats, num_rows, held.num_cut), empty(floats, num_rows, held.num_cut)
        if draft_logits is not None:
            cut_draft_max, cut_draft_sum = torch.empty_like(cut_max), torch.empty_like(cut_sum)
        _cut_tiles(
            variant,
            (held.num_cut, width * rows_per_pos, num_reqs),
            {"num_warps": shapes.statistics_warps},
            sent_parts,
            sent_parts.stride(0),
            cu_num_logits,
            state_indices,
            temperature,
            draft_logits,
            *draft_strides,
            held.cut_tiles,
            held.part_places,
            cut,
            cut_max,
            cut_sum,
            cut_draft_max,
            cut_draft_sum,
            held.num_cut,
            held.part_width,
            vocab_size,
            TILE=tile,
        )
    tile_max, tile_sum = empty(floats, num_rows, num_tiles), empty(floats, num_rows, num_tiles)
    draft_tile_max = draft_tile_sum = pending = None
    if draft_logits is not None:
        draft_tile_max, draft_tile_sum = torch.empty_like(tile_max), torch.empty_like(tile_sum)
    if draft is not None:
        pending = empty(ints, num_reqs)
    row_data = empty(floats, num_rows if draft is not None or is_filtered else 0, ROW_COLUMNS.value)
    found = Found.empty(logits, num_tiles) if is_filtered else None
    of_filtered: list[torch.Tensor | None] = [None] * 4
    if found is None:
        outcome = empty(ints, num_rows)
    else:
        outcome = found.parcel.section(0)
        of_filtered = [found.tile_list, *(found.parcel.section(number) for number in (1, 2, 3))]
    _decide(
        variant,
        (width, num_reqs),
        decide_options(shapes, is_filtered),
        logits,
        logits.stride(0),
        cu_num_logits,
        draft_token_ids,
        state_indices,
        temperature,
        seeds,
        positions,
        *draft_forms,
        top_k,
        top_p,
        min_p,
        bonus_token_ids,
        *sent,
        sent_stride,
        held.places,
        cut,
        cut_max,
        cut_sum,
        cut_draft_max,
        cut_draft_sum,
        tile_max,
        tile_sum,
        draft_tile_max,
        draft_tile_sum,
        outcome,
        row_data,
        *of_filtered,
        held.first,
        held.first_tile,
        held.end_tile,
        held.begun_tile,
        held.end_begun,
        held.most_whole,
        held.num_cut,
        vocab_size,
        num_tiles,
        COMPACT_DRAFTS=compact,
        TILE=tile,
        PADDED_TILES=padded_tiles,
        RANKS=ranks,
    )
    tile_list = candidates = None
    if found is not None:
        outcomes, tile_list, candidates = filter_rows(
            logits,
            cu_num_logits,
            draft_token_ids,
            (state_indices, temperature),
            (seeds, positions),
            draft_forms,
            (top_k, top_p, min_p),
            Swept(tile_max, tile_sum, draft_tile_max, draft_tile_sum, sent[4], found, row_data),
            held=held,
            widths=widths,
            shapes=shapes,
            variant=variant,
            gather=gather,
            block_k=block_k,
            rows_per_req=width,
            compact=compact,
        )
    else:
        outcomes = gather(outcome.view(floats)).view(ints)
    _end(
        variant,
        (num_reqs,),
        {"num_warps": 1},
        outcomes,
        outcomes.stride(0),
        cu_num_logits,
        draft_token_ids,
        state_indices,
        temperature,
        bonus_token_ids,
        pending,
        token_ids,
        token_ids.stride(0),
        num_sampled,
        bad_row_counter,
        counters,
        vocab_size,
        width,
        COMPACT_DRAFTS=compact,
        BLOCK_K=block_k,
        RANKS=len(outcomes),
        IS_FILTERED=is_filtered,
    )
    if pending is not None:
        recover_tokens(
            logits,
            (cu_num_logits, state_indices, temperature),
            (seeds, positions),
            draft_forms,
            Decided(tile_max, tile_sum, row_data, pending, cut, tile_list, candidates),
            held=geometry(residual_tile),
            of_rows=held,
            shapes=shapes,
            variant=variant,
            gather=gather,
            token_ids=token_ids,
            bad_row_counter=bad_row_counter,
        )
