"""What a calibration is worth: bytes against total variation and acceptance, on rows that the fit has not seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from scipy.special import expit

from vllm_specopt.cli.calibrate_fit import Features, Rows, block_tokens, bytes_share, estimates
from vllm_specopt.cli.calibrate_law import (
    RepairedRule,
    one_hot_rule,
    plain_rule,
    repaired_one_hot_rule,
    total_variation,
)
from vllm_specopt.config import PAPER

COLUMNS = (
    "form", "estimator", "blocks", "bytes_percent", "tv", "tv_p90", "tv_over_draft", "acceptance", "exact_acceptance",
    "rows", "vocab_size",
)  # fmt: skip
FORM_NAMES = {"one_hot": "certain (greedy)", "probs": "probabilities (V1)", "logits": "logits (V2)"}


class Checked:
    """Rows with their laws, computed once: probabilities, normalisers, and the order the repaired rule needs."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.target_normaliser, self.draft_normaliser = rows.normalisers[1.0]
        self.favourites = rows.draft.argmax(axis=1)
        self.tokens = np.arange(rows.target.shape[1])
        self.rules = [RepairedRule(self.target(i), self.draft(i)) for i in range(len(rows))]

    def target(self, i: int) -> np.ndarray:
        """The target's probabilities of row i."""
        return np.exp(self.rows.target[i] - self.target_normaliser[i])

    def draft(self, i: int) -> np.ndarray:
        """The draft's probabilities of row i."""
        return np.exp(self.rows.draft[i] - self.draft_normaliser[i])


def measure(form: str, estimator: str, num_blocks: int, share: float, checked: Checked, outcome: Callable) -> dict:
    """One row of the curve: means of ``outcome(i)`` = (TV, acceptance) beside the draft's and the exact method's."""
    found = np.array([outcome(i) for i in range(len(checked.rows))])
    bounds = np.array([_bounds(form, checked, i) for i in range(len(checked.rows))])
    tv, own = found[:, 0].mean(), bounds[:, 0].mean()
    values = (
        FORM_NAMES[form], estimator, num_blocks, round(100 * share, 3), tv, np.quantile(found[:, 0], 0.9), tv / own,
        found[:, 1].mean(), bounds[:, 1].mean(), len(checked.rows), len(checked.tokens),
    )  # fmt: skip
    return {key: float(f"{v:.5g}") if isinstance(v, float) else v for key, v in zip(COLUMNS, values, strict=True)}


def _bounds(form: str, checked: Checked, i: int) -> tuple[float, float]:
    """The draft's own TV, and the exact method's acceptance."""
    target = checked.target(i)
    if form == "one_hot":
        prob = float(target[checked.favourites[i]])
        return 1 - prob, prob
    tv = total_variation(checked.draft(i), target)
    return tv, 1 - tv


def constants(form: str, checked: Checked, alphas: Callable, width: float, clip: bool) -> Callable:
    """Outcomes of the paper's rule with alphas(i) -> (target's, draft's) and beta - alpha = width."""

    def score(scaled, alpha):
        values = expit((scaled - alpha) / width)
        return np.where(scaled < alpha, 0.0, np.where(scaled > alpha + width, 1.0, values)) if clip else values

    def outcome(i: int):
        target_alpha, draft_alpha = alphas(i)
        target_score = score(checked.rows.target[i], target_alpha)
        if form == "one_hot":
            token = checked.favourites[i]
            return one_hot_rule(checked.target(i), token, float(target_score[token]))
        draft = checked.rows.draft[i]
        draft_score = score(draft - checked.draft_normaliser[i] if form == "probs" else draft, draft_alpha)
        return plain_rule(checked.target(i), checked.draft(i), target_score, draft_score)

    return outcome


def estimated(form: str, checked: Checked, features: Features, coefficients, tail: float) -> Callable:
    """Outcomes of the calibrated rule."""

    def outcome(i: int):
        rows = checked.rows
        tokens = checked.favourites[i : i + 1] if form == "one_hot" else checked.tokens
        target_partial, draft_partial = features.partials(i, tokens)
        known = checked.draft_normaliser[i]
        target, draft = estimates(form, coefficients, rows.temperatures[i], target_partial, draft_partial, known)
        target_score = expit(rows.target[i, tokens] - target - tail)
        if form == "one_hot":
            accepted = min(1.0, float(target_score[0] / expit(-tail)))
            return repaired_one_hot_rule(checked.target(i), tokens[0], accepted)
        ratio = target_score / np.maximum(expit(rows.draft[i] - draft - tail), 1e-300)
        cap = np.exp(np.clip((checked.target_normaliser[i] - target) - (known - draft), -60.0, 60.0))
        return checked.rules[i].outcome(ratio, np.broadcast_to(cap, ratio.shape))

    return outcome


def baselines(form: str, fitted: Rows, checked: Checked) -> Iterator[dict]:
    """Rows without an estimate: the paper's constants, mean normalisers by temperature, and by position too."""
    paper = constants(
        form, checked, lambda i: (PAPER.target_alpha, PAPER.draft_alpha), PAPER.target_beta - PAPER.target_alpha, True
    )
    yield measure(form, "paper's constants", 0, 0.0, checked, paper)
    sides = fitted.normalisers[1.0]
    rows = checked.rows
    for name, keys, wanted in (
        ("mean normaliser", fitted.temperatures, rows.temperatures),
        (
            "mean by position",
            fitted.temperatures + 1j * fitted.positions,
            rows.temperatures + 1j * rows.positions,
        ),
    ):
        means = {key: [side[keys == key].mean() for side in sides] for key in np.unique(keys)}
        overall = [side.mean() for side in sides]

        def alphas(i: int, means=means, overall=overall, wanted=wanted):
            target, draft = means.get(wanted[i], overall)
            return target, 0.0 if form == "probs" else draft

        yield measure(form, name, 0, 0.0, checked, constants(form, checked, alphas, 1.0, False))


def block_row(
    form: str, name: str, blocks: np.ndarray, block_size: int, coefficients, tail: float, checked: Checked
) -> dict:
    """The row of the curve of one set of blocks."""
    vocab_size = len(checked.tokens)
    tokens = block_tokens(blocks, block_size, vocab_size)
    features = Features(form, checked.rows, tokens)
    share = bytes_share(form, len(tokens), vocab_size)
    return measure(form, name, len(blocks), share, checked, estimated(form, checked, features, coefficients, tail))
