"""The distribution of the reference without sampling: every draft, every outcome, every uniform, in double precision.

The rule under test is the reference's own code. What it does with a row is a function of one or two uniforms that is
constant between a few boundaries; these are found by bisection, down to neighbouring doubles.
"""

import itertools
import math
from collections.abc import Callable, Hashable

import torch

from vllm_specopt.kernels.reference import block, exact
from vllm_specopt.kernels.reference.noise import DRAW, PREFIX, RESIDUAL

KINDS = ("flat", "peaked", "sparse", "identical", "chosen drafts")
"""Shapes of the distributions; with ``chosen drafts`` these are one-hot, any token or a placeholder at any position."""
SHAPES = ((2, 4), (3, 3), (4, 2), (5, 1))
"""(vocabulary, draft tokens) small enough to enumerate: at most 5 tokens and 4 drafts."""
BOUND = 1e-12
PURPOSES = {DRAW: "draw", RESIDUAL: "residual"}

Step = Callable[[torch.Tensor, torch.Tensor | None, int, dict[str, float]], int | None]
"""(target probabilities, draft probabilities or None, draft token, uniforms) -> None if it survives, else a token."""


def exact_step(target: torch.Tensor, draft: torch.Tensor | None, token: int, uniforms: dict[str, float]) -> int | None:
    """The reference's rule with given uniforms: ``draw``, ``acceptance`` and ``residual``."""
    originals = exact.draw_uniform_ref, exact.acceptance_uniform_ref
    exact.draw_uniform_ref = lambda _seed, _position, purpose: uniforms[PURPOSES[purpose]]
    exact.acceptance_uniform_ref = lambda _seed, _position: uniforms["acceptance"]
    try:
        if draft is None:
            return exact.match_ref(target, token, 0, 0)[0]
        return exact.ratio_test_ref(target, draft, token, 0, 0)[0]
    finally:
        exact.draw_uniform_ref, exact.acceptance_uniform_ref = originals


def measures(outcome: Callable[[float], Hashable]) -> dict[Hashable, float]:
    """How much of (0, 1) leads to each outcome, for a function that does not return to an outcome it has left."""
    found: dict[Hashable, float] = {}

    def split(low, high, at_low, at_high):
        middle = (low + high) / 2
        if at_low == at_high:
            found[at_low] = found.get(at_low, 0.0) + high - low
        elif not low < middle < high:
            found[at_high] = found.get(at_high, 0.0) + high - low
        else:
            at_middle = outcome(middle)
            split(low, middle, at_low, at_middle)
            split(middle, high, at_middle, at_high)

    split(0.0, 1.0, outcome(2.0**-60), outcome(1 - 2.0**-53))
    return found


def outcomes(step: Step, target: torch.Tensor, draft: torch.Tensor | None, token: int) -> dict[int | None, float]:
    """Probability of each outcome of one draft token: None if it survives, else the token emitted in its place."""
    if draft is None:
        return measures(lambda u: step(target, None, token, {"draw": u}))
    accepted = measures(lambda u: step(target, draft, token, {"acceptance": u, "residual": 0.5}) is None).get(True, 0.0)
    if accepted == 1:
        return {None: 1.0}
    recovered = measures(lambda u: step(target, draft, token, {"acceptance": 1 - 2.0**-53, "residual": u}))
    return {None: accepted} | {found: (1 - accepted) * share for found, share in recovered.items()}


