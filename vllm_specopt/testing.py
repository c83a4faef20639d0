"""Random verification batches and the comparison with the reference, shared by tests and benchmarks."""

from dataclasses import dataclass, field

import torch

from vllm_specopt.kernels.reference import verify_ref
from vllm_specopt.verify import Verified, verify

MARGIN = 1e-5
"""Two outcomes closer than this may come out either way in single precision: a draw within this probability of a
boundary between two tokens, a test within this part of its ratio. Rounding moves a row's boundaries by up to 1e-6, and
scores of up to 30 nats by 2e-6."""

NO_DRAFT, PROBS, LOGITS = "one-hot", "probs", "logits"


@dataclass
class Batch:
    """Arguments of ``verify`` for one batch; ``kwargs`` holds the optional ones."""

    logits: torch.Tensor
    cu_num_logits: torch.Tensor
    draft_token_ids: torch.Tensor
    max_num_draft_tokens: int
    kwargs: dict = field(default_factory=dict)

    @property
    def num_reqs(self) -> int:
        return self.cu_num_logits.shape[0] - 1

    def args(self) -> tuple:
        return self.logits, self.cu_num_logits, self.draft_token_ids, self.max_num_draft_tokens

    def to(self, device: torch.device | str) -> "Batch":
        kwargs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in self.kwargs.items()}
        logits, cu_num_logits, draft_token_ids = (a.to(device) for a in self.args()[:3])
        return Batch(logits, cu_num_logits, draft_token_ids, self.max_num_draft_tokens, kwargs)


def random_batch(
    *,
    seed: int,
    num_drafts: list[int],
    vocab_size: int,
    dtype: torch.dtype = torch.float32,
    draft: str = NO_DRAFT,
    draft_vocab_size: int | None = None,
    temperatures: tuple[float, ...] = (0.0, 0.5, 1.0, 1.7),
    filters: tuple[str, ...] = (),
    rows_layout: bool = False,
    shuffled_state: bool = True,
    spread: float = 2.5,
) -> Batch:
    """A batch in which all outcomes occur: drafts are drawn near the target, a few are placeholders or out of range.

    Args:
        seed: Of everything random here.
        num_drafts: Draft tokens of each request; 0 is allowed.
        vocab_size, draft_vocab_size: Of the target, and of the draft if narrower.
        dtype: Of the target and draft logits.
        draft: Form of the draft distribution: NO_DRAFT, PROBS or LOGITS.
        temperatures: Each request takes one of them.
        filters: Any of "top_k", "top_p", "min_p"; each request uses or leaves out each of them.
        rows_layout: Draft ids by row (model runner V2) instead of compact (V1).
        shuffled_state: Keep per-request parameters in a permuted, larger table.
        spread: Standard deviation of the logits.
    """
    gen = torch.Generator().manual_seed(seed)

    def choose(values, size, dtype):
        return torch.tensor(values, dtype=dtype)[torch.randint(len(values), (size,), generator=gen)]

    num_reqs, num_rows, width = len(num_drafts), sum(num_drafts) + len(num_drafts), max(num_drafts) + 1
    draft_vocab_size = draft_vocab_size or vocab_size
    base = torch.randn(num_rows, vocab_size, generator=gen) * spread
    logits = torch.zeros(num_rows, vocab_size + 24, dtype=dtype)[:, :vocab_size].copy_(base)
    cu = torch.tensor([0, *(torch.tensor(num_drafts) + 1).cumsum(0).tolist()], dtype=torch.int32)

    max_reqs = num_reqs + 3 if shuffled_state else num_reqs
    state = torch.randperm(max_reqs, generator=gen)[:num_reqs] if shuffled_state else torch.arange(num_reqs)
    temperature = choose(temperatures, max_reqs, torch.float32)
    near = base + 0.7 * torch.randn(num_rows, vocab_size, generator=gen)
    is_draft = torch.ones(num_rows, dtype=torch.bool)
    is_draft[cu[1:].long() - 1] = False
    kwargs: dict[str, torch.Tensor | None] = {}
    draft_logits = None
    if draft == LOGITS:
        draft_logits = torch.full((max_reqs, max(width - 1, 1), draft_vocab_size), float("nan")).to(dtype)
        kwargs["draft_logits"] = draft_logits
    req_of_row = torch.repeat_interleave(torch.arange(num_reqs), torch.tensor(num_drafts) + 1)
    drafts = torch.zeros(num_rows, dtype=torch.int64)
    probs = torch.zeros(num_rows, draft_vocab_size)
    for row in range(num_rows):
        req, pos = int(req_of_row[row]), row - int(cu[req_of_row[row]])
        temp = float(temperature[state[req]]) or 1.0
        row_logits = near[row, :draft_vocab_size].to(dtype)
        probs[row] = (row_logits.float() / temp).softmax(0)
        drafts[row] = base[row].argmax() if draft == NO_DRAFT else torch.multinomial(probs[row], 1, generator=gen)
        if draft_logits is not None and is_draft[row]:
            draft_logits[state[req], pos] = row_logits
    drafts = drafts[is_draft]
    spoiled = torch.rand(len(drafts), generator=gen)
    drafts[spoiled < 0.06] = -1
    drafts[spoiled > 0.97] = vocab_size + 5
    if draft == PROBS:
        kwargs["draft_probs"] = probs[is_draft]
    if rows_layout:
        by_row = torch.randint(vocab_size, (num_rows,), generator=gen)
        by_row[is_draft.nonzero()[:, 0] + 1] = drafts
        drafts = by_row

    kwargs["temperature"] = temperature
    kwargs["seeds"] = torch.randint(-(2**63), 2**63 - 1, (max_reqs,), generator=gen)
    kwargs["positions"] = torch.randint(2**34, (num_rows,), generator=gen)
    kwargs["state_indices"] = state.to(torch.int32) if shuffled_state else None
    if "top_k" in filters:
        kwargs["top_k"] = choose([0, 1, 2, 7, 50, vocab_size, vocab_size + 9], max_reqs, torch.int32)
    if "top_p" in filters:
        kwargs["top_p"] = choose([1.0, 0.95, 0.9, 0.5, 0.01], max_reqs, torch.float32)
    if "min_p" in filters:
        kwargs["min_p"] = choose([0.0, 0.1, 0.02, 1.0], max_reqs, torch.float32)
    return Batch(logits, cu, drafts.to(torch.int32 if seed % 2 else torch.int64), width - 1, kwargs)


