"""The V2 adapter on hand-built steps, with vLLM's real sampler states; run by test_v2_adapter.py in its own process.

vLLM decides at import whether it has Triton, and with it V1's CPU path is another one, so these cases cannot share a
process with V1's.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import vllm.v1.worker.cpu.shm
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor
from vllm.v1.worker.gpu.sample.sampler import Sampler
from vllm.v1.worker.gpu.spec_decode import rejection_sampler as stock
from vllm.v1.worker.gpu.states import RequestState

from vllm_specopt import testing, verify
from vllm_specopt.integration.audit import ROWS, Auditor
from vllm_specopt.integration.config import SpecoptConfig
from vllm_specopt.integration.metrics import Account
from vllm_specopt.integration.v2 import RejectionSampler
from vllm_specopt.integration.v2_sampler import Sampler as PlainSampler
from vllm_specopt.integration.v2_watch import WatchedRejectionSampler, WatchedSampler
from vllm_specopt.kernels.reference import verify_ref
from vllm_specopt.kernels.reference.audit import audit_ref
from vllm_specopt.rules import PAPER, BlockConstants, BudgetConstants, TypicalConstants

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from launch_keys import recorded, unexpected

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
        self.counts, num_reqs = counts, len(counts)
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


def case_these_are_the_expected_sources():
    assert vllm.__version__ == os.environ["EXPECTED_VLLM"]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("draft", [False, True], ids=["one-hot", "draft-logits"])
@pytest.mark.parametrize("dicts", [PLAIN, MIXED], ids=["plain", "filters"])
def case_equals_reference_token_for_token(monkeypatch, seed, draft, dicts):
    step = Step(sampling(dicts, seed), COUNTS, seed=seed, dtype=[torch.bfloat16, torch.float32][seed % 2])
    with monkeypatch.context() as patch:
        patch.setattr(verify.torch, "empty", testing.poisoned_empty)
        lists, output = step.run(RejectionSampler, draft)
    assert_follows(lists, step.reference(draft=draft))
    after = torch.arange(DRAFTS + 1) >= output.num_sampled.unsqueeze(1)
    assert (output.sampled_token_ids[after] == -1).all()


@pytest.mark.parametrize("draft", [False, True], ids=["one-hot", "draft-logits"])
def case_greedy_equals_stock(draft):
    for seed in range(4):
        step = Step(sampling([{"temperature": 0.0}] * 6), COUNTS, seed=seed)
        invalid = torch.rand(step.rows) < 0.15
        ours, _ = step.run(RejectionSampler, draft, invalid)
        assert ours == step.run(stock.RejectionSampler, draft, invalid)[0]


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


@pytest.mark.parametrize("what", PROCESSED)
def case_logits_processors_are_vllms_own(what):
    step = processed_step(what, 0.0)
    ours, _ = step.run(RejectionSampler)
    assert ours == step.run(stock.RejectionSampler)[0]
    plain, _ = processed_step(what, 0.0, used=False).run(RejectionSampler)
    assert ours != plain, "the processor changed nothing, so this shows nothing"

    step = processed_step(what, 1.0)
    b = step.batch()
    rows = step.sampler.apply_sampling_params(
        step.logits, b.expanded_idx_mapping, b.idx_mapping, b.idx_mapping_np, b.positions, step.tokens,
        b.expanded_local_pos, b.seq_lens_cpu_upper_bound.numpy(),
    )  # fmt: skip
    assert_follows(step.run(RejectionSampler)[0], step.reference(rows))


def case_processors_run_only_for_batches_that_need_them(monkeypatch):
    calls = []
    for name in ("logit_bias.LogitBiasState", "penalties.PenaltiesState", "bad_words.BadWordsState"):
        monkeypatch.setattr(f"vllm.v1.worker.gpu.sample.{name}.apply", lambda s, rows, ctx: calls.append(1) or rows)
    monkeypatch.setattr(Reverse, "apply", lambda self, rows, ctx: calls.append(1) or rows)
    Step(sampling(MIXED), COUNTS).run(RejectionSampler)
    Step(sampling([{"temperature": 1.0}] * 6), COUNTS, custom=True).run(RejectionSampler)
    assert not calls
    step = Step(sampling([*MIXED[:5], {"temperature": 1.0, **PROCESSED["penalties"]}]), COUNTS)
    step.run(RejectionSampler)
    assert len(calls) == 3
    # The request that needs them leaves the batch but keeps its slot.
    step.counts, step.slots = COUNTS[:5], step.slots[:5]
    step.cu, step.rows = step.cu[:6], int(step.cu[5])
    for name in ("local", "request", "logits", "tokens", "positions"):
        setattr(step, name, getattr(step, name)[: step.rows])
    step.run(RejectionSampler)
    assert len(calls) == 3


@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits", "processed_logprobs"])
def case_log_probabilities_equal_stock(mode):
    greedy = {"temperature": 0.0, "logprobs": 2}
    step = Step(sampling([greedy, *[greedy | PROCESSED["penalties"]] * 5]), COUNTS, mode=mode)
    ours, output = step.run(RejectionSampler)
    theirs, expected = step.run(stock.RejectionSampler)
    assert ours == theirs
    emitted = step.local < output.num_sampled[step.request]
    for name in ("logprob_token_ids", "logprobs", "selected_token_ranks"):
        torch.testing.assert_close(
            getattr(output.logprobs_tensors, name)[emitted], getattr(expected.logprobs_tensors, name)[emitted]
        )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dicts", [PLAIN, MIXED], ids=["plain", "filters"])
def case_a_step_without_drafts_equals_reference_and_verification(seed, dicts):
    step = Step(sampling(dicts, seed), [0] * 6, seed=seed, dtype=[torch.bfloat16, torch.float32][seed % 2])
    drawn, _ = step.draw()
    assert_follows(drawn, step.reference())
    assert step.run(RejectionSampler)[0] == drawn


@pytest.mark.parametrize("what", PROCESSED)
def case_a_step_without_drafts_runs_vllms_processors(what):
    step = processed_step(what, 0.0, counts=[0] * 6)
    drawn, _ = step.draw()
    assert drawn == step.draw(ours=False)[0]
    assert drawn != processed_step(what, 0.0, used=False, counts=[0] * 6).draw()[0]
    step = processed_step(what, 1.0, counts=[0] * 6)
    assert step.draw()[0] == step.run(RejectionSampler)[0]


@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits", "processed_logprobs"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def case_log_probabilities_without_drafts(mode, temperature):
    sampled = {"temperature": temperature, "logprobs": 2}
    params = sampling([sampled, *[sampled | PROCESSED["penalties"]] * 5])
    step = Step(params, [0] * 6, mode=mode)
    drawn, output = step.draw()
    assert drawn == Step(params, [0] * 6).draw()[0]
    assert output.logprobs_tensors.logprobs[:, 0].isfinite().all()
    assert output.logprobs_tensors.logprob_token_ids[:, 0].tolist() == [token for (token,) in drawn]
    if temperature == 0:
        theirs, expected = step.draw(ours=False)
        assert drawn == theirs
        torch.testing.assert_close(output.logprobs_tensors.logprobs, expected.logprobs_tensors.logprobs)


def case_processed_log_probabilities_follow_the_temperature_of_both_models():
    """Sampled drafts, a temperature, and log probabilities after it: the tokens are those without log probabilities."""
    params = [{"temperature": t, "logprobs": 1} for t in (0.6, 1.0, 1.4, 0.0, 0.8, 1.1)]
    for draft in (False, True):
        step = Step(sampling(params), COUNTS, mode="processed_logprobs", dtype=torch.float32)
        lists, _ = step.run(RejectionSampler, draft)
        assert_follows(lists, step.reference(draft=draft))


ASKS = [{"logprob_token_ids": [5, 17, 30]}, {}, {"logprobs": 1}, {"logprob_token_ids": [2]}, {}, {"logprobs": 2}]


@pytest.mark.parametrize(
    ("most_rows", "mode"),
    [
        (None, "raw_logprobs"),
        (None, "processed_logits"),
        (6, "raw_logits"),
        (6, "processed_logprobs"),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                (None, "raw_logits"),
                (None, "processed_logprobs"),
                (6, "raw_logprobs"),
                (6, "processed_logits"),
            )
        ),
    ],
)
def case_log_probabilities_of_specific_tokens_beside_others(mode, most_rows, monkeypatch):
    if most_rows:
        monkeypatch.setattr(stock, "MAX_CHUNK_BYTES", most_rows * VOCAB * 4)
    sampled = {"temperature": 0.7, "min_p": 0.02}
    step = Step(sampling([sampled | asks for asks in ASKS]), COUNTS, mode=mode, dtype=torch.float32)
    lists, output = step.run(RejectionSampler)
    assert lists == Step(sampling([sampled] * 6), COUNTS, dtype=torch.float32).run(RejectionSampler)[0]
    tensors, row = output.logprobs_tensors, 0
    assert tensors.logprobs.shape == (step.rows, 4) and tensors.cu_num_generated_tokens == step.cu.tolist()
    for asks, count, tokens in zip(ASKS, COUNTS, lists, strict=True):
        for i, token in enumerate(tokens):
            expected = step.logits[row + i]
            if mode.startswith("processed"):
                expected = expected / 0.7
                expected = expected.masked_fill(expected < expected.max() + np.log(0.02), -torch.inf)
            if mode.endswith("logprobs"):
                expected = expected.log_softmax(0)
            if asks:
                best = expected.topk(max(2, len(asks))).indices.tolist()[:2]
                shown = [token, *asks.get("logprob_token_ids", best)]
                assert tensors.logprob_token_ids[row + i, : len(shown)].tolist() == shown
                torch.testing.assert_close(tensors.logprobs[row + i, : len(shown)], expected[shown])
        row += count + 1


def case_log_probabilities_of_specific_tokens_without_drafts():
    step = Step(sampling([{"temperature": 0.7} | asks for asks in ASKS]), [0] * 6, mode="processed_logprobs")
    drawn, output = step.draw()
    verified, expected = step.run(RejectionSampler)
    assert drawn == verified
    for request, asks in enumerate(ASKS):
        width = 1 + len(asks.get("logprob_token_ids", [0, 0])) if asks else 0
        for name in ("logprob_token_ids", "logprobs"):
            ours, theirs = (getattr(each.logprobs_tensors, name)[request, :width] for each in (expected, output))
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("drafts", [COUNTS, [0] * 6], ids=["drafts", "plain"])
def case_log_probabilities_after_sampling_parameters_do_not_change_the_tokens(drafts, monkeypatch):
    """Not even where vLLM's filter drops the token, which then is reported with what it was drawn with."""
    from vllm.v1.worker.gpu.sample import sampler, states

    for module in (sampler, states):
        monkeypatch.setattr(module, "apply_top_k_top_p", lambda rows, *_: torch.full_like(rows, -torch.inf))
    asked = sampling([d | ({"logprobs": 0} if i % 2 else {}) for i, d in enumerate(MIXED)])
    step = Step(asked, drafts, mode="processed_logprobs")
    tokens, output = step.run(RejectionSampler) if any(drafts) else step.draw()
    plain = Step(sampling(MIXED), drafts)
    assert tokens == (plain.run(RejectionSampler) if any(drafts) else plain.draw())[0]
    emitted = step.local < output.num_sampled[step.request]
    assert output.logprobs_tensors.logprobs[emitted & (step.request % 2 == 1), 0].isfinite().all()


