"""Figures of a record, from its CSV alone: time along each parameter that varies, and GB/s against a copy's.

Usage: ``python -m vllm_specopt.benchmarks.kernels.plots FOLDER``, or at the end of `specopt bench`. Needs matplotlib.
"""

from __future__ import annotations

import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from vllm_specopt.benchmarks.kernels import record

AXES = {"batch": "requests in the batch", "vocab": "vocabulary", "num_drafts": "draft tokens per request"}
CONFIGURATION = ("draft", "temperature", "filters", "dtype", "acceptance_asked", "device", "threads")
STYLES = {
    "ours": ("#0b6e4f", "o", "-"),
    "ours-sigmoid": ("#7f7f7f", "x", ":"),
    "ours-block": ("#66a61e", "P", "-."),
    "ours-v1": ("#1f77b4", "s", "-"),
    "ours-v2": ("#6a3d9a", "D", "-"),
    "stock-v1": ("#d95f02", "^", "--"),
    "stock-repaired": ("#d95f02", "^", "--"),
    "stock-v2": ("#b2182b", "v", "--"),
}
LABELS = {
    "ours": "verify() alone",
    "ours-sigmoid": "verify(), sigmoid (lossy)",
    "ours-block": "verify(), block",
    "ours-v1": "ours in V1",
    "ours-v2": "ours in V2",
    "stock-v1": "stock V1",
    "stock-repaired": "stock V1, repaired",
    "stock-v2": "stock V2",
}
COLUMNS = 3
MIN_POINTS = 3


def draw(folder: Path) -> list[Path]:
    """Draw all figures that a folder's record has points for, as PNG, and return their paths.

    Raises:
        RecordError: The record cannot be read.
    """
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    rows = [row for row in record.read(folder) if row["time_us"]]
    figures = {f"time_by_{axis}": time_figure(rows, axis) for axis in AXES} | {"roofline": roofline_figure(rows)}
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=150)
    return paths


def lines_along(rows: list[dict], axis: str) -> dict[tuple, list[dict]]:
    """Group rows that differ in one parameter only; groups with fewer than MIN_POINTS values of it are left out."""
    others = [other for other in AXES if other != axis]
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[column] for column in (*CONFIGURATION, *others))].append(row)
    return {key: found for key, found in groups.items() if len({row[axis] for row in found}) >= MIN_POINTS}


def time_figure(rows: list[dict], axis: str) -> Figure | None:
    """Median time along one parameter, a panel per configuration, a band from p20 to p80."""
    groups = lines_along(rows, axis)
    if not groups:
        return None
    panels = math.ceil(len(groups) / COLUMNS)
    columns = min(COLUMNS, len(groups))
    figure = Figure(figsize=(4.2 * columns, 3.1 * panels + 0.9), layout="constrained")
    grid = figure.subplots(panels, columns, squeeze=False).flat
    for group, panel in zip(groups.values(), grid, strict=False):
        for name in STYLES:
            line = sorted((row for row in group if row["implementation"] == name), key=lambda row: int(row[axis]))
            if not line:
                continue
            color, marker, dash = STYLES[name]
            along = [int(row[axis]) for row in line]
            low, middle, high = ([float(row[at]) for row in line] for at in ("p20_us", "time_us", "p80_us"))
            panel.plot(along, middle, color=color, marker=marker, linestyle=dash, markersize=4, label=LABELS[name])
            panel.fill_between(along, low, high, color=color, alpha=0.15, linewidth=0)
        panel.set(xscale="log", yscale="log", title=_title(group[0], axis), xlabel=AXES[axis], ylabel="µs")
        ticks = sorted({int(row[axis]) for row in group})
        shown = ticks if len(ticks) <= 7 else ticks[::2]
        slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if axis == "vocab" else {}
        panel.set_xticks(shown, [f"{tick:,}" for tick in shown], **slanted)
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        panel.minorticks_off()
        panel.grid(alpha=0.25)
    for panel in grid:
        panel.set_visible(False)
    _finish(figure, f"Time of one verification, by {AXES[axis]}", rows)
    return figure


def roofline_figure(rows: list[dict]) -> Figure | None:
    """Counted bytes over time, as a share of what a copy on the same device moves, against the bytes of the case."""
    if not rows:
        return None
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    panel = figure.subplots()
    for name in STYLES:
        points = [row for row in rows if row["implementation"] == name]
        if not points:
            continue
        color, marker, _ = STYLES[name]
        panel.scatter(
            [float(row["bytes"]) / 1e6 for row in points],
            [100 * float(row["bytes"]) / float(row["time_us"]) / 1e3 / float(row["copy_gbps"]) for row in points],
            color=color,
            marker=marker,
            s=22,
            alpha=0.8,
            label=LABELS[name],
        )
    panel.axhline(100, color="black", linewidth=1)
    note = "a copy on this device; above it, rows after a rejection were skipped"
    panel.annotate(note, (0.01, 100), xycoords=("axes fraction", "data"), ha="left", va="bottom", fontsize=8)
    panel.set(xscale="log", yscale="log", xlabel="MB counted: each row once", ylabel="GB/s, % of a copy's")
    for scale in (panel.xaxis, panel.yaxis):
        scale.set_major_formatter(lambda value, _: f"{value:g}")
        scale.set_minor_formatter(NullFormatter())
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.grid(alpha=0.25)
    _finish(figure, "How much of the memory bandwidth a verification uses", rows)
    return figure


def _title(row: dict, axis: str) -> str:
    fixed = {
        "batch": f"B = {row['batch']}",
        "vocab": f"V = {int(row['vocab']):,}",
        "num_drafts": f"K = {row['num_drafts']}",
    }
    fixed.pop(axis)
    law = "greedy" if float(row["temperature"]) == 0 else f"T = {float(row['temperature']):g}"
    filters = "" if row["filters"] == "none" else ", " + row["filters"].replace("+", ", ")
    for short, long in (("topk", "top-k "), ("topp", "top-p "), ("minp", "min-p ")):
        filters = filters.replace(short, long)
    rest = [*fixed.values(), row["dtype"], f"acceptance {row['acceptance_asked']}"]
    return f"{row['draft']}, {law}{filters}\n{', '.join(rest)}"


def _finish(figure: Figure, title: str, rows: list[dict]) -> None:
    """Title, one legend for all panels, and where the numbers are from."""
    handles: dict[str, Artist] = {}
    for panel in figure.axes:
        handles |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    rows_of_six = max(1, math.ceil(len(handles) / 6))
    columns = math.ceil(len(handles) / rows_of_six) if len(figure.axes) > 1 else 3
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, frameon=False)
    sources = sorted({f"{row['device']}, vLLM {row['vllm'] or 'not installed'}" for row in rows})
    figure.suptitle(f"{title}\n{'; '.join(sources)}", fontsize=10)


if __name__ == "__main__":
    for written in draw(Path(sys.argv[1])):
        print(written)
