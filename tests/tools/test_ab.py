"""`specopt ab`: input, resuming, and small runs with real servers."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
from support.ab_records import PROMPTS, make_cell

from vllm_specopt.benchmarks.errors import CliError
from vllm_specopt.benchmarks.processes import Server, free_port
from vllm_specopt.benchmarks.serve import command, servers, settings
from vllm_specopt.benchmarks.serve.arms import Arm
from vllm_specopt.benchmarks.serve.plan import changed_setting
from vllm_specopt.benchmarks.serve.workloads import workload

MODELS = Path(__file__).parents[2] / "models"
INPUT = {"concurrency": "1", "temperature": "0", "num_prompts": 4, "output_len": 8, "repeats": 2, "timeout": 60.0}
RUN = [sys.executable, "-m", "vllm_specopt.cli.main", "ab", "--concurrency", "2", "--num-prompts", "4",
       "--output-len", "8", "--repeats", "1", "--temperature", "1"]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"target": "/no/such/folder", "draft": "x/y"}, "/no/such/folder is no model folder"),
        ({"target": str(MODELS / "specopt-target"), "draft": "./none"}, "none is no model folder"),
        ({"target": str(MODELS / "specopt-target")}, "needs a --draft or a --speculative-config"),
        ({"target": "no/such-model", "draft": "x/y"}, "the target model no/such-model is no folder and was not down"),
        ({"draft": "no/such-model"}, "the draft model no/such-model is no folder and was not downloaded before"),
        ({"draft": "127.0.0.1:8000"}, "127.0.0.1:8000 is no model folder"),
        ({"speculative_config": '{"model": "/nope"}'}, "/nope is no model folder"),
        ({"speculative_config": '{"model": "no/such-model", "method": "eagle3"}'}, "no/such-model is no folder and"),
        ({"speculative_config": "{"}, "--speculative-config is not JSON"),
        ({"speculative_config": "[]"}, "expected a JSON object"),
        ({"speculative_config": "{}", "draft": "x"}, "give one of them"),
        ({"arms": ["stck"]}, "there is no arm 'stck'"),
        ({"arms": ["mine={"]}, "the option of arm 'mine' is not JSON"),
        ({"arms": ['mine={"method": "exakt"}']}, "specopt.method is 'exakt'"),
        ({"arms": ['mine={"metod": "exact"}']}, "unknown key 'metod'"),
        ({"arms": ["mine=null"]}, "specopt is null"),
        ({"arms": ['stock={"method": "exact"}']}, "needs a name other than 'stock'"),
        ({"spec": "sonnet"}, "there is no workload 'sonnet'"),
        ({"spec": "none.jsonl"}, "none.jsonl does not exist"),
        ({"spec": "speed-bench:/no/such"}, "is no folder"),
        ({"concurrency": "1,x"}, "--concurrency is '1,x'"),
        ({"concurrency": "0"}, "at least 1"),
        ({"temperature": "-1"}, "at least 0"),
        ({"temperature": "nan"}, "at least 0"),
        ({"temperature": "1:0"}, "at least 0.01"),
        ({"temperature": "1:2"}, "from 0.01 to 1"),
        ({"minutes": 5.0}, "--minutes chooses the number of requests and --num-prompts sets it"),
        ({"offline": True, "port": 8000}, "--offline starts no server"),
        ({"offline": True, "ray": True}, "leave them out with --ray"),
        ({"vocab_size": 100}, "--vocab-size is 100, less than the models' own 512"),
        ({"vocab_size": 1000, "speculative_config": '{"model": "a/b"}'}, "needs the folder of the target, and of the"),
        ({"stock_url": "http://127.0.0.1:9"}, "go together"),
        ({"stock_url": "http://127.0.0.1:9", "specopt_url": "http://127.0.0.1:9"}, "no vLLM server answers"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_starts(tmp_path, changed, sentence):
    with pytest.raises(CliError, match=re.escape(sentence)) as caught:
        settings.checked(**(INPUT | {"out": tmp_path / "out"} | changed))
    assert caught.value.exit_code == 2
    assert not (tmp_path / "out").exists()


def test_prompt_files_without_prompts_are_refused(tmp_path):
    for name, content, sentence in (
        ("empty.jsonl", "\n", "holds no prompts"),
        ("other.jsonl", '{"text": "a"}\n', 'with "prompt" per line'),
        ("broken.jsonl", "{", 'with "prompt" per line'),
    ):
        path = tmp_path / name
        path.write_text(content)
        with pytest.raises(CliError, match=sentence):
            settings.checked(**(INPUT | {"out": tmp_path, "spec": str(path)}))
    share = tmp_path / "share.json"
    share.write_text(json.dumps([{"conversations": [{"value": "a"}, {"value": "b"}]}]))
    assert workload(f"sharegpt:{share}", 8, PROMPTS, 512, 0).prompts == ("a",)
    turns = tmp_path / "question.jsonl"
    turns.write_text('{"turns": ["first", "second"]}\n')
    assert workload(f"spec-bench:{turns}", 8, PROMPTS, 512, 0).prompts == ("first",)
    drawn = workload("random", 8, PROMPTS, 512, 3)
    assert drawn.prompts == workload("random", 8, PROMPTS, 512, 3).prompts
    assert max(max(ids) for ids in drawn.prompts) < 512 and "understate" in drawn.caveat


def test_the_arm_sigmoid_has_the_papers_constants():
    assert Arm.named("sigmoid", True).option == {"method": "sigmoid", "sigmoid": "paper"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--ray", "--port", "9000"], "--ray starts its own servers: leave --stock-url, --specopt-url and --port out."),
        (["--ray", "--ray-address", "127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1: start one"),
    ],
)
def test_bad_input_with_ray_is_one_sentence(tmp_path, arguments, sentence):
    done = subprocess.run([*RUN, *arguments, "-o", str(tmp_path / "ab")], capture_output=True, text=True)
    if not importlib.util.find_spec("ray"):
        sentence = sentence if "--port" in arguments else "Ray is not installed beside"
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"specopt ab: {sentence}" in done.stderr


def test_a_port_in_use_is_refused(tmp_path):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(CliError, match="cannot be used"):
            settings.checked(**(INPUT | {"out": tmp_path, "port": taken.getsockname()[1]}))


def test_a_record_is_continued_under_the_same_settings_only(tmp_path):
    def asked(**changed):
        return settings.checked(**(INPUT | {"out": tmp_path} | changed))

    record, resumed = command.begin(asked(), [])
    assert not resumed
    record["cells"]["stock|T = 0|c1|r0"] = make_cell(1)
    record["arms"]["exact"] = {"error": "it died"}
    (tmp_path / "ab.json").write_text(json.dumps(record))
    again, resumed = command.begin(asked(), [])
    assert resumed and list(again["cells"]) == ["stock|T = 0|c1|r0"]
    assert "error" not in again["arms"]["exact"]
    with pytest.raises(CliError, match="output_len: 8 there, 9 now") as caught:
        command.begin(asked(output_len=9), [])
    assert caught.value.exit_code == 2
    assert (tmp_path / "ab.json").exists()
    assert not command.begin(asked(output_len=9, fresh=True), [])[1]
    (tmp_path / "ab.json").write_text("{")
    with pytest.raises(CliError, match="no record of specopt ab"):
        command.begin(asked(), [])


def test_a_record_without_a_measurement_does_not_stand_in_the_way(tmp_path):
    def asked(**changed):
        return settings.checked(**(INPUT | {"out": tmp_path} | changed))

    record, _ = command.begin(asked(), [])
    record["arms"]["exact"] = {"error": "it died"}
    (tmp_path / "ab.json").write_text(json.dumps(record))
    (tmp_path / "pair").mkdir()
    assert command.begin(asked(), [])[1]
    again, resumed = command.begin(asked(output_len=9), [])
    assert not resumed and not again["arms"] and list(tmp_path.iterdir()) == []


def test_what_differs_between_two_runs_is_short():
    assert changed_setting({"a": 1, "b": 2}, {"b": 2, "a": 1}) is None
    assert changed_setting({"a": 1}, {"a": 1, "b": 2}) == "b: None there, 2 now"
    assert changed_setting({"requests": {"1": 24, "8": 32}}, {"requests": {"1": 24, "8": 8}}) == (
        "requests 8: 32 there, 8 now"
    )
    arms = {"stock": {"option": None}, "exact": {"option": {"method": "exact"}}}
    said = changed_setting({"arms": arms}, {"arms": arms | {"stock (again)": {}}})
    assert said == "arms: stock + exact there, stock + exact + stock (again) now"
    one, two = (settings.checked(**(INPUT | {"out": Path("x"), "temperature": text})) for text in ("0", "0,1"))
    said = changed_setting(one.plan.describe(), two.plan.describe())
    assert said == "points: T = 0 there, T = 0 + T = 1 now"
    assert len(changed_setting({"serve_args": ["x" * 500]}, {"serve_args": ["y" * 500]})) < 120


def test_a_server_that_does_not_start_ends_the_run_in_one_sentence(tmp_path, monkeypatch):
    """The other arms have the same model: they are not tried. Nothing is left but the log."""
    says = "print('OSError: there is no such model.\\nRuntimeError: Engine core initialization failed.'); exit(3)"
    started = []
    fails = lambda plan, arm, *_: started.append(arm.name) or [sys.executable, "-c", says]  # noqa: E731
    monkeypatch.setattr(servers, "server_command", fails)
    out = tmp_path / "ab"
    with pytest.raises(CliError) as caught:
        command.run(settings.checked(**(INPUT | {"out": out})), [])
    assert str(caught.value) == (
        "arm stock failed: vLLM ended with status 3 before it was ready: OSError: there is no such model "
        f"(its log: {out}/stock.log)."
    )
    assert caught.value.exit_code == 1 and started == ["stock"]
    assert [path.name for path in out.iterdir()] == ["stock.log"]


def _processes(marker: str) -> list[psutil.Process]:
    """The processes whose command line or environment holds a marker."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get("SPECOPT_TEST") == marker:
                found.append(process)
        except psutil.Error:
            pass
    return found


