"""Hand-built steps of the V2 runner with vLLM's real sampler states, for the cases in ``v2_cases*.py``.

vLLM decides at import whether it has Triton, and with it V1's CPU path is another one, so these cases cannot share a
process with V1's: test_v2_adapter.py runs them in their own.
"""

from types import SimpleNamespace

import numpy as np
import torch
import vllm.v1.worker.cpu.shm  # noqa: F401
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.states import RequestState

from vllm_specopt import testing
from vllm_specopt.integration.metrics import Account
from vllm_specopt.integration.v2 import RejectionSampler
from vllm_specopt.integration.v2_sampler import Sampler as PlainSampler
from vllm_specopt.kernels.reference import verify_ref

CPU = torch.device("cpu")
SLOTS, VOCAB, DRAFTS, PROMPT = 9, 203, 4, 3


class Reverse(LogitsProcessor):
    """A custom processor: negates the logits of the requests that ask for it."""

    def __init__(self):
        self.used = np.zeros(SLOTS, dtype=bool)

    def add_request(self, req_idx, sampling_params):
        self.used[req_idx] = bool(sampling_params.extra_args)
        return bool(self.used[req_idx])

    def apply(self, logits, ctx):
        sign = torch.from_numpy(np.where(self.used, -1.0, 1.0)).float()
        return logits * sign[ctx.expanded_idx_mapping.long()].unsqueeze(1)


class Step:
    """One step: requests in permuted slots, each with its parameters, drafts and rows."""

    def __init__(
        self, params, counts, *, seed=0, mode="raw_logprobs", dtype=torch.bfloat16, custom=False, logits=None, pad=5
    ):
        torch.manual_seed(seed)
        self.params, self.counts, num_reqs = params, counts, len(counts)
        states = RequestState(SLOTS, 64, 64, DRAFTS, VOCAB, CPU)
        config = SimpleNamespace(reasoning_config=None)
        extra = {"custom_logits_processors": [Reverse()]} if custom else {}
        self.sampler = Sampler(config, SLOTS, VOCAB, CPU, states, mode, DRAFTS + 1, **extra)
        self.slots = torch.randperm(SLOTS)[:num_reqs]
        self.cu = torch.tensor([0, *np.cumsum(np.array(counts) + 1)], dtype=torch.int32)
        self.rows = int(self.cu[-1])
        self.local = torch.cat([torch.arange(c + 1) for c in counts]).to(torch.int32)
        self.request = torch.repeat_interleave(torch.arange(num_reqs), torch.tensor(counts) + 1)
        base = torch.randn(self.rows, VOCAB) * 2 if logits is None else logits
        self.logits = torch.zeros(self.rows, VOCAB + pad, dtype=dtype)[:, :VOCAB].copy_(base)
        near = self.logits.float() + 0.7 * torch.randn(self.rows, VOCAB)
        self.draft_logits = torch.full((SLOTS, DRAFTS, VOCAB), float("nan"), dtype=dtype)
        follows = torch.rand(self.rows) < 0.7
        tokens = torch.randint(VOCAB, (self.rows,), dtype=torch.int32)
        best = self.logits.float().argmax(1).to(torch.int32)
        for row in range(self.rows):
            if self.local[row] < counts[self.request[row]]:
                self.draft_logits[self.slots[self.request[row]], self.local[row]] = near[row].to(dtype)
                tokens[row + 1] = best[row] if follows[row] else tokens[row + 1]
        self.tokens = tokens
        self.positions = PROMPT + 2 + self.local.long()
        for request, param in enumerate(params):
            slot = int(self.slots[request])
            states.prompt_len.np[slot] = states.prefill_len.np[slot] = PROMPT
            states.all_token_ids.stage_write(slot, 0, best[5:10].tolist())
            states.total_len.stage_write_elem(slot, PROMPT + 2)
            self.sampler.add_request(slot, param)
        states.all_token_ids.apply_write()
        states.total_len.apply_write()
        states.prompt_len.copy_to_uva()
        states.prefill_len.copy_to_uva()
        self.sampler.apply_staged_writes()

    def batch(self):
        """As much of vLLM's InputBatch as a rejection sampler reads."""
        return SimpleNamespace(
            num_reqs=len(self.counts),
            idx_mapping=self.slots,
            idx_mapping_np=self.slots.numpy(),
            expanded_idx_mapping=self.slots[self.request],
            expanded_local_pos=self.local,
            input_ids=self.tokens,
            positions=self.positions,
            logits_indices=torch.arange(self.rows),
            cu_num_logits=self.cu,
            cu_num_logits_np=self.cu.numpy(),
            seq_lens=torch.full((len(self.counts),), 40, dtype=torch.int32),
            seq_lens_cpu_upper_bound=torch.full((len(self.counts),), 40, dtype=torch.int32),
        )

    def run(self, which, draft=False, invalid=None, logits=None):
        """Token lists and output of ``which`` class; stock leaves what follows the last token undefined."""
        config = SimpleNamespace(
            num_speculative_tokens=DRAFTS,
            enable_adaptive_verification=False,
            rejection_sample_method="standard",
            fly_entropy_threshold=None,
            fly_entropy_top_k=3,
        )
        self.rejection_sampler = which(self.sampler, config, CPU)
        given = self.logits if logits is None else logits
        rows = torch.empty_strided(given.shape, given.stride(), dtype=given.dtype).copy_(given)
        output = self.rejection_sampler(rows, self.batch(), self.draft_logits if draft else None, invalid)
        assert torch.equal(rows, given), "the logits were modified"
        ids, numbers = output.sampled_token_ids, output.num_sampled.tolist()
        assert ids.dtype == torch.int64 and ids.shape == (len(self.counts), DRAFTS + 1)
        return [row[:n] for row, n in zip(ids.tolist(), numbers, strict=True)], output

    def draw(self, ours=True):
        """Tokens and output of the sampler for a step in which no request has a draft."""
        sampler = PlainSampler(self.sampler, Account(CPU)) if ours else self.sampler
        rows = torch.empty_strided(self.logits.shape, self.logits.stride(), dtype=self.logits.dtype).copy_(self.logits)
        output = sampler(rows, self.batch())
        assert torch.equal(rows, self.logits), "the logits were modified"
        assert output.sampled_token_ids.dtype == torch.int64 and output.sampled_token_ids.shape == (self.rows, 1)
        assert not ours or not sampler.account.counters.any()
        return output.sampled_token_ids.tolist(), output

    def reference(self, rows=None, draft=False, **changes):
        states = self.sampler.sampling_states
        parameters = {
            "temperature": states.temperature.gpu,
            "seeds": states.seeds.gpu,
            "positions": self.positions,
            "state_indices": self.slots,
            "draft_logits": self.draft_logits if draft else None,
            "top_k": states.top_k.gpu,
            "top_p": states.top_p.gpu,
            "min_p": states.min_p.gpu,
        }
        return verify_ref(self.logits if rows is None else rows, self.cu, self.tokens, DRAFTS, **(parameters | changes))

    def configured(self, config):
        """A rejection sampler's class with an option, as ``run`` takes it."""

        def build(sampler, spec_config, device):
            built = RejectionSampler(sampler, spec_config, device, config)
            # The runner adds requests after it has built the sampler; here they were there before.
            for slot, param in zip(self.slots.tolist(), self.params, strict=True):
                sampler.add_request(slot, param)
            sampler.apply_staged_writes()
            return built

        return build


