"""The picture that `specopt demo` leaves: tokens per second of both arms, and what sampling takes of a step."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from vllm_specopt.cli.report import ARMS, shown

COLORS = {"stock": "#d95f02", "exact": "#1f78b4"}


def draw(record: dict, path: Path) -> None:
    """Write a bar chart of the record to a PNG file."""
    workloads = list(record["config"]["workloads"])
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    panel = figure.subplots()
    for place, arm in enumerate(ARMS):
        runs = [record["arms"][arm]["runs"][name] for name in workloads]
        speeds = [run["bench"]["output_throughput"] for run in runs]
        at = [number + 0.4 * (place - 0.5) for number in range(len(workloads))]
        bars = panel.bar(at, speeds, width=0.38, color=COLORS[arm], label=shown(record, arm))
        shares = [
            f"{speed:.0f}" + (f"\n{100 * run['scopes']['sampling_share']:.2g} % sampling" if run["scopes"] else "")
            for speed, run in zip(speeds, runs, strict=True)
        ]
        panel.bar_label(bars, shares, fontsize=8, padding=2)
    panel.set_xticks(range(len(workloads)), workloads)
    panel.set_ylabel("output tokens per second")
    panel.margins(y=0.18)
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(frameon=False, loc="upper right")
    title = f"{record['config']['pair']}, vLLM {record['versions']['vllm']}\n{record['machine']['name']}"
    panel.set_title(title, fontsize=10)
    figure.savefig(path, dpi=150)
