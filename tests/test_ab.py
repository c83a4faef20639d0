"""`specopt ab`: order, arms, statistics, views, resuming and bad input without a server, then one real small run."""

import importlib.util
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import psutil
import pytest

from vllm_specopt.benchmarks import serving_client, serving_page, serving_report, serving_run, serving_stats
from vllm_specopt.benchmarks.serving_plan import Arm, Plan, changed_settings, with_repaired
from vllm_specopt.benchmarks.serving_workloads import workload
from vllm_specopt.cli import ab, ab_ray
from vllm_specopt.cli.errors import CliError
from vllm_specopt.cli.process import Server, free_port

MODELS = Path(__file__).parents[1] / "models"
PROMPTS = MODELS / "prompts.jsonl"
REPAIRED, EXACT = Arm("stock-repaired", repair=True), Arm("exact", {"method": "exact"})
INPUT = {
    "target": None, "draft": None, "speculative_config": None, "arms": [], "spec": "shipped", "concurrency": "1",
    "temperature": "0", "top_p": 1.0, "num_prompts": 4, "output_len": 8, "repeats": 2, "serve_args": [], "seed": 0,
    "fresh": False, "stock_url": None, "specopt_url": None, "port": 0, "timeout": 60.0, "quick": False,
}  # fmt: skip


RUN = [sys.executable, "-m", "vllm_specopt.cli.main", "ab", "--concurrency", "2", "--num-prompts", "4",
       "--output-len", "8", "--repeats", "1", "--temperature", "1"]  # fmt: skip


def make_plan(**changed) -> Plan:
    settings = {
        "arms": (REPAIRED, EXACT), "target": "target", "served_name": "target", "tokenizer": "target",
        "speculation": {"num_speculative_tokens": 4}, "workload": workload("shipped", 8, PROMPTS, 512, 0),
        "concurrency": (1, 8), "temperatures": (0.0, 1.0), "top_p": 0.9, "num_prompts": None, "output_len": 8,
        "repeats": 4, "seed": 5, "serve_args": (), "timeout": 60.0, "on_cpu": True,
    }  # fmt: skip
    return Plan(**(settings | changed))


def make_cell(speed: float, latency: float = 10.0) -> dict:
    times = {"mean": latency, "median": latency, "p50": latency, "p90": latency, "p99": 2 * latency}
    return {
        "requests_per_s": speed / 8, "tokens_per_s": speed, "ttft": times, "tpot": times, "itl": times,
        "quantiles": {name: [0.001 * (1 + i) for i in range(41)] for name in ("ttft", "tpot", "itl")},
        "num_drafts": 10, "draft_tokens": 40, "accepted_tokens": 20, "load_average": 1.0,
        "accepted_per_position": [0.8, 0.6, 0.4, 0.2],
    }  # fmt: skip


def make_record(plan: Plan, exact: float = 2.0, wobble: float = 0.01) -> dict:
    """A record in which exact is `exact` times as fast and the machine slows down by 5 % a repeat."""
    cells = {}
    for cell in plan.cells():
        factor = exact if cell.arm == "exact" else 1.0
        own = random.Random(cell.key).uniform(-1, 1)
        speed = 100 * factor * 0.95**cell.repeat * math.exp(wobble * own)
        cells[cell.key] = make_cell(speed, 1000 / speed)
    arms = {arm.name: {"greedy": [[1, 2], [3, 4]], "kv_cache_tokens": 4096} for arm in plan.all_arms()}
    return {
        "time": "2026-01-01T00:00:00+00:00", "command": "specopt ab", "git": {"commit": "0" * 40, "dirty": False},
        "machine": {"device": "cpu", "name": "a CPU", "cores": 2, "load_average_before": 0.1},
        "versions": {"python": "3.11"}, "config": json.loads(json.dumps(plan.describe())), "arms": arms,
        "cells": cells, "failed_cells": {}, "notices": [], "seconds": 9,
    }  # fmt: skip


def test_arms_take_turns_there_and_back():
    order = make_plan().cells()
    assert [cell.arm for cell in order[:3]] == ["stock-repaired", "exact", "stock-repaired (again)"]
    second = [cell for cell in order if cell.repeat == 1]
    assert [cell.arm for cell in second[:3]] == ["stock-repaired (again)", "exact", "stock-repaired"]
    assert len({cell.key for cell in order}) == len(order) == 3 * 2 * 2 * 4
    assert [cell.repeat for cell in order] == sorted(cell.repeat for cell in order)
    # A drift that is linear in time must not favour an arm: their mean places are equal.
    places = {arm: [i for i, cell in enumerate(order) if cell.arm == arm] for arm in {cell.arm for cell in order}}
    assert len({sum(each) for each in places.values()}) == 1


