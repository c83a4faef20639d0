"""Exact verification (Leviathan et al. 2211.17192, Chen et al. 2302.01318) on raw logits, in three launches.

The same launches serve requests verified by sigmoid scores, alone or mixed with exact ones (``sigmoid.py``): of these
the first kernel sweeps nothing, and the second judges by two numbers per draft token.

Never materialised: probabilities, scaled or filtered logits, noise, recovered tokens of positions that emit nothing.

1. ``row_statistics_kernel`` sweeps every judged row once: maximum and sum of exponentials per vocabulary tile (argmax
   for greedy requests); the draft row's too where the drafter handed over logits. For requests with top-k, top-p or
   min-p ``filter_threshold_kernel`` takes its place; it is launched only if there are any.
2. ``emission_kernel`` decides, from these statistics and two scalars per draft token, where the request stops, and
   sweeps that one row for the token that follows: argmax over weight / exponential noise, one candidate per tile.
3. ``token_output_kernel`` reduces the candidates and writes the tokens.

Bytes per request with K drafts, vocabulary V, s bytes per logit: (K + 1) V s, plus K V s' for draft logits, plus one
draft row re-read on a rejection. The partition into tiles depends on the vocabulary alone and every reduction has a
fixed order, so a request's tokens do not depend on its batch mates, and tensor-parallel ranks agree bit for bit.
"""

import torch
import triton

from .emission import emission_kernel
from .filters import RADIX_DIGITS, filter_threshold_kernel
from .row_statistics import row_statistics_kernel
from .token_output import token_output_kernel

GREEDY_BELOW = 1e-5
TILE = 4096
NUM_WARPS = 4
FILTER_BLOCK = 1024
FILTER_NUM_WARPS = 8
BLOCK_K = 8


def exact_verify(
    *,
    logits: torch.Tensor,
    cu_num_logits: torch.Tensor,
    draft_token_ids: torch.Tensor,
    temperature: torch.Tensor | None,
    seeds: torch.Tensor | None,
    positions: torch.Tensor | None,
    state_indices: torch.Tensor | None,
    draft_probs: torch.Tensor | None,
    draft_logits: torch.Tensor | None,
    top_k: torch.Tensor | None,
    top_p: torch.Tensor | None,
    min_p: torch.Tensor | None,
    bonus_token_ids: torch.Tensor | None,
    bad_row_counter: torch.Tensor | None,
    sigmoid: torch.Tensor | None,
    sigmoid_requests: torch.Tensor | None,
    counters: torch.Tensor | None,
    token_ids: torch.Tensor,
    num_sampled: torch.Tensor,
) -> None:
    """Launch the kernels; arguments as in ``vllm_specopt.verify.verify``, already checked.

    Writes ``token_ids`` ``[num_reqs, max_num_draft_tokens + 1]`` and ``num_sampled`` ``[num_reqs]``. Extra memory:
    24 bytes per row and tile of 4096 tokens at most.
    """
    num_reqs, width = token_ids.shape
    num_rows, vocab_size = logits.shape
    has_draft_distribution = draft_probs is not None or draft_logits is not None
    if has_draft_distribution:
        vocab_size = min(vocab_size, (draft_probs if draft_probs is not None else draft_logits).shape[-1])
    tile = min(TILE, triton.next_power_of_2(vocab_size))
    num_tiles = triton.cdiv(vocab_size, tile)
    padded_tiles = triton.next_power_of_2(num_tiles)
    compact = draft_token_ids.shape[0] != num_rows
    if temperature is None:
        top_k = top_p = min_p = None

    def buffer(rows: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(rows, num_tiles, dtype=dtype, device=logits.device)

    tile_max, tile_sum = buffer(num_rows, torch.float32), buffer(num_rows, torch.float32)
    tile_argmax = buffer(num_rows, torch.int32)
    draft_tile_max = draft_tile_sum = target_score = target_token = threshold = None
    draft_logits_stride_0 = draft_logits_stride_1 = 0
    if draft_logits is not None:
        draft_tile_max, draft_tile_sum = buffer(num_rows, torch.float32), buffer(num_rows, torch.float32)
        draft_logits_stride_0, draft_logits_stride_1 = draft_logits.stride(0), draft_logits.stride(1)
    # A residual may be empty; then the token comes from the full target row. Of one-hot drafts that is true of scores.
    if has_draft_distribution or sigmoid is not None:
        target_score, target_token = buffer(num_reqs, torch.float32), buffer(num_reqs, torch.int32)
    candidate_score, candidate_token = buffer(num_reqs, torch.float32), buffer(num_reqs, torch.int32)
    num_accepted = torch.empty(num_reqs, dtype=torch.int32, device=logits.device)

    row_statistics_kernel[(num_reqs * width, num_tiles)](
        logits,
        logits.stride(0),
        cu_num_logits,
        state_indices,
        temperature,
        draft_logits,
        draft_logits_stride_0,
        draft_logits_stride_1,
        top_k,
        top_p,
        min_p,
        sigmoid,
        sigmoid_requests,
        tile_max,
        tile_sum,
        tile_argmax,
        draft_tile_max,
        draft_tile_sum,
        vocab_size,
        num_tiles,
        width,
        GREEDY_BELOW=GREEDY_BELOW,
        TILE=tile,
        num_warps=NUM_WARPS,
    )
    if top_k is not None or top_p is not None or min_p is not None:
        threshold = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
        filter_threshold_kernel[(num_reqs * width,)](
            logits,
            logits.stride(0),
            cu_num_logits,
            state_indices,
            temperature,
            top_k,
            top_p,
            min_p,
            threshold,
            tile_max,
            tile_sum,
            vocab_size,
            num_tiles,
            width,
            GREEDY_BELOW=GREEDY_BELOW,
            DIGITS=RADIX_DIGITS[str(logits.dtype).removeprefix("torch.")],
            BLOCK=min(FILTER_BLOCK, tile),
            PADDED_TILES=padded_tiles,
            num_warps=FILTER_NUM_WARPS,
        )
    emission_kernel[(num_reqs, num_tiles)](
        logits,
        logits.stride(0),
        cu_num_logits,
        draft_token_ids,
        state_indices,
        temperature,
        seeds,
        positions,
        draft_probs,
        0 if draft_probs is None else draft_probs.stride(0),
        draft_logits,
        draft_logits_stride_0,
        draft_logits_stride_1,
        threshold,
        tile_max,
        tile_sum,
        tile_argmax,
        draft_tile_max,
        draft_tile_sum,
        sigmoid,
        sigmoid_requests,
        num_accepted,
        counters,
        candidate_score,
        candidate_token,
        target_score,
        target_token,
        vocab_size,
        num_tiles,
        COMPACT_DRAFTS=compact,
        GREEDY_BELOW=GREEDY_BELOW,
        TILE=tile,
        PADDED_TILES=padded_tiles,
        BLOCK_K=BLOCK_K,
        num_warps=NUM_WARPS,
    )
    token_output_kernel[(num_reqs,)](
        token_ids,
        token_ids.stride(0),
        num_sampled,
        num_accepted,
        candidate_score,
        candidate_token,
        target_score,
        target_token,
        bonus_token_ids,
        bad_row_counter,
        cu_num_logits,
        draft_token_ids,
        num_tiles,
        width,
        COMPACT_DRAFTS=compact,
        PADDED_TILES=padded_tiles,
        PADDED_WIDTH=max(BLOCK_K, triton.next_power_of_2(width)),
        num_warps=1,
    )
