"""Model runner V1: vLLM's metadata and sampling parameters to plain tensors, one call of verify(), and back.

The logits of a step lie request by request: a row per draft token, then the bonus row. Temperature, top-k and top-p go
to the kernels as they are, per request; what vLLM's own logits processors do (penalties, bad words, allowed tokens,
minimum length, thinking budget) is left to them, on a copy, and only for batches that need it.
"""

import copy
import functools
import itertools
import sys
import weakref
from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample import rejection_sampler as stock
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_specopt.config import SpecoptConfig, requested_method
from vllm_specopt.metrics import NOT_RECORDED, new_counters
from vllm_specopt.verify import verify

logger = init_logger("vllm.specopt")

GREEDY_BELOW = 1e-5
EXACT = SpecoptConfig("exact")
# What one draw of the stock sampler advances a CUDA generator by; the runner takes it back for a discarded draw.
OFFSET_PER_DRAW = 4


class RejectionSampler(stock.RejectionSampler):
    """Our verification in place of the stock sampler's; interface and ``parse_output`` are the stock ones.

    A request with its own seed draws as a function of that seed and of each token's absolute position, so given the
    same logits and drafts it gets the same tokens in any batch. The others get fresh seeds each step, from a generator
    that runs alike on every tensor-parallel rank.

    Attributes:
        fallbacks: Number of batches left to the stock sampler, by reason.
        bad_rows: Emitting rows without a usable logit so far, int64 ``[1]`` on the device.
        counters: Tokens and rows so far as ``verify`` counts them, int64 ``[num_methods + 1, 8]`` on the device.
        recorder: Told of each step and batch; publishes the counters where there is a ``/metrics``.
    """

    def __init__(self, sampler, spec_config, device, runner=None, seed: int = 0, config=EXACT):
        """Take the stock arguments, the runner (held weakly) for token positions, the seed of unseeded draws, and the
        option."""
        super().__init__(sampler, spec_config, device)
        self._config = config
        self._methods_of, self._methods = None, (None, None)
        self.fallbacks: Counter[str] = Counter()
        self.counters, self.bad_rows = new_counters(device)
        self.recorder = NOT_RECORDED
        self._runner = None if runner is None else weakref.ref(runner)
        self._fresh_seeds = np.random.Generator(np.random.Philox(seed))

    def forward(
        self,
        metadata: SpecDecodeMetadata,
        draft_probs: torch.Tensor | None,
        logits: torch.Tensor,
        sampling_metadata: SamplingMetadata,
    ) -> SamplerOutput:
        """Verify one step.

        Args:
            metadata: Draft tokens and where each request's rows are.
            draft_probs: ``[num_tokens, vocab]``, what the draft tokens were drawn from; None if they are certain.
            logits: ``[num_tokens + batch, vocab]`` bf16, fp16 or fp32; not modified.
            sampling_metadata: Sampling parameters per request.

        Returns:
            Token ids ``[batch, max_spec_len + 1]`` int32, -1 padded, and log probabilities if requested.
        """
        if reason := _unsupported(sampling_metadata):
            if not self.fallbacks[reason]:
                logger.warning("specopt: a batch goes to vLLM's own sampler: %s", reason)
            self.fallbacks[reason] += 1
            return super().forward(metadata, draft_probs, logits, sampling_metadata)

        num_logprobs = sampling_metadata.max_num_logprobs
        processed_logprobs = num_logprobs is not None and self.is_processed_logprobs_mode
        bonus = None if _is_stock(self.sampler) else self._custom_bonus(metadata, logits, sampling_metadata)
        rows = logits
        if processed_logprobs or _needs_processors(sampling_metadata):
            rows = self._process(logits, metadata, sampling_metadata, with_bonus=bonus is None)

        all_greedy = sampling_metadata.all_greedy
        temperature = None if all_greedy else sampling_metadata.temperature
        top_k, top_p = (None, None) if all_greedy else (sampling_metadata.top_k, sampling_metadata.top_p)
        if processed_logprobs and not all_greedy:
            rows = _constrain(rows, metadata, sampling_metadata)
            temperature, top_k, top_p = (temperature >= GREEDY_BELOW).float(), None, None

        num_reqs = len(metadata.num_draft_tokens)
        runner = None if self._runner is None else self._runner()
        sigmoid, sigmoid_requests = self._sigmoid(runner, sampling_metadata, num_reqs)
        self.recorder.begin_step()
        token_ids, _ = verify(
            rows,
            torch.nn.functional.pad(metadata.cu_num_sampled_tokens, (1, 0)),
            metadata.draft_token_ids,
            metadata.max_spec_len,
            temperature=temperature,
            seeds=None if all_greedy else self._seeds(num_reqs, sampling_metadata.generators, logits.device),
            positions=None if all_greedy or runner is None else runner.positions[metadata.logits_indices],
            draft_probs=None if all_greedy else draft_probs,
            top_k=top_k,
            top_p=top_p,
            bonus_token_ids=None if bonus is None else bonus.sampled_token_ids.view(-1),
            bad_row_counter=self.bad_rows,
            sigmoid=sigmoid,
            sigmoid_requests=sigmoid_requests,
            counters=self.counters,
            token_dtype=torch.int32,
        )
        self.recorder.end_step()

        logprobs = None
        if num_logprobs is not None:
            shown = rows if processed_logprobs else logits
            bonus_rows = shown[metadata.bonus_logits_indices]
            if bonus is not None and processed_logprobs:
                bonus_rows = bonus.logprobs_tensors.logprobs
            logprobs = self._get_logprobs_tensors(
                num_logprobs, metadata, logits, shown[metadata.target_logits_indices], bonus_rows, token_ids
            )
        return SamplerOutput(sampled_token_ids=token_ids, logprobs_tensors=logprobs)

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
        common = {
            "bonus_token_ids": None if _is_stock(self.sampler) else zeros(dtype=torch.int32),
            "bad_row_counter": bad_rows,
            "counters": counters,
            "token_dtype": torch.int32,
        }
        sampled = {
            "temperature": zeros(),
            "seeds": zeros(dtype=torch.int64),
            "positions": None if self._runner is None else torch.zeros(2, dtype=torch.int64, device=device),
        }
        # Without requests to choose by, all or none follow the sigmoid method.
        methods = [{"sigmoid": config.sigmoid if config.method == "sigmoid" else None}]
        if config.allow_per_request:
            methods = [{}, {"sigmoid": config.sigmoid, "sigmoid_requests": zeros(dtype=torch.bool)}]
        # A batch whose drafts come from an all-greedy one brings no probabilities, whatever the drafter.
        probs = torch.zeros(1, logits.shape[1], device=device) if probabilistic else None
        options = itertools.product(
            (None, zeros(dtype=torch.int32)), (None, zeros()), (None, probs) if probabilistic else (None,), methods
        )
        batches = [{}] + [{"top_k": k, "top_p": p, "draft_probs": d, **sampled, **m} for k, p, d, m in options]
        cu_num_logits = torch.tensor([0, 2], dtype=torch.int32, device=device)
        for rows in (logits[:2], _copied(logits[:2])):
            for batch in batches:
                for width in _output_widths(num_speculative_tokens):
                    verify(rows, cu_num_logits, zeros(dtype=torch.int32), width - 1, **common, **batch)

    def _custom_bonus(self, metadata, logits, sampling_metadata) -> SamplerOutput:
        """Bonus tokens from a sampler that is not vLLM's own, called as the stock rejection sampler calls it."""
        return self.sampler(
            logits=logits[metadata.bonus_logits_indices],
            sampling_metadata=replace(sampling_metadata, max_num_logprobs=-1),
            predict_bonus_token=True,
            logprobs_mode_override="processed_logits" if self.is_processed_logprobs_mode else "raw_logits",
        )

    def _process(self, logits, metadata, sampling_metadata, with_bonus: bool) -> torch.Tensor:
        """Copy the rows to fp32 and run vLLM's logits processors on them."""
        rows = _copied(logits)
        target, bonus = metadata.target_logits_indices, metadata.bonus_logits_indices
        # The bonus rows come first, as in the stock sampler: that call also advances the thinking-budget state.
        if with_bonus:
            at_bonus = _at_bonus_rows(sampling_metadata, metadata.num_draft_tokens)
            rows[bonus] = self.sampler.apply_logits_processors(rows[bonus], at_bonus, predict_bonus_token=True)
        rows[target] = self.apply_logits_processors(rows[target], sampling_metadata, metadata)
        return rows

    def _sigmoid(self, runner, sampling_metadata: SamplingMetadata, num_reqs: int):
        """Constants of the sigmoid method if this batch uses it, and which requests do (None: all)."""
        config = self._config
        if not config.allow_per_request or sampling_metadata.all_greedy or runner is None:
            return config.sigmoid if config.method == "sigmoid" else None, None
        # The runner makes new metadata whenever a request joins, leaves or moves.
        if self._methods_of is not sampling_metadata:
            requests = (runner.requests[req_id] for req_id in runner.input_batch.req_ids[:num_reqs])
            chosen = [requested_method(request.sampling_params.extra_args) or config.method for request in requests]
            chosen += [config.method] * (num_reqs - len(chosen))
            flags = np.array([method == "sigmoid" for method in chosen])
            on_device = async_tensor_h2d(flags, device=self.bad_rows.device) if flags.any() else None
            self._methods_of = sampling_metadata
            self._methods = (None if on_device is None else config.sigmoid, on_device)
        return self._methods

    def _seeds(self, num_reqs: int, generators: dict[int, torch.Generator], device: torch.device) -> torch.Tensor:
        """One int64 seed per request: its own if it has one, else a fresh one; no synchronisation."""
        seeds = self._fresh_seeds.integers(0, 2**64, size=num_reqs, dtype=np.uint64)
        for index, generator in generators.items():
            if index < num_reqs:
                seeds[index] = generator.initial_seed()
                if generator.device.type == "cuda":
                    generator.set_offset(generator.get_offset() + OFFSET_PER_DRAW)
        return async_tensor_h2d(seeds.view(np.int64), device=device)


