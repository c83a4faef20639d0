"""Typical acceptance (Cai et al. 2401.10774): a draft token survives where it is probable enough. Not lossless."""

import math

import numpy as np

from vllm_specopt.cpu.lanes import WIDTH, add, larger, multiply, multiply_add, splat, total
from vllm_specopt.cpu.memory import ZERO, jit, load, read_float, size_of
from vllm_specopt.cpu.rows import TILE, tile_at, value_at, weigh, weight_of


@jit
def _entropy(row, frame, mass, scratch):
    """Entropy, in nats, of a row's distribution before filters."""
    weighted = 0.0
    scale, reference, lowest = splat(frame.scale), splat(np.float32(-frame.reference)), splat(frame.lowest)
    for start in range(0, row.vocab, TILE):
        address, kind = tile_at(row, start, scratch.tile)
        size, accumulator = size_of(kind), splat(ZERO)
        for i in range(0, TILE, WIDTH):
            x = larger(load(address + size * i, kind), lowest)
            accumulator = add(accumulator, multiply(weigh(x, frame), multiply_add(x, scale, reference)))
        weighted += np.float64(total(accumulator))
    return (math.log2(mass) - weighted / mass) * math.log(2.0)


@jit
def typical_test(row, frame, mass, token, constants, scratch):
    """Whether a token's probability exceeds min(epsilon, delta exp(-entropy)).

    Args:
        row, frame, mass: As a sweep leaves them.
        constants: Address of epsilon and delta.
    """
    prob = np.float64(weight_of(value_at(row, token), frame)) / mass
    epsilon, delta = np.float64(read_float(constants, 0)), np.float64(read_float(constants, 1))
    if prob > epsilon:
        return True
    return prob > delta * math.exp(-_entropy(row, frame, mass, scratch))
