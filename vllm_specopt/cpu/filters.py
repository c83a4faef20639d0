"""min-p, then top-k, then top-p, as one threshold. Ties with it are kept.

What the sweep leaves of each tile bounds the threshold from below, so that few tiles are read again: of a peaked row
what is kept is gathered, and the rest of the work is on that. Only where thousands of tokens are candidates is the
row swept several times.
"""

import math

import numpy as np

from vllm_specopt.cpu.lanes import WIDTH, add, larger, largest, load_fp32, splat, store, total64, where_at_least
from vllm_specopt.cpu.memory import FP32, INF, ZERO, jit, read_float, read_int, write_float, write_int
from vllm_specopt.cpu.plan import POOL
from vllm_specopt.cpu.rows import TILE, Row, weigh, weigh_tile, weight_of
from vllm_specopt.cpu.target import Target, sum_of_weights
from vllm_specopt.cpu.thresholds import collect, counted, reach, reach_in_row, weigh_pool

# Quarter powers of two below the largest weight that a bound for top-p is looked for in.
BOUND_STEPS = 400
# Steps of the representation, 2^-8 of a value, within which a bound for top-k is found.
ROUGHLY = 1 << 15
# From one tile in so many to read, a tighter bound pays for itself.
MANY = 8


@jit
def tops_of_tiles(num_tiles, scratch):
    """Reduce the groups' largest logits to one number per tile; returns the row's largest."""
    top = -INF
    for tile in range(num_tiles):
        tile_top = largest(load_fp32(scratch.left.tops + 4 * WIDTH * tile))
        write_float(scratch.tile_tops, tile, tile_top)
        top = max(top, tile_top)
    store(scratch.tile_tops + 4 * num_tiles, splat(-INF))
    return top


@jit
def _top_k_bound(num_tiles, top, k, lowest, scratch):
    """A logit at or below the k-th largest: at least k tiles, or groups, reach it."""
    if k <= num_tiles // 2:
        return reach(scratch.tile_tops, np.int64(0), num_tiles, lowest, top, np.float64(k), np.int64(ROUGHLY))
    if k <= WIDTH * num_tiles:
        return reach(scratch.left.tops, np.int64(0), WIDTH * num_tiles, lowest, top, np.float64(k), np.int64(ROUGHLY))
    return lowest


@jit
def _mass_above(weights, sums, count, size, weight):
    """A lower bound of the mass of the tokens that weigh at least this much.

    Of a group that has such a token: its largest weight, or its sum less what all others could weigh.

    Args:
        weights, sums: The largest weight and the sum of each group. count: Of groups. size: Tokens of each.
    """
    accumulator, limit, rest = splat(ZERO), splat(weight), splat(np.float32(-size) * weight)
    for i in range(0, count, WIDTH):
        largest_weights = load_fp32(weights + 4 * i)
        left = larger(add(load_fp32(sums + 4 * i), rest), largest_weights)
        accumulator = add(accumulator, where_at_least(largest_weights, limit, left))
    return total64(accumulator)


@jit
def _bound(weights, sums, count, size, need, top, frame):
    """A logit such that the groups show that those that are not below it weigh at least ``need``."""
    heaviest = np.float64(weight_of(top, frame))
    short, enough = -1, BOUND_STEPS
    while enough - short > 1:
        middle = (short + enough) >> 1
        if _mass_above(weights, sums, count, size, np.float32(heaviest * 2.0 ** (-0.25 * middle))) >= need:
            enough = middle
        else:
            short = middle
    if enough == BOUND_STEPS:
        return frame.lowest
    scaled = frame.reference + math.log2(heaviest) - 0.25 * enough
    return np.float32((scaled - 1e-6 * (abs(scaled) + 1.0)) / frame.scale)


