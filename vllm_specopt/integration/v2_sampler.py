"""Model runner V2, steps without draft tokens: every token is drawn as a verified row's is.

Only the draw is ours. Log probabilities, penalties, logit bias, bad words, thinking budgets, forced traces and the
count of NaNs are the stock class's code.
"""

import numpy as np
import torch
from vllm.config.model import PROCESSED_LOGPROBS_MODES
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor
from vllm.v1.worker.gpu.sample import sampler as stock
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState
from vllm.v1.worker.gpu.sample.states import SamplingStates

from vllm_specopt.integration.audit import leave_out
from vllm_specopt.integration.config import SpecoptConfig, flag_of
from vllm_specopt.integration.metrics import Account, new_counters
from vllm_specopt.integration.sharded import is_part, verification
from vllm_specopt.verify import Notes, verify

# V2 runs on Triton only; on a CPU that is Triton's interpreter.
BACKEND = "triton"


class RequestedMethods(LogitsProcessor):
    """Which request slots follow the rule beside exact; leaves the logits alone.

    A logits processor, because these are told of every request that takes a slot, and when to copy to the device.
    """

    def __init__(self, config: SpecoptConfig, max_num_reqs: int):
        self._config = config
        self.flags = UvaBackedTensor(max_num_reqs, dtype=torch.float32 if config.gives_deltas else torch.bool)

    def add_request(self, req_idx: int, sampling_params) -> bool:
        self.flags.np[req_idx] = flag_of(self._config, sampling_params.extra_args)
        return False

    def apply_staged_writes(self) -> None:
        self.flags.copy_to_uva()

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        return logits


# Which requests a processor has work for, [max_num_reqs] on the host.
USES = {
    LogitBiasState: lambda state: state.use_logit_bias,
    PenaltiesState: lambda state: state.use_penalty,
    BadWordsState: lambda state: state.num_bad_words.np > 0,
    RequestedMethods: lambda state: np.zeros(len(state.flags.np), dtype=bool),
}
# What a request may need, as bits.
RANDOM, FILTERED, PROCESSED = 1, 2, 4
# Of the batches there are: whether some request samples, and whether some of those filter. All three filters or none:
# each combination would be one more variant to compile.
KINDS = ((False, False), (True, False), (True, True))


