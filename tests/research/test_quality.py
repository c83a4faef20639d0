"""Quality on tasks: scores, laws, records and refusals; and shipped models that write in real engines."""

import contextlib
import io
import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from research.quality import arms, report, scores
from research.quality.__main__ import app
from research.quality.arms import Arm, Plan
from research.quality.command import is_done, key
from research.quality.law import Rows, rule, total_variation
from research.quality.settings import Options, plans, read_items
from vllm_specopt.integration.config import SpecoptConfig, parse

ROOT = Path(__file__).parents[2]
TASKS = ROOT / "models" / "tasks"
PAIR = [str(TASKS / "summary" / role) for role in ("target", "draft")]

# rouge-score logs with absl, whose handler closes its stream when vLLM sets up logging anew; pytest captures stderr.
absl_handler = pytest.importorskip("absl.logging").get_absl_handler()
absl_handler.python_handler.stream = sys.__stderr__


def test_word_error_rate_counts_all_words_together():
    references, texts = ["one two three", "four"], ["one too three more", ""]
    assert scores.scores(["wer"], references, texts) == {"wer": 75.0}


def test_rouge():
    same = scores.rouge(["the cat sat", "a dog"], ["the cat sat", "a dog"])
    assert same == {"rouge1": 100, "rouge2": 100, "rougeL": 100}
    swapped = scores.rouge(["a b c d"], ["c d a b"])
    assert swapped["rouge1"] == 100 and swapped["rouge2"] == pytest.approx(200 / 3) and swapped["rougeL"] == 50


def test_repetition_rate():
    assert scores.repetition_rate(["a b c a b c", "x"], 3) == 0.25
    assert scores.repetition_rate(["a b a b", "a b"], 2) == 0.25
    assert scores.repetition_rate(["a b", ""], 3) is None


def test_logging_set_up_anew_leaves_the_captured_stream_open():
    scores.rouge(["a"], ["a"])
    captured = absl_handler.python_handler.stream
    with contextlib.redirect_stderr(io.StringIO()):
        absl_handler.close()
    assert not captured.closed and not sys.stderr.closed


def test_perplexity():
    assert scores.perplexity([math.log(0.5), math.log(0.125)]) == pytest.approx(4)
    assert scores.perplexity([-1.0, -math.inf]) == math.inf
    assert scores.perplexity([]) is None


def test_intervals_are_students():
    found = scores.interval([1, 2, 3, 4, 5])
    assert found["mean"] == 3 and found["half_width"] == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-6)
    assert scores.interval([7])["half_width"] is None
    assert scores.interval([1, None]) is None


def some_rows(vocab=48, rows=12):
    target, draft = np.random.default_rng(0).normal(0, 2, (2, rows, vocab))
    return Rows(target, target + 0.5 * draft)


def option_of(value) -> SpecoptConfig:
    return parse({"specopt": value})


@pytest.mark.parametrize("form", ["probs", "logits"])
def test_laws_of_the_rules(form):
    rows = some_rows()
    exact = rule(option_of({"method": "exact"}), form, rows)
    paper = rule(option_of({"method": "sigmoid", "sigmoid": {"alpha": -1e5, "beta": 1e5}}), form, rows)
    for i in range(len(rows)):
        own = total_variation(*rows.laws(i))
        assert 0.05 < own < 0.95
        assert exact(i) == pytest.approx((0, 1 - own), abs=1e-12)
        assert paper(i) == pytest.approx((own, 1), abs=1e-3)


def plan(**changes) -> Plan:
    values = {
        "name": "n", "target": "a/t", "draft": "a/d", "items": (("p", "one two"), ("q", "three")), "metrics": ("wer",),
        "arms": arms.arms(), "temperatures": (0.0, 1.0), "seeds": 2, "max_tokens": 4, "stop": (),
        "dtype": "auto", "draft_tokens": 4, "max_model_len": 64, "max_num_seqs": 2, "law_items": 1, "ngram": 3,
        "threads": 1, "on_cpu": True,
    }  # fmt: skip
    return Plan(**values | changes)


def result(texts, law=None):
    counts = {"num_drafts": 10, "num_draft_tokens": 40, "num_accepted_tokens": 30}
    run = {"seconds": 2.0, "tokens": 8, "cut": 0, "texts": texts, "law": law, **counts}
    return {
        "engine_seconds": 1.0, "dtype": "float32",
        "sampler": "vllm_specopt.integration.v1.RejectionSampler",
        "runs": [run | {"temperature": t, "seed": s} for t, s in ((0.0, 0), (1.0, 0), (1.0, 1))],
    }  # fmt: skip


