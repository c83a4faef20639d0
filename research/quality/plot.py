"""Quality lost against tokens gained: each arm's score and its texts' perplexity by the tokens it emits a step."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from research.quality.arms import DRAFT, EXACT, EXACT_CHOSEN, TARGET
from research.quality.report import SCORE_NAMES, score_fields, values

# The arms of a family begin with the exact method on the same kind of drafts: what they gain, they gain over it.
FAMILIES = (
    ("sigmoid", EXACT, "drawn drafts", "tab:red", "^"),
    ("typical", EXACT_CHOSEN, "chosen drafts", "tab:orange", "v"),
    ("budget", EXACT_CHOSEN, "chosen drafts", "tab:blue", "s"),
)
BY_SCALE = "sigmoid"
"""Its scales are in no order of quality: no line joins them, and the panels that look closer leave them out."""


def plot(records: list[dict], path: Path) -> bool:
    """Write a row of panels per record: the score, and closer up score and perplexity of the families on chosen drafts.

    Returns whether there was a point to draw.

    The first temperature above 0 is drawn: at 0 all arms write the target's text.
    """
    chosen = [family for family in FAMILIES if family[0] != BY_SCALE]
    rows = []
    for record in records:
        for temperature in [value for value in record["config"]["temperatures"] if value > 0][:1]:
            score = score_fields(record)[0]
            shown = ((score, list(FAMILIES)), (score, chosen), ("perplexity", chosen))
            if any(_points(record, temperature, score, *family[:2]) for family in FAMILIES):
                rows.append([(record, temperature, field, families) for field, families in shown])
    if not rows:
        return False
    figure, axes = plt.subplots(len(rows), 3, figsize=(13, 3.6 * len(rows)), layout="constrained", squeeze=False)
    for line, panels in zip(axes, rows, strict=True):
        for axis, panel in zip(line, panels, strict=True):
            _panel(axis, *panel)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize="small")
    with matplotlib.rc_context({"svg.hashsalt": "specopt"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return True


def _panel(axis, record: dict, temperature: float, field: str, families) -> None:
    for arm, style in ((TARGET, "-"), (DRAFT, ":")) if len(families) == len(FAMILIES) else ((TARGET, "-"),):
        if found := values(record, arm, temperature, field):
            axis.axhline(found["mean"], color="gray", linestyle=style, label=f"{arm} alone")
    for family, start, drafts, color, marker in families:
        points = _points(record, temperature, field, family, start)
        if not points:
            continue
        columns = {name: [point[name] for point in points] for name in ("x", "y", "x_half", "y_half")}
        axis.errorbar(
            columns["x"], columns["y"], columns["y_half"], columns["x_half"], color=color, marker=marker, capsize=2,
            markersize=5, linestyle="none" if family == BY_SCALE else "-", label=f"{family}, {drafts}",
        )  # fmt: skip
        if family == BY_SCALE or len(families) < len(FAMILIES):
            above = 5 if marker != "v" else -11
            for point in points:
                axis.annotate(
                    point["label"], (point["x"], point["y"]), (2, above), textcoords="offset points", fontsize=7,
                    color=color,
                )  # fmt: skip
    name = SCORE_NAMES.get(field, field)
    axis.set(title=f"{record['config']['name']}, T = {temperature:g}", xlabel="tokens a step", ylabel=name)


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
