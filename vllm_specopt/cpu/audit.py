"""The audit on a CPU: of each row that emitted, the tiles are read that may hold a more probable token.

What else it takes, the verification of the step has noted. A row without a note is swept first.
"""

import numpy as np
import torch

from vllm_specopt.cpu.backend import address_of, common_of, run
from vllm_specopt.cpu.cache import compile_entry
from vllm_specopt.cpu.inputs import follows_rule, position_of, request_of, row_of, target_of
from vllm_specopt.cpu.job import join, next_request, tell_misfit
from vllm_specopt.cpu.lanes import WIDTH, add, at_least, splat, total64, where_at_least
from vllm_specopt.cpu.memory import INF, ZERO, fetch_add, jit, load, read_float, read_int, size_of, write_float
from vllm_specopt.cpu.noise import AUDIT, draw_uniform
from vllm_specopt.cpu.notes import has_note, note_at, noted, read_note
from vllm_specopt.cpu.rows import TILE, tile_at, value_at, weigh
from vllm_specopt.cpu.thresholds import GROUP, largest_of_group

BINS, COLUMNS = 32, 34
NOT_A_TOKEN = np.int64(-1)


@jit
def _at_least(noted, logit, scratch):
    """What the logits of a row that are not below a value weigh: in all, and those above it."""
    above, reaching = 0.0, 0.0
    bound, beyond = splat(logit), splat(np.nextafter(logit, INF))
    for start in range(0, noted.row.vocab, TILE):
        if read_float(noted.tops, start // TILE) < logit:
            continue
        address, kind = tile_at(noted.row, start, scratch.tile)
        size, tile_above, tile_reaching = size_of(kind), splat(ZERO), splat(ZERO)
        for group in range(0, TILE, GROUP):
            if at_least(largest_of_group(address + size * group, kind), bound) == 0:
                continue
            for i in range(group, group + GROUP, WIDTH):
                x = load(address + size * i, kind)
                weights = weigh(x, noted.frame)
                tile_above = add(tile_above, where_at_least(x, beyond, weights))
                tile_reaching = add(tile_reaching, where_at_least(x, bound, weights))
        above += total64(tile_above)
        reaching += total64(tile_reaching)
    return above, reaching


@jit
def _noted_row(plan, index, scale, filters, scratch):
    """A row by its note, or swept."""
    row, note = row_of(plan, index), note_at(plan, index)
    if has_note(note):
        return read_note(note, row, scale)
    return noted(target_of(row, scale, filters, scratch), filters[0], scratch)


@jit
def _place(row, token, uniform, scratch):
    """A token's place in a noted row, and whether it is possible."""
    if not 0 <= token < row.row.vocab:
        return 1.0, False
    logit = value_at(row.row, token)
    if logit == -INF or not logit >= row.threshold:
        return 1.0, False
    above, reaching = _at_least(row, logit, scratch)
    return min((above + uniform * (reaching - above)) / row.mass, 1.0), True


@jit
def _audit_request(request, plan, scratch):
    """Audit one request; False if the arguments do not fit together."""
    start, num_rows, state, is_greedy, temperature, scale, seed, filters = request_of(plan, request)
    if num_rows < 0:
        return False
    counts = plan.counters + 8 * COLUMNS * (plan.rule if follows_rule(plan, state) else np.int64(0))
    num_sampled = plan.token_ids_width
    if plan.num_sampled:
        num_sampled = read_int(plan.num_sampled, request, plan.wide_num_sampled)
    for place in range(plan.token_ids_width):
        out = request * plan.token_ids_width + place
        if plan.places:
            write_float(plan.places, out, np.float32(np.nan))
        if place >= num_rows or place >= num_sampled:
            continue
        token = read_int(plan.token_ids, request * plan.token_ids_stride + place, plan.wide_token_ids)
        if not plan.num_sampled and token == NOT_A_TOKEN:
            continue
        if is_greedy:
            if temperature < 0.0:
                fetch_add(counts + 8 * (BINS + 1), np.int64(1))
            continue
        row = _noted_row(plan, start + place, scale, filters, scratch)
        if not row.mass > 0.0:
            fetch_add(counts + 8 * (BINS + 1), np.int64(1))
            continue
        uniform = draw_uniform(seed, position_of(plan, start + place, np.int64(place)), AUDIT)
        found, is_possible = _place(row, token, uniform, scratch)
        fetch_add(counts + 8 * min(np.int64(found * BINS), np.int64(BINS - 1)), np.int64(1))
        if not is_possible:
            fetch_add(counts + 8 * BINS, np.int64(1))
        if plan.places:
            write_float(plan.places, out, np.float32(found))
    return True


@compile_entry
def audit_requests(job):
    """Audit requests of a job (its address) until none is left; threads may share a job."""
    plan, scratch = join(job)
    request = next_request(job)
    while request < plan.num_reqs:
        if not _audit_request(request, plan, scratch):
            tell_misfit(job, request)
        request = next_request(job)


def audit_batch(
    logits: torch.Tensor,  # [num_rows, vocab]
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    token_ids: torch.Tensor,  # [num_reqs, width]
    counts: torch.Tensor,  # [num_methods, COLUMNS]
    *,
    method: int,
    num_sampled: torch.Tensor | None = None,  # [num_reqs]
    places: torch.Tensor | None = None,  # [num_reqs, width]
    notes: torch.Tensor | None = None,  # [num_rows, words of a note]
    **parameters: torch.Tensor | None,
) -> None:
    """Audit on the CPU; arguments and meaning as in :func:`vllm_specopt.audit.audit`.

    Raises:
        ValueError: ``cu_num_logits`` or ``state_indices`` of some request points outside the other arguments.
    """
    common = common_of(
        logits, cu_num_logits, token_ids, num_sampled, logits.shape[1], method, counts, notes, **parameters
    )
    run(audit_requests, common, (address_of(places),), "0 to width")
