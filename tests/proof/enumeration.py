"""The reference's law without sampling: every draft, every outcome, summed in double precision."""

import itertools
import math
from collections.abc import Callable

import torch

from vllm_specopt.kernels.reference import acceptance_probability_ref, residual_ref

KINDS = ("flat", "peaked", "sparse", "identical", "one-hot")
SHAPES = ((2, 4), (3, 3), (4, 2), (5, 1))
"""(vocabulary, draft tokens) small enough to enumerate: at most 5 tokens and 4 drafts."""
BOUND = 1e-12


def conditional_laws(vocab_size: int, depth: int, gen: torch.Generator, kind: str) -> dict:
    """A next-token law for every prefix up to ``depth`` tokens."""

    def law():
        logits = torch.randn(vocab_size, generator=gen, dtype=torch.float64) * (6 if kind == "peaked" else 1)
        if kind == "sparse":
            logits[torch.randperm(vocab_size, generator=gen)[: vocab_size // 2]] = -math.inf
        return logits.softmax(0)

    prefixes = (p for n in range(depth + 1) for p in itertools.product(range(vocab_size), repeat=n))
    return {prefix: law() for prefix in prefixes}


def sequence_law(laws: dict, vocab_size: int, length: int) -> dict:
    """Joint law of the first ``length`` tokens."""
    joint = {}
    for sequence in itertools.product(range(vocab_size), repeat=length):
        joint[sequence] = math.prod(float(laws[sequence[:i]][sequence[i]]) for i in range(length))
    return joint


def emitted_law(
    target: dict,
    draft: dict,
    vocab_size: int,
    num_drafts: int,
    acceptance: Callable = acceptance_probability_ref,
    residual: Callable = residual_ref,
) -> dict:
    """Joint law of what one step emits, continued by the target to ``num_drafts + 1`` tokens.

    ``acceptance(target_prob, draft_prob)`` and ``residual(target_probs, draft_probs)`` are the rule under test.
    """
    length = num_drafts + 1
    emitted = dict.fromkeys(itertools.product(range(vocab_size), repeat=length), 0.0)

    def continue_with_target(prefix, probability):
        for tail in itertools.product(range(vocab_size), repeat=length - len(prefix)):
            sequence = prefix + tail
            steps = range(len(prefix), length)
            emitted[sequence] += probability * math.prod(float(target[sequence[:i]][sequence[i]]) for i in steps)

    for drafts in itertools.product(range(vocab_size), repeat=num_drafts):
        reached = math.prod(float(draft[drafts[:i]][drafts[i]]) for i in range(num_drafts))
        for i in range(num_drafts):
            target_law, draft_law = target[drafts[:i]], draft[drafts[:i]]
            accept = acceptance(target_law[drafts[i]], draft_law[drafts[i]])
            weights = residual(target_law, draft_law)
            for token in range(vocab_size):
                recovered = float(weights[token] / weights.sum())
                continue_with_target((*drafts[:i], token), reached * (1 - accept) * recovered)
            reached *= accept
        continue_with_target(drafts, reached)
    return emitted


def total_variation(kind: str, vocab_size: int, num_drafts: int, **rule: Callable) -> float:
    """Distance between the emitted law and the target's joint law of ``num_drafts + 1`` tokens."""
    gen = torch.Generator().manual_seed(vocab_size)
    target = conditional_laws(vocab_size, num_drafts, gen, "flat" if kind == "identical" else kind)
    draft = target if kind == "identical" else conditional_laws(vocab_size, num_drafts, gen, kind)
    if kind == "one-hot":
        draft = {prefix: torch.eye(vocab_size, dtype=torch.float64)[law.argmax()] for prefix, law in draft.items()}
    expected = sequence_law(target, vocab_size, num_drafts + 1)
    emitted = emitted_law(target, draft, vocab_size, num_drafts, **rule)
    return sum(abs(emitted[s] - expected[s]) for s in expected) / 2
