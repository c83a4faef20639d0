"""`specopt ab --ray`: every arm of every repeat is a placement on a Ray cluster; the record is the same."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from rich.console import Console

from vllm_specopt.benchmarks.errors import CliError
from vllm_specopt.benchmarks.progress import Stages
from vllm_specopt.benchmarks.serve import cluster
from vllm_specopt.benchmarks.serve.arms import Arm
from vllm_specopt.benchmarks.serve.comparison import Comparison, stages
from vllm_specopt.benchmarks.serve.plan import Cell, Plan
from vllm_specopt.benchmarks.serve.settings import Settings
from vllm_specopt.benchmarks.serve.workloads import Workload


@dataclass(frozen=True)
class Part(Plan):
    """What one placement runs of a plan: one arm (the noise arm is one) in one repeat."""

    arm: str = ""
    repeat: int = 0

    def all_arms(self) -> list[Arm]:
        """Return the arm."""
        return [arm for arm in super().all_arms() if arm.name == self.arm]

    def cells(self) -> list[Cell]:
        """Return the cells of the arm and the repeat."""
        return [cell for cell in super().cells() if cell.repeat == self.repeat]


@dataclass(frozen=True)
class Cluster:
    """A running Ray cluster as the place of a comparison (``ab.Elsewhere``).

    address: As ``ray.init`` takes it.
    slot: What one server takes.
    """

    address: str
    slot: cluster.Slot

    def stages(self, plan: Plan) -> list[tuple[str, float]]:
        """Return one stage: placements overlap, and how many do is known only once the cluster answers."""
        parts = [Part(**_fields(plan), arm=arm.name) for arm in plan.all_arms()]
        seconds = sum(seconds for part in parts for _, seconds in stages(part))
        count = plan.repeats * len(parts)
        return [(f"{count} placements on the Ray cluster at {self.address}", plan.repeats * seconds)]

    def run(self, plan: Plan, record: dict, save: Callable[[], None], progress: Stages) -> None:
        """Run what is missing in a record, adding each placement as it arrives.

        Every cell of a placement carries ``attempts`` and ``node``; ``record["placements"]`` keeps the failures.

        Raises:
            CliError: Ray, a cluster, or a node that can hold a server is missing.
        """
        missing = {(cell.arm, cell.repeat) for cell in plan.cells() if cell.key not in record["cells"]}
        wanted = [
            cluster.Placement(arm.name, repeat, {"plan": asdict(plan), "arm": arm.name, "repeat": repeat})
            for repeat in range(plan.repeats)
            for arm in plan.all_arms()[:: 1 if repeat % 2 == 0 else -1]
            if (arm.name, repeat) in missing
        ]

        def keep(entry: dict) -> None:
            add(plan, record, entry)
            save()
            progress.say(described(entry))

        try:
            with progress.next(), cluster.connected(self.address):
                cluster.run(wanted, f"{__name__}:measure", self.slot, keep, progress.tick)
        except cluster.ClusterError as error:
            raise CliError(str(error), 2) from error


def described(entry: dict) -> str:
    """Return a line on a placement that is through."""
    where = entry["node"].get("host", "an unknown node")
    where += "".join(f", GPU {gpu}" for gpu in entry["node"].get("gpus", []))
    failed = f", after {len(entry['failures'])} failed" if entry["failures"] else ""
    state = "lost" if entry["lost"] else "done"
    return f"{entry['arm']}, repeat {entry['repeat'] + 1}: {state} on {where}{failed}"


def add(plan: Plan, record: dict, entry: dict) -> None:
    """Add what one placement brought to the record of the whole comparison."""
    found = entry.pop("result")
    entry["lost"] = found is None
    record.setdefault("placements", []).append(entry)
    arm = record["arms"].setdefault(entry["arm"], {})
    if found is None:
        lost = [cell.key for cell in plan.cells() if (cell.arm, cell.repeat) == (entry["arm"], entry["repeat"])]
        record["failed_cells"] |= dict.fromkeys(lost, entry["failures"][-1])
        return
    # Every repeat brings its own greedy completions, profile and memory: the first to arrive stands for the arm.
    arm |= {name: value for name, value in found["arms"][entry["arm"]].items() if name not in arm}
    marks = {"attempts": entry["attempts"], "node": entry["node"]}
    for key, cell in found["cells"].items():
        record["cells"][key] = cell | marks
        record["failed_cells"].pop(key, None)


def measure(settings: dict) -> dict:
    """Measure one placement where this runs and return its part of the record; raise CliError if any of it failed."""
    part = rebuilt(settings["plan"], settings["arm"], settings["repeat"])
    record: dict[str, dict] = {"arms": {}, "cells": {}, "failed_cells": {}}
    with tempfile.TemporaryDirectory(prefix="specopt-ab-") as folder:
        out, scratch = Path(folder, "out"), Path(folder, "scratch")
        out.mkdir()
        scratch.mkdir()
        with Stages(Console(width=140), stages(part)) as progress:
            Comparison(Settings(part, out, True, 0, ()), record, scratch, progress).run()
    failures = [record["arms"][part.arm].get("error"), *record["failed_cells"].values()]
    if failure := next(filter(None, failures), None):
        raise CliError(failure)
    return record


def rebuilt(plan: dict, arm: str, repeat: int) -> Part:
    """Return the part of a plan that has been through JSON."""
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in plan.items()
        if key in {field.name for field in fields(Plan)}
    }
    values["arms"] = tuple(Arm(**each) for each in plan["arms"])
    load = plan["workload"]
    values["workload"] = Workload(**load | {"args": tuple(load["args"]), "prompts": tuple(load["prompts"])})
    return Part(**values, arm=arm, repeat=repeat)


def _fields(plan: Plan) -> dict:
    return {field.name: getattr(plan, field.name) for field in fields(Plan)}
