"""Run the repeats of a comparison over a local Ray cluster of several nodes, ending one worker process on the way.

Usage: ``python ray_ab.py REQUEST.json RESULT.json``. The request has ``nodes`` (logical GPUs per node) and ``plan``,
see ``ray_cell.FakePlan``; the worker that hangs is killed (SIGKILL) as soon as it has started its process.
"""

import json
import os
import signal
import sys
from pathlib import Path

import psutil
from ray_cell import FakePlan, measure
from ray_cluster import local_cluster
from rich.console import Console

from vllm_specopt.benchmarks.errors import CliError
from vllm_specopt.benchmarks.progress import Stages
from vllm_specopt.benchmarks.serve.cluster import Cluster


def main(request_path: str, result_path: str) -> None:
    """Run the request and write the record, and what is left of the killed attempt."""
    request = json.loads(Path(request_path).read_text())
    plan = FakePlan(**request["plan"])
    began = Path(plan.folder, f"{plan.hangs}-0")
    killed: list[int] = []

    class Killing(Stages):
        def tick(self) -> None:
            if not killed and began.exists() and (text := began.read_text()):
                killed.extend(map(int, text.split()))
                os.kill(killed[0], signal.SIGKILL)
            super().tick()

    record = {"arms": {}, "cells": {}, "failed_cells": {}}
    with local_cluster(request["nodes"]), Killing(Console(), [("repeats", 1.0)]) as progress:
        Cluster("auto", 1, 1).run(plan, record, lambda: None, progress, measure)
        try:
            Cluster("auto", 2, 1).check_capacity()
        except CliError as error:
            record["too_large"] = str(error)
    still = [pid for pid in killed if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    Path(result_path).write_text(json.dumps(record | {"killed": killed, "alive": still}))


if __name__ == "__main__":
    main(*sys.argv[1:])
