"""A record as a Markdown page, from its CSV alone: per case the stock classes, ours in their place, and the ratio.

Usage: ``python -m vllm_specopt.benchmarks.kernels.report FOLDER``, or at the end of `specopt bench`.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from vllm_specopt.benchmarks import tables
from vllm_specopt.benchmarks.kernels import record

FILE_NAME = "kernel_bench.md"
# Who stands in whose place.
PAIRS = (("ours-v1", "stock-repaired"), ("ours-v1", "stock-v1"), ("ours-v2", "stock-v2"))
HEADINGS = (
    "peer",
    "case",
    "V",
    "B",
    "K",
    "stock, ms",
    "here, ms",
    "ratio",
    "`verify()` alone, ms",
    "the same by sigmoid, ms",
    "µs per verified row",
    "% of a copy's GB/s",
    "extra memory, stock / here",
)


def write(folder: Path) -> Path:
    """Write the page beside the record and return its path.

    Raises:
        RecordError: The record cannot be read.
    """
    rows = record.read(folder)
    lines = [
        "# Kernel benchmark",
        "",
        "Median (20th - 80th percentile) per call; the ratio is the median over rounds in which the implementations",
        "take turns. A verified row is one a request reached before its first rejection; its time is that of",
        "`verify()` divided by all of the batch's. Bytes are counted as if every row were read, so a backend that",
        "stops early can exceed a copy's bandwidth. Sigmoid is the lossy method with its paper's constants: without",
        "filters it sweeps the emitting rows alone, and it emits another distribution.",
    ]
    sections: defaultdict[str, defaultdict[str, dict[str, dict]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        sections[_section(row)][row["case"]][row["implementation"]] = row
    for section, cases in sections.items():
        found = [row for ours, stock in PAIRS for row in _rows(cases, ours, stock)]
        lines += ["", f"## {section}", "", *tables.markdown(HEADINGS, found, HEADINGS[:2])]
    path = folder / FILE_NAME
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _section(row: dict) -> str:
    threads = f", {row['threads']} thread{'s' if row['threads'] != '1' else ''}" if row["threads"] else ""
    return f"{row['device']}{threads}, torch {row['torch']}, vLLM {row['vllm']}"


def _rows(cases: dict[str, dict[str, dict]], ours: str, stock: str) -> list[list[str]]:
    found = []
    for measured in cases.values():
        if stock not in measured:
            continue
        theirs, replacement, alone = measured[stock], measured.get(ours), measured.get("ours")
        speedup = replacement and replacement[f"speedup_over_stock_{ours[-2:]}"]
        cells = [
            stock,
            _case(theirs),
            f"{int(theirs['vocab']):,}",
            theirs["batch"],
            theirs["num_drafts"],
            _time(theirs),
            _time(replacement),
            f"{float(speedup):.3g}x" if speedup else "",
            _time(alone),
            _time(measured.get("ours-sigmoid")),
            _per_row(alone),
            alone["percent_of_copy"] if alone else "",
            f"{_memory(theirs)} / {_memory(replacement)}",
        ]
        found.append(cells)
    return found


def _case(row: dict) -> str:
    filters = "" if row["filters"] == "none" else f", {row['filters']}"
    temperature = f"T = {float(row['temperature']):g}"
    return f"{row['draft']}, {row['dtype']}, {temperature}{filters}, acceptance {row['acceptance_asked']}"


def _time(row: dict | None) -> str:
    if not row or not row["time_us"]:
        return row["note"] if row and row["note"] else ""
    middle, low, high = (_digits(float(row[name]) / 1e3) for name in ("time_us", "p20_us", "p80_us"))
    return f"{middle} ({low} - {high})"


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _per_row(row: dict | None) -> str:
    if not row or not row["time_us"]:
        return ""
    return f"{float(row['time_us']) / (float(row['rows_verified']) * int(row['batch'])):.3g}"


def _memory(row: dict | None) -> str:
    if not row or row["extra_bytes"] in ("", None):
        return "-"
    size = float(row["extra_bytes"])
    return f"{size / 2**20:,.0f} MiB" if size >= 2**20 else f"{size / 2**10:,.0f} KiB"


if __name__ == "__main__":
    print(write(Path(sys.argv[1])))
