"""`specopt ab --offline`: what its engines are asked for, what a run is refused for, and a short run."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from support.ab_records import EXACT, REPAIRED, make_plan

from vllm_specopt.benchmarks import host
from vllm_specopt.benchmarks.errors import CliError
from vllm_specopt.benchmarks.progress import Stages
from vllm_specopt.benchmarks.serve import engine, offline, settings
from vllm_specopt.benchmarks.serve.arms import Arm
from vllm_specopt.benchmarks.serve.command import begin
from vllm_specopt.benchmarks.serve.settings import checked

ROOT = Path(__file__).parents[2]


def test_engines_take_turns_and_run_every_point():
    plan = make_plan(offline=True)
    order = [(arm.name, slots, repeat) for arm, slots, repeat in offline.runs(plan)]
    names = ["stock-repaired", "exact", "stock-repaired (again)"]
    assert order[:3] == [(name, 1, 0) for name in names] and order[6:9] == [(name, 1, 1) for name in names[::-1]]
    assert len(order) == len(set(order)) == 3 * 2 * 4 == len(offline.stages(plan))


def test_arms_differ_by_option_and_repair_only():
    plan = make_plan(offline=True, serve_args=("--dtype=float32", "--max-model-len=1024"))
    repaired, exact = (offline.request(plan, arm, 8, 0, Path("p")) for arm in (REPAIRED, EXACT))
    assert repaired.pop("repair") and not exact.pop("repair")
    assert exact["llm"].pop("additional_config") == {"specopt": {"method": "exact"}}
    assert repaired == exact
    assert (exact["llm"]["dtype"], exact["llm"]["max_model_len"], len(exact["prompts"])) == ("float32", 1024, 8)
    assert list(exact["workloads"]) == ["T = 0", "T = 1, top-p 0.9"]
    assert "traced" in exact and "traced" not in offline.request(plan, EXACT, 8, 1, Path("p"))


def test_a_run_that_is_not_of_its_arm_is_refused():
    stock, repaired, exact = Arm("stock"), REPAIRED, EXACT
    result = {"sampler": "vllm.v1.RejectionSampler", "expands_parameters": False}
    ours = result | {"sampler": "vllm_specopt.integration.v1.RejectionSampler"}
    assert engine.problem(stock, result) is None and engine.problem(exact, ours) is None
    assert "ran the sampler" in engine.problem(exact, result)
    assert "ran the sampler" in engine.problem(stock, ours)
    assert "not repaired" in engine.problem(repaired, result)
    assert engine.problem(exact, ours | {"compiled_in_flight": ["_topk_topp_kernel"]}) is None
    in_flight = ours | {"compiled_in_flight": ["decide_kernel", "_topk_topp_kernel"]}
    assert engine.problem(exact, in_flight) == "the arm exact compiled decide_kernel while it served"


def test_kernels_compiled_in_flight_are_read_from_vllms_log():
    said = "WARNING 11-01 [jit_monitor.py:1] Triton kernel JIT compilation during inference: {}. This causes a spike\n"
    log = "".join(map(said.format, ("a.b.decide_kernel", "_x", "_x"))) + "compilation took 3 s\n"
    assert engine.compiled_in_flight(log) == ["_x", "decide_kernel"]
    named = {
        name
        for path in (ROOT / "kernels").glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert set(engine.KERNELS) == named


def test_arms_by_name_and_by_option():
    arm = Arm.named('mine={"method": "exact", "on_unknown_vllm": "stock"}', on_cpu=True)
    assert (arm.name, arm.option) == ("mine", {"method": "exact", "on_unknown_vllm": "stock"})
    with pytest.raises(ValueError, match="for CPUs"):
        Arm.named("stock-repaired", on_cpu=False)


def test_a_plugin_that_vllm_cannot_find_is_said_before_anything_runs(monkeypatch, tmp_path):
    pytest.importorskip("vllm")
    assert settings.is_registered()
    monkeypatch.setattr(settings, "entry_points", lambda group: ())
    with pytest.raises(CliError, match="vLLM does not find the plugin") as caught:
        checked(out=tmp_path / "out", offline=True)
    assert caught.value.exit_code == 2 and not (tmp_path / "out").exists()


def test_what_is_measured_stays_when_a_later_run_fails(monkeypatch, tmp_path):
    pytest.importorskip("vllm")
    asked = checked(out=tmp_path, offline=True, concurrency="2", temperature="0", output_len=8, repeats=1)
    record, _ = begin(asked, [])

    def run(self, arm, cells):
        if arm.name == "exact":
            raise CliError("its engine failed")
        self.record["cells"][cells[0].key] = {}

    monkeypatch.setattr(offline.Offline, "_run", run)
    with Stages(Console(), offline.stages(asked.plan)) as progress:
        offline.Offline(asked, record, tmp_path, progress).run()
    kept = json.loads((tmp_path / "ab.json").read_text())
    assert kept["arms"]["exact"]["error"] == "its engine failed"
    assert [key.split("|")[0] for key in kept["cells"]] == ["stock", "stock (again)"]


@pytest.mark.long
@pytest.mark.engine
@pytest.mark.parametrize("drafting", ["greedy", "ngram"])
def test_one_short_run(tmp_path, drafting):
    pytest.importorskip("vllm")
    model = {"model": str(ROOT / "models" / "specopt-draft")}
    ngram = {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    speculation = {"num_speculative_tokens": 4} | (model if drafting == "greedy" else ngram)
    command = [sys.executable, "-m", "vllm_specopt.cli.main", "ab", "--offline", "--repeats", "1"]
    command += ["--concurrency", "4", "--temperature", "0,0.8:0.9", "--output-len", "8", "--vocab-size", "2000"]
    command += ["--speculative-config", json.dumps(speculation), "-o", str(tmp_path / "ab")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "ab" / "ab.json").read_text())
    arms = ("stock-repaired", "exact", "stock-repaired (again)")
    assert len(record["cells"]) == 6 and set(record["arms"]) == set(arms)
    for cell in record["cells"].values():
        assert cell["total_output_tokens"] == 32 and cell["num_drafts"] > 0 and cell["tokens_per_cpu_s"] > 0
    for arm in arms:
        assert 0 < record["arms"][arm]["scopes"]["T = 0.8, top-p 0.9"]["sampling_share"] < 1
    assert "exact, T = 0: 4 of 4 greedy texts identical" in done.stdout
    page = (tmp_path / "ab" / "report.md").read_text()
    assert "## Where a step's time goes" in page and "tokens per CPU second" in page
    assert host.small_model_dtype() in page
