"""Does a sample follow a distribution? Chi-square, and total variation against a bound from the sample size alone."""

import math
from dataclasses import dataclass

import numpy as np
from scipy.stats import chisquare

FAMILY_ALPHA = 1e-3
"""Chance that a whole run of a correct verifier fails somewhere; shared among its statistics (Bonferroni)."""
MIN_EXPECTED = 25.0


@dataclass(frozen=True)
class Judgement:
    """Outcome for one statistic.

    draws: observations. bins: cells after pooling. p_value: of the chi-square test. total_variation: between the
    observed frequencies and the distribution, on those bins. bound: what it may be. impossible: observations of
    probability 0. passed: the p-value, the distance and ``impossible`` are all as they must be.
    """

    draws: int
    bins: int
    p_value: float
    total_variation: float
    bound: float
    impossible: int
    passed: bool


def variation_bound(distribution: np.ndarray, draws: int, alpha: float) -> float:
    """The total variation of ``draws`` observations that is exceeded with probability at most ``alpha``.

    Jensen: E|f_i - p_i| <= sqrt(p_i (1 - p_i) / n), so E[TV] <= 1/2 sum_i sqrt(p_i (1 - p_i) / n). One observation
    moves TV by at most 1/n, so McDiarmid's inequality (1989) gives P(TV >= E[TV] + e) <= exp(-2 n e^2).
    """
    mean = 0.5 * np.sqrt(distribution * (1 - distribution) / draws).sum()
    return float(mean + math.sqrt(math.log(1 / alpha) / (2 * draws)))


def pool(distribution: np.ndarray, draws: int) -> np.ndarray:
    """Bin of each cell: its own where at least MIN_EXPECTED observations are expected, else one shared with others."""
    order = np.argsort(-distribution, kind="stable")
    expected = distribution[order] * draws
    large = int((expected >= MIN_EXPECTED).sum())
    bins = np.arange(len(distribution))
    # Walk down the small cells: each bin closes once it has enough.
    running = np.cumsum(expected[large:]) / MIN_EXPECTED
    bins[large:] = large + np.floor(running - 1e-12).clip(min=0).astype(np.int64)
    if large < len(distribution) and expected[bins == bins[-1]].sum() < MIN_EXPECTED:
        last = bins[-1]
        bins[bins == last] = max(last - 1, 0)
    _, bins = np.unique(bins, return_inverse=True)
    result = np.empty(len(distribution), np.int64)
    result[order] = bins
    return result


def judge(counts: np.ndarray, distribution: np.ndarray, alpha: float, strict: bool = True) -> Judgement:
    """Compare counts with the distribution they should follow.

    Args:
        counts: Observations of each cell.
        distribution: Probability of each cell, float64, sums to one.
        alpha: Chance of failing a correct sample, for each of the chi-square test and the distance.
        strict: A single observation of a cell of probability 0 fails. Off where the zero is that of a difference,
            which single precision may miss by a rounding.
    """
    draws = int(counts.sum())
    distribution = np.asarray(distribution, np.float64)
    distribution = distribution / distribution.sum()
    bins = pool(distribution, draws)
    observed = np.bincount(bins, counts)
    expected = np.bincount(bins, distribution)
    distance = float(np.abs(observed / draws - expected).sum() / 2)
    bound = variation_bound(expected, draws, alpha)
    p_value = float(chisquare(observed, expected / expected.sum() * draws).pvalue) if len(expected) > 1 else 1.0
    impossible = int(counts[distribution == 0].sum()) if strict else 0
    passed = p_value >= alpha and distance <= bound and impossible == 0
    return Judgement(draws, len(expected), p_value, distance, bound, impossible, passed)