@pytest.mark.parametrize("pad", [0, 5])
def case_warm_up_launches_what_draws_without_drafts_do(pad):
    with recorded(run=False) as served:
        for dicts in ([{"temperature": 0.0}] * 6, PLAIN, MIXED):
            for also in ({}, PROCESSED["penalties"]):
                params = sampling([d | (also if i % 2 else {}) for i, d in enumerate(dicts)])
                Step(params, [0] * 6, pad=pad).draw()
    step = Step(sampling(PLAIN), [0] * 6, pad=pad)
    ours = PlainSampler(step.sampler, Account(CPU))
    with recorded() as warmed:
        ours.warm_up(torch.zeros(3, VOCAB + pad, dtype=torch.bfloat16)[:, :VOCAB])
    assert not unexpected(served, warmed), "compiles while serving"
    assert not unexpected(warmed, served), "compiled in vain"
    assert not ours.account.bad_rows.any() and not ours.account.counters.any(), "the dummy requests were counted"


def case_chunks_do_not_matter(monkeypatch):
    step = Step(sampling(MIXED), COUNTS)
    whole, _ = step.run(RejectionSampler, draft=True)
    monkeypatch.setattr(stock, "MAX_CHUNK_BYTES", 6 * VOCAB * 4)
    calls = []
    original = RejectionSampler._verify
    monkeypatch.setattr(RejectionSampler, "_verify", lambda self, *a: calls.append(1) or original(self, *a))
    assert step.run(RejectionSampler, draft=True)[0] == whole
    assert len(calls) > 2


