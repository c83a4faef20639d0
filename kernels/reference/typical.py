"""Typical acceptance (Cai et al. 2401.10774): a draft token survives where it is probable enough. Not lossless.

Probable enough is a probability above min(epsilon, delta exp(-H)), both the probability and the entropy H those of the
row after temperature and before filters. Otherwise the row's own token decides, as in the exact rule.
"""

import math

import torch

from vllm_specopt.kernels.reference.exact import match_ref


def typical_threshold_ref(probs: torch.Tensor, epsilon: float, delta: float) -> float:
    """min(epsilon, delta exp(-entropy)) of a distribution, ``[vocab]`` float64."""
    entropy = float(torch.special.entr(probs).sum())
    return min(epsilon, delta * math.exp(-entropy))


def typical_test_ref(
    plain_probs: torch.Tensor, target_probs: torch.Tensor, token: int, seed: int, position: int, constants
) -> tuple[int | None, float]:
    """Verify one draft token, however it was drafted.

    Args:
        plain_probs: The target's distribution after temperature, before filters.
        target_probs: The same after filters; a token they remove does not survive.
        token: The draft token.
        constants: ``TypicalConstants``.

    Returns:
        As :func:`vllm_specopt.kernels.reference.exact.match_ref`.
    """
    threshold = typical_threshold_ref(plain_probs, constants.epsilon, constants.delta)
    prob = float(plain_probs[token])
    margin = abs(prob - threshold) / max(prob, threshold) if prob or threshold else math.inf
    emitted, match_margin = match_ref(target_probs, token, seed, position)
    if emitted is not None and target_probs[token] > 0 and prob > threshold:
        return None, min(margin, match_margin)
    return emitted, match_margin if emitted is None else min(margin, match_margin)
