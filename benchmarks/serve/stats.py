"""What the cells of a comparison amount to: paired ratios with intervals, noise, words, acceptance, texts.

A ratio is the geometric mean over the repeats of (arm / baseline), its interval Student's t on the logarithms (95 %).
The noise is the same ratio for the second process of the baseline, so both columns have as many pairs and the same
distance in time.
"""

from __future__ import annotations

import statistics
from itertools import zip_longest

from vllm_specopt.benchmarks.intervals import differs, paired_ratio
from vllm_specopt.benchmarks.serve.plan import GREEDY, PLAIN, Cell

# name: (field of a cell, and within it; whether more is better)
METRICS = {
    "requests/s": ("requests_per_s", None, True),
    "output tokens/s": ("tokens_per_s", None, True),
    "tokens per CPU second": ("tokens_per_cpu_s", None, True),
    "TTFT median": ("ttft", "median", False),
    "TTFT p99": ("ttft", "p99", False),
    "TPOT median": ("tpot", "median", False),
    "TPOT p99": ("tpot", "p99", False),
    "ITL median": ("itl", "median", False),
    "ITL p99": ("itl", "p99", False),
}
COMPARED = ("output tokens/s", "tokens per CPU second", "TTFT median", "TPOT median", "ITL p99")
SPEED = "output tokens/s"


def value(cell: dict, metric: str) -> float | None:
    """Return a metric of one finished cell, or None where it was not measured."""
    field, within, _ = METRICS[metric]
    found = cell.get(field)
    return found.get(within) if found and within else found


def cells(record: dict, arm: str, point: str, concurrency: int) -> dict[int, dict]:
    """Return the finished cells of an arm at one point and concurrency, by repeat."""
    keys = {n: Cell(arm, point, concurrency, n).key for n in range(record["config"]["repeats"])}
    return {repeat: record["cells"][key] for repeat, key in keys.items() if key in record["cells"]}


def ratio(record: dict, arm: str, point: str, concurrency: int, metric: str) -> dict | None:
    """Return the paired ratio of an arm over the baseline; None where no repeat has both."""
    ours = cells(record, arm, point, concurrency)
    base = cells(record, record["config"]["baseline"], point, concurrency)
    pairs = [(value(ours[repeat], metric), value(base[repeat], metric)) for repeat in ours if repeat in base]
    known = [(a, b) for a, b in pairs if a and b]
    return paired_ratio(*zip(*known, strict=True)) if known else None


def band(noise: dict | None) -> tuple[float, float] | None:
    """Return the ratios that two equal servers reach: the noise interval and its inverse, 1 included."""
    if noise is None or noise["low"] is None:
        return None
    ends = (1.0, noise["low"], noise["high"], 1 / noise["low"], 1 / noise["high"])
    return min(ends), max(ends)


def verdict(found: dict | None, noise: dict | None, more_is_better: bool) -> str:
    """Return `better`, `worse`, `no difference`, or why neither can be said.

    A difference needs an interval that leaves out 1 and a ratio outside the band of the noise.
    """
    if found is None:
        return "not measured"
    if found["low"] is None:
        return "one pair: no interval"
    limits = band(noise)
    if not differs(found) or (limits and limits[0] <= found["ratio"] <= limits[1]):
        return "no difference"
    word = "better" if (found["ratio"] > 1) == more_is_better else "worse"
    return word if limits else f"{word} (no noise to compare with)"


def compare(record: dict) -> list[dict]:
    """Return one row per point, concurrency, metric and arm other than the baseline, the noise arm included."""
    config = record["config"]
    rows = []
    for point in config["points"]:
        for concurrency in config["concurrency"]:
            for metric in COMPARED:
                at = (point, concurrency, metric)
                noise = ratio(record, config["noise"], *at)
                for arm in config["arms"]:
                    found = ratio(record, arm, *at)
                    if arm == config["baseline"] or (found is None and metric != SPEED):
                        continue
                    words = verdict(found, None if arm == config["noise"] else noise, METRICS[metric][2])
                    if arm == config["noise"] and found and found["low"] is not None:
                        words = "leaves out 1" if differs(found) else "holds 1"
                    rows.append(
                        {"point": point, "concurrency": concurrency, "metric": metric, "arm": arm}
                        | {"ratio": found, "noise": noise, "words": words}
                    )
    return rows