class Sampler(stock.Sampler):
    """vLLM's sampler, but the token comes from the draw that verification makes at that position.

    Attributes:
        account: What this worker's samplers count.
        parameters: Sampling parameters of all slots, on the device. vLLM's own arrays are views of host memory, which
            every program of a kernel would read across the bus; they are copied when a request takes a slot.
        needs: What the requests in all slots need, found out at the same time.
    """

    def __init__(self, sampler: stock.Sampler, account: Account):
        """Take over the states of the stock sampler that this one replaces; both see the same requests."""
        vars(self).update(vars(sampler))
        self.account = account
        device = account.counters.device
        self._starts = torch.arange(self.sampling_states.max_num_reqs + 1, dtype=torch.int32, device=device)
        self._read_states()

    def apply_staged_writes(self) -> None:
        """As in the stock class; the runner calls it in steps that bring new requests."""
        super().apply_staged_writes()
        self._read_states()

    def _read_states(self) -> None:
        self.parameters = {name: array.clone() for name, array in _parameters(self.sampling_states).items()}
        self.needs = _needs(self)
        if self.account.auditor is not None:
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
        """Draw one token per row.

        Args:
            logits: ``[num_rows, vocab]`` raw logits; not modified.
            expanded_idx_mapping: ``[num_rows]``, the slot of each row.
            idx_mapping: ``[num_reqs]``, the slot of each request; ``idx_mapping_np`` is the same on the host.
            pos: ``[num_rows]``, absolute positions.
            input_ids: ``[num_rows]``, the token fed to the model at each row.
            expanded_local_pos: ``[num_rows]``, each row's index within its request.
            seq_lens_upper_bound_np: ``[num_reqs]``, on the host.
            return_logprobs: Whether a request asks for log probabilities.

        Returns:
            Token ids ``[num_rows]`` int64, and logits for log probabilities.
        """
        context = LogitsContext(
            expanded_idx_mapping=expanded_idx_mapping,
            idx_mapping=idx_mapping,
            idx_mapping_np=idx_mapping_np,
            expanded_local_pos=expanded_local_pos,
            input_ids=input_ids,
            pos=pos,
            seq_lens_upper_bound_np=seq_lens_upper_bound_np,
        )
        rows, parameters = prepare(self, logits, context)
        account, notes = self.account, notes_for(self.account, parameters)
        sampled = self._launch(
            rows, input_ids, pos, expanded_idx_mapping, parameters, account.bad_rows, account.unpublished, notes
        )
        account.recorder.plain_step()
        if notes is not None:
            starts = starts_of(self._starts, len(rows))
            look(self, self.account, rows, starts, sampled[:, None], pos, expanded_idx_mapping, parameters, notes=notes)
        if return_logprobs and self.logprobs_mode in PROCESSED_LOGPROBS_MODES:
            rows = reported(self, rows, sampled, expanded_idx_mapping, idx_mapping_np)
        return sampled, rows

    def warm_up(self, logits: torch.Tensor) -> None:
        """Launch, on a dummy request, every kernel variant that serving can, so that none compiles in a request's way.

        Args:
            logits: ``[1, vocab]`` or more rows as the model gives them; the values do not matter.
        """
        zeros = torch.zeros(1, dtype=torch.int64, device=logits.device)
        counters, bad_rows = new_counters(logits.device)
        # Of a part of the columns, steps without drafts are drawn as the model made them, without filters.
        part = is_part(self.account, logits)
        for rows in (logits[:1],) if part else (logits[:1], processed(logits[:1])):
            for random, filtered in KINDS[: 2 if part else None]:
                parameters, notes = parameters_of(self, random, filtered), Notes()
                sampled = self._launch(rows, zeros.int(), zeros, zeros, parameters, bad_rows, counters, notes)
                step = (rows, starts_of(self._starts, 1), sampled[:, None], zeros, zeros, parameters)
                for given in (notes, None):
                    look(self, self.account, *step, notes=given)

    def _launch(self, rows, input_ids, pos, slots, parameters, bad_rows, counters, notes) -> torch.Tensor:
        token_ids, _ = verification(self.account, rows, verify)(
            rows,
            starts_of(self._starts, len(rows)),
            input_ids,
            0,
            positions=pos,
            state_indices=slots,
            bad_row_counter=bad_rows,
            counters=counters,
            notes=notes,
            backend=BACKEND,
            **parameters,
        )
        return token_ids.view(-1)


def starts_of(starts: torch.Tensor, num_rows: int) -> torch.Tensor:
    """``[num_rows + 1]`` int32, the first row of each request where each has one row, of ``starts`` if it can be."""
    if num_rows < len(starts):
        return starts[: num_rows + 1]
    return torch.arange(num_rows + 1, dtype=torch.int32, device=starts.device)


def audit_temperature(sampler: stock.Sampler) -> torch.Tensor:
    """``[max_num_reqs]``, what the audit takes for the temperature of each slot: those with a seed are left out."""
    states = sampler.sampling_states
    temperature = _parameters(states)["temperature"]
    return leave_out(temperature, async_tensor_h2d(states.seeds_set.copy(), device=temperature.device))


def notes_for(account: Account, parameters: dict) -> Notes | None:
    """For a step's verification to fill in; None where no request samples, or the step is not audited."""
    return None if parameters["temperature"] is None else account.notes()


def look(sampler, account: Account, rows, cu_num_logits, token_ids, pos, state_indices, parameters, **more) -> None:
    """Have the tokens of a step audited, if some request samples.

    Args:
        sampler: Ours, or the one that watches vLLM's: it has ``audit_temperature``.
        account: Of the worker.
        rows, cu_num_logits, token_ids, pos, state_indices: As ``verify`` took them, or as they came out.
        parameters: Of :func:`parameters_of`.
        more: Further arguments of :meth:`vllm_specopt.integration.audit.Auditor.look`.
    """
    auditor = account.auditor
    if auditor is not None and parameters["temperature"] is not None:
        given = parameters | {"temperature": sampler.audit_temperature}
        auditor.look(rows, cu_num_logits, token_ids, positions=pos, state_indices=state_indices, **given, **more)


