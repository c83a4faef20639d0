"""`specopt demo`: one model pair served by the real `vllm serve`, stock and exact, compared in one table.

The shipped pair gets a real vocabulary first: with its own 512 tokens sampling is next to nothing. On a CPU stock is
the repaired one (``benchmarks/serve/repaired.py``), since as it comes it is no peer above temperature 0.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_specopt.benchmarks.host import cpu_name, small_model_dtype
from vllm_specopt.benchmarks.processes import ChildProcess, Server, free_port, stopped_by_signals
from vllm_specopt.benchmarks.progress import Stages
from vllm_specopt.benchmarks.record import CHECKOUT, installed
from vllm_specopt.benchmarks.serve import extend, scopes
from vllm_specopt.cli import report
from vllm_specopt.cli.errors import CliError

# vLLM's default drafting: texts of seeded requests then depend on the seed alone.
SPECULATION = {"num_speculative_tokens": 4}
WORKLOADS = {
    "T = 0": {"temperature": 0.0},
    "T = 1": {"temperature": 1.0},
    "T = 0.8, top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
}
VOCAB_SIZE = 151_936
COMPARED, COMPARED_TOKENS = 16, 16
TIMED_REQUESTS = 16
NUM_WARMUPS = 4
PROFILED_TOKENS = 16
PROFILED_STEPS = 8
SPECOPT_OPTION = ["--additional-config", json.dumps({"specopt": {"method": "exact"}})]
# vLLM's own profiler, idle until /start_profile; VLLM_CUSTOM_SCOPES_FOR_PROFILING makes the runner mark its parts.
ENV = {"VLLM_CUSTOM_SCOPES_FOR_PROFILING": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
       "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # fmt: skip
CPU_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1"}


@dataclass(frozen=True)
class Settings:
    """What one demo runs."""

    target: Path
    draft: Path
    extends: bool
    prompt_file: Path
    prompts: list[str]
    num_prompts: int
    output_len: int
    concurrency: int
    port: int
    vllm: str
    on_cpu: bool
    reports: Path

    @classmethod
    def checked(
        cls, target: Path | None, draft: Path | None, prompts: Path | None, output_len: int, concurrency: int,
        port: int, quick: bool,
    ) -> Settings:  # fmt: skip
        """Fill in the defaults and check every input before anything starts; raise CliError (2) for a bad one."""
        models = CHECKOUT / "models"
        extends = target is None and draft is None
        target = (target or models / "specopt-target").resolve()
        draft = (draft or models / "specopt-draft").resolve()
        for role, folder in (("target", target), ("draft", draft)):
            if not (folder / "config.json").is_file():
                raise CliError(
                    f"{folder} is no model folder (it has no config.json): name the {role} model with --{role}.", 2
                )
        prompt_file = (prompts or models / "prompts.jsonl").resolve()
        read = read_prompts(prompt_file)
        vllm = Path(sys.executable).with_name("vllm")
        vllm_version = installed("vllm")
        if not vllm.exists() or vllm_version is None:
            raise CliError(f"vLLM is not installed beside {sys.executable}: run `make setup` in a checkout.", 2)
        return cls(
            target=target,
            draft=draft,
            extends=extends,
            prompt_file=prompt_file,
            prompts=read,
            num_prompts=min(len(read), TIMED_REQUESTS // 4 if quick else TIMED_REQUESTS),
            output_len=output_len,
            concurrency=concurrency,
            port=free_port(port),
            vllm=str(vllm),
            on_cpu="cpu" in vllm_version,
            reports=(CHECKOUT if (CHECKOUT / "pyproject.toml").is_file() else Path.cwd()) / "reports",
        )

    def cpu_flags(self) -> list[str]:
        """Return what the servers get on a CPU; other models than the shipped ones keep vLLM's number type."""
        if not self.on_cpu:
            return []
        return ["--enforce-eager", *(["--dtype", small_model_dtype()] if self.extends else [])]

    def env(self) -> dict[str, str]:
        """Return the environment variables both arms run with; what the user has set for the CPU cache wins."""
        return ENV | ({key: os.environ.get(key, value) for key, value in CPU_ENV.items()} if self.on_cpu else {})


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a JSON lines file; raise CliError (2) if there is none or a line is not as expected."""
    try:
        prompts = [json.loads(line)["prompt"] for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise CliError(f"{path} cannot be read ({error.strerror}): name a prompt file with --prompts.", 2) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CliError(f'{path} must hold one JSON object with a "prompt" per line.', 2) from error
    if not prompts:
        raise CliError(f"{path} holds no prompts.", 2)
    return prompts


class Arm:
    """One server and what is asked of it.

    name: ``stock``, ``exact``, or ``plain``, which is exact without speculation and not timed.
    """

    def __init__(self, name: str, settings: Settings, scratch: Path) -> None:
        self.name = name
        self.settings = settings
        self.scratch = scratch / name
        self.scratch.mkdir()
        profiler = {"profiler": "torch", "torch_profiler_dir": str(self.scratch), "torch_profiler_with_stack": False,
                    "ignore_frontend": True}  # fmt: skip
        repairs = name == "stock" and settings.on_cpu
        self.command = [
            *([sys.executable, "-m", "vllm_specopt.benchmarks.serve.repaired"] if repairs else [settings.vllm]),
            "serve", str(settings.target), "--host", "127.0.0.1", "--port", str(settings.port),
            *settings.cpu_flags(),
            # Every timed run reads the same prompts: none may find its work done by the one before.
            "--no-enable-prefix-caching",
            *([] if name == "plain" else
              ["--speculative-config", json.dumps({"model": str(settings.draft), **SPECULATION})]),
            "--profiler-config", json.dumps(profiler), "--disable-uvicorn-access-log",
            *([] if name == "stock" else SPECOPT_OPTION),
        ]  # fmt: skip

    def run(self, stages: Stages) -> dict:
        """Serve, measure, stop; return the arm's part of the record.

        Raises CliError if the server or a client fails, or if the worker does not say what the arm is about.
        """
        log = self.settings.reports / f"demo-{self.name}.log"
        found: dict[str, Any] = {"command": self.command, "env": self.settings.env(), "texts": {}, "runs": {}}
        with Server(self.command, log, self.settings.env(), self.settings.port) as server:
            with stages.next():
                server.wait_ready(stages.tick)
            found["worker_line"] = self.worker_line(log)
            with stages.next():
                for name in WORKLOADS if self.name == "exact" else report.COMPARED[self.name]:
                    found["texts"][name] = [
                        self.complete(server, prompt, name, COMPARED_TOKENS, stages, seed)
                        for seed, prompt in enumerate(self.settings.prompts[:COMPARED])
                    ]
            if self.name != "plain":
                for name in WORKLOADS:
                    with stages.next():
                        found["runs"][name] = self.timed_run(name, stages)
                with stages.next():
                    for name in WORKLOADS:
                        found["runs"][name]["scopes"] = self.profiled_burst(server, name, stages)
        return found

    def worker_line(self, log: Path) -> str | None:
        """Return the worker's line about the plugin; raise CliError if it is not the one this arm needs."""
        lines = [line[line.index("specopt: ") :] for line in log.read_text().splitlines() if "specopt: " in line]
        active = next((line for line in lines if line.startswith("specopt: active")), None)
        if self.name == "stock":
            if active:
                raise CliError(f"the stock arm is not stock, its worker says: {active}")
            return None
        if active is None:
            said = f"its worker says: {lines[-1]}" if lines else f"{log} has no line 'specopt: active'"
            raise CliError(f"the {self.name} arm is not active: {said}.")
        return active

    def complete(
        self, server: Server, prompt: str, workload: str, tokens: int, stages: Stages, seed: int = 0
    ) -> list[int]:
        """Return the token ids of one completion; raise CliError if the server refuses."""
        stages.tick()
        body = {"model": str(self.settings.target), "prompt": prompt, "max_tokens": tokens, "seed": seed,
                "ignore_eos": True, "return_token_ids": True, **WORKLOADS[workload]}  # fmt: skip
        return server.post("/v1/completions", body).json()["choices"][0]["token_ids"]

    def timed_run(self, workload: str, stages: Stages) -> dict:
        """Run `vllm bench serve` once; return its command and its result."""
        s = self.settings
        result = self.scratch / f"bench-{list(WORKLOADS).index(workload)}.json"
        sampling = [
            part for key, value in WORKLOADS[workload].items() for part in (f"--{key.replace('_', '-')}", str(value))
        ]
        command = [
            s.vllm, "bench", "serve", "--backend", "openai", "--endpoint", "/v1/completions", "--host", "127.0.0.1",
            "--port", str(s.port), "--model", str(s.target), "--dataset-name", "custom",
            "--dataset-path", str(s.prompt_file), "--skip-chat-template", "--disable-shuffle",
            "--num-prompts", str(s.num_prompts), "--custom-output-len", str(s.output_len), "--ignore-eos",
            *sampling, "--max-concurrency", str(s.concurrency),
            "--num-warmups", str(NUM_WARMUPS), "--percentile-metrics", "ttft,tpot", "--metric-percentiles", "99",
            "--save-result", "--save-detailed", "--result-dir", str(result.parent), "--result-filename", result.name,
        ]  # fmt: skip
        with ChildProcess(command, s.reports / "demo-client.log", s.env()) as client:
            status = client.wait(stages.tick)
            bench = json.loads(result.read_text()) if result.exists() else {}
            if status or bench.get("failed", 1):
                failed = f"{bench.get('failed')} requests failed" if bench else f"it ended with status {status}"
                raise CliError(f"vllm bench serve failed ({failed}); the end of its log:\n{client.last_lines()}")
        return {"command": command, "bench": bench}

    def profiled_burst(self, server: Server, workload: str, stages: Stages) -> dict | None:
        """Profile a few steps of a full batch; return the share of sampling, or None where scopes say nothing."""
        # On a GPU the host runs ahead of the device, so that host scopes do not tell what a step spends.
        if not self.settings.on_cpu:
            return None
        prefix = f"W{list(WORKLOADS).index(workload)}"
        body = {"profile_prefix": prefix, "max_iterations": PROFILED_STEPS}
        server.post("/start_profile", body)
        with ThreadPoolExecutor(self.settings.concurrency) as pool:
            prompts = self.settings.prompts[: self.settings.concurrency]
            list(pool.map(lambda prompt: self.complete(server, prompt, workload, PROFILED_TOKENS, stages), prompts))
        server.post("/stop_profile", {})
        return scopes.summarise(self.scratch.glob(f"{prefix}_*.pt.trace.json*"))