def case_seeded_request_does_not_depend_on_its_batch():
    rows = torch.randn(4, VOCAB) * 2
    found = []
    for others in [0, 2, 5]:
        logits = torch.cat([torch.randn(2 * others, VOCAB), rows])
        params = sampling([{"temperature": 0.8}] * others + [{"temperature": 1.1, "seed": 3}])
        step = Step(params, [1] * others + [3], seed=others, logits=logits)
        step.tokens[-3:] = torch.tensor([5, 6, 7])
        found.append(step.run(RejectionSampler)[0][-1])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("rule", "draft"),
    [
        (PAPER, False),
        (PAPER, True),
        (BlockConstants(), True),
        (TypicalConstants(0.3, 0.6), True),
        (BudgetConstants(0.3), False),
    ],
    ids=["sigmoid one-hot", "sigmoid", "block", "typical", "budget"],
)
@pytest.mark.parametrize("by_request", [False, True], ids=["all", "by-request"])
@pytest.mark.parametrize("dicts", [PLAIN, MIXED], ids=["plain", "filters"])
def case_rules_equal_reference_token_for_token(rule, draft, by_request, dicts):
    """Requests in slots of odd index ask for the rule, or all requests get it."""
    asking = {"extra_args": {"specopt": rule.NAME}} if by_request else {}
    chosen = [d | (asking if i % 2 else {}) for i, d in enumerate(dicts)]
    params = sampling(chosen, seed=2)
    step = Step(params, COUNTS, seed=2)
    config = SpecoptConfig("exact" if by_request else rule.NAME, rule=rule, allow_per_request=by_request)

    def with_option(sampler, spec_config, device):
        built = RejectionSampler(sampler, spec_config, device, config)
        # The runner adds requests after it has built the sampler; here they were there before.
        for slot, param in zip(step.slots.tolist(), params, strict=True):
            sampler.add_request(slot, param)
        sampler.apply_staged_writes()
        return built

    lists, _ = step.run(with_option, draft)
    flags = torch.zeros(SLOTS, dtype=torch.bool)
    flags[step.slots.long()] = torch.tensor(["extra_args" in d for d in chosen])
    reference = step.reference(draft=draft, rule=rule, rule_requests=flags if by_request else None)
    assert_follows(lists, reference)


