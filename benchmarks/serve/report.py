"""Views of the record of `specopt ab`: tables, notes and outcome, for the terminal and as Markdown."""

from __future__ import annotations

import shlex

from rich.console import Console
from rich.table import Table

from vllm_specopt.benchmarks.serve import stats as stats

HEADINGS = (
    "T",
    "in flight",
    "arm",
    "requests/s",
    "tokens/s",
    "slowest – fastest",
    "TTFT ms, median / p99",
    "TPOT ms, median / p99",
    "ITL ms, median / p99",
    "acceptance length",
    "accepted / drafted",
    "runs",
)
RATIO_HEADINGS = ("T", "in flight", "metric", "arm", "ratio", "95 % interval", "noise", "noise interval", "outcome")
ARM_HEADINGS = (
    "arm",
    "sampling, share of step",
    "peak resident MiB",
    "GPU MiB",
    "KV cache, tokens",
    "greedy completions",
)
PLACEMENT_HEADINGS = ("repeat", "arm", "node", "attempts", "outcome", "failures")
TEXT_COLUMNS = {"arm", "metric", "outcome", "node", "failures"}


def number(value: float | None, form: str) -> str:
    """Return a number in a format, or that there is none."""
    return "–" if value is None else format(value, form)


def mark(record: dict, arm: str, temperature: float) -> str:
    """Return an asterisk for stock as it comes on a CPU above temperature 0, whose numbers are no comparison."""
    return "*" if record["machine"]["device"] == "cpu" and arm == "stock" and temperature > 0 else ""


def rows(record: dict) -> list[tuple[str, ...]]:
    """Return the medians, one row per temperature, concurrency and arm."""
    config = record["config"]
    found: list[tuple[str, ...]] = []
    for temperature in config["temperatures"]:
        for slots in config["concurrency"]:
            for arm in config["arms"]:
                if not (one := stats.medians(record, arm, temperature, slots)):
                    continue
                pair = [f"{number(one[f'{name} median'], '.1f')} / {number(one[f'{name} p99'], '.1f')}"
                        for name in ("TTFT", "TPOT", "ITL")]  # fmt: skip
                note = mark(record, arm, temperature)
                found.append((
                    f"{temperature:g}", f"{slots}", arm, f"{one['requests/s']:.2f}",
                    f"{one['output tokens/s']:.0f}{note}", f"{one['slowest']:.0f} – {one['fastest']:.0f}", *pair,
                    number(one["length"], ".2f") + note, number(one["rate"], ".3f") + note, str(one["runs"]),
                ))  # fmt: skip
    return found


def interval(ratio: dict | None) -> str:
    """Return the ends of an interval."""
    return "–" if ratio is None or ratio["low"] is None else f"{ratio['low']:.3f} – {ratio['high']:.3f}"


def ratio_rows(record: dict) -> list[tuple[str, ...]]:
    """Return the ratios beside the noise, one row per point, metric and arm."""
    found: list[tuple[str, ...]] = []
    for row in stats.compare(record):
        if row["arm"] == record["config"]["noise"]:
            continue
        ratio, noise = row["ratio"], row["noise"]
        note = mark(record, row["arm"], row["temperature"])
        found.append((
            f"{row['temperature']:g}", f"{row['concurrency']}", row["metric"], row["arm"],
            number(ratio and ratio["ratio"], ".3f") + note, interval(ratio), number(noise and noise["ratio"], ".3f"),
            interval(noise), row["words"] + note,
        ))  # fmt: skip
    return found


def arm_rows(record: dict) -> list[tuple[str, ...]]:
    """Return what belongs to an arm as a whole."""
    matches = stats.greedy_matches(record)
    found: list[tuple[str, ...]] = []
    for arm in record["config"]["arms"]:
        one = record["arms"].get(arm, {})
        shares = [
            f"T = {key}: {100 * each['sampling_share']:.1f} %" for key, each in one.get("scopes", {}).items() if each
        ]
        match = matches.get(arm)
        said = f"{match['identical']} of {match['prompts']} identical" if match else "–"
        said = (
            f"{len(one['greedy'])}, the reference"
            if arm == record["config"]["baseline"] and one.get("greedy")
            else said
        )
        found.append((
            arm, ", ".join(shares) or "not measured", number(one.get("peak_mib"), ".0f"),
            number(one.get("gpu_mib"), ".0f"), number(one.get("kv_cache_tokens"), ","), said,
        ))  # fmt: skip
    return found


