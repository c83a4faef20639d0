"""min-p, top-k and top-p as one threshold per row, without sorting and without writing a row.

All three keep a set of largest logits: min-p keeps probabilities of at least min_p times the largest, top-k keeps
values of at least the k-th largest, top-p keeps a value while the mass of strictly larger ones is below top_p of the
mass kept so far. Tokens equal to the threshold are kept.

Rows are long and what is kept is short: the tiles' maxima and sums bound a threshold from below, and only tiles that
reach the bound are read. What lies between the bounds is gathered, and the threshold found among it in registers.
Where too much lies there, passes over the row narrow the bounds first, three pivots at a time, the first ones from a
sample.
"""

import triton
import triton.language as tl

from .bounds import CAPACITY, guess, key_value, order_key, top_k_bound, top_p_bound
from .draw import load_tiles, tile_masses
from .load import load_logits, weights

GROUP = tl.constexpr(2)
"""Tiles read at once."""

MAX_PASSES = tl.constexpr(40)
"""More than the order of floats needs: 6 by value, then 16 by key."""


@triton.jit
def _list_tiles(list_ptr, maxima, floor, PADDED_TILES: tl.constexpr):
    """Write down which tiles hold a value above ``floor``; their number."""
    tile_ids = tl.arange(0, PADDED_TILES)
    listed = maxima > floor
    places = tl.cumsum(listed.to(tl.int32), axis=0)
    # The previous list may still be read by other warps.
    tl.debug_barrier()
    tl.store(list_ptr + places - 1, tile_ids, mask=listed)
    tl.debug_barrier()
    return tl.max(places, axis=0)


@triton.jit
def _load_group(row_ptr, list_ptr, start, count, vocab_size, TILE: tl.constexpr):
    """GROUP tiles of a list, ``[GROUP, TILE]``; -inf beyond its end."""
    places = start + tl.arange(0, GROUP)
    tile_ids = tl.load(list_ptr + places, mask=places < count, other=0)
    token_ids = tile_ids[:, None] * TILE + tl.arange(0, TILE)[None, :]
    return load_logits(row_ptr, token_ids, (token_ids < vocab_size) & (places < count)[:, None]), tile_ids, places


@triton.jit
def _load_listed(row_ptr, list_ptr, place, count, vocab_size, TILE: tl.constexpr):
    """One tile of a list; -inf beyond its end."""
    tile = tl.load(list_ptr + place, mask=place < count, other=0)
    token_ids = tile * TILE + tl.arange(0, TILE)
    return load_logits(row_ptr, token_ids, token_ids < tl.where(place < count, vocab_size, 0))


@triton.jit
def _gather(row_ptr, list_ptr, count, out_ptr, low, high, vocab_size, TILE: tl.constexpr):
    """Collect the values in (low, high] of the listed tiles; their number, or some number above CAPACITY."""
    found = tl.full((), 0, tl.int32)
    start = tl.full((), 0, tl.int32)
    tl.debug_barrier()
    following = _load_listed(row_ptr, list_ptr, start, count, vocab_size, TILE)
    while (start < count) & (found <= CAPACITY):
        x = following
        following = _load_listed(row_ptr, list_ptr, start + 1, count, vocab_size, TILE)
        wanted = (x > low) & (x <= high)
        places = found + tl.cumsum(wanted.to(tl.int32), axis=0)
        tl.store(out_ptr + places - 1, x, mask=wanted & (places <= CAPACITY))
        found = tl.max(places, axis=0)
        start += 1
    tl.debug_barrier()
    return found


@triton.jit
def _measures(row_ptr, pivot1, pivot2, pivot3, scale, shift, vocab_size, TILE: tl.constexpr):
    """What a row has above each of three ascending pivots, in one pass over all of it."""
    above1 = tl.zeros([TILE], tl.float32)
    above2 = tl.zeros([TILE], tl.float32)
    above3 = tl.zeros([TILE], tl.float32)
    for start in range(0, vocab_size, GROUP * TILE):
        for step in tl.static_range(GROUP):
            token_ids = start + step * TILE + tl.arange(0, TILE)
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
def _resolve(values_ptr, found, low, high, high_measure, goal, scale, shift):
    """The threshold among gathered values: bisection over the order of floats."""
    places = tl.arange(0, CAPACITY)
    x = tl.load(values_ptr + places, mask=places < found, other=float("-inf"))
    w = weights(x, scale, shift)
    keys = order_key(x)
    below = tl.max(tl.full([1], 0, tl.int64) + order_key(low), axis=0)
    reached = tl.max(tl.full([1], 0, tl.int64) + order_key(high), axis=0)
    while reached - below > 1:
        middle = (below + reached) >> 1
        above = high_measure + tl.sum(tl.where(keys > middle, w, 0.0), axis=0)
        reached = tl.where(above < goal, middle, reached)
        below = tl.where(above < goal, below, middle)
    return key_value(reached.to(tl.int32))


