"""Means and paired ratios with Student's intervals at 95 %."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

CONFIDENCE = 0.95


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of at least two values and the ends of its interval."""
    from scipy.stats import t

    mean = statistics.fmean(values)
    half = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def paired_ratio(ours: Sequence[float], baseline: Sequence[float]) -> dict:
    """Return the geometric mean of the pairs' ratios and its interval, ``low`` and ``high`` None for a single pair.

    The interval is Student's on the logarithms of the ratios.
    """
    logs = [math.log(a / b) for a, b in zip(ours, baseline, strict=True)]
    if len(logs) == 1:
        return {"ratio": math.exp(logs[0]), "low": None, "high": None, "pairs": 1}
    ratio, low, high = (math.exp(value) for value in mean_interval(logs))
    return {"ratio": ratio, "low": low, "high": high, "pairs": len(logs)}


def differs(ratio: dict) -> bool | None:
    """Whether an interval leaves out 1; None without an interval."""
    return None if ratio["low"] is None else not ratio["low"] <= 1 <= ratio["high"]