def test_arms_are_the_methods_at_several_settings():
    known = {arm.name: arm for arm in arms.arms()}
    assert list(known)[:6] == ["target", "draft", "exact", "sigmoid-1e0", "sigmoid-1e1", "sigmoid-1e4"]
    assert known["sigmoid-1e4"].option == {"method": "sigmoid", "sigmoid": {"alpha": -1e4, "beta": 1e4}}
    assert known["budget-0.05"].option == {"method": "budget", "budget": {"delta": 0.05}}
    assert known["typical-0.09"].option == {"method": "typical", "typical": {"epsilon": 0.09, "delta": 0.3}}
    for arm in known.values():
        parse({"specopt": arm.option or "exact"})
    asked = {name: plan().request(arm) for name, arm in known.items()}
    requests = {name: each["llm"] for name, each in asked.items()}
    drafting = {name: llm.get("speculative_config", {}).get("draft_sample_method") for name, llm in requests.items()}
    assert {name for name, how in drafting.items() if how == "greedy"} == set(list(known)[6:])
    assert asked["exact"]["law_items"] == 1 and asked["budget-0.05"]["law_items"] == 0
    assert requests["draft"]["model"] == "a/d" and requests["target"]["model"] == requests["exact"]["model"] == "a/t"
    assert [name for name, llm in requests.items() if "speculative_config" not in llm] == ["target", "draft"]


def test_no_prompt_is_split_on_a_cpu():
    asked = plan(max_model_len=6000)
    llm = asked.request(asked.arms[2])["llm"]
    assert llm["enable_chunked_prefill"] is False and llm["max_num_batched_tokens"] == 6000
    assert "enable_chunked_prefill" not in plan(on_cpu=False).request(asked.arms[2])["llm"]


def test_texts_that_fill_the_context_are_scored_short_of_a_token():
    texts = [{"prompt": [1] * 60, "answer": [2] * 4}, {"prompt": [1], "answer": [2] * 4}]
    assert [len(text["answer"]) for text in plan().score_request(texts)["score"]] == [3, 4]


def test_no_two_requests_share_a_seed():
    from research.quality.engine import request_seed

    assert len({request_seed(seed, line) for seed in range(5) for line in range(1000)}) == 5000


def test_the_table_holds_means_over_seeds_and_what_failed():
    asked = plan()
    exact, law = asked.arms[2], {"tv": 0.0, "draft_tv": 0.25, "acceptance": 0.75, "exact_acceptance": 0.75, "rows": 9}
    record = {
        "config": asked.describe(), "machine": {"load_average_before": 0.1, "cores": 2}, "versions": {}, "command": "c",
        "git": {"commit": None, "dirty": True}, "time": "t",
        "arms": {
            "draft": {"option": "null"} | arms.summarised(asked, result(["one", "three"])),
            "exact": {"option": key(exact)} | arms.summarised(asked, result(["one two", "three"], law)),
            "sigmoid-1e1": {"option": "x", "error": "status 1; the end of its log: boom"},
        },
    }  # fmt: skip
    arms.add_perplexities(record["arms"]["exact"]["runs"], [[-1.0]] * 4 + [[-2.0]] * 2)
    draft, row, failed = report.rows(record, 1.0)
    assert row[:3] == ["exact", "0.0 ± 0.0", "0.750 ± 0.000"] and row[3] == "4.00 ± 0.00" and row[5] == "0.000 ± 0.000"
    # Perplexity e by the first seed, e squared by the second: Student's t with one degree of freedom is wide.
    assert row[6] == f"{(math.e + math.e**2) / 2:.2f} ± {12.7062 * (math.e**2 - math.e) / 2:.2f}"
    assert draft[1] == "33.3 ± 0.0" and draft[5] == "0.250 ± 0.000"
    assert failed[:2] == ["sigmoid-1e1", "failed"]
    assert report.rows(record, 0.0)[1][1] == "0.0"
    page = report.markdown(record)
    assert "boom" in page
    assert is_done(record, exact) and not is_done(record, asked.arms[3]) and not is_done(record, asked.arms[4])