@pytest.mark.parametrize(
    ("choice", "draft", "pad"),
    [
        ("exact", False, 0),
        ("exact", True, 5),
        ("per-request", False, 5),
        ("block", True, 5),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ("exact", True, 0),
                ("sigmoid", True, 5),
                ("per-request", True, 0),
                ("typical", True, 0),
                ("budget", False, 5),
            )
        ),
    ],
)
def case_warm_up_launches_what_serving_does(monkeypatch, choice, draft, pad):
    """By what Triton would compile for each launch; among them chunks whose small tensors start at any element."""
    by_choice = choice == "per-request"
    constants = {"exact": None, "block": BlockConstants(), "typical": TypicalConstants(0.3, 0.6)}.get(choice, PAPER)
    constants = BudgetConstants(0.3) if choice == "budget" else constants
    config = SpecoptConfig("exact" if by_choice else choice, rule=constants, allow_per_request=by_choice)
    asking = {"extra_args": {"specopt": "sigmoid"}} if by_choice else {}

    def with_option(sampler, spec_config, device):
        built = RejectionSampler(sampler, spec_config, device, config)
        for slot, param in zip(step.slots.tolist(), params, strict=True):
            sampler.add_request(slot, param)
        sampler.apply_staged_writes()
        return built

    greedy, sampled, penalised = {"temperature": 0.0}, {"temperature": 1.0}, PROCESSED["penalties"]
    more = [{}, penalised, *([asking, penalised | asking] if asking else [])]
    with recorded(run=False) as served:
        for chunk in (100, 9, 5, 1):
            monkeypatch.setattr(stock, "MAX_CHUNK_BYTES", chunk * VOCAB * 4)
            for dicts in ([greedy] * 6, [sampled] * 6, PLAIN, MIXED):
                for also in more[: 1 if chunk == 100 else None]:
                    params = sampling([d | (also if i % 2 else {}) for i, d in enumerate(dicts)])
                    step = Step(params, COUNTS, pad=pad)
                    step.run(with_option, draft)
    with recorded() as warmed:
        example = torch.zeros(3, VOCAB + pad, dtype=torch.bfloat16)[:, :VOCAB]
        step.rejection_sampler.warm_up(example, step.draft_logits if draft else None)
    expected = {"statistics_kernel", "decide_kernel"} | ({"residual_kernel"} if draft else set())
    assert {name for name, *_ in warmed} == expected
    assert not unexpected(served, warmed), "compiles while serving"
    if pad:
        # Without padding, rows after the first start at 16 bytes or not, and these few steps lack some of the cases.
        assert not unexpected(warmed, served), "compiled in vain"
    assert not step.rejection_sampler.account.counters.any(), "the dummy requests were counted"


