"""Constants that kernels and their host side share."""

import triton.language as tl
from triton import knobs

GREEDY_BELOW = tl.constexpr(1e-5)
"""Temperatures below this, and NaN, are greedy."""

WARMEST = tl.constexpr(1e30)
"""Temperatures above count as this one: single precision would run out of range."""

LOG2_E = tl.constexpr(1.4426950408889634)
NO_TOKEN = tl.constexpr(2147483647)

# Purposes of random numbers, as in reference/noise.py.
DRAW = tl.constexpr(0)
ACCEPTANCE = tl.constexpr(1)
RESIDUAL = tl.constexpr(2)
AUDIT = tl.constexpr(3)
PREFIX = tl.constexpr(16)
STREAM = tl.constexpr(0x53504543)

# Verification rules, by their places in the registry.
EXACT, SIGMOID, BLOCK, TYPICAL, BUDGET = (tl.constexpr(i) for i in range(5))

# What a row's program found, where it is not a token.
BAD_ROW = tl.constexpr(-1)
NEEDS_RESIDUAL = tl.constexpr(-2)
# REJECTED - token: the row emits its own draft token, though it was rejected.
REJECTED = tl.constexpr(-3)
# Another tensor-parallel rank holds the tile that the row's token is in: less than all else.
NOT_HELD = tl.constexpr(-2147483648)
# Too many tokens of the row may pass its filters for the ranks to exchange them.
FLAT = tl.constexpr(-2147483647)

# Columns of what a row leaves for the residual, and for the end of its request.
THRESHOLD, NUM_CANDIDATES, TARGET_TOP, TARGET_SCALE, DRAFT_TOP, DRAFT_SCALE, CARRY, SPENT = (
    tl.constexpr(i) for i in range(8)
)
ROW_COLUMNS = tl.constexpr(8)

# The interpreter has no inline PTX.
HAS_PTX = tl.constexpr(not knobs.runtime.interpret)

UNALIGNED = (
    "cu_num_logits_ptr",
    "draft_token_ids_ptr",
    "state_indices_ptr",
    "temperature_ptr",
    "seeds_ptr",
    "positions_ptr",
    "top_k_ptr",
    "top_p_ptr",
    "min_p_ptr",
    "constants_ptr",
    "rule_requests_ptr",
    "tile_max_ptr",
    "tile_sum_ptr",
    "tile_entropy_ptr",
    "draft_tile_max_ptr",
    "draft_tile_sum_ptr",
    "residual_ptr",
    "outcome_ptr",
    "row_ptr",
    "arrived_ptr",
    "row_arrived_ptr",
    "pending_ptr",
    "counters_ptr",
    "token_ids_ptr",
    "num_sampled_ptr",
    "bonus_token_ids_ptr",
    "bad_row_counter_ptr",
    "tile_list_ptr",
    "candidates_ptr",
    "counts_ptr",
    "places_ptr",
)
"""Pointers that no kernel is specialised on the alignment of.

Triton compiles a kernel anew when a pointer stops being a multiple of 16 bytes. That pays where a program sweeps a
vocabulary: rows of logits stay specialised, and they are laid out alike in every step of an engine. The other pointers
are read by a few loads each, and a runner that verifies in chunks passes slices of them that start anywhere.
"""
