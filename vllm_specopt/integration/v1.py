"""Model runner V1: vLLM's metadata and sampling parameters to plain tensors, one call of verify(), and back.

The logits of a step lie request by request: a row per draft token, then the bonus row. Temperature, top-k, top-p
and min-p go to the kernels as they are, per request; what vLLM's own logits processors do (penalties, bad words,
allowed tokens, minimum length, logit bias, thinking budget), and custom ones, is left to them, on a copy, and only for
batches that need it.
"""

import functools
import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.platforms import current_platform
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample import rejection_sampler as stock
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_specopt.integration.config import SpecoptConfig, flag_of
from vllm_specopt.integration.metrics import Account, new_counters
from vllm_specopt.integration.sharded import filters_stay, is_part, verification
from vllm_specopt.integration.v1_rows import process
from vllm_specopt.integration.v1_sampler import (
    GREEDY_BELOW,
    Draws,
    Sampler,
    copied,
    given_temperature,
    is_stock,
    needs_processors,
    plain_sampler,
    reported,
    scale,
    wants_logprobs,
    works_on_probabilities,
)
from vllm_specopt.rules import SigmoidConstants
from vllm_specopt.verify import Notes, verify

EXACT = SpecoptConfig("exact")
BY_REQUEST = "_specopt_by_request"
"""Set on metadata whose rows are known to lie request by request, as the runner's own do: then none is moved."""


