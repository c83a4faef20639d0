"""Sigmoid verification (Wagner et al. 2406.11016): scores in place of probabilities. Not lossless."""

import math

import torch

from vllm_specopt.kernels.reference.noise import RESIDUAL, acceptance_uniform_ref, draw_uniform_ref
from vllm_specopt.kernels.reference.rows import draw_ref


def sigmoid_score_ref(
    values: torch.Tensor, temperature: float | None, alpha: float, beta: float, clip: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score sigmoid((z / T - alpha) / (beta - alpha)), which takes the place of a probability.

    Args:
        values: Logits z, or probabilities (whose logarithm stands in for z / T) where ``temperature`` is None.
        temperature: T, or None.
        alpha, beta: The constants of this side.
        clip: Scores are 0 where z / T < alpha and 1 where z / T > beta, as in the released code. Decided in single
            precision as z < alpha * T (or probability < exp(alpha)), so that every backend decides alike.

    Returns:
        Scores, the sigmoid's arguments (infinite where the score is 0 or 1 by a limit) and z / T, float64. NaN, -inf
        and probability 0 have score 0; +inf has score 1.
    """
    values = torch.where(values.isnan(), -math.inf if temperature is not None else 0.0, values)
    if temperature is None:
        values = values.clamp(min=0)
        scaled, limits = values.double().log(), torch.tensor([alpha, beta]).double().exp().float()
    else:
        scaled, limits = values.double() / temperature, torch.tensor([alpha, beta]) * torch.tensor(temperature)
    arguments = (scaled - alpha) / (beta - alpha)
    if clip:
        arguments = arguments.where(values.float() >= limits[0], -math.inf).where(values.float() <= limits[1], math.inf)
    arguments = torch.where(scaled == math.inf, math.inf, arguments)
    return arguments.sigmoid(), arguments, scaled


def sigmoid_residual_ref(
    target: tuple[torch.Tensor, ...], draft: tuple[torch.Tensor, ...], constants
) -> tuple[torch.Tensor, torch.Tensor]:
    """max(target score - draft score, 0) without cancellation, and the difference of the arguments.

    It is sigmoid(a) sigmoid(-b) (1 - exp(b - a)), with b - a from the difference of the scaled values: constants far
    apart leave scores that differ by less than their own last bits.

    Args:
        target, draft: What :func:`sigmoid_score_ref` returns for each.
        constants: ``SigmoidConstants``.
    """
    (_, target_argument, target_scaled), (_, draft_argument, draft_scaled) = target, draft
    width, draft_width = constants.target_beta - constants.target_alpha, constants.draft_beta - constants.draft_alpha
    gap = (draft_scaled - target_scaled) / width + draft_scaled * (1 / draft_width - 1 / width)
    gap = gap + (constants.target_alpha / width - constants.draft_alpha / draft_width)
    is_limit = target_argument.isinf() | draft_argument.isinf()
    gap = torch.where(is_limit, draft_argument - target_argument, gap).nan_to_num(0.0, math.inf, -math.inf)
    return target_argument.sigmoid() * (-draft_argument).sigmoid() * -torch.expm1(gap.clamp(max=0)), gap


def sigmoid_test_ref(
    target_row: torch.Tensor,
    target_probs: torch.Tensor,
    temperature: float,
    is_filtered: bool,
    draft_row: torch.Tensor | None,
    draft_is_probs: bool,
    token: int,
    seed: int,
    position: int,
    constants,
) -> tuple[int | None, float]:
    """Verify one draft token by its scores.

    The recovered token is drawn from the normalised max(target score - draft score, 0), of a one-hot draft from the
    target's distribution without the draft token; from the target's distribution where that is empty.

    Args:
        target_row: Raw target logits ``[vocab]``; target_probs: its distribution after temperature and filters.
        temperature: Of the request.
        is_filtered: Whether the request filters: what is removed then scores 0.
        draft_row: Draft logits or probabilities ``[vocab]``; None for a one-hot draft.
        token: The draft token.
        constants: ``SigmoidConstants``.

    Returns:
        As :func:`vllm_specopt.kernels.reference.exact.match_ref`.
    """
    target_constants = constants.target_alpha, constants.target_beta, constants.clip
    draft_constants = constants.draft_alpha, constants.draft_beta, constants.clip
    draft_temperature = None if draft_is_probs else temperature
    target = sigmoid_score_ref(target_row, temperature, *target_constants)
    is_kept = target_probs > 0 if is_filtered else torch.ones(len(target_row), dtype=torch.bool)
    target_score = target[0].where(is_kept, 0.0)
    draft, draft_score = None, torch.ones(len(target_row), dtype=torch.float64)
    if draft_row is not None:
        draft = sigmoid_score_ref(draft_row, draft_temperature, *draft_constants)
        draft_score = draft[0]

    margin = math.inf
    if draft_score[token] > 0:
        uniform, ratio = acceptance_uniform_ref(seed, position), float(target_score[token] / draft_score[token])
        margin = abs(uniform - ratio) / uniform
        if target_score[token] > 0 and uniform <= ratio:
            return None, margin

    # The emitting row is read as a whole, so +inf takes all of its score too.
    if (target_row == math.inf).any():
        is_kept = is_kept & (target_row == math.inf)
    cancels = torch.ones_like(target_score)
    if draft is None:
        weights = target_probs.clone()
        weights[token] = 0.0
    else:
        weights, gap = sigmoid_residual_ref(target, draft, constants)
        weights = weights.where(is_kept, 0.0)
        if draft_is_probs or target_constants != draft_constants:
            shifts = [c[0] / (c[1] - c[0]) for c in (target_constants, draft_constants)]
            size = (target[1] + shifts[0]).abs() + (draft[1] + shifts[1]).abs()
            size = size + abs(shifts[0] - shifts[1]) + 1 / (target_constants[1] - target_constants[0])
            cancels = (size / gap.abs()).nan_to_num(1.0, 1.0, 1.0).clamp(min=1)
        # Single precision runs out of range here, and backends of exponents.
        margin = min(margin, math.inf if weights.max() > 1e-30 or weights.max() == 0 else 0.0)
    total = float(weights.sum())
    if total > 0:
        # By how much rounding moves the running sum, against one part in its own precision.
        lost = float((weights * cancels).sum()) / total
        recovered, draw_margin = draw_ref(weights / total, draw_uniform_ref(seed, position, RESIDUAL))
        return recovered, min(margin, draw_margin / lost)
    recovered, draw_margin = draw_ref(target_probs, draw_uniform_ref(seed, position, RESIDUAL))
    return recovered, min(margin, draw_margin)
