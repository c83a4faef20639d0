"""How fast the audit sees noise that drafter and recovery share, by calculation, for several drafts and temperatures.

Usage: ``python tests/audit/shared_noise.py``: prints a table in markdown. At each position of text that the shipped
target samples, what the faulty step emits is known exactly: with unit exponential noise, the draft token is the one of
the least noise over draft probability. Given that least, M, the noise of any other token y is draft(y) M and an
exponential anew, so that y is ready for the recovery at c(y) M, c = draft / residual, and comes at a rate residual(y)
from then on. The first to come is recovered: y with the chance residual(y) times the integral over u from c(y) of
1 / (1 + A(u))^2, with A(u) the sum of residual (u - c) over tokens with c < u.
"""

import argparse
import json
import math
import warnings
from pathlib import Path

import torch

from vllm_specopt.evidence import ALARM, BINS, log_evidence

MODELS = Path(__file__).resolve().parents[2] / "models"
PROMPTS, LENGTH = 16, 40
SURENESS = (0.25, 0.5, 0.7, 1.0, 1.3, 2.0)
TEMPERATURES = (0.7, 1.0, 1.3)
MOST = 100_000_000


def emitted(target: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
    """What the faulty step emits where there is a draft token, ``[rows, vocab]`` float64, as its arguments."""
    accepted, residual = torch.minimum(target, draft), (target - draft).clamp(min=0)
    is_left = residual > 0
    ready, order = torch.where(is_left, draft / residual, math.inf).sort(1)
    rate = residual.gather(1, order)
    is_left = is_left.gather(1, order)
    rates = rate.cumsum(1)
    steps = torch.where(is_left[:, 1:], ready.diff(dim=1), 0.0)
    # At each token's c: what 1 / (1 + A) is; 0 behind the last.
    waits = torch.nn.functional.pad((rates[:, :-1] * steps).cumsum(1), (1, 0))
    reached = torch.where(is_left, 1 / (1 + waits), 0.0)
    falls = reached - torch.nn.functional.pad(reached[:, 1:], (0, 1))
    integral = torch.where(is_left, falls / rates, 0.0).flip(1).cumsum(1).flip(1)
    recovered = torch.zeros_like(residual).scatter(1, order, rate * integral)
    return accepted + recovered * (1 - accepted.sum(1, keepdim=True))


def shares(target: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """The bins' mean shares ``[BINS]`` of the places of tokens that follow ``output``."""
    probs, order = target.sort(1, descending=True)
    above = probs.cumsum(1)
    density = torch.where(probs > 0, output.gather(1, order) / probs, 0.0)
    edges = [
        (density * (above.clamp(max=edge) - (above - probs)).clamp(min=0)).sum(1)
        for edge in torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    ]
    return torch.stack(edges).diff(dim=0).mean(1)


def tokens_to_alarm(bins: torch.Tensor, gen: torch.Generator) -> int | None:
    """Tokens, to an eighth, until places with these shares raise the alarm, the median of 5 draws; None: later."""
    found = []
    for _ in range(5):
        counts, total, goal = torch.zeros(BINS, dtype=torch.float64), 0, 1000
        while total < MOST and log_evidence([int(count) for count in counts]) < math.log(ALARM):
            more = goal - total
            spread = (more * bins).sqrt() * torch.randn(BINS, dtype=torch.float64, generator=gen)
            counts += (more * bins + spread - spread.mean()).clamp(min=0).round()
            total, goal = goal, goal + goal // 8
        found.append(total)
    middle = sorted(found)[2]
    return middle if middle < MOST else None


@torch.no_grad()
def logits_of(temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of target and draft, ``[rows, vocab]`` float64, at what the target samples at a temperature."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    target, draft = (
        AutoModelForCausalLM.from_pretrained(MODELS / f"specopt-{name}", dtype=torch.float32).eval()
        for name in ("target", "draft")
    )
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "specopt-target")
    torch.manual_seed(0)
    rows: tuple[list, list] = [], []
    for line in (MODELS / "prompts.jsonl").read_text().splitlines()[:PROMPTS]:
        prompt = tokenizer(json.loads(line)["prompt"], return_tensors="pt").input_ids
        text = target.generate(prompt, do_sample=True, temperature=temperature, top_k=0, pad_token_id=0,
                               max_new_tokens=LENGTH, min_new_tokens=LENGTH)  # fmt: skip
        for model, found in zip((target, draft), rows, strict=True):
            found.append(model(text).logits[0, prompt.shape[1] - 1 : -1].double())
    return torch.cat(rows[0]), torch.cat(rows[1])


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    gen = torch.Generator().manual_seed(0)
    print("| draft's logits, times | temperature | rejected | changed | in the bins | tokens until the alarm |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    rows = {temperature: logits_of(temperature) for temperature in TEMPERATURES}
    for sureness in SURENESS:
        for temperature, (target, draft) in rows.items():
            target, draft = (target / temperature).softmax(1), (draft * sureness / temperature).softmax(1)
            output = emitted(target, draft)
            rejected = 1 - torch.minimum(target, draft).sum(1).mean()
            bins = shares(target, output)
            tokens = tokens_to_alarm(bins, gen)
            changed, seen = (output - target).abs().sum(1).mean() / 2, (bins - 1 / BINS).abs().sum() / 2
            print(
                f"| {sureness:g} | {temperature:g} | {rejected:.0%} | {changed:.2%} | {seen:.2%} | "
                f"{'more' if tokens is None else format(tokens, ',')} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
