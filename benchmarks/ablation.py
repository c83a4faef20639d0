"""What each part of a verification step is worth, on a CPU: the paper's baseline against ours, rung by rung.

Usage: ``python benchmarks/ablation.py OUT.csv [--seconds N]``. Rungs, on the same tensors in turns:

- formula: the baseline of arXiv 2406.11016, softmax of both sides, ratio, first rejection, residual, multinomial, in
  PyTorch, as its formula says (the released baseline is one request at a time; here requests are looped over);
- exact: one sweep per judged row until the first rejection, and the emitting row;
- sigmoid paper: two numbers per draft token and the emitting row, which also accepts nearly everything;
- sigmoid calibrated: a tenth of the exact method's bytes per judged row, and the emitting row.

Draft tokens come with probabilities (fp32); logits are bf16. Bytes are counted from the outcome, not measured.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import time
from pathlib import Path

import numpy as np
import torch

from vllm_specopt.calibration import Calibration, Model
from vllm_specopt.config import PAPER
from vllm_specopt.verify import verify

VOCABULARIES = {"Whisper": 51_865, "Llama 2": 32_000, "Qwen": 151_936, "Gemma": 256_000}
DRAFT_TOKENS = (1, 2, 3, 4, 5, 8, 12, 16, 20, 32, 64, 128)
BATCHES = (1, 8)
MAX_ELEMENTS = 40_000_000
BLOCK, SHARE = 64, 0.1 / 3
# Target logits and what the draft adds to them: about 0.8 acceptance per token.
SPREAD, NOISE = 4.0, 0.45


def inputs(vocab_size: int, num_drafts: int, num_reqs: int, seed: int = 0) -> dict:
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


def made_up_calibration(vocab_size: int) -> Calibration:
    """Evenly spread blocks: of logits without structure the unread part is what the read part says."""
    total = math.ceil(vocab_size / BLOCK)
    count = max(1, int(SHARE * total))
    blocks = tuple(int(block) for block in np.linspace(0, total - 1, count))
    model = Model("random", vocab_size, "", None)
    estimators = (((math.log(1 / SHARE - 1), 0.0, 0.0, 0.0),), ((0.0, 0.0, 0.0, 1.0),), ((0.0,) * 4, (0.0,) * 4))
    return Calibration(vocab_size, BLOCK, blocks, (count,) * 3, estimators, 12.0, model, model)


def formula(batch: dict, num_drafts: int) -> torch.Tensor:
    """The paper's baseline; returns the number of tokens emitted per request."""
    emitted = []
    for request in range(len(batch["seeds"])):
        rows = slice(request * (num_drafts + 1), (request + 1) * (num_drafts + 1))
        drafted = slice(request * num_drafts, (request + 1) * num_drafts)
        target, draft = batch["logits"][rows].float().softmax(-1), batch["draft_probs"][drafted]
        tokens = batch["draft_token_ids"][drafted, None]
        ratio = (target[:-1].gather(1, tokens) / draft.gather(1, tokens)).view(-1)
        rejected = torch.rand(num_drafts) > ratio
        accepted = int((rejected.cumsum(0) == 0).sum())
        weights = target[accepted]
        if accepted < num_drafts:
            weights = (weights - draft[accepted]).clamp(min=0)
            weights = weights / weights.sum()
        torch.multinomial(weights, 1)
        emitted.append(accepted + 1)
    return torch.tensor(emitted)


def rungs(batch: dict, num_drafts: int) -> dict:
    """The calls to time, by name; each returns the number of tokens emitted per request."""
    arguments = (batch["logits"], batch["cu_num_logits"], batch["draft_token_ids"], num_drafts)
    kwargs = {key: batch[key] for key in ("draft_probs", "seeds", "temperature")}
    calibration = made_up_calibration(batch["logits"].shape[1])

    def ours(sigmoid):
        return lambda: verify(*arguments, **kwargs, sigmoid=sigmoid, backend="cpu").num_sampled

    return {
        "formula": lambda: formula(batch, num_drafts),
        "exact": ours(None),
        "sigmoid paper": ours(PAPER),
        "sigmoid calibrated": ours(calibration),
    }


def megabytes(rung: str, emitted: torch.Tensor, num_drafts: int, vocab_size: int) -> float:
    """Bytes a rung reads and writes in one call, from the algorithm; the emitting row is read twice by ours."""
    judged = emitted.clamp(max=num_drafts).double().sum().item()
    rejected = (emitted <= num_drafts).sum().item()
    requests = len(emitted)
    if rung == "formula":
        # fp32 copy 2 + 4, softmax 4 + 4, per row; residual and multinomial 4 + 4 + 4 + 4 + 4 per request.
        return vocab_size * (14 * requests * (num_drafts + 1) + 20 * requests) / 1e6
    emitting = vocab_size * (4 * requests + 4 * rejected)
    if rung == "exact":
        # A rejected row's first reading is its judging.
        return (vocab_size * 2 * judged + emitting - vocab_size * 2 * rejected) / 1e6
    return (emitting + (judged * SHARE * 6 * vocab_size if rung == "sigmoid calibrated" else 0)) / 1e6


def measure(vocab_size: int, num_drafts: int, num_reqs: int, seconds: float) -> list[dict]:
    """Time all rungs of a case in turns for about that long; one row per rung."""
    batch = inputs(vocab_size, num_drafts, num_reqs)
    calls = rungs(batch, num_drafts)
    emitted, times = {name: call() for name, call in calls.items()}, {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times["formula"]) < 3:
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - started))
    base = np.median(times["formula"])
    rows = []
    for name, found in times.items():
        p20, p50, p80 = np.quantile(found, (0.2, 0.5, 0.8))
        rows.append(
            {
                "vocab_size": vocab_size, "draft_tokens": num_drafts, "requests": num_reqs, "rung": name,
                "p20_ms": f"{p20:.4g}", "p50_ms": f"{p50:.4g}", "p80_ms": f"{p80:.4g}", "calls": len(found),
                "megabytes": f"{megabytes(name, emitted[name], num_drafts, vocab_size):.4g}",
                "tokens_per_request": f"{emitted[name].double().mean().item():.4g}",
                "speedup": f"{base / p50:.4g}", "threads": torch.get_num_threads(),
            }
        )  # fmt: skip
    return rows


def main() -> None:
    """Measure every case that fits in memory, and write a row per case and rung as it is done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=0.5, help="per case")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=DRAFT_TOKENS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        writer = None
        for vocab_size, num_drafts, num_reqs in itertools.product(VOCABULARIES.values(), args.draft_tokens, BATCHES):
            if vocab_size * (num_drafts + 1) * num_reqs > MAX_ELEMENTS:
                continue
            for row in measure(vocab_size, num_drafts, num_reqs, args.seconds):
                writer = writer or csv.DictWriter(file, row.keys(), lineterminator="\n")
                if not file.tell():
                    writer.writeheader()
                writer.writerow(row)
            file.flush()


if __name__ == "__main__":
    main()
