"""Verification request by request, row by row, up to the first rejection. Entry point of the compiled code.

Every request is computed by one call in a fixed order, so results depend neither on the batch nor on the threads.
"""

import numpy as np
from numba import carray, types
from numba.np.unsafe.ndarray import to_fixed_tuple

from vllm_specopt.cpu.cache import compile_entry
from vllm_specopt.cpu.filters import apply_filters
from vllm_specopt.cpu.inputs import draft_of, position_of, row_of, token_of
from vllm_specopt.cpu.memory import INF, fetch_add, jit, pointer, read_bool, read_float, read_int, write_int
from vllm_specopt.cpu.noise import DRAW, acceptance_uniform, draw_uniform
from vllm_specopt.cpu.plan import (
    BLOCK,
    BUDGET,
    EXACT,
    GREEDY_BELOW,
    JOB_BAD_ROWS,
    JOB_MISFIT,
    JOB_PLAN,
    JOB_REQUESTS,
    JOB_WORKERS,
    LOGITS,
    ONE_HOT,
    SIGMOID,
    TYPICAL,
    Plan,
    scratch_at,
)
from vllm_specopt.cpu.rules.block import block_rule
from vllm_specopt.cpu.rules.budget import budget_spent, budget_test, kept_prob
from vllm_specopt.cpu.rules.exact import Draft, exact_rule
from vllm_specopt.cpu.rules.sigmoid import Scores, recover_by_scores, sigmoid_test
from vllm_specopt.cpu.rules.typical import typical_test
from vllm_specopt.cpu.sweeps import largest_logit, sweep
from vllm_specopt.cpu.target import Target, draw_target, is_kept
from vllm_specopt.rules import SPENT_UNIT

LOG2_E = 1.4426950408889634
WARMEST = 1e30
"""Temperatures above count as this one: single precision would run out of range."""
SURVIVES = np.int64(-1)
BAD_ROW = np.int64(-2)


@jit
def _verify_row(row, draft_row, mode, token, scale, temperature, filters, rule, seed, position, scratch):
    """Verify a draft token of a request that samples.

    Args:
        draft_row: The draft's row; not looked at where ``mode`` is ONE_HOT.
        token: -1 for none: a placeholder, or a bonus row.
        filters: As :func:`vllm_specopt.cpu.inputs.target_of` takes them.
        rule: The request's rule, the address of its constants, and what it may spend on a token.

    Returns:
        SURVIVES, BAD_ROW, or the token that is emitted; and the divergence spent.
    """
    method, constants, delta = rule
    is_filtered, top_k, top_p, min_p = filters
    by_scores = method == SIGMOID and token >= 0
    scores = Scores(row, mode, draft_row, constants, temperature)
    passes = by_scores and sigmoid_test(scores, token, acceptance_uniform(seed, position))
    if passes and not is_filtered:
        return SURVIVES, 0.0
    row, frame, mass = sweep(row, scale, scratch.left, scratch.tile)
    if not mass > 0.0:
        return BAD_ROW, 0.0
    target = Target(row, frame, mass, -INF, row, -INF, np.int64(-1))
    if is_filtered:
        target = apply_filters(row, frame, mass, top_k, top_p, min_p, scratch)
    if by_scores:
        if passes and is_kept(target, token):
            return SURVIVES, 0.0
        return recover_by_scores(target, scores, token, seed, position, scratch), 0.0
    if mode == ONE_HOT or token < 0 or method == TYPICAL:
        drawn = draw_target(target, draw_uniform(seed, position, DRAW), scratch)
        survives, spent = drawn == token, 0.0
        if token >= 0 and method == BUDGET:
            prob = kept_prob(target, token)
            spent = budget_spent(prob, delta)
            survives = survives or budget_test(prob, acceptance_uniform(seed, position), delta)
        if token >= 0 and method == TYPICAL and not survives:
            survives = is_kept(target, token) and typical_test(row, frame, mass, token, constants, scratch)
        return SURVIVES if survives else drawn, spent
    draft = Draft(mode, draft_row, frame, 1.0)
    if mode == LOGITS:
        draft_row, draft_frame, draft_mass = sweep(draft_row, scale, scratch.draft_left, scratch.draft_tile)
        draft = Draft(mode, draft_row, draft_frame, draft_mass)
    return exact_rule(target, draft, token, seed, position, scratch), 0.0


@jit
def _rule_of(plan, state, is_greedy):
    """A request's rule, the address of its constants, and what it may spend on a token."""
    method, delta = (np.int64(EXACT) if is_greedy else plan.rule), 0.0
    if method == BUDGET:
        delta = np.float64(read_float(plan.constants, 0))
    if method != EXACT and plan.rule_requests:
        if plan.has_deltas:
            delta = np.float64(read_float(plan.rule_requests, state))
            method = method if delta > 0.0 else np.int64(EXACT)
        elif not read_bool(plan.rule_requests, state):
            method = np.int64(EXACT)
    return method, plan.constants, delta


