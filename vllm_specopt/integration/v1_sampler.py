"""Model runner V1, engines without speculation: every token is drawn as a verified row's is.

Only the draw is ours. Log probabilities, penalties and every other logits processor are the stock class's code. With
speculation the runner sends all its steps to the rejection sampler, those without drafts included, and this class draws
for batches that go to the stock one.
"""

import functools
import itertools
import sys
import weakref

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.logger import init_logger
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample import sampler as stock
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
)
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from vllm_specopt.integration.metrics import Account, new_counters
from vllm_specopt.verify import verify

logger = init_logger("vllm.specopt")

GREEDY_BELOW = 1e-5
# What one draw of the stock sampler advances a CUDA generator by; the runner takes it back for a discarded draw.
OFFSET_PER_DRAW = 4


class Draws:
    """What all draws of one worker share: the runner, the seeds of requests without one, and the account.

    A request with its own seed draws as a function of that seed and of each token's absolute position. The others get
    fresh seeds each step, from a generator that runs alike on every tensor-parallel rank.
    """

    def __init__(self, device: torch.device | str, runner=None, seed: int = 0):
        """Take the device, the runner (held weakly) for token positions, and the seed of unseeded draws."""
        self.account = Account(device)
        self._runner = None if runner is None else weakref.ref(runner)
        self._fresh_seeds = np.random.Generator(np.random.Philox(seed))
        self._starts = torch.arange(1, dtype=torch.int32, device=device)

    @property
    def runner(self):
        """The model runner; None where a sampler was built without one."""
        return None if self._runner is None else self._runner()

    def seeds(self, num_reqs: int, generators: dict[int, torch.Generator], device: torch.device) -> torch.Tensor:
        """One int64 seed per request: its own if it has one, else a fresh one; no synchronisation."""
        seeds = self._fresh_seeds.integers(0, 2**64, size=num_reqs, dtype=np.uint64)
        for index, generator in generators.items():
            if index < num_reqs:
                seeds[index] = generator.initial_seed()
                if generator.device.type == "cuda":
                    generator.set_offset(generator.get_offset() + OFFSET_PER_DRAW)
        return async_tensor_h2d(seeds.view(np.int64), device=device)

    def starts(self, num_reqs: int) -> torch.Tensor:
        """``[num_reqs + 1]`` int32, the first row of each request where each has one row."""
        if len(self._starts) <= num_reqs:
            self._starts = torch.arange(2 * num_reqs + 1, dtype=torch.int32, device=self._starts.device)
        return self._starts[: num_reqs + 1]

    def leave_to_stock(self, reason: str) -> None:
        """Count a batch that vLLM's own sampler takes over; log the first for each reason."""
        if not self.account.fallbacks[reason]:
            logger.warning("specopt: a batch goes to vLLM's own sampler: %s", reason)
        self.account.fallbacks[reason] += 1


