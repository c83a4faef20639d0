"""The audit in real engines: it counts what they emit, is silent where they are exact, and finds those that are not."""

from pathlib import Path

import pytest
from engine import steps
from engine.run_engines import start

from vllm_specopt.benchmarks.host import small_model_dtype
from vllm_specopt.evidence import BINS, judge
from vllm_specopt.integration.audit import ROWS

pytest.importorskip("vllm")
pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[1]
DRAFT = {"model": str(ROOT / "models" / "specopt-draft"), "num_speculative_tokens": 3}
PROBABILISTIC = {**DRAFT, "draft_sample_method": "probabilistic"}
SYNTHETIC = {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 3.5}
ALIKE = {"alpha": -3.0, "beta": 3.0}
SAMPLED = [{"temperature": 1.0}, {"temperature": 0.7, "top_p": 0.9}, {"temperature": 1.3, "repetition_penalty": 1.2}]
MORE = {"ignore_eos": True}


def counted(result: dict, method: str) -> list[int]:
    """An engine's counts of a method; it counted for no other."""
    for name, counts in zip(ROWS, result["audit"], strict=True):
        assert name == method or not any(counts)
    return result["audit"][ROWS.index(method)]


def engines(options: dict, batches: list, **more) -> list[dict]:
    return [
        steps.engine(name, speculative, batches, additional_config={"specopt": option}, **more)
        for name, (option, speculative) in options.items()
    ]


@pytest.fixture(scope="module")
def v1(tmp_path_factory):
    """Results by engine: 96 sampled requests of 40 tokens, 8 with a seed each, 8 greedy ones."""
    many = [SAMPLED[i % len(SAMPLED)] | MORE | {"max_tokens": 40} for i in range(96)]
    seeded = [{"temperature": 1.0, "seed": 5, "max_tokens": 12} | MORE] * 8
    greedy = {"temperature": 0.0, "max_tokens": 12} | MORE
    batches = [
        {"name": "sampled", "prompts": steps.prompts(32) * 3, "sampling": many},
        {"name": "seeded", "prompts": steps.prompts(8), "sampling": seeded},
        {"name": "greedy", "prompts": steps.prompts(8), "sampling": greedy},
    ]
    options = {
        "exact": ({"method": "exact", "audit": True}, PROBABILISTIC),
        "share": ({"method": "exact", "audit": 0.25}, DRAFT),
        "alone": ({"method": "exact", "audit": True}, None),
        "sigmoid": ({"method": "sigmoid", "sigmoid": ALIKE, "audit": True}, DRAFT),
        "stock": ({"method": "stock", "audit": True}, PROBABILISTIC),
    }
    listed = engines(options, batches, dtype=small_model_dtype(), max_num_seqs=96)
    return start(listed, tmp_path_factory.mktemp("engines"), "V1")


def test_every_sampled_token_is_audited_and_none_is_against_exact(v1):
    results, _ = v1
    for name, drafts in (("exact", 3), ("alone", 0)):
        verdict = judge(counted(results[name], "exact"))
        emitted = sum(map(len, results[name]["batches"]["sampled"]["token_ids"]))
        # What a last step emits beyond a request's length, and one more step that was under way.
        assert emitted <= verdict.tokens <= emitted + 96 * (2 * drafts + 1)
        assert 8 * 12 <= verdict.skipped <= 8 * (12 + 2 * drafts + 1)
        assert verdict.impossible == 0
        assert verdict.log10_evidence < 1.3
        assert verdict.bias < 0.12


def test_a_share_of_the_steps(v1):
    results, _ = v1
    whole = sum(counted(results["exact"], "exact")[:BINS])
    assert 0.1 < sum(counted(results["share"], "exact")[:BINS]) / whole < 0.45
    assert judge(counted(results["share"], "exact")).log10_evidence < 1.3


def test_a_lossy_method_is_found(v1):
    results, logs = v1
    verdict = judge(counted(results["sigmoid"], "sigmoid"))
    assert verdict.is_lossy
    assert "specopt: active: runner=V1 method=sigmoid" in logs["sigmoid"] and " audit=1" in logs["sigmoid"]


def test_stock_is_watched(v1):
    """vLLM 0.32's own sampler draws from memory that nothing has written, on CPUs at a temperature: docs/reports.md."""
    results, logs = v1
    assert results["stock"]["stock_calls"]
    assert "v1_watch.WatchedRejectionSampler" in results["stock"]["sampler"]
    verdict = judge(counted(results["stock"], "stock"))
    emitted = sum(map(len, results["stock"]["batches"]["sampled"]["token_ids"]))
    assert verdict.tokens >= emitted
    assert "specopt: active: runner=V1 method=stock" in logs["stock"]
    assert verdict.is_lossy


@pytest.mark.long
def test_v2_engines(tmp_path_factory):
    pytest.importorskip("triton")
    sampling = {"temperature": 1.0, "max_tokens": 12} | MORE
    batches = [{"name": "sampled", "prompts": steps.prompts(16), "sampling": sampling}]
    options = {
        "exact": ({"method": "exact", "audit": True}, PROBABILISTIC),
        # Triton's interpreter lacks what stock's kernels for sampled drafts use.
        "stock": ({"method": "stock", "audit": True}, DRAFT),
        "synthetic": ({"method": "stock", "audit": True}, DRAFT | SYNTHETIC),
    }
    listed = engines(options, batches, max_num_seqs=16, max_model_len=256)
    results, _ = start(listed, tmp_path_factory.mktemp("engines"), "V2")
    assert judge(counted(results["synthetic"], "stock")).log10_evidence > 3
    for name in ("exact", "stock"):
        verdict = judge(counted(results[name], name))
        assert 16 * 12 <= verdict.tokens <= 16 * (12 + 7)
        assert verdict.impossible == verdict.skipped == 0
        assert verdict.log10_evidence < 1.3
