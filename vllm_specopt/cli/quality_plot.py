"""Quality lost against tokens gained: each arm's score and its texts' perplexity by the tokens it emits a step."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from vllm_specopt.benchmarks.quality import DRAFT, EXACT, EXACT_CHOSEN, TARGET
from vllm_specopt.cli.quality_report import SCORE_NAMES, score_fields, values

# The arms of a family begin with the exact method on the same kind of drafts: what they gain, they gain over it.
FAMILIES = (
    ("sigmoid", EXACT, "drawn drafts", "tab:red", "^"),
    ("typical", EXACT_CHOSEN, "chosen drafts", "tab:orange", "v"),
    ("budget", EXACT_CHOSEN, "chosen drafts", "tab:blue", "s"),
)


def plot(records: list[dict], path: Path) -> bool:
    """Write a row of two panels per record, score and perplexity; return whether there was a point to draw.

    The first temperature above 0 is drawn: at 0 all arms write the target's text.
    """
    panels = [
        (record, temperature, field)
        for record in records
        for temperature in [value for value in record["config"]["temperatures"] if value > 0][:1]
        for field in (score_fields(record)[0], "perplexity")
    ]
    drawn = [panel for panel in panels if any(_points(*panel, *family[:2]) for family in FAMILIES)]
    if not drawn:
        return False
    count = -(-len(drawn) // 2)
    figure, axes = plt.subplots(count, 2, figsize=(9, 3.4 * count), layout="constrained", squeeze=False)
    for axis, panel in zip(axes.flat, drawn, strict=False):
        _panel(axis, *panel)
    for axis in axes.flat[len(drawn) :]:
        axis.remove()
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    with matplotlib.rc_context({"svg.hashsalt": "specopt"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return True


def _panel(axis, record: dict, temperature: float, field: str) -> None:
    for arm, style in ((TARGET, "-"), (DRAFT, ":")):
        if found := values(record, arm, temperature, field):
            axis.axhline(found["mean"], color="gray", linestyle=style, label=f"{arm} alone")
    for family, start, drafts, color, marker in FAMILIES:
        points = _points(record, temperature, field, family, start)
        if not points:
            continue
        columns = {name: [point[name] for point in points] for name in ("x", "y", "x_half", "y_half")}
        axis.errorbar(
            columns["x"], columns["y"], columns["y_half"], columns["x_half"], color=color, marker=marker, capsize=2,
            markersize=5, label=f"{family}, {drafts}",
        )  # fmt: skip
        for point in points:
            axis.annotate(point["label"], (point["x"], point["y"]), (4, 4), textcoords="offset points", fontsize=7)
    name = SCORE_NAMES.get(field, field)
    axis.set(title=f"{record['config']['name']}, T = {temperature:g}", xlabel="tokens a step", ylabel=name)
    if field == "perplexity":
        axis.set_yscale("log")


def _points(record: dict, temperature: float, field: str, family: str, start: str) -> list[dict]:
    """The arms of a family and the exact one on the same drafts, where both numbers were measured."""
    found = []
    for arm in record["arms"]:
        if arm == start or arm.startswith(f"{family}-"):
            x, y = (values(record, arm, temperature, name) for name in ("acceptance_length", field))
            if x and y:
                found.append({"x": x["mean"], "y": y["mean"], "x_half": x["half_width"] or 0,
                              "y_half": y["half_width"] or 0, "label": EXACT if arm == start else arm.split("-")[1],
                              })  # fmt: skip
    return found if len(found) > 1 else []
