"""The exact distribution of a sampled token, from the target model's own logits, and a test of draws against it."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from parity.rows import TARGET
from scipy import stats

BINS = 10
# Differences of a logit between this computation and the engine's, both in fp32.
SLACK = 2e-3
PENALTIES = {"repetition_penalty", "frequency_penalty", "presence_penalty"}


@lru_cache(maxsize=1)
def _model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()


_seen: dict[tuple[int, ...], torch.Tensor] = {}


def prepare(entries: list[dict]) -> None:
    """Run the target once over all completions, those of one length together."""
    lengths: dict[int, set] = {}
    for entry in entries:
        ids = (*entry["prompt"], *entry["token_ids"])
        if ids not in _seen:
            lengths.setdefault(len(ids), set()).add(ids)
    for group in lengths.values():
        group = sorted(group)
        with torch.inference_mode():
            _seen.update(zip(group, _model()(torch.tensor(group)).logits, strict=True))


def sequence_logits(ids: tuple[int, ...]) -> torch.Tensor:
    """The target's logits after each of these tokens, ``[len(ids), vocab]`` fp32."""
    prepare([{"prompt": ids, "token_ids": ()}])
    return _seen[ids]


def raw_logits(entry: dict) -> torch.Tensor:
    """The target's logits at each output position of a completion, ``[num_tokens, vocab]`` fp32."""
    ids = (*entry["prompt"], *entry["token_ids"])
    return sequence_logits(ids)[len(entry["prompt"]) - 1 : -1].clone()


def processed_logits(entry: dict, params: dict, slack: float = 0.0) -> torch.Tensor:
    """The same after the sampling parameters, in vLLM's order; -inf where a token is excluded.

    Args:
        entry: A completion, as ``column.py`` writes it.
        params: Sampling parameters; those this knows change the logits, others are left aside.
        slack: Keep tokens that a filter excludes by less than this much of a logit (top-p: of a probability).
    """
    logits = raw_logits(entry).double()
    if ids := params.get("allowed_token_ids"):
        kept = torch.full_like(logits, -torch.inf)
        kept[:, ids] = logits[:, ids]
        logits = kept
    for token, bias in params.get("logit_bias", {}).items():
        logits[:, int(token)] += bias
    for row in range(len(logits)) if params.keys() & PENALTIES else ():
        counts = torch.bincount(torch.tensor(entry["token_ids"][:row], dtype=torch.long), minlength=logits.shape[1])
        if (penalty := params.get("repetition_penalty", 1.0)) != 1.0:
            seen = counts > 0
            seen[entry["prompt"]] = True
            scaled = torch.where(logits[row] > 0, logits[row] / penalty, logits[row] * penalty)
            logits[row] = torch.where(seen, scaled, logits[row])
        logits[row] -= params.get("frequency_penalty", 0.0) * counts
        logits[row] -= params.get("presence_penalty", 0.0) * (counts > 0)
    temperature = params.get("temperature", 1.0)
    if temperature > 0:
        logits /= temperature
    if min_p := params.get("min_p"):
        logits[logits < logits.amax(1, keepdim=True) + np.log(min_p) - slack] = -torch.inf
    if top_k := params.get("top_k"):
        logits[logits < logits.topk(top_k, dim=1).values[:, -1:] - slack] = -torch.inf
    if top_p := params.get("top_p"):
        ordered, index = logits.softmax(1).sort(dim=1, descending=True)
        outside = torch.zeros_like(logits, dtype=torch.bool).scatter(
            1, index, ordered.cumsum(1) - ordered > top_p + slack
        )
        logits[outside] = -torch.inf
    return logits


def fit(entries: list[dict], params: dict) -> tuple[float, int, int]:
    """Test draws against the law under ``params``.

    Each drawn token becomes its place in the cumulative distribution given the tokens before it, tokens in the order of
    falling probability, at random within the token's own share: uniform on [0, 1] if the law holds, whatever the
    prefixes. The first token of a completion is left out: no verification emits it.

    Returns:
        The p-value of the chi-square test, the number of draws, and how many lie outside the law's support.
    """
    prepare(entries)
    rng, places, outside = np.random.default_rng(0), [], 0
    for entry in entries:
        ids = torch.tensor(entry["token_ids"])
        probs = processed_logits(entry, params).softmax(1)
        kept = processed_logits(entry, params, SLACK) > -torch.inf
        before = torch.where(probs > probs.gather(1, ids[:, None]), probs, 0.0).sum(1)
        own = probs.gather(1, ids[:, None])[:, 0]
        outside += int((~kept.gather(1, ids[:, None])[1:]).sum())
        places += (before + torch.from_numpy(rng.random(len(ids))) * own)[1:].clamp(0, 1 - 1e-12).tolist()
    counts = np.histogram(places, BINS, (0.0, 1.0))[0]
    return float(stats.chisquare(counts).pvalue), len(places), outside


def log_likelihood(entries: list[dict], params: dict) -> float:
    """Logarithm of the probability of draws under ``params``, first tokens left out; excluded tokens do not count."""
    total = 0.0
    for entry in entries:
        ids = torch.tensor(entry["token_ids"])[1:, None]
        values = processed_logits(entry, params).log_softmax(1)[1:].gather(1, ids)
        total += float(values[values > -torch.inf].sum())
    return total
