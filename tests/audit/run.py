"""How many tokens the audit takes to find planted faults, and how often it raises a false alarm.

Usage: ``python tests/audit/run.py [--runs N] [--first SEED] [--tokens N] [--no-faults]``: prints a table in markdown.
Rows of logits are random, drafts are sampled near them, and each step verifies one draft per request; a fault's step is
written here, the clean one is the project's own, on the CPU. The audit is the one that serving does. Clean runs have
filters of all kinds, tokens that a penalty makes less likely or a grammar forbids, and every other one drafts that are
certain.
"""

import argparse
import math
from collections.abc import Callable

import torch

from vllm_specopt.audit import audit, new_counts
from vllm_specopt.evidence import ALARM, BINS, judge, log_evidence
from vllm_specopt.verify import Notes, verify

REQUESTS, VOCAB = 2048, 128
LIMIT = 3_000_000
TEMPERATURES = (0.7, 1.0, 1.3)


class Step:
    """Requests with one draft each: what the target and the draft model say, and the requests' parameters."""

    def __init__(self, gen: torch.Generator):
        self.gen = gen
        self.logits = torch.randn(REQUESTS, 2, VOCAB, generator=gen) * 2.5
        self.draft_logits = self.logits[:, :1] + 0.7 * torch.randn(REQUESTS, 1, VOCAB, generator=gen)
        self.temperature = torch.tensor(TEMPERATURES)[torch.randint(3, (REQUESTS,), generator=gen)]
        self.top_p = torch.where(torch.rand(REQUESTS, generator=gen) < 0.5, 0.9, 1.0)
        self.seeds = torch.randint(-(2**63), 2**63 - 1, (REQUESTS,), generator=gen)
        self.draft = self.probs(self.draft_logits[:, 0], filtered=False)
        self.drafts = self.sample(self.draft)

    def probs(self, logits: torch.Tensor, filtered: bool = True, warmer: float = 1.0) -> torch.Tensor:
        """Distributions after temperature, and top-p where ``filtered``; float64."""
        probs = (logits.double() / (self.temperature * warmer)[:, None]).softmax(1)
        if not filtered:
            return probs
        values, order = probs.sort(1, descending=True)
        kept = values.where(values.cumsum(1) - values < self.top_p[:, None], 0.0)
        kept = torch.zeros_like(probs).scatter(1, order, kept)
        return kept / kept.sum(1, keepdim=True)

    def sample(self, weights: torch.Tensor) -> torch.Tensor:
        """A token for each row of weights."""
        return torch.multinomial(weights, 1, generator=self.gen)[:, 0]

    def uniforms(self) -> torch.Tensor:
        return torch.rand(REQUESTS, generator=self.gen, dtype=torch.float64)

    def speculate(self, target: torch.Tensor, *, power: float = 1.0, recover=None, recovered=None) -> torch.Tensor:
        """Token ids ``[REQUESTS]`` by the ratio test, right unless told otherwise."""
        at = self.drafts[:, None]
        ratio = (target.gather(1, at) / self.draft.gather(1, at))[:, 0].clamp(max=1.0)
        accepted = self.uniforms() <= ratio**power
        residual = (target - self.draft).clamp(min=0)
        residual = target.where(residual.sum(1, keepdim=True) <= 0, residual) if recover is None else recover
        return torch.where(accepted, self.drafts, self.sample(residual) if recovered is None else recovered)


class Varied(Step):
    """The same with more parameters, for the project's own verification."""

    def __init__(self, gen: torch.Generator, drafts_are_certain: bool):
        super().__init__(gen)
        penalised = torch.rand(self.logits.shape, generator=gen) < 0.2 * self.some()[:, None, None]
        self.logits = torch.where(penalised, self.logits - self.logits.abs() * 0.2, self.logits)
        forbidden = torch.rand(self.logits.shape, generator=gen) < 0.5 * self.some()[:, None, None]
        self.logits = self.logits.masked_fill(forbidden, -math.inf)
        self.top_k = torch.where(self.some(), 20, 0).int()
        self.min_p = torch.where(self.some(), 0.05, 0.0)
        self.drafts_are_certain = drafts_are_certain
        if drafts_are_certain:
            self.drafts = self.draft.argmax(1)

    def some(self) -> torch.Tensor:
        """One request in four."""
        return torch.rand(REQUESTS, generator=self.gen) < 0.25


def clean(step: Varied, notes: Notes) -> torch.Tensor:
    """The project's own verification, bonus tokens included."""
    return verify(
        step.logits.flatten(0, 1),
        torch.arange(0, 2 * REQUESTS + 1, 2),
        step.drafts,
        1,
        temperature=step.temperature,
        seeds=step.seeds,
        top_p=step.top_p,
        top_k=step.top_k,
        min_p=step.min_p,
        draft_logits=None if step.drafts_are_certain else step.draft_logits,
        notes=notes,
    ).token_ids