def _servers(marker: str) -> list[psutil.Process]:
    """Those that serve; the command also starts short ones, git for instance."""
    found = []
    for process in _processes(marker):
        with suppress(psutil.Error):
            found += [process] if "serve" in process.cmdline() else []
    return found


def _gone(marker: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while _processes(marker) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not _processes(marker)


@pytest.mark.long
@pytest.mark.engine
@pytest.mark.timeout(600)
def test_two_real_arms(tmp_path):
    """One small run with real servers; what is finished is not run again."""
    marker = str(tmp_path)
    env = os.environ | {"SPECOPT_TEST": marker}
    some = tmp_path / "some.jsonl"
    some.write_text("".join(PROMPTS.read_text().splitlines(keepends=True)[:6]))
    arms = ("--arm", "stock-repaired", "--arm", "exact")
    command = [*RUN, *arms, "--workload", str(some), "-o", str(tmp_path / "ab")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "ab" / "ab.json").read_text())
    assert set(record["cells"]) == {
        f"{arm}|T = 1|c2|r0" for arm in ("stock-repaired", "exact", "stock-repaired (again)")
    }
    for cell in record["cells"].values():
        assert cell["completed"] == 4 and cell["total_output_tokens"] == 32
        assert cell["num_drafts"] > 0 and len(cell["accepted_per_position"]) == 4
    for arm in record["arms"].values():
        assert arm["kv_cache_tokens"] > 0 and arm["peak_mib"] > 100
        assert 0 < arm["scopes"]["T = 1"]["sampling_share"] < 1
    base = record["arms"]["stock-repaired"]["texts"]["T = 0"]
    assert len(base) == 6 and all(arm["texts"]["T = 0"] == base for arm in record["arms"].values())
    assert _gone(marker, 5)
    # What is finished is not run again: no server starts.
    started = time.monotonic()
    again = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0 and "3 of 3 cells are done" in again.stdout
    assert time.monotonic() - started < 30


