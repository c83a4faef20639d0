"""The price of an arm as a picture: its score and its texts' perplexity against its distance from the target's law."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from vllm_specopt.benchmarks.quality import TARGET
from vllm_specopt.cli.quality_report import SCORE_NAMES, score_fields, values


def plot(record: dict, path: Path) -> bool:
    """Write one panel per score and one for the perplexity, a point per arm; return whether there was one to draw.

    The first temperature above 0 is drawn: at 0 all arms write the target's text.
    """
    temperature = next((value for value in record["config"]["temperatures"] if value > 0), None)
    if temperature is None:
        return False
    fields = [*score_fields(record), "perplexity"]
    points = {}
    for arm in record["arms"]:
        distance = {"mean": 0.0, "half_width": None} if arm == TARGET else values(record, arm, temperature, "tv")
        heights = [found for field in fields if (found := values(record, arm, temperature, field))]
        if distance and len(heights) == len(fields):
            points[arm] = (distance, heights)
    if not points:
        return False
    size = (3.4 * len(fields), 3.6)
    figure, axes = plt.subplots(1, len(fields), figsize=size, layout="constrained", squeeze=False)
    for number, (axis, field) in enumerate(zip(axes[0], fields, strict=True)):
        for (arm, (distance, heights)), marker in zip(points.items(), "*Xos^vdPh", strict=False):
            axis.errorbar(
                distance["mean"], heights[number]["mean"], heights[number]["half_width"], distance["half_width"],
                marker=marker, linestyle="none", capsize=2, label=arm,
            )  # fmt: skip
        axis.set(title=SCORE_NAMES.get(field, field), xlabel="TV(emitted, target)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    with matplotlib.rc_context({"svg.hashsalt": "specopt"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return True