def test_the_picture_has_a_line_per_family_from_the_exact_arm_on(tmp_path):
    from research.quality import plot

    asked = plan()
    measured = arms.summarised(asked, result(["one two", "three"]))
    names = ("target", "exact", "sigmoid-1e1", "exact-chosen", "budget-0.05", "budget-0.2")
    record = {"config": asked.describe(), "arms": {name: json.loads(json.dumps(measured)) for name in names}}
    record["arms"]["typical-0.09"] = {"option": "x", "error": "boom"}
    for arm in names:
        arms.add_perplexities(record["arms"][arm]["runs"], [[-1.0]] * 6)
    labels = {family: [point["label"] for point in plot._points(record, 1.0, "wer", family, start)]
              for family, start, *_ in plot.FAMILIES}  # fmt: skip
    assert labels == {"sigmoid": ["exact", "1e1"], "typical": [], "budget": ["exact", "0.05", "0.2"]}
    assert plot.plot([record, record], tmp_path / "both.svg")
    assert "<svg" in (tmp_path / "both.svg").read_text()
    only_greedy = record | {"config": record["config"] | {"temperatures": [0.0]}}
    assert not plot.plot([only_greedy], tmp_path / "none.svg") and not (tmp_path / "none.svg").exists()


def test_a_result_of_another_sampler_is_refused():
    exact, target = arms.arms()[2], arms.arms()[0]
    assert "ran the sampler" in arms.problem(target, result([]))
    assert arms.problem(exact, result([])) is None


GOOD = json.dumps({"prompt": "p", "reference": "r"})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no lines"),
        ("\n\n", "holds no lines"),
        (f"{GOOD}\n{{", "line 2, is not JSON"),
        (f"{GOOD}\n\n[1]", 'line 3, is no object with "prompt" and "reference"'),
        ('{"prompt": "p"}', 'line 1, lacks the field "reference"'),
        ('{"prompt": "p", "reference": 3}', 'line 1: "reference" is no text'),
        ('{"prompt": "p", "reference": " "}', 'line 1: "reference" is no text, or empty'),
    ],
)
def test_bad_data_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "data.jsonl"
    path.write_text(content)
    ran = CliRunner().invoke(app, [*PAIR, "--data", str(path), "--metric", "wer"])
    assert ran.exit_code == 2 and message in ran.stderr and ran.stderr.count("\n") == 1


def test_data_is_read_line_by_line(tmp_path):
    path = tmp_path / "data.jsonl"
    item = json.dumps({"prompt": "a\u2028b", "reference": "c", "more": 1}, ensure_ascii=False)
    path.write_text(f"{GOOD}\n\n{item}\n")
    assert read_items(path) == [("p", "r"), ("a\u2028b", "c")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x/nowhere/t"], "speculation takes two"),
        ([*PAIR], "name --data FILE.jsonl and --metric"),
        ([*PAIR, "--data", "DATA"], "name --data FILE.jsonl and --metric"),
        ([*PAIR, "--data", "missing.jsonl", "--metric", "wer"], "missing.jsonl cannot be read (No such file"),
        ([*PAIR, "--data", "DATA", "--metric", "bleu"], "no metric 'bleu': take wer or rouge"),
        (["no/such/model", PAIR[1], "--data", "DATA", "--metric", "wer"], "no/such/model is no model folder"),
        ([*PAIR, "--data", "DATA", "--metric", "wer", "--task", "summary"], "--task is for the shipped models"),
        (["--data", "DATA"], "--data goes with a pair of models"),
        (["--task", "poems"], "no task 'poems': take transcription or summary"),
        (["--task", "summary", "--arm", "stock"], "no arm 'stock': take target, draft, exact"),
        (["--task", "summary", "--arm", "calibrated"], "no arm 'calibrated': take target, draft, exact"),
        (["--task", "summary", "--temperature", "warm"], "--temperature is 'warm'"),
        (["--task", "summary", "--temperature", "0.01"], "expected 0 or numbers from 0.05 to 5"),
    ],
)
def test_bad_input_is_refused(tmp_path, arguments, message):
    (tmp_path / "data.jsonl").write_text(GOOD)
    arguments = [str(tmp_path / "data.jsonl") if argument == "DATA" else argument for argument in arguments]
    ran = CliRunner().invoke(app, [*arguments, "-o", str(tmp_path / "out")])
    assert ran.exit_code == 2 and message in ran.stderr and ran.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_missing_package_is_named(monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jiwer" else found(name))
    ran = CliRunner().invoke(app, ["--task", "transcription"])
    assert ran.exit_code == 2 and "jiwer is not installed" in ran.stderr and "vllm-specopt[research]" in ran.stderr


def test_a_record_of_other_settings_is_kept(tmp_path):
    asked = plans(Options(tasks=["summary"], limit=2, seeds=2))[0]
    folder = tmp_path / "summary"
    folder.mkdir()
    (folder / "quality.json").write_text(json.dumps({"config": asked.describe() | {"seeds": 7}, "arms": {}}))
    arguments = ["--task", "summary", "--limit", "2", "--seeds", "2", "-o", str(tmp_path)]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code == 2 and "made with other settings (seeds)" in ran.stderr


@pytest.fixture
def tasks(monkeypatch):
    for folder in (TASKS, ROOT / "models"):
        monkeypatch.syspath_prepend(str(folder))
    import summary
    import transcription

    yield {"summary": summary, "transcription": transcription}
    for name in ("summary", "transcription", "corpus"):
        sys.modules.pop(name, None)


def test_what_is_held_out_is_not_trained_on(tasks):
    train, held_out = tasks["transcription"].corpora()
    assert len(train) > 10_000 and len(held_out) > 1_000 and not set(train) & set(held_out)
    # In a summary the names follow one of two wordings: compare events, people and places by the references alone.
    shown = {reference for _, reference in tasks["summary"].held_out(300, random.Random(1))}
    stream = tasks["summary"].training(random.Random(2))
    assert not shown & {next(stream)[1] for _ in range(2000)}


@pytest.mark.parametrize("name", ["summary", "transcription"])
def test_tasks_fit_their_tokenizers_and_lengths(tasks, name):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TASKS / name / "target")
    items = read_items(TASKS / name / "eval.jsonl")
    limit = plans(Options(tasks=[name]))[0].max_tokens
    assert len(items) >= 100 and len(set(items)) == len(items)
    for prompt, reference in items:
        answer = tokenizer(reference)["input_ids"]
        assert len(answer) < limit and tokenizer.decode(answer) == reference
        assert tokenizer.unk_token_id not in answer
        assert tokenizer.decode(tokenizer(prompt)["input_ids"]) == prompt


