"""A token drawn from a row by inversion: a tile by the running sum over tiles, then a token by the one within it.

Sums over tiles and within the tile are fp64, so what single precision costs is the rounding of each weight. A row is
read by its statistics and by the one tile chosen.
"""

import triton
import triton.language as tl

from .constants import BAD_ROW, NO_TOKEN
from .load import exp2, load_logits, row_shift, scaled, tile_statistics, weights


@triton.jit
def load_tiles(tiles, row, PADDED_TILES: tl.constexpr):
    """Maxima and sums of a row's tiles, ``[PADDED_TILES]`` each."""
    tile_ids = tl.arange(0, PADDED_TILES)
    offsets = row * tiles.count + tile_ids
    maxima = tl.load(tiles.max_ptr + offsets, mask=tile_ids < tiles.count, other=float("-inf"))
    sums = tl.load(tiles.sum_ptr + offsets, mask=tile_ids < tiles.count, other=0.0)
    return maxima, sums


@triton.jit
def tile_masses(maxima, sums, scale, threshold):
    """The row's largest logit, and the mass of each tile that reaches the threshold, relative to it, fp64."""
    top = tl.max(maxima, axis=0)
    shift = row_shift(top, scale)
    # Both products are rounded as in the sweep.
    factor = exp2(tl.maximum(scaled(maxima, scale) - shift, -200.0))
    factor = tl.where(maxima == top, 1.0, tl.where(top == float("inf"), 0.0, factor))
    kept = (maxima >= threshold) & (maxima > float("-inf"))
    return top, tl.where(kept, sums.to(tl.float64) * factor.to(tl.float64), 0.0)


@triton.jit
def row_maximum(tiles, row, PADDED_TILES: tl.constexpr):
    """A row's largest logit; -inf if none is usable."""
    maxima, _ = load_tiles(tiles, row, PADDED_TILES)
    return tl.max(maxima, axis=0)


@triton.jit
def row_mass(tiles, row, scale, threshold, PADDED_TILES: tl.constexpr):
    """The row's largest logit, and its mass relative to it, fp64."""
    maxima, sums = load_tiles(tiles, row, PADDED_TILES)
    top, masses = tile_masses(maxima, sums, scale, threshold)
    return top, tl.sum(masses, axis=0)


@triton.jit
def token_prob(logit, scale, top, mass, threshold):
    """Probability of a token in a row of the given largest logit and mass, and the inverse of that mass.

    0 below the threshold, beside +inf, and in a row without mass.
    """
    inverse = (1.0 / tl.where(mass > 0.0, mass, 1.0)).to(tl.float32)
    shift = row_shift(top, scale)
    weight = tl.where(logit == top, 1.0, weights(logit, scale, shift))
    kept = (mass > 0.0) & (logit >= threshold) & ((top < float("inf")) | (logit == top))
    return tl.where(kept, weight * inverse, 0.0), inverse


@triton.jit
def pick(masses, places, goal):
    """Place and offset into it: the first place whose running sum passes ``goal`` (the last with mass if none does).

    masses: fp64 block. places: their numbers, ascending. Returns the place, ``NO_TOKEN`` if there is no mass, and
    (goal - what lies before it) / its mass.
    """
    running = tl.cumsum(masses, axis=0)
    first = tl.min(tl.where((running > goal) & (masses > 0.0), places, NO_TOKEN), axis=0)
    last = tl.max(tl.where(masses > 0.0, places, -1), axis=0)
    place = tl.where(first == NO_TOKEN, last, first)
    mass = tl.sum(tl.where(places == place, masses, 0.0), axis=0)
    before = tl.sum(tl.where(places == place, running - masses, 0.0), axis=0)
    share = (goal - before) / tl.where(mass > 0.0, mass, 1.0)
    return tl.where(place < 0, NO_TOKEN, place), tl.minimum(tl.maximum(share, 0.0), 1.0)


@triton.jit
def choose_tile(maxima, sums, scale, threshold, uniform, PADDED_TILES: tl.constexpr):
    """The row's largest logit, the tile of its token (``NO_TOKEN`` in a row without mass), and ``pick``'s offset in it.

    maxima, sums: Of all tiles of the row, ``[PADDED_TILES]``.
    """
    top, masses = tile_masses(maxima, sums, scale, threshold)
    tile, share = pick(masses, tl.arange(0, PADDED_TILES), uniform * tl.sum(masses, axis=0))
    return top, tile, share


