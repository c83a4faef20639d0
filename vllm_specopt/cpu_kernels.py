"""Compiled loops of the CPU backend: sweeps over one row at a time, in tiles that stay in the first-level cache.

Nothing of the size of a row is ever written. What a row leaves behind is its largest logit and sum of exponentials,
the largest logit of each tile (so that later sweeps skip tiles below a filter's threshold), and, where top-k or top-p
asks for an exact threshold, a histogram that is refined until the few values left are walked one by one.

Every request is computed by one call in a fixed order, so results depend neither on the batch nor on the threads.
Tensors arrive as addresses: one compiled version serves all dtypes, and the unit stride is known to the compiler.
All compiled code is in this one file, because numba's cache notices changes of an entry point's own file only.
"""

import math

import numpy as np
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic
from numba.np.unsafe.ndarray import to_fixed_tuple

BF16, FP16, FP32 = 0, 1, 2
ONE_HOT, PROBS, LOGITS = 0, 1, 2
ACCEPTANCE, RECOVERED, BONUS = 0, 1, 2

TILE = 512
BINS = 1024
LAST_BIN = np.float32(BINS - 1)
SPILL = 64
POOL = 512
STREAM = np.uint64(0x53504543)
MASK32 = np.uint64(0xFFFFFFFF)
GREEDY_BELOW = 1e-5
ZERO = np.float32(0.0)
INF = np.float32(np.inf)
LOWEST = np.float32(np.finfo(np.float32).min)
EXP2_LOWEST = np.float32(-125.0)
# Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits of the sum.
EXP2_ROUND = np.float32(12582912.0)
# Minimax coefficients of 2^f on [-1/2, 1/2], relative error 2e-9; the constant term is 1 in single precision.
C1, C2, C3 = np.float32(6.9314720574e-01), np.float32(2.4022646891e-01), np.float32(5.5503287770e-02)
C4, C5, C6 = np.float32(9.6184889579e-03), np.float32(1.3399931218e-03), np.float32(1.5345811807e-04)
ONE = np.float32(1.0)
HALF = np.float32(0.5)
TWO_M32 = np.float32(2.0**-32)
NOISE_MAX = np.float32(1 - 2.0**-24)
FP16_REBIAS = np.float32(2.0**112)
LOG2_E = np.float32(1.4426950408889634)
# Cephes' logf: coefficients, and ln 2 in two parts so that its multiples are exact.
SQRT_HALF, LN2_HIGH, LN2_LOW = np.float32(0.70710678), np.float32(0.693359375), np.float32(-2.12194440e-4)
L0, L1, L2 = np.float32(7.0376836292e-2), np.float32(-1.1514610310e-1), np.float32(1.1676998740e-1)
L3, L4, L5 = np.float32(-1.2420140846e-1), np.float32(1.4249322787e-1), np.float32(-1.6668057665e-1)
L6, L7, L8 = np.float32(2.0000714765e-1), np.float32(-2.4999993993e-1), np.float32(3.3333331174e-1)
# Constants of the sigmoid method (see vllm_specopt.verify): where the draft's begin, and the differences.
DRAFT_SIDE, DIFFERENCE = 4, 8
# Slack of the single-precision comparison that decides whether a token's exact score is worth computing.
BOUND_SLACK = 1 - 1e-6


# A job, int64 words: next request, rows without a usable logit, 1 + a request that does not fit, requests, the plan.
JOB_NUM_REQS, JOB_PLAN, PLAN_LENGTH = 3, 4, 35


def _jit(**flags):
    """Compile with the options every function here shares; none but the entry point is called from Python."""
    return njit(nogil=True, error_model="numpy", no_cfunc_wrapper=True, no_cpython_wrapper=True, **flags)


@intrinsic
def _pointer(typing_context, address, dtype):
    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(dtype.dtype)(types.int64, dtype), generate


