"""The rungs of the ablation: verification in PyTorch as its formula says, each idea alone, and ours with all of them.

On PyTorch operators, with the whole probability matrices in memory:

- formula: the baseline of arXiv 2406.11016, softmax, ratios, first rejection, residual, multinomial (its released
  baseline handles one request; here requests are looped over);
- segments: the paper's exact method: ratio, difference, clamp and partial sums vocabulary segment by segment;
- sigmoid: the paper's sigmoid method with its released constants: element-wise scores in place of softmax;
- lazy: the formula row by row, only as far as the first rejection.

On our CPU backend:

- fused: each row is read once and nothing is stored, but every row is;
- fused lazy: rows behind the first rejection are not read: the exact method;
- fused lazy sigmoid: two numbers per draft token and the emitting row, with the paper's constants.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vllm_specopt.config import PAPER
from vllm_specopt.verify import verify

# Target logits and what the draft adds to them: about 0.8 acceptance per token.
SPREAD, NOISE = 4.0, 0.45
SEGMENT = 16_384
COUNTED_CALLS = 16
PAPER_ALPHA, PAPER_BETA = -1e4, 1e4


@dataclass(frozen=True)
class Counted:
    """What a call moves and starts on average: megabytes, operators or native calls, tokens emitted per request."""

    megabytes: float
    launches: int
    tokens: float


@dataclass(frozen=True)
class Rung:
    """One way to verify. ``call`` does it once and returns the tokens emitted per request."""

    call: Callable[[], torch.Tensor]
    native: Callable[[torch.Tensor], float] | None = None

    def count(self, batch: dict) -> Counted:
        """Call a few times and average; a native backend's bytes follow from the outcome, operators' are added up."""
        tokens = moved = launches = 0
        for _ in range(COUNTED_CALLS):
            batch["seeds"] += len(batch["seeds"])
            with Operators() as operators:
                emitted = self.call()
            tokens += emitted.double().mean().item()
            moved += self.native(emitted) if self.native else operators.bytes
            launches += 1 if self.native else operators.launches
        return Counted(moved / COUNTED_CALLS / 1e6, round(launches / COUNTED_CALLS), tokens / COUNTED_CALLS)


class Operators(TorchDispatchMode):
    """Counts the operators that run in its context, and the bytes of the tensors they read and write."""

    VIEWS = ("view", "slice", "select", "unsqueeze", "split", "detach", "t", "expand", "alias", "_unsafe_view")

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.launches = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ not in self.VIEWS:
            self.launches += 1
            flat = torch.utils._pytree.tree_leaves((args, kwargs, found))
            if function.overloadpacket.__name__ in ("gather", "index"):
                # They read what they return, not the matrix.
                flat = [found, found]
            self.bytes += sum(each.numel() * each.element_size() for each in flat if isinstance(each, torch.Tensor))
        return found


def batch_of(vocab_size: int, num_drafts: int, num_reqs: int, seed: int = 0) -> dict:
    """One batch: target logits, draft probabilities, drafted tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_reqs * (num_drafts + 1), vocab_size)
    logits = torch.randn(shape, generator=generator) * SPREAD
    is_draft = torch.arange(shape[0]) % (num_drafts + 1) < num_drafts
    near = logits[is_draft] + NOISE * torch.randn((num_reqs * num_drafts, vocab_size), generator=generator)
    probs = near.softmax(1)
    return {
        "logits": logits.to(torch.bfloat16),
        "draft_probs": probs,
        "draft_token_ids": torch.multinomial(probs, 1, generator=generator).view(-1),
        "cu_num_logits": torch.arange(num_reqs + 1) * (num_drafts + 1),
        "seeds": torch.arange(num_reqs),
        "temperature": torch.ones(num_reqs),
    }


def requests_of(batch: dict, num_drafts: int):
    """Yield target logits [K + 1, vocab], draft probabilities [K, vocab] and draft tokens [K, 1] per request."""
    for request in range(len(batch["seeds"])):
        drafted = slice(request * num_drafts, (request + 1) * num_drafts)
        rows = slice(request * (num_drafts + 1), (request + 1) * (num_drafts + 1))
        yield batch["logits"][rows], batch["draft_probs"][drafted], batch["draft_token_ids"][drafted, None]


def leading(accepted: torch.Tensor) -> int:
    """Return how many draft tokens come before the first rejection; accepted: [K] bool."""
    return int((~accepted).cumsum(0).eq(0).sum())


def emit(target: torch.Tensor, draft: torch.Tensor | None) -> None:
    """Draw a token from one row: the residual, or the target itself for a bonus token."""
    weights = target
    if draft is not None:
        weights = (target - draft).clamp(min=0)
        weights = weights / weights.sum()
    torch.multinomial(weights, 1)


def formula(batch: dict, num_drafts: int) -> torch.Tensor:
    """The paper's baseline; returns the number of tokens emitted per request, as all of these do."""
    emitted = []
    for logits, draft, tokens in requests_of(batch, num_drafts):
        target = logits.float().softmax(-1)
        ratio = (target[:-1].gather(1, tokens) / draft.gather(1, tokens)).view(-1)
        n = leading(torch.rand(num_drafts) <= ratio)
        emit(target[n], draft[n] if n < num_drafts else None)
        emitted.append(n + 1)
    return torch.tensor(emitted)


