"""min-p, top-k and top-p as one threshold per row, without sorting and without writing a row.

All three keep a set of largest logits, so a row's filter is a threshold: min-p keeps probabilities of at least min_p
times the largest, top-k keeps values of at least the k-th largest, top-p keeps a value while the mass of strictly
larger ones is below top_p of the mass kept so far. Tokens equal to the threshold are kept. The k-th largest value and
the value where the mass crosses are found digit by digit (radix 16) over keys whose integer order is the order of the
floats: 4 passes for bf16, 5 for fp16, 8 for fp32, each over a row that stays in the L2 cache.
"""

import triton
import triton.language as tl

from .arguments import UNALIGNED

RADIX_DIGITS = {"bfloat16": 4, "float16": 5, "float32": 8}


@triton.jit
def load_logits(ptr, offsets, mask):
    """Logits as fp32, NaN as -inf and -0 as 0; -inf where masked."""
    logits = tl.load(ptr + offsets, mask=mask, other=float("-inf")).to(tl.float32)
    logits = tl.where(logits != logits, float("-inf"), logits)
    return tl.where(logits == 0.0, 0.0, logits)


@triton.jit
def _order_key(logits):
    """uint32 keys in the order of the floats."""
    bits = logits.to(tl.uint32, bitcast=True)
    return tl.where((bits >> 31) == 0, bits | 0x80000000, ~bits)


@triton.jit
def _key_value(key, DIGITS: tl.constexpr):
    """The float of a key of which the leading DIGITS radix-16 digits are known and the rest of the float is zero."""
    REST: tl.constexpr = (1 << (32 - 4 * DIGITS)) - 1
    bits = tl.where((key >> 31) == 1, key ^ 0x80000000, ~(key | REST))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _crossing_value(
    row_ptr, vocab_size, temp, row_max, floor, goal, BY_MASS: tl.constexpr, DIGITS: tl.constexpr, BLOCK: tl.constexpr
):
    """Smallest logit >= floor such that the count (or mass) of strictly larger ones >= floor is below goal.

    Mass is relative to the row's maximum: exp((logit - row_max) / temp).
    """
    bins = tl.arange(0, 16)
    key = tl.zeros((), tl.uint32)
    known = tl.zeros((), tl.uint32)
    above = tl.zeros((), tl.float32)
    shift = tl.full((), 28, tl.uint32)
    for _ in range(DIGITS):
        histogram = tl.zeros([16], tl.float32)
        for start in range(0, vocab_size, BLOCK):
            token_ids = start + tl.arange(0, BLOCK)
            logits = load_logits(row_ptr, token_ids, token_ids < vocab_size)
            keys = _order_key(logits)
            mask = (token_ids < vocab_size) & (logits >= floor) & ((keys & known) == key)
            weights = tl.exp((logits - row_max) / temp) if BY_MASS else tl.full([BLOCK], 1.0, tl.float32)
            weights = tl.where(mask, weights, 0.0)
            digits = ((keys >> shift) & 15).to(tl.int32)
            histogram += tl.sum(tl.where(digits[None, :] == bins[:, None], weights[None, :], 0.0), axis=1)
        larger = above + tl.sum(tl.where(bins[None, :] > bins[:, None], histogram[None, :], 0.0), axis=1)
        digit = tl.min(tl.where((larger < goal) & (histogram > 0.0), bins, 15), axis=0)
        above = tl.sum(tl.where(bins == digit, larger, 0.0), axis=0)
        key = key | (digit.to(tl.uint32) << shift)
        known = known | (tl.full((), 15, tl.uint32) << shift)
        shift = shift - 4
    return _key_value(key, DIGITS)


