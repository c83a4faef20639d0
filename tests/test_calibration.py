"""Calibration files: what is read back and refused; and one made by the command, then served, in real engines."""

import json
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from vllm_specopt import calibration
from vllm_specopt.benchmarks.host import small_model_dtype
from vllm_specopt.calibration import Model, check_models, content_of
from vllm_specopt.cli.calibrate_fit import bytes_share, choose_block_size, rank_blocks
from vllm_specopt.cli.calibrate_law import RepairedRule, plain_rule
from vllm_specopt.cli.main import app
from vllm_specopt.config import SpecoptConfig, parse
from vllm_specopt.testing import random_calibration

ROOT = Path(__file__).parents[1]
SPECULATIVE = {
    "model": str(ROOT / "models" / "specopt-draft"),
    "num_speculative_tokens": 3,
    "draft_sample_method": "probabilistic",
}
START = runpy.run_path(str(ROOT / "tests" / "engine" / "run_engines.py"))["start"]


def written(path: Path, **changes) -> Path:
    content = content_of(random_calibration(1, 512)) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def test_a_file_is_read_back(tmp_path):
    made = random_calibration(1, 512)
    option = {"method": "sigmoid", "sigmoid": {"calibration": str(written(tmp_path / "c.json"))}}
    expected = replace(made, path=str(tmp_path / "c.json"))
    assert parse({"specopt": option}) == SpecoptConfig("sigmoid", sigmoid=expected)
    assert len(made.read_blocks("probs")) == 6 < len(made.read_blocks("logits")) == 12


def test_a_changed_file_is_read_anew(tmp_path):
    path = written(tmp_path / "c.json")
    before = calibration.load(str(path))
    written(path, tail=3.0)
    assert before.tail == 12.0 and calibration.load(str(path)).tail == 3.0


def estimators(**changes):
    return content_of(random_calibration(1, 512))["estimators"] | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 7}, "format is 7, expected 1"),
        ({"vocab_size": "512"}, "vocab_size is '512', expected an integer from 1"),
        ({"block_size": 3}, "block_size is 3, expected a power of two"),
        ({"block_size": 1024}, "block_size is 1024, expected an integer from 1 to 512"),
        ({"blocks": [0, 64]}, "blocks is no list of integers from 0 to 63"),
        ({"blocks": [0, 0]}, "blocks names a block twice"),
        ({"blocks": 3}, "blocks is no list"),
        ({"blocks": []}, r"estimators\.one_hot\.num_blocks is 12, expected an integer from 0 to 0"),
        (
            {"estimators": estimators(probs={"num_blocks": 0, "target": [0, 0, 0, 0]})},
            r"estimators\.probs\.num_blocks is 0, expected an integer from 1 to 12",
        ),
        ({"tail": float("nan")}, "tail is nan, expected a finite number"),
        ({"tail": -1}, r"tail is -1\.0, expected 0 to 40"),
        ({"estimators": {}}, r"estimators\.one_hot is missing"),
        (
            {"estimators": estimators(probs={"num_blocks": 2, "target": [0, float("inf"), 0, 0]})},
            r"estimators\.probs\.target\[1\] is inf, expected a finite number of at most 10000",
        ),
        (
            {"estimators": estimators(logits={"num_blocks": 2, "target": [0, 0, 0, 0]})},
            r"estimators\.logits\.draft is no list of 4 numbers",
        ),
        ({"models": None}, "models is missing"),
        ({"models": {"target": {"name": "m", "digest": 3}}}, r"models\.target\.digest is 3, expected a string"),
        ({"vocab_size": 600}, "vocab_size is 600, the target model's is 512"),
    ],
)
def test_a_malformed_file_is_refused_by_name_and_field(tmp_path, changes, message):
    path = written(tmp_path / "c.json", **changes)
    with pytest.raises(ValueError, match=rf"specopt\.sigmoid\.calibration {path}: {message}") as error:
        parse({"specopt": {"method": "sigmoid", "sigmoid": {"calibration": str(path)}}})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\x00"])
def test_a_file_of_something_else_is_refused(tmp_path, text):
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ValueError, match=r"specopt\.sigmoid\.calibration .*c\.json") as error:
        calibration.load(str(tmp_path / "c.json"))
    assert "\n" not in str(error.value)