def _copied(logits: torch.Tensor) -> torch.Tensor:
    """A copy for logits processors to change, fp32; contiguous, so that it is laid out alike whatever the batch."""
    return logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _output_widths(num_speculative_tokens: int) -> list[int]:
    """One output width for each variant of the kernel that writes it, which differ by powers of two from 8 on."""
    widths = range(2, num_speculative_tokens + 2)
    return sorted({min(max(8, 1 << (width - 1).bit_length()), widths[-1]) for width in widths})


def _unsupported(sampling_metadata: SamplingMetadata) -> str | None:
    """Why this batch must go to the stock sampler, if it must."""
    for processor in sampling_metadata.logitsprocs.argmax_invariant:
        if type(processor) is not MinPLogitsProcessor or processor.min_p_count:
            return f"{type(processor).__name__} works on probabilities"
    return None


def _needs_processors(sampling_metadata: SamplingMetadata) -> bool:
    """Whether any of vLLM's logits processors has something to do in this batch."""
    budget = sampling_metadata.thinking_budget_state_holder
    return (
        not sampling_metadata.no_penalties
        or sampling_metadata.allowed_token_ids_mask is not None
        or bool(sampling_metadata.bad_words_token_ids)
        or (budget is not None and budget.has_tracked_requests())
        or any(_is_active(processor) for processor in sampling_metadata.logitsprocs.non_argmax_invariant)
    )


