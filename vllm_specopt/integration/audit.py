"""The audit of one worker's steps: which are audited, and what the counts say."""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from vllm_specopt.audit import NOT_AUDITED, audit, new_counts
from vllm_specopt.evidence import ALARM, BINS, Verdict, judge
from vllm_specopt.integration.config import METHODS, STOCK, SpecoptConfig
from vllm_specopt.rules import Constants, place_of
from vllm_specopt.verify import Notes

ROWS = (*METHODS, STOCK)
"""What a row of the counts stands for."""
SWEEPS = ("noted", "afresh")
"""What the audit took a row's sums and thresholds from: the verification's notes, or a sweep of its own."""

AFRESH = 0.2
"""Share of the audited steps of our own methods whose rows are swept anew: a wrong sum or threshold of the verification
itself would not show against its own notes."""

logger = logging.getLogger("vllm.specopt")


class Auditor:
    """Looks at the tokens of a worker's steps.

    Which steps is drawn beforehand, so that what a step emits has no say in it. Counting happens on the device; after
    each audited step a copy is on its way to the host, and no step waits for it.

    Attributes:
        counts: int64 ``[len(SWEEPS), len(ROWS), COLUMNS]``, see :func:`vllm_specopt.audit.new_counts`.
    """

    def __init__(self, config: SpecoptConfig, device: torch.device | str, backend: str | None = None):
        """Take the option, the device, and the backend if it does not follow from the device."""
        self._config, self._backend = config, backend
        self._chance = np.random.Generator(np.random.Philox(0))
        self._told: set[str] = set()
        self.restart(device)

    def restart(self, device: torch.device | str) -> None:
        """Count from 0 in fresh memory on a device."""
        self.counts = torch.stack([new_counts(len(ROWS), device) for _ in SWEEPS])
        on_gpu = self.counts.device.type == "cuda"
        self._host = torch.zeros_like(self.counts, device="cpu", pin_memory=True) if on_gpu else self.counts

    def chooses(self) -> bool:
        """Whether the next step is audited."""
        return self._config.audit >= 1.0 or self._chance.random() < self._config.audit

    def notes(self) -> Notes | None:
        """For the next step's verification to fill in; None where that step is not audited."""
        return Notes(wanted=self._chance.random() >= AFRESH) if self.chooses() else None

    def look(
        self,
        rows: torch.Tensor,
        cu_num_logits: torch.Tensor,
        token_ids: torch.Tensor,
        *,
        rule: Constants | None = None,
        rule_requests: torch.Tensor | None = None,
        notes: Notes | None = None,
        **parameters: Any,
    ) -> None:
        """Audit a step; arguments as in :func:`vllm_specopt.audit.audit`, and the rule as ``verify`` takes it."""
        afresh = notes is None or notes.left is None
        audit(
            rows,
            cu_num_logits,
            token_ids,
            self.counts[int(afresh)],
            notes=notes,
            method=place_of(rule) if self._config.verifies else len(ROWS) - 1,
            rule_requests=rule_requests,
            backend=self._backend,
            **parameters,
        )
        if self._host is not self.counts:
            self._host.copy_(self.counts, non_blocking=True)

    def verdicts(self) -> Iterator[tuple[str, dict[str, list[int]], Verdict]]:
        """Of each method that emitted, and the engine's own: its name, its bins by sweep, and the verdict.

        Warns once of a method whose evidence has passed the alarm.
        """
        for method, noted, afresh in zip(ROWS, *self._host.tolist(), strict=True):
            counts = [sum(both) for both in zip(noted, afresh, strict=True)]
            if method != self._config.method and not any(counts):
                continue
            verdict = judge(counts, afresh)
            if verdict.is_lossy and method not in self._told:
                self._told.add(method)
                logger.warning(
                    "specopt: the audit has found that the output of the method %s does not follow the target model's "
                    "distribution: after %d tokens the odds against it are beyond %.0e (10^%.1f)",
                    method,
                    verdict.tokens,
                    ALARM,
                    verdict.log10_evidence,
                )
            yield method, dict(zip(SWEEPS, (noted[:BINS], afresh[:BINS]), strict=True)), verdict


def leave_out(temperature: torch.Tensor, seeded: torch.Tensor) -> torch.Tensor:
    """Temperatures for the audit: requests with a seed of their own are left out, greedy ones stay greedy.

    Args:
        temperature: ``[max_reqs]`` fp32.
        seeded: ``[max_reqs]`` bool.
    """
    return torch.where(seeded, temperature * NOT_AUDITED, temperature)
