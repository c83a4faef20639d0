"""The rules in real engines, for all requests and by request: V1, and V2 under Triton's interpreter."""

from pathlib import Path

import pytest
from engine import steps
from engine.run_engines import start

from vllm_specopt.benchmarks.host import small_model_dtype

pytest.importorskip("vllm")
pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[1]
CHOSEN = {"model": str(ROOT / "models" / "specopt-draft"), "num_speculative_tokens": 4}
SAMPLED = {**CHOSEN, "draft_sample_method": "probabilistic"}
WARNING = "does not follow the target model's distribution"
OPTIONS = {
    "choice": (CHOSEN, {"method": "exact", "sigmoid": "paper", "allow_per_request": True}),
    "exact": (SAMPLED, {"method": "exact"}),
    "block": (SAMPLED, {"method": "block", "allow_per_request": True}),
    "sigmoid": (SAMPLED, {"method": "sigmoid", "sigmoid": "paper"}),
    "typical": (SAMPLED, {"method": "typical", "typical": {"epsilon": 0.05, "delta": 0.3}}),
    "budget": (CHOSEN, {"method": "budget", "budget": {"delta": 0.5}, "allow_per_request": True}),
}
# In the interpreter an engine takes long: the one in which requests choose shows most.
RUNNERS = {
    "V1": ("choice", "exact", "block", "typical", "budget"),
    "V2": ("choice",),
    "V1, more": ("choice", "exact", "sigmoid"),
    "V2, more": tuple(OPTIONS),
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


def all_choose(requests: list[dict], choice) -> list[dict]:
    return [one | {"extra_args": {"specopt": choice}} for one in requests]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.long) if "more" in name else name for name in RUNNERS],
)
def ran(request, tmp_path_factory):
    """One engine for each method, on each runner."""
    runner = request.param[:2]
    count, tokens = (16, 32) if runner == "V1" else (6, 8)
    engines = []
    for name in RUNNERS[request.param]:
        speculative, option = OPTIONS[name]
        batches = {"greedy": sampling(count, tokens, 0.0), "sampled": sampling(count, tokens, 1.0)}
        if "allow_per_request" in option:
            other = "sigmoid" if name == "choice" else "exact"
            batches["some"] = sampling(count, tokens, 1.0, other)
            batches["all"] = all_choose(batches["sampled"], other)
        if name == "budget":
            batches["no budget"] = all_choose(batches["sampled"], {"delta": 0})
        listed = [{"name": key, "prompts": steps.prompts(count), "sampling": value} for key, value in batches.items()]
        more = {"dtype": small_model_dtype(), "max_model_len": 256, "max_num_seqs": count}
        engines.append(steps.engine(name, speculative, listed, additional_config={"specopt": option}, **more))
    return runner, *start(engines, tmp_path_factory.mktemp("engines"), runner)


def tokens_of(results, name, batch):
    return results[name]["batches"][batch]["token_ids"]


def test_greedy_text_is_the_same_under_every_rule(ran):
    _, results, _ = ran
    exact = tokens_of(results, "choice", "greedy")
    assert all(tokens_of(results, name, "greedy") == exact for name in results)


def test_sampled_text_differs_where_a_rule_does(ran):
    """Every request ends, with as many tokens as it asked for; no rule is exact under another name."""
    _, results, _ = ran
    exact = tokens_of(results, "choice", "sampled")
    for name in results:
        found = tokens_of(results, name, "sampled")
        assert [len(text) for text in found] == [len(text) for text in exact]
        if name != "choice":
            assert found != exact
            assert name == "exact" or found != tokens_of(results, "exact", "sampled")


@pytest.mark.parametrize("name", ["choice", "budget"])
def test_requests_choose_beside_others(ran, name):
    """With chosen drafts a seeded text depends on its request's rule alone."""
    _, results, _ = ran
    if name not in results:
        pytest.skip("another engine of this runner shows it")
    none, some, every = (tokens_of(results, name, batch) for batch in ("sampled", "some", "all"))
    assert some[::2] == none[::2] and some[1::2] == every[1::2]
    assert sum(left != right for left, right in zip(none, every, strict=True)) > len(every) / 2
    if name == "budget":
        assert tokens_of(results, name, "no budget") == every == tokens_of(results, "choice", "sampled")


def test_the_log_says_what_is_on_and_what_it_costs(ran):
    runner, results, logs = ran
    backend = "cpu" if runner == "V1" else "triton"
    for name in results:
        method = "exact" if name == "choice" else name
        assert logs[name].count(f"specopt: active: runner={runner} method={method} backend={backend} device=cpu") == 1
        assert logs[name].count(WARNING) == (name not in ("exact", "block"))
        assert ("0.62 for every token" in logs[name]) == (name == "choice")
        assert ("up to 0.5 nats of KL divergence" in logs[name]) == (name == "budget")
        assert results[name]["stock_calls"] == {}