def test_servers_differ_by_their_arm_only():
    plan = make_plan()
    base, again = (serving_run.server_command(plan, arm, 1, Path("p")) for arm in (plan.baseline, plan.noise))
    exact = serving_run.server_command(plan, EXACT, 1, Path("p"))
    assert base == again
    assert base[:3] == [sys.executable, "-m", "vllm_specopt.benchmarks.serving_repaired"]
    at = exact.index("--additional-config")
    assert json.loads(exact[at + 1]) == {"specopt": {"method": "exact"}}
    assert exact[1:at] + exact[at + 2 :] == base[3:]
    on_gpu = make_plan(on_cpu=False, arms=(Arm("stock"), EXACT))
    command = serving_run.server_command(on_gpu, EXACT, 1, Path("p"))
    assert command[command.index("--gpu-memory-utilization") + 1] == "0.300"
    own = make_plan(on_cpu=False, arms=(Arm("stock"), EXACT), serve_args=("--gpu-memory-utilization=0.2",))
    assert sum("gpu-memory" in part for part in serving_run.server_command(own, EXACT, 1, Path("p"))) == 1


def test_the_client_gets_the_same_prompts_in_every_arm():
    plan = make_plan()
    cells = [cell for cell in plan.cells() if cell.repeat == 1 and cell.concurrency == 8]
    commands = {tuple(serving_client.command(plan, c, "URL", Path("r.json"))) for c in cells if c.temperature == 1}
    assert len(commands) == 1
    command = list(*commands)
    assert command[command.index("--seed") + 1] == "6"
    assert command[command.index("--top-p") + 1] == "0.9"
    assert command[command.index("--num-prompts") + 1] == "32"
    greedy = serving_client.command(plan, next(c for c in cells if c.temperature == 0), "URL", Path("r.json"))
    assert "--top-p" not in greedy


def test_stock_is_replaced_on_a_cpu_where_it_is_broken():
    default, notice = with_repaired([Arm("stock"), EXACT], True, (0.0, 1.0))
    assert [arm.name for arm in default] == ["stock-repaired", "exact"]
    assert "in the place of stock" in notice
    asked, notice = with_repaired([Arm("stock"), EXACT], False, (0.7,))
    assert [arm.name for arm in asked] == ["stock-repaired", "stock", "exact"]
    assert "beside stock" in notice
    assert with_repaired([Arm("stock"), EXACT], True, (0.0,)) == ([Arm("stock"), EXACT], None)


def test_a_real_difference_is_found_and_none_is_not_invented():
    rows = serving_stats.compare(make_record(make_plan()))
    words = {(row["metric"], row["words"]) for row in rows if row["arm"] == "exact"}
    assert words == {("output tokens/s", "better"), ("TTFT median", "better"), ("TPOT median", "better"),
                     ("ITL p99", "better")}  # fmt: skip
    speeds = [row["ratio"] for row in rows if row["arm"] == "exact" and row["metric"] == "output tokens/s"]
    assert all(1.9 < each["low"] <= each["ratio"] <= each["high"] < 2.1 for each in speeds)
    same = [row for row in serving_stats.compare(make_record(make_plan(), exact=1.0)) if row["arm"] == "exact"]
    assert {row["words"] for row in same} == {"no difference"}


def test_a_ratio_within_the_noise_is_no_difference():
    clear = {"ratio": 1.03, "low": 1.02, "high": 1.04, "pairs": 4}
    assert serving_stats.verdict(clear, {"ratio": 1.0, "low": 0.99, "high": 1.01, "pairs": 4}, True) == "better"
    assert serving_stats.verdict(clear, {"ratio": 1.0, "low": 0.99, "high": 1.01, "pairs": 4}, False) == "worse"
    # Noise of 0.96 one way could as well have been 1.04 the other way.
    noise = {"ratio": 0.98, "low": 0.96, "high": 0.999, "pairs": 4}
    assert serving_stats.verdict(clear, noise, True) == "no difference"
    assert serving_stats.verdict({**clear, "low": 0.99}, None, True) == "no difference"
    assert serving_stats.verdict({**clear, "low": None}, noise, True).startswith("one pair")
    assert serving_stats.verdict(None, noise, True) == "not measured"


