"""Random batches of every shape and poison the contract allows, against the reference.

A batch is built from a :class:`Plan` alone; ``random_plan(seed, index)`` makes the plans of a long run, so that these
two numbers reproduce a batch.
"""

import mmap
from dataclasses import dataclass

import numpy as np
import torch

from vllm_specopt.testing import LOGITS, NO_DRAFT, PROBS, Batch, assert_matches_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX = (torch.int32, torch.int64)
TILES = {"cpu": 512, "triton": 4096}
FAR = 2**31 + 2**20
"""Elements of the storage in which far rows lie: the last rows start beyond 2^31."""
STRANGE_IDS = (-1, -1, -7, -(2**31), 2**31 - 1)


@dataclass(frozen=True)
class Plan:
    """What a batch looks like; ``value_seed`` gives the values.

    num_drafts: per request. draft_vocab: width of the draft distribution. pad, skip: unused columns after and before
    each row. spread: standard deviation of the logits over the temperature, in nats; ties: round them to halves.
    poison: share of elements that become NaN or infinite, and of rows that become wholly so. improper: draft
    probabilities that are scaled, negative, NaN, infinite or zero. same: the draft's distribution is the target's. far:
    rows beyond 2^31 elements. by_row: draft ids by row. state: parameters in a larger, permuted table. filters: which.
    """

    value_seed: int
    num_drafts: tuple[int, ...]
    vocab: int
    draft_vocab: int
    dtype: torch.dtype
    draft_dtype: torch.dtype
    draft: str
    spread: float
    ties: bool = False
    poison: float = 0.0
    improper: bool = False
    same: bool = False
    far: bool = False
    by_row: bool = False
    state: bool = False
    positions: bool = True
    greedy: str = "mixed"
    bonus: bool = False
    filters: tuple[str, ...] = ()
    pad: int = 0
    skip: int = 0
    index_bits: int = 0
    extra_width: int = 0


def _choice(rng, options, weights=None):
    weights = None if weights is None else np.array(weights) / sum(weights)
    return options[rng.choice(len(options), p=weights)]


def random_plan(seed: int, index: int, backend: str) -> Plan:
    """Plan of batch ``index`` of the run ``seed``; mostly small, some large."""
    rng = np.random.default_rng([3, seed, index])
    tile = TILES[backend]
    sizes = ((1, 4), (5, 40), (41, 400), (tile - 2, tile + 2), (2 * tile - 1, 2 * tile + 40), (30_000, 60_000))
    low, high = _choice(rng, sizes, (35, 40, 19, 4, 1.9, 0.1 if backend == "cpu" else 0))
    vocab = int(rng.integers(low, high + 1))
    few = vocab > 5000
    slow = backend == "triton" and not torch.cuda.is_available()
    requests, drafts = (
        ((60, 35, 4.6, 0.4), (6, 50, 35, 8, 0.8, 0.2)) if slow else ((40, 35, 22, 3), (6, 20, 45, 23, 5, 1))
    )
    num_reqs = int(_choice(rng, (1, 2, 3, rng.integers(4, 24)), (*requests[:3], 0 if few else requests[3])))
    most = int(_choice(rng, (0, 1, 3, 5, 16, 128), (*drafts[:5], 0 if few else drafts[5])))
    num_drafts = rng.integers(0, most + 1, num_reqs)
    if rng.random() < 0.3:
        num_drafts[:] = most
    draft_vocab = int(_choice(rng, (vocab, max(1, vocab - int(rng.integers(1, 9))), vocab + 5), (8, 1, 1)))
    dtype = _choice(rng, DTYPES)
    poisoned = rng.random() < 0.3
    return Plan(
        value_seed=int(rng.integers(2**62)),
        num_drafts=tuple(int(k) for k in num_drafts),
        vocab=vocab,
        draft_vocab=draft_vocab,
        dtype=dtype,
        draft_dtype=_choice(rng, (dtype, *DTYPES)),
        draft=_choice(rng, (NO_DRAFT, PROBS, LOGITS)),
        spread=float(_choice(rng, (0.0, 0.3, 1.0, 2.5, 6.0), (1, 3, 4, 4, 2))),
        ties=bool(rng.random() < 0.25),
        poison=float(_choice(rng, (0.02, 0.3, 0.9))) if poisoned else 0.0,
        improper=bool(rng.random() < 0.3),
        same=bool(rng.random() < 0.15),
        far=bool(rng.random() < 0.02),
        by_row=bool(rng.random() < 0.4),
        state=bool(rng.random() < 0.5),
        positions=bool(rng.random() < 0.8),
        greedy=_choice(rng, ("mixed", "none", "all", "no temperature"), (50, 35, 10, 5)),
        bonus=bool(rng.random() < 0.1),
        filters=tuple(name for name in ("top_k", "top_p", "min_p") if rng.random() < 0.3),
        pad=int(_choice(rng, (0, 1, 24))),
        skip=int(_choice(rng, (0, 0, 3))),
        index_bits=int(rng.integers(64)),
        extra_width=int(_choice(rng, (0, 1, 9), (8, 1, 1))),
    )


