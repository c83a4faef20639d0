"""The law of the first emitted token, computed from whole rows in float64: how far a rule leaves the target's.

Nothing is sampled: a token is emitted by being drafted and accepted, or by being drawn from the residual after a
rejection. Where the residual depends on the rejected token through one number, all rejected tokens are summed over by
sorting, in O(V log V).
"""

from __future__ import annotations

import numpy as np


def total_variation(law: np.ndarray, target: np.ndarray) -> float:
    """Half the sum of absolute differences of two laws ``[vocab]``."""
    return float(0.5 * np.abs(law - target).sum())


def plain_rule(target: np.ndarray, draft: np.ndarray, target_score: np.ndarray, draft_score: np.ndarray):
    """(TV, acceptance) of the paper's rule: accept by the scores' ratio, recover from max(target - draft score, 0)."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(draft_score > 0, target_score / draft_score, 0.0)
    accepted = draft * np.minimum(1.0, ratio)
    residual = np.maximum(target_score - draft_score, 0.0)
    residual = residual / residual.sum() if residual.sum() > 0 else target
    return total_variation(accepted + (1 - accepted.sum()) * residual, target), float(accepted.sum())


def one_hot_rule(target: np.ndarray, token: int, accepted: float):
    """(TV, acceptance) of a certain draft token that survives with a probability, and is never recovered."""
    return abs(accepted - float(target[token])), accepted


def repaired_one_hot_rule(target: np.ndarray, token: int, accepted: float):
    """(TV, acceptance) where the recovered token makes up for what was accepted too seldom."""
    return max(accepted - float(target[token]), 0.0), accepted


class RepairedRule:
    """One row under the calibrated rule, where the residual is max(target - min(draft, cap * target), 0)."""

    def __init__(self, target: np.ndarray, draft: np.ndarray) -> None:
        self._target, self._draft = target, draft
        self._excess = np.maximum(target - draft, 0.0)
        with np.errstate(divide="ignore"):
            # A drafted token's probability is capped where its ratio to the target's exceeds the cap.
            self._ratio = np.where(target > 0, draft / np.where(target > 0, target, 1.0), np.inf)
        order = np.argsort(self._ratio)
        self._sorted = self._ratio[order]
        self._target_below = np.concatenate([[0.0], np.cumsum(target[order])])
        self._draft_below = np.concatenate([[0.0], np.cumsum(draft[order])])

    def outcome(self, ratio: np.ndarray, cap: np.ndarray) -> tuple[float, float]:
        """(TV, acceptance) where token x is accepted with min(1, ratio[x]) and, if rejected, leaves cap[x]."""
        target, draft = self._target, self._draft
        accepted = draft * np.minimum(1.0, ratio)
        rejected = draft - accepted
        law = accepted.copy()
        total = self._excess.sum()
        is_low = cap < 1
        at_exact = rejected[~is_low].sum()
        law += at_exact * (self._excess / total if total > 0 else target)
        chosen = np.nonzero(is_low & (rejected > 0))[0]
        caps, weight = cap[chosen], rejected[chosen]
        below = np.searchsorted(self._sorted, caps, side="left")
        size = self._target_below[below] - self._draft_below[below]
        size += (1 - caps) * (self._target_below[-1] - self._target_below[below])
        order = np.argsort(caps)
        uncapped = np.concatenate([np.cumsum((weight / size)[order][::-1])[::-1], [0.0]])
        capped = np.concatenate([[0.0], np.cumsum((weight * (1 - caps) / size)[order])])
        place = np.searchsorted(caps[order], self._ratio, side="right")
        law += np.maximum(target - draft, 0.0) * uncapped[place] + target * capped[place]
        return total_variation(law, target), float(accepted.sum())
