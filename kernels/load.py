"""Rows of logits and what a request asks for, as kernels read them."""

from typing import NamedTuple

import triton
import triton.language as tl

from .constants import EXACT, GREEDY_BELOW, HAS_PTX, WARMEST


class Tiles(NamedTuple):
    """Statistics of rows by tile of the vocabulary, ``[num_rows, count]`` each: see ``statistics.py``."""

    max_ptr: tl.tensor
    sum_ptr: tl.tensor
    entropy_ptr: tl.tensor
    count: tl.tensor


class Rows(NamedTuple):
    """Rows of logits, ``[num_rows, vocab_size]``."""

    ptr: tl.tensor
    stride: tl.tensor
    vocab_size: tl.tensor


class Drafts(NamedTuple):
    """Draft tokens and what they were drawn from; pointers are None where the drafts are one-hot.

    token_ids_ptr: ``[num_rows - num_reqs]`` or by row. probs_ptr: ``[num_rows - num_reqs, draft_vocab]``. logits_ptr:
    ``[max_reqs, max_drafts, draft_vocab]``.
    """

    token_ids_ptr: tl.tensor
    probs_ptr: tl.tensor
    probs_stride: tl.tensor
    logits_ptr: tl.tensor
    logits_stride_0: tl.tensor
    logits_stride_1: tl.tensor


class Request(NamedTuple):
    """Where a request's rows begin, how many draft tokens it has, and its temperature."""

    index: tl.tensor
    state: tl.tensor
    start_row: tl.tensor
    num_drafts: tl.tensor
    temperature: tl.tensor


class Noise(NamedTuple):
    """What random numbers are a function of: seeds by request state, positions by row (None: within the request)."""

    seeds_ptr: tl.tensor
    positions_ptr: tl.tensor


class Filters(NamedTuple):
    """Filter parameters of one request; neutral values where it uses none."""

    top_k: tl.tensor
    top_p: tl.tensor
    min_p: tl.tensor


@triton.jit
def exp2(x):
    """2^x; on a GPU one instruction, with results below 2^-126 as 0."""
    if HAS_PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def load_logits(ptr, offsets, mask):
    """Logits as fp32; -inf where masked. NaN stays NaN: it is less than nothing in every comparison that follows."""
    return tl.load(ptr + offsets, mask=mask, other=float("-inf")).to(tl.float32)


@triton.jit
def scaled(x, scale):
    """x scale, rounded: a plain product may be fused, unrounded, with a difference that it is part of."""
    return tl.fma(x, scale, tl.zeros_like(x))


@triton.jit
def row_shift(top, scale):
    """What the exponents of a row are relative to: its largest logit times ``scale``, 0 where that is infinite."""
    return scaled(tl.where((top < float("inf")) & (top > float("-inf")), top, 0.0), scale)


@triton.jit
def weights(x, scale, shift):
    """2^(x scale - shift), 0 for -inf and NaN."""
    return exp2(tl.maximum(tl.fma(x, scale, tl.zeros_like(x) - shift), -200.0))


@triton.jit
def load_request(index, cu_num_logits_ptr, state_indices_ptr, temperature_ptr):
    """A request of the batch; greedy (temperature 0) without a pointer to temperatures."""
    start_row = tl.load(cu_num_logits_ptr + index).to(tl.int64)
    num_drafts = (tl.load(cu_num_logits_ptr + index + 1) - start_row - 1).to(tl.int32)
    state = index if state_indices_ptr is None else tl.load(state_indices_ptr + index).to(tl.int64)
    temperature = tl.full((), 0.0, tl.float32)
    if temperature_ptr is not None:
        temperature = tl.load(temperature_ptr + state)
        temperature = tl.where(temperature >= GREEDY_BELOW, tl.minimum(temperature, WARMEST), 0.0)
    return Request(index, state, start_row, num_drafts, temperature)


@triton.jit
def draft_offset(drafts, request, pos):
    """Where the draft logits of a position begin."""
    return request.state * drafts.logits_stride_0 + pos.to(tl.int64) * drafts.logits_stride_1


@triton.jit
def load_draft_token(drafts, request, pos, vocab_size, COMPACT_DRAFTS: tl.constexpr):
    """The draft token that a row verifies; -1 for a bonus row, a placeholder, or an id outside the vocabulary."""
    start = request.start_row - request.index if COMPACT_DRAFTS else request.start_row + 1
    token = tl.load(drafts.token_ids_ptr + start + pos, mask=pos < request.num_drafts, other=-1).to(tl.int64)
    return tl.where((token >= 0) & (token < vocab_size), token, -1).to(tl.int32)


@triton.jit
def load_position(noise, request, pos):
    """Absolute position of a row."""
    position = pos.to(tl.int64)
    if noise.positions_ptr is not None:
        position = tl.load(noise.positions_ptr + request.start_row + pos).to(tl.int64)
    return position


@triton.jit
def load_filters(top_k_ptr, top_p_ptr, min_p_ptr, state):
    """A request's filters."""
    top_k = tl.full((), 0, tl.int32)
    if top_k_ptr is not None:
        # Wider integers need not fit.
        top_k = tl.minimum(tl.maximum(tl.load(top_k_ptr + state), 0), 2147483647).to(tl.int32)
    top_p = tl.full((), 1.0, tl.float32) if top_p_ptr is None else tl.load(top_p_ptr + state)
    min_p = tl.full((), 0.0, tl.float32) if min_p_ptr is None else tl.load(min_p_ptr + state)
    return Filters(top_k, top_p, min_p)


@triton.jit
def follows_rule(request, rule_requests_ptr, RULE: tl.constexpr):
    """Whether a request that samples follows the batch's other rule; without a pointer to flags all do."""
    if RULE == EXACT:
        flag = tl.full((), False, tl.int1)
    elif rule_requests_ptr is None:
        flag = tl.full((), True, tl.int1)
    else:
        flag = tl.load(rule_requests_ptr + request.state).to(tl.float32) > 0.0
    return flag & (request.temperature >= GREEDY_BELOW)


@triton.jit
def is_filtered(filters, vocab_size):
    """Whether the filters may remove a token."""
    return ((filters.top_k >= 1) & (filters.top_k < vocab_size)) | (filters.top_p < 1.0) | (filters.min_p > 0.0)


@triton.jit
def tile_statistics(x, scale):
    """Largest logit of each tile of ``x``, ``[tiles, TILE]``, and the sum of its 2^(x scale - fl(largest scale)).

    A tile with +inf counts its occurrences; one without a usable logit has -inf and 0.
    """
    largest = tl.max(x, axis=1)
    is_usable = largest > float("-inf")
    shift = scaled(tl.where(is_usable, largest, 0.0), scale)[:, None]
    total = tl.sum(exp2(tl.fma(x, scale, tl.zeros_like(x) - shift)), axis=1)
    if tl.sum(((total < float("inf")) == 0).to(tl.int32), axis=0) > 0:
        # NaN among the logits, or +inf - +inf.
        infinite = tl.sum((x == float("inf")).to(tl.float32), axis=1)
        total = tl.where(infinite > 0.0, infinite, tl.sum(weights(x, scale, shift), axis=1))
    return tl.where(is_usable, largest, float("-inf")), total
