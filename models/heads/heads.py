"""Heads that draft from the target's hidden states: EAGLE-3, EAGLE, MTP, Medusa and Hydra, in plain PyTorch.

Parameters have the names of the checkpoints that vLLM reads. B is a batch, T its positions, H the target's hidden size.
Root t of a window is a position whose hidden state the target has computed, where token t + 1 is known too. Step s of
a head, from 1, reads token t + s at position t + s - 1 and predicts token t + s + 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

EPS, ROPE_BASE = 1e-6, 10000.0
Past = list[tuple[torch.Tensor, torch.Tensor]]


def rotated(x: torch.Tensor, start: int) -> torch.Tensor:
    """Turn x [B, heads, T, size] by its positions start, start + 1, ... as Llama does."""
    size, positions = x.shape[-1], torch.arange(start, start + x.shape[-2])
    angles = positions[:, None] / ROPE_BASE ** (torch.arange(0, size, 2) / size)
    cos, sin = angles.cos().repeat(1, 2).to(x.dtype), angles.sin().repeat(1, 2).to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Attention of one step of drafting: to what earlier roots left at step 1, and to the own root's later steps."""

    def __init__(self, inputs: int, config, bias: bool):
        super().__init__()
        self.size, self.heads, self.kv_heads = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.q_proj = nn.Linear(inputs, self.heads * self.size, bias=bias)
        self.k_proj = nn.Linear(inputs, self.kv_heads * self.size, bias=bias)
        self.v_proj = nn.Linear(inputs, self.kv_heads * self.size, bias=bias)
        self.o_proj = nn.Linear(self.heads * self.size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor, past: Past) -> torch.Tensor:
        """Attend from x [B, T, inputs], and append this step's keys and values to ``past``."""
        batch, length, _ = x.shape

        def split(projected: torch.Tensor) -> torch.Tensor:
            return projected.view(batch, length, -1, self.size).transpose(1, 2)

        step = len(past)
        query, key = rotated(split(self.q_proj(x)), step), rotated(split(self.k_proj(x)), step)
        past.append((key, split(self.v_proj(x))))
        causal, own = torch.ones(length, length, dtype=torch.bool).tril(), torch.eye(length, dtype=torch.bool)
        mask = torch.cat([causal] + [own] * step, dim=1)
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*past, strict=True))
        attended = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)
        return self.o_proj(attended.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    """Llama's gated layer."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A decoder layer after its first norm: attention, norm, gated layer."""

    def __init__(self, config, inputs: int | None = None, bias: bool = False):
        super().__init__()
        self.self_attn = Attention(inputs or config.hidden_size, config, bias)
        self.mlp = MLP(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, EPS)

    def run(self, x: torch.Tensor, residual: torch.Tensor, past: Past) -> torch.Tensor:
        """Map x [B, T, inputs] and residual [B, T, H] to [B, T, H]."""
        residual = residual + self.self_attn(x, past)
        return residual + self.mlp(self.post_attention_layernorm(residual))


class Eagle3(nn.Module):
    """EAGLE-3 over ``config.draft_vocab_size`` tokens; features are hidden states of three of the target's layers."""

    def __init__(self, config, lm_head: torch.Tensor):
        super().__init__()
        size = config.hidden_size
        self.fc = nn.Linear(3 * size, size, bias=False)
        self.midlayer = Block(config, inputs=2 * size)
        self.midlayer.input_layernorm = nn.RMSNorm(size, EPS)
        self.midlayer.hidden_norm = nn.RMSNorm(size, EPS)
        self.norm = nn.RMSNorm(size, EPS)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(lm_head)

    def forward(self, embedded: torch.Tensor, features: torch.Tensor, past: Past) -> tuple[torch.Tensor, torch.Tensor]:
        """Map embedded [B, T, H], features [B, T, 3 H] (H after step 1) to logits [B, T, draft tokens], features."""
        hidden = features if past else self.fc(features)
        layer = self.midlayer
        x = torch.cat((layer.input_layernorm(embedded), layer.hidden_norm(hidden)), dim=-1)
        hidden = layer.run(x, hidden, past)
        return self.lm_head(self.norm(hidden)), hidden


class Eagle(nn.Module):
    """EAGLE: features are the target's last hidden states, normed, and the target's head makes the logits."""

    def __init__(self, config, lm_head: torch.Tensor):
        super().__init__()
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList([Block(config)])
        self.register_buffer("target_head", lm_head, persistent=False)

    def forward(self, embedded: torch.Tensor, features: torch.Tensor, past: Past) -> tuple[torch.Tensor, torch.Tensor]:
        """Map embedded [B, T, H], features [B, T, H] to logits [B, T, V], features [B, T, H]."""
        x = self.fc(torch.cat((embedded, features), dim=-1))
        hidden = self.layers[0].run(x, x, past)
        return F.linear(hidden, self.target_head), hidden


class MTP(Block):
    """MiMo's layer for the next token but one: features are the target's last hidden states before its last norm."""

    def __init__(self, config, lm_head: torch.Tensor):
        super().__init__(config, bias=True)
        size = config.hidden_size
        self.token_layernorm, self.hidden_layernorm = nn.RMSNorm(size, EPS), nn.RMSNorm(size, EPS)
        self.input_proj = nn.Linear(2 * size, size, bias=False)
        self.input_layernorm, self.final_layernorm = nn.RMSNorm(size, EPS), nn.RMSNorm(size, EPS)
        self.register_buffer("target_head", lm_head, persistent=False)

    def forward(self, embedded: torch.Tensor, features: torch.Tensor, past: Past) -> tuple[torch.Tensor, torch.Tensor]:
        """Map embedded [B, T, H], features [B, T, H] to logits [B, T, V], features [B, T, H]."""
        if not past:
            # As vLLM does at position 0.
            embedded = torch.cat((torch.zeros_like(embedded[:, :1]), embedded[:, 1:]), dim=1)
        x = self.input_proj(torch.cat((self.hidden_layernorm(features), self.token_layernorm(embedded)), dim=-1))
        hidden = self.final_layernorm(self.run(self.input_layernorm(x), x, past))
        return F.linear(hidden, self.target_head), hidden


class Medusa(nn.Module):
    """Medusa: head i maps the target's last hidden state at root t, normed, to token t + 2 + i, with one LM head."""

    def __init__(self, config, lm_head: torch.Tensor, heads: int):
        super().__init__()
        size = config.hidden_size
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(size, size, bias=False)])}) for _ in range(heads)
        )
        self.lm_head = nn.Linear(size, lm_head.shape[0], bias=False)
        with torch.no_grad():
            self.lm_head.weight.copy_(lm_head)
            for block in self.blocks:
                block["layers"][0].weight.zero_()

    def forward(self, features: torch.Tensor) -> list[torch.Tensor]:
        """Map features [B, T, H] to logits [B, T, V] of each head."""
        return [self.lm_head(features + F.silu(block["layers"][0](features))) for block in self.blocks]


class Hydra(nn.Module):
    """Hydra (2402.05109): Medusa's head i that also sees the embeddings of tokens t + 1 ... t + 1 + i after its root.

    Each head is one layer of ``width`` between these and the root's last hidden state, normed; the target's head makes
    the logits. The second half of each head starts at zero.
    """

    def __init__(self, config, lm_head: torch.Tensor, heads: int, width: int):
        super().__init__()
        size = config.hidden_size
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "down": nn.Linear((2 + i) * size, width, bias=False),
                    "up": nn.Linear(width, size, bias=False),
                }
            )
            for i in range(heads)
        )
        for block in self.blocks:
            nn.init.zeros_(block["up"].weight)
        self.register_buffer("target_head", lm_head, persistent=False)

    def forward(self, features: torch.Tensor, embedded: torch.Tensor) -> list[torch.Tensor]:
        """Map features [B, T, H] and embedded [B, T, heads, H], each root's later tokens, to logits [B, T, V]."""
        logits = []
        for i, block in enumerate(self.blocks):
            seen = torch.cat((features, embedded[:, :, : i + 1].flatten(2)), dim=-1)
            logits.append(F.linear(features + block["up"](F.silu(block["down"](seen))), self.target_head))
        return logits
