"""The first GPU run: its plan, what it refuses in one sentence, what it brings back, and a whole rehearsal."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
from pathlib import Path

import pytest
from first_run import __main__ as driver
from first_run import engines, host, modelled, ncu, places, plan, seeds, summary, sweep

from vllm_specopt.benchmarks.kernels import grid
from vllm_specopt.kernels import shapes
from vllm_specopt.kernels.shapes import DEFAULTS

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts" / "gpu"


@pytest.fixture
def folders(monkeypatch, tmp_path):
    """Results and files of this test alone."""
    results, out = tmp_path / "results", tmp_path / "out"
    results.mkdir()
    out.mkdir()
    for module in (places, plan, driver, engines, ncu, summary, sweep):
        for name, folder in (("RESULTS", results), ("OUT", out), ("LOG", results / "run.log")):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, folder)
    return results, out


def test_the_steps_fit_into_one_call_and_bring_back_few_files():
    steps = plan.steps()
    assert [step.name for step in steps] == [
        "info", "tests", "drafters", "grid", "modelled", "flat", "audit", "sharded", "races", "engines", "ncu", "seeds",
        "sweep",
    ]  # fmt: skip
    usual = sum(step.seconds for step in steps if step.name in plan.usual())
    assert plan.usual() == {step.name for step in steps} - plan.ASKED
    assert plan.UNPACK.seconds + usual + plan.SPARE <= plan.TOTAL <= 570
    assert len(plan.FILES) <= 8
    assert not plan.missing_tests()
    assert min(step.seconds for step in steps) >= driver.GRACE + driver.LEAST
    page = (SCRIPTS / "README.md").read_text()
    for step in [plan.UNPACK, *steps]:
        assert f"| {step.name} | {step.seconds} |" in page
    for step in steps:
        module = step.command[2]
        assert module in ("pytest", "vllm_specopt.cli.main") or importlib.util.find_spec(module), module


def test_the_grid_begins_with_what_says_most():
    cases = grid.suite("gpu")
    first = cases[:15]
    assert {case.vocab for case in first} == {151936}
    assert [(case.batch, case.num_drafts) for case in first[:3]] == [(64, 7), (256, 3), (1, 3)]
    assert [(case.temperature, case.draft, case.filters) for case in first[::3]] == [
        (0.7, "one-hot", "none"),
        (1.0, "one-hot", "none"),
        (0.7, "logits", "none"),
        (0.7, "one-hot", "topp0.9"),
        (0.7, "one-hot", "topk50+topp0.9"),
    ]
    assert len(cases) == len(set(cases))


@pytest.mark.parametrize(
    ("python", "versions", "message"),
    [
        ((3, 11), {}, "Python 3.11, the bundle is for 3.12"),
        ((3, 12), {"torch": "2.14.0", "triton": "3.6.0"}, r"torch 2.14.0 \(2.11.x wanted\)"),
        ((3, 12), {"torch": "2.11.0"}, r"triton missing \(3.6.x wanted\)"),
        ((3, 12), {"torch": "2.11.0+cu130", "triton": "3.6.0"}, None),
    ],
)
def test_another_host_is_one_sentence(python, versions, message):
    found = host.wrong_versions(python, lambda name: versions.get(name, ""))
    assert (found is None) == (message is None)
    if message:
        assert re.search(message, found) and found.count("\n") == 0


def call(tmp_path, **variables) -> subprocess.CompletedProcess:
    """The one command, with its files below a folder."""
    environ = os.environ | {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(ROOT),
        "OUT": str(tmp_path / "out"),
        "SPECOPT_BUNDLE": str(tmp_path / "bundle"),
        "SPECOPT_UNPACKED": str(tmp_path / "unpacked"),
        **variables,
    }
    command = ["bash", str(SCRIPTS / "first_run.sh")]
    return subprocess.run(command, env=environ, capture_output=True, text=True)


def test_a_missing_piece_no_gpu_and_an_unknown_step_end_the_call_at_once(tmp_path):
    done = call(tmp_path)
    assert done.returncode == 2 and "lacks python.tar.xz and native.tar.xz: make the bundle" in done.stderr
    (tmp_path / "bundle").mkdir()
    for piece in host.PIECES:
        (tmp_path / "bundle" / piece).touch()
    asked = [call(tmp_path, SPECOPT_ANY_HOST="1", CUDA_VISIBLE_DEVICES=""), call(tmp_path, ONLY="grid bench")]
    assert "PyTorch sees no GPU here" in asked[0].stderr
    assert "ONLY names bench, expected info tests drafters grid" in asked[1].stderr
    for done in asked:
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and not (tmp_path / "out").exists()


def test_bundle_refuses_bad_input_in_one_sentence(tmp_path):
    make = ["bash", str(SCRIPTS / "make_bundle.sh")]
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("bash", "dirname", "python3"):
        (tools / name).symlink_to(shutil.which(name))
    for arguments, path, message in (
        ([tmp_path / "out"], tools, "unzip is not here: install it."),
        ([tmp_path / "out", tmp_path / "no.whl"], os.environ["PATH"], "no.whl is no file"),
        ([], os.environ["PATH"], "usage: make_bundle.sh"),
    ):
        environ = os.environ | {"PATH": str(path), "PYTHON": sys.executable}
        done = subprocess.run([*make, *map(str, arguments)], env=environ, capture_output=True, text=True)
        assert done.returncode and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    script = (SCRIPTS / "make_bundle.sh").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ((name, value),) = project["entry-points"]["vllm.general_plugins"].items()
    assert f"[vllm.general_plugins]\\n{name} = {value}\\n" in script and f"Name: {project['name']}" in script


def test_a_step_that_hangs_is_stopped_and_what_it_left_comes_back(folders):
    results, out = folders
    hangs = plan.Step("grid", 12, ("bash", "-c", f"echo a,b > {results}/kernel_bench.csv; sleep 60"))
    began = time.monotonic()
    assert driver.run(hangs, dict(os.environ), began + 100) == "stopped at its limit"
    assert 7 < time.monotonic() - began < 30
    assert (out / "kernel_bench.csv").read_text() == "a,b\n"
    fails = plan.Step("tests", 12, ("bash", "-c", "echo seen in the log; exit 3"))
    assert driver.run(fails, dict(os.environ), time.monotonic() + 100) == "failed with status 3"
    late = plan.Step("races", 12, ("true",))
    assert driver.run(late, dict(os.environ), time.monotonic()) == "left out, no time left"
    beside = (("bash", "-c", f"sleep 1; touch {results}/beside"), ("sleep", "60"))
    both = plan.Step("info", 12, ("true",), beside)
    began = time.monotonic()
    assert driver.run(both, dict(os.environ), began + 100) == driver.WELL
    assert (results / "beside").exists() and time.monotonic() - began < 20
    record = json.loads((out / "run.json").read_text())
    assert [step["step"] for step in record["steps"]] == ["grid", "tests", "races", "info"]
    with tarfile.open(out / "logs.tar.gz") as archive:
        assert b"seen in the log" in archive.extractfile("run.log").read()


def test_a_shape_replaces_another_only_if_it_is_faster_on_all_that_was_timed():
    a, b = "case a", "case b"
    assert sweep.better({1024: {a: 10.0, b: 20.0}, 512: {a: 9.0, b: 20.0}}, 1024) == 512
    assert sweep.better({1024: {a: 10.0, b: 20.0}, 512: {a: 9.95, b: 20.0}}, 1024) == 1024
    assert sweep.better({1024: {a: 10.0, b: 20.0}, 512: {a: 1.0}}, 1024) == 1024
    assert sweep.better({1024: {}, 512: {}}, 1024) == 1024
    for parameter in sweep.PARAMETERS:
        assert getattr(DEFAULTS, parameter.name) in parameter.values
        low, high = shapes.LIMITS[parameter.name]
        assert all(low <= value <= high for value in parameter.values)


def test_modelled_times_stand_beside_measured_ones():
    counts = json.loads(modelled.COUNTS[-1].read_text())
    cases = grid.suite("gpu")
    rows = [
        {"case": case.name, "implementation": who, "time_us": "150.0" if case.batch > 1 else ""}
        for case in cases
        for who in ("ours", "stock-v2")
    ]
    found = modelled.compare(counts, rows, modelled.card_of("NVIDIA H200"))
    assert len(found) >= 6 and all(0 < each["low"] <= each["high"] for each in found)
    # Behind a greedy rejection vLLM reads nothing, so that it may stay below what all rows cost.
    assert all(0 < each["floor"] < each["low"] for each in found if "-t0-" not in each["case"])
    assert modelled.compare(counts, rows, modelled.card_of("Another card")) == []


def test_texts_are_compared_and_noise_is_the_second_generation():
    def result(run, tokens, seconds=2.0):
        work = {
            "T = 0": {"token_ids": tokens, "seconds": seconds},
            "T = 0 again": {"token_ids": tokens, "seconds": 1.6},
        }
        return {"name": run.name, "workloads": work}

    ours, stock, plain = engines.Run("exact", "greedy"), engines.Run("stock", "greedy"), engines.Run("exact", "no")
    found = [
        result(ours, [[1, 2, 3, 4], [5, 6]]),
        result(plain, [[1, 2, 3, 4], [5, 6]]),
        result(stock, [[1, 2, 9, 4], [5, 6]]),
    ]
    assert [(each["who"], each["identical"], each["shared_prefix"]) for each in engines.texts(found)] == [
        ("ours and stock", 1, 0.75),
        ("ours and plain", 2, 1.0),
    ]
    kept = engines.public(found[0])
    assert kept["workloads"] == {"T = 0": {"seconds": 1.8, "every": [2.0, 1.6], "noise": 1.25}}
    assert engines.texts(found[:1]) == []


def test_engines_ask_for_graphs_and_only_warn_of_compilation():
    asked = engines.request(engines.Run("exact", "greedy"), Path("pair"), ["a"] * 99)["llm"]
    assert asked["compilation_config"]["cudagraph_mode"] == "FULL_DECODE_ONLY" and "enforce_eager" not in asked
    assert asked["speculative_config"]["num_speculative_tokens"] == 3 and "jit_monitor_mode" not in asked
    plain = engines.request(engines.Run("exact", "no"), Path("pair"), ["a"] * 99)["llm"]
    assert len(set(engines.enough([f"prompt {n:03}" + "." * 90 for n in range(96)], 128))) == 128 == engines.REQUESTS
    assert "speculative_config" not in plain and plain["additional_config"] == {"specopt": {"method": "exact"}}


def test_seeds_compare_an_engine_with_drafts_to_one_without():
    asked = seeds.request(engines.Run("exact", "greedy", kind="float32"), Path("pair"), ["a" * 99] * 96)
    assert asked["llm"]["dtype"] == "float32" and asked["llm"]["gpu_memory_utilization"] == 0.1
    assert list(asked["workloads"]) == list(engines.WORKLOADS) and not asked["profiled"]
    for run in engines.Run("exact", "greedy"), engines.Run("block", "probabilistic", number=7):
        assert len(engines.workloads(run)) == engines.TIMES * len(engines.WORKLOADS)
        assert run.requests * (run.number + 1) == engines.REQUESTS * 4
    invariant = engines.Run("exact", "no", kind="invariant")
    assert engines.environment(invariant)["VLLM_BATCH_INVARIANT"] == "1" and invariant.name.endswith("invariant")
    work = {"token_ids": [[1, 2, 3, 4], [5, 6]], "accepted_tokens": 2, "draft_tokens": 4}
    plain = {"workloads": {"T = 1": work | {"token_ids": [[1, 2, 9, 4], [5, 6]]}}}
    text = seeds.told({"workloads": {"T = 1": work}}, plain, "exact", "float32")["texts"]["T = 1"]
    assert text == {"identical": 1, "completions": 2, "shared_prefix": 0.75, "draft_tokens_accepted": 0.5}
    assert seeds.told({"problem": "it fell over"}, plain, "exact", "float32")["problems"] == ["it fell over"]


def test_the_profiler_takes_the_slowest_kernel():
    times = {"one-hot": {"statistics_kernel": 60.0, "decide_kernel": 5.0}, "top-p": {"decide_kernel": 70.5}}
    assert ncu.slowest(times) == ("top-p", "decide_kernel")
    assert ncu.slowest({}) == ("one-hot", "statistics_kernel")


def test_the_summary_has_60_lines_at_most(folders):
    results, _ = folders
    with (results / "kernel_bench.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ("case", "implementation", "time_us", "percent_of_copy", "note"), restval="")
        writer.writeheader()
        for case in grid.suite("gpu"):
            writer.writerow({"case": case.name, "implementation": "ours", "time_us": 58.2, "percent_of_copy": 91.0})
            writer.writerow({"case": case.name, "implementation": "stock-v2", "note": "not measured: it failed"})
    (results / "run.log").write_text("FAILED tests/a.py::b\n" * 90 + "= 90 failed, 3 passed in 12.34s =\n")
    runs = [{"name": f"engine {n}", "workloads": {}, "problem": "status 1\n" * 50} for n in range(8)]
    kernels = [{"name": "decide_kernel", "us": 2000.0}, {"name": "ampere_gemm", "us": 3000.0}]
    runs.append({"name": "engine 8", "workloads": {}, "gpu_kernels": {"T = 1": {"kernels": kernels}}})
    places.save("engines", {"runs": runs, "texts": []})
    places.save("modelled", [{"case": grid.suite("gpu")[0].name, "implementation": "ours", "low": 56.0, "high": 60.0}])
    places.save("steps", [{"step": f"step {n}", "status": "ended well", "seconds": 1.0} for n in range(9)])
    lines = summary.text().splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= summary.WIDTH
    shown = "\n".join(lines)
    for said in (
        "90 failed, 3 passed",
        "ours 58 (91%) [56-60]",
        "STOCK V2: not measured",
        "engine 8",
        "sampling 2.0 of 5.0 ms",
    ):
        assert said in shown, said


@pytest.mark.long
def test_a_rehearsal_brings_back_the_same_files(tmp_path):
    done = call(tmp_path, SPECOPT_REHEARSE="1")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == set(plan.FILES)
    assert len(done.stdout.split("A rehearsal:")[1].splitlines()) <= 60
    record = json.loads((out / "run.json").read_text())
    assert record["rehearsal"] and {step["status"] for step in record["steps"]} == {"ended well"}
    assert set(record["races"]) == {"one-hot"}
    assert all(each["differed"] == 0 and each["launches"] > 0 for each in record["races"].values())
    assert shapes.read(out / "launch_table.json", "cpu")
    found = json.loads((out / "engines.json").read_text())
    assert [run["status"] for run in found["runs"]] == [0, 0, 0]
    assert all(each["identical"] == each["completions"] for each in found["texts"]) and len(found["texts"]) == 3
    assert all("token_ids" not in work for run in found["runs"] for work in run["workloads"].values())
    assert next(csv.DictReader((out / "kernel_bench.csv").open()))["time_us"]
