"""`specopt demo`: its table, page and exit status from a record, its input errors, and that it leaves no process."""

from __future__ import annotations

import copy
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

import vllm_specopt
from vllm_specopt.benchmarks.processes import ChildProcess, Server, free_port
from vllm_specopt.benchmarks.serve import scopes
from vllm_specopt.benchmarks.serve.stats import compare_completions
from vllm_specopt.cli import report
from vllm_specopt.cli.demo import WORKLOADS, Arm, Settings, read_prompts
from vllm_specopt.cli.errors import CliError
from vllm_specopt.cli.main import app

IGNORES_SIGTERM = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
LEAVES_A_CHILD = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {IGNORES_SIGTERM!r}]); "


def sample_run(speed: float) -> dict:
    bench = {
        "request_throughput": speed,
        "output_throughput": 64 * speed,
        "median_ttft_ms": 101.4,
        "p99_ttft_ms": 180.2,
        "median_tpot_ms": 36.77,
        "p99_tpot_ms": 41.05,
        "spec_decode_acceptance_length": 2.345,
    }
    return {"command": ["vllm", "bench", "serve"], "bench": bench, "scopes": {"steps": 16, "sampling_share": 0.0429}}


@pytest.fixture
def record() -> dict:
    arms = {
        name: {
            "command": ["vllm", "serve", "target", "--speculative-config", '{"model": "draft"}'],
            "env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
            "worker_line": line,
            "texts": {name: [[1, 2, 3], [4, 5]] for name in WORKLOADS},
            "runs": {name: sample_run(speed) for name in WORKLOADS if speed},
        }
        for name, line, speed in (
            ("stock", None, 6.5), ("exact", "specopt: active (v1, cpu)", 7.25), ("plain", "specopt: active", None)
        )
    }  # fmt: skip
    return {
        "time": "2026-01-02T03:04:05+00:00",
        "git": {"commit": "abc123", "dirty": True},
        "machine": {"device": "cpu", "name": "Some CPU", "cores": 2, "system": "Linux", "load": 1.9},
        "versions": {"vllm": "0.32.0+cpu", "torch": "2.13.0+cpu"},
        "config": {"pair": "t + d", "workloads": WORKLOADS, "num_prompts": 96, "output_len": 64, "concurrency": 8},
        "arms": arms,
        "texts": report.compare_texts(arms),
    }


def printed(record: dict) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(report.table(record))
    return console.file.getvalue()


def test_table_has_one_row_per_arm_and_workload(record: dict) -> None:
    text = printed(record)
    assert text.count("stock, repaired") == text.count("exact") == 3
    for cell in ("416", "464", "101 / 180", "36.8 / 41.0", "2.35", "4.3 %", "0.32.0+cpu"):
        assert cell in text, cell


def test_stock_is_the_repaired_one_on_a_cpu_only(record: dict) -> None:
    assert report.notes(record)[0].startswith("Stock, repaired:")
    record["machine"]["device"] = "cuda"
    assert {row[1] for row in report.rows(record)} == {"stock", "exact"}
    assert not any("repaired" in note for note in report.notes(record))


def test_a_sentence_says_what_each_workload_gained(record: dict) -> None:
    record["arms"]["stock"]["runs"]["T = 1"]["scopes"]["sampling_share"] = 0.41
    said = report.sentences(record)
    assert said[1] == (
        "T = 1: 1.12 times the tokens per second (464, not 416); sampling went from 41 % to 4.3 % of a step."
    )
    record["arms"]["exact"]["runs"]["T = 1"]["scopes"] = None
    assert report.sentences(record)[1].endswith("(464, not 416).")


