"""Views of the record that `specopt demo` leaves: table, notes and Markdown. Nothing here measures."""

from __future__ import annotations

import shlex

from rich.table import Table

from vllm_specopt.benchmarks.serve.stats import compare_completions

ARMS = ("stock", "exact")
COMPARED = {"stock": ("T = 0",), "plain": ("T = 1", "T = 0.8, top-p 0.9")}
"""Workloads in which the texts of exact must be those of another arm; ``plain`` is exact without speculation."""
HEADINGS = (
    "workload",
    "arm",
    "output\ntokens/s",
    "TPOT ms\nmedian / p99",
    "TTFT ms\nmedian / p99",
    "acceptance\nlength",
    "sampling,\nshare of step",
)


def compare_texts(arms: dict) -> dict:
    """Compare the completions of exact with those of the arms that it must equal, workload by workload."""
    return {
        workload: {"arm": arm} | compare_completions(arms[arm]["texts"][workload], arms["exact"]["texts"][workload])
        for arm, workloads in COMPARED.items()
        for workload in workloads
    }


def exit_code(record: dict) -> int:
    """Return 0 if every greedy completion was identical, and there was one, else 1."""
    greedy = record["texts"]["T = 0"]
    return 0 if greedy["prompts"] and greedy["identical"] == greedy["prompts"] else 1


def rows(record: dict) -> list[tuple[str, ...]]:
    """Return the cells of the table, one row per workload and arm."""
    found: list[tuple[str, ...]] = []
    for workload in record["config"]["workloads"]:
        for arm in ARMS:
            run = record["arms"][arm]["runs"][workload]
            bench, scopes = run["bench"], run["scopes"]
            length = bench.get("spec_decode_acceptance_length")
            found.append(
                (
                    workload,
                    shown(record, arm),
                    f"{bench['output_throughput']:.0f}",
                    f"{bench['median_tpot_ms']:.1f} / {bench['p99_tpot_ms']:.1f}",
                    f"{bench['median_ttft_ms']:.0f} / {bench['p99_ttft_ms']:.0f}",
                    "not reported" if length is None else f"{length:.2f}",
                    "not measured" if scopes is None else f"{100 * scopes['sampling_share']:.1f} %",
                )
            )
    return found


def shown(record: dict, arm: str) -> str:
    """Return the name of an arm for readers."""
    return "stock, repaired" if arm == "stock" and record["machine"]["device"] == "cpu" else arm


def sentences(record: dict) -> list[str]:
    """Return what each workload shows, in a sentence."""
    found = []
    for workload in record["config"]["workloads"]:
        stock, exact = (record["arms"][arm]["runs"][workload] for arm in ARMS)
        speeds = [run["bench"]["output_throughput"] for run in (stock, exact)]
        line = f"{workload}: {speeds[1] / speeds[0]:.2f} times the tokens per second"
        line += f" ({speeds[1]:.0f}, not {speeds[0]:.0f})"
        if stock["scopes"] and exact["scopes"]:
            before, after = (100 * run["scopes"]["sampling_share"] for run in (stock, exact))
            line += f"; sampling went from {before:.0f} % to {after:.1f} % of a step"
        found.append(line + ".")
    return found


def notes(record: dict) -> list[str]:
    """Return what has to be known to read the table, one sentence or two per item."""
    config = record["config"]
    found = []
    if record["machine"]["device"] == "cpu":
        found.append(
            "Stock, repaired: as it comes, vLLM on a CPU reads uninitialised memory for the sampling parameters when "
            "it speculates at a temperature above 0; that one function is replaced in the stock arm."
        )
    found.append(
        f"One run per row ({config['num_prompts']} requests of {config['output_len']} tokens, "
        f"{config['concurrency']} in flight, {record['machine']['cores']} cores): small differences are noise."
    )
    cores, load = record["machine"]["cores"], record["machine"]["load"]
    if load > cores:
        found.append(f"The machine was busy already (load {load} on {cores} cores): these timings mean little.")
    if any(run["scopes"] for arm in ARMS for run in record["arms"][arm]["runs"].values()):
        found.append(
            "Sampling: its share of the model runner's time in vLLM's profiler scopes, over a short burst of its own "
            "after the timed runs (the profiler slows a step by some per cent)."
        )
    return found


def verdict(record: dict) -> list[str]:
    """Return the outcome in sentences: which texts are identical, then what the worker said."""
    lines = []
    for workload, found in record["texts"].items():
        other = "stock's" if found["arm"] == "stock" else "those of the same requests without speculation"
        kind = "greedy texts" if workload == "T = 0" else "seeded texts"
        lines.append(
            f"{workload}: {found['identical']} of {found['prompts']} {kind} equal {other}, token for token "
            f"({found['tokens']} tokens, one request at a time)"
        )
        if first := found["first_difference"]:
            tokens = {arm: "nothing" if first[arm] is None else f"token {first[arm]}" for arm in ("other", "exact")}
            lines.append(
                f"first difference: prompt {first['prompt']}, position {first['position']}: {tokens['other']} there, "
                f"{tokens['exact']} here"
            )
    lines.append(f"worker of the exact arm: {record['arms']['exact']['worker_line']}")
    return lines


def table(record: dict) -> Table:
    """Return the table for the terminal."""
    drawn = Table(title=f"{record['config']['pair']}, vLLM {record['versions']['vllm']}, {record['machine']['name']}")
    for heading in HEADINGS:
        drawn.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right", no_wrap=True)
    for number, row in enumerate(rows(record)):
        drawn.add_row(*row, end_section=number % len(ARMS) == len(ARMS) - 1)
    return drawn


def markdown(record: dict) -> str:
    """Return the whole record as a Markdown page."""
    heads = [heading.replace("\n", " ") for heading in HEADINGS]
    commit = (record["git"]["commit"] or "unknown") + (" with changes" if record["git"]["dirty"] else "")
    lines = [
        "# specopt demo",
        "",
        f"{record['time']}, commit {commit}",
        "",
        f"| {' | '.join(heads)} |",
        f"|---|---|{'---:|' * (len(heads) - 2)}",
        *(f"| {' | '.join(row)} |" for row in rows(record)),
        "",
        *(f"- {line}" for line in [*sentences(record), *notes(record)]),
        "",
        "## Outcome",
        "",
        *(f"- {line}" for line in verdict(record)),
        "",
        "## Conditions",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for part in ("machine", "versions", "config") for key, value in record[part].items()),
        "",
        "## Commands",
        "",
    ]
    for arm, ran in record["arms"].items():
        shown = [ran["command"], *(run["command"] for run in ran["runs"].values())]
        lines += [f"{arm}, with `{shlex.join(f'{k}={v}' for k, v in ran['env'].items())}`:", ""]
        lines += [f"    {shlex.join(command)}" for command in shown]
        lines.append("")
    lines.append("The record behind this page, raw benchmark results included, is demo.json.")
    return "\n".join(lines) + "\n"
