"""The servers of a comparison and what is asked of each: cells, texts, profile, memory.

Everything takes settings and returns plain data, so that a cell can run wherever its server can be reached.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from vllm_specopt.benchmarks.errors import CliError
from vllm_specopt.benchmarks.serve import client, scopes
from vllm_specopt.benchmarks.serve.arms import Arm
from vllm_specopt.benchmarks.serve.plan import REPAIRED_LINE, Cell, Plan
from vllm_specopt.integration import reasons

COMPARED_PROMPTS, COMPARED_TOKENS = 16, 16
WARMUP_TOKENS = 16
# A step brings 3 to 4 tokens of a request where most drafts are accepted.
PROFILED_REQUESTS, PROFILED_TOKENS, PROFILED_STEPS = 8, 48, 16
# vLLM's own profiler, idle until /start_profile; the variable makes the runner mark the parts of a step.
ENV = {"VLLM_CUSTOM_SCOPES_FOR_PROFILING": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
       "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # fmt: skip
GPU_MEMORY = 0.9


def profiler(folder: Path) -> dict:
    """Return the configuration of vLLM's own profiler that writes its traces to a folder."""
    return {"profiler": "torch", "torch_profiler_dir": str(folder), "torch_profiler_with_stack": False,
            "ignore_frontend": True}  # fmt: skip


def server_command(plan: Plan, arm: Arm, port: int, profiles: Path) -> list[str]:
    """Return the command of an arm's server. Arms differ by the option, the repair, the port and the folder only."""
    vllm = [sys.executable, "-m", "vllm_specopt.benchmarks.serve.repaired"] if arm.repair else [vllm_script()]
    option = ["--additional-config", json.dumps({"specopt": arm.option})] if arm.option else []
    speculation = plan.speculation if arm.speculates else None
    device = ["--enforce-eager"] if plan.on_cpu else []
    if not plan.on_cpu and not any(part.startswith("--gpu-memory-utilization") for part in plan.serve_args):
        # All servers live at once: each gets an equal part.
        device = ["--gpu-memory-utilization", f"{GPU_MEMORY / len(plan.all_arms()):.3f}"]
    return [
        *vllm, "serve", plan.target, "--host", "127.0.0.1", "--port", str(port),
        "--served-model-name", plan.served_name, *device,
        # Every cell may read the same prompts: none may find its work done by the one before.
        "--no-enable-prefix-caching",
        *(["--speculative-config", json.dumps(speculation)] if speculation else []),
        *(["--profiler-config", json.dumps(profiler(profiles))] if plan.on_cpu else []),
        "--disable-uvicorn-access-log", *option, *plan.serve_args,
    ]  # fmt: skip


def vllm_script() -> str:
    """Return the path of the `vllm` command beside this Python."""
    return str(Path(sys.executable).with_name("vllm"))


def worker_problem(arm: Arm, log: str) -> str | None:
    """Why the log of a server is not that of its arm, if it is not."""
    active = next(
        (line[line.index("specopt: active") :] for line in log.splitlines() if "specopt: active" in line), None
    )
    if arm.option and not active:
        said = [line[line.index("specopt: ") :] for line in log.splitlines() if "specopt: " in line]
        return f"the option is not active: its worker says {said[-1]!r}" if said else "no worker says 'specopt: active'"
    if active and not arm.option:
        return f"the arm {arm.name} is not stock, its worker says: {active}"
    if arm.repair and log.count(REPAIRED_LINE) < 2:
        return f"the arm {arm.name} is not repaired in its engine process"
    return None


