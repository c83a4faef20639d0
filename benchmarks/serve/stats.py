"""What the cells of the serving comparison amount to: paired ratios with intervals, noise, words, acceptance.

A ratio is the geometric mean over the repeats of (arm / baseline), its interval Student's t on the logarithms (95 %).
The noise is the same ratio for the second server of the baseline, so both columns have as many pairs and the same
distance in time.
"""

from __future__ import annotations

import statistics
from itertools import zip_longest

from vllm_specopt.benchmarks.serve.engine_stats import differs, paired_ratio

# name: (unit, whether more is better)
METRICS = {
    "requests/s": ("1/s", True),
    "output tokens/s": ("1/s", True),
    "TTFT median": ("ms", False),
    "TTFT p99": ("ms", False),
    "TPOT median": ("ms", False),
    "TPOT p99": ("ms", False),
    "ITL median": ("ms", False),
    "ITL p99": ("ms", False),
}
COMPARED = ("output tokens/s", "TTFT median", "TPOT median", "ITL p99")


def value(cell: dict, metric: str) -> float | None:
    """Return a metric of one finished cell, or None where it was not measured."""
    if metric == "requests/s":
        return cell["requests_per_s"]
    if metric == "output tokens/s":
        return cell["tokens_per_s"]
    name, which = metric.split()
    return cell[name.lower()].get(which)


def cells(record: dict, arm: str, temperature: float, concurrency: int) -> dict[int, dict]:
    """Return the finished cells of an arm at one point, by repeat."""
    found = {}
    for repeat in range(record["config"]["repeats"]):
        cell = record["cells"].get(f"{arm}|T{temperature:g}|c{concurrency}|r{repeat}")
        if cell:
            found[repeat] = cell
    return found


def device(cell: dict) -> tuple | None:
    """Return where on a Ray cluster a cell ran; None on the machine of the comparison itself."""
    node = cell.get("node")
    return node and (node.get("node"), *node.get("gpus", []))


def ratio(record: dict, arm: str, temperature: float, concurrency: int, metric: str) -> dict | None:
    """Return the paired ratio of an arm over the baseline; None where no repeat has both on one device."""
    ours = cells(record, arm, temperature, concurrency)
    base = cells(record, record["config"]["baseline"], temperature, concurrency)
    pairs = [
        (value(ours[repeat], metric), value(base[repeat], metric))
        for repeat in ours
        if repeat in base and device(ours[repeat]) == device(base[repeat])
    ]
    known = [(a, b) for a, b in pairs if a and b]
    if not known:
        return None
    return _ratio([a for a, _ in known], [b for _, b in known])


def _ratio(ours: list[float], base: list[float]) -> dict:
    if len({a / b for a, b in zip(ours, base, strict=True)}) == 1 and len(ours) > 1:
        # Equal logarithms have no spread; scipy would warn and answer NaN.
        same = ours[0] / base[0]
        return {"ratio": same, "low": same, "high": same, "pairs": len(ours)}
    return paired_ratio(ours, base)


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
    """Return one row per temperature, concurrency, metric and arm other than the baseline, the noise arm included."""
    config = record["config"]
    rows = []
    for temperature in config["temperatures"]:
        for concurrency in config["concurrency"]:
            for metric in COMPARED:
                at = (temperature, concurrency, metric)
                noise = ratio(record, config["noise"], *at)
                for arm in config["arms"]:
                    if arm == config["baseline"]:
                        continue
                    found = ratio(record, arm, *at)
                    words = verdict(found, None if arm == config["noise"] else noise, METRICS[metric][1])
                    if arm == config["noise"] and found and found["low"] is not None:
                        words = "leaves out 1" if differs(found) else "holds 1"
                    rows.append(
                        {"temperature": temperature, "concurrency": concurrency, "metric": metric, "arm": arm}
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


def medians(record: dict, arm: str, temperature: float, concurrency: int) -> dict | None:
    """Return the medians over the repeats of every metric, the range of tokens/s and the pooled acceptance."""
    found = list(cells(record, arm, temperature, concurrency).values())
    if not found:
        return None
    values = {metric: [v for cell in found if (v := value(cell, metric)) is not None] for metric in METRICS}
    speeds = values["output tokens/s"]
    return {metric: statistics.median(each) if each else None for metric, each in values.items()} | {
        "runs": len(found),
        "slowest": min(speeds),
        "fastest": max(speeds),
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
            first = {"prompt": prompt, "position": position, "other": a, "exact": b}
    return {
        "prompts": max(len(left), len(right)),
        "identical": identical,
        "tokens": sum(map(len, left)),
        "first_difference": first,
    }


def greedy_matches(record: dict) -> dict[str, dict]:
    """Compare the greedy completions of every arm with the baseline's: ``{arm: {prompts, identical, first}}``."""
    base = record["arms"].get(record["config"]["baseline"], {}).get("greedy")
    if not base:
        return {}
    return {
        arm: compare_completions(base, found["greedy"])
        for arm, found in record["arms"].items()
        if arm != record["config"]["baseline"] and found.get("greedy")
    }