class Sampler(stock.Sampler):
    """vLLM's sampler, but the token comes from the draw that verification makes at that position."""

    def __init__(self, sampler: stock.Sampler, draws: Draws):
        """Take the settings of the stock sampler that this one replaces."""
        super().__init__(sampler.logprobs_mode, sampler.use_fp64_gumbel)
        self.draws = draws

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
        """Draw one token per request.

        Args:
            logits: ``[batch, vocab]`` bf16, fp16 or fp32, the last scheduled row of each request of the runner's step.
            sampling_metadata: Sampling parameters per request.
            predict_bonus_token, logprobs_mode_override: As in the stock class.

        Returns:
            Token ids ``[batch, 1]`` int32, and log probabilities if requested.
        """
        if (
            _wants_logprobs(sampling_metadata)
            or needs_processors(sampling_metadata)
            or works_on_probabilities(sampling_metadata)
        ):
            return super().forward(logits, sampling_metadata, predict_bonus_token, logprobs_mode_override)
        # The stock class would make a copy in single precision first.
        return SamplerOutput(sampled_token_ids=self._draw(logits, sampling_metadata), logprobs_tensors=None)

    def sample(
        self, logits: torch.Tensor, sampling_metadata: SamplingMetadata, logprobs_mode_override=None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Draw from rows that the logits processors have worked on; the stock ``forward`` calls it.

        Args:
            logits: ``[batch, vocab]`` fp32; modified if log probabilities after sampling parameters are requested.
            sampling_metadata: Sampling parameters per request.
            logprobs_mode_override: As in the stock class.

        Returns:
            Token ids ``[batch]``, and the processed log probabilities or logits if that is what is requested.
        """
        if reason := works_on_probabilities(sampling_metadata):
            self.draws.leave_to_stock(reason)
            return super().sample(logits, sampling_metadata, logprobs_mode_override)
        mode = logprobs_mode_override or self.logprobs_mode
        if mode not in PROCESSED_LOGPROBS_MODES or not _wants_logprobs(sampling_metadata):
            return self._draw(logits, sampling_metadata).view(-1), None
        # The token must be one whose processed probability is not 0, so it is drawn from what is reported.
        if not sampling_metadata.all_greedy:
            logits = self.apply_temperature(logits, sampling_metadata.temperature, sampling_metadata.all_random)
            for processor in sampling_metadata.logitsprocs.argmax_invariant:
                logits = processor.apply(logits)
            logits = apply_top_k_top_p(logits, sampling_metadata.top_k, sampling_metadata.top_p)
        processed = logits if mode == "processed_logits" else self.compute_logprobs(logits)
        return self._draw(logits, sampling_metadata, constrained=True).view(-1), processed

    def warm_up(self, logits: torch.Tensor) -> None:
        """Launch, on a dummy request, every kernel variant that serving can, so that none compiles in a request's way.

        Args:
            logits: ``[1, vocab]`` or more rows as the model gives them; the values do not matter.
        """
        zeros = functools.partial(torch.zeros, 1, device=logits.device)
        sampled = {
            "temperature": zeros(),
            "seeds": zeros(dtype=torch.int64),
            "positions": None if self.draws.runner is None else zeros(dtype=torch.int64),
        }
        filters = itertools.product((None, zeros(dtype=torch.int32)), (None, zeros()), (None, zeros()))
        batches = [{}] + [{"top_k": k, "top_p": p, "min_p": m, **sampled} for k, p, m in filters]
        counters, bad_rows = new_counters(logits.device)
        for rows in (logits[:1], copied(logits[:1])):
            for batch in batches:
                self._launch(rows, bad_rows, counters, **batch)

    def _draw(self, rows, sampling_metadata: SamplingMetadata, constrained: bool = False) -> torch.Tensor:
        """Token ids ``[batch, 1]``; ``constrained`` rows have temperature and filters applied."""
        parameters = {}
        if not sampling_metadata.all_greedy:
            num_reqs, runner = len(rows), self.draws.runner
            temperature = sampling_metadata.temperature
            parameters = {
                "temperature": (temperature >= GREEDY_BELOW).float() if constrained else temperature,
                "seeds": self.draws.seeds(num_reqs, sampling_metadata.generators, rows.device),
            }
            if runner is not None:
                last = runner.query_start_loc.gpu[1 : num_reqs + 1] - 1
                parameters["positions"] = runner.positions[last]
            if not constrained:
                parameters |= {"top_k": sampling_metadata.top_k, "top_p": sampling_metadata.top_p}
                parameters["min_p"] = _min_p(sampling_metadata)
        account = self.draws.account
        token_ids = self._launch(rows, account.bad_rows, account.unpublished, **parameters)
        account.recorder.plain_step()
        return token_ids

    def _launch(self, rows, bad_rows, counters, **parameters) -> torch.Tensor:
        return verify(
            rows,
            self.draws.starts(len(rows)),
            torch.empty(0, dtype=torch.int32, device=rows.device),
            0,
            bad_row_counter=bad_rows,
            counters=counters,
            token_dtype=torch.int32,
            **parameters,
        ).token_ids


def copied(logits: torch.Tensor) -> torch.Tensor:
    """A copy for logits processors to change, fp32; contiguous, so that it is laid out alike whatever the batch."""
    return logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def works_on_probabilities(sampling_metadata: SamplingMetadata, min_p: bool = False) -> str | None:
    """Which processor of this batch works on probabilities after temperature, if one does; min-p only on request."""
    for processor in sampling_metadata.logitsprocs.argmax_invariant:
        if type(processor) is not MinPLogitsProcessor or (min_p and processor.min_p_count):
            return f"{type(processor).__name__} works on probabilities"
    return None


def needs_processors(sampling_metadata: SamplingMetadata) -> bool:
    """Whether any of vLLM's logits processors has something to do in this batch."""
    budget = sampling_metadata.thinking_budget_state_holder
    return (
        not sampling_metadata.no_penalties
        or sampling_metadata.allowed_token_ids_mask is not None
        or bool(sampling_metadata.bad_words_token_ids)
        or (budget is not None and budget.has_tracked_requests())
        or any(_is_active(processor) for processor in sampling_metadata.logitsprocs.non_argmax_invariant)
    )


def is_stock(sampler) -> bool:
    """Whether a sampler is vLLM's own, unpatched, or ours in its place: then the kernels may draw for it."""
    source = sys.modules[stock.Sampler.__module__].__file__
    return type(sampler) in (stock.Sampler, Sampler) and all(
        getattr(getattr(getattr(stock.Sampler, name), "__code__", None), "co_filename", None) == source
        and name not in vars(sampler)
        for name in ("forward", "sample", "apply_logits_processors")
    )


def _wants_logprobs(sampling_metadata: SamplingMetadata) -> bool:
    return sampling_metadata.max_num_logprobs is not None or bool(sampling_metadata.logprob_token_ids)


def _min_p(sampling_metadata: SamplingMetadata) -> torch.Tensor | None:
    """``[batch]`` fp32; None if no request of the batch uses it."""
    for processor in sampling_metadata.logitsprocs.argmax_invariant:
        if type(processor) is MinPLogitsProcessor and processor.min_p_count:
            return processor.min_p[:, 0]
    return None


def _is_active(processor) -> bool:
    if type(processor) is MinTokensLogitsProcessor:
        return bool(processor.min_toks)
    if type(processor) is LogitBiasLogitsProcessor:
        return bool(processor.biases)
    return True