def segmented(scores: torch.Tensor, draft: torch.Tensor, tokens: torch.Tensor, num_drafts: int) -> int:
    """Ratios and residuals of all rows and tokens, segment by segment, then the first rejection and a draw."""
    ratios, residuals = torch.empty_like(draft), torch.empty_like(draft)
    total = torch.zeros(num_drafts, 1)
    for start in range(0, draft.shape[1], SEGMENT):
        part = slice(start, start + SEGMENT)
        torch.div(scores[:-1, part], draft[:, part], out=ratios[:, part])
        torch.sub(scores[:-1, part], draft[:, part], out=residuals[:, part])
        residuals[:, part].clamp_(min=0)
        total += residuals[:, part].sum(1, keepdim=True)
    n = leading(torch.rand(num_drafts) <= ratios.gather(1, tokens).view(-1))
    torch.multinomial(residuals[n] / total[n] + 1e-12 if n < num_drafts else scores[n], 1)
    return n


def segments(batch: dict, num_drafts: int) -> torch.Tensor:
    """The paper's exact method with PyTorch's operators."""
    return torch.tensor(
        [
            segmented(logits.float().softmax(-1), draft, tokens, num_drafts) + 1
            for logits, draft, tokens in requests_of(batch, num_drafts)
        ]
    )


def sigmoid(batch: dict, num_drafts: int) -> torch.Tensor:
    """The paper's sigmoid method with PyTorch's operators; the bonus token comes from the true target row."""
    emitted = []
    for logits, draft, tokens in requests_of(batch, num_drafts):
        scores = ((logits.float() - PAPER_ALPHA) / (PAPER_BETA - PAPER_ALPHA)).sigmoid()
        draft_scores = ((draft.log() - PAPER_ALPHA) / (PAPER_BETA - PAPER_ALPHA)).sigmoid()
        ratio = (scores[:-1].gather(1, tokens) / draft_scores.gather(1, tokens)).view(-1)
        n = leading(torch.rand(num_drafts) <= ratio)
        if n < num_drafts:
            emit(scores[n], draft_scores[n])
        else:
            emit(logits[n].float().softmax(-1), None)
        emitted.append(n + 1)
    return torch.tensor(emitted)


def lazy(batch: dict, num_drafts: int) -> torch.Tensor:
    """The formula, one row after the other until a draft token is rejected."""
    emitted = []
    for logits, draft, tokens in requests_of(batch, num_drafts):
        for n in range(num_drafts + 1):
            target = logits[n].float().softmax(-1)
            token = tokens[n] if n < num_drafts else None
            if token is None or torch.rand(1) > target[token] / draft[n][token]:
                emit(target, draft[n] if token is not None else None)
                break
        emitted.append(n + 1)
    return torch.tensor(emitted)


@functools.cache
def _row_reader():
    """Return a compiled loop that reads rows of a bf16 matrix as our backend does, and nothing else."""
    import numba

    from vllm_specopt.cpu.memory import BF16
    from vllm_specopt.cpu.plan import scratch_at
    from vllm_specopt.cpu.rows import Row
    from vllm_specopt.cpu.sweeps import sweep

    @numba.njit
    def read(address, stride, rows, vocab):
        _, size = scratch_at(np.int64(0), vocab)
        memory, seen = np.empty(size, np.uint8), 0.0
        scratch, _ = scratch_at(np.int64(memory.ctypes.data), vocab)
        for i in rows:
            row = Row(address + 2 * i * stride, np.int64(BF16), vocab, np.float32(0.0), np.int64(0))
            _, _, mass = sweep(row, np.float32(1.0), scratch.left, scratch.tile)
            seen += mass
        return seen + memory[0]

    return read


def fused(batch: dict, num_drafts: int) -> torch.Tensor:
    """Our backend without laziness: it verifies, and then reads the rows behind the first rejections as well."""
    emitted = _ours(batch, num_drafts, None)
    logits = batch["logits"]
    rows = np.arange(logits.shape[0]).reshape(len(emitted), num_drafts + 1)
    skipped = rows[np.arange(num_drafts + 1) >= emitted.numpy()[:, None]]
    _row_reader()(logits.data_ptr(), logits.stride(0), skipped, logits.shape[1])
    return emitted


def _ours(batch: dict, num_drafts: int, method) -> torch.Tensor:
    arguments = (batch["logits"], batch["cu_num_logits"], batch["draft_token_ids"], num_drafts)
    kwargs = {key: batch[key] for key in ("draft_probs", "seeds", "temperature")}
    return verify(*arguments, **kwargs, sigmoid=method, backend="cpu").num_sampled


def rungs(batch: dict, num_drafts: int) -> dict[str, Rung]:
    """Return the rungs of a batch, the baseline first."""
    vocab_size = batch["logits"].shape[1]

    def native(eager: bool = False, exact: bool = True):
        def count(emitted: torch.Tensor) -> float:
            """Bytes of bf16 logits and fp32 probabilities; the emitting row is read twice."""
            judged = emitted.clamp(max=num_drafts).double().sum().item()
            rejected, requests = (emitted <= num_drafts).sum().item(), len(emitted)
            emitting = vocab_size * (4 * requests + 4 * rejected)
            if exact:
                # A rejected row's first reading is its judging.
                rows = requests * (num_drafts + 1) - emitted.double().sum().item() if eager else 0
                return vocab_size * 2 * (judged - rejected + rows) + emitting
            return emitting

        return count

    return {
        "formula": Rung(lambda: formula(batch, num_drafts)),
        "segments": Rung(lambda: segments(batch, num_drafts)),
        "sigmoid": Rung(lambda: sigmoid(batch, num_drafts)),
        "lazy": Rung(lambda: lazy(batch, num_drafts)),
        "fused": Rung(lambda: fused(batch, num_drafts), native(eager=True)),
        "fused lazy": Rung(lambda: _ours(batch, num_drafts, None), native()),
        "fused lazy sigmoid": Rung(lambda: _ours(batch, num_drafts, PAPER), native(exact=False)),
    }
