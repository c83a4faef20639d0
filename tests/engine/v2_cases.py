"""The V2 adapter on hand-built steps: beside the reference and stock, processors, chunks, the audit."""

import os

import pytest
import torch
import vllm
from engine.v2_steps import (
    COUNTS,
    CPU,
    DRAFTS,
    MIXED,
    PLAIN,
    PROCESSED,
    VOCAB,
    Reverse,
    Step,
    assert_follows,
    processed_step,
    sampling,
)
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.spec_decode import rejection_sampler as stock

from vllm_specopt import testing, verify
from vllm_specopt.integration.audit import ROWS, Auditor
from vllm_specopt.integration.config import SpecoptConfig
from vllm_specopt.integration.metrics import Account
from vllm_specopt.integration.v2 import RejectionSampler
from vllm_specopt.integration.v2_sampler import Sampler as PlainSampler
from vllm_specopt.integration.v2_watch import WatchedRejectionSampler, WatchedSampler
from vllm_specopt.kernels.reference.audit import audit_ref


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
