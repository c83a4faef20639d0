"""Model runner V1, engines without speculation: every token is drawn as a verified row's is.

Only the draw is ours. Log probabilities, penalties and every other logits processor are the stock class's code. With
speculation the runner sends all its steps to the rejection sampler, those without drafts included, and this class draws
for batches that go to the stock one.
"""

import functools
import sys
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
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

from vllm_specopt.integration.audit import leave_out
from vllm_specopt.integration.metrics import Account, new_counters
from vllm_specopt.integration.sharded import is_part, verification
from vllm_specopt.verify import Notes, verify

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
        self._unused = _unused(device)

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

    def audit_temperature(self, sampling_metadata: SamplingMetadata, temperature: torch.Tensor) -> torch.Tensor:
        """What the audit takes for the temperature per request: those with a seed of their own are left out."""
        seeded = np.zeros(len(temperature), dtype=bool)
        seeded[[index for index in sampling_metadata.generators if index < len(temperature)]] = True
        if not seeded.any():
            return temperature
        return leave_out(temperature, async_tensor_h2d(seeded, device=temperature.device))

    def filters(self, sampling_metadata: SamplingMetadata, min_p: bool = True) -> dict[str, torch.Tensor]:
        """Arguments of ``verify``: all three filters, those a batch does not use as such that keep everything, or none.

        Each combination would be one more variant of the kernels to compile.
        """
        used = {
            "top_k": sampling_metadata.top_k,
            "top_p": sampling_metadata.top_p,
            "min_p": _min_p(sampling_metadata) if min_p else None,
        }
        given = [tensor for tensor in used.values() if tensor is not None]
        if not given:
            return {}
        num_reqs = len(given[0])
        if len(self._unused["top_k"]) < num_reqs:
            self._unused = {name: tensor.repeat(2 * num_reqs) for name, tensor in _unused(given[0].device).items()}
        return {name: self._unused[name][:num_reqs] if tensor is None else tensor for name, tensor in used.items()}

    def look(self, rows, cu_num_logits, token_ids, sampling_metadata: SamplingMetadata, parameters, notes, **rule):
        """Have the tokens of a step audited.

        Args:
            rows, cu_num_logits, token_ids: As ``verify`` took them, or as they came out.
            sampling_metadata: Of the step.
            parameters: What else ``verify`` was given of the requests, not all of them greedy.
            notes: Which it filled in.
        """
        temperature = self.audit_temperature(sampling_metadata, parameters["temperature"])
        given: dict[str, Any] = parameters | {"temperature": temperature, "notes": notes} | rule
        assert self.account.auditor is not None
        self.account.auditor.look(rows, cu_num_logits, token_ids, **given)

    def starts(self, num_reqs: int) -> torch.Tensor:
        """``[num_reqs + 1]`` int32, the first row of each request where each has one row."""
        if len(self._starts) <= num_reqs:
            self._starts = torch.arange(2 * num_reqs + 1, dtype=torch.int32, device=self._starts.device)
        return self._starts[: num_reqs + 1]


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
            wants_logprobs(sampling_metadata)
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
        scaled = not sampling_metadata.all_greedy and works_on_probabilities(sampling_metadata)
        if scaled:
            logits = scale(self, logits, sampling_metadata)
        token_ids = self._draw(logits, sampling_metadata, scaled).view(-1)
        mode = logprobs_mode_override or self.logprobs_mode
        if mode not in PROCESSED_LOGPROBS_MODES or not wants_logprobs(sampling_metadata):
            return token_ids, None
        shown = reported(logits, token_ids.long(), sampling_metadata, scaled)
        return token_ids, shown if mode == "processed_logits" else self.compute_logprobs(shown)

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
        # Of a part of the columns, steps are drawn as the model made them, without filters.
        part = is_part(self.account, logits)
        batches = [{}, sampled, sampled | _unused(logits.device)][: 2 if part else None]
        counters, bad_rows = new_counters(logits.device)
        for rows in (logits[:1],) if part else (logits[:1], copied(logits[:1])):
            for batch in batches:
                notes = Notes()
                token_ids = self._launch(rows, bad_rows, counters, notes=notes, **batch)
                if batch and self.account.auditor is not None:
                    audited: dict[str, Any] = batch
                    for given in (notes, None):
                        self.account.auditor.look(rows, self.draws.starts(1), token_ids, notes=given, **audited)

    def _draw(self, rows, sampling_metadata: SamplingMetadata, scaled: bool = False) -> torch.Tensor:
        """Token ids ``[batch, 1]``; temperature and min-p have been applied to ``scaled`` rows."""
        parameters: dict[str, Any] = {}
        if not sampling_metadata.all_greedy:
            num_reqs, runner = len(rows), self.draws.runner
            temperature = given_temperature(sampling_metadata)
            parameters = {
                "temperature": (temperature >= GREEDY_BELOW).float() if scaled else temperature,
                "seeds": self.draws.seeds(num_reqs, sampling_metadata.generators, rows.device),
            }
            if runner is not None:
                last = runner.query_start_loc.gpu[1 : num_reqs + 1] - 1
                parameters["positions"] = runner.positions[last]
            parameters |= self.draws.filters(sampling_metadata, min_p=not scaled)
        account = self.draws.account
        notes = account.notes() if parameters else None
        token_ids = self._launch(rows, account.bad_rows, account.unpublished, notes=notes, **parameters)
        account.recorder.plain_step()
        if notes is not None:
            starts = self.draws.starts(len(rows))
            self.draws.look(rows, starts, token_ids, sampling_metadata, parameters, notes)
        return token_ids

    def _launch(self, rows, bad_rows, counters, **parameters) -> torch.Tensor:
        return verification(self.account, rows, verify)(
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


def given_temperature(sampling_metadata: SamplingMetadata) -> torch.Tensor:
    """The temperature per request of a batch that is not all greedy."""
    assert sampling_metadata.temperature is not None
    return sampling_metadata.temperature


def works_on_probabilities(sampling_metadata: SamplingMetadata) -> bool:
    """Whether a processor other than min-p works on logits after temperature; the kernels know min-p."""
    return any(
        type(processor) is not MinPLogitsProcessor for processor in sampling_metadata.logitsprocs.argmax_invariant
    )


def scale(sampler: stock.Sampler, rows: torch.Tensor, sampling_metadata: SamplingMetadata) -> torch.Tensor:
    """Apply temperature, and the processors that follow it, to a row per request; greedy rows keep their scale.

    Args:
        sampler: vLLM's sampler, or ours.
        rows: ``[batch, vocab]`` fp32; may be modified.
        sampling_metadata: Sampling parameters per request, not all of them greedy.
    """
    rows = sampler.apply_temperature(rows, given_temperature(sampling_metadata), sampling_metadata.all_random)
    for processor in sampling_metadata.logitsprocs.argmax_invariant:
        rows = processor.apply(rows)
    return rows


def reported(
    rows: torch.Tensor,
    emitted: torch.Tensor,
    sampling_metadata: SamplingMetadata,
    scaled: bool,
    request: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits that log probabilities after sampling parameters are those of.

    Args:
        rows: ``[num_rows, vocab]`` fp32 as they were drawn from; modified.
        emitted: ``[num_rows]`` int64, the token drawn from each row, which keeps its logit: where a token lies at a
            filter's threshold, vLLM's filter and ours may differ.
        sampling_metadata: Sampling parameters per request.
        scaled: Whether :func:`scale` has been applied.
        request: ``[num_rows]``, the request of each row; None if there is a row per request.

    Returns:
        ``[num_rows, vocab]`` fp32.
    """
    if sampling_metadata.all_greedy:
        return rows

    def of_rows(parameter):
        return parameter if parameter is None or request is None else parameter[request]

    if not scaled:
        rows = stock.Sampler.apply_temperature(rows, of_rows(sampling_metadata.temperature), all_random=False)
    emitted = emitted.unsqueeze(1)
    kept = rows.gather(1, emitted)
    min_p = None if scaled else of_rows(_min_p(sampling_metadata))
    if min_p is not None:
        rows.masked_fill_(rows < rows.amax(1, keepdim=True) + min_p.log().unsqueeze(1), -torch.inf)
    rows = apply_top_k_top_p(rows, of_rows(sampling_metadata.top_k), of_rows(sampling_metadata.top_p))
    return rows.scatter(1, emitted, kept)


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


@functools.cache
def plain_sampler() -> stock.Sampler:
    """vLLM's own sampler, for draft tokens' rows where the runner's is another's, which gives bonus tokens only."""
    return stock.Sampler()


def wants_logprobs(sampling_metadata: SamplingMetadata) -> bool:
    """Whether a request of this batch asks for log probabilities."""
    return sampling_metadata.max_num_logprobs is not None or bool(sampling_metadata.logprob_token_ids)


def is_filtered(sampling_metadata: SamplingMetadata) -> bool:
    """Whether a request of this batch uses top-k, top-p or min-p."""
    given = sampling_metadata.top_k, sampling_metadata.top_p, _min_p(sampling_metadata)
    return any(tensor is not None for tensor in given)


def _min_p(sampling_metadata: SamplingMetadata) -> torch.Tensor | None:
    """``[batch]`` fp32; None if no request of the batch uses it."""
    for processor in sampling_metadata.logitsprocs.argmax_invariant:
        if type(processor) is MinPLogitsProcessor and processor.min_p_count:
            return processor.min_p[:, 0]
    return None


def _unused(device: torch.device | str) -> dict[str, torch.Tensor]:
    """Filters of one request that keep everything."""
    full = functools.partial(torch.full, (1,), device=device)
    return {"top_k": full(0, dtype=torch.int32), "top_p": full(1.0), "min_p": full(0.0)}


def _num_known(output: Sequence[int]) -> int:
    """Tokens of a request's output, without the -1 that stand at its end for what is not known to the host yet."""
    known = len(output)
    while known and output[known - 1] == -1:
        known -= 1
    return known


def _is_active(processor) -> bool:
    if isinstance(processor, MinTokensLogitsProcessor):
        return any(_num_known(output) < minimum for minimum, output, *_ in processor.min_toks.values())
    if type(processor) is LogitBiasLogitsProcessor:
        return bool(processor.biases)
    return True
