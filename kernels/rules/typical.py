"""Typical acceptance (Cai et al. 2401.10774): a draft token survives where it is probable enough. Not lossless.

Probable enough is a probability above min(epsilon, delta exp(-H)), both the probability and the entropy H those of the
row after temperature and before filters. Constants: fp32 ``[2]``, epsilon and delta.
"""

import triton
import triton.language as tl

from ..draw import load_tiles, tile_masses, token_prob
from ..load import exp2, row_shift, scaled


@triton.jit
def tile_entropy(x, largest, scale):
    """Sum of w log2(w) of each tile, with w = 2^(x scale - largest scale): ``[tiles]``; 0 and NaN count as 0."""
    shift = scaled(tl.where(largest > float("-inf"), largest, 0.0), scale)[:, None]
    exponent = tl.fma(x, scale, tl.zeros_like(x) - shift)
    w = exp2(exponent)
    return tl.sum(tl.where((w > 0.0) & (w <= 1.0), w * exponent, 0.0), axis=1)


@triton.jit
def threshold(tiles, row, scale, constants_ptr, PADDED_TILES: tl.constexpr):
    """min(epsilon, delta exp(-H)) of a row; its largest logit; and its mass relative to that, fp64."""
    maxima, sums = load_tiles(tiles, row, PADDED_TILES)
    top, masses = tile_masses(maxima, sums, scale, float("-inf"))
    mass = tl.sum(masses, axis=0)
    tile_ids = tl.arange(0, PADDED_TILES)
    own = tl.load(tiles.entropy_ptr + row * tiles.count + tile_ids, mask=tile_ids < tiles.count, other=0.0)
    below = scaled(maxima, scale) - row_shift(top, scale)
    # Beside +inf all that counts has weight 1.
    counts = tl.where(top < float("inf"), masses, 0.0) > 0.0
    below = tl.where(counts, below, 0.0)
    factor = tl.where(counts, exp2(tl.maximum(below, -200.0)), 0.0)
    logs = tl.sum(masses * below.to(tl.float64) + (own * factor).to(tl.float64), axis=0)
    mass_or_one = tl.where(mass > 0.0, mass, 1.0)
    entropy = tl.log2(mass_or_one.to(tl.float32)) - (logs / mass_or_one).to(tl.float32)
    epsilon, delta = tl.load(constants_ptr), tl.load(constants_ptr + 1)
    return tl.minimum(epsilon, delta * exp2(tl.zeros_like(entropy) - entropy)), top, mass


@triton.jit
def passes(logit, tiles, row, scale, constants_ptr, PADDED_TILES: tl.constexpr):
    """Whether a token of the given logit is probable enough."""
    least, top, mass = threshold(tiles, row, scale, constants_ptr, PADDED_TILES)
    prob, _inverse = token_prob(logit, scale, top, mass, float("-inf"))
    return prob > least
