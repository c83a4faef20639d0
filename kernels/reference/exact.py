"""Exact verification (Leviathan et al. 2211.17192, Chen et al. 2302.01318; one-hot drafts: sample and match)."""

import math

import torch

from vllm_specopt.kernels.reference.noise import DRAW, RESIDUAL, acceptance_uniform_ref, draw_uniform_ref
from vllm_specopt.kernels.reference.rows import draw_ref


def acceptance_probability_ref(target_prob: float, draft_prob: float) -> float:
    """Probability that a sampled draft token survives: min(1, target_prob / draft_prob); 0 where draft_prob is 0."""
    return min(1.0, float(target_prob / draft_prob)) if draft_prob > 0 else 0.0


def residual_ref(target_probs: torch.Tensor, draft_probs: torch.Tensor) -> torch.Tensor:
    """Weights of the recovered token, ``[vocab]``: max(target - draft, 0); the target's where nothing is left."""
    weights = (target_probs - draft_probs).clamp(min=0)
    return weights if (weights > 0).any() else target_probs


def match_ref(target_probs: torch.Tensor, token: int, seed: int, position: int) -> tuple[int | None, float]:
    """A one-hot draft, a placeholder (``token`` -1) or a bonus row: draw y, keep the draft where it equals y.

    Returns:
        None if the draft survives, else the token emitted in its place (-1 for a row without a usable logit); and the
        margin.
    """
    drawn, margin = draw_ref(target_probs, draw_uniform_ref(seed, position, DRAW))
    return (None if token >= 0 and drawn == token else drawn), margin


def ratio_test_ref(
    target_probs: torch.Tensor, draft_probs: torch.Tensor, token: int, seed: int, position: int
) -> tuple[int | None, float]:
    """A sampled draft: it survives while u <= target_prob / draft_prob; else a token from the residual.

    Returns:
        As :func:`match_ref`.
    """
    margin = math.inf
    if draft_probs[token] > 0:
        uniform, ratio = acceptance_uniform_ref(seed, position), float(target_probs[token] / draft_probs[token])
        margin = abs(uniform - ratio) / uniform
        if uniform <= acceptance_probability_ref(float(target_probs[token]), float(draft_probs[token])):
            return None, margin
    weights = residual_ref(target_probs, draft_probs)
    recovered, draw_margin = draw_ref(weights, draw_uniform_ref(seed, position, RESIDUAL))
    # Single precision cancels in target - draft: what is left counts against the margin.
    return recovered, min(margin, draw_margin, float(weights.sum()) if recovered >= 0 else math.inf)
