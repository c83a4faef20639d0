"""Model runner V2: vLLM's request states to plain tensors, one call of verify(), and back.

V2 keeps sampling parameters in arrays of all request slots, on the device and on the host; the batch names its slots by
``idx_mapping``. The kernels read the device arrays through that mapping, so nothing is gathered or expanded, and the
host arrays say which parameters the batch uses at all.
"""

from collections import Counter

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.logger import init_logger
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS
from vllm.v1.worker.gpu.spec_decode import rejection_sampler as stock

from vllm_specopt.config import SpecoptConfig, requested_method
from vllm_specopt.metrics import NOT_RECORDED, new_counters
from vllm_specopt.verify import verify

logger = init_logger("vllm.specopt")

# V2 runs on Triton only; on a CPU that is Triton's interpreter.
BACKEND = "triton"
EXACT = SpecoptConfig("exact")


class RequestedMethods(LogitsProcessor):
    """Which request slots follow the sigmoid method; leaves the logits alone.

    A logits processor, because these are told of every request that takes a slot, and when to copy to the device.
    """

    def __init__(self, config: SpecoptConfig, max_num_reqs: int):
        self._default = config.method
        self.sigmoid = UvaBackedTensor(max_num_reqs, dtype=torch.bool)

    def add_request(self, req_idx: int, sampling_params) -> bool:
        method = requested_method(sampling_params.extra_args) or self._default
        self.sigmoid.np[req_idx] = method == "sigmoid"
        return False

    def apply_staged_writes(self) -> None:
        self.sigmoid.copy_to_uva()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        return logits


# Which requests a processor has work for, [max_num_reqs] on the host.
USES = {
    LogitBiasState: lambda state: state.use_logit_bias,
    PenaltiesState: lambda state: state.use_penalty,
    BadWordsState: lambda state: state.num_bad_words.np,
    RequestedMethods: lambda state: np.zeros_like(state.sigmoid.np),
}


