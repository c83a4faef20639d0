"""Acceptance within a budget: a chosen draft token may be kept more often than its probability, at a bounded price.

A token of probability p is kept with the largest probability h >= p such that KL(Bernoulli(h), Bernoulli(p)) <= delta;
otherwise the row's token given that it is another one is emitted. What is emitted then has the KL divergence of the two
Bernoulli distributions from the target's: at most delta nats for each verified token.
"""

import math

import torch

from vllm_specopt.kernels.reference.exact import match_ref
from vllm_specopt.kernels.reference.noise import acceptance_uniform_ref


def bernoulli_kl_ref(kept: float, prob: float) -> float:
    """KL divergence, in nats, of Bernoulli(kept) from Bernoulli(prob), for 0 < prob <= kept <= 1."""
    rest = (1.0 - kept) * math.log((1.0 - kept) / (1.0 - prob)) if kept < 1.0 else 0.0
    return kept * math.log(kept / prob) + rest


def kept_probability_ref(prob: float, delta: float) -> float:
    """h: by bisection, the largest probability within the budget; 0 for a token that cannot occur."""
    if not prob > 0.0:
        return 0.0
    low, high = prob, 1.0
    if bernoulli_kl_ref(high, prob) <= delta:
        return 1.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if bernoulli_kl_ref(middle, prob) <= delta else (low, middle)
    return low


def budget_test_ref(
    target_probs: torch.Tensor, token: int, seed: int, position: int, delta: float
) -> tuple[int | None, float]:
    """Verify one chosen draft token.

    Args:
        target_probs: The target's distribution after temperature and filters, ``[vocab]``.
        token: The draft token.
        delta: The budget in nats.

    Returns:
        As :func:`vllm_specopt.kernels.reference.exact.match_ref`.
    """
    emitted, margin = match_ref(target_probs, token, seed, position)
    prob = min(float(target_probs[token]), 1.0)
    if emitted is None or not 0.0 < prob < 1.0 or emitted < 0:
        return emitted, margin
    # Among the rows' tokens that are not the draft token, so many are replaced by it.
    share = (kept_probability_ref(prob, delta) - prob) / (1.0 - prob)
    uniform = acceptance_uniform_ref(seed, position)
    return (None if uniform <= share else emitted), min(margin, abs(uniform - share) / uniform)
