"""Whether a folder can take what a run will leave in it: asked before anything is measured."""

from __future__ import annotations

import tempfile
from pathlib import Path


def make_writable(folder: Path) -> None:
    """Create a folder where there is none, and write a file in it that is gone at once.

    Raises:
        OSError: One of the two cannot be done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass
