"""V1's sampler in place of vLLM's: the draw of a verified row, with everything around it vLLM's own."""

import pytest
import torch

pytest.importorskip("vllm")
from support.v1_steps import CHANGES, adapter, generators_of, min_p_processor, plain_sampler, sampling, spec_metadata
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor
from vllm.v1.sample.sampler import Sampler as Stock

from vllm_specopt import testing
from vllm_specopt.integration.v1_sampler import is_stock
from vllm_specopt.kernels.reference import verify_ref

VOCAB = 211


def batch_of(seed, filters=("top_k", "top_p", "min_p"), dtype=torch.bfloat16, size=9):
    batch = testing.random_batch(
        seed=seed, num_drafts=[0] * size, vocab_size=VOCAB, dtype=dtype, filters=filters, shuffled_state=False
    )
    if "top_k" in filters:
        # The runner writes the size of the vocabulary where a request has no top-k.
        top_k = batch.kwargs["top_k"]
        batch.kwargs["top_k"] = torch.where((top_k < 1) | (top_k > VOCAB), VOCAB, top_k)
    return batch


def settings_of(batch, **changes):
    values = {name: batch.kwargs[name] for name in ("top_k", "top_p") if name in batch.kwargs}
    if "min_p" in batch.kwargs:
        values["logitsprocs"] = min_p_processor(batch.kwargs["min_p"])
    return sampling(batch.kwargs["temperature"], generators_of(batch.kwargs["seeds"]), **values, **changes)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("filters", [(), ("top_k", "top_p", "min_p")], ids=["plain", "filters"])
def test_equals_reference_token_for_token(monkeypatch, seed, filters):
    batch = batch_of(seed, filters, [torch.float32, torch.bfloat16, torch.float16][seed % 3])
    reference = verify_ref(*batch.args(), **batch.kwargs)
    before = batch.logits.clone()
    monkeypatch.setattr(torch, "empty", testing.poisoned_empty)
    output = plain_sampler(batch.kwargs["positions"])(batch.logits, settings_of(batch))
    assert output.sampled_token_ids.dtype == torch.int32 and output.logprobs_tensors is None
    close = torch.tensor(reference.margin) < testing.MARGIN
    assert close.sum() <= 1
    assert torch.equal(output.sampled_token_ids[~close].long(), reference.token_ids[~close])
    assert torch.equal(batch.logits, before)


@pytest.mark.parametrize("mode", ["raw_logprobs", "processed_logprobs", "processed_logits"])
def test_draws_what_the_rejection_sampler_does_in_a_step_without_drafts(mode):
    batch = batch_of(5, ("top_k", "top_p"))
    settings = settings_of(batch, max_num_logprobs=2)
    positions = batch.kwargs["positions"]
    plain = plain_sampler(positions, mode=mode)(batch.logits.clone(), settings)
    metadata = spec_metadata([0] * 9, batch.draft_token_ids)
    stepped = adapter(positions.flip(0), mode=mode)(metadata, None, batch.logits, settings)
    assert torch.equal(plain.sampled_token_ids, stepped.sampled_token_ids)
    torch.testing.assert_close(plain.logprobs_tensors.logprobs, stepped.logprobs_tensors.logprobs)
    assert torch.equal(plain.logprobs_tensors.logprob_token_ids, stepped.logprobs_tensors.logprob_token_ids)
    assert plain.logprobs_tensors.logprobs[:, 0].isfinite().all()


def test_log_probabilities_do_not_change_the_tokens():
    batch = batch_of(6)
    tokens = {
        mode: plain_sampler(batch.kwargs["positions"], mode=mode)(
            batch.logits.float().clone(), settings_of(batch, max_num_logprobs=3 if mode else None)
        ).sampled_token_ids
        for mode in ("", "raw_logprobs", "processed_logprobs")
    }
    assert torch.equal(tokens[""], tokens["raw_logprobs"])
    assert torch.equal(tokens[""], tokens["processed_logprobs"])


@pytest.mark.parametrize("change", [*CHANGES, ""])
@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"])
def test_greedy_equals_stock_with_logits_processors_and_log_probabilities(change, mode):
    torch.manual_seed(len(change))
    logits = (torch.randn(4, 60) * 2).to(torch.bfloat16)
    best = [[token] for token in logits.float().argmax(1).tolist()]
    changes = CHANGES[change]([tokens * 2 for tokens in best]) if change else {}
    settings = sampling(size=4, max_num_logprobs=3, **changes)
    ours = plain_sampler(torch.arange(4), mode=mode)(logits.clone(), settings)
    stock = Stock(mode)(logits.clone(), settings)
    assert torch.equal(ours.sampled_token_ids, stock.sampled_token_ids)
    torch.testing.assert_close(ours.logprobs_tensors.logprobs, stock.logprobs_tensors.logprobs)
    if change:
        plain = plain_sampler(torch.arange(4))(logits, sampling(size=4)).sampled_token_ids
        assert not torch.equal(ours.sampled_token_ids, plain), "the processors changed nothing, so this shows nothing"


def test_seeded_request_does_not_depend_on_its_batch():
    row = torch.randn(1, 300) * 2
    found = set()
    for before, after in [(0, 0), (3, 0), (0, 5), (2, 2)]:
        logits = torch.cat([torch.randn(before, 300), row, torch.randn(after, 300)])
        positions = torch.randint(99, (before + 1 + after,))
        positions[before] = 41
        settings = sampling(torch.ones(len(logits)), {before: torch.Generator().manual_seed(11)})
        found.add(int(plain_sampler(positions, seed=before)(logits, settings).sampled_token_ids[before]))
    assert len(found) == 1


def test_unseeded_requests_draw_anew_each_step_and_alike_on_every_rank():
    ranks = [plain_sampler(torch.full((64,), 8), seed=3) for _ in range(2)]
    settings = sampling(torch.ones(64))
    first, second = ([rank(torch.zeros(64, 1000), settings).sampled_token_ids for rank in ranks] for _ in range(2))
    assert torch.equal(*first) and torch.equal(*second)
    assert not torch.equal(first[0], second[0])
    assert len(first[0].unique()) > 32


def test_a_processor_of_scaled_logits_is_applied_after_temperature():
    class Own(MinPLogitsProcessor):
        def __init__(self):
            pass

        def apply(self, logits):
            return logits.masked_fill_(logits < 1.0, -torch.inf)

    logits = torch.tensor([[0.0, 0.4, 0.6, 0.2], [0.9, 0.4, 1.2, 0.2]])
    settings = sampling(torch.tensor([0.5, 1.0]), logitsprocs=LogitsProcessors([Own()]))
    drawn = [plain_sampler(torch.full((2,), step))(logits.clone(), settings).sampled_token_ids for step in range(20)]
    assert [tokens.tolist() for tokens in drawn] == [[[2], [2]]] * 20


def test_steps_without_drafts_add_to_no_tokens_and_no_rows():
    batch = batch_of(2)
    ours = plain_sampler(batch.kwargs["positions"])
    ours(batch.logits, settings_of(batch))
    batch.logits[3] = float("nan")
    ours(batch.logits, settings_of(batch))
    assert not ours.account.counters[:-1].any()
    assert int(ours.account.bad_rows) == 1
    stepped = adapter(batch.kwargs["positions"])
    stepped(spec_metadata([0] * 9, batch.draft_token_ids), None, batch.logits, settings_of(batch_of(2, ())))
    assert not stepped.account.counters[:-1].any()


def test_ours_counts_as_vllms_own_unless_something_is_patched(monkeypatch):
    assert is_stock(Stock()) and is_stock(plain_sampler())
    assert not is_stock(type("Other", (Stock,), {})())
    patched = plain_sampler()
    patched.sample = lambda *args: None
    assert not is_stock(patched)
    monkeypatch.setattr(Stock, "apply_logits_processors", lambda self, logits, *args: logits)
    assert not is_stock(plain_sampler())
