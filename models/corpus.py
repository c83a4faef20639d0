"""The text of the model pair: Python's standard library, split by file into train and held-out."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path

EXCLUDED_PARTS = frozenset(
    {
        "__phello__",
        "__pycache__",
        "encodings",
        "ensurepip",
        "idle_test",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
MIN_BYTES = 1500
HELD_OUT_ONE_IN = 8


def is_held_out(name: str) -> bool:
    """Tell whether the file `name` (its POSIX path inside the standard library) is kept out of training."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def standard_library() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def collect(root: Path | None = None) -> dict[str, str]:
    """Read the corpus as {POSIX path inside the library: text}, in the order of the paths.

    Tests, character tables, generated build settings and very short files are left out.
    """
    root = root or standard_library()
    files: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        generated = relative.name.startswith("_sysconfigdata") or relative.parts[0].startswith("config-")
        if generated or EXCLUDED_PARTS & set(relative.parts) or path.stat().st_size < MIN_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        files[relative.as_posix()] = text
    return files


def split(files: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Split the corpus into (train, held-out) by the hash of each file's path."""
    train = {name: text for name, text in files.items() if not is_held_out(name)}
    held_out = {name: text for name, text in files.items() if is_held_out(name)}
    return train, held_out
