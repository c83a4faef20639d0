"""Exact verification: the ratio test of sampled drafts and its residual (Leviathan et al. 2211.17192)."""

import triton
import triton.language as tl


@triton.jit
def passes(uniform, target_prob, draft_prob):
    """u <= target_prob / draft_prob; nothing passes where either is 0."""
    return (draft_prob > 0.0) & (target_prob > 0.0) & (uniform * draft_prob <= target_prob)


@triton.jit
def residual(target_weights, draft_weights, ratio):
    """Weights of the recovered token: max(target - ratio draft, 0), in units of the target's mass."""
    return tl.maximum(tl.fma(draft_weights, tl.zeros_like(draft_weights) - ratio, target_weights), 0.0)
