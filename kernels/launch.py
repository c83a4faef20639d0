"""Host side of the Triton backend: allocate, pick shapes, launch.

Two launches where drafts are one-hot, three where they are sampled, the same with filters. Programs never wait for one
another; the last one of a request to arrive goes on.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton

from .bounds import CAPACITY
from .constants import BLOCK, BUDGET, EXACT, ROW_COLUMNS, SIGMOID, TYPICAL
from .decide import decide_kernel
from .residual import residual_kernel
from .shapes import DEFAULTS, Shapes, shapes_of
from .statistics import statistics_kernel
from .variants import Launcher, variant_of

KEY_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
"""Low bits in which no two values of a dtype differ as fp32."""

MOST_REQUESTS = 65535
"""What the last axes of a CUDA grid count to. Requests take the last one, so that a row's programs run side by side."""

_statistics, _decide, _residual = map(Launcher, (statistics_kernel, decide_kernel, residual_kernel))


class Swept(NamedTuple):
    """What a verification leaves of its rows for an audit; three are None where no request filters.

    tile_max, tile_sum: ``[num_rows, num_tiles]`` fp32, as the draw takes them. tile_list, candidates: Scratch of the
    filters, with the candidates of each row. row_data: ``[num_rows, ROW_COLUMNS]`` fp32, thresholds among it. arrived:
    ``[num_rows]`` int32 zeros, for programs that share a row.
    """

    tile_max: torch.Tensor
    tile_sum: torch.Tensor
    tile_list: torch.Tensor | None
    candidates: torch.Tensor | None
    row_data: torch.Tensor | None
    arrived: torch.Tensor


@cache
def tiling(
    vocab_size: int, tile: int = DEFAULTS.tile, steps: int = DEFAULTS.statistics_steps
) -> tuple[int, int, int, int, int]:
    """Tokens of a tile, tiles of a program, tiles of a row, programs of a row, and its tiles as a power of two.

    ``tile`` and ``steps`` are the first two where the vocabulary is not too small for them.
    """
    tile = min(tile, max(16, triton.next_power_of_2(vocab_size)))
    num_tiles = triton.cdiv(vocab_size, tile)
    padded_tiles = triton.next_power_of_2(num_tiles)
    steps = min(steps, padded_tiles)
    return tile, steps, num_tiles, triton.cdiv(num_tiles, steps), padded_tiles


