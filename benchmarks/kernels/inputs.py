"""Batches whose acceptance is set beforehand.

Logits are Zipf-like, as those of language models are: the r-th largest of a row is about -1.5 log r. On top of that:

- one-hot drafts: the drafted token's logit is set so that its probability, after temperature and filters, is the
  acceptance asked for;
- draft distributions: ``draft = c * target + (1 - c) * (one token the target hardly ever emits)``, so that
  ``sum(min(target, draft))``, which is the acceptance, is c times the mass that the filters keep; c makes up for that;
- noisy draft distributions: normal noise on the target's logits, as much of it as gives that sum;
- greedy: the drafted token is the row's argmax in that share of the rows, any other token elsewhere.

The acceptance that came out, after rounding to the dtype, is computed from the tensors and reported beside what was
asked for; a draft distribution cannot do better than what the filters keep.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_specopt.benchmarks.kernels.grid import LOGITS, ONE_HOT, PROBS, Case
from vllm_specopt.testing import Batch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NUM_ROUNDS = 16
ZIPF = 1.5
# Enough of a row's largest logits to hold all that top-p 0.9 keeps of the law above.
NUM_TOP = 4096
CHUNK = 64
MOST_NOISE, BISECTIONS = 16.0, 16


@dataclass
class Inputs:
    """One case's tensors.

    Repeats of a call take the next round's draft tokens and positions, so that they accept and draw afresh.

    batch: Arguments of ``verify`` for round 0: compact draft ids; no ``positions``.
    drafts: ``[NUM_ROUNDS, num_tokens]`` int32, drawn from the draft distribution.
    chances: ``[NUM_ROUNDS, num_tokens]``, on the host: the probability that each of these tokens survives.
    positions: ``[NUM_ROUNDS, num_rows]``.
    acceptance: The same before the draft tokens are drawn, averaged over the rows.
    """

    case: Case
    seed: int
    batch: Batch
    drafts: torch.Tensor
    chances: torch.Tensor
    positions: torch.Tensor
    acceptance: float

    @property
    def device(self) -> torch.device:
        return self.batch.logits.device

    def round(self, number: int) -> Batch:
        """Arguments of ``verify`` in a round; any number will do."""
        number %= NUM_ROUNDS
        logits, cu_num_logits, _, num_drafts = self.batch.args()
        keywords = self.batch.kwargs | {"positions": self.positions[number]}
        return Batch(logits, cu_num_logits, self.drafts[number], num_drafts, keywords)


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Build a case's tensors on the device; the same seed gives the same tensors."""
    gen = torch.Generator(device).manual_seed(seed)
    batch, num_drafts, vocab = case.batch, case.num_drafts, case.vocab
    dtype = DTYPES[case.dtype]
    logits = torch.empty(batch, num_drafts + 1, vocab, dtype=dtype, device=device)
    drafts = torch.empty(NUM_ROUNDS, batch * num_drafts, dtype=torch.int32, device=device)
    chances = torch.empty(NUM_ROUNDS, batch * num_drafts, device=device)
    law = None
    if case.temperature > 0 and case.draft != ONE_HOT:
        law = torch.empty(
            batch, num_drafts, vocab, dtype=torch.float32 if case.draft == PROBS else dtype, device=device
        )
    acceptance = 0.0
    flat = logits.view(-1, vocab)
    is_draft = torch.arange(len(flat), device=device) % (num_drafts + 1) < num_drafts
    for rows in is_draft.nonzero()[:, 0].split(CHUNK):
        tokens = rows - rows // (num_drafts + 1)
        values = _zipf(len(rows), vocab, dtype, gen)
        build = _greedy if case.temperature == 0 else _one_hot if law is None else _noisy if case.noisy else _drafted
        built = build(values, case, dtype, gen)
        flat[rows] = built.values.to(dtype)
        drafts[:, tokens] = built.chosen.T.to(torch.int32)
        chances[:, tokens] = built.chances.T
        if law is not None:
            law.view(-1, vocab)[tokens] = built.drafted.to(law.dtype)
        acceptance += float(built.acceptance.sum()) / (batch * num_drafts)
    for rows in (~is_draft).nonzero()[:, 0].split(CHUNK):
        flat[rows] = _zipf(len(rows), vocab, dtype, gen).to(dtype)

    def each(value, kind):
        return torch.full((batch,), value, dtype=kind, device=device)

    kwargs = {}
    if case.temperature > 0:
        kwargs["temperature"] = each(case.temperature, torch.float32)
        kwargs["seeds"] = torch.randint(2**62, (batch,), generator=gen, device=device)
        if law is not None:
            kwargs["draft_logits" if case.draft == LOGITS else "draft_probs"] = (
                law if case.draft == LOGITS else law.view(-1, vocab)
            )
        if case.top_k:
            kwargs["top_k"] = each(case.top_k, torch.int32)
        if case.top_p < 1:
            kwargs["top_p"] = each(case.top_p, torch.float32)
        if case.min_p:
            kwargs["min_p"] = each(case.min_p, torch.float32)
    cu = torch.arange(batch + 1, dtype=torch.int32, device=device) * (num_drafts + 1)
    local = torch.arange(num_drafts + 1, device=device).repeat(batch)
    positions = 1000 + 4096 * torch.arange(NUM_ROUNDS, device=device).unsqueeze(1) + local
    return Inputs(
        case, seed, Batch(flat, cu, drafts[0], num_drafts, kwargs), drafts, chances.cpu(), positions, acceptance
    )