@triton.jit
def token_within(
    row_ptr,
    tile,
    share,
    maxima,
    top,
    scale,
    threshold,
    excluded,
    vocab_size,
    TILE: tl.constexpr,
    PADDED_TILES: tl.constexpr,
    EXCLUDES: tl.constexpr,
):
    """The token of a row in the tile that :func:`choose_tile` found; BAD_ROW if nothing of it has weight.

    row_ptr: Where the row begins, or would begin if all of it lay as this tile does: no other tile is read.
    """
    tile_ids = tl.arange(0, PADDED_TILES)
    shift = tl.max(tl.where(tile_ids == tile, maxima, float("-inf")), axis=0)
    token_ids = tile * TILE + tl.arange(0, TILE)
    x = load_logits(row_ptr, token_ids, token_ids < vocab_size)
    if top == float("inf"):
        w = (x == float("inf")).to(tl.float32)
    else:
        w = weights(x, scale, scaled(shift, scale))
        w = tl.where(x >= threshold, w, 0.0)
    if EXCLUDES:
        w = tl.where(token_ids == excluded, 0.0, w)
    fine = w.to(tl.float64)
    token, _ = pick(fine, token_ids, share * tl.sum(fine, axis=0))
    return tl.where(token == NO_TOKEN, BAD_ROW, token)


@triton.jit
def draw_token(
    row_ptr,
    tiles,
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
    """Draw from a row's distribution; BAD_ROW if it has none.

    EXCLUDES: without the token ``excluded`` if that is one and leaves another.
    row_ptr: the row's logits. threshold: the smallest logit that its filters keep. uniform: in (0, 1), fp64.
    """
    tile_ids = tl.arange(0, PADDED_TILES)
    maxima, sums = load_tiles(tiles, row, PADDED_TILES)
    if EXCLUDES:
        if excluded >= 0:
            # Beside +inf nothing else is left.
            threshold = tl.where(tl.max(maxima, axis=0) == float("inf"), float("inf"), threshold)
            token_ids = excluded // TILE * TILE + tl.arange(0, TILE)
            x = load_logits(row_ptr, token_ids, token_ids < vocab_size)
            x = tl.where((token_ids == excluded) | ((x >= threshold) == 0), float("-inf"), x)
            largest, total = tile_statistics(x[None, :], scale)
            largest, total = tl.max(largest, axis=0), tl.max(total, axis=0)
            others = tl.where(tile_ids == excluded // TILE, largest, maxima)
            if tl.max(others, axis=0) >= tl.maximum(threshold, -3.4e38):
                maxima = others
                sums = tl.where(tile_ids == excluded // TILE, total, sums)
            else:
                excluded = tl.full((), -1, tl.int32)
    top, tile, share = choose_tile(maxima, sums, scale, threshold, uniform, PADDED_TILES)
    token = tl.full((), BAD_ROW, tl.int32)
    if tile != NO_TOKEN:
        token = token_within(
            row_ptr, tile, share, maxima, top, scale, threshold, excluded, vocab_size, TILE, PADDED_TILES, EXCLUDES
        )
    return token


@triton.jit
def largest_tile(tiles, row, PADDED_TILES: tl.constexpr):
    """A row's largest logit, and the first tile that has it; ``NO_TOKEN`` if no logit is usable."""
    maxima, _ = load_tiles(tiles, row, PADDED_TILES)
    top = tl.max(maxima, axis=0)
    tile = tl.min(tl.where(maxima == top, tl.arange(0, PADDED_TILES), NO_TOKEN), axis=0)
    return top, tl.where(top > float("-inf"), tile, NO_TOKEN)


@triton.jit
def first_within(row_ptr, tile, top, vocab_size, TILE: tl.constexpr):
    """The first token of a tile with the logit ``top``; ``row_ptr`` as in :func:`token_within`."""
    token_ids = tile * TILE + tl.arange(0, TILE)
    x = load_logits(row_ptr, token_ids, token_ids < vocab_size)
    return tl.min(tl.where(x == top, token_ids, NO_TOKEN), axis=0)


@triton.jit
def argmax_token(row_ptr, tiles, row, vocab_size, TILE: tl.constexpr, PADDED_TILES: tl.constexpr):
    """First token with the row's largest logit; BAD_ROW if no logit is usable."""
    top, tile = largest_tile(tiles, row, PADDED_TILES)
    token = tl.full((), BAD_ROW, tl.int32)
    if tile != NO_TOKEN:
        token = first_within(row_ptr, tile, top, vocab_size, TILE)
    return token