@intrinsic
def _fetch_add(typing_context, address, value):
    """Add to the int64 at an address, as one step for all threads; returns what was there before."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], context.get_value_type(types.CPointer(types.int64)))
        return builder.atomic_rmw("add", pointer, args[1], "monotonic")

    return types.int64(types.int64, types.int64), generate


@_jit()
def _read_int(address, i, wide):
    if wide:
        return carray(_pointer(address + 8 * i, types.int64), 1)[0]
    return np.int64(carray(_pointer(address + 4 * i, types.int32), 1)[0])


@_jit()
def _write_int(address, i, wide, value):
    if wide:
        carray(_pointer(address + 8 * i, types.int64), 1)[0] = value
    else:
        carray(_pointer(address + 4 * i, types.int32), 1)[0] = value


@_jit()
def _read_float(address, i):
    return float(carray(_pointer(address + 4 * i, types.float32), 1)[0])


@_jit()
def _read_bool(address, i):
    return carray(_pointer(address + i, types.uint8), 1)[0] != 0


@_jit()
def _clean(value):
    """NaN to -inf, and -0 to +0, so that equal values are equal integers."""
    return value + ZERO if value == value else -INF


@_jit()
def _from_bf16(bits):
    return _clean(np.uint32(np.uint32(bits) << 16).view(np.float32))


@_jit()
def _from_fp16(bits):
    bits = np.uint32(bits)
    magnitude = np.uint32((bits & 0x7FFF) << 13)
    # The multiplication moves the exponent's bias and normalises subnormals; inf and NaN need an exponent of ones.
    finite = np.float32(magnitude.view(np.float32) * FP16_REBIAS).view(np.uint32)
    magnitude = finite if magnitude < 0x0F800000 else np.uint32(magnitude | 0x7F800000)
    return _clean(np.uint32(magnitude | ((bits & 0x8000) << 16)).view(np.float32))


@_jit()
def _load(address, kind, start, end, x):
    """Convert a tile of a row to single precision; fill what lies beyond its end with -inf."""
    count = min(end - start, TILE)
    if kind == FP32:
        source32 = carray(_pointer(address + 4 * start, types.float32), count)
        for i in range(count):
            x[i] = _clean(source32[i])
    else:
        source16 = carray(_pointer(address + 2 * start, types.uint16), count)
        if kind == BF16:
            for i in range(count):
                x[i] = _from_bf16(source16[i])
        else:
            for i in range(count):
                x[i] = _from_fp16(source16[i])
    for i in range(count, TILE):
        x[i] = -INF


@_jit()
def _read(address, kind, i):
    """One element of a row, converted as in ``_load``."""
    if kind == FP32:
        return _clean(carray(_pointer(address + 4 * i, types.float32), 1)[0])
    bits = carray(_pointer(address + 2 * i, types.uint16), 1)[0]
    return _from_bf16(bits) if kind == BF16 else _from_fp16(bits)


@_jit()
def _key(value):
    """Signed integer in the order of the values: the compiler vectorises a maximum of these, not one of floats."""
    bits = np.float32(value).view(np.int32)
    return np.int32(bits ^ ((bits >> 31) & 0x7FFFFFFF))


@_jit()
def _unkey(key):
    return np.int32(key ^ ((key >> 31) & 0x7FFFFFFF)).view(np.float32)


@_jit()
def _tile_max(x):
    best = np.int32(-0x80000000)
    for i in range(TILE):
        key = _key(x[i])
        best = key if key > best else best
    return _unkey(best)


@_jit(fastmath={"contract"})
def _exp2(y):
    """2^y for y <= 0, within 2 units in the last place; below 2^-125 the result is 0.

    A NaN counts as 0: it comes from +inf - +inf alone, where the weight is 1.
    """
    y = y if y < ZERO else ZERO
    shifted = np.float32(y + EXP2_ROUND)
    f = y - (shifted - EXP2_ROUND)
    poly = (((((C6 * f + C5) * f + C4) * f + C3) * f + C2) * f + C1) * f + ONE
    power = np.int32(np.float32(poly).view(np.int32) + np.int32(shifted.view(np.int32) << 23)).view(np.float32)
    return power if y > EXP2_LOWEST else ZERO


@_jit()
def _weight(value, top, scale):
    return _exp2(np.float32((value - top) * scale))


@_jit(fastmath={"reassoc"})
def _weight_sum(x, top, scale, floor):
    total = ZERO
    for i in range(TILE):
        weight = _weight(x[i], top, scale)
        total += weight if x[i] >= floor else ZERO
    return total


@_jit()
def _weights(x, top, scale, floor, weights):
    for i in range(TILE):
        weight = _weight(x[i], top, scale)
        weights[i] = weight if x[i] >= floor else ZERO


@_jit()
def _sweep(address, kind, vocab, scale, with_total, x, tile_tops):
    """Read a row once: its largest logit, the sum of 2^((logit - largest) * scale), and each tile's largest logit."""
    top, total = -INF, 0.0
    for start in range(0, vocab, TILE):
        _load(address, kind, start, vocab, x)
        tile_top = _tile_max(x)
        tile_tops[start // TILE] = tile_top
        if tile_top > top:
            total *= _weight(top, tile_top, scale)
            top = tile_top
        if with_total and tile_top > -INF:
            total += _weight_sum(x, top, scale, -INF)
    return top, total


@_jit()
def _total_above(address, kind, vocab, scale, top, floor, x, tile_tops):
    total = 0.0
    for start in range(0, vocab, TILE):
        if tile_tops[start // TILE] >= floor:
            _load(address, kind, start, vocab, x)
            total += _weight_sum(x, top, scale, floor)
    return total


@_jit()
def _first_of(address, kind, vocab, value, x, tile_tops):
    """First token whose logit is the row's largest."""
    for start in range(0, vocab, TILE):
        if tile_tops[start // TILE] == value:
            _load(address, kind, start, vocab, x)
            for i in range(TILE):
                if x[i] == value:
                    return start + i
    return 0


@_jit()
def _bin(value, high, step, step2):
    """Bin of a value, counted from ``high`` downwards; two factors, as one could overflow. Never rises with value."""
    distance = np.float32(np.float32((high - value) * step) * step2)
    return np.int32(distance if distance < LAST_BIN else LAST_BIN)


@_jit()
def _bin_edge(low, high, step, step2, wanted):
    """Smallest value in [low, high] whose bin is not beyond ``wanted``, as a key."""
    below, reached = np.int64(_key(low)) - 1, np.int64(_key(high))
    while reached - below > 1:
        middle = (below + reached) >> 1
        if _bin(_unkey(np.int32(middle)), high, step, step2) <= wanted:
            reached = middle
        else:
            below = middle
    return reached


@_jit()
def _gather(address, kind, vocab, low, high, limit, x, tile_tops, pool):
    """Count the values in [low, high], find their range, and collect them as long as they fit in the pool.

    Stops after ``limit`` values; the range is then that of the values seen.
    """
    found = 0
    key_low, key_high = _key(low), _key(high)
    smallest, largest = key_high, key_low
    for start in range(0, vocab, TILE):
        if tile_tops[start // TILE] < low:
            continue
        _load(address, kind, start, vocab, x)
        count = np.int32(0)
        for i in range(TILE):
            key = _key(x[i])
            count += np.int32((key >= key_low) & (key <= key_high))
        if count == 0:
            continue
        for i in range(TILE):
            key = _key(x[i])
            above = key if key >= key_low else key_high
            below = key if key <= key_high else key_low
            smallest = above if above < smallest else smallest
            largest = below if below > largest else largest
        if found + count <= POOL:
            for i in range(TILE):
                if low <= x[i] <= high:
                    pool[found] = x[i]
                    found += 1
        else:
            found += count
            if found > limit:
                break
    return found, _unkey(smallest), _unkey(largest)


@_jit()
def _histogram(
    address, kind, vocab, scale, top, by_mass, low, high, step, step2, x, weights, bins, tile_tops, histogram
):
    """Add the weight (or 1) of every value in [low, high] to its bin."""
    histogram[:] = 0.0
    weights[:] = ONE
    for start in range(0, vocab, TILE):
        if tile_tops[start // TILE] < low:
            continue
        _load(address, kind, start, vocab, x)
        if by_mass:
            _weights(x, top, scale, low, weights)
        for i in range(TILE):
            place = _bin(x[i], high, step, step2)
            # Values outside go to many bins: additions to a single one would wait for each other.
            bins[i] = place if (x[i] >= low) & (x[i] <= high) else np.int32(BINS + (i & (SPILL - 1)))
        for i in range(TILE):
            histogram[bins[i]] += weights[i]


@_jit()
def _walk(pool, count, above, need, scale, top, by_mass):
    """Go down the values of the pool until weight (or number) reaches ``need``; that value and what it reached."""
    value = INF
    while True:
        key = np.int32(-0x80000000)
        for i in range(count):
            candidate = _key(pool[i])
            key = candidate if (pool[i] < value) & (candidate > key) else key
        following = _unkey(key)
        equal = 0
        for i in range(count):
            equal += np.int32(pool[i] == following)
        if equal == 0:
            return value, above
        value = following
        above += equal * (float(_weight(value, top, scale)) if by_mass else 1.0)
        if above >= need:
            return value, above


@_jit()
def _threshold(address, kind, vocab, scale, top, low, need, by_mass, x, weights, bins, tile_tops, histogram, pool):
    """Largest value whose weight (or number), together with all larger values >= ``low``, reaches ``need``.

    Returns it with the weight (or number) reached. ``low`` must be finite and at or below the answer. Each round
    keeps the values of one bin, hundreds of times closer together, until they fit in the pool or are all equal.
    """
    high, above, limit = top, 0.0, POOL
    while True:
        count, smallest, largest = _gather(address, kind, vocab, low, high, limit, x, tile_tops, pool)
        if count == 0:
            return low, above
        if count <= POOL:
            return _walk(pool, count, above, need, scale, top, by_mass)
        if limit > POOL:
            low, high = smallest, largest
        if low == high:
            return low, above + count * (float(_weight(low, top, scale)) if by_mass else 1.0)
        exact_step = LAST_BIN / (float(high) - float(low))
        step = np.float32(min(exact_step, 1e30))
        step2 = np.float32(exact_step / float(step))
        _histogram(
            address, kind, vocab, scale, top, by_mass, low, high, step, step2, x, weights, bins, tile_tops, histogram
        )
        wanted = 0
        while wanted < BINS - 1 and above + histogram[wanted] < need:
            above += histogram[wanted]
            wanted += 1
        upper = _bin_edge(low, high, step, step2, wanted - 1) - 1 if wanted > 0 else np.int64(_key(high))
        low, high, limit = _unkey(np.int32(_bin_edge(low, high, step, step2, wanted))), _unkey(np.int32(upper)), vocab


@_jit()
def _top_k_bound(tile_tops, num_tiles, k):
    """A value at or below the k-th largest of the row: at least k tiles reach it, so at least k tokens do."""
    finite, low, high = 0, INF, -INF
    for i in range(num_tiles):
        if tile_tops[i] > -INF:
            finite += 1
            low, high = min(low, tile_tops[i]), max(high, tile_tops[i])
    if finite < k:
        return LOWEST
    for _ in range(12):
        middle = np.float32(HALF * low + HALF * high)
        reached = np.int32(0)
        for i in range(num_tiles):
            reached += np.int32(tile_tops[i] >= middle)
        if reached >= k:
            low = middle
        else:
            high = middle
    return low


@_jit()
def _filter(address, kind, vocab, scale, top_k, top_p, min_p, top, total, scratch):
    """Smallest logit that min-p, top-k and top-p (in this order) keep, and the total weight of what they keep."""
    x, weights, bins, tile_tops, histogram, pool = scratch
    floor = -INF
    if top == INF:
        return floor, total
    if min_p > 0:
        exact = float(top) + math.log2(min_p) / float(scale)
        floor = np.float32(exact)
        if float(floor) < exact:
            floor = np.nextafter(floor, INF)
    if 1 <= top_k < vocab:
        low = _top_k_bound(tile_tops, (vocab + TILE - 1) // TILE, top_k)
        value, _ = _threshold(
            address, kind, vocab, scale, top, low, float(top_k), False, x, weights, bins, tile_tops, histogram, pool
        )
        floor = max(floor, value)
    if floor > -INF:
        total = _total_above(address, kind, vocab, scale, top, floor, x, tile_tops)
    if top_p < 1:
        # All tokens below this bound together weigh less than what top-p may drop.
        bound = float(top) + math.log2(0.999 * (1 - top_p) * total / vocab) / float(scale)
        low = max(floor, max(LOWEST, np.float32(bound)))
        floor, total = _threshold(
            address, kind, vocab, scale, top, low, top_p * total, True, x, weights, bins, tile_tops, histogram, pool
        )
    return floor, total


@_jit()
def _philox(seed, position, purpose):
    """First two words of Philox4x32-10 (Salmon et al., SC'11) for one row and purpose."""
    key0, key1 = np.uint64(seed) & MASK32, (np.uint64(seed) >> np.uint64(32)) & MASK32
    c0, c1 = np.uint64(purpose), np.uint64(position) & MASK32
    c2, c3 = (np.uint64(position) >> np.uint64(32)) & MASK32, STREAM
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (b >> np.uint64(32)) ^ c1 ^ key0,
            b & MASK32,
            (a >> np.uint64(32)) ^ c3 ^ key1,
            a & MASK32,
        )
        key0 = (key0 + np.uint64(0x9E3779B9)) & MASK32
        key1 = (key1 + np.uint64(0xBB67AE85)) & MASK32
    return np.uint32(c0), np.uint32(c1)


@_jit()
def _mix32(bits):
    bits = np.uint32(np.uint32(bits ^ (bits >> 16)) * np.uint32(0x7FEB352D))
    bits = np.uint32(np.uint32(bits ^ (bits >> 15)) * np.uint32(0x846CA68B))
    return np.uint32(bits ^ (bits >> 16))


@_jit()
def _noise(start, key0, key1, noise):
    """The uniform v of each token of a tile; its exponential is -log(1 - v), which is never below v."""
    for i in range(TILE):
        bits = _mix32(np.uint32(_mix32(np.uint32(np.uint32(start) + np.uint32(i) + key0)) ^ key1))
        v = np.float32(np.float32(np.float32(bits) + HALF) * TWO_M32)
        noise[i] = v if v < NOISE_MAX else NOISE_MAX


@_jit()
def _residual(weights, inverse, mode, draft, draft_top, draft_inverse, scale):
    """Turn a tile of target weights into target probability minus draft probability."""
    if mode == PROBS:
        for i in range(TILE):
            prob = draft[i] if draft[i] > ZERO else ZERO
            weights[i] = np.float32(weights[i] * inverse) - prob
    else:
        for i in range(TILE):
            prob = np.float32(_weight(draft[i], draft_top, scale) * draft_inverse)
            weights[i] = np.float32(weights[i] * inverse) - prob


@_jit(fastmath={"contract"})
def _log(value):
    """Natural logarithm of a positive normal number, within 1e-7 of its size or of 1; -inf for anything smaller."""
    bits = np.float32(value).view(np.int32)
    exponent = np.int32((bits >> 23) - 126)
    mantissa = np.int32((bits & 0x007FFFFF) | 0x3F000000).view(np.float32)
    small = mantissa < SQRT_HALF
    x = (mantissa + mantissa if small else mantissa) - ONE
    e = np.float32(exponent - np.int32(small))
    square = x * x
    poly = ((((((((L0 * x + L1) * x + L2) * x + L3) * x + L4) * x + L5) * x + L6) * x + L7) * x + L8) * x * square
    log = x + (poly + LN2_LOW * e - HALF * square) + LN2_HIGH * e
    return log if value > np.float32(2e-38) else -INF


@_jit()
def _sigmoid(x):
    size = x if x >= ZERO else -x
    power = _exp2(np.float32(-size * LOG2_E))
    return (ONE if x >= ZERO else power) / (ONE + power)


@_jit()
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0, with full relative accuracy down to x = 0."""
    series = ONE + x * np.float32(1 / 8)
    series = ONE + x * np.float32(1 / 7) * series
    series = ONE + x * np.float32(1 / 6) * series
    series = ONE + x * np.float32(1 / 5) * series
    series = ONE + x * np.float32(1 / 4) * series
    series = ONE + x * np.float32(1 / 3) * series
    series = ONE + x * np.float32(1 / 2) * series
    return -x * series if x > -HALF else ONE - _exp2(np.float32(x * LOG2_E))


@_jit()
def _score(constants, side, value, scaled, unit):
    """Score of one token; value: what the limits (times ``unit``) apply to, scaled: logit / temperature."""
    if value < np.float32(_read_float(constants, side + 2) * unit):
        return 0.0
    if value > np.float32(_read_float(constants, side + 3) * unit):
        return 1.0
    argument = scaled * _read_float(constants, side) + _read_float(constants, side + 1)
    return 1.0 / (1.0 + math.exp(-argument)) if argument > -700.0 else 0.0


@_jit()
def _passes(constants, temp, uniform, value, mode, draft_row, draft_kind, token):
    """Whether a draft token survives: uniform <= target score / draft score, both above 0."""
    draft_score = 1.0
    if mode == PROBS:
        prob = max(_read(draft_row, draft_kind, token), ZERO)
        draft_score = _score(constants, DRAFT_SIDE, prob, math.log(float(prob)) if prob > ZERO else -np.inf, 1.0)
    elif mode == LOGITS:
        logit = _read(draft_row, draft_kind, token)
        draft_score = _score(constants, DRAFT_SIDE, logit, float(logit) / temp, temp)
    return draft_score > 0 and uniform * draft_score <= _score(constants, 0, value, float(value) / temp, temp)


@_jit()
def _score_residual(x, draft, mode, constants, temp, top, floor, weights):
    """max(target score - draft score, 0) of a tile, as sigmoid(a) sigmoid(-b) (1 - exp(b - a)): see kernels/sigmoid.py.

    x: target logits; draft: the draft's logits or probabilities; a row with +inf keeps its +inf alone.
    """
    unit = ONE if mode == PROBS else np.float32(temp)
    low, high = np.float32(_read_float(constants, 2) * temp), np.float32(_read_float(constants, 3) * temp)
    draft_low = np.float32(_read_float(constants, DRAFT_SIDE + 2) * float(unit))
    draft_high = np.float32(_read_float(constants, DRAFT_SIDE + 3) * float(unit))
    inverse = 1.0 / temp
    draft_inverse = 1.0 if mode == PROBS else inverse
    scale, shift = np.float32(_read_float(constants, 0) * inverse), np.float32(_read_float(constants, 1))
    draft_scale = np.float32(_read_float(constants, DRAFT_SIDE) * draft_inverse)
    draft_shift = np.float32(_read_float(constants, DRAFT_SIDE + 1))
    more_scale = np.float32(_read_float(constants, DIFFERENCE) * draft_inverse)
    more_shift = np.float32(_read_float(constants, DIFFERENCE + 1))
    # Logits are subtracted before they are scaled, and logarithms of probabilities after.
    inside = ONE if mode == PROBS else scale
    outside = np.float32(_read_float(constants, 0)) if mode == PROBS else ONE
    target_unit = np.float32(inverse) if mode == PROBS else ONE
    cut = INF if top == INF else floor
    for i in range(TILE):
        value = draft[i]
        zero = value < draft_low
        one = value > draft_high
        if mode == PROBS:
            value = _log(value)
        gap = np.float32((value - x[i] * target_unit) * inside) * outside + (value * more_scale + more_shift)
        above = x[i] > high
        above |= x[i] == INF
        zero |= value == -INF
        one |= value == INF
        score = ONE if above else _sigmoid(np.float32(x[i] * scale + shift))
        rest = ONE if zero else _sigmoid(np.float32(-(value * draft_scale + draft_shift)))
        factor = _one_minus_exp(gap) if gap < ZERO else ZERO
        factor = ONE if above | zero else factor
        weight = score * rest * factor
        weights[i] = ZERO if one | (x[i] < low) | (x[i] < cut) | (x[i] == -INF) else weight


@_jit()
def _draw(
    address, kind, vocab, scale, top, total, floor, mode, token, draft, draft_kind, draft_top, draft_total,
    constants, temp, key, scratch,
):  # fmt: skip
    """Exponential race (the largest weight / exponential wins) over a row; -1 if no weight is positive.

    The weights are those of the target, without ``token`` where that is not negative (``mode`` ONE_HOT), or the target
    probabilities minus the draft's (PROBS, LOGITS), scores in their place where there are ``constants``. A token's
    logarithm is computed only where weight / v, an upper bound of its score, beats the best so far.
    """
    x, weights, noise, tile_tops = scratch
    inverse, draft_inverse = np.float32(1 / total), np.float32(1 / draft_total)
    best, best_token, bound = 0.0, -1, ZERO
    for start in range(0, vocab, TILE):
        if tile_tops[start // TILE] == -INF or tile_tops[start // TILE] < floor:
            continue
        _load(address, kind, start, vocab, x)
        if mode != ONE_HOT and constants:
            _load(draft, draft_kind, start, vocab, noise)
            _score_residual(x, noise, mode, constants, temp, top, floor, weights)
        else:
            _weights(x, top, scale, floor, weights)
        if mode != ONE_HOT and not constants:
            _load(draft, draft_kind, start, vocab, x)
            _residual(weights, inverse, mode, x, draft_top, draft_inverse, scale)
        elif mode == ONE_HOT and start <= token < start + TILE:
            weights[token - start] = ZERO
        _noise(start, key[0], key[1], noise)
        hopeful = np.int32(0)
        for i in range(TILE):
            hopeful += np.int32(weights[i] > np.float32(bound * noise[i]))
        if hopeful == 0:
            continue
        for i in range(TILE):
            if weights[i] > np.float32(bound * noise[i]):
                score = float(weights[i]) / -math.log1p(-float(noise[i]))
                if score > best:
                    best, best_token, bound = score, start + i, np.float32(score * BOUND_SLACK)
    return best_token


@_jit()
def _verify_request(request, plan, x, weights, noise, bins, tile_tops, draft_tops, histogram, pool):
    """Verify one request; 1 if the row that emitted had no usable logit, -1 if the arguments do not fit together."""
    (
        num_rows, vocab, logits, logits_stride, kind, starts, wide_starts, drafts, wide_drafts, compact,
        temperature, seeds, positions, wide_positions, states, wide_states, num_states,
        mode, draft, draft_stride, draft_position_stride, draft_kind, top_k, wide_top_k, top_p, min_p,
        bonus, wide_bonus, sigmoid, sigmoid_requests,
        out, out_stride, out_width, wide_out, num_sampled,
    ) = plan  # fmt: skip
    start = _read_int(starts, request, wide_starts)
    num_drafts = _read_int(starts, request + 1, wide_starts) - start - 1
    state = _read_int(states, request, wide_states) if states else request
    if start < 0 or num_drafts < 0 or num_drafts >= out_width or start + num_drafts >= num_rows:
        return -1
    if state < 0 or state >= num_states:
        return -1
    size = 4 if kind == FP32 else 2
    draft_size = 4 if draft_kind == FP32 else 2
    temp = _read_float(temperature, state) if temperature else 0.0
    greedy = temp < GREEDY_BELOW
    scale = np.float32(1.0 if greedy else 1.4426950408889634 / temp)
    seed = _read_int(seeds, state, True) if not greedy else 0
    row_top_k = _read_int(top_k, state, wide_top_k) if top_k else 0
    row_top_p = _read_float(top_p, state) if top_p else 1.0
    row_min_p = _read_float(min_p, state) if min_p else 0.0
    filtered = 1 <= row_top_k < vocab or row_top_p < 1 or row_min_p > 0
    constants = sigmoid if not greedy and (sigmoid_requests == 0 or _read_bool(sigmoid_requests, state)) else 0
    out += request * out_stride * (8 if wide_out else 4)
    emitted, bad, i = -1, 0, 0
    filter_scratch = (x, weights, bins, tile_tops, histogram, pool)
    draw_scratch = (x, weights, noise, tile_tops)
    while True:
        row = start + i
        address = logits + row * logits_stride * size
        last = i == num_drafts
        if last and bonus:
            emitted = _read_int(bonus, request, wide_bonus)
            break
        token = -1
        if not last:
            token = _read_int(drafts, row - request if compact else row + 1, wide_drafts)
        judged = 0 <= token < vocab
        position, uniform, row_mode, draft_row = np.int64(0), 0.0, ONE_HOT, np.int64(0)
        if not greedy:
            position = _read_int(positions, row, wide_positions) if positions else i
        if judged and not greedy:
            row_mode = mode
            uniform = (float(_philox(seed, position, ACCEPTANCE)[0] >> 9) + 0.5) * 2.0**-23
            if mode == PROBS:
                draft_row = draft + (row - request) * draft_stride * draft_size
            elif mode == LOGITS:
                draft_row = draft + (state * draft_stride + i * draft_position_stride) * draft_size
        passes = False
        if constants and judged:
            value = _read(address, kind, token)
            passes = _passes(constants, temp, uniform, value, mode, draft_row, draft_kind, token)
        if passes and not filtered:
            _write_int(out, i, wide_out, token)
            i += 1
            continue
        with_total = not greedy and (filtered or (judged and not constants))
        top, total = _sweep(address, kind, vocab, scale, with_total, x, tile_tops)
        if greedy:
            best = _first_of(address, kind, vocab, top, x, tile_tops)
            if not last and token == best:
                _write_int(out, i, wide_out, token)
                i += 1
                continue
            emitted, bad = best, int(top == -INF)
            break
        if top == -INF:
            emitted, bad = 0, 1
            break
        floor = -INF
        if filtered:
            floor, total = _filter(
                address, kind, vocab, scale, row_top_k, row_top_p, row_min_p, top, total, filter_scratch
            )
            if top == INF and constants:
                floor = INF
        draft_top, draft_total, removed = ZERO, 1.0, -1
        if judged:
            value, removed = _read(address, kind, token), token
            if constants:
                passes = passes and value >= floor
            else:
                draft_prob, target_prob = 1.0, 0.0
                if mode == PROBS:
                    draft_prob = float(_read(draft_row, draft_kind, token))
                elif mode == LOGITS:
                    draft_top, draft_total = _sweep(draft_row, draft_kind, vocab, scale, True, x, draft_tops)
                    draft_prob = 0.0
                    if draft_top > -INF:
                        draft_prob = float(_weight(_read(draft_row, draft_kind, token), draft_top, scale)) / draft_total
                if value >= floor:
                    target_prob = float(_weight(value, top, scale)) / total
                passes = draft_prob > 0 and uniform * draft_prob <= target_prob
            if passes:
                _write_int(out, i, wide_out, token)
                i += 1
                continue
        key = _philox(seed, position, BONUS if last else RECOVERED)
        for _ in range(2):
            emitted = _draw(
                address, kind, vocab, scale, top, total, floor, row_mode, removed,
                draft_row, draft_kind, draft_top, draft_total, constants, temp, key, draw_scratch,
            )  # fmt: skip
            if emitted >= 0:
                break
            # An empty residual: the full target row takes its place.
            row_mode, removed = ONE_HOT, -1
        if emitted < 0:
            emitted, bad = 0, 1
        break
    _write_int(out, i, wide_out, emitted)
    _write_int(num_sampled, request, False, i + 1)
    for j in range(i + 1, out_width):
        _write_int(out, j, wide_out, -1)
    return bad


@_jit()
def _verify_requests(job):
    """Verify requests until none is left. Threads may share a job: each takes the next request when it is free."""
    next_request, bad_rows, misfit = job, job + 8, job + 16
    num_reqs = _read_int(job, JOB_NUM_REQS, True)
    plan = to_fixed_tuple(carray(_pointer(job + 8 * JOB_PLAN, types.int64), PLAN_LENGTH), PLAN_LENGTH)
    num_tiles = (plan[1] + TILE - 1) // TILE
    x, weights, noise = np.empty(TILE, np.float32), np.empty(TILE, np.float32), np.empty(TILE, np.float32)
    bins, histogram = np.empty(TILE, np.int32), np.empty(BINS + SPILL, np.float64)
    tile_tops, draft_tops = np.empty(num_tiles, np.float32), np.empty(num_tiles, np.float32)
    pool = np.empty(POOL, np.float32)
    request = _fetch_add(next_request, 1)
    while request < num_reqs:
        bad = _verify_request(request, plan, x, weights, noise, bins, tile_tops, draft_tops, histogram, pool)
        if bad < 0:
            _write_int(misfit, 0, True, 1 + request)
        elif bad:
            _fetch_add(bad_rows, bad)
        request = _fetch_add(next_request, 1)


def _compile_entry(function):
    """Compile the entry point to a C function of the job's address, cached where a directory is writable."""
    signature = types.void(types.intp)
    options = {"nopython": True, "error_model": "numpy"}
    try:
        return cfunc(signature, cache=True, **options)(function)
    except RuntimeError:
        return cfunc(signature, **options)(function)


@_compile_entry
def verify_requests(job):
    """Verify the requests of a job (see ``vllm_specopt.cpu``); ``job`` is its address."""
    _verify_requests(job)