@jit
def _top_p_bound(num_tiles, top, need, frame, scratch):
    """A logit at or below the smallest that top-p keeps: by tiles, or by groups where many tiles would be read."""
    for i in range(0, num_tiles, WIDTH):
        store(scratch.tile_weights + 4 * i, weigh(load_fp32(scratch.tile_tops + 4 * i), frame))
    store(scratch.left.sums + 4 * num_tiles, splat(ZERO))
    bound = _bound(scratch.tile_weights, scratch.left.sums, num_tiles, np.int64(TILE), need, top, frame)
    if counted(scratch.tile_tops, num_tiles, bound) * MANY < num_tiles:
        return bound
    num_groups = WIDTH * num_tiles
    for i in range(0, num_groups, WIDTH):
        store(scratch.group_weights + 4 * i, weigh(load_fp32(scratch.left.tops + 4 * i), frame))
    by_group = _bound(
        scratch.group_weights, scratch.left.group_sums, num_groups, np.int64(TILE // WIDTH), need, top, frame
    )
    return max(bound, by_group)


@jit
def apply_filters(row, frame, mass, top_k, top_p, min_p, scratch):
    """The target of a swept row whose request filters.

    Args:
        top_k: 0 to keep all. top_p: 1 to keep all. min_p: 0 to keep all.
    """
    num_tiles = (row.vocab + TILE - 1) // TILE
    top = tops_of_tiles(num_tiles, scratch)
    low = frame.lowest
    if min_p > 0:
        exact = np.float64(top) + math.log2(np.float64(min_p)) / np.float64(frame.scale)
        floor = np.float32(exact)
        low = min(max(low, floor if np.float64(floor) >= exact else np.nextafter(floor, INF)), top)
    if top_k > 0:
        low = max(low, _top_k_bound(num_tiles, top, top_k, frame.lowest, scratch))
    only_top_p = top_k == 0 and not min_p > 0
    if only_top_p:
        low = max(low, _top_p_bound(num_tiles, top, np.float64(top_p) * mass, frame, scratch))
    count = collect(row, low, INF, scratch.tile_tops, scratch)
    if count > POOL:
        return _filter_row(row, frame, mass, top_k, top_p, low, top, only_top_p, scratch)
    threshold = low
    if 0 < top_k < count:
        threshold = reach(scratch.pool_values, np.int64(0), count, low, top, np.float64(top_k), np.int64(1))
    if top_p < 1:
        weigh_pool(frame, count, scratch)
        kept = mass
        if not only_top_p:
            kept = _pool_mass(count, threshold, scratch)
        threshold = reach(
            scratch.pool_values, scratch.pool_weights, count, threshold, top, np.float64(top_p) * kept, np.int64(1)
        )
    if threshold > low:
        count = _drop_below(count, threshold, scratch)
    gathered = Row(scratch.pool_values, np.int64(FP32), count, ZERO, np.int64(0))
    mass = sum_of_tiles(gathered, frame, -INF, scratch)
    return Target(gathered, frame, mass, -INF, row, threshold, count)


@jit
def _filter_row(row, frame, mass, top_k, top_p, low, top, only_top_p, scratch):
    """The same without gathering what is kept."""
    threshold = low
    if top_k > 0:
        threshold = reach_in_row(row, frame, low, top, np.float64(top_k), np.int64(0), scratch)
    if top_p < 1:
        if not only_top_p:
            mass = sum_of_tiles(row, frame, threshold, scratch)
        threshold = reach_in_row(row, frame, threshold, top, np.float64(top_p) * mass, np.int64(1), scratch)
    mass = sum_of_tiles(row, frame, threshold, scratch)
    return Target(row, frame, mass, threshold, row, threshold, np.int64(-1))


@jit
def sum_of_tiles(row, frame, floor, scratch):
    """Write the sum of each tile's weights, without logits below a floor; returns their sum."""
    mass = 0.0
    for start in range(0, row.vocab, TILE):
        tile_sum = ZERO
        if floor == -INF or read_float(scratch.tile_tops, start // TILE) >= floor:
            weigh_tile(row, frame, start, floor, scratch.tile, scratch.weights)
            tile_sum = sum_of_weights(scratch.weights)
        write_float(scratch.left.sums, start // TILE, tile_sum)
        mass += np.float64(tile_sum)
    return mass


@jit
def _pool_mass(count, threshold, scratch):
    mass = 0.0
    for i in range(count):
        if read_float(scratch.pool_values, i) >= threshold:
            mass += np.float64(read_float(scratch.pool_weights, i))
    return mass


@jit
def _drop_below(count, threshold, scratch):
    """Keep the gathered logits that are not below a threshold; their number."""
    kept = 0
    for i in range(count):
        value = read_float(scratch.pool_values, i)
        if value >= threshold:
            write_float(scratch.pool_values, kept, value)
            write_int(scratch.pool_tokens, kept, True, read_int(scratch.pool_tokens, i, True))
            kept += 1
    store(scratch.pool_values + 4 * kept, splat(-INF))
    return kept