@pytest.mark.parametrize("name", ["summary", "transcription"])
def test_the_readme_states_what_was_measured(name):
    metrics = json.loads((TASKS / name / "metrics.json").read_text())
    lines = (TASKS / "README.md").read_text().splitlines()
    for role in ("target", "draft"):
        row = next(line for line in lines if line.startswith(f"| {name} | {role} |"))
        trained = metrics["training"][role]
        assert f"{metrics['parameters'][role]:,}" in row and f"{trained['tokens_seen']:,}" in row
        assert str(metrics["held_out_loss"][role]) in row
        assert (TASKS / name / role / "model.safetensors").stat().st_size < 3_000_000
    assert metrics["held_out_loss"]["target"] < metrics["held_out_loss"]["draft"] / 3


@pytest.mark.long
@pytest.mark.engine
def test_shipped_models_write_and_are_scored(tmp_path, monkeypatch):
    refused = Arm("refused", {"method": "sigmoid", "sigmoid": {"alpha": 1, "beta": 1}})
    known = arms.arms()
    monkeypatch.setattr(arms, "arms", lambda: (*known, refused))
    arguments = ["--task", "summary", "--limit", "4", "--seeds", "2", "--max-tokens", "10", "--law-prompts"]
    arguments += ["3", "-o", str(tmp_path / "out"), "--arm", "exact", "--arm", "sigmoid-1e4"]
    ran = CliRunner().invoke(app, [*arguments, "--arm", "refused"])
    assert ran.exit_code == 1 and "the arm refused failed" in ran.output, ran.output
    folder = tmp_path / "out" / "summary"
    found = json.loads((folder / "quality.json").read_text())["arms"]
    assert "specopt.sigmoid.alpha is 1.0, expected less than" in found.pop("refused")["error"]
    for name, arm in found.items():
        assert [run["seed"] for run in arm["runs"]] == [0, 1]
        for run in arm["runs"]:
            assert 0 < run["tokens"] <= 40 and 1 < run["perplexity"] < 1000 and run["law"]["rows"] > 3
            law, drafted = run["law"], run["num_draft_tokens"]
            if name == "exact":
                assert law["tv"] < 1e-9 and law["acceptance"] == pytest.approx(law["exact_acceptance"], abs=1e-9)
                assert run["num_accepted_tokens"] < drafted
            else:
                assert law["tv"] == pytest.approx(law["draft_tv"], abs=1e-3)
                assert run["acceptance_rate"] > 0.95 > found["exact"]["runs"][0]["acceptance_rate"]
    assert (folder / "quality.svg").stat().st_size > 1000
    before = (folder / "quality.json").read_bytes()
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0 and (folder / "quality.json").read_bytes() == before
