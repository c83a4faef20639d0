"""Model runner V1 with vLLM's own samplers: they verify and draw, and the audit looks at what they emitted."""

from typing import Any

import torch
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample import rejection_sampler as stock_rejection
from vllm.v1.sample import sampler as stock
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_specopt.integration.metrics import Account
from vllm_specopt.integration.v1 import prepare
from vllm_specopt.integration.v1_sampler import GREEDY_BELOW, Draws, given_temperature, scale, works_on_probabilities


class WatchedSampler(stock.Sampler):
    """vLLM's sampler; bonus tokens are left to the rejection sampler's audit."""

    def __init__(self, sampler: stock.Sampler, draws: Draws):
        """Take the settings of the sampler that this one replaces."""
        super().__init__(sampler.logprobs_mode, sampler.use_fp64_gumbel)
        self.draws = draws
        self._is_bonus = False

    @property
    def account(self) -> Account:
        """What this worker's samplers count."""
        return self.draws.account

    def forward(
        self,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
        predict_bonus_token: bool = False,
        logprobs_mode_override=None,
    ) -> SamplerOutput:
        """As in vLLM's class."""
        self._is_bonus = predict_bonus_token
        return super().forward(logits, sampling_metadata, predict_bonus_token, logprobs_mode_override)

    def sample(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, logprobs_mode_override=None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in vLLM's class, whose ``forward`` calls it with rows that its logits processors have worked on."""
        auditor = self.account.auditor
        if self._is_bonus or sampling_metadata.all_greedy or auditor is None or not auditor.chooses():
            return super().sample(logits, sampling_metadata, logprobs_mode_override)
        # The class scales and filters in place.
        rows = logits.clone()
        sampled, shown = super().sample(logits, sampling_metadata, logprobs_mode_override)
        scaled = works_on_probabilities(sampling_metadata)
        if scaled:
            rows = scale(self, rows, sampling_metadata)
        look(self.draws, rows, self.draws.starts(len(rows)), sampled.view(-1, 1), sampling_metadata, scaled)
        return sampled, shown

    def warm_up(self, logits: torch.Tensor) -> None:
        """Launch every variant of the audit's kernels, as ``v1_sampler.Sampler.warm_up`` does of ours."""
        _warm_up(self.draws, logits.float(), 1)


class WatchedRejectionSampler(stock_rejection.RejectionSampler):
    """vLLM's rejection sampler, whatever its method."""

    def __init__(self, sampler: WatchedSampler, spec_config, device):
        """Take vLLM's arguments."""
        super().__init__(sampler, spec_config, device)
        self.draws = sampler.draws

    @property
    def account(self) -> Account:
        """What this worker's samplers count."""
        return self.draws.account

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """As in vLLM's class."""
        auditor = self.account.auditor
        if sampling_metadata.all_greedy or auditor is None or not auditor.chooses():
            return super().forward(metadata, draft_probs, logits, sampling_metadata)
        _, ordered, rows, scaled = prepare(self.sampler, logits, metadata, sampling_metadata)
        output = super().forward(metadata, draft_probs, logits, sampling_metadata)
        cu_num_logits = torch.cat((self.draws.starts(0), ordered.cu_num_sampled_tokens))
        look(self.draws, rows, cu_num_logits, output.sampled_token_ids, sampling_metadata, scaled)
        return output

    def warm_up(self, logits: torch.Tensor, num_speculative_tokens: int, probabilistic: bool) -> None:
        """Launch every variant of the audit's kernels, as ``v1.RejectionSampler.warm_up`` does of ours."""
        for rows in (logits, logits.float()):
            _warm_up(self.draws, rows, num_speculative_tokens + 1)


def look(
    draws: Draws,
    rows: torch.Tensor,
    cu_num_logits: torch.Tensor,
    token_ids: torch.Tensor,
    sampling_metadata: SamplingMetadata,
    scaled: bool,
) -> None:
    """Audit a step of vLLM's; it draws with random numbers of its own, so that the audit's are fresh ones.

    Args:
        draws: Of the worker.
        rows, cu_num_logits, token_ids: As :meth:`vllm_specopt.integration.audit.Auditor.look` takes them.
        sampling_metadata: Sampling parameters per request, not all of them greedy.
        scaled: Whether temperature and min-p have been applied to the rows.
    """
    temperature = given_temperature(sampling_metadata)
    if scaled:
        temperature = (temperature >= GREEDY_BELOW).float()
    assert draws.account.auditor is not None
    filters: dict[str, Any] = dict(draws.filters(sampling_metadata, min_p=not scaled))
    draws.account.auditor.look(
        rows,
        cu_num_logits,
        token_ids,
        temperature=draws.audit_temperature(sampling_metadata, temperature),
        seeds=draws.seeds(len(token_ids), {}, rows.device),
        **filters,
    )


def _warm_up(draws: Draws, logits: torch.Tensor, width: int) -> None:
    device, auditor = logits.device, draws.account.auditor
    if auditor is None:
        return
    filters: dict[str, Any] = {
        "top_k": torch.zeros(1, dtype=torch.int32, device=device),
        "top_p": torch.ones(1, device=device),
        "min_p": torch.zeros(1, device=device),
    }
    for given in ({}, filters):
        auditor.look(
            logits[:1],
            draws.starts(1),
            torch.zeros(1, width, dtype=torch.int32, device=device),
            temperature=torch.ones(1, device=device),
            seeds=torch.zeros(1, dtype=torch.int64, device=device),
            **given,
        )
