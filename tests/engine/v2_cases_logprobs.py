"""Log probabilities of the V2 adapter on hand-built steps: those of stock, and they do not change the tokens."""

import numpy as np
import pytest
import torch
from engine.v2_steps import (
    COUNTS,
    MIXED,
    PROCESSED,
    VOCAB,
    Step,
    assert_follows,
    sampling,
)
from vllm.v1.worker.gpu.spec_decode import rejection_sampler as stock

from vllm_specopt.integration.v2 import RejectionSampler


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
