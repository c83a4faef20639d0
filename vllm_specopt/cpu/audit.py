"""The audit on a CPU: each row that emitted is read once, and of its tiles those that reach the token once more."""

import struct
from typing import NamedTuple

import numpy as np
import torch
from numba import carray, types
from numba.np.unsafe.ndarray import to_fixed_tuple

from vllm_specopt.cpu.backend import KIND, Memory, address_of, ints_of, memory_per_worker, openmp, workers_for
from vllm_specopt.cpu.cache import compile_entry
from vllm_specopt.cpu.inputs import position_of, row_of, target_of
from vllm_specopt.cpu.lanes import WIDTH, add, largest, load_fp32, splat, total64, where_at_least
from vllm_specopt.cpu.memory import (
    INF,
    ZERO,
    fetch_add,
    jit,
    load,
    pointer,
    read_bool,
    read_float,
    read_int,
    size_of,
    write_float,
    write_int,
)
from vllm_specopt.cpu.noise import AUDIT, draw_uniform
from vllm_specopt.cpu.plan import GREEDY_BELOW, scratch_at
from vllm_specopt.cpu.requests import LOG2_E, WARMEST
from vllm_specopt.cpu.rows import TILE, tile_at, value_at, weigh

BINS, COLUMNS = 32, 34
# A job, in 64-bit words: requests and workers that have begun, 1 + a request that does not fit; then the plan.
JOB_REQUESTS, JOB_WORKERS, JOB_MISFIT, JOB_PLAN = range(4)
NOT_A_TOKEN = np.int64(-1)


class AuditPlan(NamedTuple):
    """Addresses are 0 for what is absent; ``wide`` means int64 rather than int32; strides count elements."""

    memory: int
    memory_per_worker: int
    num_reqs: int
    num_rows: int
    vocab: int
    logits: int
    logits_stride: int
    kind: int
    starts: int
    wide_starts: int
    token_ids: int
    token_ids_stride: int
    token_ids_width: int
    wide_token_ids: int
    num_sampled: int
    wide_num_sampled: int
    temperature: int
    seeds: int
    positions: int
    wide_positions: int
    states: int
    wide_states: int
    num_states: int
    top_k: int
    wide_top_k: int
    top_p: int
    min_p: int
    method: int
    rule_requests: int
    has_deltas: int
    counts: int
    places: int


_JOB = struct.Struct(f"{JOB_PLAN + len(AuditPlan._fields)}q")