def _at_bonus_rows(sampling_metadata: SamplingMetadata, num_draft_tokens: list[int]) -> SamplingMetadata:
    """Metadata whose minimum lengths count the draft tokens, which precede a bonus token.

    vLLM's processor counts them for the rows that judge drafts only: it keeps a stop token from ending a request at a
    bonus row whose request reaches its minimum within the step.
    """
    processors = sampling_metadata.logitsprocs.non_argmax_invariant
    if not any(type(processor) is MinTokensLogitsProcessor and processor.min_toks for processor in processors):
        return sampling_metadata
    counted = copy.copy(sampling_metadata.logitsprocs)
    counted.non_argmax_invariant = [
        _counting(processor, num_draft_tokens) if type(processor) is MinTokensLogitsProcessor else processor
        for processor in processors
    ]
    return replace(sampling_metadata, logitsprocs=counted)


def _counting(processor: MinTokensLogitsProcessor, num_draft_tokens: list[int]) -> MinTokensLogitsProcessor:
    counting = copy.copy(processor)
    counting.min_toks = {
        request: (minimum, range(len(output) + num_draft_tokens[request]), *rest)
        for request, (minimum, output, *rest) in processor.min_toks.items()
    }
    counting.update_state(None)
    return counting


def _is_active(processor) -> bool:
    if type(processor) is MinTokensLogitsProcessor:
        return bool(processor.min_toks)
    if type(processor) is LogitBiasLogitsProcessor:
        return bool(processor.biases)
    return True


def _is_stock(sampler) -> bool:
    """Whether a sampler is vLLM's own, unpatched, so that the kernels may draw the bonus token in its place."""
    source = sys.modules[Sampler.__module__].__file__
    return type(sampler) is Sampler and all(
        getattr(getattr(getattr(sampler, name), "__code__", None), "co_filename", None) == source
        for name in ("forward", "sample", "apply_logits_processors")
    )


def _constrain(rows: torch.Tensor, metadata: SpecDecodeMetadata, sampling_metadata: SamplingMetadata) -> torch.Tensor:
    """Apply temperature, top-k and top-p to fp32 rows, in place where possible; greedy rows keep their scale."""
    counts = np.asarray(metadata.num_draft_tokens) + 1
    request = async_tensor_h2d(np.repeat(np.arange(len(counts)), counts), device=rows.device)
    temperature = sampling_metadata.temperature
    temperature = torch.where(temperature < GREEDY_BELOW, 1.0, temperature)
    rows.div_(temperature[request].unsqueeze(1))
    top_k, top_p = (None if x is None else x[request] for x in (sampling_metadata.top_k, sampling_metadata.top_p))
    return apply_top_k_top_p(rows, top_k, top_p)
