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

from ..load import draft_offset, load_logits
from ..noise import acceptance_uniform

DRAFT = tl.constexpr(4)
DIFFERENCE = tl.constexpr(8)


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
def _passes(logits, draft_values, temp, uniform, constants_ptr, HAS_PROBS: tl.constexpr, HAS_LOGITS: tl.constexpr):
    """u <= target_score / draft_score, given target logits and draft probabilities or logits (one-hot: score 1)."""
    target_score = _score(logits, logits / temp, temp, constants_ptr)
    if HAS_PROBS:
        draft_score = _score(draft_values, _log_prob(draft_values), 1.0, constants_ptr + DRAFT)
    elif HAS_LOGITS:
        draft_score = _score(draft_values, draft_values / temp, temp, constants_ptr + DRAFT)
    else:
        draft_score = tl.zeros_like(target_score) + 1.0
    return (draft_score > 0.0) & (target_score > 0.0) & (uniform * draft_score <= target_score)


@triton.jit
def passes(rows, drafts, noise, constants_ptr, request, pos, tokens):
    """Which draft tokens (a scalar or a block, at positions ``pos`` of a request) survive; those below 0 do not."""
    valid = tokens >= 0
    row = request.start_row + pos
    logits = load_logits(rows.ptr, row * rows.stride + tokens, valid)
    if drafts.probs_ptr is not None:
        offsets = (row - request.index) * drafts.probs_stride + tokens
        draft_values = tl.load(drafts.probs_ptr + offsets, mask=valid, other=0.0).to(tl.float32)
    elif drafts.logits_ptr is not None:
        draft_values = load_logits(drafts.logits_ptr, draft_offset(drafts, request, pos) + tokens, valid)
    else:
        draft_values = logits
    position = pos.to(tl.int64)
    if noise.positions_ptr is not None:
        position = tl.load(noise.positions_ptr + row, mask=valid, other=0).to(tl.int64)
    uniform = acceptance_uniform(tl.load(noise.seeds_ptr + request.state), position)
    survives = _passes(
        logits,
        draft_values,
        request.temperature,
        uniform,
        constants_ptr,
        drafts.probs_ptr is not None,
        drafts.logits_ptr is not None,
    )
    return valid & survives


@triton.jit
def first_rejection(rows, drafts, noise, constants_ptr, request, COMPACT_DRAFTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """Index of the first draft token of a request that does not survive; num_drafts if all do."""
    pos = tl.arange(0, BLOCK_K)
    is_draft = pos < request.num_drafts
    start = request.start_row - request.index if COMPACT_DRAFTS else request.start_row + 1
    tokens = tl.load(drafts.token_ids_ptr + start + pos, mask=is_draft, other=-1).to(tl.int64)
    tokens = tl.where((tokens >= 0) & (tokens < rows.vocab_size), tokens, -1)
    survives = passes(rows, drafts, noise, constants_ptr, request, pos, tokens)
    return tl.min(tl.where(is_draft & (survives == 0), pos, request.num_drafts), axis=0)


@triton.jit
def residual(logits, draft_values, temp, top, constants_ptr, DRAFT_IS_PROBS: tl.constexpr):
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
    draft_ptr = constants_ptr + DRAFT
    low, high = tl.load(constants_ptr + 2) * temp, tl.load(constants_ptr + 3) * temp
    draft_low, draft_high = tl.load(draft_ptr + 2) * draft_unit, tl.load(draft_ptr + 3) * draft_unit
    is_zero = (draft_scaled > float("-inf")) == 0
    is_zero = is_zero | (draft_values < draft_low)
    is_one = (logits > high) | (logits == float("inf"))

    # b - a; the second part is 0 where both sides share their constants. A score of 1 or 0 leaves 1 of the factor.
    gap = draft_scaled * tl.load(constants_ptr + DIFFERENCE) + tl.load(constants_ptr + DIFFERENCE + 1)
    gap = distance * tl.load(constants_ptr) + gap
    factor = tl.where(gap < 0.0, _one_minus_exp(gap), 0.0)
    factor = tl.where(is_zero | is_one, 1.0, factor)
    rest = _sigmoid(-(draft_scaled * tl.load(draft_ptr) + tl.load(draft_ptr + 1)))
    rest = tl.where(is_zero, 1.0, rest)
    rest = tl.where((is_zero == 0) & ((draft_values > draft_high) | (draft_values == float("inf"))), 0.0, rest)
    score = _sigmoid(logits / temp * tl.load(constants_ptr) + tl.load(constants_ptr + 1))
    score = tl.where(is_one, 1.0, score)
    score = tl.where((logits >= low) & (logits > float("-inf")), score, 0.0)
    return score * rest * factor
