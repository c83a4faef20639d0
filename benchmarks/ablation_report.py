"""The ablation's table and figure, made from its CSV file."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

# What arXiv 2406.11016 reports for its two methods, as change of the profiling time of the baseline, in percent.
CLAIMS = {"segments": "-13 … -6", "sigmoid": "-94 … -37"}
BANDS = ((1, 5), (8, 20), (32, 128))


def write(path: Path, command: str) -> list[Path]:
    """Write ablation.md and ablation.svg beside a CSV file and return their paths."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    table, figure = path.with_suffix(".md"), path.with_suffix(".svg")
    table.write_text(markdown(rows, command))
    plot(rows, figure)
    return [table, figure]


def markdown(rows: list[dict], command: str) -> str:
    """Return the page: what each rung takes of the formula's time, and bytes and operators of one case."""
    requests = sorted({int(row["requests"]) for row in rows})
    lines = ["# What each idea is worth", "", f"    {command}", "",
             f"{rows[0]['cpu']}, {rows[0]['threads']} thread, PyTorch {rows[0]['torch']}, bf16 logits, fp32 draft",
             "probabilities, about 0.8 acceptance per token. All rungs of a case take turns.", ""]  # fmt: skip
    for count in requests:
        lines += [f"## {count} request{'s' if count > 1 else ''}: change of the formula's time, percent", ""]
        lines += _changes([row for row in rows if int(row["requests"]) == count])
        lines += [
            "",
            "Median over the cases of a cell, over the turns in each; in brackets the least and the largest.",
            "",
        ]
    lines += ["## Bytes and operators", "", *_counts(rows), ""]
    lines += [
        "Bytes of PyTorch's rungs are those of the tensors its operators read and write; of ours they follow from the",
        "outcome. Operators: PyTorch's without views, or calls of our backend. Tokens: emitted per request.",
        "",
    ]
    return "\n".join(lines)


def _changes(rows: list[dict]) -> list[str]:
    heads = [f"K = {low} – {high}" for low, high in BANDS]
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = ["| rung | " + " | ".join([*heads, *models, "the paper's claim"]) + " |"]
    lines.append("|---|" + "---:|" * (len(heads) + len(models) + 1))
    for rung in dict.fromkeys(row["rung"] for row in rows):
        own = [row for row in rows if row["rung"] == rung]
        cells = [_change([row for row in own if low <= int(row["draft_tokens"]) <= high]) for low, high in BANDS] + [
            _change([row for row in own if row["model"] == model]) for model in models
        ]
        lines.append("| " + " | ".join([rung, *cells, CLAIMS.get(rung, "")]) + " |")
    return lines


def _change(rows: list[dict]) -> str:
    found = [100 * (float(row["of_formula"]) - 1) for row in rows]
    if not found:
        return "–"
    return f"{np.median(found):+.0f} ({min(found):+.0f} … {max(found):+.0f})"


def _counts(rows: list[dict]) -> list[str]:
    wanted = [row for row in rows if (row["model"], row["draft_tokens"], row["requests"]) == ("Qwen", "5", "1")]
    lines = ["Vocabulary 151,936, K = 5, one request:", "",
             "| rung | ms, median (p20 – p80) | MB | operators | tokens |", "|---|---:|---:|---:|---:|"]  # fmt: skip
    for row in wanted:
        time = f"{row['p50_ms']} ({row['p20_ms']} – {row['p80_ms']})"
        lines.append(
            f"| {row['rung']} | {time} | {row['megabytes']} | {row['launches']} | {row['tokens_per_request']} |"
        )
    return lines


def plot(rows: list[dict], path: Path) -> None:
    """Draw time per call against K, one panel per vocabulary, for one request."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "specopt"
    import matplotlib.pyplot as plt

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(1, len(models), figsize=(3.6 * len(models), 3.8), sharey=True, squeeze=False)
    for model, panel in zip(models, panels[0], strict=True):
        own = [row for row in rows if row["model"] == model and row["requests"] == "1"]
        for rung in dict.fromkeys(row["rung"] for row in own):
            points = [(int(row["draft_tokens"]), float(row["p50_ms"])) for row in own if row["rung"] == rung]
            style = "-o" if rung.startswith("fused") else "--s"
            panel.plot(*zip(*points, strict=True), style, label=rung, markersize=3, linewidth=1)
        panel.set(title=f"{model}, {own[0]['vocab_size']} tokens", xlabel="draft tokens", xscale="log", yscale="log")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("ms per call, one request")
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="lower center", ncols=4, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
