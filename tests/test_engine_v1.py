"""The drop-in in real V1 engines on a CPU, beside stock ones: one process runs them all."""

from pathlib import Path

import pytest
from engine import run_engines, steps

from vllm_specopt.benchmarks.host import small_model_dtype

pytest.importorskip("vllm")
pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[1]
DRAFT_MODEL = {"model": str(ROOT / "models" / "specopt-draft"), "num_speculative_tokens": 4}
DRAFTING = {
    "draft-greedy": DRAFT_MODEL,
    "draft-probabilistic": {**DRAFT_MODEL, "draft_sample_method": "probabilistic"},
    "ngram": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1},
}
NUM_PROMPTS, MAX_TOKENS = 32, 24
GREEDY = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
SEEDED = [
    {"temperature": 0.9, "top_p": 0.95, "seed": index, "max_tokens": MAX_TOKENS, "ignore_eos": True}
    for index in range(NUM_PROMPTS)
]
# Greedy requests that need vLLM's own logits processors, or log probabilities.
PROCESSED = [
    {
        **GREEDY,
        **(
            {"repetition_penalty": 1.3},
            {"frequency_penalty": 0.8, "presence_penalty": 0.4},
            {"min_tokens": 12, "ignore_eos": False, "stop_token_ids": list(range(40))},
            {"bad_words": ["self", "return", "the", "def"]},
            {"allowed_token_ids": list(range(0, 512, 2))},
            {},
        )[index % 6],
    }
    for index in range(NUM_PROMPTS)
]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Results by engine name, and what each engine logged; those with a draft model."""
    return start(("draft-greedy", "draft-probabilistic"), tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def ran_ngram(tmp_path_factory):
    """The same of those that draft by n-grams."""
    return start(("ngram",), tmp_path_factory.mktemp("ngram"))


def start(names, folder) -> tuple[dict, dict]:
    """Run a stock engine and one of ours for each way of drafting."""
    prompts, engines = steps.prompts(NUM_PROMPTS), []
    for drafting in names:
        batches = {"greedy": GREEDY}
        if drafting == "draft-greedy":
            batches |= {"processed": PROCESSED, "logprobs": {**GREEDY, "logprobs": 2}}
            batches |= {"seeded": SEEDED, "seeded again": SEEDED, "seeded reversed": SEEDED[::-1]}
        if drafting == "draft-probabilistic":
            batches["seeded"] = SEEDED
        for arm in ("stock", "exact"):
            listed = [
                {"name": name, "prompts": prompts[:: -1 if "reversed" in name else 1], "sampling": sampling}
                for name, sampling in batches.items()
                if arm == "exact" or "seeded" not in name
            ]
            more = {"dtype": small_model_dtype(), "max_num_seqs": NUM_PROMPTS}
            more |= {"additional_config": steps.EXACT if arm == "exact" else {}}
            engines.append(steps.engine(f"{drafting} {arm}", DRAFTING[drafting], listed, **more))
    return run_engines.start(engines, folder, "V1")


# tests/test_engine_steps.py drafts by n-grams too.
EVERY = [pytest.param(name, marks=pytest.mark.long) if name == "ngram" else name for name in DRAFTING]


@pytest.mark.parametrize("drafting", EVERY)
def test_greedy_output_equals_stock(request, drafting):
    results, _ = request.getfixturevalue("ran_ngram" if drafting == "ngram" else "ran")
    ours, stock = (results[f"{drafting} {arm}"]["batches"]["greedy"]["token_ids"] for arm in ("exact", "stock"))
    assert [len(ids) for ids in ours] == [MAX_TOKENS] * NUM_PROMPTS
    assert ours == stock


def test_greedy_output_with_logits_processors_equals_stock(ran):
    results, _ = ran
    ours, stock = (results[f"draft-greedy {arm}"]["batches"]["processed"]["token_ids"] for arm in ("exact", "stock"))
    assert ours == stock
    plain = results["draft-greedy exact"]["batches"]["greedy"]["token_ids"]
    changed = {index % 6 for index in range(NUM_PROMPTS) if ours[index] != plain[index]}
    assert changed == {0, 1, 2, 3, 4}, "some processors changed no output, so this test shows nothing for them"


def test_greedy_log_probabilities_equal_stock(ran):
    results, _ = ran
    ours, stock = (results[f"draft-greedy {arm}"]["batches"]["logprobs"] for arm in ("exact", "stock"))
    assert ours["token_ids"] == stock["token_ids"]
    for our_request, stock_request in zip(ours["logprobs"], stock["logprobs"], strict=True):
        for our_token, stock_token in zip(our_request, stock_request, strict=True):
            assert our_token == pytest.approx(stock_token, abs=1e-5)


def test_seeded_requests_repeat_in_the_same_engine(ran):
    results, _ = ran
    batches = results["draft-greedy exact"]["batches"]
    first, again = batches["seeded"]["token_ids"], batches["seeded again"]["token_ids"]
    assert first == again
    assert batches["seeded reversed"]["token_ids"][::-1] == first
    assert first != batches["greedy"]["token_ids"]


def test_probabilistic_drafts_are_verified_at_a_temperature(ran):
    results, _ = ran
    emitted = results["draft-probabilistic exact"]["batches"]["seeded"]["token_ids"]
    assert [len(ids) for ids in emitted] == [MAX_TOKENS] * NUM_PROMPTS


@pytest.mark.parametrize("drafting", EVERY)
def test_only_ours_runs_and_says_so_once(request, drafting):
    results, logs = request.getfixturevalue("ran_ngram" if drafting == "ngram" else "ran")
    active = "specopt: active: runner=V1 method=exact backend=cpu device=cpu"
    ours, stock = results[f"{drafting} exact"], results[f"{drafting} stock"]
    assert ours["sampler"] == "vllm_specopt.integration.v1.RejectionSampler"
    assert ours["stock_calls"] == {}
    assert logs[f"{drafting} exact"].count("specopt:") == logs[f"{drafting} exact"].count(active) == 1
    assert stock["sampler"] == "vllm.v1.sample.rejection_sampler.RejectionSampler"
    assert stock["stock_calls"]["vllm.v1.sample.rejection_sampler.forward"] > 0
    assert "specopt:" not in logs[f"{drafting} stock"]
