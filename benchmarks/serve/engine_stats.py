"""What the runs of the engine benchmark amount to: medians, paired ratios with intervals, acceptance, parts of a step.

Everything is computed from the record that `specopt bench-engine` leaves. A ratio is the geometric mean over pairs of
neighbouring runs, its interval Student's t on the logarithms of the pairs' ratios (95 %).
"""

from __future__ import annotations

import math
import statistics

CONFIDENCE = 0.95
PARTS = ("target", "target LM head", "drafting", "draft LM head", "draft sampling", "sampler", "rest")


def speeds(record: dict, drafting: str, workload: str, arm: str, clock: str = "seconds") -> list[float]:
    """Return the tokens per second of an arm's runs, by repeat; ``clock`` is ``seconds`` or ``cpu_seconds``."""
    return [run["tokens"] / run[clock] for run in measured(record, drafting, workload, arm)]


def measured(record: dict, drafting: str, workload: str, arm: str) -> list[dict]:
    """Return what the runs of an arm measured, by repeat."""
    runs = [run for run in record["runs"] if run["arm"] == arm and run["drafting"] == drafting]
    return [run["workloads"][workload] for run in sorted(runs, key=lambda run: run["repeat"])]


def paired_ratio(ours: list[float], baseline: list[float]) -> dict:
    """Return the mean ratio of the pairs there are and its interval, ``low`` and ``high`` None for a single pair."""
    from scipy.stats import ttest_1samp

    logs = [math.log(a / b) for a, b in zip(ours, baseline, strict=False)]
    return _ratio(statistics.fmean(logs), ttest_1samp(logs, 0) if len(logs) > 1 else None, len(logs))


def noise_ratio(speeds: list[float]) -> dict | None:
    """Compare an arm with itself: every second run with the others. None for fewer than two runs.

    The interval is that of two samples, without pairs, since there are half as many pairs as runs.
    """
    from scipy.stats import ttest_ind

    logs = [math.log(speed) for speed in speeds]
    second, first = logs[1::2], logs[::2]
    if not second:
        return None
    test = ttest_ind(second, first) if len(logs) > 2 else None
    return _ratio(statistics.fmean(second) - statistics.fmean(first), test, len(second))


def _ratio(mean: float, test, pairs: int) -> dict:
    low = high = None
    if test is not None:
        low, high = (float(math.exp(end)) for end in test.confidence_interval(CONFIDENCE))
    return {"ratio": math.exp(mean), "low": low, "high": high, "pairs": pairs}


def differs(ratio: dict) -> bool | None:
    """Whether an interval leaves out 1; None without an interval."""
    return None if ratio["low"] is None else not ratio["low"] <= 1 <= ratio["high"]


def parts(runs: list[dict]) -> dict[str, float] | None:
    """Return milliseconds per engine step by part, disjoint and adding up to the step; None where not measured."""
    if not runs or any(run["parts"] is None for run in runs):
        return None
    steps = sum(run["steps"] for run in runs)
    total = {part: sum(run["parts"].get(part, 0.0) for run in runs) for part in PARTS}
    draft_tokens = sum(run["parts"].get("draft LM head and sampling", 0.0) for run in runs)
    total["rest"] = sum(run["seconds"] for run in runs) - total["target"] - total["sampler"] - total["drafting"]
    total["target"] -= total["target LM head"]
    total["drafting"] -= draft_tokens
    total["draft sampling"] = draft_tokens - total["draft LM head"]
    return {part: 1000 * seconds / steps for part, seconds in total.items()}


def summarise(record: dict) -> list[dict]:
    """Return one summary per way of drafting, workload and arm, in the order of the configuration."""
    config = record["config"]
    found = []
    for drafting in config["drafting"]:
        for workload in config["workloads"][drafting]:
            for arm in config["arms"]:
                if runs := measured(record, drafting, workload, arm):
                    ratios = {}
                    for name, clock in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds")):
                        base = speeds(record, drafting, workload, config["baseline"], clock)
                        own = speeds(record, drafting, workload, arm, clock)
                        ratios[name] = noise_ratio(base) if arm == config["baseline"] else paired_ratio(own, base)
                    found.append({"drafting": drafting, "workload": workload, "arm": arm} | _arm(runs) | ratios)
    return found


def _arm(runs: list[dict]) -> dict:
    found = [run["tokens"] / run["seconds"] for run in runs]
    steps = parts(runs)
    drafted, accepted = (sum(run[key] for run in runs) for key in ("draft_tokens", "accepted_tokens"))
    return {
        "runs": len(runs),
        "speed": statistics.median(found),
        "slowest": min(found),
        "fastest": max(found),
        "acceptance_rate": accepted / drafted if drafted else None,
        "acceptance_length": 1 + accepted / drafts if (drafts := sum(run["drafts"] for run in runs)) else None,
        "tail_share": sum(run["tail_tokens"] for run in runs) / sum(run["tokens"] for run in runs),
        "steps": statistics.median(run["steps"] for run in runs) if steps else None,
        "parts": steps,
        "sampler_share": steps["sampler"] / sum(steps.values()) if steps else None,
        "peak_mib": max(run["peak_mib"] for run in runs),
        "gpu_peak_mib": max((peak for run in runs if (peak := run.get("gpu_peak_mib")) is not None), default=None),
    }


def identical_greedy(record: dict) -> dict:
    """Compare the completions at temperature 0, run by run with the baseline's first: requests, and how many equal."""
    config, workload = record["config"], "T = 0"
    greedy = [drafting for drafting in config["drafting"] if workload in config["workloads"][drafting]]
    found: dict[str, dict] = {}
    reference = measured(record, greedy[0], workload, config["baseline"])
    for arm in config["arms"]:
        runs = [run for drafting in greedy for run in measured(record, drafting, workload, arm)]
        equal = [a == b for run in runs for a, b in zip(run["digests"], reference[0]["digests"], strict=True)]
        found[arm] = {"completions": len(equal), "identical": sum(equal)}
    return found