def describe(settings: Settings) -> dict:
    """Return the part of the record that says where, when and with what it was made."""

    def output(*command: str) -> str:
        if not shutil.which(command[0]):
            return ""
        return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True).stdout.strip()

    name = output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").split("\n")[0]
    if settings.on_cpu:
        name = cpu_name()
    packages = ("vllm", "torch", "triton", "transformers", "vllm-specopt")
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": {"commit": output("git", "rev-parse", "HEAD") or None, "dirty": bool(output("git", "status", "-s"))},
        "argv": shlex.join(sys.argv),
        "machine": {
            "device": "cpu" if settings.on_cpu else "cuda",
            "name": name,
            "cores": len(os.sched_getaffinity(0)),
            "system": platform.platform(),
            "load": round(os.getloadavg()[0], 1),
        },
        "versions": {"python": platform.python_version(), **{package: installed(package) for package in packages}},
        "config": {
            "pair": f"{settings.target.name} + {settings.draft.name}" + f", {VOCAB_SIZE:,} tokens" * settings.extends,
            "target": str(settings.target),
            "draft": str(settings.draft),
            "prompts": str(settings.prompt_file),
            **SPECULATION,
            "workloads": WORKLOADS,
            "num_prompts": settings.num_prompts,
            "output_len": settings.output_len,
            "concurrency": settings.concurrency,
            "warm-up requests": NUM_WARMUPS,
            "compared texts": f"{min(COMPARED, len(settings.prompts))} of {COMPARED_TOKENS} tokens per workload",
        },
    }


