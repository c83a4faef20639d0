"""Extends the vocabulary of a pair of models for a benchmark, in a process of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from vllm_specopt.benchmarks.errors import CliError
from vllm_specopt.benchmarks.processes import ChildProcess

SECONDS = 12.0


def extend(
    folders: tuple[Path, Path], made: Path, log: Path, env: dict[str, str], tick: Callable[[], None],
    prompts: Path | None = None, **extension: int,
) -> dict:  # fmt: skip
    """Write a pair with more tokens to ``made/target`` and ``made/draft`` and return what was measured on it.

    Args:
        folders: Target and draft to start from.
        made: The folder of the new pair.
        log: Where the process writes.
        env: Environment variables to add for it.
        tick: Called while it runs.
        prompts: The prompts to measure on; None takes the shipped ones.
        extension: What ``python -m vllm_specopt.benchmarks.serve.wide_pair`` takes: ``vocab_size``, ``width``,
            ``extra_target_layers``.

    Raises:
        CliError: The process failed.
    """
    command = [sys.executable, "-m", "vllm_specopt.benchmarks.serve.wide_pair", str(made)]
    command += [part for name, value in extension.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    for name, value in (("target", folders[0]), ("draft", folders[1]), ("prompts", prompts)):
        command += [f"--{name}", str(value.resolve())] if value else []
    with ChildProcess(command, log, env) as child:
        if status := child.wait(tick):
            lines = child.last_lines()
            raise CliError(f"the vocabulary could not be extended (status {status}); the end of its log:\n{lines}")
    return json.loads((made / "wide_pair.json").read_text())
