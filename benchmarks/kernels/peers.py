"""What is measured: our verification, alone and inside vLLM's classes, and the stock classes of the installed vLLM.

Every implementation gets the same tensors and is called as vLLM's model runners call it: V1 through
``RejectionSampler.forward`` with real metadata, V2 through ``RejectionSampler._verify`` with real sampler states.

- ``ours``: ``verify()`` on plain tensors.
- ``ours-block``: ``verify()`` by the block method, of sampled drafts.
- ``ours-sigmoid``: ``verify()`` by the lossy method with the paper's constants, at temperatures above 0.
- ``ours-v1``, ``ours-v2``: the same as ``ours`` inside the classes that replace vLLM's.
- ``stock-v1``, ``stock-v2``: vLLM's.
- ``stock-repaired``: stock V1 on a CPU, where one function leaves the sampling parameters uninitialised. The repair is
  that function's meaning in three tensor operations; as it comes, stock cannot be compared at a temperature above 0.

Stock V2 needs Triton, so on a CPU it takes part under Triton's interpreter only, and there neither stock with top-k or
top-p nor stock V2 with draft logits runs (the interpreter lacks what their kernels use). Stock V1 does not apply min-p
to draft tokens and takes no draft logits; V2 takes no draft probabilities: such pairs are not measured.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vllm_specopt.benchmarks.kernels.grid import LOGITS, PROBS
from vllm_specopt.benchmarks.kernels.inputs import NUM_ROUNDS, Inputs
from vllm_specopt.benchmarks.repair import repair_expand_kernel
from vllm_specopt.rules import PAPER, BlockConstants, Constants
from vllm_specopt.verify import Verified, verify

RULE_OF = {"ours-sigmoid": PAPER, "ours-block": BlockConstants()}


@dataclass
class Implementation:
    """One way to verify a case's batch.

    call: Verifies round ``i``; the only part that is timed. Its result goes to ``read``.
    read: Token ids, -1 padded, int64, and their number per request.
    greedy: The same batch at temperature 0.
    seeded: Round 0 with the case's seeds, where ``call`` draws its own; None where ``call(0)`` is that.
    """

    name: str
    call: Callable[[int], Any]
    read: Callable[[Any], Verified]
    greedy: Callable[[], Any]
    seeded: Callable[[], Any] | None = None

    @property
    def rule(self) -> Constants | None:
        """Constants of the method it verifies by; None for the exact one."""
        return RULE_OF.get(self.name)

    @property
    def is_ours(self) -> bool:
        return self.name.startswith("ours")


def has_vllm() -> bool:
    """Whether vLLM is installed."""
    return importlib.util.find_spec("vllm") is not None


def interpreted() -> bool:
    """Whether Triton runs its kernels in the interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def prepare(device: torch.device) -> None:
    """Bring vLLM into the state of a worker on this device; once, before the first implementation is built."""
    if not has_vllm():
        return
    if importlib.util.find_spec("flashinfer") is None:
        # vLLM takes for granted that it is there; verification itself does not use it.
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    if device.type == "cuda":
        from vllm.platforms import current_platform

        current_platform.import_kernels()
        return
    if interpreted():
        from triton import backends

        driver = type("InterpreterDriver", (), {"is_active": staticmethod(lambda: True)})
        backends.backends["cpu"] = types.SimpleNamespace(driver=driver, compiler=None)
        import vllm.v1.worker.cpu.shm  # noqa: F401 - V2's buffers on a CPU

        return
    from vllm.platforms import current_platform

    repair_expand_kernel()
    # vLLM 0.32 looks into every loaded module here and stumbles over one that numba loads.
    hidden = sys.modules.pop("llvmlite.binding.ffi", None)
    current_platform.register_triton_kernel_overrides()
    if hidden is not None:
        sys.modules["llvmlite.binding.ffi"] = hidden