@pytest.mark.engine
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long), signal.SIGKILL]
)
def test_an_interrupt_leaves_no_server(tmp_path, number):
    marker = str(tmp_path)
    command = [*RUN, "-o", str(tmp_path / "ab")]
    env = os.environ | {"SPECOPT_TEST": marker}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=env, **quiet) as child:
        try:
            deadline = time.monotonic() + 120
            while not _servers(marker) and time.monotonic() < deadline:
                time.sleep(0.2)
            assert _servers(marker)
            time.sleep(5)
        finally:
            child.send_signal(number)
    assert child.returncode != 0
    assert _gone(marker, 20), [process.cmdline() for process in _processes(marker)]


@pytest.mark.long
@pytest.mark.engine
@pytest.mark.timeout(300)
def test_a_server_that_dies_at_start_is_told_in_one_sentence(tmp_path):
    marker = str(tmp_path)
    command = [*RUN, "--serve-arg=--no-such-flag", "-o", str(tmp_path / "ab")]
    done = subprocess.run(command, env=os.environ | {"SPECOPT_TEST": marker}, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("specopt ab: arm stock-repaired failed: vLLM ended with status 2")
    assert "unrecognized arguments: --no-such-flag" in done.stderr and done.stderr.count("\n") == 1
    assert "starting exact" not in done.stdout
    assert _gone(marker, 5)


@pytest.mark.long
@pytest.mark.engine
@pytest.mark.timeout(900)
def test_running_servers_a_timeout_a_death_and_going_on(tmp_path):
    """Servers of the user's own: one dies under way, comes back, and the same line goes on."""
    settings = {"stock": None, "specopt": {"specopt": {"method": "exact"}}}
    ports, out = {name: free_port() for name in settings}, tmp_path / "ab"
    urls = [part for name, port in ports.items() for part in (f"--{name}-url", f"http://127.0.0.1:{port}")]
    command = [*RUN, "--temperature", "0", "--num-prompts", "16", "--output-len", "64", *urls, "-o", str(out)]

    def server(name: str) -> Server:
        option = ["--additional-config", json.dumps(settings[name])] if settings[name] else []
        speculation = {"model": str(MODELS / "specopt-draft"), "num_speculative_tokens": 4}
        serve = [servers.vllm_script(), "serve", str(MODELS / "specopt-target"), "--host", "127.0.0.1"]
        serve += ["--port", str(ports[name]), "--enforce-eager", "--speculative-config", json.dumps(speculation)]
        env = servers.ENV | {"VLLM_CPU_KVCACHE_SPACE": "1"}
        return Server([*serve, *option], tmp_path / f"{name}.log", env, ports[name])

    def run(*more: str) -> tuple[subprocess.CompletedProcess, dict]:
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=300)
        return done, json.loads((out / "ab.json").read_text())

    with server("stock") as stock, ExitStack() as stack:
        specopt = stack.enter_context(server("specopt"))
        for each in (stock, specopt):
            each.wait_ready(lambda: None, timeout=300)

        done, record = run("--timeout", "1")
        assert done.returncode == 1 and len(record["failed_cells"]) == 3
        assert set(record["failed_cells"].values()) == {
            "vllm bench serve took longer than 1 s (--timeout) and was stopped"
        }

        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
            while "stock|T = 0|c2|r0" not in json.loads((out / "ab.json").read_text())["cells"]:
                assert child.poll() is None
                time.sleep(0.05)
            specopt.stop()
            said = child.stdout.read()
        record = json.loads((out / "ab.json").read_text())
        assert child.returncode == 1 and set(record["cells"]) == {"stock|T = 0|c2|r0", "stock (again)|T = 0|c2|r0"}
        assert "arm exact failed: its server no longer answers" in said
        assert "exact: FAILED" in (out / "report.md").read_text()

        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and f"no vLLM server answers at http://127.0.0.1:{ports['specopt']}" in done.stderr

        stack.enter_context(server("specopt")).wait_ready(lambda: None, timeout=300)
        done, record = run()
        assert done.returncode == 0, done.stdout + done.stderr
        assert "2 of 3 cells are done" in done.stdout and not record["failed_cells"]
        assert record["arms"]["exact"]["texts"] == record["arms"]["stock"]["texts"]
        assert record["cells"]["exact|T = 0|c2|r0"]["completed"] == 16