def test_the_picture_is_drawn_with_and_without_shares(record: dict, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from vllm_specopt.cli.demo_plot import draw

    draw(record, tmp_path / "with.png")
    for run in record["arms"]["exact"]["runs"].values():
        run["scopes"] = None
    draw(record, tmp_path / "without.png")
    assert (tmp_path / "with.png").read_bytes() != (tmp_path / "without.png").read_bytes()


def test_a_busy_machine_is_noted(record: dict) -> None:
    assert not any("busy" in note for note in report.notes(record))
    record["machine"]["load"] = 13.4
    assert any("load 13.4 on 2 cores" in note for note in report.notes(record))


def test_unmeasured_cells_say_so(record: dict) -> None:
    for arm in record["arms"].values():
        for run in arm["runs"].values():
            run["scopes"] = None
            del run["bench"]["spec_decode_acceptance_length"]
    assert all(row[-2].startswith("not reported") and row[-1] == "not measured" for row in report.rows(record))
    assert not any("profiler" in note for note in report.notes(record))


def test_markdown_holds_table_notes_outcome_conditions_and_commands(record: dict) -> None:
    page = report.markdown(json.loads(json.dumps(record)))
    assert page.splitlines()[4].count("|") == page.splitlines()[5].count("|") == len(report.HEADINGS) + 1
    expected = ("abc123 with changes", "| torch | 2.13.0+cpu |", "2 of 2 greedy texts equal stock's")
    expected += ("2 of 2 seeded texts equal those", "specopt: active (v1, cpu)", "VLLM_CPU_KVCACHE_SPACE=1")
    for text in (*expected, "    vllm serve target"):
        assert text in page, text


@pytest.mark.parametrize(
    ("exact", "difference"),
    [
        ([[1, 2, 9], [4, 5]], {"prompt": 0, "position": 2, "other": 3, "exact": 9}),
        ([[1, 2, 3], [4]], {"prompt": 1, "position": 1, "other": 5, "exact": None}),
        ([[1, 2, 3]], {"prompt": 1, "position": 0, "other": 4, "exact": None}),
    ],
)
def test_a_difference_is_shown_and_fails(record: dict, exact: list, difference: dict) -> None:
    record["arms"]["exact"]["texts"]["T = 0"] = exact
    record["texts"] = report.compare_texts(record["arms"])
    assert record["texts"]["T = 0"]["first_difference"] == difference
    assert report.exit_code(record) == 1
    assert f"position {difference['position']}: token {difference['other']} there" in "\n".join(report.verdict(record))


def test_exit_code_needs_identity_and_at_least_one_completion(record: dict) -> None:
    assert report.exit_code(record) == 0
    empty = copy.deepcopy(record)
    empty["texts"]["T = 0"] = compare_completions([], [])
    assert report.exit_code(empty) == 1


def test_scopes_share(tmp_path: Path) -> None:
    def event(name: str, dur: float) -> dict:
        return {"ph": "X", "name": name, "dur": dur}

    trace = tmp_path / "T0_rank0.1.pt.trace.json"
    parts = [("gpu_model_runner: forward", 600), ("gpu_model_runner: sample", 100), ("aten::mm", 500)]
    trace.write_text(json.dumps({"traceEvents": [event(*part) for part in parts * 2] + [{"ph": "M", "name": 3}]}))
    found = scopes.summarise([trace])
    assert found["steps"] == 2
    assert found["sampling_share"] == pytest.approx(1 / 7)
    trace.write_text(json.dumps({"traceEvents": [event("aten::mm", 5)]}))
    assert scopes.summarise([trace]) is None
    assert scopes.summarise([]) is None


def settings(tmp_path: Path) -> Settings:
    return Settings(
        target=tmp_path, draft=tmp_path, extends=False, prompt_file=tmp_path, prompts=["a"], num_prompts=1,
        output_len=8,
        concurrency=1, port=1, vllm="vllm", on_cpu=True, reports=tmp_path,
    )  # fmt: skip


def test_arms_differ_by_our_option_and_the_repair_only(tmp_path: Path) -> None:
    names = ("stock", "exact", "plain")
    stock, exact, plain = (Arm(name, settings(tmp_path), tmp_path).command for name in names)
    assert stock[:3] == [sys.executable, "-m", "vllm_specopt.benchmarks.serve.repaired"] and exact[0] == "vllm"
    assert exact[1:-2] == [part.replace("/stock", "/exact") for part in stock[3:]]
    assert exact[-2:] == ["--additional-config", '{"specopt": {"method": "exact"}}']
    at = exact.index("--speculative-config")
    assert plain == [part.replace("/exact", "/plain") for part in exact[:at] + exact[at + 2 :]]


def test_worker_line_is_required_of_exact_and_refused_of_stock(tmp_path: Path) -> None:
    log = tmp_path / "log"
    stock, exact = (Arm(name, settings(tmp_path), tmp_path) for name in ("stock", "exact"))
    log.write_text("INFO starting\n(Worker pid=3) INFO [plugin.py:9] specopt: active (v1, exact)\n")
    assert exact.worker_line(log) == "specopt: active (v1, exact)"
    with pytest.raises(CliError, match="stock arm is not stock"):
        stock.worker_line(log)
    log.write_text("INFO specopt: not active: unknown vLLM\n")
    assert stock.worker_line(log) is None
    with pytest.raises(CliError, match="not active: unknown vLLM"):
        exact.worker_line(log)
    log.write_text("INFO starting\n")
    with pytest.raises(CliError, match="the exact arm is not active"):
        exact.worker_line(log)


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output.strip()) == (0, f"vllm-specopt {vllm_specopt.__version__}")


def test_bad_input_is_one_sentence_and_status_2(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--target", str(tmp_path / "nowhere")])
    assert result.exit_code == 2
    assert result.output.count("\n") == 1
    assert "name the target model with --target" in result.output


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), ("", "holds no prompts"), ("[1]\n", "one JSON object"), ("{", "one JSON object")],
)
def test_bad_prompt_files(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(CliError, match=message) as raised:
        read_prompts(path)
    assert raised.value.exit_code == 2


def test_port_in_use() -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(CliError, match="cannot be used") as raised:
            free_port(taken.getsockname()[1])
    assert raised.value.exit_code == 2
    assert 20000 <= free_port() < 32768


def group_is_gone(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True
    return False


def test_server_that_dies_shows_its_last_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    expected = pytest.raises(CliError, match=r"ended with status 3 (?s:.)*no such model")
    with expected, Server(command, tmp_path / "log", {}, free_port()) as server:
        server.wait_ready(lambda: None)
    assert group_is_gone(server.process.pid)


def test_stop_reaches_what_the_server_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_specopt.benchmarks.processes.STOP_SECONDS", 1.0)
    command = [sys.executable, "-c", LEAVES_A_CHILD + "print('ready', flush=True); time.sleep(600)"]
    with pytest.raises(ZeroDivisionError), ChildProcess(command, tmp_path / "log", {}) as child:
        while "ready" not in child.last_lines():
            time.sleep(0.05)
        raise ZeroDivisionError
    assert child.process.returncode == -signal.SIGTERM
    deadline = time.monotonic() + 5
    while not group_is_gone(child.process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert group_is_gone(child.process.pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_server(tmp_path: Path, number: signal.Signals) -> None:
    script = """
import sys
from pathlib import Path
from vllm_specopt.benchmarks.processes import stopped_by_signals
from vllm_specopt.benchmarks.processes import ChildProcess
command = [sys.executable, "-c", "import time; time.sleep(600)"]
with stopped_by_signals(), ChildProcess(command, Path(sys.argv[1]), {}) as child:
    print(child.process.pid, flush=True)
    child.wait(lambda: None)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as demo:
        group = int(demo.stdout.readline())
        demo.send_signal(number)
        assert demo.wait(30) != 0
    assert group_is_gone(group)