def plan(settings: Settings) -> list[tuple[str, float]]:
    """Return the stages of all arms with the seconds each is expected to take on two cores."""
    stages = [("extending the vocabulary", extend.SECONDS)] if settings.extends else []
    tokens = settings.num_prompts * settings.output_len
    speeds = {"stock": (150, 60, 25), "exact": (200, 120, 120), "plain": ()}
    for arm, speed in speeds.items():
        stages += [(f"{arm}: starting vllm serve", 30.0), (f"{arm}: texts to compare", 10.0)]
        stages += [
            (f"{arm}: vllm bench serve, {name}", 10.0 + 1.3 * tokens / per_second)
            for name, per_second in zip(WORKLOADS, speed, strict=False)
        ]
        stages += [(f"{arm}: profiling some steps, stopping", 15.0)] * bool(speed)
    return stages


def run(settings: Settings) -> int:
    """Run the demo, print its table, leave its reports and return the exit status; raise CliError on failure."""
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    settings.reports.mkdir(parents=True, exist_ok=True)
    record = describe(settings) | {"arms": {}}
    with (
        stopped_by_signals(),
        tempfile.TemporaryDirectory(prefix="specopt-demo-") as scratch,
        Stages(console, plan(settings)) as stages,
    ):
        served = settings
        if settings.extends:
            made, log = Path(scratch) / "pair", settings.reports / "demo-pair.log"
            with stages.next():
                folders = settings.target, settings.draft
                extend.extend(folders, made, log, settings.env(), stages.tick, vocab_size=VOCAB_SIZE)
            served = replace(settings, target=made / "target", draft=made / "draft")
        for name in ("stock", "exact", "plain"):
            record["arms"][name] = Arm(name, served, Path(scratch)).run(stages)
    record["texts"] = report.compare_texts(record["arms"])
    (settings.reports / "demo.json").write_text(json.dumps(record) + "\n")
    (settings.reports / "demo.md").write_text(report.markdown(record))
    left = ["demo.json", "demo.md"]
    if find_spec("matplotlib"):
        from vllm_specopt.cli.demo_plot import draw

        draw(record, settings.reports / "demo.png")
        left.append("demo.png")
    console.print(report.table(record))
    for line in [*report.sentences(record), "", *report.notes(record), "", *report.verdict(record)]:
        console.print(line, highlight=False, markup=False)
    for name in left:
        console.print(f"left: {settings.reports / name}", highlight=False, markup=False, soft_wrap=True)
    return report.exit_code(record)
