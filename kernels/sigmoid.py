"""Sigmoid scores in place of probabilities (Wagner et al., arXiv 2406.11016).

score(z) = sigmoid((z / T - alpha) / (beta - alpha)) needs no normaliser, so judging a draft token reads two numbers,
and the judged rows are not swept at all. What is swept is the one emitting row of each request (and the draft row
beside it), for a token from max(target_score - draft_score, 0). The definition in float64 is in ``reference.py``.

With the paper's constants two scores differ by some 1e-5, so their difference is never taken by subtraction:
sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), with b - a from the two logits themselves.

Constants arrive as one fp32 tensor ``[10]``: scale, shift, lower and upper limit of the target, the same of the draft,
draft scale - target scale, draft shift - target shift. A score is sigmoid(z / T * scale + shift), 0 below the lower
limit and 1 above the upper one; the limits are those of z / T, or of probabilities where the draft has these.
"""

import triton
import triton.language as tl

from .filters import load_logits
from .noise import log_exponential

DRAFT = tl.constexpr(4)
DIFFERENCE = tl.constexpr(8)
# A tile is swept in blocks of at most this many tokens: the residual needs more registers than a whole tile leaves.
BLOCK = tl.constexpr(1024)


@triton.jit
def uses_sigmoid(sigmoid_ptr, sigmoid_requests_ptr, state):
    """Whether a request is verified by scores; without a pointer to constants none is, without one to flags all are."""
    if sigmoid_ptr is None:
        flag = tl.full((), 0, tl.int32)
    elif sigmoid_requests_ptr is None:
        flag = tl.full((), 1, tl.int32)
    else:
        flag = tl.load(sigmoid_requests_ptr + state).to(tl.int32)
    return flag != 0