def poisoned_empty(*args, **kwargs) -> torch.Tensor:
    """``torch.empty`` with contents that a reader would stumble over: NaN, or an impossible id."""
    tensor = _EMPTY(*args, **kwargs)
    return tensor.fill_(float("nan") if tensor.is_floating_point() else -0x55AA55)


_EMPTY = torch.empty


def assert_matches_reference(batch: Batch, backend: str, device: str = "cpu") -> tuple[Verified, int]:
    """Run ``verify`` on a backend with poisoned outputs and compare token ids with the reference.

    Requests whose reference margin is below MARGIN are left out, except that their ids must be valid.

    Returns:
        The outputs, and the number of requests left out.

    Raises:
        AssertionError: A token id or count differs, an id is out of range, or an argument was modified.
    """
    reference = verify_ref(
        *batch.args(), **{k: v for k, v in batch.kwargs.items() if k not in ("token_dtype", "bad_row_counter")}
    )
    on_device = batch.to(device)
    inputs = [t for t in (*on_device.args(), *on_device.kwargs.values()) if isinstance(t, torch.Tensor)]
    inputs = [t for t in inputs if t is not on_device.kwargs.get("bad_row_counter")]
    before = [t.clone() for t in inputs]
    torch.empty = poisoned_empty
    try:
        verified = verify(*on_device.args(), **on_device.kwargs, backend=backend)
    finally:
        torch.empty = _EMPTY
    assert all(map(_same_bits, inputs, before)), "an argument was modified"
    token_ids, num_sampled = verified.token_ids.cpu(), verified.num_sampled.cpu()
    columns = torch.arange(token_ids.shape[1])
    emitted = columns[None, :] < num_sampled[:, None]
    assert (token_ids[~emitted] == -1).all(), "a slot after the last token is not -1"
    assert ((token_ids >= 0) & (token_ids < batch.logits.shape[1]))[emitted].all(), "an emitted id is out of range"
    close = torch.tensor([m < MARGIN for m in reference.margin])
    differs = (token_ids != reference.token_ids).any(1) | (num_sampled != reference.num_sampled)
    wrong = (differs & ~close).nonzero()[:, 0].tolist()
    assert not wrong, (
        f"requests {wrong[:5]} differ from the reference: {token_ids[wrong[0]].tolist()} "
        f"instead of {reference.token_ids[wrong[0]].tolist()} (margin {reference.margin[wrong[0]]:.2g})"
    )
    return verified, int(close.sum())


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    # A copy has the strides that the view needs, whatever those of a dimension of one element.
    left, right = (x.clone(memory_format=torch.contiguous_format) for x in (left, right))
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


def is_drawn(weights: torch.Tensor, uniform: float, token: int, tolerance: float) -> bool:
    """Whether a token may be the one drawn by inversion, for rows on which too many boundaries lie within MARGIN.

    Args:
        weights: ``[vocab]`` float64, as the reference draws from.
        uniform: The u of the draw.
        tolerance: How far, in probability, u may lie outside the token's interval of the running sum.
    """
    running = weights.cumsum(0) / weights.sum()
    before = float(running[token - 1]) if token else 0.0
    return bool(weights[token] > 0) and before - tolerance <= uniform <= float(running[token]) + tolerance