def recovers_from_target(step: Step) -> torch.Tensor:
    target = step.probs(step.logits[:, 0])
    return step.speculate(target, recover=target)


def shares_noise(step: Step) -> torch.Tensor:
    """The recovered token is drawn with the exponential noise that drew the draft token."""
    noise = torch.empty(step.draft.shape, dtype=torch.float64).exponential_(generator=step.gen)
    step.drafts = (noise / step.draft).argmin(1)
    target = step.probs(step.logits[:, 0])
    recovered = (noise / (target - step.draft).clamp(min=0)).argmin(1)
    return step.speculate(target, recovered=recovered)


def accepts_by_the_root(step: Step) -> torch.Tensor:
    return step.speculate(step.probs(step.logits[:, 0]), power=0.5)


def forgets_top_p(step: Step) -> torch.Tensor:
    """Top-p for the draft alone."""
    step.draft = step.probs(step.draft_logits[:, 0])
    step.drafts = step.sample(step.draft)
    return step.speculate(step.probs(step.logits[:, 0], filtered=False))


def is_2_percent_too_warm(step: Step) -> torch.Tensor:
    return step.speculate(step.probs(step.logits[:, 0], warmer=1.02))


FAULTS: dict[str, Callable[[Step], torch.Tensor]] = {
    "the recovered token comes from the target": recovers_from_target,
    "drafter and recovery share noise": shares_noise,
    "acceptance by the square root of the ratio": accepts_by_the_root,
    "top-p is applied to the draft only": forgets_top_p,
    "the temperature is 2 % too high": is_2_percent_too_warm,
}


def look(step: Step, token_ids: torch.Tensor, counts: torch.Tensor, **more) -> None:
    """Audit a step; a fault's emits one token per request."""
    token_ids = token_ids if token_ids.ndim == 2 else torch.nn.functional.pad(token_ids[:, None], (0, 1), value=-1)
    audit(
        step.logits.flatten(0, 1),
        torch.arange(0, 2 * REQUESTS + 1, 2),
        token_ids,
        counts,
        temperature=step.temperature,
        seeds=step.seeds,
        top_p=step.top_p,
        **more,
    )


def tokens_to_alarm(emit: Callable[[Step], torch.Tensor], seed: int, limit: int = LIMIT) -> tuple[int, list[int]]:
    """Audited tokens, in whole steps, until the alarm, and their counts."""
    gen, counts = torch.Generator().manual_seed(seed), new_counts(1, "cpu")
    while True:
        step = Step(gen)
        look(step, emit(step), counts)
        row = counts[0].tolist()
        if log_evidence(row[:BINS]) > math.log(ALARM) or sum(row[:BINS]) >= limit:
            return sum(row[:BINS]), row


def largest_evidence(seed: int, tokens: int) -> tuple[float, list[int]]:
    """The largest log10 of the e-value after any step of a clean run, and the run's counts."""
    gen, counts, largest = torch.Generator().manual_seed(seed), new_counts(1, "cpu"), 0.0
    while True:
        step, notes = Varied(gen, seed % 2 == 1), Notes()
        look(step, clean(step, notes), counts, top_k=step.top_k, min_p=step.min_p, notes=notes)
        row = counts[0].tolist()
        largest = max(largest, log_evidence(row[:BINS]) / math.log(10))
        if sum(row[:BINS]) >= tokens:
            return largest, row


def find_faults() -> None:
    """Print a table of the planted faults."""
    print("| fault | tokens until the alarm | impossible | largest deviation of a bin, points |")
    print("| --- | ---: | ---: | ---: |")
    for name, emit in FAULTS.items():
        tokens, row = tokens_to_alarm(emit, 1)
        verdict = judge(row)
        assert verdict.largest is not None
        said = f"{tokens:,}" if verdict.is_lossy else f"not within {tokens:,}"
        print(f"| {name} | {said} | {verdict.impossible:,} | {100 * verdict.largest.deviation:+.2f} |", flush=True)


def find_false_alarms(seeds: range, tokens: int) -> None:
    """Print what clean runs come to."""
    runs = [largest_evidence(seed, tokens) for seed in seeds]
    alarms = sum(largest > math.log10(20) for largest, _ in runs)
    highest = max(largest for largest, _ in runs)
    impossible = sum(row[BINS] for _, row in runs)
    print(
        f"\n{len(runs)} clean runs of {tokens:,} tokens: e passes 20 in {alarms} of them (at most 5 % may), the "
        f"highest is {10**highest:.1f}; {impossible} impossible tokens"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first clean run")
    parser.add_argument("--no-faults", action="store_true", help="clean runs alone")
    given = parser.parse_args()
    if not given.no_faults:
        find_faults()
    find_false_alarms(range(given.first, given.first + given.runs), given.tokens)


if __name__ == "__main__":
    main()
