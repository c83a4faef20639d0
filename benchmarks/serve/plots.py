"""Figures of the serving comparison as SVG text: throughput, latency, acceptance by position, differences."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator

import matplotlib
import numpy as np

from vllm_specopt.benchmarks.serve import stats as stats
from vllm_specopt.benchmarks.serve.client import QUANTILES

matplotlib.use("Agg")

COLOURS = ("#666666", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00")


def figures(record: dict) -> Iterator[tuple[str, str]]:
    """Yield a caption and an SVG per figure that has something to show."""
    most = record["config"]["concurrency"][-1]
    plots: list[tuple[str, Callable]] = [
        ("Output tokens/s against requests in flight; bars from the slowest to the fastest repeat.", _throughput),
        (f"Time to first token, {most} in flight: share of requests that waited no longer.", _cdf("ttft", most)),
        (f"Time per output token, {most} in flight: share of requests below.", _cdf("tpot", most)),
        ("Share of draft tokens accepted, by position in the draft.", _positions),
        ("Tokens/s over the baseline's with 95 % intervals; grey: the noise.", _differences),
    ]
    for number, (caption, draw) in enumerate(plots):
        if svg := _svg(record, draw, number):
            yield caption, svg


def _svg(record: dict, draw: Callable, number: int) -> str | None:
    import matplotlib.pyplot as plt

    temperatures = record["config"]["temperatures"]
    # Text stays text, and the ids of figures on one page must not meet.
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": f"figure {number}", "font.size": 9}):
        figure, panels = plt.subplots(
            1, len(temperatures), figsize=(4.6 * len(temperatures), 3.4), squeeze=False, layout="constrained"
        )
        drawn = False
        for panel, temperature in zip(panels[0], temperatures, strict=True):
            panel.set_title(f"T = {temperature:g}")
            panel.grid(alpha=0.3)
            drawn |= bool(draw(record, temperature, panel))
        if drawn:
            handles, labels = panels[0][0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
            out = io.StringIO()
            figure.savefig(out, format="svg", metadata={"Date": None})
        plt.close(figure)
    return out.getvalue()[out.getvalue().index("<svg") :] if drawn else None


def _style(record: dict, arm: str) -> dict:
    names = [name for name in record["config"]["arms"] if name != record["config"]["noise"]]
    if arm == record["config"]["noise"]:
        return {"color": "#aaaaaa", "linestyle": "--", "label": arm}
    return {"color": COLOURS[names.index(arm) % len(COLOURS)], "label": arm}


def _throughput(record: dict, temperature: float, panel) -> bool:
    drawn = False
    for arm in record["config"]["arms"]:
        points = [(slots, stats.medians(record, arm, temperature, slots)) for slots in record["config"]["concurrency"]]
        known = [(slots, found) for slots, found in points if found]
        if known:
            middle = [found["output tokens/s"] for _, found in known]
            below = [value - found["slowest"] for value, (_, found) in zip(middle, known, strict=True)]
            above = [found["fastest"] - value for value, (_, found) in zip(middle, known, strict=True)]
            where = [slots for slots, _ in known]
            panel.errorbar(where, middle, yerr=[below, above], marker="o", capsize=3, **_style(record, arm))
            drawn = True
    panel.set_xscale("log", base=2)
    panel.set_xticks(record["config"]["concurrency"], [str(slots) for slots in record["config"]["concurrency"]])
    panel.set_xlabel("requests in flight")
    panel.set_ylabel("output tokens/s")
    panel.set_ylim(bottom=0)
    return drawn


def _cdf(name: str, slots: int) -> Callable:
    def draw(record: dict, temperature: float, panel) -> bool:
        drawn = False
        for arm in record["config"]["arms"]:
            cells = stats.cells(record, arm, temperature, slots).values()
            kept = [cell["quantiles"][name] for cell in cells if name in cell["quantiles"]]
            if kept:
                # Repeats are of one size, so their pooled distribution is the mean of theirs.
                values = np.sort(np.concatenate(kept)) * 1000
                panel.plot(values, np.linspace(0, 1, len(values)), **_style(record, arm))
                drawn = True
        panel.set_xlabel(f"{name.upper()}, ms")
        panel.set_ylabel("share of requests")
        return drawn

    assert QUANTILES[0] == 0 and QUANTILES[-1] == 1
    return draw


def _positions(record: dict, temperature: float, panel) -> bool:
    config = record["config"]
    arms = list(config["arms"])
    drawn = False
    for number, arm in enumerate(arms):
        cells = [
            cell for slots in config["concurrency"] for cell in stats.cells(record, arm, temperature, slots).values()
        ]
        rates = stats.acceptance(cells)["positions"]
        if rates:
            style = {key: value for key, value in _style(record, arm).items() if key != "linestyle"}
            panel.bar(np.arange(1, len(rates) + 1) + (number - (len(arms) - 1) / 2) * 0.8 / len(arms), rates,
                      0.8 / len(arms), **style)  # fmt: skip
            panel.set_xticks(range(1, len(rates) + 1))
            drawn = True
    panel.set_xlabel("position in the draft")
    panel.set_ylabel("accepted")
    panel.set_ylim(0, 1)
    return drawn


def _differences(record: dict, temperature: float, panel) -> bool:
    config = record["config"]
    others = [arm for arm in config["arms"] if arm != config["baseline"]]
    drawn = False
    for number, arm in enumerate(others):
        for place, slots in enumerate(config["concurrency"]):
            found = stats.ratio(record, arm, temperature, slots, "output tokens/s")
            if not found:
                continue
            ends = [[found["ratio"] - found["low"]], [found["high"] - found["ratio"]]] if found["low"] else None
            style = _style(record, arm) | {"linestyle": "none"}
            if place:
                style.pop("label")
            height = place + (number - (len(others) - 1) / 2) * 0.25
            panel.errorbar([found["ratio"]], [height], xerr=ends, marker="o", capsize=3, **style)
            drawn = True
    panel.set_ylim(-0.5, len(config["concurrency"]) - 0.5)
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set_yticks(range(len(config["concurrency"])), [f"{slots} in flight" for slots in config["concurrency"]])
    panel.set_xlabel(f"tokens/s over {config['baseline']}")
    return drawn