def engine_config(monkeypatch, method="draft_model", **found):
    """A configuration whose models are described as ``found`` says, where it says anything."""
    monkeypatch.setattr(calibration, "describe", lambda model_config: model_config)
    made = random_calibration(1, 512)
    models = {role: found.get(role, getattr(made, role)) for role in ("target", "draft")}
    speculative = SimpleNamespace(method=method, draft_model_config=models["draft"])
    return replace(made, path="c.json"), SimpleNamespace(model_config=models["target"], speculative_config=speculative)


@pytest.mark.parametrize(
    ("role", "model", "message"),
    [
        ("target", Model("other", 512, "else", None), r"another target model: models\.target\.digest is 'digest'"),
        ("draft", Model("other", 500, "digest", None), r"another draft model: models\.draft\.vocab_size is 512"),
    ],
)
def test_other_models_are_refused(monkeypatch, role, model, message):
    made, config = engine_config(monkeypatch, **{role: model})
    with pytest.raises(ValueError, match=rf"specopt\.sigmoid\.calibration c\.json was made for {message}"):
        check_models(made, config)


def test_other_weights_are_refused_where_sizes_are_known(monkeypatch):
    made, config = engine_config(monkeypatch, target=Model("m", 512, "digest", 10))
    check_models(made, config)
    with pytest.raises(ValueError, match=r"models\.target\.bytes is 9 .*the engine's is 10"):
        check_models(replace(made, target=Model("m", 512, "digest", 9)), config)


def test_ngram_drafting_needs_no_draft_model(monkeypatch):
    made, config = engine_config(monkeypatch, method="ngram", draft=Model("other", 9, "else", None))
    check_models(made, config)


def random_laws(count: int, vocab_size: int):
    random = np.random.default_rng(3)
    for _ in range(count):
        yield random.dirichlet(np.full(vocab_size, 0.3)), random.dirichlet(np.full(vocab_size, 0.3)), random


def test_the_repaired_rules_law_is_that_of_summing_over_tokens():
    for target, draft, random in random_laws(20, 30):
        cap = np.exp(random.normal(0, 0.7, 30))
        ratio = cap * target / draft
        law, acceptance = np.zeros(30), 0.0
        for token in range(30):
            accepted = min(1.0, ratio[token])
            law[token] += draft[token] * accepted
            acceptance += draft[token] * accepted
            residual = np.maximum(target - np.minimum(draft, cap[token] * target), 0)
            law += draft[token] * (1 - accepted) * residual / residual.sum()
        tv, found = RepairedRule(target, draft).outcome(ratio, cap)
        assert tv == pytest.approx(0.5 * np.abs(law - target).sum(), abs=1e-12)
        assert found == pytest.approx(acceptance, abs=1e-12)


def test_the_rules_are_lossless_with_the_true_normaliser():
    for target, draft, _ in random_laws(5, 200):
        tv, acceptance = RepairedRule(target, draft).outcome(target / draft, np.ones(200))
        assert tv < 1e-12 and acceptance == pytest.approx(np.minimum(target, draft).sum())
        tv, acceptance = plain_rule(target, draft, target, draft)
        assert tv < 1e-12 and acceptance == pytest.approx(np.minimum(target, draft).sum())
        # Estimated too large by any one factor: fewer are accepted, the law stays.
        tv, fewer = RepairedRule(target, draft).outcome(0.6 * target / draft, np.full(200, 0.6))
        assert tv < 1e-12 and fewer < acceptance