def environment(on_cpu: bool) -> dict[str, str]:
    """Return the variables of servers and client; what the user has set for the CPU cache wins."""
    cpu = {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
    return ENV | (cpu if on_cpu else {})


class Endpoint:
    """A server by its URL, ours or not."""

    def __init__(self, url: str, model: str) -> None:
        self.url = url.rstrip("/")
        self.model = model
        self._client = httpx.Client(base_url=self.url, timeout=300)

    def post(self, path: str, body: dict) -> httpx.Response:
        """Send one request and return the answer; raise CliError if the server refuses or does not answer."""
        try:
            return self._client.post(path, json=body).raise_for_status()
        except httpx.HTTPError as error:
            raise CliError(f"the server at {self.url} failed {path}: {error}") from error

    def healthy(self) -> bool:
        """Whether /health answers."""
        try:
            return self._client.get("/health", timeout=10).status_code == 200
        except httpx.HTTPError:
            return False

    def complete(self, prompt: str | list[int], tokens: int, sampling: dict) -> list[int]:
        """Return the token ids of one completion."""
        body = {"model": self.model, "prompt": prompt, "max_tokens": tokens, "ignore_eos": True,
                "return_token_ids": True, **sampling}  # fmt: skip
        return self.post("/v1/completions", body).json()["choices"][0]["token_ids"]

    def kv_cache_tokens(self) -> int | None:
        """Return how many tokens the KV cache holds, from /metrics, or None where it does not say."""
        try:
            text = self._client.get("/metrics", timeout=10).text
        except httpx.HTTPError:
            return None
        line = next((line for line in text.splitlines() if line.startswith("vllm:cache_config_info{")), "")
        sizes = [re.search(rf'[{{,]{name}="(\d+)"', line) for name in ("num_gpu_blocks", "block_size")]
        return math.prod(int(size[1]) for size in sizes if size) if all(sizes) else None


def texts(server: Endpoint, plan: Plan, point: str, tick: Callable[[], None]) -> list[list[int]]:
    """Return seeded completions at a point, one request at a time, so that no batch depends on timing."""
    found = []
    for seed, prompt in enumerate(plan.workload.prompts[:COMPARED_PROMPTS]):
        found.append(server.complete(prompt, COMPARED_TOKENS, plan.sampling(point) | {"seed": seed}))
        tick()
    return found


def burst(server: Endpoint, plan: Plan, point: str, tokens: int) -> None:
    """Complete a few prompts at once."""
    prompts = plan.workload.prompts[:PROFILED_REQUESTS]
    with ThreadPoolExecutor(PROFILED_REQUESTS) as pool:
        list(pool.map(lambda prompt: server.complete(prompt, tokens, plan.sampling(point)), prompts))


def step_parts(server: Endpoint, plan: Plan, number: int, profiles: Path) -> dict | None:
    """Profile a few steps at point ``number``; None where the host's scopes say nothing of a step (a GPU)."""
    if not plan.on_cpu:
        return None
    server.post("/start_profile", {"profile_prefix": f"P{number}", "max_iterations": PROFILED_STEPS})
    burst(server, plan, str(plan.points[number]), PROFILED_TOKENS)
    server.post("/stop_profile", {})
    return scopes.summarise(profiles.glob(f"P{number}_*.pt.trace.json*"))


def peak_mib(pid: int) -> float | None:
    """Return the sum of the peaks of resident memory over a process and its descendants, in MiB.

    The peaks need not coincide: it is an upper bound, the same for every arm.
    """
    import psutil

    try:
        root = psutil.Process(pid)
        tree = [root, *root.children(recursive=True)]
        status = [Path(f"/proc/{process.pid}/status").read_text() for process in tree]
    except (psutil.Error, OSError):
        return None
    peaks = [re.search(r"VmHWM:\s+(\d+)", text) for text in status]
    return round(sum(int(peak[1]) for peak in peaks if peak) / 1024, 1)


def gpu_mib(pid: int) -> float | None:
    """Return the GPU memory that a process and its descendants hold now, in MiB; None without nvidia-smi."""
    import psutil

    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        rows = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
        pids = {pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))}
    except (OSError, subprocess.CalledProcessError, psutil.Error):
        return None
    held = [
        float(size) for owner, size in (row.split(",") for row in rows) if int(owner) in pids and size.strip()[0] != "["
    ]
    return sum(held) if held else None


def run_cell(plan: Plan, cell: Cell, url: str, call: Callable[[list[str], Path, float], int], scratch: Path) -> dict:
    """Run one cell and return its part of the record.

    Args:
        plan: The comparison.
        cell: Which arm, temperature, concurrency and repeat.
        url: Where the arm's server answers.
        call: Runs `vllm` with arguments, a log file and a limit in seconds, and returns its exit status.
        scratch: A folder for the client's result and log.

    Raises:
        CliError: The client failed, timed out, or a request did.
    """
    result, log = scratch / "client.json", scratch / "client.log"
    result.unlink(missing_ok=True)
    status = call(client.command(plan, cell, url, result), log, plan.timeout)
    bench = json.loads(result.read_text()) if result.exists() else {}
    if status or not bench or bench["failed"]:
        failed = f"{bench['failed']} requests failed" if bench else f"it ended with status {status}"
        why = reasons.of_log(log.read_text(errors="replace") if log.exists() else "").rstrip(".")
        raise CliError(f"vllm bench serve failed ({failed}): {why}")
    return client.summarise(bench)
