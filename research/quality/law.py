"""How far the law of the first emitted token leaves the target's, in an engine that serves: whole rows, in float64.

Nothing is sampled: a token is emitted by being drafted and accepted, or by being drawn from the residual after a
rejection. The rows are those that the engine itself verifies (``rows.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import expit, logsumexp

from research.quality.rows import Reservoir, Row
from vllm_specopt.integration.config import SpecoptConfig
from vllm_specopt.rules import SigmoidConstants

FORMS = {"vllm_specopt.integration.v1": "probs", "vllm_specopt.integration.v2": "logits"}
LOWEST = -1e4
"""Stands for a logit that is ruled out, so that no difference is undefined."""


class Rows:
    """Verified rows with their laws.

    Args:
        target, draft: Logits over temperature, float64 ``[rows, vocab]``; the draft's up to a constant per row.
    """

    def __init__(self, target: np.ndarray, draft: np.ndarray) -> None:
        self.target, self.draft = target, draft
        self._normalisers = logsumexp(target, axis=1), logsumexp(draft, axis=1)

    def __len__(self) -> int:
        return len(self.target)

    def draft_log_probs(self, i: int) -> np.ndarray:
        """Logarithms of the draft's probabilities of row i."""
        return self.draft[i] - self._normalisers[1][i]

    def laws(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """The target's and the draft's probabilities of row i."""
        return np.exp(self.target[i] - self._normalisers[0][i]), np.exp(self.draft_log_probs(i))


def law(reservoir: Reservoir, sampler: type, config: SpecoptConfig) -> dict | None:
    """Means over the rows, each from 0 to 1; None without rows.

    ``tv``: total variation distance of the emitted law from the target's; ``draft_tv``: the draft's own;
    ``acceptance``: the chance that the first draft token is accepted; ``exact_acceptance``: by the exact method.
    """
    kept = [row for row in reservoir.rows if row is not None]
    if not kept:
        return None
    rows = _scaled(kept)
    of_row = rule(config, FORMS[sampler.__module__], rows)
    found = np.array([of_row(i) for i in range(len(kept))])
    own = np.array([total_variation(*rows.laws(i)) for i in range(len(kept))])
    return {
        "tv": float(found[:, 0].mean()),
        "draft_tv": float(own.mean()),
        "acceptance": float(found[:, 1].mean()),
        "exact_acceptance": float(1 - own.mean()),
        "rows": len(kept),
    }


def rule(config: SpecoptConfig, form: str, rows: Rows) -> Callable[[int], tuple[float, float]]:
    """The (TV, acceptance) of a row under a method and its constants; form: what the drafter hands over."""
    if config.method == "exact":
        return lambda i: outcome(rows.laws(i), rows.laws(i))
    chosen = config.rule
    assert isinstance(chosen, SigmoidConstants), f"the quality of {config.method} has no formula here"

    def by_scores(i: int) -> tuple[float, float]:
        target = _score(rows.target[i], chosen.target_alpha, chosen.target_beta, chosen.clip)
        scaled = rows.draft_log_probs(i) if form == "probs" else rows.draft[i]
        draft = _score(scaled, chosen.draft_alpha, chosen.draft_beta, chosen.clip)
        return outcome(rows.laws(i), (target, draft))

    return by_scores


def outcome(laws: tuple[np.ndarray, np.ndarray], scores: tuple[np.ndarray, np.ndarray]) -> tuple[float, float]:
    """(TV, acceptance) of accepting a draft token by its scores' ratio, else drawing from max(target - draft score, 0).

    laws: Probabilities of target and draft ``[vocab]``; scores: what takes their place.
    """
    (target, draft), (target_score, draft_score) = laws, scores
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(draft_score > 0, target_score / draft_score, 0.0)
    accepted = draft * np.minimum(1.0, ratio)
    residual = np.maximum(target_score - draft_score, 0.0)
    residual = residual / residual.sum() if residual.sum() > 0 else target
    return total_variation(accepted + (1 - accepted.sum()) * residual, target), float(accepted.sum())


def total_variation(left: np.ndarray, right: np.ndarray) -> float:
    """Half the sum of absolute differences of two laws ``[vocab]``."""
    return float(0.5 * np.abs(left - right).sum())


def _score(scaled: np.ndarray, alpha: float, beta: float, clip: bool) -> np.ndarray:
    values = expit((scaled - alpha) / (beta - alpha))
    return np.where(scaled < alpha, 0.0, np.where(scaled > beta, 1.0, values)) if clip else values


def _scaled(kept: Sequence[Row]) -> Rows:
    # The two models' vocabularies may be padded to different sizes.
    width = min(len(row.draft) for row in kept)
    temperatures = np.array([row.temperature for row in kept])
    target = np.stack([row.target[:width] for row in kept]).astype(np.float64) / temperatures[:, None]
    sides = (target, np.stack([row.draft[:width] for row in kept]).astype(np.float64))
    return Rows(*(np.clip(np.nan_to_num(side, nan=LOWEST), LOWEST, -LOWEST) for side in sides))