def implementations(inputs: Inputs) -> list[Implementation | tuple[str, str]]:
    """Build all that apply to a case; (name, reason) in place of one that could not be built."""
    case, device = inputs.case, inputs.device
    builders = {"ours": ours}
    if case.temperature > 0:
        builders["ours-sigmoid"] = ours
        if case.draft in (PROBS, LOGITS):
            builders["ours-block"] = ours
    if has_vllm():
        if case.draft != LOGITS and not case.min_p:
            native = device.type == "cpu" and not interpreted()
            builders["ours-v1"] = builders["stock-repaired" if native else "stock-v1"] = v1
        if case.draft != PROBS and (device.type == "cuda" or interpreted()):
            builders["ours-v2"] = builders["stock-v2"] = v2
    if interpreted():
        if case.top_k or case.top_p < 1:
            builders.pop("stock-v1", None)
            builders.pop("stock-v2", None)
        if case.draft == LOGITS:
            builders.pop("stock-v2", None)
    found: list[Implementation | tuple[str, str]] = []
    for name, build in builders.items():
        try:
            found.append(build(name, inputs))
        except Exception as error:  # One that does not start must not cost the others their numbers.
            found.append((name, f"{type(error).__name__}: {error}".split("\n")[0]))
    return found


def ours(name: str, inputs: Inputs) -> Implementation:
    """``verify()`` by itself, on the backend of the device (Triton on a CPU under the interpreter)."""
    backend = "triton" if interpreted() else None
    rounds = [inputs.round(number) for number in range(NUM_ROUNDS)]
    rule = RULE_OF.get(name)

    def call(round_number: int) -> Verified:
        batch = rounds[round_number % NUM_ROUNDS]
        return verify(*batch.args(), **batch.kwargs, rule=rule, token_dtype=torch.int32, backend=backend)

    def greedy() -> Verified:
        return verify(*inputs.batch.args(), backend=backend)

    def read(verified: Verified) -> Verified:
        return Verified(verified.token_ids.long(), verified.num_sampled)

    return Implementation(name, call, read, greedy)


class _Runner:
    """As much of a V1 model runner as our adapter reads."""

    positions: torch.Tensor


def v1(name: str, inputs: Inputs) -> Implementation:
    """Model runner V1's class, stock or ours."""
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.rejection_sampler import RejectionSampler as Stock
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

    from vllm_specopt.integration.v1 import BY_REQUEST, RejectionSampler

    case, device, batch = inputs.case, inputs.device, inputs.batch
    rows = torch.arange(len(batch.logits), dtype=torch.int32)
    is_bonus = rows % (case.num_drafts + 1) == case.num_drafts
    ends = batch.cu_num_logits[1:]
    rounds = [
        SpecDecodeMetadata(
            draft_token_ids=drafts,
            num_draft_tokens=[case.num_drafts] * case.batch,
            cu_num_draft_tokens=ends - torch.arange(1, case.batch + 1, dtype=torch.int32, device=device),
            cu_num_sampled_tokens=ends,
            target_logits_indices=rows[~is_bonus].to(device),
            bonus_logits_indices=rows[is_bonus].to(device),
            logits_indices=rows.to(device),
        )
        for drafts in inputs.drafts
    ]
    for metadata in rounds:
        setattr(metadata, BY_REQUEST, True)

    def sampling(random: bool, generators: dict) -> SamplingMetadata:
        zeros = torch.zeros(case.batch, device=device)
        return SamplingMetadata(
            temperature=batch.kwargs["temperature"] if random else None,
            all_greedy=not random,
            all_random=random,
            top_p=batch.kwargs.get("top_p") if random else None,
            top_k=batch.kwargs.get("top_k") if random else None,
            generators=generators,
            max_num_logprobs=None,
            no_penalties=True,
            prompt_token_ids=None,
            frequency_penalties=zeros,
            presence_penalties=zeros,
            repetition_penalties=zeros + 1,
            output_token_ids=[[] for _ in range(case.batch)],
            allowed_token_ids_mask=None,
            bad_words_token_ids={},
            logitsprocs=LogitsProcessors(),
            spec_token_ids=[[] for _ in range(case.batch)],
        )

    runner = _Runner()
    sampler: Stock
    if name.startswith("ours"):
        sampler = RejectionSampler(Sampler(), None, device, runner=runner, seed=inputs.seed)
    else:
        sampler = Stock(Sampler(), None, device)
    settings, draft_probs = sampling(case.temperature > 0, {}), batch.kwargs.get("draft_probs")

    def call(round_number: int, settings=settings):
        number = round_number % NUM_ROUNDS
        runner.positions = inputs.positions[number]
        return sampler(rounds[number], draft_probs, batch.logits, settings).sampled_token_ids

    def seeded():
        seeds = batch.kwargs["seeds"].tolist() if case.temperature > 0 else []
        generators = {index: torch.Generator(device).manual_seed(seed) for index, seed in enumerate(seeds)}
        return call(0, sampling(case.temperature > 0, generators))

    def greedy():
        return sampler(rounds[0], None, batch.logits, sampling(False, {})).sampled_token_ids

    def read(token_ids: torch.Tensor) -> Verified:
        return Verified(token_ids.long(), (token_ids >= 0).sum(1).to(torch.int32))

    return Implementation(name, call, read, greedy, seeded)