@pytest.mark.parametrize("method", ["exact", "stock"])
def case_the_audit_counts_what_is_emitted(method):
    """With drafts and without; of the sampled requests one has a seed, and is left out."""
    config = SpecoptConfig(method, audit=1.0)
    temperatures, seeds, counts = (1.0, 0.8, 0.0, 1.3), (None, 3, None, None), [2, 1, 3, 0]
    params = [SamplingParams(temperature=t, seed=s) for t, s in zip(temperatures, seeds, strict=True)]
    step = Step(params, counts)
    account = Account(CPU)
    account.auditor = Auditor(config, CPU, "triton")
    step.sampler = (PlainSampler if config.verifies else WatchedSampler)(step.sampler, account)
    # The interpreter lacks what stock's kernels for sampled drafts use.
    tokens, _ = step.run(RejectionSampler if config.verifies else WatchedRejectionSampler, draft=config.verifies)
    audited, seeded = [0, 3], 1
    found = account.auditor.counts.sum(0)[ROWS.index(method)].clone()
    assert found.sum() == account.auditor.counts.sum() == sum(len(tokens[i]) for i in (*audited, seeded))
    assert found[-2:].tolist() == [0, len(tokens[seeded])]
    ids = torch.tensor([row + [-1] * (DRAFTS + 1 - len(row)) for row in tokens])
    signs = torch.tensor([1.0, -1.0, 1.0, 1.0])
    states = step.sampler.sampling_states
    expected = audit_ref(
        step.logits,
        step.cu,
        ids,
        temperature=torch.tensor(temperatures) * signs,
        seeds=states.seeds.gpu[step.slots],
        positions=step.positions,
    ).places
    bins = torch.histc((expected[~expected.isnan()] * 32).floor(), 32, 0, 32)
    assert found[:32].tolist() == bins.tolist()
    step.sampler(step.logits.clone(), step.batch())
    more = account.auditor.counts.sum(0)[ROWS.index(method)]
    rows = [count + 1 for count in counts]
    assert more[:32].sum() - bins.sum() == sum(rows[i] for i in audited)
    assert more[-1] - len(tokens[seeded]) == rows[seeded]