_far_memory: dict[str, mmap.mmap] = {}


def _far_rows(rows: torch.Tensor) -> torch.Tensor:
    """A copy of a matrix whose last rows start beyond 2^31 elements; the pages between are never touched."""
    if "pages" not in _far_memory:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        _far_memory["pages"] = mmap.mmap(-1, 4 * FAR, flags=flags)
    pages = _far_memory["pages"]
    pages.madvise(mmap.MADV_DONTNEED)
    storage = torch.frombuffer(pages, dtype=rows.dtype, count=FAR)
    stride = (FAR - rows.shape[1]) // max(1, rows.shape[0] - 1)
    view = torch.as_strided(storage, rows.shape, (stride, 1))
    return view.copy_(rows)


def _spoil(rng, values: np.ndarray, share: float) -> None:
    """Write NaN and infinities over some elements, and over whole rows."""
    special = np.array([np.nan, np.inf, -np.inf, -np.inf, np.nan, -np.inf], np.float32)
    rows = values.reshape(-1, values.shape[-1])
    for row in rows:
        kind = rng.random()
        if kind < 0.1:
            row[:] = special[rng.integers(3)]
        elif kind < 0.6:
            hit = rng.random(len(row)) < share
            row[hit] = special[rng.integers(0, 6, hit.sum())] if kind < 0.35 else special[rng.integers(6)]


def _spoil_probs(rng, probs: np.ndarray) -> None:
    probs *= rng.random((len(probs), 1)) * 3
    for value, share in ((0.0, 0.2), (-1.0, 0.1), (np.nan, 0.1), (np.inf, 0.02), (7.0, 0.05)):
        if rng.random() < 0.5:
            probs[rng.random(probs.shape) < share] = value
    probs[rng.random(len(probs)) < 0.1] = 0.0


