"""Sigmoid scores in place of probabilities (Wagner et al., arXiv 2406.11016).

score(z) = sigmoid((z / T - alpha) / (beta - alpha)) needs no normaliser, so testing a draft token reads two numbers.
With the paper's constants two scores differ by some 1e-5, so their difference is never taken by subtraction:
sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), with b - a from the two logits themselves.

Constants arrive as one fp32 tensor ``[10]``: scale, shift, lower and upper limit of the target, the same of the draft,
draft scale - target scale, draft shift - target shift. A score is sigmoid(z / T * scale + shift), 0 below the lower
limit and 1 above the upper one; the limits are those of z / T, or of probabilities where the draft has these.
"""

import triton
import triton.language as tl

from ..load import load_logits
from ..noise import acceptance_uniform

DRAFT = tl.constexpr(4)
DIFFERENCE = tl.constexpr(8)


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
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


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
def _log_prob(probs):
    """Logarithm of probabilities; NaN and anything below 0 count as 0."""
    return tl.where(probs > 0.0, tl.log(tl.where(probs > 0.0, probs, 1.0)), float("-inf"))


@triton.jit
def _score(values, scaled, unit, constants_ptr):
    """Scores of one side. values: what the limits (times ``unit``) apply to; scaled: z / T. NaN scores 0."""
    argument = scaled * tl.load(constants_ptr) + tl.load(constants_ptr + 1)
    score = tl.where(values > tl.load(constants_ptr + 3) * unit, 1.0, _sigmoid(argument))
    return tl.where((values >= tl.load(constants_ptr + 2) * unit) & (scaled > float("-inf")), score, 0.0)


@triton.jit
def first_rejection(
    logits_ptr,
    logits_stride,
    draft_token_ids_ptr,
    draft_probs_ptr,
    draft_probs_stride,
    draft_logits_ptr,
    draft_logits_stride_0,
    draft_logits_stride_1,
    seeds_ptr,
    positions_ptr,
    sigmoid_ptr,
    req_idx,
    state,
    start_row,
    num_drafts,
    temp,
    vocab_size,
    COMPACT_DRAFTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Index of the first draft token of a request that fails u <= target_score / draft_score; num_drafts if none."""
    pos = tl.arange(0, BLOCK_K)
    rows = start_row + pos
    is_draft = pos < num_drafts
    draft_start = start_row - req_idx if COMPACT_DRAFTS else start_row + 1
    tokens = tl.load(draft_token_ids_ptr + draft_start + pos, mask=is_draft, other=-1).to(tl.int64)
    valid = is_draft & (tokens >= 0) & (tokens < vocab_size)
    logits = load_logits(logits_ptr, rows * logits_stride + tokens, valid)
    target_score = _score(logits, logits / temp, temp, sigmoid_ptr)
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
    positions = pos.to(tl.int64)
    if positions_ptr is not None:
        positions = tl.load(positions_ptr + rows, mask=is_draft, other=0).to(tl.int64)
    uniform = acceptance_uniform(tl.load(seeds_ptr + state), positions)
    passes = valid & (draft_score > 0.0) & (target_score > 0.0) & (uniform * draft_score <= target_score)
    return tl.min(tl.where(is_draft & (passes == 0), pos, num_drafts), axis=0)


@triton.jit
def passes_alone(
    logit,
    draft_value,
    temp,
    uniform,
    sigmoid_ptr,
    HAS_PROBS: tl.constexpr,
    HAS_LOGITS: tl.constexpr,
):
    """The same test for one draft token, given its target logit and its draft probability or logit."""
    target_score = _score(logit, logit / temp, temp, sigmoid_ptr)
    if HAS_PROBS:
        draft_score = _score(draft_value, _log_prob(draft_value), 1.0, sigmoid_ptr + DRAFT)
    elif HAS_LOGITS:
        draft_score = _score(draft_value, draft_value / temp, temp, sigmoid_ptr + DRAFT)
    else:
        draft_score = tl.full((), 1.0, tl.float32)
    return (draft_score > 0.0) & (target_score > 0.0) & (uniform * draft_score <= target_score)


@triton.jit
def residual(logits, draft_values, temp, top, sigmoid_ptr, DRAFT_IS_PROBS: tl.constexpr):
    """max(target_score - draft_score, 0) of a block of tokens; in a row with +inf (its ``top``) that takes all."""
    logits = tl.where(logits < tl.where(top == float("inf"), top, float("-inf")), float("-inf"), logits)
    if DRAFT_IS_PROBS:
        draft_scaled = _log_prob(draft_values)
        draft_unit = tl.full((), 1.0, tl.float32)
        distance = draft_scaled - logits / temp
    else:
        draft_scaled = tl.where(draft_values == draft_values, draft_values, float("-inf")) / temp
        draft_unit = temp
        distance = (draft_values - logits) / temp
    draft_ptr = sigmoid_ptr + DRAFT
    low, high = tl.load(sigmoid_ptr + 2) * temp, tl.load(sigmoid_ptr + 3) * temp
    draft_low, draft_high = tl.load(draft_ptr + 2) * draft_unit, tl.load(draft_ptr + 3) * draft_unit
    is_zero = (draft_scaled > float("-inf")) == 0
    is_zero = is_zero | (draft_values < draft_low)
    is_one = (logits > high) | (logits == float("inf"))

    # b - a; the second part is 0 where both sides share their constants. A score of 1 or 0 leaves 1 of the factor.
    gap = draft_scaled * tl.load(sigmoid_ptr + DIFFERENCE) + tl.load(sigmoid_ptr + DIFFERENCE + 1)
    gap = distance * tl.load(sigmoid_ptr) + gap
    factor = tl.where(gap < 0.0, _one_minus_exp(gap), 0.0)
    factor = tl.where(is_zero | is_one, 1.0, factor)
    rest = _sigmoid(-(draft_scaled * tl.load(draft_ptr) + tl.load(draft_ptr + 1)))
    rest = tl.where(is_zero, 1.0, rest)
    rest = tl.where((is_zero == 0) & ((draft_values > draft_high) | (draft_values == float("inf"))), 0.0, rest)
    score = _sigmoid(logits / temp * tl.load(sigmoid_ptr) + tl.load(sigmoid_ptr + 1))
    score = tl.where(is_one, 1.0, score)
    score = tl.where((logits >= low) & (logits > float("-inf")), score, 0.0)
    return score * rest * factor