def prepare(sampler: stock.Sampler, logits: torch.Tensor, context: LogitsContext) -> tuple[torch.Tensor, dict]:
    """What to draw from, after vLLM's logits processors where the batch needs them.

    Args:
        sampler: vLLM's sampler, or ours.
        logits: ``[num_rows, vocab]`` raw logits; not modified.
        context: Which request each row belongs to.

    Returns:
        Rows ``[num_rows, vocab]``, and the sampling parameters that ``verify`` is to apply to them.
    """
    needs = sampler.needs if isinstance(sampler, Sampler) else _needs(sampler)
    needed = int(np.bitwise_or.reduce(needs[context.idx_mapping_np]))
    rows = logits
    if needed & PROCESSED:
        rows = processed(logits)
        for processor in sampler.logits_processors:
            rows = processor.apply(rows, context)
        sampler.thinking_budget_state.apply(rows, context)
    random = bool(needed & RANDOM)
    return rows, parameters_of(sampler, random, random and bool(needed & FILTERED))


def reported(
    sampler: stock.Sampler, rows: torch.Tensor, emitted: torch.Tensor, slot_of_row: torch.Tensor, slots: np.ndarray
) -> torch.Tensor:
    """Logits that log probabilities after sampling parameters are those of; vLLM's code makes them.

    Args:
        sampler: vLLM's sampler, or ours.
        rows: ``[num_rows, vocab]`` as they were drawn from; not modified.
        emitted: ``[num_rows]`` int64, the token drawn from each row, which keeps its logit: where a token lies at a
            filter's threshold, vLLM's filter and ours may differ.
        slot_of_row: ``[num_rows]``, the slot of each row.
        slots: The slots of these rows, on the host.

    Returns:
        ``[num_rows, vocab]`` fp32.
    """
    states, shown = sampler.sampling_states, processed(rows)
    states.apply_temperature(shown, slot_of_row, slots)
    emitted = emitted.unsqueeze(1)
    kept = shown.gather(1, emitted)
    states.apply_min_p(shown, slot_of_row, slots)
    return states.apply_top_k_top_p(shown, slot_of_row, slots).scatter(1, emitted, kept)


def parameters_of(sampler: stock.Sampler, random: bool, filtered: bool) -> dict:
    """Arguments of ``verify`` for a batch of which some request samples (``random``) and some of those filter."""
    parameters = sampler.parameters if isinstance(sampler, Sampler) else _parameters(sampler.sampling_states)
    used = {"temperature": random, "seeds": random, "top_k": filtered, "top_p": filtered, "min_p": filtered}
    return {name: parameters[name] if is_used else None for name, is_used in used.items()}


def _parameters(states: SamplingStates) -> dict[str, torch.Tensor]:
    return {name: getattr(states, name).gpu for name in ("temperature", "seeds", "top_k", "top_p", "min_p")}


def processed(logits: torch.Tensor) -> torch.Tensor:
    """A copy for logits processors to change, fp32; contiguous, so that it is laid out alike whatever the batch."""
    return logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def _needs(sampler: stock.Sampler) -> np.ndarray:
    """``[max_num_reqs]``, what the request in each slot needs."""
    states, budget = sampler.sampling_states, sampler.thinking_budget_state
    works = budget.use_thinking_budget.copy() if budget.enabled else np.zeros(states.max_num_reqs, dtype=bool)
    for processor in sampler.logits_processors:
        # A processor we do not know may have work whenever any request does.
        works |= USES[type(processor)](processor) if type(processor) in USES else True
    # This is also set where only temperature and filters have something to do.
    works &= sampler.needs_logits_processing
    filters = (states.top_k.np != states.vocab_size) | (states.top_p.np != 1.0) | (states.min_p.np != 0.0)
    return (states.temperature.np != 0.0) * RANDOM | filters * FILTERED | works * PROCESSED
