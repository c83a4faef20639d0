"""Give a small Llama the matrix sizes of a large one, and leave what it computes as it is.

Every width (hidden, feed-forward, number of attention heads) is multiplied by the same factor. The original channels
stay in front. New channels of the residual stream are zero throughout, because nothing writes to them: embeddings and
the two projections into the stream get zero rows there, and zero columns for what new heads and new feed-forward
channels hand over. What reads from new channels is filled with noise: it meets zeros. RMSNorm then averages over more
channels: with a factor of 4, 16, ... its weights are divided by 2, 4, ... (exact in any floating-point format) and its
epsilon by the factor.
"""

from __future__ import annotations

import math

import torch

NOISE = 0.02
# Rows of noise that are drawn; larger matrices repeat them.
DRAWN_ROWS = 512
READ_STREAM = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
WIDTHS = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


def widen(
    tensors: dict[str, torch.Tensor], config: dict, factor: int, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], dict]:
    """Return the tensors and the configuration of the wider model.

    Args:
        tensors: Of a Llama without biases, by name.
        config: Its ``config.json``.
        factor: 1, 4, 16, ...: of every width.
        generator: Of the noise.

    Raises:
        ValueError: The factor is no power of 4.
    """
    root = math.isqrt(max(factor, 0))
    if root * root != factor or root & (root - 1) or not factor:
        raise ValueError(f"width is {factor}, expected a power of 4 (1, 4, 16)")
    if factor == 1:
        return tensors, config
    wide = {}
    for name, tensor in tensors.items():
        kind = name.split(".")[-2]
        if tensor.dim() == 1:
            found = tensor.new_zeros(tensor.shape[0] * factor)
            found[: tensor.shape[0]] = tensor / root
        else:
            outputs, inputs = tensor.shape
            vocabulary = kind in ("embed_tokens", "lm_head")
            shape = outputs if vocabulary else outputs * factor, inputs * factor
            found = _noise(shape, tensor.dtype, generator) if kind in READ_STREAM else tensor.new_zeros(shape)
            found[:outputs, :inputs] = tensor
        wide[name] = found
    changed = {name: config[name] * factor for name in WIDTHS} | {"rms_norm_eps": config["rms_norm_eps"] / factor}
    return wide, config | {"head_dim": config["hidden_size"] // config["num_attention_heads"]} | changed


def _noise(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    rows, columns = shape
    drawn = (NOISE * torch.randn(min(rows, DRAWN_ROWS), columns, generator=generator)).to(dtype)
    return drawn.repeat(-(-rows // len(drawn)), 1)[:rows]