def conditional_distributions(vocab_size: int, depth: int, gen: torch.Generator, kind: str) -> dict:
    """A distribution of the next token for every prefix up to ``depth`` tokens."""

    def distribution():
        logits = torch.randn(vocab_size, generator=gen, dtype=torch.float64) * (6 if kind == "peaked" else 1)
        if kind == "sparse":
            logits[torch.randperm(vocab_size, generator=gen)[: vocab_size // 2]] = -math.inf
        return logits.softmax(0)

    prefixes = (p for n in range(depth + 1) for p in itertools.product(range(vocab_size), repeat=n))
    return {prefix: distribution() for prefix in prefixes}


def continued(target: dict, prefix: tuple, probability: float, length: int) -> dict:
    """Probabilities of all sequences of ``length`` tokens that the target makes of a prefix."""
    found = {prefix: probability}
    for _ in range(length - len(prefix)):
        found = {(*p, t): mass * share for p, mass in found.items() for t, share in enumerate(target[p].tolist())}
    return found


def emitted_distribution(
    target: dict, draft: dict | None, drafts: tuple, probability: float, step: Step, cache: dict
) -> dict:
    """Joint distribution of what one step emits for given drafts, continued by the target to one token more than them.

    draft: what the drafts were drawn from, by prefix; None if they were chosen. probability: that of these drafts.
    """
    emitted: dict = {}
    length = len(drafts) + 1

    def emit(prefix, mass):
        for sequence, share in continued(target, prefix, mass, length).items():
            emitted[sequence] = emitted.get(sequence, 0.0) + share

    reached = probability
    for i, token in enumerate((*drafts, -1)):
        prefix = drafts[:i]
        key = (prefix, token)
        if key not in cache:
            row = None if draft is None or token < 0 else draft[prefix]
            cache[key] = outcomes(step, target[prefix], row, token)
        for found, share in cache[key].items():
            if found is not None:
                emit((*prefix, found), reached * share)
        reached *= cache[key].get(None, 0.0)
        if reached == 0:
            break
    return emitted


def block_lengths(target: list[torch.Tensor], draft: list[torch.Tensor], drafts: tuple) -> list[float]:
    """Probability that a block keeps each number of its tokens, by the reference's rule with given uniforms."""
    passes = []
    for length in range(1, len(drafts) + 1):

        def keeps(uniform: float, length: int = length) -> bool:
            uniforms = {PREFIX + length: uniform, RESIDUAL: 0.5, DRAW: 0.5}
            return _block(target, draft, drafts, uniforms)[0] >= length

        passes.append(measures(keeps).get(True, 0.0))
    found, rest = [], 1.0
    for share in reversed(passes):
        found.append(rest * share)
        rest *= 1 - share
    return [rest, *reversed(found)]


def _block(target, draft, drafts, uniforms: dict[int, float]) -> tuple[int, int, float]:
    """The reference's rule with given uniforms by purpose; prefixes without one fail unless they cannot."""
    originals = block.draw_uniform_ref, block.acceptance_uniform_ref
    block.draw_uniform_ref = lambda _seed, _position, purpose: uniforms[purpose]
    block.acceptance_uniform_ref = lambda _seed, _position, purpose: uniforms.get(purpose, 1 - 2.0**-53)
    try:
        return block.block_ref(target, draft, list(drafts), 0, list(range(len(drafts) + 1)))
    finally:
        block.draw_uniform_ref, block.acceptance_uniform_ref = originals


def block_distribution(target: dict, draft: dict, drafts: tuple, probability: float) -> dict:
    """As :func:`emitted_distribution`, where sampled drafts are judged as a whole."""
    emitted: dict = {}
    targets = [target[drafts[:i]] for i in range(len(drafts) + 1)]
    sampled = [draft[drafts[:i]] for i in range(len(drafts))]
    for length, share in enumerate(block_lengths(targets, sampled, drafts)):
        if share == 0:
            continue
        # Longer prefixes fail, this one passes.
        fixed = {PREFIX + length: 2.0**-60}
        following = measures(lambda u, fixed=fixed: _block(targets, sampled, drafts, fixed | {RESIDUAL: u, DRAW: u})[1])
        for token, part in following.items():
            for sequence, mass in continued(
                target, (*drafts[:length], token), probability * share * part, len(drafts) + 1
            ).items():
                emitted[sequence] = emitted.get(sequence, 0.0) + mass
    return emitted


def accepted_lengths(kind: str, vocab_size: int, num_drafts: int) -> tuple[float, float, float]:
    """Mean number of sampled drafts kept by the exact rule, by the block rule, and the sum of E[c_i].

    That sum is what an optimal verifier of one chain keeps (Sun et al. 2403.10444).
    """
    target, draft = _pair(kind, vocab_size, num_drafts)
    exact_kept = block_kept = optimum = 0.0
    for drafts, mass in continued(draft, (), 1.0, num_drafts).items():
        targets = [target[drafts[:i]] for i in range(num_drafts + 1)]
        sampled = [draft[drafts[:i]] for i in range(num_drafts)]
        reached = carry = 1.0
        for i, token in enumerate(drafts):
            reached *= exact.acceptance_probability_ref(targets[i][token], sampled[i][token])
            carry = block.carry_ref(carry, float(targets[i][token]), float(sampled[i][token]))
            exact_kept, optimum = exact_kept + mass * reached, optimum + mass * carry
        block_kept += mass * sum(i * share for i, share in enumerate(block_lengths(targets, sampled, drafts)))
    return exact_kept, block_kept, optimum


def _pair(kind: str, vocab_size: int, num_drafts: int) -> tuple[dict, dict]:
    """The target and what drafts are drawn from."""
    gen = torch.Generator().manual_seed(vocab_size)
    target = conditional_distributions(vocab_size, num_drafts, gen, "flat" if kind == "identical" else kind)
    return target, target if kind == "identical" else conditional_distributions(vocab_size, num_drafts, gen, kind)


def total_variation(kind: str, vocab_size: int, num_drafts: int, step: Step = exact_step, by_block=False) -> float:
    """Distance between the emitted distribution and the target's joint one of ``num_drafts + 1`` tokens.

    With chosen drafts it is the largest over all choices: no average over drafts may be needed. by_block: whether the
    block rule judges sampled drafts instead of ``step``.
    """
    target, draft = _pair(kind, vocab_size, num_drafts)
    expected = continued(target, (), 1.0, num_drafts + 1)

    def distance(emitted):
        return sum(abs(emitted.get(s, 0.0) - expected[s]) for s in expected) / 2

    cache: dict = {}
    if kind == "chosen drafts":
        choices = itertools.product(range(-1, vocab_size), repeat=num_drafts)
        return max(distance(emitted_distribution(target, None, drafts, 1.0, step, cache)) for drafts in choices)
    total: dict = {}
    for drafts, mass in continued(draft, (), 1.0, num_drafts).items():
        if by_block:
            found = block_distribution(target, draft, drafts, mass)
        else:
            found = emitted_distribution(target, draft, drafts, mass, step, cache)
        for sequence, share in found.items():
            total[sequence] = total.get(sequence, 0.0) + share
    return distance(total)


def acceptance_error(vocab_size: int, step: Step = exact_step) -> float:
    """Largest distance of a chosen draft's acceptance from p(x), and of what follows a rejection from p without x."""
    gen = torch.Generator().manual_seed(vocab_size)
    worst = 0.0
    for kind in ("flat", "peaked", "sparse"):
        target = conditional_distributions(vocab_size, 0, gen, kind)[()]
        for token, prob in enumerate(target.tolist()):
            found = outcomes(step, target, None, token)
            worst = max(worst, abs(found.get(None, 0.0) - prob))
            others = (abs(found.get(t, 0.0) - p) for t, p in enumerate(target.tolist()) if t != token)
            worst = max(worst, found.get(token, 0.0), *others)
    return worst
