"""What one call of the backend is told, as whole numbers; and the memory a thread works in."""

from typing import NamedTuple

import numpy as np

from vllm_specopt.cpu.lanes import WIDTH
from vllm_specopt.cpu.memory import jit
from vllm_specopt.cpu.rows import TILE
from vllm_specopt.cpu.sweeps import Left

ONE_HOT, PROBS, LOGITS = 0, 1, 2
GREEDY_BELOW = 1e-5
LOG2_E = 1.4426950408889634
WARMEST = 1e30
"""Temperatures above count as this one: single precision would run out of range."""
EXACT, SIGMOID, BLOCK, TYPICAL, BUDGET = range(5)
"""Verification rules, by their places in the registry."""
POOL = 4096
"""Values that are gathered at most from a filtered row."""


class Plan(NamedTuple):
    """Addresses are 0 for what is absent; ``wide`` means int64 rather than int32; strides count elements.

    Up to ``notes`` it is what a verification and an audit are both told. notes: Of each row, see ``notes.py``. rule,
    counters: Of an audit, the row of the counts, and the counts. shard: Of a rank's part of the logits, see
    ``sharded/plan.py``; ``logits`` are then its columns alone.
    """

    memory: int
    memory_per_worker: int
    num_reqs: int
    num_rows: int
    vocab: int
    logits: int
    logits_stride: int
    kind: int
    starts: int
    wide_starts: int
    temperature: int
    seeds: int
    positions: int
    wide_positions: int
    states: int
    wide_states: int
    num_states: int
    top_k: int
    wide_top_k: int
    top_p: int
    min_p: int
    rule_requests: int
    has_deltas: int
    token_ids: int
    token_ids_stride: int
    token_ids_width: int
    wide_token_ids: int
    num_sampled: int
    wide_num_sampled: int
    rule: int
    counters: int
    notes: int
    places: int
    drafts: int
    wide_drafts: int
    is_compact: int
    mode: int
    draft: int
    draft_stride: int
    draft_position_stride: int
    draft_kind: int
    bonus: int
    wide_bonus: int
    constants: int
    shard: int


class Scratch(NamedTuple):
    """A thread's own memory: addresses of fp32 numbers, but for the tokens (int64).

    tile, draft_tile, weights: a tile each. left, draft_left: what sweeps leave of the target and of the draft; of the
    draft no more than the tiles' sums are kept. other_sums: sums of the tiles of other weights. tile_tops,
    tile_weights, group_weights: for filters, a number per tile, or per group of one. The pools: what a filter keeps.
    """

    tile: int
    draft_tile: int
    weights: int
    left: Left
    draft_left: Left
    other_sums: int
    tile_tops: int
    tile_weights: int
    group_weights: int
    pool_values: int
    pool_weights: int
    pool_tokens: int
    pool_draft: int
    pool_raw: int


@jit
def scratch_at(address, vocab):
    """Divide a thread's memory for rows of a vocabulary, and tell where it ends; arrays end in whole lanes."""
    num_tiles = (vocab + TILE - 1) // TILE
    per_tile, per_group, pool = 4 * (num_tiles + WIDTH), 4 * WIDTH * (num_tiles + 1), 4 * (POOL + WIDTH)
    tile = address
    sums = tile + 3 * 4 * TILE
    group_sums = sums + 4 * per_tile
    values = group_sums + 4 * per_group
    draft_groups = group_sums + 3 * per_group
    scratch = Scratch(
        tile,
        tile + 4 * TILE,
        tile + 8 * TILE,
        Left(sums, group_sums, group_sums + per_group, np.int64(4 * WIDTH)),
        Left(sums + per_tile, draft_groups, draft_groups, np.int64(0)),
        sums + per_tile,
        sums + 2 * per_tile,
        sums + 3 * per_tile,
        group_sums + 2 * per_group,
        values,
        values + pool,
        values + 2 * pool,
        values + 4 * pool,
        values + 5 * pool,
    )
    return scratch, values + 6 * pool
