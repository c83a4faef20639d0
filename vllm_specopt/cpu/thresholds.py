"""The k-th largest value, or the one at which the mass of the values from the top down reaches a part of the whole.

Both by bisection of the values' order: a candidate is tested by counting, or weighing, what is not below it. Exact,
ties included, and as fast on any values.
"""

import numpy as np

from vllm_specopt.cpu.lanes import (
    WIDTH,
    add,
    at_least,
    count_bits,
    larger,
    load_bf16_pairs,
    load_fp32,
    splat,
    store,
    total64,
    trailing_zeros,
    where_at_least,
)
from vllm_specopt.cpu.memory import (
    BF16,
    INF,
    ZERO,
    inline,
    jit,
    load,
    read,
    read_float,
    size_of,
    write_float,
    write_int,
)
from vllm_specopt.cpu.plan import POOL
from vllm_specopt.cpu.rows import TILE, tile_at, weigh

# Logits that are looked at together before each by itself.
GROUP = 32


@inline
def key_of(value):
    """Whole number in the order of the values."""
    bits = np.float32(value).view(np.int32)
    return np.int64(np.int32(bits ^ ((bits >> 31) & 0x7FFFFFFF)))


@inline
def value_of(key):
    """Inverse of :func:`key_of`."""
    key = np.int32(key)
    return np.int32(key ^ ((key >> 31) & 0x7FFFFFFF)).view(np.float32)


@jit
def counted(values, count, bound):
    """How many of the values are not below a bound."""
    found, limit = 0, splat(bound)
    for i in range(0, count, WIDTH):
        found += count_bits(at_least(load_fp32(values + 4 * i), limit))
    return found


@jit
def _weighed(values, weights, count, bound):
    """Weight of the values that are not below a bound."""
    accumulator, limit = splat(ZERO), splat(bound)
    for i in range(0, count, WIDTH):
        kept = where_at_least(load_fp32(values + 4 * i), limit, load_fp32(weights + 4 * i))
        accumulator = add(accumulator, kept)
    return total64(accumulator)


@jit
def reach(values, weights, count, low, top, need, finest):
    """The largest value in [low, top] such that those not below it number, or weigh, at least ``need``; else low.

    Args:
        values: fp32, filled up to whole lanes with -inf. weights: the same with 0, or 0 to count.
        finest: The answer may be this many steps of the representation too low.
    """
    reached, beyond = key_of(low), key_of(top) + 1
    while beyond - reached > finest:
        middle = (reached + beyond) >> 1
        bound = value_of(middle)
        found = _weighed(values, weights, count, bound) if weights else np.float64(counted(values, count, bound))
        if found >= need:
            reached = middle
        else:
            beyond = middle
    return value_of(reached)


@inline
def largest_of_group(address, kind):
    """The largest of every eighth of ``GROUP`` logits in a row."""
    tops = splat(-INF)
    if kind == BF16:
        for i in range(0, GROUP, 2 * WIDTH):
            even, odd = load_bf16_pairs(address + 2 * i)
            tops = larger(odd, larger(even, tops))
    else:
        for i in range(0, GROUP, WIDTH):
            tops = larger(load(address + size_of(kind) * i, kind), tops)
    return tops


@jit
def collect(row, low, beyond, tile_tops, scratch):
    """Gather the logits in [low, beyond) and their tokens, in order; how many, or POOL + 1 if there are more.

    Args:
        tile_tops: For each tile a number that no logit of it exceeds.
    """
    found, lower, upper = 0, splat(low), splat(beyond)
    for start in range(0, row.vocab, TILE):
        if read_float(tile_tops, start // TILE) < low:
            continue
        address, kind = tile_at(row, start, scratch.tile)
        size = size_of(kind)
        for group in range(0, TILE, GROUP):
            if at_least(largest_of_group(address + size * group, kind), lower) == 0:
                continue
            for i in range(group, group + GROUP, WIDTH):
                x = load(address + size * i, kind)
                hits = at_least(x, lower) & ~at_least(x, upper)
                while hits:
                    if found == POOL:
                        return POOL + 1
                    place = i + trailing_zeros(hits)
                    write_float(scratch.pool_values, found, read(address, kind, place))
                    write_int(scratch.pool_tokens, found, True, start + place)
                    found += 1
                    hits &= hits - 1
    store(scratch.pool_values + 4 * found, splat(-INF))
    return found


@jit
def weigh_pool(frame, count, scratch):
    """Write the weights of the gathered logits."""
    for i in range(0, count, WIDTH):
        store(scratch.pool_weights + 4 * i, weigh(load_fp32(scratch.pool_values + 4 * i), frame))


@jit
def _above(row, frame, bound, by_mass, scratch):
    """How many logits are not below a bound, and their weight if ``by_mass``; skips tiles that do not reach it."""
    count, mass, limit = 0, 0.0, splat(bound)
    for start in range(0, row.vocab, TILE):
        if read_float(scratch.tile_tops, start // TILE) < bound:
            continue
        address, kind = tile_at(row, start, scratch.tile)
        size, accumulator = size_of(kind), splat(ZERO)
        for i in range(0, TILE, WIDTH):
            x = load(address + size * i, kind)
            count += count_bits(at_least(x, limit))
            if by_mass:
                accumulator = add(accumulator, where_at_least(x, limit, weigh(x, frame)))
        mass += total64(accumulator)
    return count, mass


@jit
def reach_in_row(row, frame, low, top, need, by_mass, scratch):
    """As :func:`reach`, over a row with more candidates than can be gathered.

    Bisects values and their order in turn, until what is left between the bounds can be gathered.
    """
    reached, beyond = key_of(low), key_of(top) + 1
    count, mass = _above(row, frame, low, by_mass, scratch)
    if (mass if by_mass else np.float64(count)) < need:
        return low
    count_beyond, mass_beyond, by_value = 0, 0.0, True
    while beyond - reached > 1:
        if count - count_beyond <= POOL:
            found = collect(row, value_of(reached), value_of(beyond), scratch.tile_tops, scratch)
            weigh_pool(frame, found, scratch)
            weights = scratch.pool_weights if by_mass else np.int64(0)
            rest = need - (mass_beyond if by_mass else np.float64(count_beyond))
            return reach(
                scratch.pool_values, weights, found, value_of(reached), value_of(beyond - 1), rest, np.int64(1)
            )
        middle = (reached + beyond) >> 1
        if by_value:
            between = key_of(np.float32(0.5 * np.float64(value_of(reached)) + 0.5 * np.float64(value_of(beyond - 1))))
            middle = min(max(between, reached + 1), beyond - 1)
        by_value = not by_value
        middle_count, middle_mass = _above(row, frame, value_of(middle), by_mass, scratch)
        if (middle_mass if by_mass else np.float64(middle_count)) >= need:
            reached, count = middle, middle_count
        else:
            beyond, count_beyond, mass_beyond = middle, middle_count, middle_mass
    return value_of(reached)
