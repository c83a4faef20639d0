"""Block, typical and budget in real engines, for all requests and by request: V1, and V2 under Triton's interpreter."""

import json
import runpy
from pathlib import Path

import pytest

from vllm_specopt.benchmarks.host import small_model_dtype

pytest.importorskip("vllm")
pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[1]
CHOSEN = {"model": str(ROOT / "models" / "specopt-draft"), "num_speculative_tokens": 4}
SAMPLED = {**CHOSEN, "draft_sample_method": "probabilistic"}
START = runpy.run_path(str(ROOT / "tests" / "engine" / "run_engines.py"))["start"]
WARNING = "does not follow the target model's distribution"
OPTIONS = {
    "exact": (SAMPLED, {"method": "exact"}),
    "block": (SAMPLED, {"method": "block", "allow_per_request": True}),
    "typical": (SAMPLED, {"method": "typical", "typical": {"epsilon": 0.05, "delta": 0.3}}),
    "budget": (CHOSEN, {"method": "budget", "budget": {"delta": 0.5}, "allow_per_request": True}),
}


def sampling(count: int, tokens: int, temperature: float, choice=None) -> list[dict]:
    """Seeded parameters; every other request makes the choice."""
    return [
        {
            "temperature": temperature,
            "seed": index,
            "max_tokens": tokens,
            "ignore_eos": True,
            **({"extra_args": {"specopt": choice}} if choice and index % 2 else {}),
        }
        for index in range(count)
    ]


@pytest.fixture(scope="module", params=["V1", pytest.param("V2", marks=pytest.mark.long)])
def ran(request, tmp_path_factory):
    """One engine for each method, on each runner."""
    count, tokens = (16, 32) if request.param == "V1" else (6, 8)
    lines = (ROOT / "models" / "prompts.jsonl").read_text().splitlines()[:count]
    prompts = [json.loads(line)["prompt"] for line in lines]
    engines = []
    for name, (speculative, option) in OPTIONS.items():
        batches = {"greedy": sampling(count, tokens, 0.0), "sampled": sampling(count, tokens, 1.0)}
        if "allow_per_request" in option:
            batches["some exact"] = sampling(count, tokens, 1.0, "exact")
        if name == "budget":
            batches["all exact"] = [one | {"extra_args": {"specopt": "exact"}} for one in batches["sampled"]]
            batches["no budget"] = [one | {"extra_args": {"specopt": {"delta": 0}}} for one in batches["sampled"]]
        llm = {
            "model": str(ROOT / "models" / "specopt-target"),
            "speculative_config": speculative,
            "additional_config": {"specopt": option},
            "dtype": small_model_dtype(),
            "enforce_eager": True,
            "distributed_executor_backend": "uni",
            "enable_prefix_caching": False,
            "max_model_len": 256,
            "max_num_seqs": count,
        }
        listed = [{"name": key, "prompts": prompts, "sampling": value} for key, value in batches.items()]
        engines.append({"name": name, "llm": llm, "batches": listed})
    return request.param, *START(engines, tmp_path_factory.mktemp("engines"), request.param)


def tokens_of(results, name, batch):
    return results[name]["batches"][batch]["token_ids"]


def test_greedy_text_is_the_same_under_every_rule(ran):
    _, results, _ = ran
    exact = tokens_of(results, "exact", "greedy")
    assert all(tokens_of(results, name, "greedy") == exact for name in OPTIONS)


def test_sampled_text_differs_where_a_rule_does(ran):
    """Every request ends, with as many tokens as it asked for; no rule is exact under another name."""
    _, results, _ = ran
    exact = tokens_of(results, "exact", "sampled")
    for name in ("block", "typical", "budget"):
        found = tokens_of(results, name, "sampled")
        assert [len(text) for text in found] == [len(text) for text in exact]
        assert found != exact


def test_requests_choose_beside_others(ran):
    """With chosen drafts a seeded text depends on its request's rule alone; a budget of nothing is exact."""
    _, results, _ = ran
    every, some, none = (tokens_of(results, "budget", name) for name in ("sampled", "some exact", "all exact"))
    assert some[::2] == every[::2] and some[1::2] == none[1::2]
    assert tokens_of(results, "budget", "no budget") == none
    assert sum(left != right for left, right in zip(every, none, strict=True)) > len(every) / 2


def test_only_lossy_rules_warn(ran):
    runner, _, logs = ran
    for name in OPTIONS:
        assert logs[name].count(f"specopt: active: runner={runner} method={name} ") == 1
        assert logs[name].count(WARNING) == (name in ("typical", "budget"))
    assert "up to 0.5 nats of KL divergence" in logs["budget"]
