"""Acceptance within a budget: a chosen draft token may be kept more often than its probability, at a bounded price.

It is kept with the largest probability h >= p such that KL(Bernoulli(h), Bernoulli(p)) <= delta. Given that the row's
token is another one, that is probability (h - p) / (1 - p); and as the divergence grows with h, u <= (h - p) / (1 - p)
is the same as KL(Bernoulli(p + u (1 - p)), Bernoulli(p)) <= delta.
"""

import math

import numpy as np

from vllm_specopt.cpu.memory import jit
from vllm_specopt.cpu.rows import value_at, weight_of
from vllm_specopt.cpu.target import is_kept


@jit
def kept_prob(target, token):
    """Probability of a token after filters."""
    if not is_kept(target, token):
        return 0.0
    return min(np.float64(weight_of(value_at(target.source, token), target.frame)) / target.mass, 1.0)


@jit
def budget_test(prob, uniform, delta):
    """Whether a draft token of probability ``prob`` replaces another one that its row drew."""
    if not prob > 0.0:
        return False
    kept = prob + uniform * (1.0 - prob)
    return kept * math.log(kept / prob) + (1.0 - kept) * math.log(1.0 - uniform) <= delta


@jit
def budget_spent(prob, delta):
    """Divergence, in nats, of what is emitted in a draft token's place from the target's distribution."""
    return min(delta, -math.log(prob)) if prob > 0.0 else 0.0
