"""The audit: where each emitted token lies in the distribution that it should have been drawn from.

A token's place is the probability of all tokens above it, plus a random share of the tokens as probable as it is. The
places of tokens that follow their rows' distributions are uniform, whatever those are, so that counts in bins are all
that is kept (``reference/audit.py``). It looks at tokens that are there already, so it works beside any sampler.

One launch: with the statistics and thresholds that the verification of the step left, it reads the tiles whose largest
logit reaches the token's. That may be most of the row, so a few programs share each row; the last one to arrive counts.
Beside another sampler a sweep of these rows comes first, and thresholds are found anew, by one program per row.
"""

import torch
import triton
import triton.language as tl

from .bounds import CAPACITY, key_value, order_key
from .candidates import SPAN, Candidates, kept_mass, list_tiles, load_candidates, load_listed
from .constants import AUDIT, GREEDY_BELOW, LOG2_E, NUM_CANDIDATES, ROW_COLUMNS, THRESHOLD, UNALIGNED
from .draw import load_tiles
from .filters import filter_row
from .launch import KEY_BITS, MOST_REQUESTS, Swept, row_tiling
from .load import (
    Noise,
    Tiles,
    is_filtered,
    load_filters,
    load_logits,
    load_position,
    load_request,
    row_shift,
    weights,
)
from .noise import draw_uniform
from .shapes import Shapes, shapes_of
from .statistics import sweep
from .variants import Launcher, variant_of

BINS = tl.constexpr(32)
COLUMNS = tl.constexpr(34)
"""Of the counts: the bins, tokens that cannot have been drawn, tokens that were drawn and not audited."""

MOST_PARTS = tl.constexpr(16)
"""Programs that share a row at most."""

PROGRAMS = 4096
"""Programs of a launch beyond which rows are shared by fewer: most rows emit nothing, and theirs only come and go."""


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
    row_arrived_ptr,  # [num_rows] out: zeros
    vocab_size,
    num_tiles,
    TILE: tl.constexpr,
    STEPS: tl.constexpr,
):
    """One program per (group of STEPS tiles, row, request); rows that emitted are swept."""
    group, pos, index = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    request = load_request(index, cu_num_logits_ptr, state_indices_ptr, temperature_ptr)
    is_emitted, _token = _emitted(token_ids_ptr, token_ids_stride, num_sampled_ptr, request, pos)
    if (is_emitted == 0) | (request.temperature < GREEDY_BELOW):
        return
    row = request.start_row + pos
    if group == 0:
        tl.store(row_arrived_ptr + row, 0)
    sweep(
        logits_ptr + row * logits_stride,
        LOG2_E / request.temperature,
        tile_max_ptr + row * num_tiles,
        tile_sum_ptr + row * num_tiles,
        None,
        group * STEPS,
        num_tiles,
        vocab_size,
        False,
        TILE,
        STEPS,
    )


@triton.jit
def _split_tiles(
    row_ptr,
    tiles,
    row,
    list_ptr,
    shares_ptr,
    row_arrived_ptr,
    logit,
    scale,
    top,
    vocab_size,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
):
    """What lies above a logit, and what equals it, relative to the row's largest, fp64; reads tiles that reach it.

    Each of the row's programs reads some of these; only the last one to arrive, which is told, has the sums of all.
    """
    TOGETHER: tl.constexpr = SPAN // TILE if TILE < SPAN else 1
    part, num_parts = tl.program_id(0), tl.num_programs(0)
    maxima, _sums = load_tiles(tiles, row, PADDED_TILES)
    tile_ids = tl.arange(0, PADDED_TILES)
    reader = tile_ids // TOGETHER % num_parts
    # Nobody else lists the tiles that belong there.
    list_ptr += tl.sum(((reader < part) & (tile_ids < tiles.count)).to(tl.int32), axis=0)
    mine = tl.where(reader == part, maxima, float("-inf"))
    num_listed = list_tiles(list_ptr, mine, key_value(order_key(logit) - 1), PADDED_TILES)
    shift = row_shift(top, scale)
    above, equal = tl.zeros([TOGETHER, TILE], tl.float32), tl.zeros([TOGETHER, TILE], tl.float32)
    start = tl.full((), 0, tl.int32)
    following = load_listed(row_ptr, list_ptr, start, num_listed, vocab_size, TILE)
    while start < num_listed:
        x = following
        start += TOGETHER
        following = load_listed(row_ptr, list_ptr, start, num_listed, vocab_size, TILE)
        w = tl.where(top == float("inf"), (x == float("inf")).to(tl.float32), weights(x, scale, shift))
        above += tl.where(x > logit, w, 0.0)
        equal += tl.where(x == logit, w, 0.0)
    above, equal = tl.sum(above, axis=0).to(tl.float64), tl.sum(equal, axis=0).to(tl.float64)
    above, equal = tl.sum(above, axis=0), tl.sum(equal, axis=0)
    shares_ptr += row * num_parts * 2
    tl.store(shares_ptr + part * 2, above)
    tl.store(shares_ptr + part * 2 + 1, equal)
    tl.debug_barrier()
    is_last = tl.atomic_add(row_arrived_ptr + row, 1, sem="acq_rel") == num_parts - 1
    if is_last:
        tl.debug_barrier()
        parts = tl.arange(0, MOST_PARTS)
        above = tl.sum(tl.load(shares_ptr + parts * 2, mask=parts < num_parts, other=0.0), axis=0)
        equal = tl.sum(tl.load(shares_ptr + parts * 2 + 1, mask=parts < num_parts, other=0.0), axis=0)
        # Another audit may take the same notes.
        tl.store(row_arrived_ptr + row, 0)
    return above, equal, is_last


