"""What one call of the backend is told, as whole numbers; and the memory a thread works in."""

from typing import NamedTuple

from vllm_specopt.cpu.lanes import WIDTH
from vllm_specopt.cpu.memory import jit
from vllm_specopt.cpu.rows import TILE

ONE_HOT, PROBS, LOGITS = 0, 1, 2
GREEDY_BELOW = 1e-5
POOL = 4096
"""Values that are gathered at most from a filtered row."""

# A job, in 64-bit words: next request, rows without a usable logit, 1 + a request that does not fit, then the plan.
JOB_PLAN = 3


class Plan(NamedTuple):
    """Addresses are 0 for what is absent; ``wide`` means int64 rather than int32; strides count elements."""

    num_reqs: int
    num_rows: int
    vocab: int
    logits: int
    logits_stride: int
    kind: int
    starts: int
    wide_starts: int
    drafts: int
    wide_drafts: int
    is_compact: int
    temperature: int
    seeds: int
    positions: int
    wide_positions: int
    states: int
    wide_states: int
    num_states: int
    mode: int
    draft: int
    draft_stride: int
    draft_position_stride: int
    draft_kind: int
    top_k: int
    wide_top_k: int
    top_p: int
    min_p: int
    bonus: int
    wide_bonus: int
    sigmoid: int
    sigmoid_requests: int
    counters: int
    token_ids: int
    token_ids_stride: int
    token_ids_width: int
    wide_token_ids: int
    num_sampled: int


class Scratch(NamedTuple):
    """Addresses of a thread's own memory, all fp32 but for the tokens (int64).

    tile, draft_tile, weights: a tile each. sums, other_sums, tile_tops, tile_weights: a number per tile, filled up to
    whole lanes. tops: ``WIDTH`` numbers per tile; other_tops: ``WIDTH`` in all. The rest: what a filter keeps of a row.
    """

    tile: int
    draft_tile: int
    weights: int
    sums: int
    other_sums: int
    tile_tops: int
    tile_weights: int
    tops: int
    other_tops: int
    pool_values: int
    pool_weights: int
    pool_tokens: int
    pool_draft: int
    pool_raw: int


@jit
def scratch_size(vocab):
    """Bytes of a thread's memory for rows of a vocabulary."""
    num_tiles = (vocab + TILE - 1) // TILE
    per_tile = num_tiles + 2 * WIDTH
    return 4 * (3 * TILE + 4 * per_tile + WIDTH * (num_tiles + 1) + 6 * (POOL + WIDTH)) + 64


@jit
def scratch_at(address, vocab):
    """Divide a thread's memory."""
    num_tiles = (vocab + TILE - 1) // TILE
    tile, per_tile, pool = 4 * TILE, 4 * (num_tiles + 2 * WIDTH), 4 * (POOL + WIDTH)
    address = (address + 63) // 64 * 64
    sums = address + 3 * tile
    tops = sums + 4 * per_tile
    other_tops = tops + 4 * WIDTH * num_tiles
    values = other_tops + 4 * WIDTH
    return Scratch(
        address,
        address + tile,
        address + 2 * tile,
        sums,
        sums + per_tile,
        sums + 2 * per_tile,
        sums + 3 * per_tile,
        tops,
        other_tops,
        values,
        values + pool,
        values + 2 * pool,
        values + 4 * pool,
        values + 5 * pool,
    )
