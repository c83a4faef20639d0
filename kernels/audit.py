"""The audit: where each emitted token lies in the distribution that it should have been drawn from.

A token's place is the probability of all tokens above it, plus a random share of the tokens as probable as it is. The
places of tokens that follow their rows' distributions are uniform, whatever those are, so that counts in bins are all
that is kept (``reference/audit.py``). It looks at tokens that are there already, so it works beside any sampler.

Two launches over the rows that emitted: one sweep leaves, per tile, the statistics that a draw needs and what lies
above the token; then a program per row adds up, finds the filters' threshold, and counts.
"""

import torch
import triton
import triton.language as tl

from .bounds import CAPACITY
from .candidates import Candidates, kept_mass
from .constants import AUDIT, GREEDY_BELOW, LOG2_E, UNALIGNED
from .draw import load_tiles, tile_masses
from .filters import filter_row
from .launch import KEY_BITS, MOST_REQUESTS, row_tiling
from .load import (
    Noise,
    Tiles,
    is_filtered,
    load_filters,
    load_logits,
    load_position,
    load_request,
    scaled,
    weights,
)
from .noise import draw_uniform
from .shapes import Shapes, shapes_of
from .statistics import BLOCK
from .variants import Launcher, variant_of

BINS = tl.constexpr(32)
COLUMNS = tl.constexpr(34)
"""Of the counts: the bins, tokens that cannot have been drawn, tokens that were drawn and not audited."""


@triton.jit
def _emitted(token_ids_ptr, token_ids_stride, num_sampled_ptr, request, pos):
    """Whether a row emitted, and its token."""
    is_row = pos <= request.num_drafts
    token = tl.load(token_ids_ptr + request.index * token_ids_stride + pos, mask=is_row, other=-1).to(tl.int64)
    if num_sampled_ptr is None:
        is_emitted = is_row & (token != -1)
    else:
        is_emitted = is_row & (pos < tl.load(num_sampled_ptr + request.index))
    return is_emitted, token


@triton.jit
def _token_logit(row_ptr, token, vocab_size):
    """The token's logit; -inf for NaN, and for what is not in the vocabulary."""
    logit = load_logits(row_ptr, token, (token >= 0) & (token < vocab_size))
    return tl.where(logit > float("-inf"), logit, float("-inf"))


