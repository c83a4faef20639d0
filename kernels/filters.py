"""min-p, top-k and top-p as one threshold per row, without sorting and without writing a row.

All three keep a set of largest logits: min-p keeps probabilities of at least min_p times the largest, top-k keeps
values of at least the k-th largest, top-p keeps a value while the mass of strictly larger ones is below top_p of the
mass kept so far. Tokens equal to the threshold are kept.

Rows are long and what is kept is short: the tiles' maxima and sums bound a threshold from below, and only tiles that
reach the bound are read, mostly once (``candidates.py``). Where too much lies above the bound, passes over the row
narrow it first, three pivots at a time, the first ones from a sample.
"""

import triton
import triton.language as tl

from .bounds import CAPACITY, guess, key_value, order_key, top_k_bound, top_p_bound
from .candidates import (
    SPAN,
    Bound,
    Candidates,
    gather,
    list_tiles,
    listed,
    load_candidates,
    load_listed,
    smallest_kept,
    threshold_among,
)
from .draw import load_tiles, tile_masses
from .load import load_logits, scaled, weights

MAX_PASSES = tl.constexpr(40)
"""More than the order of floats needs: 6 by value, then 16 by key."""

CHUNK = tl.constexpr(2048)
"""Tokens that a pass adds up at once."""

FEW_VALUES = tl.constexpr(16)
"""Values of the dtype between the bounds that two passes tell apart."""

MARGIN = tl.constexpr(0.0625)
"""How far from where it is expected the threshold is still caught, as a share of the bounds' distance."""


@triton.jit
def _measures(row_ptr, pivot1, pivot2, pivot3, scale, shift, vocab_size):
    """What a row has above each of three ascending pivots, in one pass over all of it."""
    above1 = tl.zeros([CHUNK], tl.float32)
    above2 = tl.zeros([CHUNK], tl.float32)
    above3 = tl.zeros([CHUNK], tl.float32)
    for start in range(0, vocab_size, 2 * CHUNK):
        for step in tl.static_range(2):
            token_ids = start + step * CHUNK + tl.arange(0, CHUNK)
            x = load_logits(row_ptr, token_ids, token_ids < vocab_size)
            w = weights(x, scale, shift)
            above1 = tl.fma((x > pivot1).to(tl.float32), w, above1)
            above2 = tl.fma((x > pivot2).to(tl.float32), w, above2)
            above3 = tl.fma((x > pivot3).to(tl.float32), w, above3)
    return tl.sum(above1, axis=0), tl.sum(above2, axis=0), tl.sum(above3, axis=0)


@triton.jit
def _narrow(low, high, low_measure, high_measure, pivot, above, goal):
    """Bounds after one pivot: the threshold lies in (low, high], what lies above them measures >= goal and < goal."""
    inside = (pivot > low) & (pivot < high)
    raises = inside & (above >= goal)
    lowers = inside & (above < goal)
    low, low_measure = tl.where(raises, pivot, low), tl.where(raises, above, low_measure)
    high, high_measure = tl.where(lowers, pivot, high), tl.where(lowers, above, high_measure)
    return low, high, low_measure, high_measure


@triton.jit
def _values_left(low, high, KEY_BITS: tl.constexpr):
    """How many values of the logits' dtype lie in (low, high]."""
    return (order_key(high).to(tl.int64) >> KEY_BITS) - (order_key(low).to(tl.int64) >> KEY_BITS)


