"""`specopt ab`: keeps the record, has what is missing in it run, and leaves its views."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from rich.console import Console

from vllm_specopt.benchmarks import record as records
from vllm_specopt.benchmarks.errors import CliError
from vllm_specopt.benchmarks.folders import make_writable
from vllm_specopt.benchmarks.processes import stopped_by_signals
from vllm_specopt.benchmarks.progress import Stages
from vllm_specopt.benchmarks.serve import comparison, fit, offline, plots, report
from vllm_specopt.benchmarks.serve.comparison import RECORD
from vllm_specopt.benchmarks.serve.plan import Plan, changed_setting
from vllm_specopt.benchmarks.serve.settings import Settings, wide_pair


class Elsewhere(Protocol):
    """Runs a plan's cells on other machines than this."""

    def stages(self, plan: Plan) -> list[tuple[str, float]]:
        """Return the parts of a run in order, with the seconds each is expected to take."""

    def run(self, plan: Plan, record: dict, save: Callable[[], None], progress: Stages) -> None:
        """Run what is missing in a record and add it there, calling `save` after each part."""


def begin(settings: Settings, argv: list[str]) -> tuple[dict, bool]:
    """Return the record to go on with and whether it is an old one; raise CliError (2) if that has other settings."""
    path = settings.out / RECORD
    now = records.conditions(argv)
    try:
        if settings.fresh and settings.out.is_dir():
            drop(settings.out)
        make_writable(settings.out)
        old = json.loads(path.read_text()) if path.exists() else None
    except OSError as error:
        raise CliError(
            f"{settings.out} cannot be written ({error.strerror}): name another folder with -o.", 2
        ) from error
    except ValueError as error:
        raise CliError(f"{path} is no record of specopt ab: --fresh starts over.", 2) from error
    now["config"] = fit.fitted(settings.plan, old or {}).describe()
    changed = None
    if old is not None:
        changed = changed_setting(old.get("config", {}), now["config"])
        changed = changed or changed_setting(old.get("versions", {}), now["versions"])
        if changed and not old.get("cells"):
            # Nothing was measured: there is nothing to lose.
            drop(settings.out)
            old = None
    if old is None:
        return now | {"arms": {}, "cells": {}, "failed_cells": {}}, False
    if changed:
        raise CliError(f"{settings.out} holds a run with other settings ({changed}): --fresh starts over.", 2)
    for found in old["arms"].values():
        found.pop("error", None)
    return old, True


def drop(out: Path) -> None:
    """Remove the record in a folder, and the models that were made for it."""
    (out / RECORD).unlink(missing_ok=True)
    shutil.rmtree(wide_pair(out)[0].parent, ignore_errors=True)


def finished(record: dict, plan: Plan) -> bool:
    """Whether nothing is missing in a record."""
    return all(cell.key in record["cells"] for cell in plan.cells()) and all(
        "scopes" in record["arms"].get(arm.name, {}) or arm.url for arm in plan.timed_arms()
    )


def run(settings: Settings, argv: list[str], elsewhere: Elsewhere | None = None) -> int:
    """Run `specopt ab`, print its table, leave its reports and return the exit status (0, or 1 if something failed).

    Args:
        settings: A checked request.
        argv: The command line, for the record.
        elsewhere: What runs the missing cells in place of this machine, see :class:`Elsewhere`.
    """
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)
    record, resumed = begin(settings, argv)
    settings = replace(settings, plan=fit.fitted(settings.plan, record))
    for notice in settings.notices:
        console.print(f"notice: {notice}", highlight=False, markup=False)
    if resumed:
        done = f"{len(record['cells'])} of {len(settings.plan.cells())} cells are done in {settings.out}"
        console.print(f"going on: {done} (--fresh starts over)", highlight=False, markup=False)
    record["notices"] = list(settings.notices)
    if not finished(record, settings.plan):
        try:
            measure(settings, record, console, elsewhere)
        except CliError:
            if not record["cells"]:
                drop(settings.out)
            raise
    report.show(record, console)
    for path in write_reports(record, settings.out):
        console.print(f"left: {path}", highlight=False, markup=False, soft_wrap=True)
    return report.exit_code(record)


def measure(settings: Settings, record: dict, console: Console, elsewhere: Elsewhere | None) -> None:
    """Add to a record what is missing in it."""
    started, plan = time.monotonic(), settings.plan
    parts = (elsewhere or (offline if plan.offline else comparison)).stages(plan)
    parts = [("extending the vocabulary", comparison.EXTENSION_SECONDS)] * bool(settings.extended) + parts
    kind = offline.Offline if plan.offline else comparison.Served
    with (
        stopped_by_signals(),
        tempfile.TemporaryDirectory(prefix="specopt-ab-") as scratch,
        Stages(console, parts, is_known=bool(plan.minutes)) as progress,
    ):
        running = kind(settings, record, Path(scratch), progress)
        if elsewhere:
            elsewhere.run(plan, record, running.save, progress)
        else:
            running.run()
        record["seconds"] = round(record.get("seconds", 0) + time.monotonic() - started)
        running.save()
    if settings.extended and finished(record, running.plan):
        shutil.rmtree(wide_pair(settings.out)[0].parent, ignore_errors=True)


def write_reports(record: dict, out: Path) -> list[Path]:
    """Write the views of a record beside it and return the paths of all three."""
    (out / "report.md").write_text(report.markdown(record))
    plots.draw(record, out / "report.png")
    return [out / RECORD, out / "report.md", out / "report.png"]
