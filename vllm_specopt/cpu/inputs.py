"""Where a request's rows, drafts and parameters are."""

from typing import NamedTuple

import numpy as np

from vllm_specopt.cpu.filters import apply_filters
from vllm_specopt.cpu.memory import INF, ZERO, jit, read_bool, read_float, read_int, size_of
from vllm_specopt.cpu.notes import note_at, noted, write_note
from vllm_specopt.cpu.plan import GREEDY_BELOW, LOG2_E, PROBS, WARMEST
from vllm_specopt.cpu.rows import Row
from vllm_specopt.cpu.sweeps import sweep
from vllm_specopt.cpu.target import Target


class Request(NamedTuple):
    """Where a request's rows begin, how many it has, and its parameters; ``num_rows`` is -1 if they do not fit.

    temperature: As given, at most WARMEST. scale: What logits are multiplied by. filters: Whether it filters; top-k, 0
    for none; top-p, 1 for none; min-p, 0 for none.
    """

    start: int
    num_rows: int
    state: int
    is_greedy: bool
    temperature: float
    scale: np.float32
    seed: int
    filters: tuple


@jit
def request_of(plan, request):
    """A request of the batch."""
    start = read_int(plan.starts, request, plan.wide_starts)
    num_rows = read_int(plan.starts, request + 1, plan.wide_starts) - start
    state = read_int(plan.states, request, plan.wide_states) if plan.states else request
    if start < 0 or num_rows < 0 or num_rows > plan.token_ids_width or start + num_rows > plan.num_rows:
        num_rows = np.int64(-1)
    if state < 0 or state >= plan.num_states:
        num_rows, state = np.int64(-1), np.int64(0)
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
    return Request(start, num_rows, state, is_greedy, temperature, scale, seed, filters)


@jit
def follows_rule(plan, state):
    """Whether a request follows the batch's other rule."""
    if not plan.rule_requests:
        return True
    if plan.has_deltas:
        return read_float(plan.rule_requests, state) > 0.0
    return read_bool(plan.rule_requests, state)


@jit
def row_of(plan, index):
    """A row of target logits."""
    address = plan.logits + index * plan.logits_stride * size_of(plan.kind)
    return Row(address, plan.kind, plan.vocab, ZERO, np.int64(0))


@jit
def draft_of(plan, request, index, state, place):
    """The draft's row that belongs to a row of logits."""
    if plan.mode == PROBS:
        offset = (index - request) * plan.draft_stride
    else:
        offset = state * plan.draft_stride + place * plan.draft_position_stride
    address = plan.draft + offset * size_of(plan.draft_kind)
    return Row(address, plan.draft_kind, plan.vocab, ZERO, np.int64(0))


@jit
def token_of(plan, request, index):
    """The draft token that a row verifies; -1 for a placeholder or an id outside the vocabulary."""
    token = read_int(plan.drafts, index - request if plan.is_compact else index + 1, plan.wide_drafts)
    return token if 0 <= token < plan.vocab else np.int64(-1)


@jit
def position_of(plan, index, place):
    """Absolute position of a row."""
    return read_int(plan.positions, index, plan.wide_positions) if plan.positions else place


@jit
def target_at(plan, index, scale, filters, scratch):
    """A row of the batch after temperature and filters, noted where that is wanted."""
    target = target_of(row_of(plan, index), scale, filters, scratch)
    if plan.notes and target.mass > 0.0:
        write_note(note_at(plan, index), noted(target, filters[0], scratch))
    return target


@jit
def target_of(row, scale, filters, scratch):
    """A row after temperature and filters; its mass is 0 where it has no usable logit.

    Args:
        filters: Of the request.
    """
    is_filtered, top_k, top_p, min_p = filters
    row, frame, mass = sweep(row, scale, scratch.left, scratch.tile)
    if is_filtered and mass > 0.0:
        return apply_filters(row, frame, mass, top_k, top_p, min_p, scratch)
    return Target(row, frame, mass, -INF, row, -INF, np.int64(-1))
