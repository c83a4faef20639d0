"""Sample the rows that an engine in this process verifies, as its model runner hands them to ``verify``.

Model runner V1 keeps the draft's probabilities only; their log-sum-exp is noted where vLLM draws the draft tokens, so
that a draft row's logits can be had on either runner.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

MAX_ROWS, MAX_ELEMENTS = 400, 10_000_000


class Row(NamedTuple):
    """One verified row.

    target: Raw target logits ``[vocab]`` fp32. draft: Draft logits over temperature ``[draft_vocab]`` fp32.
    """

    target: np.ndarray
    draft: np.ndarray
    temperature: float


class Reservoir:
    """A uniform sample of the rows offered so far: at most ``size`` of them, in ``rows``."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._random = np.random.default_rng(seed)
        self._seen = 0
        self.rows: list[Row | None] = []

    def offer(self, make_row: Callable[[], Row | None]) -> None:
        """Count a row; keep it, made only if there is a place for it (None: its draft row is not known)."""
        self._seen += 1
        if len(self.rows) < self._size:
            self.rows.append(make_row())
        elif (place := int(self._random.integers(self._seen))) < self._size:
            self.rows[place] = make_row()


class DraftNormalisers:
    """The log-sum-exp of draft rows of which model runner V1 keeps the probabilities only.

    A row is known again by its largest probability and that token, which vLLM's own softmax has just computed.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, float], float] = {}

    def watching(self, draw: Callable) -> Callable:
        """Wrap vLLM's drawing of draft tokens."""

        def watched(logits, *args, **kwargs):
            token_ids, probs = draw(logits, *args, **kwargs)
            largest, tokens = probs.max(dim=-1)
            # The original has divided the logits by the temperature in place.
            normalisers = logits.float().logsumexp(dim=-1)
            for key, value in zip(zip(tokens.tolist(), largest.tolist(), strict=True), normalisers, strict=True):
                self._known[key] = float(value)
            return token_ids, probs

        return watched

    def logits(self, probs: torch.Tensor) -> torch.Tensor | None:
        """The scaled logits ``[vocab]`` of a row of probabilities; None if the row was not seen."""
        largest, token = probs.max(dim=-1)
        normaliser = self._known.get((int(token), float(largest)))
        return None if normaliser is None else probs.float().log() + normaliser


@contextmanager
def verified_rows(sampler: type, vocab_size: int, seed: int) -> Iterator[Reservoir]:
    """Sample verified rows of the engine in this process while in this context; it is slower meanwhile.

    ``sampler`` is the class of the engine's rejection sampler, one of ours.
    """
    from vllm.v1.spec_decode import llm_base_proposer as proposer

    adapter: Any = sys.modules[sampler.__module__]
    normalisers = DraftNormalisers()
    verify, draw = adapter.verify, proposer.compute_probs_and_sample_next_token
    reservoir = Reservoir(max(20, min(MAX_ROWS, MAX_ELEMENTS // vocab_size)), seed)
    proposer.compute_probs_and_sample_next_token = normalisers.watching(draw)
    adapter.verify = _offering(verify, normalisers, reservoir)
    try:
        yield reservoir
    finally:
        adapter.verify, proposer.compute_probs_and_sample_next_token = verify, draw


def _offering(verify: Callable, normalisers: DraftNormalisers, reservoir: Reservoir) -> Callable:
    """Wrap :func:`vllm_specopt.verify.verify`: rows up to a request's first rejection go to the reservoir."""

    def offering(logits, cu_num_logits, draft_token_ids, max_num_draft_tokens, **kwargs):
        verified = verify(logits, cu_num_logits, draft_token_ids, max_num_draft_tokens, **kwargs)
        temperature, states = kwargs.get("temperature"), kwargs.get("state_indices")
        if temperature is None:
            return verified
        starts, num_sampled = cu_num_logits.tolist(), verified.num_sampled.tolist()
        states = range(len(num_sampled)) if states is None else states.tolist()
        for request, state in enumerate(states):
            for position in range(min(num_sampled[request], starts[request + 1] - starts[request] - 1)):

                def make(row=starts[request] + position, request=request, state=state, position=position):
                    temp = float(temperature[state])
                    if kwargs.get("draft_logits") is not None:
                        draft = kwargs["draft_logits"][state, position].float() / temp
                    else:
                        draft = normalisers.logits(kwargs["draft_probs"][row - request])
                    return None if draft is None else Row(logits[row].float().cpu().numpy(), draft.cpu().numpy(), temp)

                reservoir.offer(make)
        return verified

    return offering
