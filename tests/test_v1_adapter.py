"""The V1 adapter on hand-built steps: token for token against the reference, and beside vLLM's own sampler."""

import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from vllm_specopt import testing
from vllm_specopt.kernels.reference import verify_ref
from vllm_specopt.kernels.reference.rows import filter_row_ref

pytest.importorskip("vllm")

from support.v1_steps import (
    CHANGES,
    CPU,
    adapter,
    generators_of,
    min_p_processor,
    min_tokens,
    sampling,
    spec_metadata,
)
from vllm.platforms import current_platform
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.rejection_sampler import RejectionSampler as StockRejectionSampler
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_specopt.integration import v1
from vllm_specopt.integration.v1_sampler import needs_processors


@pytest.fixture(scope="module", autouse=True)
def stock_kernels():
    """What a CPU worker does before it builds its sampler."""
    # vLLM 0.32 looks into every loaded module for this and stumbles over one that numba loads.
    hidden = sys.modules.pop("llvmlite.binding.ffi", None)
    current_platform.register_triton_kernel_overrides()
    if hidden is not None:
        sys.modules["llvmlite.binding.ffi"] = hidden


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("draft", [testing.NO_DRAFT, testing.PROBS])
@pytest.mark.parametrize("filters", [(), ("top_k", "top_p"), ("min_p",), ("top_k", "top_p", "min_p")])
def test_equals_reference_token_for_token(monkeypatch, seed, draft, filters):
    dtype = [torch.float32, torch.bfloat16, torch.float16][seed % 3]
    batch = testing.random_batch(
        seed=seed, num_drafts=[3, 0, 5, 1, 4, 4, 2], vocab_size=211, dtype=dtype, draft=draft, filters=filters,
        shuffled_state=False,
    )  # fmt: skip
    reference = verify_ref(*batch.args(), **batch.kwargs)
    counts = (batch.cu_num_logits.diff() - 1).tolist()
    metadata = spec_metadata(counts, batch.draft_token_ids)
    settings = sampling(
        batch.kwargs["temperature"],
        generators_of(batch.kwargs["seeds"]),
        top_k=batch.kwargs.get("top_k"),
        top_p=batch.kwargs.get("top_p"),
        logitsprocs=min_p_processor(batch.kwargs["min_p"]) if "min_p" in filters else LogitsProcessors(),
    )
    before = batch.logits.clone()
    monkeypatch.setattr(torch, "empty", testing.poisoned_empty)
    output = adapter(batch.kwargs["positions"].flip(0))(
        metadata, batch.kwargs.get("draft_probs"), batch.logits, settings
    )
    assert output.sampled_token_ids.dtype == torch.int32 and output.logprobs_tensors is None
    close = torch.tensor(reference.margin) < testing.MARGIN
    assert close.sum() <= 1
    assert torch.equal(output.sampled_token_ids[~close].long(), reference.token_ids[~close])
    assert torch.equal(batch.logits, before)


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs"])
def test_a_step_in_which_no_request_has_a_draft(mode):
    """On a CPU the stock sampler raises here if a request asks for top-k."""
    batch = testing.random_batch(
        seed=1, num_drafts=[0, 0, 0], vocab_size=97, dtype=torch.float32, filters=("top_k",), shuffled_state=False
    )
    batch.kwargs["top_k"] = torch.tensor([5, 97, 40], dtype=torch.int32)
    reference = verify_ref(*batch.args(), **batch.kwargs)
    settings = sampling(
        batch.kwargs["temperature"],
        generators_of(batch.kwargs["seeds"]),
        top_k=batch.kwargs["top_k"],
        max_num_logprobs=1,
    )
    metadata = spec_metadata([0, 0, 0], batch.draft_token_ids)
    output = adapter(batch.kwargs["positions"].flip(0), mode=mode)(metadata, None, batch.logits, settings)
    assert min(reference.margin) > testing.MARGIN
    assert torch.equal(output.sampled_token_ids.long(), reference.token_ids)


