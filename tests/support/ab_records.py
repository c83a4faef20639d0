"""Plans and made-up records of `specopt ab`, for tests of what is computed from them."""

import json
import math
import random
from pathlib import Path

from vllm_specopt.benchmarks.serve.arms import Arm
from vllm_specopt.benchmarks.serve.plan import Plan, Point
from vllm_specopt.benchmarks.serve.workloads import workload

PROMPTS = Path(__file__).parents[2] / "models" / "prompts.jsonl"
REPAIRED, EXACT = Arm("stock-repaired", repair=True), Arm("exact", {"method": "exact"})


def make_plan(**changed) -> Plan:
    settings = {
        "arms": (REPAIRED, EXACT), "target": "target", "served_name": "target",
        "speculation": {"num_speculative_tokens": 4}, "workload": workload("shipped", 8, PROMPTS, 512, 0),
        "concurrency": (1, 8), "points": (Point(0.0), Point(1.0, 0.9)), "num_prompts": None, "output_len": 8,
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
    arms = {
        arm.name: {"texts": {point: [[1, 2], [3, 4]] for point in plan.compared(arm)}, "kv_cache_tokens": 4096}
        for arm in plan.all_arms()
    }
    return {
        "time": "2026-01-01T00:00:00+00:00", "command": "specopt ab", "git": {"commit": "0" * 40, "dirty": False},
        "machine": {"device": "cpu", "name": "a CPU", "cores": 2, "load_average_before": 0.1},
        "versions": {"python": "3.11"}, "config": json.loads(json.dumps(plan.describe())), "arms": arms,
        "cells": cells, "failed_cells": {}, "notices": [], "seconds": 9,
    }  # fmt: skip