@triton.jit
def _log_sigmoid(x):
    return tl.minimum(x, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0, with full relative accuracy down to x = 0."""
    series = 1.0 + x * 0.125
    series = 1.0 + x * (1.0 / 7.0) * series
    series = 1.0 + x * (1.0 / 6.0) * series
    series = 1.0 + x * 0.2 * series
    series = 1.0 + x * 0.25 * series
    series = 1.0 + x * (1.0 / 3.0) * series
    series = 1.0 + x * 0.5 * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _score(values, scaled, unit, constants_ptr):
    """Scores of one side. values: what the limits (times ``unit``) apply to; scaled: z / T."""
    argument = scaled * tl.load(constants_ptr) + tl.load(constants_ptr + 1)
    score = 1.0 / (1.0 + tl.exp(-argument))
    score = tl.where(values > tl.load(constants_ptr + 3) * unit, 1.0, score)
    return tl.where(values < tl.load(constants_ptr + 2) * unit, 0.0, score)


@triton.jit
def judged_scores(
    tokens,
    valid,
    pos,
    rows,
    req_idx,
    state,
    temp,
    logits_ptr,
    logits_stride,
    draft_probs_ptr,
    draft_probs_stride,
    draft_logits_ptr,
    draft_logits_stride_0,
    draft_logits_stride_1,
    threshold_ptr,
    sigmoid_ptr,
):
    """Target and draft scores ``[BLOCK_K]`` of the draft tokens; what a filter removes has target score 0."""
    logits = load_logits(logits_ptr, rows * logits_stride + tokens, valid)
    target_score = _score(logits, logits / temp, temp, sigmoid_ptr)
    if threshold_ptr is not None:
        threshold = tl.load(threshold_ptr + rows, mask=valid, other=float("-inf"))
        target_score = tl.where(logits >= threshold, target_score, 0.0)
    if draft_probs_ptr is not None:
        offsets = (rows - req_idx) * draft_probs_stride + tokens
        probs = tl.load(draft_probs_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
        draft_score = _score(probs, _log_prob(probs), 1.0, sigmoid_ptr + DRAFT)
    elif draft_logits_ptr is not None:
        offsets = state * draft_logits_stride_0 + pos.to(tl.int64) * draft_logits_stride_1 + tokens
        draft_logits = load_logits(draft_logits_ptr, offsets, valid)
        draft_score = _score(draft_logits, draft_logits / temp, temp, sigmoid_ptr + DRAFT)
    else:
        draft_score = tl.where(valid, 1.0, 0.0)
    return target_score, draft_score


@triton.jit
def _log_prob(probs):
    """Logarithm of probabilities; NaN and anything below 0 count as 0."""
    return tl.where(probs > 0.0, tl.log(tl.where(probs > 0.0, probs, 1.0)), float("-inf"))


@triton.jit
def _log_score_residual(
    logits,
    token_ids,
    mask,
    row,
    req_idx,
    pos,
    state,
    temp,
    draft_probs_ptr,
    draft_probs_stride,
    draft_logits_ptr,
    draft_logits_stride_0,
    draft_logits_stride_1,
    sigmoid_ptr,
):
    """log(max(target_score - draft_score, 0)) of a block of tokens."""
    if draft_probs_ptr is not None:
        draft_row_ptr = draft_probs_ptr + (row - req_idx) * draft_probs_stride
        draft_values = tl.load(draft_row_ptr + token_ids, mask=mask, other=0.0).to(tl.float32)
        draft_scaled = _log_prob(draft_values)
        draft_unit = tl.full((), 1.0, tl.float32)
        distance = draft_scaled - logits / temp
    else:
        draft_row_ptr = draft_logits_ptr + state * draft_logits_stride_0 + pos.to(tl.int64) * draft_logits_stride_1
        draft_values = load_logits(draft_row_ptr, token_ids, mask)
        draft_scaled = draft_values / temp
        draft_unit = temp
        distance = (draft_values - logits) / temp
    draft_ptr = sigmoid_ptr + DRAFT
    low, high = tl.load(sigmoid_ptr + 2) * temp, tl.load(sigmoid_ptr + 3) * temp
    draft_low, draft_high = tl.load(draft_ptr + 2) * draft_unit, tl.load(draft_ptr + 3) * draft_unit

    # b - a; the second part is 0 where both sides share their constants. A score of 1 or 0 leaves 1 of the factor.
    gap = draft_scaled * tl.load(sigmoid_ptr + DIFFERENCE) + tl.load(sigmoid_ptr + DIFFERENCE + 1)
    gap = distance * tl.load(sigmoid_ptr) + gap
    gap = tl.where((draft_values < draft_low) | (draft_scaled == float("-inf")), float("-inf"), gap)
    gap = tl.where((logits > high) | (logits == float("inf")), float("-inf"), gap)
    log_weight = tl.where(gap < 0.0, tl.log(_one_minus_exp(gap)), float("-inf"))

    log_rest = _log_sigmoid(-(draft_scaled * tl.load(draft_ptr) + tl.load(draft_ptr + 1)))
    log_rest = tl.where(draft_values < draft_low, 0.0, log_rest)
    log_weight += tl.where(draft_values > draft_high, float("-inf"), log_rest)

    log_target = _log_sigmoid(logits / temp * tl.load(sigmoid_ptr) + tl.load(sigmoid_ptr + 1))
    log_target = tl.where(logits > high, 0.0, log_target)
    return log_weight + tl.where(logits < low, float("-inf"), log_target)


@triton.jit
def best_by_score_residual(
    first_token,
    vocab_size,
    has_inf,
    key0,
    key1,
    row,
    req_idx,
    pos,
    state,
    temp,
    logits_ptr,
    logits_stride,
    draft_probs_ptr,
    draft_probs_stride,
    draft_logits_ptr,
    draft_logits_stride_0,
    draft_logits_stride_1,
    threshold_ptr,
    sigmoid_ptr,
    TILE: tl.constexpr,
):
    """This tile's winner of the race over the score residual: log weight - log noise, and the first token with it.

    has_inf: Whether the tile holds +inf, which takes all.
    """
    STEP: tl.constexpr = TILE if TILE < BLOCK else BLOCK
    best = tl.full((), float("-inf"), tl.float32)
    best_token = tl.full((), 0, tl.int32) + first_token
    for start in range(0, TILE, STEP):
        token_ids = first_token + start + tl.arange(0, STEP)
        logits = load_logits(logits_ptr + row * logits_stride, token_ids, token_ids < vocab_size)
        logits = tl.where((has_inf == 0) | (logits == float("inf")), logits, float("-inf"))
        if threshold_ptr is not None:
            logits = tl.where(logits >= tl.load(threshold_ptr + row), logits, float("-inf"))
        log_weight = _log_score_residual(
            logits,
            token_ids,
            token_ids < vocab_size,
            row,
            req_idx,
            pos,
            state,
            temp,
            draft_probs_ptr,
            draft_probs_stride,
            draft_logits_ptr,
            draft_logits_stride_0,
            draft_logits_stride_1,
            sigmoid_ptr,
        )
        race = log_weight - log_exponential(key0, key1, token_ids)
        score, index = tl.max(race, axis=0, return_indices=True, return_indices_tie_break_left=True)
        best_token = tl.where(score > best, first_token + start + index, best_token)
        best = tl.maximum(score, best)
    return best, best_token
