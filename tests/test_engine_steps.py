"""A seeded request's text is the same whatever drafts it gets, none included; alone and in any batch; on both runners.

The models run in single precision: a difference could come from the last bits of logits otherwise.
"""

import pytest
from engine import run_engines, steps

pytest.importorskip("vllm")
pytestmark = pytest.mark.engine

RUNNERS = {
    "V1": {"requests": 16, "max_tokens": 24, "alone": 4, "off": 0, "ngram": 4, "draft-4": 4},
    "V2": {"requests": 8, "max_tokens": 8, "alone": 2, "off": 0, "ngram": 3, "draft-3": 3},
    "V1, more": {"requests": 16, "max_tokens": 24, "alone": 8, "off": 0, "draft-1": 1, "draft-4": 4},
    "V2, more": {"requests": 8, "max_tokens": 8, "alone": 4, "off": 0, "ngram": 3, "draft-3": 3},
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.long) if "more" in name else name for name in RUNNERS],
)
def ran(request, tmp_path_factory):
    """The name in RUNNERS, results by engine name, and what each engine logged."""
    sizes = RUNNERS[request.param]
    runner = request.param[:2]
    if runner == "V2":
        pytest.importorskip("triton")
    prompts, sampling = steps.requests(sizes["requests"], sizes["max_tokens"])
    listed = steps.batches(prompts, sampling, sizes["alone"])
    drafting = steps.drafting(
        {name: number for name, number in sizes.items() if name in ("off", "ngram") or "-" in name}
    )
    # Many short chunks of the prompts: the runner draws for each of them and discards all but the last.
    prompts, sampling = steps.requests(4, sizes["max_tokens"], ({"temperature": 0.0}, {"temperature": 1.0}))
    unseeded = [{k: v for k, v in params.items() if k != "seed"} for params in sampling]
    chunked = steps.engine("chunked", None, [{"name": "all", "prompts": prompts, "sampling": unseeded}],
                           max_num_seqs=4, max_num_batched_tokens=16)  # fmt: skip
    # Log probabilities must not change the text, and min-p and logit bias reach requests that get no drafts.
    more = (*steps.KINDS[:5], steps.MIN_P)
    prompts, sampling = steps.requests(6, sizes["max_tokens"], more)
    shown = [params | {"logprobs": 2} for params in sampling]
    biased = [params | {"logit_bias": {"17": 100.0}, "max_tokens": 3} for params in sampling]
    logprobs = [
        {"name": "without", "prompts": prompts, "sampling": sampling},
        {"name": "with", "prompts": prompts, "sampling": shown},
        {"name": "biased", "prompts": prompts, "sampling": biased},
    ]
    engines = [
        steps.engine(name, drafts, listed + (logprobs if drafts is None else []), max_num_seqs=32)
        for name, drafts in drafting.items()
    ]
    return request.param, *run_engines.start([*engines, chunked], tmp_path_factory.mktemp("engines"), runner)


def test_without_speculation_a_request_does_not_depend_on_its_batch(ran):
    runner, results, _ = ran
    expected = results["off"]["batches"]["together"]["token_ids"]
    assert [len(ids) for ids in expected] == [RUNNERS[runner]["max_tokens"]] * RUNNERS[runner]["requests"]
    assert steps.differing(results["off"], expected, RUNNERS[runner]["alone"]) == []


def test_a_request_does_not_depend_on_its_drafts(ran):
    runner, results, _ = ran
    expected = results["off"]["batches"]["together"]["token_ids"]
    drafting = [name for name in RUNNERS[runner] if name == "ngram" or name.startswith("draft-")]
    assert len(drafting) >= 2
    for name in drafting:
        assert steps.differing(results[name], expected, RUNNERS[runner]["alone"]) == [], name


def test_log_probabilities_leave_the_text_alone_and_a_bias_does_not(ran):
    _, results, _ = ran
    batches = results["off"]["batches"]
    assert batches["without"]["token_ids"] == batches["with"]["token_ids"]
    for ids, at in zip(batches["with"]["token_ids"], batches["with"]["logprobs"], strict=True):
        assert all(str(token) in shown for token, shown in zip(ids, at, strict=True))
    assert batches["biased"]["token_ids"] == [[17] * 3] * 6


def test_draws_of_unfinished_prompts_are_discarded(ran):
    runner, results, _ = ran
    emitted = results["chunked"]["batches"]["all"]["token_ids"]
    assert [len(ids) for ids in emitted] == [RUNNERS[runner]["max_tokens"]] * 4


def test_only_ours_draws_and_says_so(ran):
    name, results, logs = ran
    runner = name[:2]
    module = f"vllm_specopt.integration.{runner.lower()}"
    for name, result in results.items():
        off = name in ("off", "chunked")
        assert result["plain_sampler"] == f"{module}_sampler.Sampler"
        assert result["sampler"] == (f"{module}_sampler.Sampler" if off else f"{module}.RejectionSampler")
        assert result["stock_calls"] == {}
        line = f"specopt: active: runner={runner} method=exact"
        assert logs[name].count("specopt:") == logs[name].count(line) == 1
        assert ("speculation=off" in logs[name]) == off
