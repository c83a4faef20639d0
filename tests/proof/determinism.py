"""A seeded request's tokens are its own: they change neither with anything around it nor with one-hot drafts."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from proof.fuzz import build, random_plan
from vllm_specopt.testing import LOGITS, NO_DRAFT, Batch
from vllm_specopt.verify import verify


def rearranged(
    batch: Batch,
    order: list[int],
    *,
    extra_width: int = 0,
    extra_states: int = 0,
    pad: int = 0,
    by_row: bool | None = None,
) -> Batch:
    """The same requests in another batch: a selection in another order, with other padding, tables and layout."""
    starts = batch.cu_num_logits.tolist()
    rows = torch.tensor([row for req in order for row in range(starts[req], starts[req + 1])])
    drafts_of = [row for req in order for row in range(starts[req], starts[req + 1] - 1)]
    req_of_row = torch.repeat_interleave(torch.arange(batch.num_reqs), batch.cu_num_logits.diff().long())
    compact = batch.draft_token_ids.shape[0] != batch.logits.shape[0]
    places = torch.tensor([row - int(req_of_row[row]) if compact else row + 1 for row in drafts_of], dtype=torch.long)
    tokens = batch.draft_token_ids[places]
    counts = torch.tensor([starts[req + 1] - starts[req] for req in order])
    if (not compact) if by_row is None else by_row:
        by_row_ids = torch.zeros(len(rows), dtype=tokens.dtype)
        last = counts.cumsum(0) - 1
        is_draft = torch.ones(len(rows), dtype=torch.bool)
        is_draft[last] = False
        by_row_ids[is_draft.nonzero()[:, 0] + 1] = tokens
        tokens = by_row_ids
    kwargs = dict(batch.kwargs)
    old = kwargs.pop("state_indices", None)
    state = torch.tensor(order) if old is None else old[order].long()
    extra = torch.arange(extra_states, extra_states + len(order)).flip(0)
    for name in ("temperature", "seeds", "top_k", "top_p", "min_p", "draft_logits"):
        if kwargs.get(name) is None:
            continue
        table = kwargs[name]
        wide = torch.zeros(extra_states + len(order), *table.shape[1:], dtype=table.dtype)
        if name == "draft_logits":
            shape = (wide.shape[0], table.shape[1] + extra_width, table.shape[2] + pad)
            wide = torch.full(shape, float("nan"), dtype=table.dtype)[..., : table.shape[2]]
            wide[extra, : table.shape[1]] = table[state]
        else:
            wide[extra] = table[state]
        kwargs[name] = wide
    kwargs["state_indices"] = extra.to(torch.int32)
    if kwargs.get("positions") is not None:
        kwargs["positions"] = kwargs["positions"][rows]
    if kwargs.get("draft_probs") is not None:
        kwargs["draft_probs"] = kwargs["draft_probs"][[row - int(req_of_row[row]) for row in drafts_of]]
    if kwargs.get("bonus_token_ids") is not None:
        kwargs["bonus_token_ids"] = kwargs["bonus_token_ids"][order]
    vocab = batch.logits.shape[1]
    logits = torch.full((len(rows), vocab + pad), float("nan"), dtype=batch.logits.dtype)[:, :vocab]
    logits[:] = batch.logits[rows]
    cu = torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]).to(batch.cu_num_logits.dtype)
    return Batch(logits, cu, tokens, min(128, batch.max_num_draft_tokens + extra_width), kwargs)


def _tokens(batch: Batch, backend: str, device: str) -> list[list[int]]:
    on_device = batch.to(device)
    verified = verify(*on_device.args(), **on_device.kwargs, backend=backend)
    return [ids[:count] for ids, count in zip(verified.token_ids.tolist(), verified.num_sampled.tolist(), strict=True)]


def _alone(batch: Batch, run: Callable) -> list[list[int]]:
    return [run(rearranged(batch, [req]))[0] for req in range(batch.num_reqs)]


def _reversed(batch: Batch, run: Callable) -> list[list[int]]:
    return run(rearranged(batch, list(range(batch.num_reqs))[::-1]))[::-1]


def _padded(batch: Batch, run: Callable) -> list[list[int]]:
    return run(rearranged(batch, list(range(batch.num_reqs)), extra_width=7, extra_states=5, pad=37))


def _mates(batch: Batch, run: Callable) -> list[list[int]]:
    order = list(range(batch.num_reqs))
    return run(rearranged(batch, order + order + order[:1], pad=3))[len(order) : 2 * len(order)]


def _other_layout(batch: Batch, run: Callable) -> list[list[int]]:
    compact = batch.draft_token_ids.shape[0] != batch.logits.shape[0]
    return run(rearranged(batch, list(range(batch.num_reqs)), by_row=compact))


CHANGES = {
    "second run": lambda batch, run: run(batch),
    "alone": _alone,
    "reversed order": _reversed,
    "more batch mates": _mates,
    "padding, table size, row stride": _padded,
    "draft ids by row or compact": _other_layout,
}


def _one_by_one(batch: Batch) -> Batch:
    """Every row as a request without drafts: the tokens of a server that does not speculate."""
    num_rows, kwargs = batch.logits.shape[0], dict(batch.kwargs)
    req_of_row = torch.repeat_interleave(torch.arange(batch.num_reqs), batch.cu_num_logits.diff().long())
    state = kwargs.get("state_indices")
    kwargs["state_indices"] = req_of_row if state is None else state[req_of_row]
    if kwargs.get("positions") is None:
        kwargs["positions"] = torch.arange(num_rows) - batch.cu_num_logits[req_of_row].long()
    return Batch(batch.logits, torch.arange(num_rows + 1), torch.zeros(0, dtype=torch.long), 0, kwargs)


def _step(plain: Batch, starts: list[int], counts: list[int], drafts: list[int]) -> Batch:
    """One step of requests that read so many consecutive rows each, given their drafts."""
    rows = torch.tensor(
        [row for start, count in zip(starts, counts, strict=True) for row in range(start, start + count)]
    )
    kwargs = plain.kwargs | {
        "positions": plain.kwargs["positions"][rows],
        "state_indices": plain.kwargs["state_indices"][torch.tensor(starts)],
    }
    cu = torch.tensor([0, *counts]).cumsum(0)
    return Batch(plain.logits[rows], cu, torch.tensor(drafts, dtype=torch.long), max(counts) - 1, kwargs)


def _mixed(rng: np.random.Generator, right: int, vocab: int) -> int:
    return DRAFTS[list(DRAFTS)[rng.integers(4)]](rng, right, vocab)


DRAFTS = {
    "right drafts": lambda rng, right, vocab: right,
    "wrong drafts": lambda rng, right, vocab: (right + 1) % vocab,
    "any drafts": lambda rng, right, vocab: int(rng.integers(vocab)),
    "placeholders": lambda rng, right, vocab: int(rng.choice([-1, -5, vocab, vocab + 7])),
    "mixed drafts": _mixed,
}
"""One-hot drafts, given the token that the row emits without any."""


@dataclass
class DeterminismResult:
    """batches compared, and requests compared (each once per change)."""

    batches: int = 0
    requests: int = 0


def check_batches(change: str, seed: int, indices: range, backend: str, device: str) -> DeterminismResult:
    """Apply one of CHANGES to random batches and compare every request's tokens.

    Raises:
        AssertionError: A request's tokens changed.
    """
    result = DeterminismResult()
    for index in indices:
        plan = replace(random_plan(seed, index, backend), far=False, extra_width=0)
        if not any(plan.num_drafts) and plan.draft == LOGITS:
            plan = replace(plan, draft="one-hot")
        batch = build(plan)
        expected = _tokens(batch, backend, device)
        got = CHANGES[change](batch, lambda b: _tokens(b, backend, device))
        assert got == expected, f"tokens changed with {change}: seed {seed}, batch {index}, {plan}"
        result.batches += 1
        result.requests += batch.num_reqs
    return result


def check_drafts(kind: str, seed: int, indices: range, backend: str, device: str) -> DeterminismResult:
    """Requests that speculate with one of DRAFTS, step by step, emit what they emit without speculation.

    Each request has fixed logits for its positions. Without drafts they are drawn from one by one; then in steps of up
    to 8 rows, each beginning where the last one ended.

    Raises:
        AssertionError: A token differs, or a draft that is the row's own token was rejected.
    """
    result = DeterminismResult()
    for index in indices:
        rng = np.random.default_rng([5, seed, index])
        plan = replace(random_plan(seed, index, backend), far=False, draft=NO_DRAFT, bonus=False, greedy="mixed")
        plan = replace(plan, draft_vocab=plan.vocab, num_drafts=tuple(int(k) for k in rng.integers(1, 7, 2)))
        batch = build(plan)
        plain = _one_by_one(batch)
        expected = [ids[0] for ids in _tokens(plain, backend, device)]
        place, ends = batch.cu_num_logits.tolist()[:-1], batch.cu_num_logits.tolist()[1:]
        while running := [req for req, end in enumerate(ends) if place[req] < end]:
            starts = [place[req] for req in running]
            counts = [int(rng.integers(1, min(8, ends[req] - place[req]) + 1)) for req in running]
            drafts = [
                DRAFTS[kind](rng, expected[row], plan.vocab)
                for start, count in zip(starts, counts, strict=True)
                for row in range(start, start + count - 1)
            ]
            emitted = _tokens(_step(plain, starts, counts, drafts), backend, device)
            for req, start, ids in zip(running, starts, emitted, strict=True):
                assert ids == expected[start : start + len(ids)], (
                    f"tokens changed with {kind}: seed {seed}, batch {index}, request {req}, {plan}"
                )
                if kind == "right drafts" and not plan.poison:
                    assert len(ids) == counts[running.index(req)], f"a right draft was rejected: batch {index}, {plan}"
                place[req] += len(ids)
        result.batches += 1
        result.requests += batch.num_reqs
    return result


def check_threads(seed: int, indices: range) -> DeterminismResult:
    """The CPU backend with one, two, three and five threads, on rows large enough that the work is split.

    Raises:
        AssertionError: A request's tokens changed.
    """
    result, threads = DeterminismResult(), torch.get_num_threads()
    try:
        for index in indices:
            plan = replace(
                random_plan(seed, index, "cpu"), vocab=20_011, draft_vocab=20_011, num_drafts=(2, 3, 0, 4), far=False
            )
            batch, outcomes = build(plan), []
            for count in (1, 2, 3, 5):
                torch.set_num_threads(count)
                outcomes.append(_tokens(batch, "cpu", "cpu"))
            assert all(o == outcomes[0] for o in outcomes), f"tokens changed with threads: seed {seed}, batch {index}"
            result.batches += 1
            result.requests += batch.num_reqs
    finally:
        torch.set_num_threads(threads)
    return result