def _softmax(rows: np.ndarray) -> np.ndarray:
    rows = np.nan_to_num(rows, nan=-1e30, posinf=60.0, neginf=-1e30)
    weights = np.exp(rows - rows.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def build(plan: Plan) -> Batch:
    """The batch of a plan."""
    rng = np.random.default_rng(plan.value_seed)
    counts = np.array(plan.num_drafts)
    num_reqs, num_rows = len(counts), int(counts.sum()) + len(counts)
    starts = np.concatenate([[0], (counts + 1).cumsum()])
    req_of_row = np.repeat(np.arange(num_reqs), counts + 1)
    is_draft = np.ones(num_rows, bool)
    is_draft[starts[1:] - 1] = False
    max_reqs = num_reqs + (3 if plan.state else 0)
    state = rng.permutation(max_reqs)[:num_reqs]
    bits = iter(format(plan.index_bits, "06b"))

    def index(values) -> torch.Tensor:
        return torch.from_numpy(np.asarray(values, np.int64)).to(INDEX[int(next(bits))])

    pool = {"mixed": (0.0, 0.0, 1e-6, 0.3, 1.0, 1.7, 100.0), "none": (0.3, 0.7, 1.0, 1.7)}.get(plan.greedy, (0.0,))
    temperature = np.full(max_reqs, np.nan, np.float32)
    temperature[state] = rng.choice(np.array(pool, np.float32), num_reqs)
    scale = np.where(temperature > 1e-5, temperature, 1.0)[state][req_of_row][:, None]
    nats = (rng.standard_normal((num_rows, plan.vocab)) * plan.spread).astype(np.float32)
    if plan.ties:
        nats = np.round(nats * 2) / 2
    values = (nats * scale).astype(np.float32)
    if plan.poison:
        _spoil(rng, values, plan.poison)
    narrow = min(plan.vocab, plan.draft_vocab)
    near = np.zeros((num_rows, plan.draft_vocab), np.float32)
    near[:, :narrow] = nats[:, :narrow]
    if not plan.same:
        near += 0.7 * rng.standard_normal(near.shape).astype(np.float32)

    logits = torch.empty(num_rows, plan.skip + plan.vocab + plan.pad, dtype=plan.dtype)
    logits = logits[:, plan.skip : plan.skip + plan.vocab].copy_(torch.from_numpy(values))
    width = int(counts.max()) + plan.extra_width if plan.draft != LOGITS else int(counts.max())
    width = min(width, 128)
    # Half of the drafts are the target's favourite, most of the others likely under the draft.
    tokens = np.where(rng.random(num_rows) < 0.5, nats[:, :narrow].argmax(1), 0)
    gumbel = -np.log(rng.exponential(size=(num_rows, narrow)) + 1e-30)
    tokens = np.where(rng.random(num_rows) < 0.5, tokens, (near[:, :narrow] + gumbel).argmax(1))
    strange = rng.random(num_rows) < 0.08
    ids = np.array([*STRANGE_IDS, plan.vocab, plan.vocab + 3, narrow])
    tokens[strange] = ids[rng.integers(len(ids), size=strange.sum())]
    kwargs = {}
    if plan.draft == PROBS:
        probs = _softmax(near)[is_draft]
        if plan.improper:
            _spoil_probs(rng, probs)
        # Allocated by torch: an empty array's tensor would have stride 0.
        kwargs["draft_probs"] = torch.empty(probs.shape, dtype=plan.draft_dtype).copy_(torch.from_numpy(probs))
    elif plan.draft == LOGITS:
        draft_values = near * scale
        if plan.poison and plan.improper:
            _spoil(rng, draft_values, plan.poison)
        table = torch.full((max_reqs, max(width, 1), plan.draft_vocab + plan.pad), float("nan"))
        for row in is_draft.nonzero()[0]:
            req = req_of_row[row]
            entry = state[req] if plan.state else req
            table[entry, row - starts[req], : plan.draft_vocab] = torch.from_numpy(draft_values[row])
        kwargs["draft_logits"] = table.to(plan.draft_dtype)[:, :, : plan.draft_vocab]
    if plan.far:
        logits = _far_rows(logits)
    if plan.by_row:
        by_row = rng.integers(0, plan.vocab, num_rows)
        by_row[is_draft.nonzero()[0] + 1] = tokens[is_draft]
        tokens = by_row
    else:
        tokens = tokens[is_draft]
    if not plan.state:
        temperature = temperature[state]
    if plan.greedy != "no temperature":
        kwargs["temperature"] = torch.from_numpy(temperature)
        kwargs["seeds"] = torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, max_reqs))
    if plan.state:
        kwargs["state_indices"] = index(state)
    if plan.positions:
        positions = index(rng.integers(0, 2**31 - 1, num_rows))
        kwargs["positions"] = positions + 2**40 if positions.dtype == torch.int64 else positions
    if "top_k" in plan.filters:
        kwargs["top_k"] = index(rng.choice([-1, 0, 1, 2, 7, 50, plan.vocab, plan.vocab + 9], max_reqs))
    if "top_p" in plan.filters:
        kwargs["top_p"] = torch.from_numpy(rng.choice(np.array([1, 0.95, 0.5, 0.01, 0, 1.5], np.float32), max_reqs))
    if "min_p" in plan.filters:
        kwargs["min_p"] = torch.from_numpy(rng.choice(np.array([0, 0.1, 0.013, 1.0, -1], np.float32), max_reqs))
    if plan.bonus:
        kwargs["bonus_token_ids"] = index(rng.integers(0, plan.vocab, num_reqs))
    kwargs["bad_row_counter"] = torch.zeros(1, dtype=torch.int64)
    kwargs["token_dtype"] = INDEX[plan.index_bits % 2]
    return Batch(logits, index(starts), index(tokens), width, kwargs)


@dataclass
class FuzzResult:
    """batches, requests: compared. close: requests left out as too close to call. emitted: tokens."""

    batches: int = 0
    requests: int = 0
    close: int = 0
    emitted: int = 0


def check_plan(plan: Plan, backend: str, device: str, result: FuzzResult) -> None:
    """Compare one batch with the reference, on poisoned outputs.

    Raises:
        AssertionError: An id, a count or the number of bad rows differs, or an input was modified.
    """
    batch = build(plan)
    before = batch.logits.clone() if not plan.far else None
    verified, close = assert_matches_reference(batch, backend, device)
    if before is not None:
        kind = torch.int32 if plan.dtype == torch.float32 else torch.int16
        assert torch.equal(before.view(kind), batch.logits.contiguous().view(kind)), "logits were modified"
    result.batches += 1
    result.requests += batch.num_reqs
    result.close += close
    result.emitted += int(verified.num_sampled.sum())


def fuzz(seed: int, indices: range, backend: str, device: str) -> FuzzResult:
    """Check the batches ``indices`` of a run.

    Raises:
        AssertionError: As of :func:`check_plan`, with the command that reproduces the batch.
    """
    result = FuzzResult()
    for index in indices:
        plan = random_plan(seed, index, backend)
        try:
            check_plan(plan, backend, device, result)
        except Exception as error:
            command = f"python tests/proof/run.py --seed {seed} --batch {index} --backend {backend}"
            raise AssertionError(f"{error}\n{plan}\nreproduce: {command}") from error
    return result
