"""Views of the record that `python -m research.quality` leaves: table, notes and Markdown. Nothing here measures."""

from __future__ import annotations

from collections.abc import Callable

from rich.table import Table

from research.quality.arms import DRAFT, EXACT, TARGET
from research.quality.scores import LOWER_IS_BETTER, METRICS, interval
from vllm_specopt.benchmarks import tables

NONE = "–"
SCORE_NAMES = {"wer": "WER, %", "rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
# Heading, field of a run, and how a number is written.
COLUMNS: list[tuple[str, str, Callable[[float], str]]] = [
    ("acceptance", "acceptance_rate", "{:.3f}".format),
    ("tokens a step", "acceptance_length", "{:.2f}".format),
    ("tokens/s", "tokens_per_second", "{:.0f}".format),
    ("TV", "tv", "{:.3f}".format),
    ("perplexity", "perplexity", "{:.2f}".format),
    ("repetition", "repetition", "{:.4f}".format),
]
CUT_SHARE = 0.05


def score_fields(record: dict) -> list[str]:
    """The fields of a run that hold its scores."""
    return [field for metric in record["config"]["metrics"] for field in METRICS[metric]]


def values(record: dict, arm: str, temperature: float, field: str) -> dict | None:
    """Mean and interval of a field over an arm's seeds; None where the field means nothing for the arm.

    The draft alone is not verified: its TV is that of its law from the target's, on the rows of the exact arm.
    """
    if field == "tv" and arm == TARGET:
        return None
    of_law = field == "tv" and arm == DRAFT
    runs = record["arms"].get(EXACT if of_law else arm, {}).get("runs", [])
    runs = [run for run in runs if run["temperature"] == temperature]
    return interval([(run["law"] or {}).get("draft_tv") if of_law else run.get(field) for run in runs])


def cell(found: dict | None, written: Callable[[float], str]) -> str:
    """A mean with half the width of its interval."""
    if found is None:
        return NONE
    half = found["half_width"]
    return written(found["mean"]) + ("" if half is None else f" ± {written(half)}")


def headings(record: dict) -> list[str]:
    """Return the headings of the table."""
    return ["arm", *(SCORE_NAMES[field] for field in score_fields(record)), *(heading for heading, _, _ in COLUMNS)]


def rows(record: dict, temperature: float) -> list[list[str]]:
    """Return the cells of the table, one row per arm; an arm that failed says so."""
    columns = [(field, "{:.1f}".format) for field in score_fields(record)] + [(f, w) for _, f, w in COLUMNS]
    found = []
    for arm, measured in record["arms"].items():
        if "error" in measured:
            found.append([arm, "failed", *[""] * (len(columns) - 1)])
        else:
            found.append([arm, *(cell(values(record, arm, temperature, field), written) for field, written in columns)])
    return found


def notes(record: dict) -> list[str]:
    """Return what has to be known to read the table, one sentence or two per item."""
    config = record["config"]
    better = "less is better" if set(score_fields(record)) & LOWER_IS_BETTER else "more is better"
    found = [
        f"{config['items']} items, {config['seeds']} seeds; ± is half a 95 % confidence interval over the seeds "
        "(Student's t), for these models and items. At T = 0 a seed changes nothing: one run, no interval.",
        f"Scores: {better}; ROUGE: F-measures in percent, words not stemmed. Texts are compared as they are, and "
        "prompts go in without a chat template.",
        f"Acceptance: accepted of all drafted tokens, {config['draft_tokens']} a step; tokens a step count the bonus "
        "or recovered token.",
        "TV: distance of the first emitted token's law from the target's, from whole rows that the arm itself judged "
        f"on the first {min(config['law_items'], config['items'])} prompts; the draft's own on the rows of {EXACT}.",
        "Perplexity: of the texts under the target alone at T = 1, end of text included. Repetition: share of word "
        f"{config['ngram']}-grams that occurred before in the same text.",
    ]
    for arm, measured in record["arms"].items():
        cut = sum(run["cut"] for run in measured.get("runs", []))
        total = len(measured.get("runs", [])) * config["items"]
        if total and cut / total > CUT_SHARE:
            found.append(f"{arm}: {100 * cut / total:.0f} % of the texts were cut at {config['max_tokens']} tokens.")
    load, cores = record["machine"]["load_average_before"], record["machine"]["cores"]
    if load > cores / 2:
        found.append(f"The machine was busy (load {load:g} on {cores} cores): tokens/s mean little.")
    return found


def table(record: dict, temperature: float) -> Table:
    """Return the table of one temperature for the terminal."""
    config = record["config"]
    title = f"{config['name']}: {config['target']} + {config['draft']}, T = {temperature:g}"
    return tables.terminal(title, headings(record), rows(record, temperature), ("arm",))


def markdown(record: dict) -> str:
    """Return the whole record as a Markdown page."""
    config, commit = record["config"], tables.commit(record)
    lines = [f"# Quality: {config['name']}", "", f"`{record['command']}`, {record['time']}, commit {commit}", ""]
    for temperature in config["temperatures"]:
        lines += [f"## T = {temperature:g}", ""]
        lines += [*tables.markdown(headings(record), rows(record, temperature), ("arm",)), ""]
    lines += [f"- {note}" for note in notes(record)]
    failed = {arm: measured["error"] for arm, measured in record["arms"].items() if "error" in measured}
    if "perplexity_error" in record:
        failed["perplexity"] = record["perplexity_error"]
    for arm, error in failed.items():
        lines += ["", f"## {arm} failed", "", "```", error, "```"]
    lines += ["", "## First texts", ""]
    for arm, measured in record["arms"].items():
        lines += [
            f"- {arm}: {shown['text']!r} (reference: {shown['reference']!r})" for shown in measured.get("texts", [])[:1]
        ]
    shown = [(key, str(value)) for part in ("machine", "versions", "config") for key, value in record[part].items()]
    lines += ["", "## Conditions", "", *tables.markdown(("", ""), shown, ())]
    return "\n".join([*lines, "", "The record behind this page is quality.json."]) + "\n"
