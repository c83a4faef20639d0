"""`specopt ab --ray`: every repeat of a comparison is one task on a running Ray cluster; the record is the same.

A task keeps its GPU or CPU slots throughout, so all arms of a repeat are measured on one device; repeats spread over
the cluster. Its servers run one after another, and end with the worker that started them. Ray places the tasks, queues
them, and runs once more what it loses with a worker.
"""

from __future__ import annotations

import importlib.util
import logging
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from vllm_specopt.benchmarks.errors import CliError
from vllm_specopt.benchmarks.progress import Stages
from vllm_specopt.benchmarks.serve import comparison
from vllm_specopt.benchmarks.serve.plan import Plan
from vllm_specopt.benchmarks.serve.settings import Settings

RETRIES = 1
POLL_SECONDS, CONNECT_SECONDS = 0.5, 5.0


@contextmanager
def connected(address: str = "auto") -> Iterator[None]:
    """Connect this process to a running cluster, unless it is connected, and leave it again; raise CliError (2)."""
    if importlib.util.find_spec("ray") is None:
        raise CliError(f"Ray is not installed beside {sys.executable}: pip install 'vllm-specopt[ray]'.", 2)
    import ray

    if ray.is_initialized():
        yield
        return
    wanted = "start one with `ray start --head`, or give the address that it printed"
    try:
        host, _, port = address.rpartition(":")
        if host and "://" not in address:
            # Where nothing listens, Ray itself would try for minutes.
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise CliError(f"no Ray cluster answers at {address}: {wanted}.", 2) from error
    try:
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class Cluster:
    """A running Ray cluster as the place of a comparison (``command.Elsewhere``).

    address: As ``ray.init`` takes it.
    gpus, cpus: What one server takes.
    """

    address: str
    gpus: float
    cpus: float

    def stages(self, plan: Plan) -> list[tuple[str, float]]:
        """Return one stage: repeats overlap, and how many do is known only once the cluster answers."""
        seconds = sum(seconds for _, seconds in comparison.stages(plan))
        return [(f"{plan.repeats} repeats on the Ray cluster at {self.address}", seconds)]

    def run(
        self, plan: Plan, record: dict, save: Callable[[], None], progress: Stages, measure: Callable | None = None
    ) -> None:
        """Run the repeats of which a cell is missing, adding each to the record as it arrives.

        Args:
            plan: The comparison.
            record: Its record; ``record["placements"]`` says where each repeat ran.
            save: Called after each repeat.
            progress: Shows where the run is.
            measure: What a task runs: (plan, repeat) to (where it ran, its part of the record).

        Raises:
            CliError: Ray, a cluster, or a node that can hold a server is missing.
        """
        with progress.next(), connected(self.address):
            import ray

            self.check_capacity()
            task = ray.remote(measure or measure_repeat)
            task = task.options(num_gpus=self.gpus, num_cpus=self.cpus, max_retries=RETRIES)
            missing = {cell.repeat for cell in plan.cells() if cell.key not in record["cells"]}
            waiting = {task.remote(plan, repeat): repeat for repeat in sorted(missing)}
            while waiting:
                done, _ = ray.wait(list(waiting), timeout=POLL_SECONDS)
                progress.tick()
                for reference in done:
                    repeat = waiting.pop(reference)
                    entry: dict = {"repeat": repeat, "host": "unknown", "gpus": [], "outcome": "done"}
                    try:
                        where, part = ray.get(reference)
                        entry |= where
                        add(record, part)
                    except ray.exceptions.RayError as error:
                        entry["outcome"] = f"lost: {str(error).strip().splitlines()[-1].strip()}"
                        lost = [cell.key for cell in plan.cells() if cell.repeat == repeat]
                        record["failed_cells"] |= dict.fromkeys(lost, entry["outcome"])
                    record.setdefault("placements", []).append(entry)
                    save()
                    progress.say(f"repeat {repeat + 1}: {entry['outcome']} on {entry['host']}")

    def check_capacity(self) -> None:
        """Raise CliError where no node of the connected cluster can hold a server: Ray would wait for one."""
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(node.get("GPU", 0) >= self.gpus and node.get("CPU", 0) >= self.cpus for node in nodes):
            wanted = f"{self.gpus:g} GPU and {self.cpus:g} CPU" if self.gpus else f"{self.cpus:g} CPU"
            raise CliError(f"none of the cluster's {len(nodes)} nodes has {wanted} for a server.", 2)


def add(record: dict, part: dict) -> None:
    """Add what one repeat brought to the record of the whole comparison."""
    for arm, found in part["arms"].items():
        # Every repeat brings its own texts, profile and memory: the first to arrive stands for the arm.
        record["arms"][arm] = found | record["arms"].get(arm, {})
    record["cells"] |= part["cells"]
    failed = record["failed_cells"] | part["failed_cells"]
    record["failed_cells"] = {key: why for key, why in failed.items() if key not in record["cells"]}


def here() -> dict:
    """Return where a task runs."""
    import ray

    gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
    return {"host": f"{socket.gethostname()} ({ray.util.get_node_ip_address()})", "gpus": gpus}


def measure_repeat(plan: Plan, repeat: int) -> tuple[dict, dict]:
    """Measure one repeat where this runs, arm after arm; an arm that fails is told in its part of the record."""
    record: dict[str, dict] = {"arms": {}, "cells": {}, "failed_cells": {}}
    for arm in plan.timed_arms()[:: 1 if repeat % 2 == 0 else -1]:
        part = replace(plan, only=(arm.name, repeat))
        with tempfile.TemporaryDirectory(prefix="specopt-ab-") as folder:
            out, scratch = Path(folder, "out"), Path(folder, "scratch")
            out.mkdir()
            scratch.mkdir()
            # Why an arm failed is in the record.
            with suppress(CliError), Stages(Console(width=140), comparison.stages(part)) as progress:
                comparison.Served(Settings(part, out, True, 0, ()), record, scratch, progress).run()
    return here(), record