def row_tiling(vocab_size: int, shapes: Shapes, is_filtered: bool) -> tuple[int, int, int, int, int]:
    """The same for the statistics of rows, whose tiles are smaller where a request of the batch filters."""
    if not is_filtered:
        return tiling(vocab_size, shapes.tile, shapes.statistics_steps)
    steps = shapes.statistics_steps * max(1, shapes.tile // shapes.filter_tile)
    return tiling(vocab_size, shapes.filter_tile, steps)


def decide_options(shapes: Shapes, is_filtered: bool) -> dict[str, int]:
    """Launch options of the deciding kernel."""
    if not is_filtered:
        return {"num_warps": shapes.decide_warps}
    return {"num_warps": shapes.filter_warps, "maxnreg": min(shapes.filter_registers, 255)}


def verify_batch(
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
    draft_probs: torch.Tensor | None = None,  # [num_rows - num_reqs, draft_vocab]
    draft_logits: torch.Tensor | None = None,  # [max_reqs, max_drafts, draft_vocab]
    top_k: torch.Tensor | None = None,  # [max_reqs]
    top_p: torch.Tensor | None = None,  # [max_reqs]
    min_p: torch.Tensor | None = None,  # [max_reqs]
    bonus_token_ids: torch.Tensor | None = None,  # [num_reqs]
    bad_row_counter: torch.Tensor | None = None,  # [1]
    rule: int = 0,
    constants: torch.Tensor | None = None,
    rule_requests: torch.Tensor | None = None,  # [max_reqs]
    counters: torch.Tensor | None = None,  # [num_rules, 8]
    takes_notes: bool = False,
) -> Swept | None:
    """Verify on the device of ``logits``; arguments and meaning as in :func:`vllm_specopt.verify.verify`.

    ``rule`` is a place in the registry, ``constants`` are packed as that function does. Writes every element of
    ``token_ids`` (int32 or int64) and ``num_sampled`` (int32); no synchronisation, nothing of the size of a row is
    allocated. Returns what the sweeps leave if that is to be noted, and if they are of every row that may emit.
    """
    given = [each for each in locals().values() if not isinstance(each, int)]
    num_rows, vocab_size = logits.shape
    num_reqs, width = token_ids.shape
    if num_reqs > MOST_REQUESTS:
        raise ValueError(f"the batch has {num_reqs} requests, expected at most {MOST_REQUESTS}")
    draft = draft_probs if draft_probs is not None else draft_logits
    if draft is not None:
        vocab_size = min(vocab_size, draft.shape[-1])
    if temperature is None:
        draft = draft_probs = draft_logits = top_k = top_p = min_p = None
        rule = EXACT.value
    shapes = shapes_of(logits.device)
    is_filtered = top_k is not None or top_p is not None or min_p is not None
    tile, steps, num_tiles, num_groups, padded_tiles = row_tiling(vocab_size, shapes, is_filtered)
    block_k = max(8, 1 << (width - 1).bit_length())
    compact = draft_token_ids.shape[0] != num_rows

    def floats(*size):
        return torch.empty(*size, dtype=torch.float32, device=logits.device)

    def ints(*size):
        return torch.empty(*size, dtype=torch.int32, device=logits.device)

    tile_max, tile_sum = floats(num_rows, num_tiles), floats(num_rows, num_tiles)
    tile_entropy = floats(num_rows, num_tiles) if rule == TYPICAL.value else None
    draft_tile_max = draft_tile_sum = row_data = pending = tile_list = candidates = None
    if draft_logits is not None:
        draft_tile_max, draft_tile_sum = floats(num_rows, num_tiles), floats(num_rows, num_tiles)
    if draft is not None:
        pending = ints(num_reqs)
    if draft is not None or rule == BUDGET.value or is_filtered:
        row_data = floats(num_rows, ROW_COLUMNS.value)
    if is_filtered:
        tile_list, candidates = ints(num_rows, num_tiles + CAPACITY.value), floats(num_rows, CAPACITY.value)
    outcome, arrived = ints(num_rows), ints(2 * num_reqs + num_rows)
    draft_strides = (0, 0) if draft_logits is None else draft_logits.stride()[:2]
    draft_forms = (draft_probs, 0 if draft_probs is None else draft_probs.stride(0), draft_logits, *draft_strides)

    variant = variant_of(
        given,
        [logits, draft_probs, draft_logits],
        (logits.device, rule, shapes, vocab_size, block_k, compact, logits.stride(0), draft_forms[1], *draft_strides),
    )
    rows_per_pos = 1 if draft_logits is None else 2
    _statistics(
        variant,
        (num_groups, width * rows_per_pos, num_reqs),
        {"num_warps": shapes.statistics_warps},
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
        constants,
        rule_requests,
        tile_max,
        tile_sum,
        tile_entropy,
        draft_tile_max,
        draft_tile_sum,
        arrived,
        vocab_size,
        num_tiles,
        COMPACT_DRAFTS=compact,
        TILE=tile,
        STEPS=steps,
        BLOCK_K=block_k,
        RULE=rule,
    )
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
        constants,
        rule_requests,
        tile_max,
        tile_sum,
        tile_entropy,
        draft_tile_max,
        draft_tile_sum,
        tile_list,
        candidates,
        outcome,
        row_data,
        arrived,
        pending,
        token_ids,
        token_ids.stride(0),
        num_sampled,
        bad_row_counter,
        counters,
        vocab_size,
        num_tiles,
        width,
        COMPACT_DRAFTS=compact,
        KEY_BITS=KEY_BITS[logits.dtype],
        TILE=tile,
        PADDED_TILES=padded_tiles,
        BLOCK_K=block_k,
        RULE=rule,
    )
    left = None
    if takes_notes and temperature is not None and bonus_token_ids is None and rule != SIGMOID.value:
        left = Swept(tile_max, tile_sum, tile_list, candidates, row_data, arrived[2 * num_reqs :])
    if draft is None:
        return left
    is_block = rule == BLOCK.value
    num_row_tiles, padded_row_tiles, row_tile = num_tiles, padded_tiles, tile
    tile, steps, num_tiles, num_groups, padded_tiles = tiling(vocab_size, shapes.tile, shapes.residual_steps)
    _residual(
        variant,
        (num_groups, max(1, width - 1) if is_block else 1, num_reqs),
        {"num_warps": shapes.residual_warps},
        logits,
        logits.stride(0),
        cu_num_logits,
        draft_token_ids,
        state_indices,
        temperature,
        seeds,
        positions,
        *draft_forms,
        bonus_token_ids,
        constants,
        rule_requests,
        tile_max,
        tile_sum,
        tile_list,
        candidates,
        floats(num_rows if is_block else num_reqs, num_tiles),
        row_data,
        arrived,
        pending,
        token_ids,
        token_ids.stride(0),
        num_sampled,
        bad_row_counter,
        counters,
        vocab_size,
        num_tiles,
        num_row_tiles,
        width,
        COMPACT_DRAFTS=compact,
        TILE=tile,
        STEPS=steps,
        PADDED_TILES=padded_tiles,
        ROW_TILE=row_tile,
        PADDED_ROW_TILES=padded_row_tiles,
        BLOCK_K=block_k,
        RULE=rule,
    )
    return left
