"""`specopt doctor`: what `vllm_specopt.integration.diagnosis` finds, as a table or as JSON."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

import vllm_specopt
from vllm_specopt.benchmarks import folders
from vllm_specopt.benchmarks.errors import CliError, checked_option, json_object
from vllm_specopt.integration.diagnosis import DEFAULT_OPTION, DRAFTS, NOTE, OK, PROBLEM, Check, examine

CHECKOUT = Path(vllm_specopt.__file__).parents[1]
STYLE = {OK: "green", NOTE: "yellow", PROBLEM: "bold red"}


def run(model: str | None, speculative_config: str | None, additional_config: str | None, as_json: bool) -> int:
    """Run every check, print them, and return the exit status: 0 all good, 1 a problem.

    Args:
        model: Target model; None takes the shipped pair, or checks only the installation where that is not there.
        speculative_config, additional_config: As JSON, as given to ``vllm serve``.
        as_json: Print one JSON object in place of the table.

    Raises:
        CliError: An argument is malformed (exit status 2).
    """
    arguments = _arguments(model, speculative_config, additional_config)
    with _quiet():
        checks = examine(arguments)
    problems = [check.sentence for check in checks if check.status == PROBLEM]
    if as_json:
        print(json.dumps({"ok": not problems, "checks": [asdict(check) for check in checks]}, indent=1))
    else:
        _show(checks, problems)
    return 1 if problems else 0


def _arguments(model: str | None, speculative_config: str | None, additional_config: str | None) -> dict | None:
    """Arguments for ``EngineArgs``; None where neither a model is named nor the shipped pair is there."""
    speculative = speculative_config and json_object("--speculative-config", speculative_config)
    additional = checked_option(json_object("--additional-config", additional_config or DEFAULT_OPTION))
    if speculative:
        folders.drafting(speculative)
    models = CHECKOUT / "models"
    if model is None:
        if not (models / "specopt-target" / "config.json").is_file():
            if speculative_config or additional_config:
                raise CliError("a configuration is given without --model, and the shipped pair is not here.", 2)
            return None
        model = str(models / "specopt-target")
        shipped = {"model": str(models / "specopt-draft"), "num_speculative_tokens": DRAFTS}
        speculative = speculative or shipped
    return {"model": folders.model(model, "target"), "speculative_config": speculative, "additional_config": additional}


@contextlib.contextmanager
def _quiet():
    """Keep vLLM's log from the answer, which alone goes to standard output; leave the environment as it was."""
    before = dict(os.environ)
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # On a CPU it warns, before vLLM's level counts, that it does without the Triton that is installed.
    triton = logging.getLogger("vllm.triton_utils.importing")
    level = triton.level
    triton.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        triton.setLevel(level)
        os.environ.clear()
        os.environ.update(before)


def _show(checks: list[Check], problems: list[str]) -> None:
    console = Console()
    table = Table("check", "", "found", title="specopt doctor", title_justify="left")
    for check in checks:
        table.add_row(check.name, f"[{STYLE[check.status]}]{check.status}[/]", check.found)
    console.print(table)
    notes = [check.sentence for check in checks if check.status == NOTE]
    for line in problems + notes:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if not problems:
        console.print("All good.", highlight=False)
