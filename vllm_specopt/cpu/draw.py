"""A token drawn by inversion, in the order of the vocabulary: a running sum over tiles, then inside one of them."""

import numpy as np

from vllm_specopt.cpu.lanes import WIDTH, load_fp32, total64
from vllm_specopt.cpu.memory import jit, read_float
from vllm_specopt.cpu.rows import TILE


@jit
def find_tile(sums, num_tiles, goal):
    """The first tile at whose end the running sum passes ``goal``, and the sum up to its beginning.

    Rounding may leave the goal at the end of all: then it is the last tile that has any weight. -1 if none has.
    """
    found, before, running = -1, 0.0, 0.0
    for tile in range(num_tiles):
        weight = np.float64(read_float(sums, tile))
        if weight > 0.0:
            found, before = tile, running
            running += weight
            if running > goal:
                break
    return found, before


@jit
def find_in_tile(weights, goal):
    """The first place of a tile at which the running sum of its weights, in double precision, passes ``goal``.

    The tile's sum in single precision may lie beyond this one: then it is the last place that has any weight.
    """
    first, before, running = 0, 0.0, 0.0
    for i in range(0, TILE, WIDTH):
        group = total64(load_fp32(weights + 4 * i))
        if group > 0.0:
            first, before = i, running
            running += group
            if running > goal:
                break
    place, running = first, before
    for i in range(first, first + WIDTH):
        weight = np.float64(read_float(weights, i))
        if weight > 0.0:
            place = i
            running += weight
            if running > goal:
                break
    return place