def test_rows_are_found_through_the_indices_wherever_they_lie():
    counts = [3, 0, 2, 4]
    batch = testing.random_batch(
        seed=3, num_drafts=counts, vocab_size=97, dtype=torch.float32, draft=testing.PROBS, shuffled_state=False
    )
    settings = sampling(batch.kwargs["temperature"], generators_of(batch.kwargs["seeds"]), max_num_logprobs=1)
    metadata = spec_metadata(counts, batch.draft_token_ids)
    ordered = adapter(batch.kwargs["positions"].flip(0))(metadata, batch.kwargs["draft_probs"], batch.logits, settings)

    order = torch.randperm(len(batch.logits), generator=torch.Generator().manual_seed(1))
    where = order.argsort()
    moved = replace(
        metadata,
        target_logits_indices=where[metadata.target_logits_indices.long()].int(),
        bonus_logits_indices=where[metadata.bonus_logits_indices.long()].int(),
        logits_indices=metadata.logits_indices[order],
    )
    output = adapter(batch.kwargs["positions"].flip(0))(
        moved, batch.kwargs["draft_probs"], batch.logits[order], settings
    )
    assert torch.equal(output.sampled_token_ids, ordered.sampled_token_ids)
    emitted = (ordered.sampled_token_ids >= 0).flatten()
    torch.testing.assert_close(output.logprobs_tensors.logprobs[emitted], ordered.logprobs_tensors.logprobs[emitted])


def test_rows_known_to_lie_by_request_are_not_moved(monkeypatch):
    metadata = spec_metadata([2, 1], torch.tensor([3, 4, 5]))
    logits, seen = torch.randn(5, 20), []
    monkeypatch.setattr(v1, "verify", lambda rows, *a, **kw: seen.append(rows) or (torch.zeros(2, 3).int(), None))
    setattr(metadata, v1.BY_REQUEST, True)
    adapter()(metadata, None, logits, sampling(size=2))
    setattr(metadata, v1.BY_REQUEST, False)
    adapter()(metadata, None, logits, sampling(size=2))
    assert seen[0] is logits
    assert seen[1] is not logits and torch.equal(seen[1], logits)


def test_dummy_step_of_the_memory_profile():
    metadata = SpecDecodeMetadata.make_dummy([[0]] * 3, CPU)
    output = adapter(torch.arange(64))(metadata, None, torch.randn(6, 50), sampling(torch.full((3,), 0.5)))
    assert output.sampled_token_ids.shape == (3, 2)
    assert ((output.sampled_token_ids >= -1) & (output.sampled_token_ids < 50)).all()


def test_seeded_request_does_not_depend_on_its_batch():
    logits, drafts, positions = torch.randn(4, 300) * 2, torch.tensor([5, 6, 7]), torch.arange(40, 44)
    alone = adapter(positions.flip(0))(
        spec_metadata([3], drafts), None, logits, sampling(torch.tensor([1.0]), generators_of([11]))
    )
    for before, after in [((2,), ()), ((), (1, 4)), ((0, 3), (2,))]:
        counts = [*before, 3, *after]
        rows_before, rows_after = sum(before) + len(before), sum(after) + len(after)
        others = torch.randn(rows_before + rows_after, 300)
        metadata = spec_metadata(
            counts, torch.cat([torch.randint(300, (sum(before),)), drafts, torch.randint(300, (sum(after),))])
        )
        output = adapter(
            torch.cat([torch.zeros(rows_before), positions, torch.ones(rows_after)]).long().flip(0), seed=9
        )(
            metadata,
            None,
            torch.cat([others[:rows_before], logits, others[rows_before:]]),
            sampling(torch.full((len(counts),), 1.0), {len(before): torch.Generator().manual_seed(11)}),
        )
        assert output.sampled_token_ids[len(before), :4].tolist() == alone.sampled_token_ids[0].tolist()