def noise_summary(record: dict) -> dict:
    """Return how the noise behaves: intervals there are, those that leave out 1, and the largest ratio off 1."""
    found = [row["ratio"] for row in compare(record) if row["arm"] == record["config"]["noise"] and row["ratio"]]
    with_ends = [one for one in found if one["low"] is not None]
    return {
        "intervals": len(with_ends),
        "leave_out_1": sum(bool(differs(one)) for one in with_ends),
        "furthest": max((max(one["ratio"], 1 / one["ratio"]) for one in found), default=None),
    }


def medians(record: dict, arm: str, point: str, concurrency: int) -> dict | None:
    """Return the medians over the repeats of every metric, the range of tokens/s and the pooled acceptance."""
    found = list(cells(record, arm, point, concurrency).values())
    if not found:
        return None
    values = {metric: [v for cell in found if (v := value(cell, metric)) is not None] for metric in METRICS}
    return {metric: statistics.median(each) if each else None for metric, each in values.items()} | {
        "runs": len(found),
        "slowest": min(values[SPEED]),
        "fastest": max(values[SPEED]),
        **acceptance(found),
    }


def acceptance(found: list[dict]) -> dict:
    """Return rate (accepted / drafted), length (1 + accepted / drafts) and rate by position over some cells."""
    counted = [cell for cell in found if cell.get("num_drafts")]
    drafts, drafted, accepted = (
        sum(cell[key] for cell in counted) for key in ("num_drafts", "draft_tokens", "accepted_tokens")
    )
    if not drafts:
        return {"rate": None, "length": None, "positions": []}
    width = max(len(cell["accepted_per_position"]) for cell in counted)
    positions = [
        sum(cell["num_drafts"] * cell["accepted_per_position"][i] for cell in counted
            if i < len(cell["accepted_per_position"])) / drafts
        for i in range(width)
    ]  # fmt: skip
    return {"rate": accepted / drafted, "length": 1 + accepted / drafts, "positions": positions}


def share(record: dict, arm: str, point: str) -> float | None:
    """Return what sampling takes of an arm's step at a point; None where it was not measured."""
    found = record["arms"].get(arm, {}).get("scopes", {}).get(point)
    return found and found["sampling_share"]


def compare_completions(left: list[list[int]], right: list[list[int]]) -> dict:
    """Compare completions token by token.

    Returns their number, that of identical ones, the number of tokens on the left, and the first difference (prompt,
    position, the two tokens; None for a token where one completion has ended) or None.
    """
    first = None
    identical = 0
    ended: list[int] = []
    for prompt, (one, other) in enumerate(zip_longest(left, right, fillvalue=ended)):
        if one == other:
            identical += 1
        elif first is None:
            pairs = enumerate(zip_longest(one, other))
            position, (a, b) = next((place, pair) for place, pair in pairs if pair[0] != pair[1])
            first = {"prompt": prompt, "position": position, "other": a, "here": b}
    return {
        "prompts": max(len(left), len(right)),
        "identical": identical,
        "tokens": sum(map(len, left)),
        "first_difference": first,
    }


def text_matches(record: dict) -> list[dict]:
    """Compare texts: greedy ones with the baseline's, seeded ones with those of the drop-in without speculation."""
    texts = {arm: found.get("texts", {}) for arm, found in record["arms"].items()}
    found = []
    for arm, own in texts.items():
        for point, mine in own.items():
            other = record["config"]["baseline"] if point == GREEDY else PLAIN.name
            if arm not in (other, PLAIN.name) and point in texts.get(other, {}):
                compared = compare_completions(texts[other][point], mine)
                found.append({"arm": arm, "other": other, "point": point} | compared)
    return found
