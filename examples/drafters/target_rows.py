"""What the target computed in a step, for drafters of one's own.

vLLM's ``custom_class`` hands a drafter the texts and nothing of the target's states. It does hand over the target when
it loads: :class:`TargetRows` registers a forward hook of PyTorch's on the layer that makes the logits and keeps what
goes through it: a row for each verified draft token and one for the token after them, request by request. Nothing of
vLLM is changed, and it works under CUDA graphs too: vLLM computes the logits outside of them.

What it costs: drafting waits until the emitted tokens have reached the host, as with every ``custom_class``, for which
vLLM switches asynchronous scheduling off; its own drafters on a GPU do not wait. Each text is hashed once a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.model_executor.layers.logits_processor import LogitsProcessor


@dataclass
class Step:
    """What a request did in a step.

    Attributes:
        text: [tokens] int32, its prompt and all it emitted.
        emitted: What it emitted in this step, at the end of ``text``.
        drafts: The draft tokens that were verified; row 0 is of the token before them, row i of the i-th.
        first: Its first row.
        memory: What the drafter keeps of this request from step to step.
    """

    text: np.ndarray
    emitted: list[int]
    drafts: list[int]
    first: int
    memory: dict[str, Any] = field(default_factory=dict)


class TargetRows:
    """Base of such a drafter: implement :meth:`draft`.

    A request is known again by its text. Where vLLM verified other drafts than were proposed (cut by a grammar, by the
    budget of tokens or at a preemption) the rows do not add up, and the step goes without drafts; the next one has them
    again. A wrong draft could only cost time: verification decides what is emitted.
    """

    def __init__(self, vllm_config):
        self.number = vllm_config.speculative_config.num_speculative_tokens
        self._rows: torch.Tensor | None = None
        self._proposed: dict[bytes, tuple[list[int], dict[str, Any]]] = {}

    def load_model(self, target_model: torch.nn.Module) -> None:
        """Hook into the target's layer that makes the logits."""
        layers = [layer for layer in target_model.modules() if isinstance(layer, LogitsProcessor)]
        if len(layers) != 1:
            raise ValueError(f"{type(target_model).__name__} has {len(layers)} layers that make logits, expected one")
        layers[0].register_forward_hook(self._after_logits)

    def _after_logits(self, layer: torch.nn.Module, inputs: tuple, logits: torch.Tensor) -> None:
        self._rows = self.kept(inputs[1], logits)

    def kept(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """What of each row the drafter needs: hidden_states [rows, H], the last and normed, unless overridden.

        ``logits`` [rows, vocab] are changed by what samples from them, so do not keep these.
        """
        return hidden_states

    def draft(self, steps: list[Step], rows: torch.Tensor) -> list[list[int]]:
        """Draft for requests that emitted something, at least one.

        Args:
            steps: The requests.
            rows: [rows, ...], what :meth:`kept` returned.

        Returns:
            At most ``self.number`` tokens for each.
        """
        raise NotImplementedError

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: np.ndarray,
        token_ids_cpu: np.ndarray,
        slot_mappings=None,
    ) -> list[list[int]]:
        """Draft for each request.

        Args:
            sampled_token_ids: What each of the B requests emitted in this step; nothing while its prompt is read.
            num_tokens_no_spec: [B] int32, the lengths of the texts.
            token_ids_cpu: [B, longest] int32, the texts.

        Returns:
            Draft tokens of each request.
        """
        steps, first = [], 0
        for index, emitted in enumerate(sampled_token_ids):
            text = token_ids_cpu[index, : num_tokens_no_spec[index]]
            before = text[: len(text) - len(emitted)].tobytes()
            drafts, memory = self._proposed.get(before, ([], {}))
            steps.append(Step(text, emitted, drafts, first, memory))
            first += len(drafts) + 1
        rows, self._rows = self._rows, None
        emitting = [step for step in steps if step.emitted]
        known = rows is not None and len(rows) == first
        drafted = iter(self.draft(emitting, rows) if known and emitting else [])
        result = [next(drafted, []) if step.emitted else [] for step in steps]
        self._proposed = {
            step.text.tobytes(): (drafts, step.memory) for step, drafts in zip(steps, result, strict=True)
        }
        return result
