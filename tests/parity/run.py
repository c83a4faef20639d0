"""Run the parity matrix and write docs/parity.md: does each sampling parameter do its work under speculation?

Usage: ``python tests/parity/run.py [COLUMN ...]``: runs the columns (all, or those named) in processes of their own,
keeps what they emitted in ``reports/parity/``, and writes the table once every column has been run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from parity.rows import COLUMNS, ROOT, ROWS
from support import prepared

REPORTS, PAGE = ROOT / "reports" / "parity", ROOT / "docs" / "parity.md"


def run_column(name: str, result: Path, *rows: str, requests: int | None = None) -> dict:
    """Run a column, or some of its rows, and return what it wrote.

    Raises:
        RuntimeError: Its process ended badly.
    """
    command = [Path(__file__).with_name("column.py"), name, result, *rows]
    command += [] if requests is None else ["--requests", requests]
    status, log = prepared.run(COLUMNS[name].runner, *command)
    result.with_suffix(".log").write_text(log)
    if status:
        raise RuntimeError(f"column {name} ended with {status}:\n" + log[-4000:])
    return json.loads(result.read_text())


def cells(found: dict[str, dict]) -> dict[tuple[str, str], tuple[str, str]]:
    """Verdict and note by row and column, from what every column emitted."""
    from parity.judge import judge

    return {
        (row.name, column.name): judge(row, column, found[column.name][row.name], found[column.plain][row.name])
        for row in ROWS
        for column in COLUMNS.values()
    }


def page(verdicts: dict[tuple[str, str], tuple[str, str]], versions: str) -> str:
    """The table, and one footnote for each cell that is not plainly ``works``; equal notes share a number."""
    notes: dict[str, int] = {}
    lines = [
        "| | " + " | ".join(column.title for column in COLUMNS.values()) + " |",
        "| --- |" + " --- |" * len(COLUMNS),
    ]
    for row in ROWS:
        shown = []
        for column in COLUMNS:
            verdict, note = verdicts[row.name, column]
            shown.append(f"{verdict} [{notes.setdefault(note, len(notes) + 1)}]" if note else verdict)
        lines.append(f"| {row.name} | " + " | ".join(shown) + " |")
    footnotes = [f"{number}. {escape(note)}" for note, number in notes.items()]
    return "\n".join([INTRODUCTION.format(versions=versions), *lines, "", *footnotes, ""])


def escape(note: str) -> str:
    """A note as Markdown that shows it literally."""
    return re.sub(r"([<>*_|`])", r"\\\1", note)


INTRODUCTION = """# Sampling parameters under speculation

Written by `python tests/parity/run.py`; do not edit. Each cell is a run of a real engine ({versions}): the shipped
pair in fp32, a draft model with 3 greedy drafts, V1 on a CPU, V2 under Triton's interpreter. Greedy requests must emit
what the same runner emits without speculation, and something else than without the parameter. Sampled requests (256
on V1, 24 on V2, up to 5 verified tokens each) must follow the exact distribution, computed from the target
model's own logits:
no token that the parameters exclude, chi-square p above 1e-4; where a row has no greedy requests, the draws must also
be e^7 times likelier than under the distribution without the parameter.

- works: all of that holds.
- refused: vLLM takes no such request, or does not start.
- wrong: something of that does not hold.
- crashes: the engine fails.

On V2, vLLM's own PyTorch code for top-k and top-p stands in for its Triton kernel, which the interpreter cannot run.
Stock V1 on a CPU reads temperature, top-k and top-p from memory that vLLM never writes there
(`_expand_kernel_impl` in `vllm/utils/cpu_triton_utils.py`); that does not concern GPUs.
"""


def main(argv: list[str]) -> None:
    """Run columns, then write the page from the results of all."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("columns", nargs="*", metavar="COLUMN", help=f"of: {', '.join(COLUMNS)}; all if none is given")
    names = parser.parse_args(argv).columns
    if unknown := set(names) - set(COLUMNS):
        parser.error(f"{unknown.pop()!r} is no column")
    REPORTS.mkdir(parents=True, exist_ok=True)
    for name in names or COLUMNS:
        began = time.monotonic()
        run_column(name, REPORTS / f"{name}.json")
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    results = {name: REPORTS / f"{name}.json" for name in COLUMNS}
    found = {name: json.loads(path.read_text()) if path.exists() else {} for name, path in results.items()}
    if missing := [f"{row.name} on {name}" for name in COLUMNS for row in ROWS if row.name not in found[name]]:
        print(f"no page yet, {len(missing)} cells not run: {', '.join(missing[:4])}")
        return
    import torch
    import vllm

    verdicts = cells(found)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(verdicts, f"vLLM {vllm.__version__}, torch {torch.__version__}"))
    counts: dict[str, int] = {}
    for verdict, _ in verdicts.values():
        counts[verdict] = counts.get(verdict, 0) + 1
    print(", ".join(f"{number} {verdict}" for verdict, number in counts.items()) + f": {os.path.relpath(PAGE)}")


if __name__ == "__main__":
    main(sys.argv[1:])