@triton.jit
def _pass(
    row_ptr,
    scale,
    shift,
    low,
    high,
    low_measure,
    high_measure,
    goal,
    reach,
    passes,
    vocab_size,
    KEY_BITS: tl.constexpr,
):
    """One pass over the row: bounds, what lies above them, and ``reach``, narrowed by three pivots."""
    values = _values_left(low, high, KEY_BITS)
    by_key = (passes >= 6) | (values <= FEW_VALUES)
    share = (goal - high_measure) / (low_measure - high_measure)
    # Every other time as if what lies between the bounds were spread evenly, else in quarters.
    is_even = (passes % 2 == 1) & (low_measure > high_measure)
    pivot2 = high - tl.where(is_even, share, 0.5) * (high - low)
    margin = tl.where(is_even, MARGIN, 0.25) * (high - low)
    pivot1, pivot3 = pivot2 - margin, pivot2 + margin
    if low == float("-inf"):
        # Nothing is known of how far down the values go.
        pivot1, pivot2, pivot3 = high - 16.0 * reach, high - 4.0 * reach, high - reach
        reach = reach * 64.0
    elif (passes == 0) & (by_key == 0):
        pivot1, pivot2, pivot3 = guess(row_ptr, low, high, share, scale, shift, vocab_size)
    elif by_key:
        low_key = order_key(low).to(tl.int64) >> KEY_BITS
        pivot1 = key_value((low_key + values // 4 << KEY_BITS).to(tl.int32))
        pivot2 = key_value((low_key + values // 2 << KEY_BITS).to(tl.int32))
        pivot3 = key_value((low_key + values * 3 // 4 << KEY_BITS).to(tl.int32))
    above1, above2, above3 = _measures(row_ptr, pivot1, pivot2, pivot3, scale, shift, vocab_size)
    low, high, low_measure, high_measure = _narrow(low, high, low_measure, high_measure, pivot1, above1, goal)
    low, high, low_measure, high_measure = _narrow(low, high, low_measure, high_measure, pivot2, above2, goal)
    low, high, low_measure, high_measure = _narrow(low, high, low_measure, high_measure, pivot3, above3, goal)
    return low, high, low_measure, high_measure, reach


@triton.jit
def _crossing(
    row_ptr,
    list_ptr,
    values_ptr,
    ids_ptr,
    maxima,
    scale,
    top,
    low,
    low_measure,
    goal,
    reach,
    vocab_size,
    KEY_BITS: tl.constexpr,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
):
    """Smallest logit above ``low`` such that what is strictly larger measures less than ``goal``.

    A logit measures 2^((logit - top) scale): its mass, or 1 where ``scale`` is 0. low_measure: an upper bound of what
    lies above ``low``. reach: where ``low`` is -inf, how far below the top to look first.
    """
    shift = scaled(top, scale)
    high, high_measure = top, tl.zeros((), tl.float32)
    num_listed = list_tiles(list_ptr, maxima, low, PADDED_TILES)
    found = tl.full((), CAPACITY + 1, tl.int32)
    passes = tl.full((), 0, tl.int32)
    is_short = tl.full((), True, tl.int1)
    while (found > CAPACITY) & (_values_left(low, high, KEY_BITS) > 1) & (passes < MAX_PASSES):
        # A pass costs a third of gathering, and two tell a few values apart.
        few = (_values_left(low, high, KEY_BITS) <= FEW_VALUES) & (2 * TILE * num_listed > vocab_size)
        if is_short & (few == 0):
            none = tl.full((), 0, tl.int32)
            found = gather(
                row_ptr, list_ptr, num_listed, values_ptr, ids_ptr, low, high, none, vocab_size, TILE, CAPACITY
            ).count
        if found > CAPACITY:
            low, high, low_measure, high_measure, reach = _pass(
                row_ptr, scale, shift, low, high, low_measure, high_measure, goal, reach, passes, vocab_size, KEY_BITS
            )
            passes += 1
            # No logit above the lower bound measures less than it.
            is_short = low_measure - high_measure <= CAPACITY * weights(low, scale, shift)
    # One value of the logits' dtype is left.
    threshold = key_value(order_key(high) >> KEY_BITS << KEY_BITS)
    if found <= CAPACITY:
        x = load_candidates(Candidates(values_ptr, ids_ptr, found))
        threshold = smallest_kept(x, weights(x, scale, shift), low, high, high_measure, goal, KEY_BITS)
    return threshold


@triton.jit
def keep_above(
    row_ptr, tiles, row, list_ptr, scale, threshold, vocab_size, TILE: tl.constexpr, PADDED_TILES: tl.constexpr
):
    """Replace the sums of tiles that reach the threshold by those of what they keep."""
    maxima, _sums = load_tiles(tiles, row, PADDED_TILES)
    num_listed = list_tiles(list_ptr, maxima, key_value(order_key(threshold) - 1), PADDED_TILES)
    start = tl.full((), 0, tl.int32)
    while start < num_listed:
        x = load_listed(row_ptr, list_ptr, start, num_listed, vocab_size, TILE)
        tile_ids, exists, _token_ids = listed(list_ptr, start, num_listed, TILE)
        offsets = row * tiles.count + tile_ids
        largest = tl.load(tiles.max_ptr + offsets, mask=exists, other=0.0)
        w = weights(x, scale, scaled(largest, scale)[:, None])
        sums = tl.sum(tl.where(x >= threshold, w, 0.0), axis=1)
        tl.store(tiles.sum_ptr + offsets, sums, mask=exists)
        start += SPAN // TILE
    tl.debug_barrier()


@triton.jit
def _wide_threshold(
    row_ptr,
    tiles,
    row,
    filters,
    filters_k,
    threshold,
    scale,
    list_ptr,
    values_ptr,
    ids_ptr,
    vocab_size,
    KEY_BITS: tl.constexpr,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
):
    """The threshold of a row of which much may be kept; the sums of its tiles become those of what it keeps.

    threshold: that of min-p.
    """
    for stage in range(2):
        counts = stage == 0
        applies = (counts & filters_k) | ((counts == 0) & (filters.top_p < 1.0))
        if applies:
            maxima, sums = load_tiles(tiles, row, PADDED_TILES)
            top, masses = tile_masses(maxima, sums, scale, threshold)
            total = tl.sum(masses, axis=0).to(tl.float32)
            if counts:
                measure_scale = tl.zeros((), tl.float32)
                measure, goal = tl.full((), 0.0, tl.float32) + vocab_size, filters.top_k.to(tl.float32)
                low = top_k_bound(maxima, filters.top_k)
            else:
                measure_scale = tl.zeros((), tl.float32) + scale
                measure, goal = total, tl.maximum(filters.top_p * total, 1e-30)
                low = top_p_bound(maxima, masses, scale, top, goal, total, vocab_size, TILE)
            if threshold > float("-inf"):
                low = tl.maximum(low, key_value(order_key(threshold) - 1))
            crossing = _crossing(
                row_ptr,
                list_ptr,
                values_ptr,
                ids_ptr,
                maxima,
                measure_scale,
                top,
                low,
                measure,
                goal,
                4.0 / scale,
                vocab_size,
                KEY_BITS,
                TILE,
                PADDED_TILES,
            )
            threshold = tl.maximum(threshold, crossing)
        if (counts | applies) & (threshold > float("-inf")):
            keep_above(row_ptr, tiles, row, list_ptr, scale, threshold, vocab_size, TILE, PADDED_TILES)
    return threshold


@triton.jit
def bound_of(maxima, masses, top, filters, scale, vocab_size, TILE: tl.constexpr):
    """Where a row's threshold may lie. maxima, masses: Of its tiles. top: Its largest logit, finite."""
    threshold = tl.full((), float("-inf"), tl.float32)
    low = threshold
    if filters.min_p > 0.0:
        threshold = tl.minimum(top, top + tl.log2(filters.min_p) / scale)
        low = key_value(order_key(threshold) - 1)
    filters_k = (filters.top_k >= 1) & (filters.top_k < vocab_size)
    total = tl.sum(masses, axis=0).to(tl.float32)
    if filters_k:
        low = tl.maximum(low, top_k_bound(maxima, filters.top_k))
    elif (filters.top_p < 1.0) & (threshold == float("-inf")):
        goal = tl.maximum(filters.top_p * total, 1e-30)
        low = top_p_bound(maxima, masses, scale, top, goal, total, vocab_size, TILE)
    return Bound(top, total, threshold, low, filters_k)


@triton.jit
def filter_row(
    row_ptr,
    tiles,
    row,
    filters,
    scale,
    list_ptr,
    values_ptr,
    vocab_size,
    KEY_BITS: tl.constexpr,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
):
    """A row's threshold, and the number of candidates, which hold all it keeps.

    Where that is above CAPACITY, the sums of the row's tiles have become those of what it keeps instead. list_ptr:
    scratch for numbers of tiles, ids of candidates behind them. KEY_BITS: see ``smallest_kept``.
    """
    ids_ptr = list_ptr + tiles.count
    maxima, sums = load_tiles(tiles, row, PADDED_TILES)
    top, masses = tile_masses(maxima, sums, scale, float("-inf"))
    threshold = tl.full((), float("-inf"), tl.float32)
    count = tl.full((), CAPACITY + 1, tl.int32)
    if top == float("inf"):
        threshold = top
    elif top > float("-inf"):
        bound = bound_of(maxima, masses, top, filters, scale, vocab_size, TILE)
        threshold = bound.threshold
        num_listed = list_tiles(list_ptr, maxima, bound.low, PADDED_TILES)
        none = tl.full((), 0, tl.int32)
        candidates = gather(
            row_ptr, list_ptr, num_listed, values_ptr, ids_ptr, bound.low, top, none, vocab_size, TILE, CAPACITY
        )
        count = candidates.count
        if count <= CAPACITY:
            threshold = threshold_among(candidates, filters, bound, scale, KEY_BITS)
        else:
            threshold = _wide_threshold(
                row_ptr,
                tiles,
                row,
                filters,
                bound.filters_k,
                threshold,
                scale,
                list_ptr,
                values_ptr,
                ids_ptr,
                vocab_size,
                KEY_BITS,
                TILE,
                PADDED_TILES,
            )
    return threshold, count