class RejectionSampler(stock.RejectionSampler):
    """Our verification in place of the stock sampler's; interface and ``parse_output`` are the stock ones."""

    def __init__(self, sampler, spec_config=None, device=None, runner=None, seed: int = 0, config=EXACT):
        """Take the stock arguments, the runner (held weakly) for token positions, the seed of unseeded draws, and the
        option. A sampler of ours brings the runner and the seed along."""
        super().__init__(sampler, spec_config, device)
        self._config = config
        self._methods_of: SamplingMetadata | None = None
        self._methods: tuple[SigmoidConstants | None, torch.Tensor | None] = None, None
        if isinstance(sampler, Sampler):
            self.draws = sampler.draws
        else:
            self.draws = Draws(current_platform.device_type or "cpu" if device is None else device, runner, seed)

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
        """Verify one step.

        Args:
            metadata: Draft tokens request by request, and at which rows of ``logits`` each is verified and each bonus
                token drawn. Without rows for bonus tokens a sampler that is not vLLM's own must give these.
            draft_probs: ``[num_tokens, vocab]``, what the draft tokens were drawn from; None if they are certain.
            logits: ``[num_tokens + batch, vocab]`` bf16, fp16 or fp32; not modified.
            sampling_metadata: Sampling parameters per request.

        Returns:
            Token ids ``[batch, max_spec_len + 1]`` int32, -1 padded, and log probabilities if requested.
        """
        bonus = None if is_stock(self.sampler) else self._custom_bonus(metadata, logits, sampling_metadata)
        all_greedy = sampling_metadata.all_greedy
        sampler = self.sampler if bonus is None else plain_sampler()
        logits, metadata, rows, scaled = prepare(sampler, logits, metadata, sampling_metadata, bonus is None)
        parameters: dict[str, Any] = {}
        if not all_greedy:
            temperature = given_temperature(sampling_metadata)
            parameters["temperature"] = (temperature >= GREEDY_BELOW).float() if scaled else temperature
            parameters |= self.draws.filters(sampling_metadata, min_p=not scaled)

        num_reqs, runner, account = len(metadata.num_draft_tokens), self.draws.runner, self.account
        if not all_greedy:
            parameters["seeds"] = self.draws.seeds(num_reqs, sampling_metadata.generators, logits.device)
        if not all_greedy and runner is not None:
            parameters["positions"] = runner.positions.index_select(0, metadata.logits_indices)
        rule, rule_requests = self._rule(runner, sampling_metadata, num_reqs)
        drafted = metadata.max_spec_len > 0
        if drafted:
            account.recorder.begin_step()
        cu_num_logits = torch.cat((self.draws.starts(0), metadata.cu_num_sampled_tokens))
        # Bonus tokens of another sampler are not known to be drawn from these rows.
        notes = account.notes() if parameters and bonus is None else None
        token_ids, _ = verification(account, rows, verify)(
            rows,
            cu_num_logits,
            metadata.draft_token_ids,
            metadata.max_spec_len,
            draft_probs=None if all_greedy else draft_probs,
            bonus_token_ids=None if bonus is None else bonus.sampled_token_ids.view(-1),
            bad_row_counter=account.bad_rows,
            rule=rule,
            rule_requests=rule_requests,
            counters=account.counters if drafted else account.unpublished,
            notes=notes,
            token_dtype=torch.int32,
            **parameters,
        )
        if drafted:
            account.recorder.end_step()
        else:
            account.recorder.plain_step()
        if notes is not None:
            chosen = {"rule": rule, "rule_requests": rule_requests}
            self.draws.look(rows, cu_num_logits, token_ids, sampling_metadata, parameters, notes, **chosen)

        logprobs = None
        if wants_logprobs(sampling_metadata):
            logprobs = self._logprobs(logits, rows, scaled, bonus, metadata, sampling_metadata, token_ids)
        return SamplerOutput(sampled_token_ids=token_ids, logprobs_tensors=logprobs)

    def _logprobs(
        self, logits, rows, scaled: bool, bonus, metadata, sampling_metadata: SamplingMetadata, token_ids: torch.Tensor
    ) -> LogprobsTensors | None:
        """Log probabilities of ``[batch * width]`` output tokens; where none is emitted they mean nothing."""
        num_reqs, width = token_ids.shape
        ends = metadata.cu_num_sampled_tokens.long()
        starts = torch.nn.functional.pad(ends[:-1], (1, 0))
        request = torch.arange(num_reqs, device=rows.device).repeat_interleave(width)
        at = torch.minimum(
            starts.unsqueeze(1) + torch.arange(width, device=rows.device), ends.unsqueeze(1) - 1
        ).flatten()
        emitted = token_ids.flatten().long().clamp(min=0)
        if self.is_processed_logprobs_mode:
            values = reported(rows[at].float(), emitted, sampling_metadata, scaled, request)
            if bonus is not None:
                is_bonus = (at == ends[request] - 1).unsqueeze(1)
                values = torch.where(is_bonus, bonus.logprobs_tensors.logprobs[request], values)
        else:
            values = logits[at].float()
        if not self.is_logits_logprobs_mode:
            values = self.sampler.compute_logprobs(values)
        wanted = {
            request * width + i: ids
            for request, ids in (sampling_metadata.logprob_token_ids or {}).items()
            for i in range(width)
        }
        by_rank = sampling_metadata.max_num_logprobs
        if by_rank is None:
            return self.sampler.gather_specific_token_logprobs(values, wanted, emitted)
        ranked = self.sampler.gather_logprobs(values, by_rank, emitted)
        specific = self.sampler.gather_specific_token_logprobs(values, wanted, emitted) if wanted else None
        return ranked if specific is None else _merged(ranked, specific, list(wanted))

    def warm_up(self, logits: torch.Tensor, num_speculative_tokens: int, probabilistic: bool) -> None:
        """Launch, on a dummy request, every kernel variant that serving can, so that none compiles in a request's way.

        Args:
            logits: ``[3, vocab]`` as the target model gives them; the values do not matter.
            num_speculative_tokens: Most draft tokens per request.
            probabilistic: Whether the drafter hands over what it drew the draft tokens from.
        """
        device, config = logits.device, self._config
        zeros = functools.partial(torch.zeros, 1, device=device)
        counters, bad_rows = new_counters(device)
        common: dict[str, Any] = {
            "bonus_token_ids": None if is_stock(self.sampler) else zeros(dtype=torch.int32),
            "bad_row_counter": bad_rows,
            "counters": counters,
            "token_dtype": torch.int32,
        }
        sampled: dict[str, Any] = {
            "temperature": zeros(),
            "seeds": zeros(dtype=torch.int64),
            "positions": None if self.draws.runner is None else torch.zeros(2, dtype=torch.int64, device=device),
        }
        # Without requests to choose by, all or none follow the rule.
        methods: list[dict[str, Any]] = [{"rule": None if config.method == "exact" else config.rule}]
        if config.allow_per_request:
            methods = [
                {},
                {
                    "rule": config.rule,
                    "rule_requests": zeros(dtype=torch.float32 if config.gives_deltas else torch.bool),
                },
            ]
        # A batch whose drafts come from an all-greedy one brings no probabilities, whatever the drafter.
        sharding, part = self.account.sharding, is_part(self.account, logits)
        vocab_size = logits.shape[1] if sharding is None else sharding.shard.vocab_size
        probs = torch.zeros(1, vocab_size, device=device) if probabilistic else None
        filters = {"top_k": zeros(dtype=torch.int32), "top_p": zeros(), "min_p": zeros()}
        # A part of the columns is verified as the model made it.
        options = itertools.product(
            ({}, filters) if not part or filters_stay(device) else ({},),
            (None, probs) if probabilistic else (None,),
            methods,
        )
        batches: list[dict[str, Any]] = [{}] + [{**f, "draft_probs": d, **sampled, **m} for f, d, m in options]
        cu_num_logits = torch.tensor([0, 2], dtype=torch.int32, device=device)
        # A step without drafts has the narrowest output.
        starts, no_drafts = self.draws.starts(1), torch.empty(0, dtype=torch.int32, device=device)
        notes = Notes()
        for rows in (logits[:2],) if part else (logits[:2], copied(logits[:2])):
            launch = verification(self.account, rows, verify)
            for batch in batches:
                for width in _output_widths(num_speculative_tokens):
                    drafts = zeros(dtype=torch.int32)
                    token_ids, _ = launch(rows, cu_num_logits, drafts, width - 1, notes=notes, **common, **batch)
                    self._warm_audit(rows, cu_num_logits, token_ids, batch, notes)
                # With filters, steps without drafts are verified whole.
                if batch.get("draft_probs") is None and not (part and "top_k" in batch):
                    positions = {} if batch.get("positions") is None else {"positions": batch["positions"][:1]}
                    token_ids, _ = launch(rows[:1], starts, no_drafts, 0, notes=notes, **common, **(batch | positions))
                    self._warm_audit(rows[:1], starts, token_ids, batch | positions, notes)

    def _warm_audit(self, rows, cu_num_logits, token_ids, batch: dict[str, Any], notes: Notes) -> None:
        auditor = self.account.auditor
        if auditor is not None and "temperature" in batch and is_stock(self.sampler):
            audited = {name: value for name, value in batch.items() if name != "draft_probs"}
            for given in (notes, None):
                auditor.look(rows, cu_num_logits, token_ids, notes=given, **audited)

    def _custom_bonus(self, metadata, logits, sampling_metadata) -> SamplerOutput:
        """Bonus tokens from a sampler that is not vLLM's own, called as the stock rejection sampler calls it."""
        return self.sampler(
            logits=logits[metadata.bonus_logits_indices],
            sampling_metadata=replace(sampling_metadata, max_num_logprobs=-1, logprob_token_ids=None),
            predict_bonus_token=True,
            logprobs_mode_override="processed_logits" if self.is_processed_logprobs_mode else "raw_logits",
        )

    def _rule(self, runner, sampling_metadata: SamplingMetadata, num_reqs: int):
        """Constants of the rule beside exact if this batch uses it, and which requests do (None: all)."""
        config = self._config
        if not config.allow_per_request or sampling_metadata.all_greedy or runner is None:
            return None if config.method == "exact" else config.rule, None
        # The runner makes new metadata whenever a request joins, leaves or moves.
        if self._methods_of is not sampling_metadata:
            requests = (runner.requests[req_id] for req_id in runner.input_batch.req_ids[:num_reqs])
            chosen = [flag_of(config, request.sampling_params.extra_args) for request in requests]
            chosen += [flag_of(config, None)] * (num_reqs - len(chosen))
            flags = np.array(chosen, dtype=np.float32 if config.gives_deltas else bool)
            on_device = async_tensor_h2d(flags, device=self.account.bad_rows.device) if flags.any() else None
            self._methods_of = sampling_metadata
            self._methods = (None if on_device is None else config.rule, on_device)
        return self._methods


