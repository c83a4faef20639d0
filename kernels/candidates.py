"""The few tokens that a row's filters may keep, gathered in the order of their ids: the threshold and the draw.

What lies above a bound is mostly short. Then one pass over the tiles that reach the bound collects it, and all that
follows happens in registers: the row is not read again.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .bounds import CAPACITY, key_value, order_key
from .constants import BAD_ROW, NO_TOKEN
from .draw import draw_token, pick, row_mass
from .load import load_logits, scaled, weights

SPAN = tl.constexpr(1024)
"""Tokens read at once, several tiles of them."""


class Candidates(NamedTuple):
    """Logits and ids of a row's candidates, ``[CAPACITY]`` each, ids ascending; ``count`` of them.

    A count above CAPACITY: there are more, and these must not be used.
    """

    values_ptr: tl.tensor
    ids_ptr: tl.tensor
    count: tl.tensor


class Bound(NamedTuple):
    """What a row's tiles tell of its threshold.

    top, total: Its largest logit, and its mass relative to that. threshold: That of min-p. low: All that the filters
    may keep lies above it. filters_k: Whether top-k takes part.
    """

    top: tl.tensor
    total: tl.tensor
    threshold: tl.tensor
    low: tl.tensor
    filters_k: tl.tensor


@triton.jit
def list_tiles(list_ptr, maxima, floor, PADDED_TILES: tl.constexpr):
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
def listed(list_ptr, start, num_listed, TILE: tl.constexpr):
    """The next tiles of a list, SPAN tokens together: their numbers, which of them there are, and ids of tokens."""
    places = start + tl.arange(0, SPAN // TILE if TILE < SPAN else 1)
    tile_ids = tl.load(list_ptr + places, mask=places < num_listed, other=0)
    return tile_ids, places < num_listed, tile_ids[:, None] * TILE + tl.arange(0, TILE)[None, :]


@triton.jit
def load_listed(row_ptr, list_ptr, start, num_listed, vocab_size, TILE: tl.constexpr):
    """Their logits, ``[tiles, TILE]``; -inf beyond the list's end."""
    _tile_ids, exists, token_ids = listed(list_ptr, start, num_listed, TILE)
    return load_logits(row_ptr, token_ids, token_ids < tl.where(exists, vocab_size, 0)[:, None])


