"""The drop-in under Ray: in the workers of vLLM's Ray executor, in an A/B over a cluster, in Ray Serve and Ray Data.

Everything runs on real local Ray clusters, each in a process of its own. ``SPECOPT_RAY=all python -m pytest
tests/test_ray.py`` adds what takes minutes: tensor parallel 1, an A/B with real servers, the two examples.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("ray")
pytest.importorskip("vllm")

from engine import steps
from support import prepared

from vllm_specopt.benchmarks.errors import CliError
from vllm_specopt.benchmarks.serve import cluster

ROOT = Path(__file__).parents[1]
SUPPORT = ROOT / "tests" / "support"
TARGET, DRAFT = (str(ROOT / "models" / f"specopt-{role}") for role in ("target", "draft"))
OURS = "vllm_specopt.integration.v1.RejectionSampler"
EXACT = {"specopt": {"method": "exact"}}
ACTIVE = "specopt: active: runner=V1 method=exact backend=cpu device=cpu"
NUM_PROMPTS, MAX_TOKENS = 8, 16
SECONDS = 300
ALL = os.environ.get("SPECOPT_RAY") == "all"
everything = pytest.mark.skipif(not ALL, reason="takes minutes: set SPECOPT_RAY=all")
# Tensor parallel 2 is on two nodes, so what holds there is the stronger statement.
SIZES = {1: "uni", 2: "mp"} if ALL else {2: "mp"}


def environment(**more: str) -> dict[str, str]:
    """Environment of a process that starts a cluster and of everything in it."""
    environ = prepared.environment("V1") | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    environ["PYTHONPATH"] = os.pathsep.join([str(SUPPORT), environ["PYTHONPATH"]])
    environ.pop("RAY_ADDRESS", None)
    return environ | more


def script(name: str, request: dict, folder: Path, *arguments: str, seconds: float = SECONDS, **environ: str) -> dict:
    """Run one of the scripts in tests/support, which ends when its standard input closes, and return its result."""
    (folder / "request.json").write_text(json.dumps(request))
    command = [sys.executable, str(SUPPORT / name), *arguments, "request.json", "result.json"]
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(
            command, cwd=folder, env=environment(**environ), stdin=subprocess.PIPE, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(timeout=seconds)
        finally:
            process.stdin.close()
            process.wait(timeout=60)
    assert status == 0, (folder / "log").read_text()[-4000:]
    return json.loads((folder / "result.json").read_text())


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return steps.prompts(NUM_PROMPTS)


@pytest.fixture(scope="module")
def engines(prompts, tmp_path_factory) -> dict:
    """One engine per executor and tensor parallel size; the Ray cluster has two nodes with one logical GPU each."""
    # The target's five key-value heads cannot be split in two. The draft model's two can: it drafts for itself, and as
    # it drafts its most probable tokens, requests at a temperature still see rejections.
    models = {
        1: (TARGET, {"model": DRAFT, "num_speculative_tokens": 4, "draft_sample_method": "probabilistic"}),
        2: (DRAFT, {"model": DRAFT, "num_speculative_tokens": 4}),
    }
    llm = {
        "additional_config": EXACT,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_model_len": 512,
        "max_num_seqs": NUM_PROMPTS,
    }
    greedy = {"temperature": 0.0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
    seeded = [greedy | {"temperature": 0.9, "top_p": 0.95, "seed": seed} for seed in range(NUM_PROMPTS)]
    request = {
        "nodes": [1, 1],
        "batches": {"greedy": [prompts, [greedy] * NUM_PROMPTS], "seeded": [prompts, seeded]},
        "engines": [
            {
                "name": f"{backend} {size}",
                "llm": {"model": models[size][0], "speculative_config": models[size][1], "tensor_parallel_size": size,
                        "distributed_executor_backend": backend, **llm},
            }
            for size, without in SIZES.items()
            for backend in (without, "ray")
        ],
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("engines")
    return script("ray_engine.py", request, folder, VLLM_ENABLE_V1_MULTIPROCESSING="0")


@pytest.mark.long
@pytest.mark.engine
@pytest.mark.parametrize("size", SIZES)
def test_every_ray_worker_verifies_with_ours(engines, size):
    found = engines[f"ray {size}"]
    assert found["executor"].startswith("Ray")
    assert [worker["rank"] for worker in found["workers"]] == list(range(size))
    assert len({worker["node"] for worker in found["workers"]}) == size, "the workers are to be on different nodes"
    for worker in found["workers"]:
        assert worker["node"] is not None
        assert worker["additional_config"] == EXACT
        assert worker["sampler"] == OURS


@pytest.mark.long
@pytest.mark.engine
def test_every_ray_worker_says_so(engines):
    said = [line for line in engines["worker log"].splitlines() if "specopt:" in line]
    assert sum(ACTIVE in line for line in said) == len(said) == sum(SIZES)


@pytest.mark.long
@pytest.mark.engine
@pytest.mark.parametrize(("size", "backend"), SIZES.items())
@pytest.mark.parametrize("batch", ["greedy", "seeded"])
def test_output_in_ray_equals_output_without(engines, size, backend, batch):
    in_ray, without = (engines[f"{name} {size}"] for name in ("ray", backend))
    assert not without["executor"].startswith("Ray")
    tokens = in_ray["batches"][batch]
    assert [len(ids) for ids in tokens] == [MAX_TOKENS] * NUM_PROMPTS
    assert tokens == without["batches"][batch]
    assert engines[f"ray {size}"]["batches"]["greedy"] != engines[f"ray {size}"]["batches"]["seeded"]


@pytest.fixture(scope="module")
def spread(tmp_path_factory) -> dict:
    """Four repeats on two nodes: one loses its worker once, one always."""
    folder = tmp_path_factory.mktemp("spread")
    (folder / "began").mkdir()
    plan = {"repeats": 4, "folder": str(folder / "began"), "hangs": 0, "dies": 3}
    return script("ray_ab.py", {"nodes": [1, 1], "plan": plan}, folder)


def test_a_lost_repeat_runs_once_more_and_one_that_is_lost_again_is_told(spread):
    assert spread["cells"] == {f"cell {n}": {"attempt": int(n == 0)} for n in range(3)}
    assert list(spread["failed_cells"]) == ["cell 3"]
    outcomes = {entry["repeat"]: entry["outcome"] for entry in spread["placements"]}
    assert [outcomes[n] for n in range(3)] == ["done"] * 3 and outcomes[3].startswith("lost: ")


def test_killed_worker_leaves_no_process(spread):
    assert len(spread["killed"]) == 2 and spread["alive"] == []


def test_repeats_spread_over_the_nodes(spread):
    assert len({entry["host"] for entry in spread["placements"] if entry["outcome"] == "done"}) == 2


def test_server_that_fits_nowhere_is_one_sentence(spread):
    assert spread["too_large"] == "none of the cluster's 2 nodes has 2 GPU and 1 CPU for a server."


def test_missing_ray_is_one_sentence(monkeypatch):
    monkeypatch.setattr(cluster.importlib.util, "find_spec", lambda name: None)
    with (
        pytest.raises(CliError, match=r"Ray is not installed .*pip install 'vllm-specopt\[ray\]'"),
        cluster.connected(),
    ):
        pass


@pytest.mark.parametrize("address", ["auto", "closed port", "nonsense:port"])
def test_missing_cluster_is_one_sentence(monkeypatch, tmp_path, address):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        if address == "closed port":
            address = f"127.0.0.1:{unused.getsockname()[1]}"
        began = time.monotonic()
        with (
            pytest.raises(CliError, match=f"no Ray cluster answers at {address}") as raised,
            cluster.connected(address),
        ):
            pass
    assert "\n" not in str(raised.value)
    assert time.monotonic() - began < 30


@everything
@pytest.mark.engine
def test_the_command_spreads_an_ab_over_a_cluster(tmp_path):
    out = tmp_path / "ab"
    options = ["--repeats", "2", "--concurrency", "2", "--temperature", "1", "--num-prompts", "4", "--output-len", "8"]
    arguments = ["ab", "--ray", "--ray-gpus", "1", *options, "-o", str(out)]
    found = script("ray_cli.py", {"nodes": [1, 1], "arguments": arguments}, tmp_path, seconds=900)
    assert found["status"] == 0, found
    record = json.loads((out / "ab.json").read_text())
    arms = ("stock-repaired", "exact", "stock-repaired (again)")
    assert set(record["cells"]) == {f"{arm}|T = 1|c2|r{repeat}" for arm in arms for repeat in range(2)}
    assert all(cell["completed"] == 4 for cell in record["cells"].values())
    assert all(record["arms"][arm]["texts"] == record["arms"]["exact"]["texts"] for arm in arms)
    assert len({entry["host"] for entry in record["placements"]}) == 2
    assert "repeat 2: done on" in found["stdout"]
    assert "Repeats on the Ray cluster" in (out / "report.md").read_text()


@everything
@pytest.mark.engine
@pytest.mark.parametrize("library", ["data", "serve"])
def test_example_completes_prompts_with_ours(library, prompts, tmp_path):
    request = {"target": TARGET, "draft": DRAFT, "prompts": prompts[:4], "engine_kwargs": {"max_model_len": 256}}
    found = script("ray_llm.py", request, tmp_path, library)
    assert len(found["texts"]) == 4 and all(found["texts"])
    assert ACTIVE in found["worker_lines"]