def prepare(
    sampler,
    logits: torch.Tensor,
    metadata: SpecDecodeMetadata,
    sampling_metadata: SamplingMetadata,
    with_bonus: bool = True,
) -> tuple[torch.Tensor, SpecDecodeMetadata, torch.Tensor, bool]:
    """What to draw from, after vLLM's logits processors where the batch needs them.

    Args:
        sampler: vLLM's sampler, or ours.
        logits: ``[num_tokens + batch, vocab]``; not modified.
        metadata, sampling_metadata: Of the step.
        with_bonus: Whether bonus rows are processed, too.

    Returns:
        Logits by request and metadata that says so; the rows to draw from, in the same order; and whether temperature
        and min-p have been applied to these.
    """
    if not getattr(metadata, BY_REQUEST, False):
        logits, metadata = _by_request(logits, metadata)
    scaled = not sampling_metadata.all_greedy and works_on_probabilities(sampling_metadata)
    rows = logits
    if scaled or needs_processors(sampling_metadata):
        rows = copied(logits)
        process(
            sampler,
            rows,
            metadata.num_draft_tokens,
            sampling_metadata,
            functools.partial(scale, sampler, sampling_metadata=sampling_metadata) if scaled else None,
            with_bonus=with_bonus,
        )
    return logits, metadata, rows, scaled