@triton.jit
def _crossing(
    row_ptr,
    list_ptr,
    values_ptr,
    maxima,
    scale,
    top,
    low,
    low_measure,
    goal,
    reach,
    vocab_size,
    KEY_STEP: tl.constexpr,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
):
    """Smallest logit above ``low`` such that what is strictly larger measures less than ``goal``.

    A logit measures 2^((logit - top) scale): its mass, or 1 where ``scale`` is 0. low_measure: an upper bound of what
    lies above ``low``. reach: where ``low`` is -inf, how far below the top to look first.
    """
    shift = top * scale
    high, high_measure = top, tl.zeros((), tl.float32)
    count = _list_tiles(list_ptr, maxima, low, PADDED_TILES)
    found = _gather(row_ptr, list_ptr, count, values_ptr, low, high, vocab_size, TILE)
    passes = tl.full((), 0, tl.int32)
    gap = order_key(high).to(tl.int64) - order_key(low).to(tl.int64)
    while (found > CAPACITY) & (gap > KEY_STEP) & (passes < MAX_PASSES):
        pivot1, pivot2, pivot3 = low + 0.25 * (high - low), low + 0.5 * (high - low), low + 0.75 * (high - low)
        if low == float("-inf"):
            # Nothing is known of how far down the values go.
            pivot1, pivot2, pivot3 = high - 16.0 * reach, high - 4.0 * reach, high - reach
            reach = reach * 64.0
        elif passes == 0:
            share = (goal - high_measure) / (low_measure - high_measure)
            pivot1, pivot2, pivot3 = guess(row_ptr, low, high, share, scale, shift, vocab_size)
        elif passes >= 6:
            low_key, high_key = order_key(low).to(tl.int64), order_key(high).to(tl.int64)
            pivot1 = key_value((low_key + (high_key - low_key) // 4).to(tl.int32))
            pivot2 = key_value((low_key + (high_key - low_key) // 2).to(tl.int32))
            pivot3 = key_value((low_key + (high_key - low_key) * 3 // 4).to(tl.int32))
        above1, above2, above3 = _measures(row_ptr, pivot1, pivot2, pivot3, scale, shift, vocab_size, TILE)
        low, high, low_measure, high_measure = _narrow(low, high, low_measure, high_measure, pivot1, above1, goal)
        low, high, low_measure, high_measure = _narrow(low, high, low_measure, high_measure, pivot2, above2, goal)
        low, high, low_measure, high_measure = _narrow(low, high, low_measure, high_measure, pivot3, above3, goal)
        passes += 1
        gap = order_key(high).to(tl.int64) - order_key(low).to(tl.int64)
        # No logit above the lower bound measures less than it.
        if low_measure - high_measure <= CAPACITY * weights(low, scale, shift):
            found = _gather(row_ptr, list_ptr, count, values_ptr, low, high, vocab_size, TILE)
    # One value of the logits' dtype is left.
    threshold = key_value(order_key(high) & -KEY_STEP)
    if found <= CAPACITY:
        threshold = _resolve(values_ptr, found, low, high, high_measure, goal, scale, shift)
    return threshold


@triton.jit
def keep_above(
    row_ptr,
    tiles,
    row,
    list_ptr,
    scale,
    threshold,
    vocab_size,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
):
    """Replace the sums of tiles that reach the threshold by those of what they keep."""
    maxima, _ = load_tiles(tiles, row, PADDED_TILES)
    count = _list_tiles(list_ptr, maxima, key_value(order_key(threshold) - 1), PADDED_TILES)
    start = tl.full((), 0, tl.int32)
    while start < count:
        x, tile_ids, places = _load_group(row_ptr, list_ptr, start, count, vocab_size, TILE)
        offsets = row * tiles.count + tile_ids
        largest = tl.load(tiles.max_ptr + offsets, mask=places < count, other=0.0)
        w = weights(x, scale, (largest * scale)[:, None])
        sums = tl.sum(tl.where(x >= threshold, w, 0.0), axis=1)
        tl.store(tiles.sum_ptr + offsets, sums, mask=places < count)
        start += GROUP
    tl.debug_barrier()


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
    KEY_STEP: tl.constexpr,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
):
    """A row's threshold; the sums of its tiles become those of what it keeps.

    KEY_STEP: distance of neighbouring values of the logits' dtype in ``order_key``.
    """
    maxima, sums = load_tiles(tiles, row, PADDED_TILES)
    top = tl.max(maxima, axis=0)
    threshold = tl.full((), float("-inf"), tl.float32)
    if top == float("inf"):
        threshold = top
    elif top > float("-inf"):
        if filters.min_p > 0.0:
            threshold = tl.minimum(top, top + tl.log2(filters.min_p) / scale)
        if (filters.top_k >= 1) & (filters.top_k < vocab_size):
            low = top_k_bound(maxima, filters.top_k)
            most = tl.full((), 0.0, tl.float32) + vocab_size
            goal = filters.top_k.to(tl.float32)
            kth = _crossing(
                row_ptr,
                list_ptr,
                values_ptr,
                maxima,
                tl.zeros((), tl.float32),
                top,
                low,
                most,
                goal,
                4.0 / scale,
                vocab_size,
                KEY_STEP,
                TILE,
                PADDED_TILES,
            )
            threshold = tl.maximum(threshold, kth)
        if threshold > float("-inf"):
            keep_above(row_ptr, tiles, row, list_ptr, scale, threshold, vocab_size, TILE, PADDED_TILES)
        if filters.top_p < 1.0:
            maxima, sums = load_tiles(tiles, row, PADDED_TILES)
            _, masses = tile_masses(maxima, sums, scale, threshold)
            total = tl.sum(masses, axis=0).to(tl.float32)
            # The largest value stays whatever top_p is.
            goal = tl.maximum(filters.top_p * total, 1e-30)
            low = top_p_bound(maxima, masses, scale, top, goal, total, filters.top_p, vocab_size, TILE)
            if threshold > float("-inf"):
                low = tl.maximum(low, key_value(order_key(threshold) - 1))
            threshold = _crossing(
                row_ptr,
                list_ptr,
                values_ptr,
                maxima,
                scale,
                top,
                low,
                total,
                goal,
                4.0 / scale,
                vocab_size,
                KEY_STEP,
                TILE,
                PADDED_TILES,
            )
            keep_above(row_ptr, tiles, row, list_ptr, scale, threshold, vocab_size, TILE, PADDED_TILES)
    return threshold
