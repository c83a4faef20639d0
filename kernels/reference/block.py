"""Block verification (Sun et al. 2403.10444): the longest prefix that may stand, judged as a whole. Lossless.

With c_0 = 1 and c_i = min(1, c_{i-1} target_i(x_i) / draft_i(x_i)), the prefix of i of k tokens may end the block where
u_i <= h_i: h_k = c_k, and before it h_i = Z_i / (Z_i + 1 - c_i) with Z_i the sum of (c_i target_{i+1} - draft_{i+1})+.
The longest such prefix is kept (none: the empty one); what follows it has these weights, or after all k tokens the
target's distribution.
"""

import math

import torch

from vllm_specopt.kernels.reference.noise import DRAW, PREFIX, RESIDUAL, acceptance_uniform_ref, draw_uniform_ref
from vllm_specopt.kernels.reference.rows import draw_ref


def carry_ref(carry: float, target_prob: float, draft_prob: float) -> float:
    """c_i from c_{i-1}; 0 where the draft could not have drawn the token."""
    return min(1.0, carry * target_prob / draft_prob) if draft_prob > 0 else 0.0


def block_residual_ref(carry: float, target_probs: torch.Tensor, draft_probs: torch.Tensor) -> torch.Tensor:
    """Weights of the token after a prefix, ``[vocab]``: max(carry target - draft, 0)."""
    return (carry * target_probs - draft_probs).clamp(min=0)


def ending_probability_ref(carry: float, mass: float) -> float:
    """h_i of a prefix that is not the whole block; ``mass`` is Z_i."""
    return 1.0 if carry >= 1.0 else mass / (mass + 1.0 - carry)


def block_ref(
    target_probs: list[torch.Tensor],
    draft_probs: list[torch.Tensor],
    tokens: list[int],
    seed: int,
    positions: list[int],
) -> tuple[int, int, float]:
    """Verify a block.

    Args:
        target_probs: ``[vocab]`` each, one more than there are tokens.
        draft_probs: What each token was drawn from, ``[vocab]`` each.
        tokens: The draft tokens.
        seed: Of the request.
        positions: Absolute positions of the target's rows.

    Returns:
        How many tokens are kept, the token that follows (-1 for a row without a usable logit), and the margin.
    """
    carries = [1.0]
    for target, draft, token in zip(target_probs, draft_probs, tokens, strict=False):
        carries.append(carry_ref(carries[-1], float(target[token]), float(draft[token])))
    margin = math.inf
    for length in range(len(tokens), -1, -1):
        carry, mass = carries[length], math.nan
        if length == len(tokens):
            ending, rest = carry, 1.0
        else:
            mass = float(block_residual_ref(carry, target_probs[length], draft_probs[length]).sum())
            ending, rest = ending_probability_ref(carry, mass), mass + 1.0 - carry
        if length == 0:
            break
        # A rounding of Z or c moves h by up to 1 / (Z + 1 - c) of it.
        uniform = acceptance_uniform_ref(seed, positions[0], PREFIX + length)
        if carry < 1.0 or mass < 1e-4:
            margin = min(margin, abs(uniform - ending) * min(1.0, rest))
        if uniform <= ending:
            break
    if length == len(tokens):
        drawn, draw_margin = draw_ref(target_probs[length], draw_uniform_ref(seed, positions[length], DRAW))
        return length, drawn, min(margin, draw_margin)
    weights = block_residual_ref(carry, target_probs[length], draft_probs[length])
    left = float(weights.sum())
    drawn, draw_margin = draw_ref(
        weights if left > 0 else target_probs[length], draw_uniform_ref(seed, positions[length], RESIDUAL)
    )
    return length, drawn, min(margin, draw_margin, left if drawn >= 0 else math.inf)
