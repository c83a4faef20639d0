"""Exact verification: the ratio test of sampled drafts and its residual (Leviathan et al. 2211.17192)."""

import triton
import triton.language as tl


@triton.jit
def passes(uniform, target_prob, draft_prob):
    """u <= target_prob / draft_prob; nothing passes where either is 0."""
    return (draft_prob > 0.0) & (target_prob > 0.0) & (uniform * draft_prob <= target_prob)


@triton.jit
def residual(target_probs, draft_probs):
    """Weights of the recovered token: max(target_prob - draft_prob, 0)."""
    return tl.maximum(target_probs - draft_probs, 0.0)
