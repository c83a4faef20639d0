"""Whether a folder can take what a run will leave in it, or holds a model: asked before anything is measured."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from vllm_specopt.benchmarks.errors import CliError


def make_writable(folder: Path) -> None:
    """Create a folder where there is none, and write a file in it that is gone at once.

    Raises:
        OSError: One of the two cannot be done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def model(name: str, role: str) -> str:
    """A model's resolved folder, or its name on a hub, which vLLM finds in its cache; raise CliError (2) otherwise."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return str(folder.resolve())
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise CliError(f"{folder} is no model folder (it has no config.json): name the {role} model.", 2)
    return name
