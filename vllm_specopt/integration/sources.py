"""The parts of a vLLM that the adapters rely on, read from its folder, and what differs from the last known ones."""

from __future__ import annotations

import difflib
import importlib.util
import re
from dataclasses import dataclass
from pathlib import Path

from vllm_specopt.integration import compat

KNOWN, UNKNOWN, MISSING = "known", "not known", "missing"


@dataclass(frozen=True)
class Part:
    """One part of vLLM as it is found in a folder.

    runner: The model runner that needs it.
    path, name: The file within the package, and what in it is meant.
    fingerprint: Of its source; empty if it is not there.
    state: Whether that is one of the known ones.
    diff: From the same part of the other vLLM to this one; empty without another, or where they agree.
    """

    runner: str
    path: str
    name: str
    fingerprint: str
    state: str
    diff: str


def examine(root: Path, other: Path | None = None) -> list[Part]:
    """Every part of either runner in a vLLM, and its difference from another."""
    found = []
    for runner, parts in compat.PARTS.items():
        for (path, name), known in parts.items():
            mark = compat.fingerprint(root / path, name)
            state = MISSING if mark is None else KNOWN if mark in known else UNKNOWN
            found.append(Part(runner, path, name, mark or "", state, _diff(root, other, path, name)))
    return found


def sentences(parts: list[Part], root: Path, other: Path | None) -> list[str]:
    """What the table shows, in words, and the diffs."""
    differ = [part for part in parts if part.state != KNOWN]
    known = ", ".join(f"{release}.x" for release in compat.VERSIONS)
    found = [f"All {len(parts)} parts are as in the vLLM that this package knows ({known})."]
    if differ:
        found = [f"{len(differ)} of {len(parts)} parts are not as in the vLLM that this package knows ({known}):"]
        found += [f"  {part.runner}: {part.name} in {part.path} is {part.state}" for part in differ]
        if other is None:
            found.append("Name the folder of a vLLM that is known with --against, and the differences are printed.")
    if other is None:
        return found
    # Parts that both runners need are listed once for each.
    diffs = list(dict.fromkeys(part.diff for part in parts if part.diff))
    found.append(f"{len(diffs)} parts differ between vLLM {version(other)} in {other} and this one.")
    return [*found, *diffs]


def installed() -> Path:
    """The folder of the installed vLLM; LookupError where there is none."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        raise LookupError("vLLM is not installed here: name the folder of one with --vllm.")
    return Path(spec.origin).parent


def package(folder: Path) -> Path:
    """The package in a folder, or the folder itself if it is the package; LookupError where it is neither."""
    for place in (folder, folder / "vllm"):
        if (place / "sampling_params.py").is_file() and (place / "v1").is_dir():
            return place
    raise LookupError(f"{folder} holds no vLLM (neither it nor {folder / 'vllm'} has v1/ and sampling_params.py).")


def version(root: Path) -> str:
    """The version that a vLLM's folder names."""
    path = root / "_version.py"
    text = path.read_text() if path.is_file() else ""
    found = re.search(r"^(?:__version__ = )?(?:version = )?['\"](\d[^'\"]*)", text, re.MULTILINE)
    return found[1] if found else "of an unknown version"


def _diff(root: Path, other: Path | None, path: str, name: str) -> str:
    if other is None:
        return ""
    before, after = (compat.source(folder / path, name) or [] for folder in (other, root))
    lines = difflib.unified_diff(before, after, f"{other / path} {name}", f"{root / path} {name}", lineterm="", n=5)
    return "\n".join(lines)