def assert_follows(lists, reference):
    """Token lists equal the reference's, save where the reference calls the outcome a close one."""
    left_out = 0
    for request, ids in enumerate(lists):
        if reference.margin[request] < testing.MARGIN:
            left_out += 1
            continue
        assert ids == reference.token_ids[request, : reference.num_sampled[request]].tolist()
    assert left_out <= 1


MIXED = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 12},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "min_p": 0.05, "top_p": 0.9, "top_k": 40},
    {"temperature": 1.0, "seed": -5},
]
PLAIN = [{"temperature": t} for t in (0.0, 1.0, 0.7, 1.5, 1.0, 0.0)]
COUNTS = [4, 3, 0, 2, 4, 1]


def sampling(dicts, seed=0):
    return [SamplingParams(**({"seed": 100 * seed + i} | d)) for i, d in enumerate(dicts)]


PROCESSED = {
    "penalties": {"repetition_penalty": 2.0, "frequency_penalty": 1.5},
    "min-tokens": {"min_tokens": 14, "stop_token_ids": list(range(100))},
    "allowed": {"allowed_token_ids": list(range(50, 90))},
    "bad-words": {},
    "custom": {"extra_args": {"reverse": True}},
}


def processed_step(what, temperature, used=True, counts=COUNTS):
    params = sampling([{"temperature": temperature, **(PROCESSED[what] if used and i % 2 else {})} for i in range(6)])
    step = Step(params, counts, seed=len(what))
    if what == "bad-words" and used:
        for param in params[1::2]:
            param._bad_words_token_ids = [[int(token)] for token in step.logits.float().argmax(1)]
        step = Step(params, counts, seed=len(what))
    return Step(params, counts, seed=len(what), custom=True) if what == "custom" else step