class _Built(NamedTuple):
    """Some rows: target logits, a draft token per round, their chances, the rows' acceptance, the draft's rows."""

    values: torch.Tensor
    chosen: torch.Tensor
    chances: torch.Tensor
    acceptance: torch.Tensor
    drafted: torch.Tensor | None = None


def _zipf(num_rows: int, vocab: int, dtype: torch.dtype, gen: torch.Generator) -> torch.Tensor:
    """fp32 rows of values that the dtype holds exactly."""
    values = torch.empty(num_rows, vocab, device=gen.device).exponential_(generator=gen) * ZIPF
    return values.to(dtype).float()


def _tokens(num_rows: int, vocab: int, gen: torch.Generator) -> torch.Tensor:
    return torch.randint(vocab, (num_rows, 1), generator=gen, device=gen.device)


def _greedy(values, case, dtype, gen):
    best = values.argmax(1, keepdim=True)
    other = (best + 1 + _tokens(len(values), case.vocab - 1, gen)) % case.vocab
    follows = torch.rand(len(values), NUM_ROUNDS, generator=gen, device=gen.device) < case.acceptance
    return _Built(values, torch.where(follows, best, other), follows.float(), follows.float().mean(1))


def _one_hot(values, case, dtype, gen):
    chosen = _tokens(len(values), case.vocab, gen)
    wanted = math.log(case.acceptance / (1 - case.acceptance))
    values.scatter_(1, chosen, float("-inf"))
    logit = case.temperature * (wanted + (values / case.temperature).logsumexp(1, keepdim=True))
    # Filters take from the other tokens, which lifts this one's share: a few corrections, smaller each time because
    # top-p takes whole tokens.
    for largest in (0.0,) if case.filters == "none" else (2.0, 1.0, 0.5, 0.3, 0.2, 0.1):
        values.scatter_(1, chosen, logit.to(dtype).float())
        chance = target_probs(values, case).gather(1, chosen)
        bounded = chance.clamp(1e-3, 1 - 1e-3)
        correction = (wanted - (bounded / (1 - bounded)).log()).clamp(-largest, largest)
        logit = logit + case.temperature * correction
    rounds = (-1, NUM_ROUNDS)
    return _Built(values, chosen.expand(rounds), chance.expand(rounds), chance)


def _drafted(values, case, dtype, gen):
    scaled = values / case.temperature
    log_sum = scaled.logsumexp(1, keepdim=True)
    target = target_probs(values, case)
    kept = ((scaled - log_sum).exp() * (target > 0)).sum(1, keepdim=True)
    share = (case.acceptance / kept).clamp(max=0.999)
    only_draft = _tokens(len(values), case.vocab, gen)
    logit = case.temperature * (((1 - share) / share).log() + log_sum)
    drafted = values.scatter(1, only_draft, logit.to(dtype).float())
    return _sampled(values, target, drafted, case, gen)


def _noisy(values, case, dtype, gen):
    target = target_probs(values, case)
    noise = torch.randn(values.shape, generator=gen, device=gen.device)
    low, high = 0.0, MOST_NOISE
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        draft = ((values + middle * noise) / case.temperature).softmax(1)
        accepted = torch.minimum(target, draft).sum(1).mean()
        low, high = (middle, high) if accepted > case.acceptance else (low, middle)
    return _sampled(values, target, (values + middle * noise).to(dtype).float(), case, gen)


def _sampled(values, target, drafted, case, gen):
    """Rows whose draft tokens are drawn from the draft's logits."""
    draft = (drafted / case.temperature).softmax(1)
    chosen = torch.multinomial(draft, NUM_ROUNDS, replacement=True, generator=gen)
    chances = (target.gather(1, chosen) / draft.gather(1, chosen)).clamp(max=1)
    acceptance = torch.minimum(target, draft).sum(1)
    return _Built(values, chosen, chances, acceptance, drafted if case.draft == LOGITS else draft)


def target_probs(values: torch.Tensor, case: Case) -> torch.Tensor:
    """Probabilities of rows of logits after the case's temperature and filters, fp32; ties are kept."""
    scaled = values / case.temperature
    if case.filters != "none":
        scaled = scaled.masked_fill(scaled < _thresholds(scaled, case), float("-inf"))
    return scaled.softmax(1)


def _thresholds(scaled, case):
    """Smallest value that the filters keep, ``[rows, 1]``."""
    top = scaled.topk(min(NUM_TOP, case.vocab), dim=1).values
    threshold = torch.full_like(top[:, :1], float("-inf"))
    if case.min_p:
        threshold = top[:, :1] + math.log(case.min_p)
    if case.top_k:
        threshold = torch.maximum(threshold, top[:, case.top_k - 1 : case.top_k])
    if case.top_p < 1:
        total = scaled.masked_fill(scaled < threshold, float("-inf")).logsumexp(1, keepdim=True)
        probs = (top - total).exp() * (top >= threshold)
        inside = (top >= threshold) & (probs.cumsum(1) - probs < case.top_p)
        threshold = top.masked_fill(~inside, float("inf")).amin(1, keepdim=True)
    return threshold