@jit
def _at_least(target, logit, scratch):
    """What the logits of a target that are not below a value weigh: in all, and those above it."""
    above, reaching = 0.0, 0.0
    row, frame = target.row, target.frame
    bound, beyond = splat(logit), splat(np.nextafter(logit, INF))
    for start in range(0, row.vocab, TILE):
        # A filter that gathers leaves few tiles, and no maxima of them.
        if target.gathered < 0:
            tops = load_fp32(scratch.left.tops + scratch.left.stride * (start // TILE))
            if largest(tops) < logit and logit > frame.lowest:
                continue
        address, kind = tile_at(row, start, scratch.tile)
        size, tile_above, tile_reaching = size_of(kind), splat(ZERO), splat(ZERO)
        for i in range(0, TILE, WIDTH):
            x = load(address + size * i, kind)
            weights = weigh(x, frame)
            tile_above = add(tile_above, where_at_least(x, beyond, weights))
            tile_reaching = add(tile_reaching, where_at_least(x, bound, weights))
        above += total64(tile_above)
        reaching += total64(tile_reaching)
    return above, reaching


@jit
def _place(plan, index, token, scale, filters, uniform, scratch):
    """A token's place and whether it is possible; a place of -1 for a row without a usable logit."""
    target = target_of(row_of(plan, index), scale, filters, scratch)
    if not target.mass > 0.0:
        return -1.0, False
    if not 0 <= token < plan.vocab:
        return 1.0, False
    logit = value_at(target.source, token)
    if logit == -INF or not logit >= target.threshold:
        return 1.0, False
    above, reaching = _at_least(target, logit, scratch)
    return min((above + uniform * (reaching - above)) / target.mass, 1.0), True


@jit
def _audit_request(request, plan, scratch):
    """Audit one request; False if the arguments do not fit together."""
    start = read_int(plan.starts, request, plan.wide_starts)
    end = read_int(plan.starts, request + 1, plan.wide_starts)
    state = read_int(plan.states, request, plan.wide_states) if plan.states else request
    if start < 0 or end < start or end - start > plan.token_ids_width or end > plan.num_rows:
        return False
    if state < 0 or state >= plan.num_states:
        return False
    temperature = np.float64(read_float(plan.temperature, state))
    scale = np.float32(LOG2_E / min(temperature, WARMEST)) if temperature >= GREEDY_BELOW else ZERO
    top_k = read_int(plan.top_k, state, plan.wide_top_k) if plan.top_k else np.int64(0)
    top_k = top_k if 1 <= top_k < plan.vocab else np.int64(0)
    top_p = np.float64(read_float(plan.top_p, state)) if plan.top_p else 1.0
    min_p = np.float64(read_float(plan.min_p, state)) if plan.min_p else 0.0
    filters = (top_k > 0 or top_p < 1.0 or min_p > 0.0, top_k, top_p, min_p)
    method = plan.method
    if plan.rule_requests:
        if plan.has_deltas:
            follows = read_float(plan.rule_requests, state) > 0.0
        else:
            follows = read_bool(plan.rule_requests, state)
        method = method if follows else np.int64(0)
    counts = plan.counts + 8 * COLUMNS * method
    num_sampled = plan.token_ids_width
    if plan.num_sampled:
        num_sampled = read_int(plan.num_sampled, request, plan.wide_num_sampled)
    seed = read_int(plan.seeds, state, True)
    for place in range(plan.token_ids_width):
        if plan.places:
            write_float(plan.places, request * plan.token_ids_width + place, np.float32(np.nan))
        if place >= end - start or place >= num_sampled:
            continue
        token = read_int(plan.token_ids, request * plan.token_ids_stride + place, plan.wide_token_ids)
        if not plan.num_sampled and token == NOT_A_TOKEN:
            continue
        if not temperature >= GREEDY_BELOW:
            if temperature < 0.0:
                fetch_add(counts + 8 * (BINS + 1), np.int64(1))
            continue
        uniform = draw_uniform(seed, position_of(plan, start + place, np.int64(place)), AUDIT)
        found, is_possible = _place(plan, start + place, token, scale, filters, uniform, scratch)
        if found < 0.0:
            fetch_add(counts + 8 * (BINS + 1), np.int64(1))
            continue
        fetch_add(counts + 8 * min(np.int64(found * BINS), np.int64(BINS - 1)), np.int64(1))
        if not is_possible:
            fetch_add(counts + 8 * BINS, np.int64(1))
        if plan.places:
            write_float(plan.places, request * plan.token_ids_width + place, np.float32(found))
    return True


PLAN_LENGTH = len(AuditPlan._fields)


@compile_entry
def audit_requests(job):
    """Audit requests of a job (its address) until none is left; threads may share a job."""
    plan = AuditPlan(*to_fixed_tuple(carray(pointer(job + 8 * JOB_PLAN, types.int64), PLAN_LENGTH), PLAN_LENGTH))
    worker = fetch_add(job + 8 * JOB_WORKERS, np.int64(1))
    scratch, _ = scratch_at(plan.memory + worker * plan.memory_per_worker, plan.vocab)
    request = fetch_add(job + 8 * JOB_REQUESTS, np.int64(1))
    while request < plan.num_reqs:
        if not _audit_request(request, plan, scratch):
            write_int(job + 8 * JOB_MISFIT, 0, True, 1 + request)
        request = fetch_add(job + 8 * JOB_REQUESTS, np.int64(1))


_run_alone = audit_requests.ctypes


def audit_batch(
    logits: torch.Tensor,  # [num_rows, vocab]
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    token_ids: torch.Tensor,  # [num_reqs, width]
    counts: torch.Tensor,  # [num_methods, COLUMNS]
    *,
    method: int,
    temperature: torch.Tensor,  # [max_reqs]
    seeds: torch.Tensor,  # [max_reqs]
    num_sampled: torch.Tensor | None = None,  # [num_reqs]
    positions: torch.Tensor | None = None,  # [num_rows]
    state_indices: torch.Tensor | None = None,  # [num_reqs]
    top_k: torch.Tensor | None = None,  # [max_reqs]
    top_p: torch.Tensor | None = None,  # [max_reqs]
    min_p: torch.Tensor | None = None,  # [max_reqs]
    rule_requests: torch.Tensor | None = None,  # [max_reqs]
    places: torch.Tensor | None = None,  # [num_reqs, width]
) -> None:
    """Audit on the CPU; arguments and meaning as in :func:`vllm_specopt.audit.audit`.

    Raises:
        ValueError: ``cu_num_logits`` or ``state_indices`` of some request points outside the other arguments.
    """
    num_rows, vocab_size = logits.shape
    num_reqs, width = token_ids.shape
    per_state = (temperature, seeds, top_k, top_p, min_p, rule_requests)
    num_workers = workers_for(num_reqs, num_rows * vocab_size)
    per_worker = memory_per_worker(vocab_size)
    memory = Memory.take(num_workers * per_worker)
    _JOB.pack_into(
        memory.job, 0,
        *(0,) * JOB_PLAN,
        memory.address,
        per_worker,
        num_reqs,
        num_rows,
        vocab_size,
        logits.data_ptr(),
        logits.stride(0),
        KIND[logits.dtype],
        *ints_of(cu_num_logits),
        token_ids.data_ptr(),
        token_ids.stride(0),
        width,
        token_ids.dtype is torch.int64,
        *ints_of(num_sampled),
        address_of(temperature),
        address_of(seeds),
        *ints_of(positions),
        *ints_of(state_indices),
        min(len(each) for each in per_state if each is not None),
        *ints_of(top_k),
        address_of(top_p),
        address_of(min_p),
        method,
        address_of(rule_requests),
        rule_requests is not None and rule_requests.dtype is torch.float32,
        counts.data_ptr(),
        address_of(places),
    )  # fmt: skip
    if num_workers > 1:
        openmp()(audit_requests.address, memory.job_address, num_workers, 0)
    else:
        _run_alone(memory.job_address)
    misfit = int(memory.job[JOB_MISFIT])
    Memory.idle.append(memory)
    if misfit:
        raise ValueError(
            f"request {misfit - 1}: cu_num_logits or state_indices points outside the other arguments "
            "(expected 0 to width rows per request, and indices below max_reqs)"
        )