def test_blocks_and_their_bytes():
    assert [choose_block_size(v) for v in (1, 64, 512, 4096, 32_000, 151_936)] == [1, 1, 8, 64, 64, 64]
    assert rank_blocks(np.array([0.1, 0.1, 0.0, 0.5, 0.3]), 2).tolist() == [1, 2, 0]
    assert bytes_share("one_hot", 51, 510) == bytes_share("logits", 51, 510) == pytest.approx(0.1)
    assert bytes_share("probs", 17, 510) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/such/folder"], "no/such/folder is no model folder"),
        (["--prompts", "no.jsonl"], "no.jsonl"),
        (["--temperature", "0.7,hot"], "--temperature is '0.7,hot', expected numbers with commas between"),
        (["--temperature", "0"], "--temperature is '0', expected numbers from 0.05 to 5"),
        (["--block-size", "3"], "--block-size is 3, expected a power of two"),
        (["-o", "."], ". is a folder: name a file with -o"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message):
    result = CliRunner().invoke(app, ["calibrate", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr and result.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A calibration of the shipped pair from few prompts: what the command printed, and the file."""
    folder = tmp_path_factory.mktemp("calibrate")
    prompts = (ROOT / "models" / "prompts.jsonl").read_text().splitlines()[:24]
    (folder / "prompts.jsonl").write_text("\n".join(prompts) + "\n")
    command = [sys.executable, "-m", "vllm_specopt.cli.main", "calibrate", "--prompts", str(folder / "prompts.jsonl")]
    command += ["--output-len", "12", "--temperature", "1", "-o", str(folder / "c.json")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, folder / "c.json"


@pytest.mark.engine
def test_the_command_writes_a_calibration_that_is_worth_having(calibrated):
    printed, path = calibrated
    record = json.loads(path.read_text())
    assert calibration.load(str(path)).vocab_size == 512
    assert [record["models"][role]["name"] for role in ("target", "draft")] == ["specopt-target", "specopt-draft"]
    rows = {(row["form"].split()[0], row["estimator"]): row for row in record["validation"]}
    for form in ("certain", "probabilities", "logits"):
        chosen, paper = rows[form, "blocks, 10 % allowed"], rows[form, "paper's constants"]
        assert chosen["bytes_percent"] <= 10
        assert chosen["tv"] < 0.5 * paper["tv"]
        assert abs(chosen["acceptance"] - chosen["exact_acceptance"]) < 0.06
    assert rows["probabilities", "paper's constants"]["tv_over_draft"] == pytest.approx(1, abs=0.01)
    assert "certain (greedy)" in printed and str(path) in printed


@pytest.mark.long
@pytest.mark.engine
def test_engines_serve_with_it_and_refuse_other_models(calibrated, tmp_path):
    """Real V1 engines: greedy output as with exact, acceptance near exact's, other models refused at start-up."""
    _, path = calibrated
    prompts = [json.loads(line)["prompt"] for line in (ROOT / "models" / "prompts.jsonl").read_text().splitlines()]
    calibrated_option = {"method": "sigmoid", "sigmoid": {"calibration": str(path)}}
    engines = []
    for name, option in (("exact", "exact"), ("calibrated", calibrated_option)):
        batches = [
            {
                "name": batch,
                "prompts": prompts[24:40],
                "sampling": [
                    {"temperature": temperature, "seed": i, "max_tokens": 32, "ignore_eos": True} for i in range(16)
                ],
            }
            for batch, temperature in (("greedy", 0.0), ("sampled", 1.0))
        ]
        llm = {
            "model": str(ROOT / "models" / "specopt-target"),
            "speculative_config": SPECULATIVE,
            "additional_config": {"specopt": option},
            "dtype": small_model_dtype(),
            "enforce_eager": True,
            "distributed_executor_backend": "uni",
            "max_model_len": 256,
            "max_num_seqs": 16,
        }
        engines.append({"name": name, "llm": llm, "batches": batches})
    results, logs = START(engines, tmp_path, "V1")
    tokens = {name: {b: results[name]["batches"][b]["token_ids"] for b in ("greedy", "sampled")} for name in results}
    assert tokens["calibrated"]["greedy"] == tokens["exact"]["greedy"]
    assert tokens["calibrated"]["sampled"] != tokens["exact"]["sampled"]
    assert "specopt: active: runner=V1 method=sigmoid" in logs["calibrated"]
    assert "estimated normalisers" in logs["calibrated"] and "becomes the draft model's" not in logs["calibrated"]

    record = json.loads(path.read_text())
    record["models"]["target"]["digest"] = "0"
    (tmp_path / "other.json").write_text(json.dumps(record))
    option = {"method": "sigmoid", "sigmoid": {"calibration": str(tmp_path / "other.json")}}
    code = "import json, sys; from vllm.engine.arg_utils import EngineArgs; from vllm.plugins import *\n"
    code += "load_general_plugins(); EngineArgs(**json.loads(sys.argv[1])).create_engine_config()"
    arguments = json.dumps(engines[1]["llm"] | {"additional_config": {"specopt": option}})
    ran = subprocess.run([sys.executable, "-c", code, arguments], capture_output=True, text=True, timeout=120)
    assert ran.returncode != 0
    assert f"calibration {tmp_path}/other.json was made for another target model: models.target.digest" in ran.stderr
