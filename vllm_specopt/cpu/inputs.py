"""Where a request's rows, drafts and parameters are."""

import numpy as np

from vllm_specopt.cpu.filters import apply_filters
from vllm_specopt.cpu.memory import INF, ZERO, jit, read_int, size_of
from vllm_specopt.cpu.plan import PROBS
from vllm_specopt.cpu.rows import Row
from vllm_specopt.cpu.sweeps import sweep
from vllm_specopt.cpu.target import Target


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
def target_of(row, scale, filters, scratch):
    """A row after temperature and filters; its mass is 0 where it has no usable logit.

    Args:
        filters: Whether the request filters; top-k, 0 for none; top-p, 1 for none; min-p, 0 for none.
    """
    is_filtered, top_k, top_p, min_p = filters
    row, frame, mass = sweep(row, scale, scratch.left, scratch.tile)
    if is_filtered and mass > 0.0:
        return apply_filters(row, frame, mass, top_k, top_p, min_p, scratch)
    return Target(row, frame, mass, -INF, row, -INF, np.int64(-1))