@triton.jit
def gather(
    row_ptr,
    list_ptr,
    num_listed,
    values_ptr,
    ids_ptr,
    low,
    high,
    found,
    vocab_size,
    TILE: tl.constexpr,
    ROOM: tl.constexpr,
):
    """Collect the tokens in (low, high] of the listed tiles, behind ``found`` others; a count above ROOM: too many."""
    start = tl.full((), 0, tl.int32)
    tl.debug_barrier()
    following = load_listed(row_ptr, list_ptr, start, num_listed, vocab_size, TILE)
    while (start < num_listed) & (found <= ROOM):
        x = following
        following = load_listed(row_ptr, list_ptr, start + SPAN // TILE, num_listed, vocab_size, TILE)
        _tile_ids, _exists, token_ids = listed(list_ptr, start, num_listed, TILE)
        wanted = ((x > low) & (x <= high)).to(tl.int32)
        # A warp counts within its own tiles; only the tiles' totals cross warps.
        totals = tl.sum(wanted, axis=1)
        before = found + tl.cumsum(totals, axis=0) - totals
        places = before[:, None] + tl.cumsum(wanted, axis=1) - 1
        kept = (wanted > 0) & (places < ROOM)
        tl.store(values_ptr + places, x, mask=kept)
        tl.store(ids_ptr + places, token_ids, mask=kept)
        found += tl.sum(totals, axis=0)
        start += SPAN // TILE
    tl.debug_barrier()
    return Candidates(values_ptr, ids_ptr, found)


@triton.jit
def load_candidates(candidates):
    """Their logits, ``[CAPACITY]``, -inf beyond the last."""
    places = tl.arange(0, CAPACITY)
    return tl.load(candidates.values_ptr + places, mask=places < candidates.count, other=float("-inf"))


@triton.jit
def smallest_kept(x, measures, low, high, above_high, goal, KEY_BITS: tl.constexpr):
    """Smallest value of ``x`` such that what is strictly larger measures less than ``goal``: bisection over floats.

    It lies in (low, high]; ``above_high`` is what values above ``high`` measure. KEY_BITS: low bits of ``order_key`` in
    which values of the logits' dtype do not differ.
    """
    keys = order_key(x) >> KEY_BITS
    below = tl.max(tl.full([1], 0, tl.int64) + (order_key(low) >> KEY_BITS), axis=0)
    reached = tl.max(tl.full([1], 0, tl.int64) + (order_key(high) >> KEY_BITS), axis=0)
    while reached - below > 1:
        middle = (below + reached) >> 1
        above = above_high + tl.sum(tl.where(keys > middle.to(tl.int32), measures, 0.0), axis=0)
        reached = tl.where(above < goal, middle, reached)
        below = tl.where(above < goal, below, middle)
    return key_value((reached << KEY_BITS).to(tl.int32))


@triton.jit
def threshold_among(candidates, filters, bound, scale, KEY_BITS: tl.constexpr):
    """The row's threshold, where all that its filters may keep lies above the bound and is among the candidates."""
    x = load_candidates(candidates)
    threshold, total, top, low = bound.threshold, bound.total, bound.top, bound.low
    if bound.filters_k:
        ones = tl.full([CAPACITY], 1.0, tl.float32)
        kth = smallest_kept(x, ones, low, top, 0.0, filters.top_k.to(tl.float32), KEY_BITS)
        threshold = tl.maximum(threshold, kth)
    if filters.top_p < 1.0:
        w = weights(x, scale, scaled(top, scale))
        if threshold > float("-inf"):
            w = tl.where(x >= threshold, w, 0.0)
            total = tl.sum(w, axis=0)
        # The largest value stays whatever top_p is.
        goal = tl.maximum(filters.top_p * total, 1e-30)
        threshold = tl.maximum(threshold, smallest_kept(x, w, low, top, 0.0, goal, KEY_BITS))
    return threshold


@triton.jit
def candidates_mass(candidates, scale, threshold):
    """The largest logit, and the mass of what the threshold keeps relative to it, fp64."""
    x = load_candidates(candidates)
    top = tl.max(x, axis=0)
    w = tl.where(x >= threshold, weights(x, scale, scaled(top, scale)), 0.0)
    return top, tl.sum(w.to(tl.float64), axis=0)


@triton.jit
def draw_candidate(candidates, scale, threshold, excluded, uniform):
    """Draw from what the threshold keeps, without the token ``excluded`` if that is one and leaves another."""
    places = tl.arange(0, CAPACITY)
    x = load_candidates(candidates)
    ids = tl.load(candidates.ids_ptr + places, mask=places < candidates.count, other=-1)
    x = tl.where(x >= threshold, x, float("-inf"))
    others = tl.where(ids == excluded, float("-inf"), x)
    x = tl.where(tl.max(others, axis=0) > float("-inf"), others, x)
    w = weights(x, scale, scaled(tl.max(x, axis=0), scale)).to(tl.float64)
    place, _ = pick(w, places, uniform * tl.sum(w, axis=0))
    token = tl.max(tl.where(places == place, ids, -1), axis=0)
    return tl.where(place == NO_TOKEN, BAD_ROW, token)


@triton.jit
def draw_row(
    row_ptr,
    tiles,
    candidates,
    row,
    scale,
    threshold,
    excluded,
    uniform,
    vocab_size,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    EXCLUDES: tl.constexpr,
):
    """Draw from a row: from its candidates where they hold all that it keeps, else by its tiles (``draw_token``)."""
    token = tl.full((), BAD_ROW, tl.int32)
    is_gathered = tl.full((), False, tl.int1)
    if candidates.values_ptr is not None:
        is_gathered = candidates.count <= CAPACITY
        if is_gathered:
            token = draw_candidate(candidates, scale, threshold, excluded, uniform)
    if is_gathered == 0:
        token = draw_token(
            row_ptr, tiles, row, scale, threshold, excluded, uniform, vocab_size, TILE, PADDED_TILES, EXCLUDES
        )
    return token


@triton.jit
def kept_mass(tiles, candidates, row, scale, threshold, PADDED_TILES: tl.constexpr):
    """A row's largest logit, and the mass of what its threshold keeps relative to it, fp64."""
    top, mass = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float64)
    is_gathered = tl.full((), False, tl.int1)
    if candidates.values_ptr is not None:
        is_gathered = candidates.count <= CAPACITY
        if is_gathered:
            top, mass = candidates_mass(candidates, scale, threshold)
    if is_gathered == 0:
        top, mass = row_mass(tiles, row, scale, threshold, PADDED_TILES)
    return top, mass
