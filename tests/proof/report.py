"""The table of a run: on the console, as Markdown, and as JSON."""

import json
import platform
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from rich.table import Table

from proof.jobs import SECTIONS, Row

COLUMNS = ("section", "case", "backend", "count", "chi-square p", "TV", "bound", "verdict")


def save(path: Path, conditions: dict, rows: list[Row], seconds: float, workers: int) -> None:
    """Write the rows and what they were run with; replaces the file in one step."""
    packages = {name: version(name) for name in ("torch", "triton", "numba", "numpy", "scipy")}
    record = {
        "conditions": {
            **conditions,
            "machine": platform.machine(),
            "python": platform.python_version(),
            "packages": packages,
        },
        "workers": workers,
        "seconds": round(seconds, 1),
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1))
    part.replace(path)


def load(path: Path, conditions: dict) -> list[Row]:
    """Rows of an earlier run that passed, if it had the same seed and size."""
    if not path.exists():
        return []
    record = json.loads(path.read_text())
    if any(record["conditions"].get(key) != value for key, value in conditions.items()):
        return []
    rows = [Row(**row) for row in record["rows"]]
    failed = {row.job for row in rows if not row.passed}
    return [row for row in rows if row.job not in failed]


def merge(rows: list[Row]) -> list[Row]:
    """In the order of the sections, with the chunks of one row added up."""
    merged: dict[tuple, Row] = {}
    for row in rows:
        key = (SECTIONS.index(row.section), row.backend, row.case)
        if key not in merged:
            merged[key] = replace(row, extra=dict(row.extra))
            continue
        total = merged[key]
        total.draws, total.seconds = total.draws + row.draws, total.seconds + row.seconds
        total.passed = total.passed and row.passed
        both = [total.extra.get(name, 0) + row.extra.get(name, 0) for name in ("close", "requests")]
        total.extra |= {"close": both[0], "requests": both[1]}
        if total.passed:
            total.note = f"{both[0]} of {both[1]} requests too close to call"
        elif not row.passed:
            total.note = row.note
    return [merged[key] for key in sorted(merged, key=lambda k: (k[0], k[1]))]


def condensed(rows: list[Row]) -> list[Row]:
    """One line for all statistics of a case or engine, all dtypes of a row, all cases of equality, all changes."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        name = {
            "distribution": row.case.partition(" / ")[0],
            "engine": row.case.partition(" / ")[0],
            "rounding": row.case.rpartition(", ")[0],
            "equality": "every case",
            "determinism": "every change",
        }.get(row.section, row.case)
        groups.setdefault((row.section, row.backend, name), []).append(row)
    return [_worst(name, group) for (_, _, name), group in groups.items()]


def _worst(name: str, rows: list[Row]) -> Row:
    """The smallest p, the distance that comes closest to its bound, and the sum of what was compared."""
    if len(rows) == 1:
        return rows[0]
    closest = max(rows, key=lambda row: (row.total_variation or 0.0) / (row.bound or 1.0))
    p_values = [row.p_value for row in rows if row.p_value is not None]
    draws = [row.draws for row in rows]
    close = sum(row.extra.get("close", 0) for row in rows)
    failed = [row.note or row.case for row in rows if not row.passed]
    return replace(
        closest,
        case=name,
        draws=max(draws) if rows[0].unit == "draws" else sum(draws),
        p_value=min(p_values, default=None),
        passed=not failed,
        note="; ".join(failed) or (f"{close} too close to call" if rows[0].unit == "requests" and close else ""),
    )


def _cells(row: Row) -> list[str]:
    def number(value, form):
        return "" if value is None else format(value, form)

    verdict = "holds" if row.passed else "FAILS"
    if row.note:
        verdict += f" ({row.note.splitlines()[0][:120]})"
    return [
        row.section,
        row.case,
        row.backend,
        f"{row.draws:,} {row.unit}",
        number(row.p_value, ".2g"),
        number(row.total_variation, ".2g"),
        number(row.bound, ".2g"),
        verdict,
    ]


def table(rows: list[Row]) -> Table:
    """For the console."""
    result = Table(*COLUMNS)
    section = None
    for row in rows:
        if section not in (None, row.section):
            result.add_section()
        section = row.section
        result.add_row(*_cells(row), style=None if row.passed else "red")
    return result


def markdown(rows: list[Row]) -> str:
    """For docs/proof.md, condensed."""
    rows = condensed(rows)
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    return "\n".join(lines + ["| " + " | ".join(_cells(row)) + " |" for row in rows]) + "\n"


def shown(path: Path) -> str:
    """The path as the user would type it."""
    path = path.resolve()
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