def test_unseeded_requests_draw_anew_each_step_and_alike_on_every_rank():
    metadata, settings = spec_metadata([2] * 64, torch.zeros(128)), sampling(torch.ones(64))
    logits = torch.zeros(192, 1000)
    ranks = [adapter(seed=3), adapter(seed=3)]
    first, second = ([rank(metadata, None, logits, settings).sampled_token_ids for rank in ranks] for _ in range(2))
    assert torch.equal(*first) and torch.equal(*second)
    assert not torch.equal(first[0], second[0])
    assert len(first[0][:, 0].unique()) > 32


def test_generators_are_not_advanced_on_a_cpu():
    generators = generators_of([1, 2])
    states = [generator.get_state() for generator in generators.values()]
    adapter()(spec_metadata([1, 0], torch.tensor([3])), None, torch.randn(3, 20), sampling(torch.ones(2), generators))
    assert all(torch.equal(g.get_state(), s) for g, s in zip(generators.values(), states, strict=True))


def test_a_discarded_draw_can_be_taken_back_from_a_cuda_generator():
    """The runner subtracts 4 from the offset of a discarded request's generator, whatever drew the token."""

    class CudaGenerator:
        device, offset = SimpleNamespace(type="cuda"), 0
        initial_seed = staticmethod(lambda: 2**64 - 5)
        get_offset = lambda self: self.offset  # noqa: E731

        def set_offset(self, offset):
            assert offset >= 0
            self.offset = offset

    generator = CudaGenerator()
    seeds = adapter().draws.seeds(2, {0: generator, 7: CudaGenerator()}, CPU)
    assert seeds[0] == -5
    generator.set_offset(generator.get_offset() - 4)


class FixedSampler(Sampler):
    """A sampler that is not vLLM's own."""

    def forward(self, logits, sampling_metadata, **kwargs):
        output = super().forward(logits, sampling_metadata, **kwargs)
        output.sampled_token_ids.fill_(17)
        return output


@pytest.mark.parametrize("how", ["subclass", "instance", "class"])
@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "sampled"])
def test_bonus_token_comes_from_a_sampler_that_is_not_stock(monkeypatch, how, greedy):
    sampler = FixedSampler() if how == "subclass" else Sampler()
    if how == "instance":
        sampler.forward = FixedSampler().forward
    if how == "class":
        stock_forward = Sampler.forward

        def forward(self, *args, **kwargs):
            output = stock_forward(self, *args, **kwargs)
            output.sampled_token_ids.fill_(17)
            return output

        monkeypatch.setattr(Sampler, "forward", forward)
    logits = torch.full((5, 40), -30.0)
    logits[torch.arange(5), torch.tensor([1, 2, 3, 4, 5])] = 30.0
    metadata = spec_metadata([2, 1], torch.tensor([1, 2, 9]))
    settings = sampling(None if greedy else torch.ones(2), size=2) if greedy else sampling(torch.ones(2))
    output = adapter(sampler=sampler)(metadata, None, logits, settings)
    assert output.sampled_token_ids.tolist() == [[1, 2, 17], [4, -1, -1]]


def greedy_step(change, **settings):
    """A step whose draft tokens mostly follow the logits, so that all outcomes occur."""
    torch.manual_seed(len(change))
    counts = [3, 0, 2, 4]
    logits = (torch.randn(13, 60) * 2).to(torch.bfloat16)
    best = logits.float().argmax(1)
    drafts = best[spec_metadata(counts, torch.zeros(9)).target_logits_indices]
    drafts = torch.where(torch.rand(9) < 0.3, torch.randint(60, (9,)), drafts)
    changes = CHANGES[change]([part.tolist() for part in best.split([4, 1, 3, 5])]) if change else {}
    spec = [part.tolist() for part in drafts.split(counts)]
    return spec_metadata(counts, drafts), logits, sampling(size=4, spec_token_ids=spec, **changes, **settings)


