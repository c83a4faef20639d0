"""Child processes are stopped whatever happens, and what a trace of vLLM's profiler says."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

import vllm_specopt
from vllm_specopt.benchmarks.errors import CliError
from vllm_specopt.benchmarks.processes import ChildProcess, Server, free_port
from vllm_specopt.benchmarks.serve import scopes
from vllm_specopt.cli.main import app
from vllm_specopt.integration import reasons

IGNORES_SIGTERM = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
LEAVES_A_CHILD = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {IGNORES_SIGTERM!r}]); "


def test_scopes_share(tmp_path: Path) -> None:
    def event(name: str, dur: float) -> dict:
        return {"ph": "X", "name": name, "dur": dur}

    trace = tmp_path / "T0_rank0.1.pt.trace.json"
    parts = [("gpu_model_runner: forward", 600), ("gpu_model_runner: sample", 100), ("aten::mm", 500)]
    trace.write_text(json.dumps({"traceEvents": [event(*part) for part in parts * 2] + [{"ph": "M", "name": 3}]}))
    found = scopes.summarise([trace])
    assert found["steps"] == 2
    assert found["sampling_share"] == pytest.approx(1 / 7)
    # One step that the machine interrupts says nothing of the others.
    slow = [("gpu_model_runner: forward", 600), ("gpu_model_runner: sample", 77_000)]
    trace.write_text(json.dumps({"traceEvents": [event(*part) for part in parts * 7 + slow]}))
    found = scopes.summarise([trace])
    assert found["steps"] == 8 and found["milliseconds"] == {"forward": 4.8, "sample": 0.8}
    assert found["sampling_share"] == pytest.approx(1 / 7)
    trace.write_text(json.dumps({"traceEvents": [event("aten::mm", 5)]}))
    assert scopes.summarise([trace]) is None
    assert scopes.summarise([]) is None


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.output.strip()) == (0, f"vllm-specopt {vllm_specopt.__version__}")


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


def test_server_that_dies_says_why(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    expected = pytest.raises(CliError, match=r"ended with status 3 (?s:.)*no such model")
    with expected, Server(command, tmp_path / "log", {}, free_port()) as server:
        server.wait_ready(lambda: None)
    assert group_is_gone(server.process.pid)


FROM_VLLM = """\
(EngineCore pid=12) ERROR 11-27 08:22:12 [core.py:1105] OSError: Can't load the configuration of 'a/b'. If you were
(EngineCore pid=12) ERROR 11-27 08:22:12 [core.py:1105] trying to load it from the hub, make sure of its name.
(EngineCore pid=12) Process EngineCore:
(APIServer pid=11) Traceback (most recent call last):
(APIServer pid=11)     raise RuntimeError(
(APIServer pid=11) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
FROM_PYDANTIC = """\
pydantic_core._pydantic_core.ValidationError: 1 validation error for SpeculativeConfig
  Value error, prompt_lookup_min=5 must be <= prompt_lookup_max=3 [type=value_error, input_value=ArgsKwargs({}), \
input_type=ArgsKwargs]
    For further information visit https://errors.pydantic.dev/2.13/v/value_error
"""


@pytest.mark.parametrize(
    ("log", "why"),
    [
        (FROM_VLLM, "OSError: Can't load the configuration of 'a/b'. If you were"),
        (f"(APIServer pid=9) {FROM_PYDANTIC}", "prompt_lookup_min=5 must be <= prompt_lookup_max=3"),
        ("usage: vllm [-h]\nvllm: error: unrecognized arguments: --x\n", "vllm: error: unrecognized arguments: --x"),
        ("INFO 11-27 08:22:12 [a.py:1] fine\n(EngineCore pid=3) Killed\n\n", "Killed"),
        ("", "its log is empty"),
    ],
)
def test_the_line_of_a_log_that_says_why(log: str, why: str) -> None:
    assert reasons.of_log(log) == why


def test_the_line_of_an_error_that_says_why() -> None:
    assert reasons.of_error(FROM_PYDANTIC.partition(": ")[2]) == "prompt_lookup_min=5 must be <= prompt_lookup_max=3"
    field = (
        "1 validation error for ModelConfig\nseed\n  Input should be a valid integer [type=int_type, input_value=1]\n"
    )
    assert reasons.of_error(field) == "seed: Input should be a valid integer"
    assert (
        reasons.of_error("a/b is not a local folder.\nIf this is a private one, log in.")
        == "a/b is not a local folder."
    )


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