def notes(record: dict) -> list[str]:
    """Return what has to be known to read the tables."""
    config, machine = record["config"], record["machine"]
    own = not any(arm["url"] for arm in config["arms"].values())
    found = [
        f"Ratio: the arm over {config['baseline']}, geometric mean over the repeats; interval: Student's t on the "
        "logarithms. Above 1 is better for tokens/s, worse for times.",
        f"Noise: {config['noise']} over {config['baseline']}, "
        + ("two server processes with the same command, " if own else "one server measured twice, ")
        + "with as many pairs as the other ratios. It holds what the order, the machine and "
        + ("a new process" if own else "time")
        + " do to a number. A difference is reported only where the interval leaves out 1 and the ratio is outside "
        "the noise interval and its inverse.",
        "Intervals are not corrected for their number: one in twenty leaves out 1 by chance.",
        "Order: on the Ray cluster each arm of each repeat had a server of its own, the arms of a repeat one after "
        "another on one device, forwards and then backwards (A B C, C B A). Cells of a repeat that ended on different "
        "devices are not compared."
        if record.get("placements")
        else "Order: whole repeats; in each, at every point, the arms side by side, forwards and then backwards "
        "(A B C, C B A). All servers are up all the time; only one is asked.",
        "All figures are vLLM's own client's (`vllm bench serve`); acceptance is its reading of the server's /metrics. "
        "Its process forks per run from one that has imported vLLM, which the timings do not see.",
    ]
    if any(mark(record, arm, 1) for arm in config["arms"]):
        found.append("* Stock on a CPU reads uninitialised sampling parameters there: no peer for speed or acceptance.")
    if machine["device"] == "cpu" and own:
        found.append(
            "Sampling: its share of the model runner's time in vLLM's profiler scopes, in a short burst after all "
            "timed runs. Peak memory: sum of the peaks of all processes of a server, an upper bound."
        )
    loads = [cell["load_average"] for cell in record["cells"].values()]
    if loads and max(loads) > machine["cores"] + 1:
        found.append(f"The machine was busy: load average up to {max(loads):.1f} on {machine['cores']} cores.")
    return [*record.get("notices", []), *found]


def outcome(record: dict) -> list[str]:
    """Return the outcome in sentences."""
    config, lines = record["config"], []
    compared = stats.compare(record)
    for arm in config["arms"]:
        if error := record["arms"].get(arm, {}).get("error"):
            lines.append(f"{arm}: FAILED: {error}")
        if arm in (config["baseline"], config["noise"]):
            continue
        for temperature in config["temperatures"]:
            own = [row for row in compared if row["arm"] == arm and row["temperature"] == temperature]
            speeds = [row for row in own if row["metric"] == "output tokens/s" and row["ratio"]]
            if speeds and not mark(record, arm, temperature):
                told = "; ".join(
                    f"{row['concurrency']} in flight {row['ratio']['ratio']:.3f} ({row['words']})" for row in speeds
                )
                lines.append(f"{arm}, T = {temperature:g}, tokens/s over {config['baseline']}: {told}")
    noise = stats.noise_summary(record)
    if noise["intervals"]:
        lines.append(
            f"noise: {noise['leave_out_1']} of {noise['intervals']} intervals leave out 1 "
            f"({0.05 * noise['intervals']:.1f} expected by chance), "
            f"the ratio furthest from 1 is {noise['furthest']:.3f}"
        )
    for arm, match in stats.greedy_matches(record).items():
        line = (
            f"greedy, {arm}: {match['identical']} of {match['prompts']} completions identical to {config['baseline']}'s"
        )
        if first := match["first_difference"]:
            line += f"; first difference: prompt {first['prompt']}, position {first['position']}"
        lines.append(f"{line}, token for token, one request at a time")
    missing = len(record["failed_cells"])
    if missing:
        lines.append(f"{missing} runs failed: {', '.join(record['failed_cells'])}")
    return lines


