"""Fit the estimators of a calibration: which vocabulary blocks are read, and what stands for the rest.

The formula is that of ``kernels/calibrated.py``. Rows arrive scaled by their temperature.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy.optimize import least_squares
from scipy.special import logsumexp

# Rows count at their own temperature and, with less weight, at others: a server is asked for many.
TEMPERATURE_FACTORS = ((1.0, 1.0), (0.6, 0.3), (1.6, 0.3))
SMOOTHNESS = 0.3
LOWEST_MASS, HIGHEST_MASS = 1e-6, 1 - 1e-4


@dataclass(frozen=True)
class Rows:
    """Judged rows: target and draft logits ``[rows, vocab]`` over temperature, and what is known of the drafts."""

    target: np.ndarray
    draft: np.ndarray
    tokens: np.ndarray
    positions: np.ndarray
    temperatures: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def greedy(self) -> Rows:
        """The same rows with the draft's favourite token in place of the one drawn."""
        return replace(self, tokens=self.draft.argmax(axis=1))

    @cached_property
    def normalisers(self) -> dict[float, tuple[np.ndarray, np.ndarray]]:
        """log-sum-exps of target and draft by the factor on their temperatures; each reads all rows."""
        sides = (self.target, self.draft)
        return {f: tuple(logsumexp(side / f, axis=1) for side in sides) for f, _ in TEMPERATURE_FACTORS}


