"""Exact verification of one-hot drafts in one launch, in which rows behind a rejection need not be read.

Programs run in the order of positions. The last program of a row finds the row's token; where that is not the draft,
it says so, and programs of later rows that have not begun yet leave at once. Nothing waits: a program that comes too
early to know reads a row that will not be needed. Not used by ``verify`` yet: which of the two is faster is a question
to a GPU.
"""

import torch
import triton
import triton.language as tl

from .constants import GREEDY_BELOW, LOG2_E, UNALIGNED
from .decide import find_outcome
from .launch import KEY_BITS, tiling
from .load import Drafts, Filters, Noise, Rows, Tiles, load_draft_token, load_request
from .output import write_request
from .shapes import shapes_of
from .statistics import sweep

NOT_STOPPED = tl.constexpr(1 << 30)


@triton.jit(
    do_not_specialize=["num_tiles", "num_reqs", "rows_per_req", "num_groups", "token_ids_stride"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def one_launch_kernel(
    logits_ptr,  # [num_rows, vocab]
    logits_stride,
    cu_num_logits_ptr,  # [num_reqs + 1]
    draft_token_ids_ptr,  # [num_rows] or [num_rows - num_reqs]
    state_indices_ptr,  # [num_reqs] or None
    temperature_ptr,  # [max_reqs] or None
    seeds_ptr,  # [max_reqs] or None
    positions_ptr,  # [num_rows] or None
    tile_max_ptr,  # [num_rows, num_tiles] scratch
    tile_sum_ptr,  # [num_rows, num_tiles] scratch
    outcome_ptr,  # [num_rows] scratch
    row_arrived_ptr,  # [num_rows] zeros
    arrived_ptr,  # [num_reqs] zeros
    stopped_ptr,  # [num_reqs] NOT_STOPPED: the first position known to reject
    token_ids_ptr,  # [num_reqs, max_num_draft_tokens + 1] out
    token_ids_stride,
    num_sampled_ptr,  # [num_reqs] out
    bad_row_counter_ptr,  # [1] or None
    vocab_size,
    num_tiles,
    num_reqs,
    rows_per_req,
    num_groups,
    COMPACT_DRAFTS: tl.constexpr,
    KEY_BITS: tl.constexpr,
    TILE: tl.constexpr,
    STEPS: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One program per (position, request, group of STEPS tiles), positions first."""
    group = tl.program_id(0) % num_groups
    slot = tl.program_id(0) // num_groups
    index = (slot % num_reqs).to(tl.int64)
    pos = slot // num_reqs
    request = load_request(index, cu_num_logits_ptr, state_indices_ptr, temperature_ptr)
    num_drafts = request.num_drafts
    if pos > num_drafts:
        return
    row = request.start_row + pos
    is_needed = tl.load(stopped_ptr + index, volatile=True) >= pos
    if is_needed:
        out = row * num_tiles
        sweep(
            logits_ptr + row * logits_stride,
            LOG2_E / request.temperature,
            tile_max_ptr + out,
            tile_sum_ptr + out,
            group * STEPS,
            num_tiles,
            vocab_size,
            request.temperature < GREEDY_BELOW,
            TILE,
            STEPS,
        )
    tl.debug_barrier()
    if tl.atomic_add(row_arrived_ptr + row, 1, sem="acq_rel") == num_groups - 1:
        tl.debug_barrier()
        rows = Rows(logits_ptr, logits_stride, vocab_size)
        tiles = Tiles(tile_max_ptr, tile_sum_ptr, num_tiles)
        drafts = Drafts(draft_token_ids_ptr, None, 0, None, 0, 0)
        token = load_draft_token(drafts, request, pos, vocab_size, COMPACT_DRAFTS)
        outcome = find_outcome(
            rows,
            tiles,
            tiles,
            drafts,
            Noise(seeds_ptr, positions_ptr),
            Filters(0, 1.0, 0.0),
            request,
            pos,
            token,
            tl.load(stopped_ptr + index, volatile=True) >= pos,
            tl.full((), False, tl.int1),
            None,
            None,
            None,
            None,
            KEY_BITS,
            TILE,
            PADDED_TILES,
        )
        tl.store(outcome_ptr + row, outcome)
        if outcome != token:
            tl.atomic_min(stopped_ptr + index, pos, sem="relaxed")
        tl.debug_barrier()
        if tl.atomic_add(arrived_ptr + index, 1, sem="acq_rel") == num_drafts:
            tl.debug_barrier()
            write_request(
                request,
                draft_token_ids_ptr,
                outcome_ptr,
                None,
                None,
                token_ids_ptr,
                token_ids_stride,
                num_sampled_ptr,
                bad_row_counter_ptr,
                None,
                0,
                0,
                rows_per_req,
                COMPACT_DRAFTS,
                BLOCK_K,
            )


def verify_in_one_launch(
    logits: torch.Tensor,  # [num_rows, vocab]
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    draft_token_ids: torch.Tensor,  # [num_rows] or [num_rows - num_reqs]
    *,
    token_ids: torch.Tensor,  # [num_reqs, max_num_draft_tokens + 1]
    num_sampled: torch.Tensor,  # [num_reqs]
    temperature: torch.Tensor | None = None,  # [max_reqs]
    seeds: torch.Tensor | None = None,  # [max_reqs]
    positions: torch.Tensor | None = None,  # [num_rows]
    state_indices: torch.Tensor | None = None,  # [num_reqs]
    bad_row_counter: torch.Tensor | None = None,  # [1]
) -> torch.Tensor:
    """Verify one-hot drafts without filters; arguments and outputs as in ``verify_batch`` of launch.py.

    Returns:
        ``[num_rows, num_tiles]``, the largest logit of every tile that was read (scratch otherwise).
    """
    num_rows, vocab_size = logits.shape
    num_reqs, width = token_ids.shape
    shapes = shapes_of(logits.device)
    tile, steps, num_tiles, num_groups, padded_tiles = tiling(vocab_size, shapes.tile, shapes.statistics_steps)
    tile_max = torch.empty(num_rows, num_tiles, dtype=torch.float32, device=logits.device)
    zeros = torch.zeros(num_rows + num_reqs, dtype=torch.int32, device=logits.device)
    one_launch_kernel[(num_reqs * width * num_groups,)](
        logits,
        logits.stride(0),
        cu_num_logits,
        draft_token_ids,
        state_indices,
        temperature,
        seeds,
        positions,
        tile_max,
        torch.empty(num_rows, num_tiles, dtype=torch.float32, device=logits.device),
        torch.empty(num_rows, dtype=torch.int32, device=logits.device),
        zeros[:num_rows],
        zeros[num_rows:],
        torch.full((num_reqs,), NOT_STOPPED.value, dtype=torch.int32, device=logits.device),
        token_ids,
        token_ids.stride(0),
        num_sampled,
        bad_row_counter,
        vocab_size,
        num_tiles,
        num_reqs,
        width,
        num_groups,
        COMPACT_DRAFTS=draft_token_ids.shape[0] != num_rows,
        KEY_BITS=KEY_BITS[logits.dtype],
        TILE=tile,
        STEPS=steps,
        PADDED_TILES=padded_tiles,
        BLOCK_K=max(8, triton.next_power_of_2(width)),
        num_warps=shapes.decide_warps,
    )
    return tile_max
