"""The curve of a calibration as a picture: bytes read against total variation."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt


def plot(curve: list[dict], path: Path) -> None:
    """Write one panel per form of the draft distribution."""
    forms = list(dict.fromkeys(row["form"] for row in curve))
    figure, axes = plt.subplots(1, len(forms), figsize=(4.2 * len(forms), 3.6), sharey=True, layout="constrained")
    for axis, form in zip(axes, forms, strict=True):
        rows = [row for row in curve if row["form"] == form]
        read = [row for row in rows if row["estimator"].startswith(("blocks", "drafted"))]
        axis.plot(
            [row["bytes_percent"] for row in read], [row["tv_over_draft"] for row in read], "o-", label="estimated"
        )
        for row, marker in zip(
            [row for row in rows if row not in read and not row["estimator"].startswith("the same")],
            "^sD",
            strict=False,
        ):
            axis.plot(row["bytes_percent"], row["tv_over_draft"], marker, label=row["estimator"])
        axis.axhline(0.1, color="0.6", linewidth=0.8, linestyle="--")
        axis.set(title=f"drafts: {form}", xlabel="bytes, % of the exact method's")
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("TV(emitted, target) / TV(draft, target)")
    axes[-1].legend(fontsize="small")
    with matplotlib.rc_context({"svg.hashsalt": "specopt"}):
        figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
