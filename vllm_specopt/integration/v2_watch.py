"""Model runner V2 with vLLM's own samplers: they verify and draw, and the audit looks at what they emitted."""

import numpy as np
import torch
from vllm.v1.worker.gpu.sample import sampler as stock
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.spec_decode import rejection_sampler as stock_rejection

from vllm_specopt.integration.metrics import Account
from vllm_specopt.integration.v2_sampler import (
    KINDS,
    audit_temperature,
    look,
    parameters_of,
    prepare,
    processed,
    starts_of,
)


class WatchedSampler(stock.Sampler):
    """vLLM's sampler."""

    def __init__(self, sampler: stock.Sampler, account: Account):
        """Take over the states of the sampler that this one replaces; both see the same requests."""
        vars(self).update(vars(sampler))
        self.account = account
        self._starts = torch.arange(
            self.sampling_states.max_num_reqs + 1, dtype=torch.int32, device=account.counters.device
        )
        self.audit_temperature = audit_temperature(self)

    def apply_staged_writes(self) -> None:
        """As in vLLM's class; the runner calls it in steps that bring new requests."""
        super().apply_staged_writes()
        self.audit_temperature = audit_temperature(self)

    def sample(
        self,
        logits: torch.Tensor,
        expanded_idx_mapping: torch.Tensor,
        idx_mapping: torch.Tensor,
        idx_mapping_np: np.ndarray,
        pos: torch.Tensor,
        input_ids: torch.Tensor,
        expanded_local_pos: torch.Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        return_logprobs: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in vLLM's class."""
        step = (expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, input_ids, expanded_local_pos)
        prepared = self.prepared(logits, (*step, seq_lens_upper_bound_np))
        sampled, shown = super().sample(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            input_ids,
            expanded_local_pos,
            seq_lens_upper_bound_np,
            return_logprobs,
        )
        if prepared is not None:
            rows, parameters = prepared
            starts = starts_of(self._starts, len(rows))
            self.look(rows, starts, sampled.view(-1, 1), pos, expanded_idx_mapping, parameters)
        return sampled, shown

    def prepared(self, logits: torch.Tensor, step: tuple) -> tuple[torch.Tensor, dict] | None:
        """Rows and parameters of a step to audit, given in vLLM's order of arguments; None where it is not audited."""
        auditor = self.account.auditor
        if auditor is None or not auditor.chooses():
            return None
        names = ("expanded_idx_mapping", "idx_mapping", "idx_mapping_np", "pos", "input_ids", "expanded_local_pos")
        given = dict(zip((*names, "seq_lens_upper_bound_np"), step, strict=True))
        return prepare(self, logits, LogitsContext(**given))

    def look(self, rows, cu_num_logits, token_ids, pos, state_indices, parameters, num_sampled=None) -> None:
        """Audit a step, which was chosen; as :func:`vllm_specopt.integration.v2_sampler.look` takes it."""
        step = (rows, cu_num_logits, token_ids, pos, state_indices, parameters)
        look(self, self.account, *step, num_sampled=num_sampled)

    def warm_up(self, logits: torch.Tensor) -> None:
        """Launch every variant of the audit's kernels, as ``v2_sampler.Sampler.warm_up`` does of ours."""
        self.warm_audit(logits, None)

    def warm_audit(self, logits: torch.Tensor, num_sampled: torch.Tensor | None) -> None:
        """The same with or without the number of tokens of each request."""
        zeros = torch.zeros(1, dtype=torch.int64, device=logits.device)
        for rows in (logits[:1], processed(logits[:1])):
            for kind in KINDS:
                step = (rows, self._starts[:2], zeros[:, None], zeros, zeros, parameters_of(self, *kind))
                self.look(*step, num_sampled=num_sampled)


class WatchedRejectionSampler(stock_rejection.RejectionSampler):
    """vLLM's rejection sampler, whatever its method."""

    sampler: WatchedSampler

    @property
    def account(self) -> Account:
        """What this worker's samplers count."""
        return self.sampler.account

    def _verify(
        self,
        logits: torch.Tensor,
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,
        pos: torch.Tensor,
        cu_num_logits: torch.Tensor,
        idx_mapping: torch.Tensor,
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: torch.Tensor,
        expanded_local_pos: torch.Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        verify_draft_sampled: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As in vLLM's class."""
        step = (expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, draft_sampled, expanded_local_pos)
        prepared = self.sampler.prepared(logits, (*step, seq_lens_upper_bound_np))
        shown, sampled, num_sampled = super()._verify(
            logits,
            draft_logits,
            draft_sampled,
            pos,
            cu_num_logits,
            idx_mapping,
            idx_mapping_np,
            expanded_idx_mapping,
            expanded_local_pos,
            seq_lens_upper_bound_np,
            verify_draft_sampled,
        )
        if prepared is not None:
            rows, parameters = prepared
            self.sampler.look(rows, cu_num_logits, sampled, pos, idx_mapping, parameters, num_sampled=num_sampled)
        return shown, sampled, num_sampled

    def warm_up(self, logits: torch.Tensor, draft_logits: torch.Tensor | None = None) -> None:
        """Launch every variant of the audit's kernels, as ``v2.RejectionSampler.warm_up`` does of ours."""
        self.sampler.warm_audit(logits, torch.ones(1, dtype=torch.int32, device=logits.device))
