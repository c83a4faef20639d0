"""Stock on a CPU, with the one function replaced that leaves the sampling parameters of drafts unwritten there."""

from __future__ import annotations


def expand_to_tokens(output, input_val, cu_num_tokens, replace_from, replace_to, MAX_NUM_TOKENS=None):
    """Write each request's value once per draft token, one value replaced; what vLLM's C++ version fails to do."""
    import torch

    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1)).long()
    values = torch.where(input_val == replace_from, torch.full_like(input_val, replace_to), input_val)
    output.copy_(values.repeat_interleave(counts, output_size=len(output)))


def repair_expand_kernel() -> None:
    """Put it in the place of vLLM's."""
    from vllm.utils import cpu_triton_utils

    cpu_triton_utils._expand_kernel_impl = expand_to_tokens