def choose_block_size(vocab_size: int) -> int:
    """64 tokens (128 bytes of bf16), less for vocabularies below 4,096 so that there are at least 64 blocks."""
    return int(min(64, max(1, 2 ** int(np.log2(max(vocab_size // 64, 1))))))


def rank_blocks(mass: np.ndarray, block_size: int) -> np.ndarray:
    """Block numbers, the one with most of the target's mean probability ``[vocab]`` first."""
    count = -(-len(mass) // block_size)
    padded = np.zeros(count * block_size)
    padded[: len(mass)] = mass
    return np.argsort(-padded.reshape(count, block_size).sum(axis=1), kind="stable")


def bytes_share(form: str, num_tokens: int, vocab_size: int) -> float:
    """Bytes of an estimate over those of the exact method's judged row, with bf16 logits and fp32 probabilities.

    With probabilities the exact method reads the target's row alone (2 bytes a token); the estimate reads both sides.
    """
    return num_tokens / vocab_size * (3.0 if form == "probs" else 1.0)


def blocks_within(form: str, share: float, block_size: int, vocab_size: int) -> int:
    """How many blocks a share of the exact method's bytes pays for."""
    return int(share * vocab_size / bytes_share(form, vocab_size, vocab_size) / block_size + 1e-9)


def block_tokens(blocks: np.ndarray, block_size: int, vocab_size: int) -> np.ndarray:
    """Token ids of blocks."""
    tokens = (np.asarray(blocks, dtype=np.int64)[:, None] * block_size + np.arange(block_size)).ravel()
    return tokens[tokens < vocab_size]


class Features:
    """What an estimator sees of rows: the blocks' tokens, and a one-hot draft's own."""

    def __init__(self, form: str, rows: Rows, tokens: np.ndarray, factor: float = 1.0) -> None:
        self._rows, self._with_drafted, self._factor = rows, form == "one_hot", factor
        self.read = np.zeros(rows.target.shape[1], dtype=bool)
        self.read[tokens] = True
        empty = np.full(len(rows), -np.inf)
        self.target_blocks = logsumexp(rows.target[:, tokens] / factor, axis=1) if len(tokens) else empty
        self.draft_blocks = logsumexp(rows.draft[:, tokens] / factor, axis=1) if len(tokens) else empty

    def partials(self, index, tokens) -> tuple[np.ndarray, np.ndarray]:
        """Partial log-sum-exps of target and draft for drafted tokens; row numbers and tokens of one shape."""
        if not self._with_drafted:
            return self.target_blocks[index], self.draft_blocks[index]
        found = []
        for logits, blocks in ((self._rows.target, self.target_blocks), (self._rows.draft, self.draft_blocks)):
            known = blocks[index]
            found.append(np.where(self.read[tokens], known, np.logaddexp(known, logits[index, tokens] / self._factor)))
        return found[0], found[1]


def estimates(form: str, coefficients, temperature, target_partial, draft_partial, draft_normaliser):
    """Estimated normalisers of the target and of the draft (known exactly where its probabilities are)."""
    extra = extra_of(form, draft_partial, draft_normaliser)
    target, *draft = coefficients

    def whole(partial, c):
        return partial + np.logaddexp(0.0, c[0] + c[1] * temperature + c[2] * target_partial + c[3] * extra)

    return whole(target_partial, target), whole(draft_partial, draft[0]) if draft else draft_normaliser


def extra_of(form: str, draft_partial, draft_normaliser):
    """The estimators' last input: 0, the draft's unread log odds, or its partial log-sum-exp."""
    if form == "one_hot":
        return np.zeros_like(draft_partial)
    if form == "logits":
        return draft_partial
    read = np.clip(np.exp(draft_partial - draft_normaliser), LOWEST_MASS, HIGHEST_MASS)
    return np.log1p(-read) - np.log(read)


def fit(
    form: str, rows: Rows, blocks: np.ndarray, block_size: int, acceptance: float = 1.0
) -> tuple[tuple[float, ...], ...]:
    """Coefficients of a form's estimators: least squares, then moved until acceptance is that part of the exact
    method's."""
    tokens = block_tokens(blocks, block_size, rows.target.shape[1])
    parts = [_Sample(form, rows, tokens, factor) for factor, _ in TEMPERATURE_FACTORS]
    weights = [weight for _, weight in TEMPERATURE_FACTORS]
    coefficients = [_least_squares(parts, weights, "target")]
    if form == "logits":
        coefficients.append(_least_squares(parts, weights, "draft"))
    wanted = acceptance * parts[0].exact_acceptance()
    low, high = coefficients[0][0] - 8.0, coefficients[0][0] + 8.0
    for _ in range(50):
        coefficients[0][0] = (low + high) / 2
        if parts[0].acceptance(coefficients) > wanted:
            low = coefficients[0][0]
        else:
            high = coefficients[0][0]
    return tuple(tuple(float(f"{value:.6g}") for value in side) for side in coefficients)


class _Sample:
    """Rows with what the estimators see of them for the token drafted, and what they should say."""

    def __init__(self, form: str, rows: Rows, tokens: np.ndarray, factor: float) -> None:
        index = np.arange(len(rows))
        self.form, self.temperature = form, rows.temperatures * factor
        features = Features(form, rows, tokens, factor)
        self.target_partial, self.draft_partial = features.partials(index, rows.tokens)
        self.target, self.draft = rows.normalisers[factor]
        extra = extra_of(form, self.draft_partial, self.draft)
        self.inputs = np.stack([np.ones(len(rows)), self.temperature, self.target_partial, extra], axis=1)
        self.log_ratio = rows.target[index, rows.tokens] / factor - self.target
        if form != "one_hot":
            self.log_ratio = self.log_ratio - (rows.draft[index, rows.tokens] / factor - self.draft)

    def exact_acceptance(self) -> float:
        return float(np.exp(np.minimum(self.log_ratio, 0.0)).mean())

    def acceptance(self, coefficients) -> float:
        target, draft = estimates(
            self.form, coefficients, self.temperature, self.target_partial, self.draft_partial, self.draft
        )
        error = (self.target - target) - (self.draft - draft)
        return float(np.exp(np.minimum(self.log_ratio + error, 0.0)).mean())


def _least_squares(parts: list[_Sample], weights: list[float], side: str) -> list[float]:
    inputs = np.concatenate([part.inputs for part in parts])
    gap = np.concatenate([getattr(part, side) - getattr(part, f"{side}_partial") for part in parts])
    weight = np.concatenate([np.full(len(part.inputs), weight) for part, weight in zip(parts, weights, strict=True)])
    found = least_squares(
        lambda c: weight * (np.logaddexp(0.0, inputs @ c) - gap), np.zeros(4), loss="soft_l1", f_scale=SMOOTHNESS
    )
    return found.x.tolist()