@jit
def _verify_request(request, plan, scratch):
    """Verify one request; 1 if the row that emitted had no usable logit, -1 if the arguments do not fit together."""
    start = read_int(plan.starts, request, plan.wide_starts)
    num_drafts = read_int(plan.starts, request + 1, plan.wide_starts) - start - 1
    state = read_int(plan.states, request, plan.wide_states) if plan.states else request
    if start < 0 or num_drafts < 0 or num_drafts >= plan.token_ids_width or start + num_drafts >= plan.num_rows:
        return -1
    if state < 0 or state >= plan.num_states:
        return -1
    temperature = np.float64(read_float(plan.temperature, state)) if plan.temperature else 0.0
    is_greedy = not temperature >= GREEDY_BELOW
    temperature = min(temperature, WARMEST)
    scale = np.float32(1.0 if is_greedy else LOG2_E / temperature)
    seed = read_int(plan.seeds, state, True) if not is_greedy else np.int64(0)
    top_k = read_int(plan.top_k, state, plan.wide_top_k) if plan.top_k else np.int64(0)
    top_k = top_k if 1 <= top_k < plan.vocab else np.int64(0)
    top_p = np.float64(read_float(plan.top_p, state)) if plan.top_p else 1.0
    min_p = np.float64(read_float(plan.min_p, state)) if plan.min_p else 0.0
    filters = (top_k > 0 or top_p < 1.0 or min_p > 0.0, top_k, top_p, min_p)
    rule = _rule_of(plan, state, is_greedy)
    out = plan.token_ids + request * plan.token_ids_stride * (8 if plan.wide_token_ids else 4)
    place, emitted, num_read, spent, is_bad = np.int64(0), SURVIVES, np.int64(0), 0.0, 0
    if rule[0] == BLOCK:
        place, emitted, num_read = block_rule(plan, request, start, num_drafts, state, scale, filters, seed, scratch)
        is_bad = 1 if emitted == BAD_ROW else 0
        if emitted == SURVIVES:
            emitted = read_int(plan.bonus, request, plan.wide_bonus)
        for i in range(place):
            write_int(out, i, plan.wide_token_ids, token_of(plan, request, start + i))
    else:
        while True:
            row = row_of(plan, start + place)
            token = np.int64(-1)
            if place < num_drafts:
                token = token_of(plan, request, start + place)
            elif plan.bonus:
                emitted = read_int(plan.bonus, request, plan.wide_bonus)
                break
            if is_greedy:
                top, emitted = largest_logit(row, scratch.tile)
                is_bad = 1 if top == -INF else 0
                emitted = SURVIVES if emitted == token else emitted
            else:
                position = position_of(plan, start + place, place)
                draft_row = draft_of(plan, request, start + place, state, place)
                emitted, cost = _verify_row(
                    row, draft_row, plan.mode, token, scale, temperature, filters, rule, seed, position, scratch
                )
                is_bad = 1 if emitted == BAD_ROW else 0
                spent += cost
            if emitted != SURVIVES:
                break
            write_int(out, place, plan.wide_token_ids, token)
            place += 1
        num_read = np.int64(1) if rule[0] == SIGMOID and not filters[0] else place + 1
        num_read -= 1 if plan.bonus and place == num_drafts else 0
    write_int(out, place, plan.wide_token_ids, max(emitted, np.int64(0)))
    write_int(plan.num_sampled, request, False, place + 1)
    for i in range(place + 1, plan.token_ids_width):
        write_int(out, i, plan.wide_token_ids, np.int64(-1))
    if plan.counters:
        _count(plan.counters + 64 * rule[0], place, num_drafts, num_read, spent)
    return is_bad


@jit
def _count(counters, num_accepted, num_drafts, num_read, spent):
    """Add a request to its rule's counters: tokens accepted, recovered, bonus; rows read, not read; nats spent."""
    accepted_all = num_accepted == num_drafts
    fetch_add(counters, num_accepted)
    fetch_add(counters + 8, np.int64(0 if accepted_all else 1))
    fetch_add(counters + 16, np.int64(1 if accepted_all and num_drafts > 0 else 0))
    fetch_add(counters + 24, num_read)
    fetch_add(counters + 32, num_drafts + 1 - num_read)
    fetch_add(counters + 40, np.int64(spent / SPENT_UNIT))


PLAN_LENGTH = len(Plan._fields)


@compile_entry
def verify_requests(job):
    """Verify requests of a job (its address) until none is left; threads may share a job."""
    plan = Plan(*to_fixed_tuple(carray(pointer(job + 8 * JOB_PLAN, types.int64), PLAN_LENGTH), PLAN_LENGTH))
    worker = fetch_add(job + 8 * JOB_WORKERS, np.int64(1))
    scratch, _ = scratch_at(plan.memory + worker * plan.memory_per_worker, plan.vocab)
    request = fetch_add(job + 8 * JOB_REQUESTS, np.int64(1))
    while request < plan.num_reqs:
        bad = _verify_request(request, plan, scratch)
        if bad < 0:
            write_int(job + 8 * JOB_MISFIT, 0, True, 1 + request)
        elif bad > 0:
            fetch_add(job + 8 * JOB_BAD_ROWS, np.int64(bad))
        request = fetch_add(job + 8 * JOB_REQUESTS, np.int64(1))
