"""What stands in for the measuring of a repeat on a Ray cluster: it fails as it is told to, and leaves a process."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from vllm_specopt.benchmarks.processes import ChildProcess
from vllm_specopt.benchmarks.serve.cluster import here


@dataclass(frozen=True)
class FakePlan:
    """As much of a plan as is asked of it. Files in ``folder`` tell of each attempt at a repeat.

    hangs: The repeat whose first attempt waits for its end. dies: The repeat whose every attempt ends its worker.
    """

    repeats: int
    folder: str
    hangs: int
    dies: int

    def cells(self) -> list:
        """One cell per repeat."""
        return [SimpleNamespace(key=f"cell {repeat}", repeat=repeat) for repeat in range(self.repeats)]


def measure(plan: FakePlan, repeat: int) -> tuple[dict, dict]:
    """Measure a repeat: note the attempt, then do what the plan says."""
    attempt = len(list(Path(plan.folder).glob(f"{repeat}-*")))
    began = Path(plan.folder, f"{repeat}-{attempt}")
    began.touch()
    if repeat == plan.dies:
        os._exit(1)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    with ChildProcess(command, Path(plan.folder, f"log-{repeat}"), {}) as server:
        began.write_text(f"{os.getpid()} {server.process.pid}")
        time.sleep(600 if repeat == plan.hangs and attempt == 0 else 1)
    return here(), {"arms": {}, "cells": {f"cell {repeat}": {"attempt": attempt}}, "failed_cells": {}}
