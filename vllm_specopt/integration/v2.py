"""Model runner V2: vLLM's request states to plain tensors, one call of verify(), and back.

V2 keeps sampling parameters in arrays of all request slots, on the device and on the host; the batch names its slots by
``idx_mapping``. The kernels read the device arrays through that mapping, so nothing is gathered or expanded, and the
host arrays say which parameters the batch uses at all.
"""

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.states import NO_LOGPROBS
from vllm.v1.worker.gpu.spec_decode import rejection_sampler as stock

from vllm_specopt.integration.config import SpecoptConfig
from vllm_specopt.integration.metrics import Account, new_counters
from vllm_specopt.integration.sharded import is_part, verification
from vllm_specopt.integration.v2_sampler import (
    BACKEND,
    KINDS,
    RequestedMethods,
    Sampler,
    look,
    notes_for,
    parameters_of,
    prepare,
    processed,
    reported,
)
from vllm_specopt.rules import Constants
from vllm_specopt.verify import Notes, verify

EXACT = SpecoptConfig("exact")


class RejectionSampler(stock.RejectionSampler):
    """Our verification in place of the stock sampler's; everything around it is the stock class."""

    def __init__(self, sampler, spec_config, device, config: SpecoptConfig = EXACT):
        """Take the stock arguments and the option; watermarking is left to the stock class."""
        super().__init__(sampler, spec_config, device)
        self._config, self._methods = config, None
        if config.allow_per_request:
            self._methods = RequestedMethods(config, sampler.sampling_states.max_num_reqs)
            sampler.logits_processors.append(self._methods)
        self.account = sampler.account if isinstance(sampler, Sampler) else Account(device)

    def _verify_in_chunks(self, logits: torch.Tensor, input_batch, *args, **kwargs):
        # Chunks whose requests ask for fewer log probabilities are as wide as the others.
        self._logprobs_dims = self.sampler.get_logprobs_dims(input_batch.idx_mapping_np)
        return super()._verify_in_chunks(logits, input_batch, *args, **kwargs)

    def _get_logprobs_tensors(
        self,
        sampled: torch.Tensor,
        num_sampled: torch.Tensor,
        logits: torch.Tensor,
        cu_num_logits: torch.Tensor,
        cu_num_logits_np: np.ndarray,
        max_num_logprobs: int,
    ) -> LogprobsTensors | None:
        """Log probabilities of the chunk that was verified last; rows of requests that do not ask mean nothing.

        Args:
            sampled: ``[num_reqs, K + 1]``, as :meth:`_verify` returns it, like ``num_sampled``.
            logits: ``[num_rows, vocab]``: raw, or the rows drawn from if what is after sampling parameters is wanted.
            cu_num_logits: ``[num_reqs + 1]``, leading 0; ``cu_num_logits_np`` is the same on the host.
            max_num_logprobs: Not read: specific tokens may be asked for, too.
        """
        if self._logprobs_dims is None:
            return None
        by_rank, num_specific = self._logprobs_dims
        slot_of_row, slots = self._chunk
        sampler, counts = self.sampler, np.diff(cu_num_logits_np)
        asks = sampler.sampling_states.num_logprobs[slots] != NO_LOGPROBS
        asks |= sampler.logprob_token_ids_state.num_token_ids.np[slots] > 0
        request_of_row = np.repeat(np.arange(len(counts)), counts)
        asking = np.flatnonzero(asks[request_of_row])
        at, request = (async_tensor_h2d(index, device=logits.device) for index in (asking, request_of_row[asking]))
        width = 1 + max(by_rank, num_specific)
        found = LogprobsTensors(
            sampled.new_zeros(len(logits), width),
            torch.zeros(len(logits), width, device=logits.device),
            sampled.new_zeros(len(logits)),
            cu_num_logits_np.tolist() if len(logits) != len(counts) else None,
        )
        if len(at):
            emitted = sampled[request, at - cu_num_logits[request]].clamp(min=0)
            rows, slot_of_row = logits[at], slot_of_row[at]
            if sampler.logprobs_mode in PROCESSED_LOGPROBS_MODES:
                rows = reported(sampler, rows, emitted, slot_of_row, slots[asks])
            asked = compute_topk_scores(
                rows,
                by_rank,
                emitted,
                logprob_token_ids_state=sampler.logprob_token_ids_state,
                expanded_idx_mapping=slot_of_row,
                max_per_req_token_ids=num_specific,
                logits_mode=sampler.logprobs_mode in ("raw_logits", "processed_logits"),
            )
            for whole, part in zip(found[:3], asked[:3], strict=True):
                whole[at] = part
        return found

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
            The rows drawn from, token ids ``[num_reqs, K + 1]`` int64 (-1 padded), and the number of them per request,
            int32.
        """
        context = LogitsContext(
            expanded_idx_mapping=expanded_idx_mapping,
            idx_mapping=idx_mapping,
            idx_mapping_np=idx_mapping_np,
            expanded_local_pos=expanded_local_pos,
            input_ids=draft_sampled,
            pos=pos,
            seq_lens_upper_bound_np=seq_lens_upper_bound_np,
        )
        rows, parameters = prepare(self.sampler, logits, context)
        account, rule = self.account, self._rule(idx_mapping_np)
        notes = notes_for(account, parameters)
        account.recorder.begin_step()
        token_ids, num_sampled = self._launch(
            rows,
            cu_num_logits,
            verify_draft_sampled,
            pos,
            idx_mapping,
            draft_logits,
            parameters,
            rule,
            account.bad_rows,
            account.counters,
            notes,
        )
        account.recorder.end_step()
        if notes is not None:
            self._look(rows, cu_num_logits, token_ids, pos, idx_mapping, parameters, rule, notes)
        self._chunk = expanded_idx_mapping, idx_mapping_np
        return rows, token_ids, num_sampled

    def _look(self, rows, cu_num_logits, token_ids, pos, idx_mapping, parameters, rule, notes) -> None:
        step = (rows, cu_num_logits, token_ids, pos, idx_mapping, parameters)
        look(self.sampler, self.account, *step, rule=rule[0], rule_requests=rule[1], notes=notes)

    def _launch(
        self, rows, cu_num_logits, drafts, pos, idx_mapping, draft_logits, parameters, rule, bad_rows, counters, notes
    ):
        constants, rule_requests = rule
        return verification(self.account, rows, verify)(
            rows,
            cu_num_logits,
            drafts,
            self.num_speculative_steps,
            positions=pos,
            state_indices=idx_mapping,
            draft_logits=None if parameters["temperature"] is None else draft_logits,
            bad_row_counter=bad_rows,
            rule=constants,
            rule_requests=rule_requests,
            counters=counters,
            notes=notes,
            backend=BACKEND,
            **parameters,
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
        # None: a batch without requests that follow the rule beside exact.
        rules: list[tuple[Constants | None, torch.Tensor | None]] = [(self._config.rule, None)]
        if self._methods is not None:
            rules = [(None, None), (self._config.rule, self._methods.flags.gpu)]
        # A part of the columns is verified as the model made it.
        layouts = [logits[:2]] if is_part(self.account, logits) else [logits[:2], processed(logits[:2])]
        max_rows = states.max_num_reqs * (self.num_speculative_steps + 1)
        if max_rows > stock.get_max_chunk_logits(logits.shape[1]):
            # A later chunk starts at any row, and not every row need be a multiple of 16 bytes away from the first.
            layouts.append(logits[1:3])
        for rows in layouts:
            for kind in KINDS:
                for chosen in rules:
                    counters, bad_rows = new_counters(device)
                    parameters, notes = parameters_of(self.sampler, *kind), Notes()
                    token_ids, _ = self._launch(rows, *arguments, parameters, chosen, bad_rows, counters, notes)
                    for given in (notes, None):
                        self._look(rows, arguments[0], token_ids, *arguments[2:4], parameters, chosen, given)

    def _rule(self, idx_mapping_np: np.ndarray):
        """Constants of the rule beside exact if this batch uses it, and which slots do (None: all)."""
        if self._methods is None:
            return self._config.rule, None
        if not np.any(self._methods.flags.np[idx_mapping_np]):
            return None, None
        return self._config.rule, self._methods.flags.gpu
