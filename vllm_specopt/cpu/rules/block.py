"""Block verification (Sun et al. 2403.10444): the longest prefix that may stand, judged as a whole. Lossless.

c_0 = 1, c_i = min(1, c_{i-1} target_i(x_i) / draft_i(x_i)). A prefix of i of k tokens may stand where u_i <= h_i, with
h_k = c_k and h_i = Z_i / (Z_i + 1 - c_i) before it, Z_i the sum of the weights (c_i target_{i+1} - draft_{i+1})+ that
the token after it would have. As h_i <= c_i, and h_i = 1 where c_i = 1, most Z_i are never computed; and rows behind a
prefix that no later one can beat are not read.
"""

import numpy as np

from vllm_specopt.cpu.inputs import draft_of, position_of, target_at, token_of
from vllm_specopt.cpu.memory import inline, jit, read
from vllm_specopt.cpu.noise import DRAW, RESIDUAL, draw_uniform, prefix_uniform
from vllm_specopt.cpu.plan import LOGITS, PROBS
from vllm_specopt.cpu.rules.exact import Draft, probabilities, rest_of, sum_residual, weigh_residual
from vllm_specopt.cpu.sweeps import sweep
from vllm_specopt.cpu.target import draw_target, picking_by, weighing_by

UNKNOWN = np.int64(-3)
_total_of, _pick = weighing_by(sum_residual), picking_by(weigh_residual)


@jit
def _pair_of(plan, request, start, state, place, scale, filters, scratch):
    """Target and draft at a place of a request; the target's mass is 0 where it has no usable logit."""
    target = target_at(plan, start + place, scale, filters, scratch)
    row = draft_of(plan, request, start + place, state, place)
    draft = Draft(plan.mode, row, target.frame, 1.0)
    if plan.mode == LOGITS:
        row, frame, mass = sweep(row, scale, scratch.draft_left, scratch.draft_tile)
        draft = Draft(plan.mode, row, frame, mass)
    return target, draft


@jit
def _uniform(plan, start, length, seed):
    """u_i of a prefix of ``length`` >= 1 tokens."""
    return prefix_uniform(seed, position_of(plan, start, np.int64(0)), length)


@inline
def may_stand(carry, mass, uniform):
    """u_i <= h_i of a prefix with c_i < 1; ``mass`` is Z_i."""
    return uniform * (mass + 1.0 - carry) <= mass


@jit
def _is_settled(plan, request, start, state, length, num_tokens, carry, seed):
    """Whether no prefix of ``length`` tokens or more can stand: a target's probability is at most 1."""
    if carry == 0.0:
        return True
    if plan.mode != PROBS:
        return False
    for more in range(length, num_tokens + 1):
        if _uniform(plan, start, more, seed) <= carry:
            return False
        if more < num_tokens:
            row = draft_of(plan, request, start + more, state, more)
            draft_prob = np.float64(read(row.address, row.kind, token_of(plan, request, start + more)))
            carry = min(1.0, carry / draft_prob) if draft_prob > 0.0 else 0.0
    return True


@jit
def _recover(plan, request, start, state, kept, scale, filters, seed, last, scratch):
    """The token after a prefix that stands for certain, by the residual of its rows; -2 if it has no usable logit.

    last: Target and draft there. What a filter gathered of them is gone.
    """
    target, draft = last
    if not target.mass > 0.0:
        return np.int64(-2)
    uniform = draw_uniform(seed, position_of(plan, start + kept, kept), RESIDUAL)
    if target.gathered >= 0:
        target, draft = _pair_of(plan, request, start, state, kept, scale, filters, scratch)
    rest = rest_of(target, draft, 1.0, scratch)
    mass = _total_of(target, rest, scratch)
    if mass > 0.0:
        return _pick(target, rest, mass, uniform, scratch)
    target, draft = _pair_of(plan, request, start, state, kept, scale, filters, scratch)
    return draw_target(target, uniform, scratch)


@jit
def block_rule(plan, request, start, num_drafts, state, scale, filters, seed, scratch):
    """Verify the draft tokens of a request that samples.

    Returns:
        How many are kept; the token that follows, -1 for a given bonus token, -2 for a row without a usable logit; and
        the number of rows read.
    """
    num_tokens = np.int64(0)
    while num_tokens < num_drafts and token_of(plan, request, start + num_tokens) >= 0:
        num_tokens += 1
    kept, token, carry, length = np.int64(0), UNKNOWN, 1.0, np.int64(0)
    while length < num_tokens:
        target, draft = _pair_of(plan, request, start, state, length, scale, filters, scratch)
        has_mass = target.mass > 0.0
        target_prob, draft_prob = 0.0, 0.0
        if has_mass:
            target_prob, draft_prob = probabilities(target, draft, token_of(plan, request, start + length))
        uniform = _uniform(plan, start, length, seed)
        # What the draft token takes away from Z_i, and so h_i, is known before the rows are read again.
        most = carry - min(carry * target_prob, draft_prob)
        if carry >= 1.0:
            kept, token = length, UNKNOWN
        elif has_mass and may_stand(carry, most, uniform):
            rest = rest_of(target, draft, carry, scratch)
            mass = _total_of(target, rest, scratch)
            if mass > 0.0 and may_stand(carry, mass, uniform):
                kept = length
                uniform = draw_uniform(seed, position_of(plan, start + kept, kept), RESIDUAL)
                token = _pick(target, rest, mass, uniform, scratch)
        if kept == length and token == UNKNOWN:
            last = target, draft
        carry = min(1.0, carry * target_prob / draft_prob) if draft_prob > 0.0 else 0.0
        length += 1
        if _is_settled(plan, request, start, state, length, num_tokens, carry, seed):
            carry = 0.0
            break
    num_read = length
    if carry > 0.0 and (num_tokens == 0 or _uniform(plan, start, num_tokens, seed) <= carry):
        kept = num_tokens
        if kept == num_drafts and plan.bonus:
            return kept, np.int64(-1), num_read
        target = target_at(plan, start + kept, scale, filters, scratch)
        num_read = kept + 1
        if not target.mass > 0.0:
            return kept, np.int64(-2), num_read
        uniform = draw_uniform(seed, position_of(plan, start + kept, kept), DRAW)
        return kept, draw_target(target, uniform, scratch), num_read
    if token == UNKNOWN:
        token = _recover(plan, request, start, state, kept, scale, filters, seed, last, scratch)
    return kept, token, num_read