class RejectionSampler(stock.RejectionSampler):
    """Our verification in place of the stock sampler's; everything around it is the stock class.

    Attributes:
        fallbacks: Number of batches left to the stock sampler, by reason.
        bad_rows: Emitting rows without a usable logit so far, int64 ``[1]`` on the device.
        counters: Tokens and rows so far as ``verify`` counts them, int64 ``[num_methods + 1, 8]`` on the device.
        recorder: Told of each step and batch; publishes the counters where there is a ``/metrics``.
    """

    def __init__(self, sampler, spec_config, device, config: SpecoptConfig = EXACT):
        """Take the stock arguments and the option; watermarking is left to the stock class."""
        super().__init__(sampler, spec_config, device)
        self._config, self._methods = config, None
        if config.allow_per_request:
            self._methods = RequestedMethods(config, sampler.sampling_states.max_num_reqs)
            sampler.logits_processors.append(self._methods)
        self.fallbacks: Counter[str] = Counter()
        self.counters, self.bad_rows = new_counters(device)
        self.recorder = NOT_RECORDED

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
        """Verify the requests of one chunk.

        Args:
            logits: ``[num_rows, vocab]`` raw target logits; not modified.
            draft_logits: ``[max_num_reqs, K, vocab]`` before temperature; None if draft tokens are certain.
            draft_sampled: ``[num_rows]``, the token fed to the target at each row.
            pos: ``[num_rows]``, absolute positions.
            cu_num_logits: ``[num_reqs + 1]``, leading 0.
            idx_mapping: ``[num_reqs]``, the slot of each request; ``idx_mapping_np`` is the same on the host.
            expanded_idx_mapping: ``[num_rows]``, the slot of each row.
            expanded_local_pos: ``[num_rows]``, each row's index within its request.
            seq_lens_upper_bound_np: ``[num_reqs]``, on the host.
            verify_draft_sampled: ``draft_sampled`` with -1 where the grammar forbids the draft token.

        Returns:
            Logits for log probabilities, token ids ``[num_reqs, K + 1]`` int64 (-1 padded), and the number of them per
            request, int32.
        """
        sampler, states = self.sampler, self.sampler.sampling_states
        if sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES and states.max_num_logprobs(idx_mapping_np) != NO_LOGPROBS:
            reason = "log probabilities after sampling parameters are requested"
            if not self.fallbacks[reason]:
                logger.warning("specopt: a batch goes to vLLM's own sampler: %s", reason)
            self.fallbacks[reason] += 1
            return super()._verify(
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

        rows = logits
        if self._needs_processors(idx_mapping_np):
            context = LogitsContext(
                expanded_idx_mapping=expanded_idx_mapping,
                idx_mapping=idx_mapping,
                idx_mapping_np=idx_mapping_np,
                expanded_local_pos=expanded_local_pos,
                input_ids=draft_sampled,
                pos=pos,
                seq_lens_upper_bound_np=seq_lens_upper_bound_np,
            )
            rows = _processed(logits)
            for processor in sampler.logits_processors:
                rows = processor.apply(rows, context)
            sampler.thinking_budget_state.apply(rows, context)

        def used(parameter, unused):
            return bool(np.any(parameter.np[idx_mapping_np] != unused))

        random = used(states.temperature, 0.0)
        # All three filters or none: each combination would be one more variant to compile.
        filtered = random and (
            used(states.top_k, states.vocab_size) or used(states.top_p, 1.0) or used(states.min_p, 0.0)
        )
        self.recorder.begin_step()
        token_ids, num_sampled = self._launch(
            rows,
            cu_num_logits,
            verify_draft_sampled,
            pos,
            idx_mapping,
            draft_logits,
            random,
            filtered,
            self._sigmoid(idx_mapping_np),
            self.bad_rows,
            self.counters,
        )
        self.recorder.end_step()
        return logits, token_ids, num_sampled

    def _launch(
        self, rows, cu_num_logits, drafts, pos, idx_mapping, draft_logits, random, filtered, sigmoid, bad_rows, counters
    ):
        """The call of verify() for a batch of which some request samples (``random``) and some of those filter."""
        states = self.sampler.sampling_states
        constants, sigmoid_requests = sigmoid
        return verify(
            rows,
            cu_num_logits,
            drafts,
            self.num_speculative_steps,
            temperature=states.temperature.gpu if random else None,
            seeds=states.seeds.gpu if random else None,
            positions=pos,
            state_indices=idx_mapping,
            draft_logits=draft_logits if random else None,
            top_k=states.top_k.gpu if filtered else None,
            top_p=states.top_p.gpu if filtered else None,
            min_p=states.min_p.gpu if filtered else None,
            bad_row_counter=bad_rows,
            sigmoid=constants,
            sigmoid_requests=sigmoid_requests,
            counters=counters,
            backend=BACKEND,
        )

    def warm_up(self, logits: torch.Tensor, draft_logits: torch.Tensor | None = None) -> None:
        """Launch, on dummy requests, every kernel variant that serving can, so that none compiles in a request's way.

        What Triton specialises on is taken from the arguments: pass what serving passes.

        Args:
            logits: ``[3, vocab]`` as the target model gives them; the values do not matter.
            draft_logits: The drafter's ``[max_num_reqs, K, vocab]``; None if draft tokens are certain.
        """
        states, device = self.sampler.sampling_states, logits.device
        # One request with one draft token. Integers as wide as vLLM's.
        arguments = (
            torch.tensor([0, 2], dtype=torch.int32, device=device),
            torch.zeros(2, dtype=torch.int32, device=device),
            torch.zeros(2, dtype=torch.int64, device=device),
            torch.zeros(1, dtype=torch.int64, device=device),
            draft_logits,
        )
        # None: a batch without requests that follow the sigmoid method.
        sigmoid = [(self._config.sigmoid, None)]
        if self._methods is not None:
            sigmoid = [(None, None), (self._config.sigmoid, self._methods.sigmoid.gpu)]
        layouts = [logits[:2], _processed(logits[:2])]
        max_rows = states.max_num_reqs * (self.num_speculative_steps + 1)
        if max_rows > stock.get_max_chunk_logits(logits.shape[1]):
            # A later chunk starts at any row, and not every row need be a multiple of 16 bytes away from the first.
            layouts.append(logits[1:3])
        for rows in layouts:
            for random, filtered in ((False, False), (True, False), (True, True)):
                for chosen in sigmoid:
                    counters, bad_rows = new_counters(device)
                    self._launch(rows, *arguments, random, filtered, chosen, bad_rows, counters)

    def _sigmoid(self, idx_mapping_np: np.ndarray):
        """Constants of the sigmoid method if this batch uses it, and which slots do (None: all)."""
        if self._methods is None:
            return self._config.sigmoid, None
        if not np.any(self._methods.sigmoid.np[idx_mapping_np]):
            return None, None
        return self._config.sigmoid, self._methods.sigmoid.gpu

    def _needs_processors(self, idx_mapping_np: np.ndarray) -> bool:
        """Whether a logits processor has something to do in this batch; temperature and filters do not count."""
        sampler = self.sampler
        if not np.any(sampler.needs_logits_processing[idx_mapping_np]):
            return False
        budget = sampler.thinking_budget_state
        if budget.enabled and np.any(budget.use_thinking_budget[idx_mapping_np]):
            return True
        # A processor we do not know may have work whenever any request does.
        return any(
            type(processor) not in USES or np.any(USES[type(processor)](processor)[idx_mapping_np])
            for processor in sampler.logits_processors
        )


def _processed(logits: torch.Tensor) -> torch.Tensor:
    """A copy for logits processors to change, fp32; contiguous, so that it is laid out alike whatever the batch."""
    return logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