@triton.jit
def _split_candidates(candidates, logit, scale, top):
    """The same of a row whose candidates hold all that it keeps."""
    x = load_candidates(candidates)
    w = weights(x, scale, row_shift(top, scale)).to(tl.float64)
    return tl.sum(tl.where(x > logit, w, 0.0), axis=0), tl.sum(tl.where(x == logit, w, 0.0), axis=0)


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
    tile_list_ptr,  # [num_rows, num_tiles] scratch; with candidates_ptr CAPACITY more columns, as in decide.py
    candidates_ptr,  # [num_rows, CAPACITY], or None where none filters
    row_ptr,  # [num_rows, ROW_COLUMNS], thresholds of requests that filter; None: they are to be found here
    shares_ptr,  # [num_rows, num_parts, 2] scratch: what each of a row's programs found above and equal
    row_arrived_ptr,  # [num_rows] zeros
    counts_ptr,  # [num_methods, COLUMNS]
    places_ptr,  # [num_reqs, width] out, or None
    vocab_size,
    num_tiles,
    method,
    KEY_BITS: tl.constexpr,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
):
    """One program per (part of a row, row, request); what needs no share of the others is the first part's."""
    part, pos, index = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    is_last = part == 0
    request = load_request(index, cu_num_logits_ptr, state_indices_ptr, temperature_ptr)
    is_emitted, token = _emitted(token_ids_ptr, token_ids_stride, num_sampled_ptr, request, pos)
    if places_ptr is not None:
        tl.store(places_ptr + index * tl.num_programs(1) + pos, float("nan"), mask=is_last)
    if is_emitted == 0:
        return
    counts_ptr += COLUMNS * (method if rule_requests_ptr is None else _method_of(rule_requests_ptr, request, method))
    if request.temperature < GREEDY_BELOW:
        is_left_out = tl.load(temperature_ptr + request.state) < 0.0
        tl.atomic_add(counts_ptr + BINS + 1, 1, mask=is_left_out & is_last, sem="relaxed")
        return
    row = request.start_row + pos
    row_logits_ptr = logits_ptr + row * logits_stride
    scale = LOG2_E / request.temperature
    tiles = Tiles(tile_max_ptr, tile_sum_ptr, None, num_tiles)
    threshold = tl.full((), float("-inf"), tl.float32)
    count = tl.full((), CAPACITY + 1, tl.int32)
    candidates = Candidates(None, None, None)
    list_ptr = tile_list_ptr + row * (num_tiles if candidates_ptr is None else num_tiles + CAPACITY)
    if candidates_ptr is not None:
        values_ptr = candidates_ptr + row * CAPACITY
        filters = load_filters(top_k_ptr, top_p_ptr, min_p_ptr, request.state)
        if is_filtered(filters, vocab_size):
            if row_ptr is not None:
                threshold = tl.load(row_ptr + row * ROW_COLUMNS + THRESHOLD)
                count = tl.load(row_ptr + row * ROW_COLUMNS + NUM_CANDIDATES).to(tl.int32)
            else:
                threshold, count = filter_row(
                    row_logits_ptr,
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
        if (count <= CAPACITY) & (part > 0):
            return
        candidates = Candidates(values_ptr, list_ptr + num_tiles, count)
    top, mass = kept_mass(tiles, candidates, row, scale, threshold, PADDED_TILES)
    if ((mass > 0.0) & (mass < float("inf"))) == 0:
        # No usable logit, or some that are too large for single precision at this temperature.
        tl.atomic_add(counts_ptr + BINS + 1, 1, mask=is_last, sem="relaxed")
        return
    logit = _token_logit(row_logits_ptr, token, vocab_size)
    is_possible = (logit >= threshold) & (logit > float("-inf")) & ((top < float("inf")) | (logit == top))
    place = tl.full((), 1.0, tl.float64)
    if is_possible:
        above, equal = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
        is_gathered = tl.full((), False, tl.int1)
        if candidates_ptr is not None:
            is_gathered = count <= CAPACITY
            if is_gathered & is_last:
                above, equal = _split_candidates(candidates, logit, scale, top)
        if is_gathered == 0:
            above, equal, is_last = _split_tiles(
                row_logits_ptr,
                tiles,
                row,
                list_ptr,
                shares_ptr,
                row_arrived_ptr,
                logit,
                scale,
                top,
                vocab_size,
                TILE,
                PADDED_TILES,
            )
        noise = Noise(seeds_ptr, positions_ptr)
        uniform = draw_uniform(tl.load(seeds_ptr + request.state), load_position(noise, request, pos), AUDIT)
        place = (above + uniform * equal) / mass
    if is_last == 0:
        return
    bin = tl.minimum(tl.maximum((place * BINS).to(tl.int32), 0), BINS - 1)
    tl.atomic_add(counts_ptr + bin, 1, sem="relaxed")
    tl.atomic_add(counts_ptr + BINS, 1, mask=is_possible == 0, sem="relaxed")
    if places_ptr is not None:
        tl.store(places_ptr + index * tl.num_programs(1) + pos, tl.minimum(place, 1.0))


@triton.jit
def _method_of(rule_requests_ptr, request, method):
    """A request's row of the counts: ``method``, or that of the exact one."""
    return tl.where(tl.load(rule_requests_ptr + request.state).to(tl.float32) > 0.0, method, 0)


def audit_options(shapes: Shapes, is_filtered: bool, finds_thresholds: bool) -> dict[str, int]:
    """Launch options of the counting kernel: to find thresholds it holds a few numbers more than the deciding one."""
    if finds_thresholds:
        return {"num_warps": shapes.filter_warps, "maxnreg": 160}
    # Left to itself, the assembler spills with filters.
    return {"num_warps": COUNT_WARPS} | ({"maxnreg": 72} if is_filtered else {})


COUNT_WARPS = 4
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
    notes: Swept | None = None,
) -> None:
    """Audit on the device of ``logits``; arguments and meaning as in :func:`vllm_specopt.audit.audit`."""
    given = [each for name, each in locals().items() if name not in ("method", "notes")]
    num_rows, vocab_size = logits.shape
    num_reqs, width = token_ids.shape
    if num_reqs > MOST_REQUESTS:
        raise ValueError(f"the batch has {num_reqs} requests, expected at most {MOST_REQUESTS}")
    shapes = shapes_of(logits.device)
    filters = top_k, top_p, min_p
    filtered = any(each is not None for each in filters)
    tile, steps, num_tiles, num_groups, padded_tiles = row_tiling(vocab_size, shapes, filtered)
    values = (logits.device, shapes, vocab_size, logits.stride(0), notes is None)
    variant = variant_of(given, [logits], values)
    rows = (
        logits,
        logits.stride(0),
        cu_num_logits,
        token_ids,
        token_ids.stride(0),
        num_sampled,
        state_indices,
        temperature,
    )

    def empty(columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(num_rows, columns, dtype=dtype, device=logits.device)

    finds_thresholds = filtered and notes is None
    # Only one program can find a threshold.
    shared_by = 1 if finds_thresholds else PROGRAMS // max(1, width * num_reqs)
    num_parts = max(1, min(MOST_PARTS.value, triton.cdiv(num_tiles * tile, max(tile, SPAN.value)), shared_by))
    if notes is None:
        candidates, arrived = empty(CAPACITY.value) if filtered else None, empty(1, torch.int32)
        notes = Swept(empty(num_tiles), empty(num_tiles), None, candidates, None, arrived)
        _sweep(
            variant,
            (num_groups, width, num_reqs),
            {"num_warps": shapes.statistics_warps},
            *rows,
            notes.tile_max,
            notes.tile_sum,
            notes.arrived,
            vocab_size,
            num_tiles,
            TILE=tile,
            STEPS=steps,
        )
    tile_list = notes.tile_list
    if tile_list is None:
        tile_list = empty(num_tiles + (CAPACITY.value if filtered else 0), torch.int32)
    _count(
        variant,
        (num_parts, width, num_reqs),
        audit_options(shapes, filtered, finds_thresholds),
        *rows,
        seeds,
        positions,
        *filters,
        rule_requests,
        notes.tile_max,
        notes.tile_sum,
        tile_list,
        notes.candidates,
        notes.row_data if filtered else None,
        empty(2 * num_parts, torch.float64),
        notes.arrived,
        counts,
        places,
        vocab_size,
        num_tiles,
        method,
        KEY_BITS=KEY_BITS[logits.dtype],
        TILE=tile,
        PADDED_TILES=padded_tiles,
    )