@triton.jit(do_not_specialize=["num_tiles", "token_ids_stride"], do_not_specialize_on_alignment=UNALIGNED)
def audit_sweep_kernel(
    logits_ptr,  # [num_rows, vocab]
    logits_stride,
    cu_num_logits_ptr,  # [num_reqs + 1]
    token_ids_ptr,  # [num_reqs, width]
    token_ids_stride,
    num_sampled_ptr,  # [num_reqs] or None
    state_indices_ptr,  # [num_reqs] or None
    temperature_ptr,  # [max_reqs]
    tile_max_ptr,  # [num_rows, num_tiles] out, as in statistics.py
    tile_sum_ptr,  # [num_rows, num_tiles] out
    tile_above_ptr,  # [num_rows, num_tiles] out: the part of the sum that is above the row's token
    tile_equal_ptr,  # [num_rows, num_tiles] out: and the part that equals it
    vocab_size,
    num_tiles,
    TILE: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One program per (group of STEPS tiles, row, request)."""
    group, pos, index = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    request = load_request(index, cu_num_logits_ptr, state_indices_ptr, temperature_ptr)
    is_emitted, token = _emitted(token_ids_ptr, token_ids_stride, num_sampled_ptr, request, pos)
    if (is_emitted == 0) | (request.temperature < GREEDY_BELOW):
        return
    row = request.start_row + pos
    row_ptr, out = logits_ptr + row * logits_stride, row * num_tiles
    scale = LOG2_E / request.temperature
    logit = _token_logit(row_ptr, token, vocab_size)
    FITTING: tl.constexpr = BLOCK // TILE if TILE < BLOCK else 1
    TOGETHER: tl.constexpr = FITTING if FITTING < STEPS else STEPS
    for step in range(0, STEPS, TOGETHER):
        tile_ids = group * STEPS + step + tl.arange(0, TOGETHER)
        token_ids = tile_ids[:, None] * TILE + tl.arange(0, TILE)[None, :]
        x = load_logits(row_ptr, token_ids, token_ids < vocab_size)
        x = tl.where(x > float("-inf"), x, float("-inf"))
        largest = tl.max(x, axis=1)
        is_finite = (largest > float("-inf")) & (largest < float("inf"))
        w = weights(x, scale, scaled(tl.where(is_finite, largest, 0.0), scale)[:, None])
        w = tl.where(largest[:, None] == float("inf"), (x == float("inf")).to(tl.float32), w)
        exists = tile_ids < num_tiles
        tl.store(tile_max_ptr + out + tile_ids, largest, mask=exists)
        tl.store(tile_sum_ptr + out + tile_ids, tl.sum(w, axis=1), mask=exists)
        tl.store(tile_above_ptr + out + tile_ids, tl.sum(tl.where(x > logit, w, 0.0), axis=1), mask=exists)
        tl.store(tile_equal_ptr + out + tile_ids, tl.sum(tl.where(x == logit, w, 0.0), axis=1), mask=exists)


@triton.jit
def _part(tiles, part_ptr, row, scale, PADDED_TILES: tl.constexpr):
    """What lies in a part of each tile, relative to the row's largest logit, fp64."""
    maxima, sums = load_tiles(Tiles(tiles.max_ptr, part_ptr, None, tiles.count), row, PADDED_TILES)
    _top, masses = tile_masses(maxima, sums, scale, float("-inf"))
    return tl.sum(masses, axis=0)


@triton.jit(do_not_specialize=["num_tiles", "token_ids_stride", "method"], do_not_specialize_on_alignment=UNALIGNED)
def audit_kernel(
    logits_ptr,  # [num_rows, vocab]
    logits_stride,
    cu_num_logits_ptr,  # [num_reqs + 1]
    token_ids_ptr,  # [num_reqs, width]
    token_ids_stride,
    num_sampled_ptr,  # [num_reqs] or None
    state_indices_ptr,  # [num_reqs] or None
    temperature_ptr,  # [max_reqs]
    seeds_ptr,  # [max_reqs]
    positions_ptr,  # [num_rows] or None
    top_k_ptr,  # [max_reqs] or None
    top_p_ptr,  # [max_reqs] or None
    min_p_ptr,  # [max_reqs] or None
    rule_requests_ptr,  # [max_reqs] or None
    tile_max_ptr,  # [num_rows, num_tiles]
    tile_sum_ptr,  # [num_rows, num_tiles]
    tile_above_ptr,  # [num_rows, num_tiles]
    tile_equal_ptr,  # [num_rows, num_tiles]
    tile_list_ptr,  # [num_rows, num_tiles + CAPACITY] scratch, or None
    candidates_ptr,  # [num_rows, CAPACITY] scratch, or None
    counts_ptr,  # [num_methods, COLUMNS]
    places_ptr,  # [num_reqs, width] out, or None
    vocab_size,
    num_tiles,
    method,
    KEY_BITS: tl.constexpr,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
):
    """One program per (row, request)."""
    pos, index = tl.program_id(0), tl.program_id(1).to(tl.int64)
    request = load_request(index, cu_num_logits_ptr, state_indices_ptr, temperature_ptr)
    is_emitted, token = _emitted(token_ids_ptr, token_ids_stride, num_sampled_ptr, request, pos)
    if places_ptr is not None:
        tl.store(places_ptr + index * tl.num_programs(0) + pos, float("nan"))
    if is_emitted == 0:
        return
    counts_ptr += COLUMNS * (method if rule_requests_ptr is None else _method_of(rule_requests_ptr, request, method))
    if request.temperature < GREEDY_BELOW:
        is_left_out = tl.load(temperature_ptr + request.state) < 0.0
        tl.atomic_add(counts_ptr + BINS + 1, 1, mask=is_left_out, sem="relaxed")
        return
    row = request.start_row + pos
    row_ptr = logits_ptr + row * logits_stride
    scale = LOG2_E / request.temperature
    tiles = Tiles(tile_max_ptr, tile_sum_ptr, None, num_tiles)
    threshold = tl.full((), float("-inf"), tl.float32)
    candidates = Candidates(None, None, None)
    if tile_list_ptr is not None:
        list_ptr = tile_list_ptr + row * (num_tiles + CAPACITY)
        values_ptr = candidates_ptr + row * CAPACITY
        count = tl.full((), CAPACITY + 1, tl.int32)
        filters = load_filters(top_k_ptr, top_p_ptr, min_p_ptr, request.state)
        if is_filtered(filters, vocab_size):
            threshold, count = filter_row(
                row_ptr,
                tiles,
                row,
                filters,
                scale,
                list_ptr,
                values_ptr,
                vocab_size,
                KEY_BITS,
                TILE,
                PADDED_TILES,
            )
        candidates = Candidates(values_ptr, list_ptr + num_tiles, count)
    top, mass = kept_mass(tiles, candidates, row, scale, threshold, PADDED_TILES)
    if ((mass > 0.0) & (mass < float("inf"))) == 0:
        # No usable logit, or some that are too large for single precision at this temperature.
        tl.atomic_add(counts_ptr + BINS + 1, 1, sem="relaxed")
        return
    logit = _token_logit(row_ptr, token, vocab_size)
    is_possible = (logit >= threshold) & (logit > float("-inf")) & ((top < float("inf")) | (logit == top))
    above = _part(tiles, tile_above_ptr, row, scale, PADDED_TILES)
    equal = _part(tiles, tile_equal_ptr, row, scale, PADDED_TILES)
    noise = Noise(seeds_ptr, positions_ptr)
    uniform = draw_uniform(tl.load(seeds_ptr + request.state), load_position(noise, request, pos), AUDIT)
    place = tl.where(is_possible, (above + uniform * equal) / mass, 1.0)
    bin = tl.minimum(tl.maximum((place * BINS).to(tl.int32), 0), BINS - 1)
    tl.atomic_add(counts_ptr + bin, 1, sem="relaxed")
    tl.atomic_add(counts_ptr + BINS, 1, mask=is_possible == 0, sem="relaxed")
    if places_ptr is not None:
        tl.store(places_ptr + index * tl.num_programs(0) + pos, tl.minimum(place, 1.0))


@triton.jit
def _method_of(rule_requests_ptr, request, method):
    """A request's row of the counts: ``method``, or that of the exact one."""
    return tl.where(tl.load(rule_requests_ptr + request.state).to(tl.float32) > 0.0, method, 0)


def audit_options(shapes: Shapes, is_filtered: bool) -> dict[str, int]:
    """Launch options of the counting kernel: with filters it holds a few numbers more than the deciding one."""
    if not is_filtered:
        return {"num_warps": shapes.decide_warps}
    return {"num_warps": shapes.filter_warps, "maxnreg": 160}


_sweep, _count = Launcher(audit_sweep_kernel), Launcher(audit_kernel)


def audit_batch(
    logits: torch.Tensor,  # [num_rows, vocab]
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    token_ids: torch.Tensor,  # [num_reqs, width]
    counts: torch.Tensor,  # [num_methods, COLUMNS]
    *,
    method: int,
    temperature: torch.Tensor,  # [max_reqs]
    seeds: torch.Tensor,  # [max_reqs]
    num_sampled: torch.Tensor | None = None,  # [num_reqs]
    positions: torch.Tensor | None = None,  # [num_rows]
    state_indices: torch.Tensor | None = None,  # [num_reqs]
    top_k: torch.Tensor | None = None,  # [max_reqs]
    top_p: torch.Tensor | None = None,  # [max_reqs]
    min_p: torch.Tensor | None = None,  # [max_reqs]
    rule_requests: torch.Tensor | None = None,  # [max_reqs]
    places: torch.Tensor | None = None,  # [num_reqs, width]
) -> None:
    """Audit on the device of ``logits``; arguments and meaning as in :func:`vllm_specopt.audit.audit`."""
    given = [each for each in locals().values() if not isinstance(each, int)]
    num_rows, vocab_size = logits.shape
    num_reqs, width = token_ids.shape
    if num_reqs > MOST_REQUESTS:
        raise ValueError(f"the batch has {num_reqs} requests, expected at most {MOST_REQUESTS}")
    shapes = shapes_of(logits.device)
    filtered = top_k is not None or top_p is not None or min_p is not None
    tile, steps, num_tiles, num_groups, padded_tiles = row_tiling(vocab_size, shapes, filtered)
    tiles = [torch.empty(num_rows, num_tiles, dtype=torch.float32, device=logits.device) for _ in range(4)]
    tile_list = candidates = None
    if filtered:
        tile_list = torch.empty(num_rows, num_tiles + CAPACITY.value, dtype=torch.int32, device=logits.device)
        candidates = torch.empty(num_rows, CAPACITY.value, dtype=torch.float32, device=logits.device)
    variant = variant_of(given, [logits], (logits.device, shapes, vocab_size, logits.stride(0)))
    rows = (logits, logits.stride(0), cu_num_logits, token_ids, token_ids.stride(0), num_sampled, state_indices)
    _sweep(
        variant,
        (num_groups, width, num_reqs),
        {"num_warps": shapes.statistics_warps},
        *rows,
        temperature,
        *tiles,
        vocab_size,
        num_tiles,
        TILE=tile,
        STEPS=steps,
    )
    _count(
        variant,
        (width, num_reqs),
        audit_options(shapes, filtered),
        *rows,
        temperature,
        seeds,
        positions,
        top_k,
        top_p,
        min_p,
        rule_requests,
        *tiles,
        tile_list,
        candidates,
        counts,
        places,
        vocab_size,
        num_tiles,
        method,
        KEY_BITS=KEY_BITS[logits.dtype],
        TILE=tile,
        PADDED_TILES=padded_tiles,
    )