def test_pairs_follow_the_repeat_and_a_missing_cell_costs_its_pair_only():
    record = make_record(make_plan(), wobble=0.0)
    del record["cells"]["exact|T0|c1|r2"]
    found = serving_stats.ratio(record, "exact", 0.0, 1, "output tokens/s")
    assert found["pairs"] == 3
    assert found["ratio"] == pytest.approx(2.0)


def test_acceptance_is_pooled_by_drafts():
    short = make_cell(1) | {"num_drafts": 30, "draft_tokens": 60, "accepted_tokens": 6, "accepted_per_position": [0.2]}
    found = serving_stats.acceptance([make_cell(1), short])
    assert found["rate"] == pytest.approx(26 / 100)
    assert found["length"] == pytest.approx(1 + 26 / 40)
    assert found["positions"] == pytest.approx([(8 + 6) / 40, 6 / 40, 4 / 40, 2 / 40])
    assert serving_stats.acceptance([{}])["rate"] is None


def test_the_client_result_is_kept_as_rates_and_quantiles():
    bench = {
        "completed": 2, "failed": 0, "duration": 1.0, "total_output_tokens": 7, "request_throughput": 2.0,
        "output_throughput": 7.0, "ttfts": [0.1, 0.3], "itls": [[0.2, 0.2], [0.4]], "output_lens": [5, 2],
        **{f"{key}_{name}_ms": 1.0 for name in ("ttft", "tpot", "itl") for key in ("mean", "median", "p99")},
    }  # fmt: skip
    found = serving_client.summarise(bench)
    assert found["quantiles"]["ttft"][0] == 0.1 and found["quantiles"]["ttft"][-1] == 0.3
    # Tokens that arrive together count in the time per token, not in the gaps between arrivals.
    assert found["quantiles"]["tpot"][0] == pytest.approx(0.1)
    assert found["quantiles"]["itl"][0] == 0.2
    assert "num_drafts" not in found


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def test_the_page_needs_nothing_else_and_its_figures_do_not_collide():
    page = serving_page.page(make_record(make_plan()))
    tags = _Tags()
    tags.feed(page)
    for tag, attrs in tags.found:
        assert tag not in ("script", "link", "img", "iframe")
        for name in ("src", "href", "xlink:href"):
            assert attrs.get(name, "#").startswith("#")
    assert sum(tag == "svg" for tag, _ in tags.found) == 5
    clips = [attrs["id"] for tag, attrs in tags.found if tag == "clippath"]
    assert clips and len(clips) == len(set(clips))
    assert len(page) < 500_000


def test_the_views_say_what_failed_and_what_differs():
    record = make_record(make_plan())
    assert serving_report.exit_code(record) == 0
    text = serving_report.markdown(record)
    assert "2 of 2 completions identical" in text
    assert "expected by chance" in text
    record["arms"]["exact"]["greedy"] = [[1, 2], [3, 5]]
    assert serving_report.exit_code(record) == 1
    assert "first difference: prompt 1, position 1" in serving_report.markdown(record)
    record["arms"]["exact"]["greedy"] = [[1, 2], [3, 4]]
    record["arms"]["exact"]["error"] = "it died"
    assert serving_report.exit_code(record) == 1
    assert "exact: FAILED: it died" in serving_page.page(record)


def test_stock_as_it_comes_is_marked_on_a_cpu():
    plan = make_plan(arms=(REPAIRED, Arm("stock"), EXACT))
    marked = {row[:3] for row in serving_report.rows(make_record(plan)) if "*" in row[4]}
    assert marked == {("1", "1", "stock"), ("1", "8", "stock")}


