"""The drop-in in real V2 engines: vLLM's V2 runner and our Triton kernels, both under Triton's interpreter."""

from pathlib import Path

import pytest
from engine import steps
from engine.run_engines import start

pytest.importorskip("vllm")
pytest.importorskip("triton")
pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[1]
DRAFT_MODEL = {"model": str(ROOT / "models" / "specopt-draft"), "num_speculative_tokens": 3}
DRAFTING = {
    "draft-greedy": DRAFT_MODEL,
    "draft-probabilistic": {**DRAFT_MODEL, "draft_sample_method": "probabilistic"},
}
NUM_PROMPTS, FEW, MAX_TOKENS = 16, 8, 10
# In the interpreter a token takes long; V1's engines do 32 prompts, and tests/test_engine_steps.py n-grams.
NUM_GREEDY = {"draft-greedy": NUM_PROMPTS, "draft-probabilistic": 8}
GREEDY = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
# No top-k or top-p: vLLM's kernel for them, which samples each request's first token, fails under the interpreter.
SEEDED = [{"temperature": 0.9, "seed": index, "max_tokens": MAX_TOKENS, "ignore_eos": True} for index in range(FEW)]
PROCESSED = [
    {
        **GREEDY,
        **(
            {"repetition_penalty": 1.3, "logprobs": 1},
            {"min_tokens": 8, "ignore_eos": False, "stop_token_ids": list(range(40))},
            {"bad_words": ["self", "return", "the", "def"]},
            {"allowed_token_ids": list(range(0, 512, 2))},
        )[index % 4],
    }
    for index in range(FEW)
]


@pytest.fixture(scope="module", params=["three engines", pytest.param("four engines", marks=pytest.mark.long)])
def ran(request, tmp_path_factory):
    """Results by engine name, and what each engine logged.

    The fourth is stock with sampled drafts, whose greedy text is that of the other stock engine.
    """
    prompts, engines = steps.prompts(NUM_PROMPTS), []
    for drafting, speculative in DRAFTING.items():
        batches = {"greedy": (prompts[: NUM_GREEDY[drafting]], GREEDY)}
        if drafting == "draft-greedy":
            batches["processed"] = (prompts[:FEW], PROCESSED)
        if drafting == "draft-probabilistic":
            batches["seeded"] = batches["seeded again"] = (prompts[:FEW], SEEDED)
        for arm in ("stock", "exact"):
            if request.param == "three engines" and (drafting, arm) == ("draft-probabilistic", "stock"):
                continue
            listed = [
                {"name": name, "prompts": these, "sampling": params}
                for name, (these, params) in batches.items()
                if arm == "exact" or "seeded" not in name
            ]
            more = {"max_model_len": 256, "max_num_seqs": NUM_PROMPTS}
            more |= {"additional_config": steps.EXACT if arm == "exact" else {}}
            engines.append(steps.engine(f"{drafting} {arm}", speculative, listed, **more))
            if (drafting, arm) == ("draft-probabilistic", "exact"):
                engines[-1]["reference"] = True
    return start(engines, tmp_path_factory.mktemp("engines"), "V2")


@pytest.mark.parametrize("drafting", DRAFTING)
def test_greedy_output_equals_stock(ran, drafting):
    results, _ = ran
    number = NUM_GREEDY[drafting]
    stock = results.get(f"{drafting} stock", results["draft-greedy stock"])["batches"]["greedy"]["token_ids"]
    ours = results[f"{drafting} exact"]["batches"]["greedy"]["token_ids"]
    assert [len(ids) for ids in ours] == [MAX_TOKENS] * number
    assert ours == stock[:number]


def test_greedy_output_with_logits_processors_equals_stock(ran):
    results, _ = ran
    ours, stock = (results[f"draft-greedy {arm}"]["batches"]["processed"] for arm in ("exact", "stock"))
    assert ours["token_ids"] == stock["token_ids"]
    plain = results["draft-greedy exact"]["batches"]["greedy"]["token_ids"]
    changed = {index % 4 for index in range(FEW) if ours["token_ids"][index] != plain[index]}
    assert changed == {0, 1, 2, 3}, "some processors changed no output, so this test shows nothing for them"
    for our_request, stock_request in zip(ours["logprobs"], stock["logprobs"], strict=True):
        for our_token, stock_token in zip(our_request or [], stock_request or [], strict=True):
            assert our_token == pytest.approx(stock_token, abs=1e-5)


def test_seeded_requests_repeat_in_the_same_engine(ran):
    results, _ = ran
    batches = results["draft-probabilistic exact"]["batches"]
    assert batches["seeded"]["token_ids"] == batches["seeded again"]["token_ids"]
    assert batches["seeded"]["token_ids"] != batches["greedy"]["token_ids"][:FEW]


def test_every_verification_equals_the_reference_with_vllms_own_drafts(ran):
    """The law carries over: on the engine's logits, draft logits and seeds both choose the same tokens."""
    compared = ran[0]["draft-probabilistic exact"]["reference"]
    assert compared["differ"] == 0
    assert compared["close"] <= 0.02 * compared["requests"]
    assert compared["sampled"] > 2 * FEW * MAX_TOKENS / (DRAFT_MODEL["num_speculative_tokens"] + 1)
    assert min(compared[name] for name in ("accepted", "recovered", "bonus")) > 20


@pytest.mark.parametrize("drafting", DRAFTING)
def test_only_ours_runs_and_says_so_once(ran, drafting):
    results, logs = ran
    active = "specopt: active: runner=V2 method=exact backend=triton device=cpu"
    ours, stock = results[f"{drafting} exact"], results.get(f"{drafting} stock")
    assert ours["sampler"] == "vllm_specopt.integration.v2.RejectionSampler"
    assert ours["stock_calls"] == {}
    assert logs[f"{drafting} exact"].count("specopt:") == logs[f"{drafting} exact"].count(active) == 1
    if stock is None:
        return
    assert stock["sampler"] == "vllm.v1.worker.gpu.spec_decode.rejection_sampler.RejectionSampler"
    assert stock["stock_calls"]["vllm.v1.worker.gpu.spec_decode.rejection_sampler._verify"] > 0
    assert "specopt:" not in logs[f"{drafting} stock"]
