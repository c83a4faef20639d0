"""Arms as engines without a server: one process (``engine.py``) per arm, repeat and number of requests in flight.

Within a repeat the arms take turns, there and back, and the i-th run of an arm is compared with the i-th of the
baseline, its neighbour in time.
"""

from __future__ import annotations

import itertools
import json
import os
from functools import partial
from pathlib import Path

from vllm_specopt.benchmarks.errors import CliError
from vllm_specopt.benchmarks.processes import answer
from vllm_specopt.benchmarks.serve import engine, scopes, servers
from vllm_specopt.benchmarks.serve.arms import Arm
from vllm_specopt.benchmarks.serve.comparison import Comparison
from vllm_specopt.benchmarks.serve.plan import GREEDY, Cell, Plan

WARMUP_LEN = 6
# Seconds on two quiet cores, for the progress bar only.
START_SECONDS, SECONDS_PER_TOKEN = 14.0, 0.01


class Offline(Comparison):
    """A comparison of offline engines."""

    def run(self) -> None:
        """Run every engine of which a cell is missing."""
        self.extend()
        for arm, slots, repeat in runs(self.plan):
            with self.stages.next():
                cells = [Cell(arm.name, str(point), slots, repeat) for point in self.plan.points]
                if any(cell.key not in self.record["cells"] for cell in cells):
                    self.guard(arm.name, partial(self._run, arm, cells))

    def _run(self, arm: Arm, cells: list[Cell]) -> None:
        first = cells[0]
        profiles = self.scratch / f"{first.concurrency}-{first.repeat}-{list(self.plan.timed_arms()).index(arm)}"
        asked = request(self.plan, arm, first.concurrency, first.repeat, profiles)
        result, log = answer(
            engine.__name__, asked, self.scratch, environment(self.plan), self.stages.tick, self.log(arm)
        )
        result["compiled_in_flight"] = engine.compiled_in_flight(log)
        if wrong := engine.problem(arm, result):
            raise CliError(f"{wrong}.")
        for cell in cells:
            self.record["cells"][cell.key] = as_cell(result["workloads"][cell.point], result)
        found = self.record["arms"][arm.name]
        for name, key in (("peak_mib", "peak_mib"), ("gpu_mib", "gpu_peak_mib")):
            peaks = [work[key] for work in result["workloads"].values()] + [found.get(name)]
            found[name] = max((peak for peak in peaks if peak is not None), default=None)
        greedy = result["workloads"].get(GREEDY)
        found.setdefault("texts", {GREEDY: greedy["token_ids"]} if greedy else {})
        if "scopes" not in found:
            traces = {cell.point: profiles.glob(f"P{number}_*.pt.trace.json*") for number, cell in enumerate(cells)}
            found["scopes"] = {point: scopes.summarise(files) for point, files in traces.items()}


def runs(plan: Plan) -> list[tuple[Arm, int, int]]:
    """Return the engines to run as (arm, requests in flight, repeat), in order."""
    arms = {arm.name: arm for arm in plan.timed_arms()}
    found = dict.fromkeys((cell.arm, cell.concurrency, cell.repeat) for cell in plan.cells())
    return [(arms[name], slots, repeat) for name, slots, repeat in found]


def request(plan: Plan, arm: Arm, slots: int, repeat: int, profiles: Path) -> dict:
    """Return what ``engine.py`` is asked for one run; the arms differ by the option and the repair only."""
    prompts = itertools.islice(itertools.cycle(plan.workload.prompts), plan.requests(slots))
    llm = {
        "model": plan.target,
        "speculative_config": plan.speculation,
        "max_num_seqs": slots,
        "enforce_eager": plan.on_cpu,
        "distributed_executor_backend": "uni",
        "disable_log_stats": False,
        "enable_prefix_caching": False,
        "seed": plan.seed + repeat,
    }
    if arm.option:
        llm["additional_config"] = {"specopt": arm.option}
    asked: dict = {
        "llm": llm | engine_arguments(plan.serve_args),
        "repair": arm.repair,
        "prompts": [text if isinstance(text, str) else {"prompt_token_ids": text} for text in prompts],
        "warmup_len": WARMUP_LEN,
        "output_len": plan.output_len,
        "keep_token_ids": True,
        "workloads": {str(point): point.sampling() for point in plan.points},
    }
    if plan.on_cpu and repeat == 0:
        asked["llm"] |= {"profiler_config": servers.profiler(profiles)}
        asked["traced"] = {"tokens": servers.PROFILED_TOKENS, "steps": servers.PROFILED_STEPS}
    return asked


def engine_arguments(serve_args: tuple[str, ...]) -> dict:
    """Return arguments of `vllm serve` as those of ``LLM``; raise CliError (2) for one without its value."""
    found: dict = {}
    for part in serve_args:
        name, given, value = part.removeprefix("--").partition("=")
        if not part.startswith("--"):
            raise CliError(f"--serve-arg is {part!r}: offline, give each as --name=value.", 2)
        try:
            found[name.replace("-", "_")] = json.loads(value) if given else True
        except json.JSONDecodeError:
            found[name.replace("-", "_")] = value
    return found


def environment(plan: Plan) -> dict[str, str]:
    """Return the environment variables of every run; on a CPU with vLLM's own number of threads unless one is set."""
    found = {key: value for key, value in engine.ENV.items() if plan.on_cpu or not key.startswith("VLLM_CPU_")}
    found["VLLM_CUSTOM_SCOPES_FOR_PROFILING"] = "1"
    # What vLLM itself takes: it leaves one to the rest of the server.
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) - 1))
    return found | ({"OMP_NUM_THREADS": threads} if plan.on_cpu else {})


def as_cell(work: dict, result: dict) -> dict:
    """Return what the record keeps of one timed generation."""
    requests, tokens = len(work["token_ids"]), work["tokens"]
    return {
        "completed": requests,
        "duration": work["seconds"],
        "total_output_tokens": tokens,
        "requests_per_s": requests / work["seconds"],
        "tokens_per_s": tokens / work["seconds"],
        "tokens_per_cpu_s": tokens / work["cpu_seconds"],
        "num_drafts": work["drafts"],
        "draft_tokens": work["draft_tokens"],
        "accepted_tokens": work["accepted_tokens"],
        "accepted_per_position": [],
        "threads": result["threads"],
        "load_average": round(result["load_average"], 2),
    }


def stages(plan: Plan) -> list[tuple[str, float]]:
    """Return the parts of an offline comparison in order, with the seconds each is expected to take."""
    return [
        (
            f"{arm.name}, {slots} in flight, repeat {repeat + 1}",
            START_SECONDS + SECONDS_PER_TOKEN * plan.requests(slots) * plan.output_len * len(plan.points),
        )
        for arm, slots, repeat in runs(plan)
    ]