def test_parts_from_a_cluster_make_one_record():
    plan = make_plan()
    whole, record = make_record(plan), make_record(plan) | {"cells": {}, "arms": {}}
    nodes = [{"host": f"host-{n}", "address": f"10.0.0.{n}", "node": f"{n}", "gpus": ["0"]} for n in range(2)]

    def arrive(arm: str, repeat: int, node: dict, failures: tuple = (), lost: bool = False) -> None:
        part = ab_ray.rebuilt(json.loads(json.dumps(asdict(plan))), arm, repeat)
        assert {cell.arm for cell in part.cells()} == {arm} == {each.name for each in part.all_arms()}
        own = {"arms": {arm: whole["arms"][arm]}, "cells": {c.key: whole["cells"][c.key] for c in part.cells()}}
        assert {cell.repeat for cell in part.cells()} == {repeat} and len(own["cells"]) == 4
        entry = {"arm": arm, "repeat": repeat, "attempts": len(failures) + (not lost), "failures": list(failures),
                 "node": node, "result": None if lost else own}  # fmt: skip
        ab_ray.add(plan, record, entry)
        line = ab_ray.described(entry)
        assert line.startswith(f"{arm}, repeat {repeat + 1}: {'lost' if lost else 'done'} on {node['host']}, GPU 0")

    for repeat in range(4):
        for arm in plan.all_arms():
            moved = (arm.name, repeat) == ("exact", 1)
            gone = (arm.name, repeat) == ("exact", 3)
            failures = ("the worker was lost\nwith a log",) * (moved + 2 * gone)
            arrive(arm.name, repeat, nodes[(repeat + moved) % 2], failures, gone)
    row = next(row for row in serving_stats.compare(record) if row["arm"] == "exact")
    # Four repeats, less the one that moved to another device and the one that was lost.
    assert row["ratio"]["pairs"] == 2 and row["noise"]["pairs"] == 4
    assert len(record["failed_cells"]) == 4 and ab.serving_report.exit_code(record) == 1
    text = serving_report.markdown(record)
    assert "| 2 | exact | host-0, 10.0.0.0, GPU 0 | 2 | done | the worker was lost |" in text
    assert "| 4 | exact | host-1, 10.0.0.1, GPU 0 | 2 | lost | the worker was lost; the worker was lost |" in text
    assert "on the Ray cluster each arm of each repeat had a server of its own" in text
    assert "Ray" not in serving_report.markdown(whole)


