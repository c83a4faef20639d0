"""Medusa and Hydra heads as drafters: a chain of each head's likeliest token.

    PYTHONPATH=examples/drafters vllm serve TARGET \\
        --speculative-config '{"method": "custom_class", "model": "medusa_hydra.Hydra",
                               "num_speculative_tokens": 3}' \\
        --additional-config '{"specopt": "exact", "heads": "HEADS"}'

HEADS is a folder with ``model.safetensors`` (layout: ``models/heads``, which has heads of both kinds). Medusa's is
vLLM's own: vLLM 0.32 has Medusa as a method, 0.33 no longer does. What hidden states cost here: ``target_rows.py``.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from target_rows import Step, TargetRows


class Heads(TargetRows):
    """Base of both: loads the weights, in the target's dtype and on its device."""

    FIRST, READS = "", 1
    """A weight that every such checkpoint has, and how many times the hidden size it reads."""

    def __init__(self, vllm_config):
        super().__init__(vllm_config)
        given = vllm_config.additional_config.get("heads")
        if not given:
            raise ValueError('additional_config has no key "heads", expected the folder of the heads')
        self._folder, self._config = Path(given), vllm_config.model_config

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Hook into the target and load the heads."""
        super().load_model(target_model)
        self._target = target_model
        like = next(target_model.parameters())
        loaded = load_file(self._folder / "model.safetensors")
        self.weights = {name: weight.to(like.device, self._config.dtype) for name, weight in loaded.items()}
        if self.FIRST not in self.weights:
            raise ValueError(f"{self._folder} holds no weight {self.FIRST!r}")
        own, size = self.weights[self.FIRST].shape[-1] // self.READS, self._config.get_hidden_size()
        if own != size:
            raise ValueError(f"{self._folder} was made for a hidden size of {own}, the target's is {size}")
        heads = len({name.split(".")[1] for name in self.weights if name.startswith("blocks.")})
        if heads < self.number:
            raise ValueError(f"{self._folder} holds {heads} heads, num_speculative_tokens is {self.number}")

    def draft(self, steps: list[Step], rows: torch.Tensor) -> list[list[int]]:
        """Draft for each request from the row that its last token was drawn from."""
        roots = [step.first + len(step.emitted) - 1 for step in steps]
        drawn = torch.tensor([step.emitted[-1] for step in steps], device=rows.device)
        return torch.stack(self.chain(rows[roots], drawn), dim=1).tolist()

    def chain(self, hidden: torch.Tensor, drawn: torch.Tensor) -> list[torch.Tensor]:
        """Map hidden [B, H] and the tokens [B] drawn there to ``self.number`` tensors [B] of draft tokens."""
        raise NotImplementedError


class Medusa(Heads):
    """Medusa (2401.10774): head i maps the hidden state alone to the token i + 1 behind the one drawn there."""

    FIRST = "blocks.0.layers.0.weight"

    def chain(self, hidden: torch.Tensor, drawn: torch.Tensor) -> list[torch.Tensor]:
        """As the base says; ``drawn`` is not read."""
        drafts = []
        for head in range(self.number):
            found, layer = hidden, 0
            while (weight := self.weights.get(f"blocks.{head}.layers.{layer}.weight")) is not None:
                found, layer = found + F.silu(F.linear(found, weight)), layer + 1
            lm_head = self.weights.get("lm_head.weight", self.weights.get(f"lm_heads.{head}.weight"))
            drafts.append(F.linear(found, lm_head).argmax(dim=-1))
        return drafts


class Hydra(Heads):
    """Hydra (2402.05109): head i also reads the embeddings of the drawn token and of the i drafts before its own.

    The logits are made by the target's own head.
    """

    FIRST, READS = "blocks.0.down.weight", 2

    def chain(self, hidden: torch.Tensor, drawn: torch.Tensor) -> list[torch.Tensor]:
        """As the base says."""
        seen, token, drafts = [hidden], drawn, []
        for head in range(self.number):
            seen.append(self._target.embed_input_ids(token).to(hidden.dtype))
            between = F.silu(F.linear(torch.cat(seen, dim=-1), self.weights[f"blocks.{head}.down.weight"]))
            found = hidden + F.linear(between, self.weights[f"blocks.{head}.up.weight"])
            token = self._target.compute_logits(found).argmax(dim=-1)
            drafts.append(token)
        return drafts