@pytest.mark.parametrize("change", [*CHANGES, ""])
def test_greedy_equals_stock_with_logits_processors(change):
    metadata, logits, settings = greedy_step(change)
    before = logits.clone()
    ours = adapter()(metadata, None, logits, settings).sampled_token_ids
    assert torch.equal(logits, before)
    stock = StockRejectionSampler(Sampler(), None, CPU)(metadata, None, logits, settings).sampled_token_ids
    assert torch.equal(ours, stock)
    if change:
        plain = adapter()(metadata, None, before, sampling(size=4)).sampled_token_ids
        assert not torch.equal(ours, plain), "the processors changed nothing, so this test shows nothing"


@pytest.mark.parametrize("change", CHANGES)
def test_processors_work_on_drafts_beside_a_sampler_that_only_gives_bonus_tokens(change):
    class BonusTokens(torch.nn.Module):
        logprobs_mode = "raw_logprobs"

        def forward(self, logits, sampling_metadata, **kwargs):
            return SamplerOutput(torch.full((len(logits), 1), 17, dtype=torch.int32), None)

    metadata, logits, settings = greedy_step(change)
    ours = adapter(sampler=BonusTokens())(metadata, None, logits, settings).sampled_token_ids
    stock = StockRejectionSampler(Sampler(), None, CPU)(metadata, None, logits, settings).sampled_token_ids
    accepted_all = (stock >= 0).sum(1) == torch.tensor([4, 1, 3, 5])
    for request, last in enumerate([3, 0, 2, 4]):
        expected = stock[request].clone()
        if accepted_all[request]:
            expected[last] = 17
        assert torch.equal(ours[request], expected)


@pytest.mark.parametrize("change", ["penalties", ""])
@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"])
def test_greedy_log_probabilities_equal_stock(mode, change):
    metadata, logits, settings = greedy_step(change, max_num_logprobs=3)
    ours = adapter(mode=mode)(metadata, None, logits.clone(), settings)
    stock = StockRejectionSampler(Sampler(mode), None, CPU)(metadata, None, logits.clone(), settings)
    assert torch.equal(ours.sampled_token_ids, stock.sampled_token_ids)
    emitted = (ours.sampled_token_ids >= 0).flatten()
    for name in ("logprob_token_ids", "logprobs", "selected_token_ranks"):
        theirs = getattr(stock.logprobs_tensors, name)[emitted]
        torch.testing.assert_close(getattr(ours.logprobs_tensors, name)[emitted], theirs, rtol=1e-6, atol=1e-6)


def test_a_minimum_length_is_active_until_tokens_that_the_host_knows_reach_it():
    """Async scheduling: what ends a request's output may stand for drafts that are not accepted in the end."""
    processors = min_tokens({0: {7}})
    metadata = sampling(size=1, logitsprocs=processors)
    for known, is_active in ((6, True), (10, False)):
        processors.non_argmax_invariant[0].min_toks = {0: (10, [5] * known + [-1] * 5, {7}, False)}
        assert needs_processors(metadata) == is_active


def test_the_minimum_length_counts_the_drafts_before_a_bonus_token():
    # Both requests accept three drafts. Then the first has its ten tokens and may stop, the second has eight.
    processors = min_tokens({0: {7}, 1: {7}})
    processor = processors.non_argmax_invariant[0]
    processor.min_toks = {r: (10, [5] * length, {7}, False) for r, length in enumerate((7, 5))}
    logits = torch.zeros(8, 20)
    logits[[0, 1, 2, 4, 5, 6], [1, 2, 3, 1, 2, 3]] = 9.0
    logits[[3, 7], 7] = 9.0
    logits[[3, 7], 8] = 5.0
    metadata = spec_metadata([3, 3], torch.tensor([1, 2, 3, 1, 2, 3]))
    tokens = adapter()(metadata, None, logits, sampling(size=2, logitsprocs=processors)).sampled_token_ids
    assert tokens.tolist() == [[1, 2, 3, 7], [1, 2, 3, 8]]
    assert {r: len(output) for r, (_, output, *_) in processor.min_toks.items()} == {0: 7, 1: 5}