@triton.jit(do_not_specialize=["num_tiles", "rows_per_req"], do_not_specialize_on_alignment=UNALIGNED)
def filter_threshold_kernel(
    logits_ptr,  # [num_rows, vocab]
    logits_stride,
    cu_num_logits_ptr,  # [num_reqs + 1]
    state_indices_ptr,  # [num_reqs] or None
    temperature_ptr,  # [max_reqs]
    top_k_ptr,  # [max_reqs] or None
    top_p_ptr,  # [max_reqs] or None
    min_p_ptr,  # [max_reqs] or None
    threshold_ptr,  # [num_rows] out: smallest logit kept, -inf where the request filters nothing
    tile_max_ptr,  # [num_rows, num_tiles] out, see exact.py
    tile_sum_ptr,  # [num_rows, num_tiles] out
    vocab_size,
    num_tiles,
    rows_per_req,
    GREEDY_BELOW: tl.constexpr,
    DIGITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PADDED_TILES: tl.constexpr,
):
    """One program per (request, row). Writes the row's threshold and, for requests that filter, the statistics of what
    is kept, as those of a single tile."""
    req_idx = tl.program_id(0) // rows_per_req
    pos = tl.program_id(0) % rows_per_req
    start_row = tl.load(cu_num_logits_ptr + req_idx).to(tl.int64)
    row = start_row + pos
    if row >= tl.load(cu_num_logits_ptr + req_idx + 1):
        return
    state = req_idx.to(tl.int64) if state_indices_ptr is None else tl.load(state_indices_ptr + req_idx).to(tl.int64)
    temp = tl.load(temperature_ptr + state)
    top_k = tl.full((), 0, tl.int32) if top_k_ptr is None else tl.load(top_k_ptr + state).to(tl.int32)
    top_p = tl.full((), 1.0, tl.float32) if top_p_ptr is None else tl.load(top_p_ptr + state)
    min_p = tl.full((), 0.0, tl.float32) if min_p_ptr is None else tl.load(min_p_ptr + state)
    has_top_k = (top_k >= 1) & (top_k < vocab_size)
    has_filter = (has_top_k | (top_p < 1.0) | (min_p > 0.0)) & (temp >= GREEDY_BELOW)
    if not has_filter:
        tl.store(threshold_ptr + row, float("-inf"))
        return

    row_ptr = logits_ptr + row * logits_stride
    maxima = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab_size, BLOCK):
        token_ids = start + tl.arange(0, BLOCK)
        maxima = tl.maximum(maxima, load_logits(row_ptr, token_ids, token_ids < vocab_size))
    row_max = tl.max(maxima, axis=0)

    threshold = tl.full((), float("-inf"), tl.float32)
    if row_max == float("inf"):
        threshold = row_max
    elif row_max > float("-inf"):
        if min_p > 0.0:
            log_min_p = tl.log(min_p)
            minima = tl.full([BLOCK], float("inf"), tl.float32)
            for start in range(0, vocab_size, BLOCK):
                token_ids = start + tl.arange(0, BLOCK)
                logits = load_logits(row_ptr, token_ids, token_ids < vocab_size)
                minima = tl.minimum(minima, tl.where((logits - row_max) / temp >= log_min_p, logits, float("inf")))
            threshold = tl.min(minima, axis=0)
        if has_top_k:
            kth = _crossing_value(
                row_ptr, vocab_size, temp, row_max, float("-inf"), top_k.to(tl.float32), False, DIGITS, BLOCK
            )
            threshold = tl.maximum(threshold, kth)
        if top_p < 1.0:
            sums = tl.zeros([BLOCK], tl.float32)
            for start in range(0, vocab_size, BLOCK):
                token_ids = start + tl.arange(0, BLOCK)
                logits = load_logits(row_ptr, token_ids, token_ids < vocab_size)
                sums += tl.where(logits >= threshold, tl.exp((logits - row_max) / temp), 0.0)
            # The largest value stays whatever top_p is.
            goal = tl.maximum(top_p * tl.sum(sums, axis=0), 1e-30)
            crossing = _crossing_value(row_ptr, vocab_size, temp, row_max, threshold, goal, True, DIGITS, BLOCK)
            threshold = tl.maximum(threshold, crossing)
    tl.store(threshold_ptr + row, threshold)

    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocab_size, BLOCK):
        token_ids = start + tl.arange(0, BLOCK)
        logits = load_logits(row_ptr, token_ids, token_ids < vocab_size)
        kept = (logits >= threshold) & (logits > float("-inf"))
        sums += tl.where(kept, tl.where(logits == row_max, 1.0, tl.exp((logits - row_max) / temp)), 0.0)
    total = tl.sum(sums, axis=0)
    tiles = tl.arange(0, PADDED_TILES)
    tl.store(
        tile_max_ptr + row * num_tiles + tiles,
        tl.where(tiles == 0, row_max / temp, float("-inf")),
        mask=tiles < num_tiles,
    )
    tl.store(tile_sum_ptr + row * num_tiles + tiles, tl.where(tiles == 0, total, 0.0), mask=tiles < num_tiles)
