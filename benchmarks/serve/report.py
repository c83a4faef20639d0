"""Views of the record of `specopt ab`: tables, notes and outcome, for the terminal and as Markdown."""

from __future__ import annotations

import shlex

from rich.console import Console

from vllm_specopt.benchmarks import tables
from vllm_specopt.benchmarks.serve import stats
from vllm_specopt.benchmarks.serve.plan import GREEDY
from vllm_specopt.benchmarks.serve.stats import SPEED

HEADINGS = (
    "sampling",
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
RATIO_HEADINGS = (
    "sampling", "in flight", "metric", "arm", "ratio", "95 % interval", "noise", "noise interval", "outcome",
)  # fmt: skip
ARM_HEADINGS = ("arm", "peak resident MiB", "GPU MiB", "KV cache, tokens")
PLACEMENT_HEADINGS = ("repeat", "node", "outcome")
TEXT_COLUMNS = {"arm", "sampling", "metric", "outcome", "node"}


def number(value: float | None, form: str) -> str:
    """Return a number in a format, or that there is none."""
    return "–" if value is None else format(value, form)


def mark(record: dict, arm: str, point: str) -> str:
    """Return an asterisk for stock as it comes on a CPU above temperature 0, whose numbers are no comparison."""
    return "*" if record["machine"]["device"] == "cpu" and arm == "stock" and point != GREEDY else ""


def rows(record: dict) -> list[tuple[str, ...]]:
    """Return the medians, one row per point, concurrency and arm."""
    config = record["config"]
    found: list[tuple[str, ...]] = []
    for point in config["points"]:
        for slots in config["concurrency"]:
            for arm in config["arms"]:
                if not (one := stats.medians(record, arm, point, slots)):
                    continue
                pair = [f"{number(one[f'{name} median'], '.1f')} / {number(one[f'{name} p99'], '.1f')}"
                        for name in ("TTFT", "TPOT", "ITL")]  # fmt: skip
                note = mark(record, arm, point)
                found.append((
                    point, f"{slots}", arm, f"{one['requests/s']:.2f}", f"{one[SPEED]:.0f}{note}",
                    f"{one['slowest']:.0f} – {one['fastest']:.0f}", *pair, number(one["length"], ".2f") + note,
                    number(one["rate"], ".3f") + note, str(one["runs"]),
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
        note = mark(record, row["arm"], row["point"])
        found.append((
            row["point"], f"{row['concurrency']}", row["metric"], row["arm"],
            number(ratio and ratio["ratio"], ".3f") + note, interval(ratio), number(noise and noise["ratio"], ".3f"),
            interval(noise), row["words"] + note,
        ))  # fmt: skip
    return found


def step_rows(record: dict) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return headings and rows of where a step's time goes: milliseconds by scope, and the share of sampling."""
    profiled = {
        (point, arm): found
        for point in record["config"]["points"]
        for arm in record["config"]["arms"]
        if (found := record["arms"].get(arm, {}).get("scopes", {}).get(point))
    }
    parts = list(dict.fromkeys(part for found in profiled.values() for part in found["milliseconds"]))
    headings = ("sampling", "arm", "steps", "ms per step", *parts, "share of sample", "ratio if it were free")
    cells = []
    for (point, arm), found in profiled.items():
        steps, spent = found["steps"], found["milliseconds"]
        cells.append((
            point, arm, f"{steps}", f"{sum(spent.values()) / steps:.1f}",
            *(number(spent[part] / steps if part in spent else None, ".1f") for part in parts),
            f"{100 * found['sampling_share']:.1f} %", f"{1 / (1 - found['sampling_share']):.2f}",
        ))  # fmt: skip
    return headings, cells


def arm_rows(record: dict) -> list[tuple[str, ...]]:
    """Return what belongs to an arm as a whole."""
    arms = [(arm, record["arms"].get(arm, {})) for arm in record["config"]["arms"]]
    return [
        (arm, number(one.get("peak_mib"), ".0f"), number(one.get("gpu_mib"), ".0f"),
         number(one.get("kv_cache_tokens"), ","))
        for arm, one in arms
    ]  # fmt: skip


def placement_rows(record: dict) -> list[tuple[str, ...]]:
    """Return where each repeat of a comparison on a Ray cluster ran."""
    return [
        (f"{entry['repeat'] + 1}", ", ".join([entry["host"], *map("GPU {}".format, entry["gpus"])]), entry["outcome"])
        for entry in record.get("placements", [])
    ]


def notes(record: dict) -> list[str]:
    """Return what has to be known to read the tables."""
    config, machine = record["config"], record["machine"]
    own = not any(arm["url"] for arm in config["arms"].values())
    found = [
        f"Ratio: the arm over {config['baseline']}, geometric mean over the repeats; interval: Student's t on the "
        "logarithms. Above 1 is better for tokens/s, worse for times.",
    ]
    if config["noise"]:
        what = "two processes with the same command" if own else "one server measured twice"
        found += [
            f"Noise: {config['noise']} over {config['baseline']}, {what}, with as many pairs as the other ratios. A "
            "difference is reported only where the interval leaves out 1 and the ratio is outside the noise interval "
            "and its inverse.",
            "Intervals are not corrected for their number: one in twenty leaves out 1 by chance.",
        ]
    elif config["repeats"] == 1:
        found.append("One run per row: small differences are noise.")
    turns = "in each, the arms take turns, forwards and then backwards (A B C, C B A)."
    if record.get("placements"):
        found.append(f"Order: each repeat ran on one device of the Ray cluster, a server at a time; {turns}")
    elif config["offline"]:
        found.append(f"Order: whole repeats; {turns} Each run is a process with one engine, all requests at once.")
    else:
        found.append(f"Order: whole repeats; {turns} All servers are up all the time; only one is asked.")
    if not config["offline"]:
        found.append(
            "All figures are vLLM's own client's (`vllm bench serve`); acceptance is its reading of the server's "
            "/metrics. Its process forks per run from one that has imported vLLM, which the timings do not see."
        )
    if any(mark(record, arm, point) for arm in config["arms"] for point in config["points"]):
        found.append("* Stock on a CPU reads uninitialised sampling parameters there: no peer for speed or acceptance.")
    if machine["device"] == "cpu" and own:
        found.append(
            "Parts of a step: the model runner's time by vLLM's profiler scopes (`sample` is all of sampling), medians "
            "over the steps of a short burst beside the timed runs, the same at every number of requests in flight; "
            "the profiler slows a step by some per cent. Peak memory: sum of the peaks of all processes of an arm, an "
            "upper bound."
        )
    loads = [cell["load_average"] for cell in record["cells"].values()]
    if loads and max(loads) > machine["cores"] + 1:
        found.append(f"The machine was busy: load average up to {max(loads):.1f} on {machine['cores']} cores.")
    return [*record.get("notices", []), *found]


def outcome(record: dict) -> list[str]:
    """Return the outcome in sentences: failures, speed and share of sampling by point, the noise, the texts."""
    config, lines = record["config"], []
    base = config["baseline"]
    for arm, found in record["arms"].items():
        lines += [f"{arm}: FAILED: {found['error']}"] if found.get("error") else []
    for row in stats.compare(record):
        arm, point, slots = row["arm"], row["point"], row["concurrency"]
        if row["metric"] != SPEED or arm == config["noise"] or not row["ratio"] or mark(record, arm, point):
            continue
        speeds = [stats.medians(record, each, point, slots) or {} for each in (arm, base)]
        line = f"{arm}, {point}, {slots} in flight: {row['ratio']['ratio']:.2f} times the tokens per second of {base}"
        lines.append(f"{line} ({speeds[0][SPEED]:.0f}, not {speeds[1][SPEED]:.0f}; {row['words']})")
    for arm in config["arms"]:
        for point in config["points"]:
            before, after = (stats.share(record, each, point) for each in (base, arm))
            if before and after and arm not in (base, config["noise"]) and not mark(record, arm, point):
                went = f"from {100 * before:.2g} % to {100 * after:.2g} % of a step"
                lines.append(f"{arm}, {point}: sampling went {went}, in a profiled burst")
    noise = stats.noise_summary(record)
    if noise["intervals"]:
        lines.append(
            f"noise: {noise['leave_out_1']} of {noise['intervals']} intervals leave out 1 "
            f"({0.05 * noise['intervals']:.1f} expected by chance), "
            f"the ratio furthest from 1 is {noise['furthest']:.3f}"
        )
    for match in stats.text_matches(record):
        kind = "greedy" if match["point"] == GREEDY else "seeded"
        line = (
            f"{match['arm']}, {match['point']}: {match['identical']} of {match['prompts']} {kind} texts identical to "
            f"those of {match['other']}, token for token ({match['tokens']} tokens)"
        )
        if first := match["first_difference"]:
            line += f"; first difference: prompt {first['prompt']}, position {first['position']}"
        lines.append(line)
    if record["failed_cells"]:
        lines.append(f"{len(record['failed_cells'])} runs failed: {', '.join(record['failed_cells'])}")
    return lines


def exit_code(record: dict) -> int:
    """Return 1 if an arm or a run failed, or an exact arm's greedy texts differ, else 0."""
    config = record["config"]
    failed = any(arm.get("error") for arm in record["arms"].values()) or record["failed_cells"]
    differ = {
        match["arm"] for match in stats.text_matches(record)
        if match["point"] == GREEDY and match["identical"] != match["prompts"]
    }  # fmt: skip
    exact = {arm for arm, one in config["arms"].items() if (one["option"] or {}).get("method") == "exact"}
    # Where the baseline's own texts differ from process to process, so may ours.
    return int(bool(failed or (differ & exact and config["noise"] not in differ)))


def conditions(record: dict) -> list[tuple[str, str]]:
    """Return where, when and with what the record was made."""
    config, machine = record["config"], record["machine"]
    shown = {
        "time": f"{record['time']}, {record.get('seconds', 0)} s in all",
        "commit": tables.commit(record),
        "machine": f"{machine['name']}, {machine['cores']} cores, load average {machine['load_average_before']} before",
    } | record["versions"]
    skipped = ("arms", "baseline", "noise", "points")
    return [(key, str(value)) for key, value in (shown | {k: v for k, v in config.items() if k not in skipped}).items()]


def all_tables(record: dict) -> list[tuple[str, tuple, list]]:
    """Return the tables that have rows as (title, headings, rows)."""
    found = [
        ("Differences", RATIO_HEADINGS, ratio_rows(record)),
        ("Measurements, medians over the repeats", HEADINGS, rows(record)),
        ("Where a step's time goes", *step_rows(record)),
        ("Arms", ARM_HEADINGS, arm_rows(record)),
        ("Repeats on the Ray cluster", PLACEMENT_HEADINGS, placement_rows(record)),
    ]
    return [(title, headings, cells) for title, headings, cells in found if cells]


def show(record: dict, console: Console) -> None:
    """Print tokens/s and its differences, and the outcome."""
    cells = [(*row[:2], *row[3:]) for row in ratio_rows(record) if row[2] == SPEED]
    console.print(tables.terminal(SPEED, [*RATIO_HEADINGS[:2], *RATIO_HEADINGS[3:]], cells, TEXT_COLUMNS))
    for line in outcome(record):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def markdown(record: dict) -> str:
    """Return the record as a Markdown page, beside which its picture lies."""
    config = record["config"]
    lines = ["# Arm against arm", "", f"    {record['command']}", "", "## Outcome", ""]
    lines += [f"- {tables.escaped(line)}" for line in outcome(record)]
    lines += ["", "![tokens/s, latencies, acceptance and differences](report.png)"]
    for title, headings, cells in all_tables(record):
        lines += ["", f"## {title}", "", *tables.markdown(headings, cells, TEXT_COLUMNS)]
    lines += ["", "## How to read this", "", *(f"- {tables.escaped(note)}" for note in notes(record))]
    lines += ["", "## Conditions", "", *tables.markdown(("", ""), conditions(record), ()), ""]
    for arm, settings in config["arms"].items():
        if command := record["arms"].get(arm, {}).get("command"):
            lines += [f"{arm}:", "", f"    {shlex.join(command)}", ""]
        elif settings["url"]:
            lines += [f"{arm}: {settings['url']}", ""]
    lines.append("The record behind this page is ab.json.")
    return "\n".join(lines) + "\n"
