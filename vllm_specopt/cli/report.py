"""Views of the record that `specopt demo` leaves: table, notes and Markdown. Nothing here measures."""

from __future__ import annotations

import shlex
from itertools import zip_longest

from rich.table import Table

ARMS = ("stock", "exact")
HEADINGS = (
    "arm",
    "T",
    "requests/s",
    "output\ntokens/s",
    "TTFT ms\nmedian / p99",
    "TPOT ms\nmedian / p99",
    "acceptance\nlength",
    "sampling,\nshare of step",
)


def compare_greedy(stock: list[list[int]], exact: list[list[int]]) -> dict:
    """Compare the completions of both arms token by token.

    Returns the number of prompts and of identical completions, the number of tokens of the stock arm, and the first
    difference (prompt, position, the two tokens; None for a token where one completion has ended) or None.
    """
    first = None
    identical = 0
    for prompt, (left, right) in enumerate(zip_longest(stock, exact, fillvalue=[])):
        if left == right:
            identical += 1
        elif first is None:
            pairs = enumerate(zip_longest(left, right))
            position, (a, b) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
            first = {"prompt": prompt, "position": position, "stock": a, "exact": b}
    return {
        "prompts": max(len(stock), len(exact)),
        "identical": identical,
        "tokens": sum(map(len, stock)),
        "first_difference": first,
    }


def exit_code(record: dict) -> int:
    """Return 0 if every greedy completion was identical, and there was one, else 1."""
    greedy = record["greedy"]
    return 0 if greedy["prompts"] and greedy["identical"] == greedy["prompts"] else 1


def rows(record: dict) -> list[tuple[str, ...]]:
    """Return the cells of the table, one row per temperature and arm."""
    found = []
    for temperature in record["config"]["temperatures"]:
        for arm in ARMS:
            run = record["arms"][arm]["runs"][str(temperature)]
            bench, scopes = run["bench"], run["scopes"]
            mark = "*" if not _is_valid(record, arm, temperature) else ""
            length = bench.get("spec_decode_acceptance_length")
            found.append(
                (
                    arm,
                    f"{temperature:g}",
                    f"{bench['request_throughput']:.2f}",
                    f"{bench['output_throughput']:.0f}{mark}",
                    f"{bench['median_ttft_ms']:.0f} / {bench['p99_ttft_ms']:.0f}",
                    f"{bench['median_tpot_ms']:.1f} / {bench['p99_tpot_ms']:.1f}",
                    "not reported" if length is None else f"{length:.2f}{mark}",
                    "not measured" if scopes is None else f"{100 * scopes['sampling_share']:.1f} %",
                )
            )
    return found


def _is_valid(record: dict, arm: str, temperature: float) -> bool:
    return not (record["machine"]["device"] == "cpu" and arm == "stock" and temperature > 0)


def notes(record: dict) -> list[str]:
    """Return what has to be known to read the table, one sentence or two per item."""
    config = record["config"]
    found = []
    if record["machine"]["device"] == "cpu":
        found.append(
            "* On CPU, stock vLLM reads uninitialised memory for the sampling parameters when it speculates at a "
            "temperature above 0: that row has another output distribution and is no peer for speed or acceptance. "
            "The T = 0 rows are."
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
    """Return the outcome in sentences: identity of the greedy completions, then what the worker said."""
    greedy, loaded = record["greedy"], record["greedy_under_load"]
    lines = [
        f"greedy: {greedy['identical']} of {greedy['prompts']} completions identical, token for token "
        f"({greedy['tokens']} tokens, one request at a time)"
    ]
    if first := greedy["first_difference"]:
        tokens = {arm: "nothing" if first[arm] is None else f"token {first[arm]}" for arm in ARMS}
        lines.append(
            f"first difference: prompt {first['prompt']}, position {first['position']}: "
            f"stock emitted {tokens['stock']}, exact {tokens['exact']}"
        )
    lines.append(
        f"greedy, {record['config']['concurrency']} in flight: {loaded['identical']} of {loaded['prompts']} texts "
        "identical (not required: which requests share a batch differs from run to run, and rounding with it)"
    )
    lines.append(f"worker of the exact arm: {record['arms']['exact']['worker_line']}")
    return lines


def table(record: dict) -> Table:
    """Return the table for the terminal."""
    drawn = Table(title=f"{record['config']['pair']}, vLLM {record['versions']['vllm']}, {record['machine']['name']}")
    for heading in HEADINGS:
        drawn.add_column(heading, justify="left" if heading == "arm" else "right", no_wrap=True)
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
        f"|---|{'---:|' * (len(heads) - 1)}",
        *(f"| {' | '.join(cell.replace('*', chr(92) + '*') for cell in row)} |" for row in rows(record)),
        "",
        *(f"- {note.replace('*', chr(92) + '*')}" for note in notes(record)),
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
    for arm in ARMS:
        ran = record["arms"][arm]
        shown = [ran["command"], *(run["command"] for run in ran["runs"].values())]
        lines += [f"{arm}, with `{shlex.join(f'{k}={v}' for k, v in ran['env'].items())}`:", ""]
        lines += [f"    {shlex.join(command)}" for command in shown]
        lines.append("")
    lines.append("The record behind this page, raw benchmark results included, is demo.json.")
    return "\n".join(lines) + "\n"
