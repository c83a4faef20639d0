"""`specopt bench-engine` as a command: what it refuses, what it leaves when it is cut short, and a short run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_specopt.benchmarks.serve import engine_ab, engine_report
from vllm_specopt.cli import engine
from vllm_specopt.cli.errors import CliError
from vllm_specopt.cli.main import app

ROOT = Path(__file__).parents[1]


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["bench-engine", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--arm", "fast"), "there is no arm 'fast'"),
        (("--drafting", "eager"), "there is no drafting 'eager'"),
        (("--target", "nowhere"), "name the target model with --target"),
        (("--prompts", "nowhere"), "cannot be read"),
        (("--requests", "1000"), "96 prompts for 1000 requests"),
        (("--vocab-size", "100"), "less than the pair's own 512"),
        (("--out", "/proc/nowhere"), "cannot be written"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(arguments, message):
    pytest.importorskip("vllm")
    result = invoke(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert result.output.count("\n") == 1 and result.output.startswith("specopt bench-engine: ")


@pytest.mark.long
@pytest.mark.engine
@pytest.mark.parametrize("drafting", ["greedy", "ngram"])
def test_one_short_run(tmp_path, drafting):
    pytest.importorskip("vllm")
    result = invoke(
        "--arm", "stock-repaired", "--arm", "exact", "--drafting", drafting, "--repeats", "1", "--requests", "4",
        "--output-len", "8", "--vocab-size", "2000", "--out", str(tmp_path),
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "engine_ab.json").read_text())
    assert [run["sampler"].split(".")[0] for run in record["runs"]] == ["vllm", "vllm_specopt"]
    for run in record["runs"]:
        for work in run["workloads"].values():
            assert work["tokens"] == 32 and work["parts"]["sampler"] > 0
    assert str(tmp_path) not in json.dumps(record).replace(record["command"], "")
    assert "12 of" not in result.output and "4 of 4 completions identical" in result.output
    assert (tmp_path / "engine_ab.md").read_text() == engine_report.markdown(record)


def test_kernels_compiled_in_flight_are_read_from_vllms_log():
    said = "WARNING 11-01 [jit_monitor.py:1] Triton kernel JIT compilation during inference: {}. This causes a spike\n"
    log = "".join(map(said.format, ("a.b.decide_kernel", "_x", "_x"))) + "compilation took 3 s\n"
    assert engine_ab.compiled_in_flight(log) == ["_x", "decide_kernel"]
    named = {
        name
        for path in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert set(engine_ab.KERNELS) == named


def test_a_plugin_that_vllm_cannot_find_is_said_before_anything_runs(monkeypatch, tmp_path):
    pytest.importorskip("vllm")
    assert engine_ab.is_registered()
    monkeypatch.setattr(engine_ab, "entry_points", lambda group: ())
    result = invoke("--out", str(tmp_path))
    assert result.exit_code == 2 and result.output.count("\n") == 1, result.output
    assert "vLLM does not find the plugin" in result.output


def test_what_is_measured_stays_when_a_later_run_fails(monkeypatch, tmp_path):
    pytest.importorskip("vllm")
    answers = [{"sampler": "vllm.Stock", "expands_parameters": True, "workloads": {}}]

    def run(*_):
        if not answers:
            raise CliError("a run failed")
        return answers.pop()

    monkeypatch.setattr(engine, "_run", run)
    result = invoke("--arm", "stock-repaired", "--vocab-size", "0", "--out", str(tmp_path))
    assert result.exit_code == 1 and "a run failed" in result.output
    assert [run["arm"] for run in json.loads((tmp_path / "engine_ab.json").read_text())["runs"]] == ["stock-repaired"]