@pytest.mark.parametrize("custom", [False, True], ids=["stock-sampler", "custom-sampler"])
def test_processed_log_probabilities_are_those_sampled_from(custom):
    torch.manual_seed(0)
    counts, temperature = [2, 0, 3], torch.tensor([0.7, 0.0, 1.4])
    top_k, top_p = torch.tensor([20, 50, 8], dtype=torch.int32), torch.tensor([0.8, 1.0, 0.9])
    logits = torch.randn(8, 50) * 2
    metadata = spec_metadata(counts, logits.argmax(1)[[0, 1, 4, 5, 6]])
    settings = sampling(temperature, generators_of([1, 2, 3]), top_k=top_k, top_p=top_p, max_num_logprobs=0)
    sampler = adapter(mode="processed_logprobs", sampler=FixedSampler("processed_logprobs") if custom else None)
    output = sampler(metadata, None, logits, settings)
    logprobs, row, bonus_rows = output.logprobs_tensors.logprobs[:, 0].view(3, -1), 0, {2, 3, 7}
    checked = 0
    for request, count in enumerate(counts):
        for i in range(count + 1):
            token = int(output.sampled_token_ids[request, i])
            if token >= 0 and not (custom and row in bonus_rows):
                scaled = logits[row].double() / (float(temperature[request]) or 1.0)
                kept, _ = filter_row_ref(scaled, int(top_k[request]), float(top_p[request]), 0.0)
                assert math.isclose(float(logprobs[request, i]), float(kept.log_softmax(0)[token]), abs_tol=1e-4)
                checked += 1
            row += 1
    assert checked >= (2 if custom else 3)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 1.0), (0.8, 0.9), (1.0, 1.0)])
def test_first_token_follows_the_target_where_stock_on_a_cpu_does_not(record_property, temperature, top_p):
    """vLLM 0.32's CPU path reads per-token parameters it never wrote, so only ours has the target distribution.

    The bound on ours: mean total variation of n draws over V tokens is at most sqrt(V / n) / 2, and it exceeds its mean
    by t with probability below exp(-2 n t^2).
    """
    vocab_size, batch, steps = 32, 4000, 5
    torch.manual_seed(1)
    row = torch.randn(vocab_size) * 1.5
    scaled, _ = filter_row_ref(row.double() / temperature, 0, top_p, 0.0)
    target = scaled.softmax(0)
    draft = (row + torch.randn(vocab_size)).softmax(0)
    filters = {"top_p": torch.full((batch,), top_p)} if top_p < 1 else {}
    counts = {}
    for name, sampler in {"ours": adapter(), "stock": StockRejectionSampler(Sampler(), None, CPU)}.items():
        counts[name] = torch.zeros(vocab_size)
        for _ in range(steps):
            drafts = torch.multinomial(draft, batch * 2, replacement=True)
            output = sampler(
                spec_metadata([2] * batch, drafts),
                draft.expand(batch * 2, -1).contiguous(),
                row.repeat(batch * 3, 1),
                sampling(torch.full((batch,), temperature), **filters),
            )
            first = output.sampled_token_ids[:, 0].long()
            counts[name] += torch.bincount(first.clamp(0, vocab_size - 1), minlength=vocab_size)
    distance = {name: float((n / n.sum() - target).abs().sum() / 2) for name, n in counts.items()}
    draws = batch * steps
    bound = math.sqrt(vocab_size / draws) / 2 + math.sqrt(math.log(1e6) / (2 * draws))
    print(f"T={temperature} top_p={top_p}: total variation ours {distance['ours']:.4f} stock {distance['stock']:.4f}")
    record_property("total_variation", distance)
    assert distance["ours"] <= bound
    if top_p < 1 or temperature != 1:
        assert distance["stock"] > 0.1
