"""Verification request by request, row by row, up to the first rejection. Entry point of the compiled code.

Every request is computed by one call in a fixed order, so results depend neither on the batch nor on the threads.
"""

import numpy as np

from vllm_specopt.cpu.cache import compile_entry
from vllm_specopt.cpu.filters import apply_filters
from vllm_specopt.cpu.inputs import draft_of, follows_rule, position_of, request_of, row_of, token_of
from vllm_specopt.cpu.job import JOB_BAD_ROWS, join, next_request, tell_misfit
from vllm_specopt.cpu.memory import INF, fetch_add, jit, read_float, read_int, write_int
from vllm_specopt.cpu.noise import DRAW, acceptance_uniform, draw_uniform
from vllm_specopt.cpu.notes import clear_notes, note_at, noted, write_note
from vllm_specopt.cpu.plan import BLOCK, BUDGET, EXACT, LOGITS, ONE_HOT, SIGMOID, TYPICAL
from vllm_specopt.cpu.rules.block import block_rule
from vllm_specopt.cpu.rules.budget import budget_spent, budget_test, kept_prob
from vllm_specopt.cpu.rules.exact import Draft, exact_rule
from vllm_specopt.cpu.rules.sigmoid import Scores, recover_by_scores, sigmoid_test
from vllm_specopt.cpu.rules.typical import typical_test
from vllm_specopt.cpu.sweeps import largest_logit, sweep
from vllm_specopt.cpu.target import Target, draw_target, is_kept
from vllm_specopt.rules import SPENT_UNIT

SURVIVES = np.int64(-1)
BAD_ROW = np.int64(-2)


@jit
def _verify_row(row, draft_row, mode, token, scale, temperature, filters, rule, seed, position, note, scratch):
    """Verify a draft token of a request that samples.

    Args:
        draft_row: The draft's row; not looked at where ``mode`` is ONE_HOT.
        token: -1 for none: a placeholder, or a bonus row.
        filters: Of the request.
        rule: The request's rule, the address of its constants, and what it may spend on a token.
        note: Where to note the row; 0 for nowhere.

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
    if note:
        write_note(note, noted(target, is_filtered, scratch))
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
    method, delta = (plan.rule if not is_greedy and follows_rule(plan, state) else np.int64(EXACT)), 0.0
    if method == BUDGET:
        by_request = plan.rule_requests and plan.has_deltas
        delta = np.float64(read_float(plan.rule_requests, state) if by_request else read_float(plan.constants, 0))
    return method, plan.constants, delta


@jit
def _verify_request(request, plan, scratch):
    """Verify one request; 1 if the row that emitted had no usable logit, -1 if the arguments do not fit together."""
    start, num_rows, state, is_greedy, temperature, scale, seed, filters = request_of(plan, request)
    if num_rows < 1:
        return -1
    num_drafts = num_rows - 1
    if plan.notes:
        clear_notes(plan, start, num_rows)
    rule = _rule_of(plan, state, is_greedy)
    out = out_of(plan, request)
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
                emitted = SURVIVES if emitted == token else emitted
                is_bad = 1 if top == -INF and emitted != SURVIVES else 0
            else:
                position = position_of(plan, start + place, place)
                draft_row = draft_of(plan, request, start + place, state, place)
                note = note_at(plan, start + place)
                emitted, cost = _verify_row(
                    row, draft_row, plan.mode, token, scale, temperature, filters, rule, seed, position, note, scratch
                )
                is_bad = 1 if emitted == BAD_ROW else 0
                spent += cost
            if emitted != SURVIVES:
                break
            write_int(out, place, plan.wide_token_ids, token)
            place += 1
        num_read = np.int64(1) if rule[0] == SIGMOID and not filters[0] else place + 1
        num_read -= 1 if plan.bonus and place == num_drafts else 0
    end_request(plan, request, rule[0], place, emitted, num_drafts, num_read, spent)
    return is_bad


@jit
def end_request(plan, request, method, place, emitted, num_drafts, num_read, spent):
    """Write what follows a request's accepted tokens, which are written, and count it for the rule that it followed.

    Args:
        place: How many were accepted. emitted: The token that follows, below 0 for a row without a usable logit.
    """
    out = out_of(plan, request)
    write_int(out, place, plan.wide_token_ids, max(emitted, np.int64(0)))
    write_int(plan.num_sampled, request, False, place + 1)
    for i in range(place + 1, plan.token_ids_width):
        write_int(out, i, plan.wide_token_ids, np.int64(-1))
    if plan.counters:
        _count(plan.counters + 64 * method, place, num_drafts, num_read, spent)


@jit
def out_of(plan, request):
    """Address of a request's tokens."""
    return plan.token_ids + request * plan.token_ids_stride * (8 if plan.wide_token_ids else 4)


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


@compile_entry
def verify_requests(job):
    """Verify requests of a job (its address) until none is left; threads may share a job."""
    plan, scratch = join(job)
    request = next_request(job)
    while request < plan.num_reqs:
        bad = _verify_request(request, plan, scratch)
        if bad < 0:
            tell_misfit(job, request)
        elif bad > 0:
            fetch_add(job + 8 * JOB_BAD_ROWS, np.int64(bad))
        request = next_request(job)
