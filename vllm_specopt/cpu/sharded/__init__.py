"""Verification on a CPU where each tensor-parallel rank holds some columns of the logits."""