def v2(name: str, inputs: Inputs) -> Implementation:
    """Model runner V2's class, stock or ours."""
    from vllm.sampling_params import SamplingParams
    from vllm.v1.worker.gpu.sample.sampler import Sampler
    from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler as Stock
    from vllm.v1.worker.gpu.states import RequestState

    from vllm_specopt.integration.metrics import Account
    from vllm_specopt.integration.v2 import RejectionSampler
    from vllm_specopt.integration.v2_sampler import Sampler as OurSampler

    case, device, batch = inputs.case, inputs.device, inputs.batch
    states = RequestState(case.batch, 64, 64, case.num_drafts, case.vocab, device)
    config: Any = types.SimpleNamespace(reasoning_config=None)
    sampler = Sampler(config, case.batch, case.vocab, device, states, "raw_logprobs", case.num_drafts + 1)
    verifier: type[Stock] = Stock
    if name.startswith("ours"):
        sampler, verifier = OurSampler(sampler, Account(device)), RejectionSampler
    seeds = batch.kwargs["seeds"].tolist() if case.temperature > 0 else [0] * case.batch
    # Slots are handed out from the end of this list: request i gets slot i.
    states.free_indices.reverse()
    for request in range(case.batch):
        states.add_request(str(request), 3, [5, 6, 7, 8], 4, 32)
    states.apply_staged_writes()

    def set_temperature(temperature: float) -> None:
        for request, seed in enumerate(seeds):
            filters: dict[str, Any] = (
                {"top_p": case.top_p, "top_k": case.top_k, "min_p": case.min_p} if temperature else {}
            )
            sampler.add_request(request, SamplingParams(temperature=temperature, seed=seed, **filters))
        sampler.apply_staged_writes()

    set_temperature(case.temperature)
    options: Any = types.SimpleNamespace(
        num_speculative_tokens=case.num_drafts,
        enable_adaptive_verification=False,
        rejection_sample_method="block" if name.endswith("block") else "standard",
        fly_entropy_threshold=None,
        fly_entropy_top_k=None,
    )
    built = verifier(sampler, options, device)
    slots_on_host = np.arange(case.batch, dtype=np.int32)
    slots = torch.from_numpy(slots_on_host).to(device)
    local = torch.arange(case.num_drafts + 1, dtype=torch.int32, device=device).repeat(case.batch)
    # A row is fed the token drafted one position before it; the first, the last token that was emitted.
    fed = torch.zeros(NUM_ROUNDS, case.batch, case.num_drafts + 1, dtype=torch.int32, device=device)
    fed[:, :, 1:] = inputs.drafts.view(NUM_ROUNDS, case.batch, -1)
    fed = fed.view(NUM_ROUNDS, -1)
    slot_of_row = slots.repeat_interleave(case.num_drafts + 1)
    lengths = torch.full((case.batch,), 40, dtype=torch.int32).numpy()

    def verify_round(round_number: int, draft_logits: torch.Tensor | None):
        number = round_number % NUM_ROUNDS
        _, token_ids, num_sampled = built._verify(
            batch.logits,
            draft_logits,
            fed[number],
            inputs.positions[number],
            batch.cu_num_logits,
            slots,
            slots_on_host,
            slot_of_row,
            local,
            lengths,
            fed[number],
        )
        return token_ids, num_sampled

    def call(round_number: int):
        return verify_round(round_number, batch.kwargs.get("draft_logits"))

    def greedy():
        set_temperature(0.0)
        found = verify_round(0, None)
        set_temperature(case.temperature)
        return found

    def read(output: tuple[torch.Tensor, torch.Tensor]) -> Verified:
        token_ids, num_sampled = output
        # Stock leaves undefined what follows the last token.
        after = torch.arange(token_ids.shape[1], device=device) >= num_sampled.unsqueeze(1)
        return Verified(token_ids.long().masked_fill(after, -1), num_sampled.to(torch.int32))

    return Implementation(name, call, read, greedy)
