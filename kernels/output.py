"""The last step of a request: how many draft tokens survive, its tokens, and its counters."""

from typing import NamedTuple

import triton
import triton.language as tl

from .constants import BAD_ROW, BLOCK, BUDGET, CARRY, NEEDS_RESIDUAL, REJECTED, ROW_COLUMNS, SPENT
from .rules import block


class Output(NamedTuple):
    """What a step returns, and what it counts; a pointer is None where that is not wanted.

    token_ids_ptr: ``[num_reqs, max_num_draft_tokens + 1]``. num_sampled_ptr: ``[num_reqs]``. bonus_token_ids_ptr:
    ``[num_reqs]``, given. bad_row_counter_ptr: ``[1]``. counters_ptr: ``[num_methods, 8]``.
    """

    token_ids_ptr: tl.tensor
    token_ids_stride: tl.tensor
    num_sampled_ptr: tl.tensor
    bonus_token_ids_ptr: tl.tensor
    bad_row_counter_ptr: tl.tensor
    counters_ptr: tl.tensor


@triton.jit
def load_drafts(request, draft_token_ids_ptr, COMPACT_DRAFTS: tl.constexpr, BLOCK_K: tl.constexpr):
    """A request's draft tokens, ``[BLOCK_K]``, -1 beyond the last."""
    columns = tl.arange(0, BLOCK_K)
    draft_start = request.start_row - request.index if COMPACT_DRAFTS else request.start_row + 1
    is_draft = columns < request.num_drafts
    return tl.load(draft_token_ids_ptr + draft_start + columns, mask=is_draft, other=-1).to(tl.int64)


@triton.jit
def load_outcomes(request, outcome_ptr, BLOCK_K: tl.constexpr):
    """What a request's rows found, ``[BLOCK_K]``, BAD_ROW beyond the last."""
    columns = tl.arange(0, BLOCK_K)
    return tl.load(outcome_ptr + request.start_row + columns, mask=columns <= request.num_drafts, other=BAD_ROW)


@triton.jit
def end_request(
    request,
    noise,
    output,
    draft_token_ids_ptr,
    outcomes,
    row_ptr,
    pending_ptr,
    by_rule,
    swept,
    width,
    vocab_size,
    COMPACT_DRAFTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RULE: tl.constexpr,
):
    """Accepted draft tokens, the token of the first row that did not accept, then -1.

    ``outcomes``: the token each row found, ``[BLOCK_K]``. A draft token survives where it is its row's. swept: rows
    read in full; 0 stands for all of them. Leaves in ``pending_ptr`` the position of a row whose residual must be
    drawn from, or -1; where blocks are verified, the number of rows that must be read again, and writes nothing if
    there are any.
    """
    start_row = request.start_row
    num_drafts = request.num_drafts
    columns = tl.arange(0, BLOCK_K)
    is_draft = columns < num_drafts
    drafts = load_drafts(request, draft_token_ids_ptr, COMPACT_DRAFTS, BLOCK_K)
    outcomes = outcomes.to(tl.int64)
    survives = is_draft & (drafts == outcomes) & (drafts >= 0)
    num_accepted = tl.min(tl.where(is_draft & (survives == 0), columns, num_drafts), axis=0)
    pending = tl.full((), 0, tl.int32)
    if RULE == BLOCK:
        if by_rule:
            num_accepted, pending = block.settle(noise, request, row_ptr, drafts, vocab_size, BLOCK_K)
    token = tl.sum(tl.where(columns == num_accepted, outcomes, 0), axis=0)
    token = tl.where(token <= REJECTED, REJECTED - token, token)
    if RULE == BLOCK:
        if by_rule == 0:
            is_pending = token == NEEDS_RESIDUAL
            pending = is_pending.to(tl.int32)
            carries = tl.where((columns == num_accepted) & is_pending, 1.0, 0.0)
            tl.store(row_ptr + (start_row + columns) * ROW_COLUMNS + CARRY, carries, mask=columns <= num_drafts)
        tl.store(pending_ptr + request.index, pending)
    elif pending_ptr is not None:
        tl.store(pending_ptr + request.index, tl.where(token == NEEDS_RESIDUAL, num_accepted, -1))
    spent = tl.full((), 0.0, tl.float32)
    if RULE == BUDGET:
        is_verified = (
            (columns <= tl.where(by_rule, num_accepted, -1)) & is_draft & (drafts >= 0) & (drafts < vocab_size)
        )
        costs = tl.load(row_ptr + (start_row + columns) * ROW_COLUMNS + SPENT, mask=is_verified, other=0.0)
        spent = tl.sum(costs, axis=0)
    if pending == 0:
        write_tokens(request, output, drafts, num_accepted, token, by_rule, swept, spent, width, BLOCK_K, RULE)


@triton.jit
def write_tokens(
    request,
    output,
    drafts,
    num_accepted,
    token,
    by_rule,
    swept,
    spent,
    width,
    BLOCK_K: tl.constexpr,
    RULE: tl.constexpr,
):
    """Write a request's tokens and count them. token: what follows those accepted, below 0 for a row without any."""
    req_idx = request.index
    num_drafts = request.num_drafts
    columns = tl.arange(0, BLOCK_K)
    if output.bonus_token_ids_ptr is not None:
        if num_accepted == num_drafts:
            token = tl.load(output.bonus_token_ids_ptr + req_idx).to(tl.int64)
    if output.bad_row_counter_ptr is not None:
        tl.atomic_add(output.bad_row_counter_ptr, 1, mask=token == BAD_ROW, sem="relaxed")
    token = tl.maximum(token, 0)
    tokens = tl.where(columns < num_accepted, drafts, tl.where(columns == num_accepted, token, -1))
    tl.store(output.token_ids_ptr + req_idx * output.token_ids_stride + columns, tokens, mask=columns < width)
    tl.store(output.num_sampled_ptr + req_idx, num_accepted + 1)
    if output.counters_ptr is not None:
        num_rows = num_drafts + 1
        all_accepted = num_accepted == num_drafts
        read = tl.where(swept == 0, num_rows, swept)
        if output.bonus_token_ids_ptr is not None:
            read = read - tl.where((swept == 0) | all_accepted, 1, 0)
        places = tl.arange(0, 8)
        values = tl.where(places == 0, num_accepted, 0)
        values = tl.where((places == 1) & (all_accepted == 0), 1, values)
        values = tl.where((places == 2) & all_accepted & (num_drafts > 0), 1, values)
        values = tl.where(places == 3, read, values)
        values = tl.where(places == 4, num_rows - read, values)
        if RULE == BUDGET:
            values = tl.where(places == 5, (spent * 1048576.0).to(tl.int32), values)
        method = by_rule.to(tl.int32) * RULE
        tl.atomic_add(output.counters_ptr + 8 * method + places, values.to(tl.int64), mask=values > 0, sem="relaxed")