def exit_code(record: dict) -> int:
    """Return 1 if an arm or a run failed, or an exact arm's greedy completions differ, else 0."""
    failed = any(arm.get("error") for arm in record["arms"].values()) or record["failed_cells"]
    matches = stats.greedy_matches(record)
    stable = (again := matches.get(record["config"]["noise"])) is None or again["identical"] == again["prompts"]
    differ = any(
        match["identical"] != match["prompts"]
        for arm, match in matches.items()
        if (record["config"]["arms"][arm]["option"] or {}).get("method") == "exact"
    )
    return int(bool(failed or (stable and differ)))


def conditions(record: dict) -> list[tuple[str, str]]:
    """Return where, when and with what the record was made."""
    config, machine = record["config"], record["machine"]
    shown = {
        "time": f"{record['time']}, {record.get('seconds', 0)} s in all",
        "commit": (record["git"]["commit"] or "unknown") + (" with changes" if record["git"]["dirty"] else ""),
        "machine": f"{machine['name']}, {machine['cores']} cores, load average {machine['load_average_before']} before",
    } | record["versions"]
    skipped = ("arms", "baseline", "noise")
    return [(key, str(value)) for key, value in (shown | {k: v for k, v in config.items() if k not in skipped}).items()]


def placement_rows(record: dict) -> list[tuple[str, ...]]:
    """Return where each server of a comparison on a Ray cluster ran, and what failed there."""
    found: list[tuple[str, ...]] = []
    for entry in sorted(record.get("placements", []), key=lambda entry: (entry["repeat"], entry["arm"])):
        node = entry["node"]
        where = ", ".join(
            [node.get("host", "unknown"), node.get("address", ""), *map("GPU {}".format, node.get("gpus", []))]
        )
        said = "; ".join(failure.strip().splitlines()[0] for failure in entry["failures"])
        outcome = "lost" if entry["lost"] else "done"
        found.append((f"{entry['repeat'] + 1}", entry["arm"], where, f"{entry['attempts']}", outcome, said))
    return found


def tables(record: dict) -> list[tuple[str, tuple, list]]:
    """Return the tables as (title, headings, rows)."""
    placed = [("Placements on the Ray cluster", PLACEMENT_HEADINGS, placement_rows(record))]
    return [
        ("Differences", RATIO_HEADINGS, ratio_rows(record)),
        ("Measurements, medians over the repeats", HEADINGS, rows(record)),
        ("Arms", ARM_HEADINGS, arm_rows(record)),
        *(placed if record.get("placements") else []),
    ]


def show(record: dict, console: Console) -> None:
    """Print tokens/s and its differences, and the outcome."""
    drawn = Table(title="output tokens/s")
    for heading in RATIO_HEADINGS:
        if heading != "metric":
            drawn.add_column(heading, justify="left" if heading in TEXT_COLUMNS else "right")
    for row in ratio_rows(record):
        if row[2] == "output tokens/s":
            drawn.add_row(*row[:2], *row[3:])
    console.print(drawn)
    for line in outcome(record):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def markdown(record: dict) -> str:
    """Return the record as a Markdown page."""
    config = record["config"]
    lines = ["# Served models, arm against arm", "", f"    {record['command']}", "", "## Outcome", ""]
    lines += [f"- {_escaped(line)}" for line in outcome(record)]
    for title, headings, cells in tables(record):
        lines += ["", f"## {title}", "", *_table(headings, cells)]
    lines += ["", "## How to read this", "", *(f"- {_escaped(note)}" for note in notes(record))]
    lines += ["", "## Conditions", "", *_table(("", ""), conditions(record)), "", "## Servers", ""]
    for arm in config["arms"]:
        command = record["arms"].get(arm, {}).get("command")
        lines += [f"{arm}:", "", f"    {shlex.join(command) if command else config['arms'][arm]['url']}", ""]
    lines.append("The record behind this page is ab.json.")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("*", "\\*").replace("|", "\\|").replace("\n", "\n  ")


def _table(headings, cells) -> list[str]:
    left = ["---" if heading in TEXT_COLUMNS or not heading else "---:" for heading in headings]
    found = [f"| {' | '.join(headings)} |", f"|{'|'.join(left)}|"]
    return found + [f"| {' | '.join(_escaped(cell) for cell in row)} |" for row in cells]
