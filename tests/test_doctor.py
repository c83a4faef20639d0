"""`specopt doctor`: all good on this installation, and one sentence for each thing that would not work."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vllm_specopt.cli.main import app
from vllm_specopt.integration import diagnosis

vllm = pytest.importorskip("vllm")

MODELS = Path(__file__).parents[1] / "models"


def invoke(*arguments: str):
    return CliRunner().invoke(app, ["doctor", *arguments])


@pytest.fixture(scope="module")
def answer():
    """The answer on this installation, all checks run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("VLLM_PLUGINS", raising=False)
        patch.setenv("HF_HUB_OFFLINE", "1")
        done = invoke("--json")
    assert done.exit_code in (0, 1), done.output
    return done.exit_code, json.loads(done.stdout[done.stdout.index("{") :])


def test_a_working_installation_is_all_good(answer):
    code, found = answer
    assert [check for check in found["checks"] if check["status"] == "problem"] == []
    assert (code, found["ok"]) == (0, True)
    checks = {check["name"]: check["found"] for check in found["checks"]}
    assert checks["runner"] in ("V1", "V2")
    assert checks["active"] == "method exact, draft_model drafts, 4 per step"
    assert checks["correct"].split()[0] in ("10", "11", "12")
    assert "GB/s over 40 of 40 rows" in checks["speed"] or "GB/s over 320 of 320 rows" in checks["speed"]


def test_the_environment_stays_as_it_was(monkeypatch):
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    before = dict(os.environ)
    invoke("--json", "--model", str(MODELS / "specopt-target"))
    assert dict(os.environ) == before


def test_vllms_log_is_kept_from_the_answer():
    """In a process that has not imported vLLM yet: on a CPU its import warns that Triton is disabled."""
    code = "from vllm_specopt.cli import doctor\nwith doctor._quiet():\n    import vllm.triton_utils"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def sentences(checks) -> list[str]:
    return [check.sentence for check in checks if check.status == diagnosis.PROBLEM]


def test_a_missing_entry_point_and_an_allowlist_without_us_are_problems(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "lora_filesystem_resolver,other")
    assert sentences([diagnosis.plugin()]) == [
        "VLLM_PLUGINS is 'lora_filesystem_resolver,other', so vLLM will not load the plugin: add specopt to it, or "
        "unset it."
    ]
    monkeypatch.setenv("VLLM_PLUGINS", "other,specopt")
    assert sentences([diagnosis.plugin()]) == []
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    (sentence,) = sentences([diagnosis.plugin()])
    assert sentence.startswith("vLLM cannot see the plugin: run `")


def test_an_unknown_vllm_is_a_problem_for_the_runner_that_is_used(monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.31.0")
    assert sentences([diagnosis.known("V1", "V1")]) == [
        "vLLM 0.31.0 is not among the versions it was checked against (0.32.x, 0.33.x): install a vllm-specopt that "
        "knows this vLLM."
    ]
    assert diagnosis.known("V2", "V1").status == diagnosis.NOTE
    assert diagnosis.known("V2", None).status == diagnosis.PROBLEM


def test_a_missing_package_is_a_problem_where_it_is_needed(monkeypatch):
    monkeypatch.setattr(diagnosis, "_device", lambda: "cpu")
    monkeypatch.setitem(sys.modules, "numba", None)
    assert sentences(diagnosis.installed()) == [f"numba is not installed beside {sys.executable}: install it there."]
    monkeypatch.setattr(diagnosis, "_device", lambda: "cuda")
    assert sentences(diagnosis.installed()) == []


def test_a_wrong_kernel_is_a_problem(monkeypatch):
    import torch

    from vllm_specopt import verify

    def wrong(**keywords):
        keywords["token_ids"].fill_(1)
        keywords["num_sampled"].fill_(keywords["token_ids"].shape[1])

    monkeypatch.setattr(verify, "_backend", lambda name: wrong)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    (sentence,) = sentences([diagnosis.correct(device)])
    assert sentence.startswith("verification fails its check: ")


def test_a_configuration_that_would_not_run_is_a_problem():
    arguments = {
        "model": str(MODELS / "specopt-target"),
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    }
    _, checks = diagnosis.configuration(arguments | {"additional_config": {"specopt": "fast"}})
    (sentence,) = sentences(checks)
    assert sentence.startswith("vLLM would not start: ")
    assert "specopt.method is 'fast'" in sentence
    runner, checks = diagnosis.configuration(arguments | {"additional_config": {}})
    assert runner in ("V1", "V2")
    assert sentences(checks) == [f"the option is not given: add --additional-config '{diagnosis.DEFAULT_OPTION}'."]


def test_the_line_of_vllms_error_that_says_why_is_told():
    speculative = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 5, "prompt_lookup_max": 3}
    arguments = {"model": str(MODELS / "specopt-target"), "speculative_config": speculative}
    _, checks = diagnosis.configuration(arguments)
    assert sentences(checks) == ["vLLM would not start: prompt_lookup_min=5 must be <= prompt_lookup_max=3"]


def test_a_configuration_without_speculation_is_fine():
    arguments = {"model": str(MODELS / "specopt-target"), "additional_config": {"specopt": "exact"}}
    _, checks = diagnosis.configuration(arguments)
    assert sentences(checks) == []
    assert checks[-1].found == "method exact, no drafts"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--speculative-config", "{"], "--speculative-config is not JSON"),
        (["--additional-config", "[1]"], "--additional-config is [1], expected a JSON object."),
        (["--model", "./nowhere"], "nowhere is no model folder (it has no config.json)"),
        (["--model", "no/such-model"], "the target model no/such-model is no folder and was not downloaded before"),
        (["--speculative-config", '{"model": "/nope"}'], "/nope is no model folder (it has no config.json)"),
        (["--additional-config", '{"specopt": {"method": "nope"}}'], "--additional-config: specopt.method is 'nope'"),
    ],
    ids=["no JSON", "no object", "no model", "not downloaded", "no draft model", "no option"],
)
def test_bad_input_is_one_sentence(monkeypatch, arguments, sentence):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = invoke(*arguments)
    assert done.exit_code == 2
    assert done.output.startswith("specopt doctor: ")
    assert sentence in done.output and done.output.count("\n") == 1
