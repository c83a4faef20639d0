"""Where a first run reads and writes, and which kind of run it is."""

from __future__ import annotations

import json
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = ROOT / "scripts" / "gpu"
BUNDLE = Path(os.environ.get("SPECOPT_BUNDLE", ROOT / ".gpu"))
UNPACKED = Path(os.environ.get("SPECOPT_UNPACKED", "/tmp/specopt-gpu"))
"""Everything that need not come back: vLLM, models, Triton's cache."""
RESULTS = UNPACKED / "results"
OUT = Path(os.environ.get("OUT", ROOT / "reports" / "gpu-first"))
PAIR = UNPACKED / "pair"

REHEARSE = os.environ.get("SPECOPT_REHEARSE") == "1"
"""A CPU and Triton's interpreter, tiny sizes."""
STANDIN = os.environ.get("SPECOPT_STANDIN") == "1"
"""Libraries in place of a GPU, which compute nothing."""

WELL = "ended well"
"""What became of a step, at best."""


def save(name: str, value: object) -> None:
    """Write a result as JSON, whole at any moment."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps(value, indent=1) + "\n")
    scratch.replace(path)


def load(name: str, default):
    """Read a result, ``default`` where there is none."""
    try:
        return json.loads((RESULTS / f"{name}.json").read_text())
    except (OSError, ValueError):
        return default


def tail(path: Path, size: int = 1500) -> str:
    """The end of a text file, nothing where there is none."""
    return path.read_text(errors="replace")[-size:] if path.is_file() else ""