def test_an_empty_record_has_views_too():
    record = make_record(make_plan()) | {"cells": {}, "arms": {}}
    assert "not measured" in serving_report.markdown(record)
    assert "<svg" not in serving_page.page(record)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"target": "/no/such/folder", "draft": "x/y"}, "/no/such/folder is no model folder"),
        ({"target": str(MODELS / "specopt-target"), "draft": "./none"}, "./none is no model folder"),
        ({"target": str(MODELS / "specopt-target")}, "needs a --draft or a --speculative-config"),
        ({"speculative_config": "{"}, "--speculative-config is not JSON"),
        ({"speculative_config": "[]"}, "must be a JSON object"),
        ({"speculative_config": "{}", "draft": "x"}, "give one of them"),
        ({"arms": ["stck"]}, "there is no arm 'stck'"),
        ({"arms": ["mine={"]}, "the option of arm 'mine' is not JSON"),
        ({"arms": ['mine={"method": "exakt"}']}, "specopt.method is 'exakt'"),
        ({"arms": ['mine={"metod": "exact"}']}, "unknown key 'metod'"),
        ({"arms": ["mine=null"]}, "it is null"),
        ({"arms": ['stock={"method": "exact"}']}, "needs a name other than 'stock'"),
        ({"spec": "sonnet"}, "there is no workload 'sonnet'"),
        ({"spec": "none.jsonl"}, "none.jsonl does not exist"),
        ({"spec": "speed-bench:/no/such"}, "is no folder"),
        ({"concurrency": "1,x"}, "--concurrency is '1,x'"),
        ({"concurrency": "0"}, "at least 1"),
        ({"temperature": "-1"}, "at least 0"),
        ({"temperature": "nan"}, "at least 0"),
        ({"stock_url": "http://127.0.0.1:9"}, "go together"),
        ({"stock_url": "http://127.0.0.1:9", "specopt_url": "http://127.0.0.1:9"}, "no vLLM server answers"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_starts(tmp_path, changed, sentence):
    with pytest.raises(CliError, match=re.escape(sentence)) as caught:
        ab.checked(**(INPUT | {"out": tmp_path / "out"} | changed))
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
            ab.checked(**(INPUT | {"out": tmp_path, "spec": str(path)}))
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
        (["--ray", "--ray-address", "127.0.0.1:1"], "no Ray cluster answers at 127.0.0.1:1 ("),
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
            ab.checked(**(INPUT | {"out": tmp_path, "port": taken.getsockname()[1]}))


def test_a_record_is_continued_under_the_same_settings_only(tmp_path):
    def settings(**changed):
        return ab.checked(**(INPUT | {"out": tmp_path} | changed))

    record, resumed = ab.begin(settings(), [])
    assert not resumed
    record["cells"]["stock|T0|c1|r0"] = make_cell(1)
    record["arms"]["exact"] = {"error": "it died"}
    (tmp_path / "ab.json").write_text(json.dumps(record))
    again, resumed = ab.begin(settings(), [])
    assert resumed and list(again["cells"]) == ["stock|T0|c1|r0"]
    assert "error" not in again["arms"]["exact"]
    with pytest.raises(CliError, match="output_len: 8 there, 9 now") as caught:
        ab.begin(settings(output_len=9), [])
    assert caught.value.exit_code == 2
    assert (tmp_path / "ab.json").exists()
    assert not ab.begin(settings(output_len=9, fresh=True), [])[1]
    (tmp_path / "ab.json").write_text("{")
    with pytest.raises(CliError, match="no record of specopt ab"):
        ab.begin(settings(), [])
    assert changed_settings({"a": 1}, {"a": 1, "b": 2}) == ["b: None there, 2 now"]


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


def _gone(marker: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while _processes(marker) and time.monotonic() < deadline:
        time.sleep(0.2)
    return not _processes(marker)


@pytest.mark.engine
@pytest.mark.timeout(400)
def test_two_real_arms(tmp_path):
    """One small run with real servers; the arm that cannot start is told and leaves the others unharmed."""
    marker = str(tmp_path)
    env = os.environ | {"SPECOPT_TEST": marker}
    command = [*RUN, "--arm", "stock-repaired", "--arm", "exact", "-o", str(tmp_path / "ab")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "ab" / "ab.json").read_text())
    assert set(record["cells"]) == {f"{arm}|T1|c2|r0" for arm in ("stock-repaired", "exact", "stock-repaired (again)")}
    for cell in record["cells"].values():
        assert cell["completed"] == 4 and cell["total_output_tokens"] == 32
        assert cell["num_drafts"] > 0 and len(cell["accepted_per_position"]) == 4
    for arm in record["arms"].values():
        assert arm["kv_cache_tokens"] > 0 and arm["peak_mib"] > 100
        assert 0 < arm["scopes"]["1"]["sampling_share"] < 1
    base = record["arms"]["stock-repaired"]["greedy"]
    assert base and all(arm["greedy"] == base for arm in record["arms"].values())
    assert _gone(marker, 5)
    # What is finished is not run again: no server starts.
    started = time.monotonic()
    again = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert again.returncode == 0 and "3 of 3 cells are done" in again.stdout
    assert time.monotonic() - started < 30


@pytest.mark.engine
@pytest.mark.timeout(200)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupt_leaves_no_server(tmp_path, number):
    marker = str(tmp_path)
    command = [*RUN, "-o", str(tmp_path / "ab")]
    env = os.environ | {"SPECOPT_TEST": marker}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=env, **quiet) as child:
        deadline = time.monotonic() + 120
        while len(_processes(marker)) < 2 and time.monotonic() < deadline:
            time.sleep(0.2)
        assert len(_processes(marker)) >= 2
        time.sleep(5)
        child.send_signal(number)
    assert child.returncode != 0
    assert _gone(marker, 20), [process.cmdline() for process in _processes(marker)]


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
        serve = [serving_run.vllm_script(), "serve", str(MODELS / "specopt-target"), "--host", "127.0.0.1"]
        serve += ["--port", str(ports[name]), "--enforce-eager", "--speculative-config", json.dumps(speculation)]
        env = serving_run.ENV | {"VLLM_CPU_KVCACHE_SPACE": "1"}
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
            while "stock|T0|c2|r0" not in json.loads((out / "ab.json").read_text())["cells"]:
                assert child.poll() is None
                time.sleep(0.05)
            specopt.stop()
            said = child.stdout.read()
        record = json.loads((out / "ab.json").read_text())
        assert child.returncode == 1 and set(record["cells"]) == {"stock|T0|c2|r0", "stock (again)|T0|c2|r0"}
        assert "arm exact failed: its server no longer answers" in said
        assert "exact: FAILED" in (out / "report.md").read_text()

        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2 and f"no vLLM server answers at http://127.0.0.1:{ports['specopt']}" in done.stderr

        stack.enter_context(server("specopt")).wait_ready(lambda: None, timeout=300)
        done, record = run()
        assert done.returncode == 0, done.stdout + done.stderr
        assert "2 of 3 cells are done" in done.stdout and not record["failed_cells"]
        assert record["arms"]["exact"]["greedy"] == record["arms"]["stock"]["greedy"]
        assert record["cells"]["exact|T0|c2|r0"]["completed"] == 16