def _by_request(logits: torch.Tensor, metadata: SpecDecodeMetadata) -> tuple[torch.Tensor, SpecDecodeMetadata]:
    """Rows in the order of requests, each one's bonus row last, and metadata whose indices say so.

    A bonus row that the metadata does not name is without a usable logit.
    """
    ends = np.cumsum(np.asarray(metadata.num_draft_tokens) + 1)
    is_target = np.ones(ends[-1], dtype=bool)
    is_target[ends - 1] = False
    target, bonus = (async_tensor_h2d(at, device=logits.device) for at in (np.flatnonzero(is_target), ends - 1))
    rows = logits.new_full((len(is_target), logits.shape[1]), -torch.inf)
    tokens = torch.zeros_like(metadata.logits_indices)
    for there, here in ((target, metadata.target_logits_indices), (bonus, metadata.bonus_logits_indices)):
        if len(here):
            rows[there] = logits[here]
            tokens[there] = metadata.logits_indices[here]
    return rows, replace(metadata, target_logits_indices=target, bonus_logits_indices=bonus, logits_indices=tokens)


def _output_widths(num_speculative_tokens: int) -> list[int]:
    """One output width for each variant of the kernel that writes it, which differ by powers of two from 8 on."""
    widths = range(2, num_speculative_tokens + 2)
    return sorted({min(max(8, 1 << (width - 1).bit_length()), widths[-1]) for width in widths})


def _merged(ranked: LogprobsTensors, specific: LogprobsTensors, rows: list[int]) -> LogprobsTensors:
    """Both as one table: the second's rows where it has been asked for, padded to one width."""
    wider, narrower = sorted((ranked, specific), key=lambda each: each.logprobs.shape[1], reverse=True)
    missing = wider.logprobs.shape[1] - narrower.logprobs.shape[1]
    padded = narrower._replace(
        logprob_token_ids=torch.nn.functional.pad(narrower.logprob_token_ids, (0, missing)),
        logprobs=torch.nn.functional.pad(narrower.logprobs, (0, missing), value=-torch.inf),
    )
    specific, ranked = (padded if each is narrower else wider for each in (specific, ranked))
    at = async_tensor_h2d(rows, device=ranked.logprobs.device, dtype=torch.long)
    return ranked._replace(
        logprob_token_ids=ranked.logprob_token_ids.index_copy(0, at, specific.logprob_token_ids[at]),
        logprobs=ranked.logprobs.index_copy(0, at, specific.logprobs[at]),
    )
