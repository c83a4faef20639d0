"""What counts say: e-values that are valid at any time, and intervals that hold."""

import math
from itertools import accumulate

import numpy as np
import pytest

from vllm_specopt.evidence import ALARM, BINS, CAUTION, bias_bound, judge, log_evidence, share_interval


def growth(bins: np.ndarray) -> np.ndarray:
    """log e after each token of runs ``[runs, tokens]``: what the mixtures' bets on one token after another return."""
    runs, tokens = bins.shape
    seen, logs = np.zeros((runs, BINS)), np.zeros((len(CAUTION), runs))
    caution = np.array(CAUTION)[:, None]
    found = np.empty((runs, tokens))
    for i in range(tokens):
        at = seen[np.arange(runs), bins[:, i]]
        logs += np.log(BINS * (at + caution) / (i + BINS * caution))
        seen[np.arange(runs), bins[:, i]] += 1
        best = logs.max(0)
        found[:, i] = best + np.log(np.exp(logs - best).mean(0))
    return found


def test_the_closed_form_is_what_the_bets_return():
    bins = np.random.default_rng(1).integers(0, BINS, (3, 500)) // [[1], [2], [8]]
    for run, logs in zip(bins, growth(bins), strict=True):
        for tokens in (1, 7, 500):
            counts = np.bincount(run[:tokens], minlength=BINS).tolist()
            assert log_evidence(counts) == pytest.approx(logs[tokens - 1], abs=1e-8)


def test_krichevsky_and_trofimovs_mixture_is_among_the_bets():
    counts = [1000 + 40 * i for i in range(BINS)]
    total, half = sum(counts), BINS / 2
    known = total * math.log(BINS) + math.lgamma(half) - math.lgamma(total + half)
    known += sum(math.lgamma(count + 0.5) - math.lgamma(0.5) for count in counts)
    assert log_evidence(counts) > known - math.log(len(CAUTION))


def test_uniform_places_raise_the_alarm_no_oftener_than_promised():
    """However often one looks: in each of 2,000 runs after every one of 2,000 tokens."""
    logs = growth(np.random.default_rng(2).integers(0, BINS, (2000, 2000)))
    assert (logs.max(1) > math.log(20)).mean() <= 0.05
    assert (logs.max(1) > math.log(2)).mean() <= 0.5
    # A bet that never wins would pass the above.
    assert (logs.max(1) > math.log(2)).any()


@pytest.mark.parametrize(("bias", "within"), [(0.3, 1000), (0.1, 8000), (0.03, 80000)])
def test_a_bias_is_found(bias, within):
    """So much of the probability is moved from the lower half to the upper one."""
    gen = np.random.default_rng(3)
    shares = np.full(BINS, 1 / BINS)
    shares[: BINS // 2] -= bias / BINS * 2
    shares[BINS // 2 :] += bias / BINS * 2
    counts = gen.multinomial(within, shares)
    assert log_evidence(counts.tolist()) > math.log(ALARM)
    assert log_evidence(gen.multinomial(within, np.full(BINS, 1 / BINS)).tolist()) < math.log(20)


def test_intervals_and_bounds_hold_at_all_times():
    gen = np.random.default_rng(4)
    shares = gen.dirichlet(np.full(BINS, 30.0))
    distance = np.abs(shares - 1 / BINS).sum() / 2
    missed = 0
    for _ in range(100):
        run = gen.choice(BINS, 3000, p=shares)
        is_held = True
        for counts in list(accumulate(np.eye(BINS, dtype=int)[run].reshape(30, 100, BINS).sum(1))):
            low, high = share_interval(int(counts[5]), int(counts.sum()), alpha=0.05)
            is_held &= low <= shares[5] <= high and bias_bound(counts.tolist()) >= distance
        missed += not is_held
    assert missed <= 5
    assert high - low < 0.05


def test_more_tokens_exclude_a_smaller_bias():
    bounds = [bias_bound([tokens] * BINS) for tokens in (10, 100, 1000, 10**6)]
    assert bounds == sorted(bounds, reverse=True) and bounds[0] > 0.05 and bounds[-1] < 0.001
    assert bias_bound([0] * BINS) == 1.0


def test_a_verdict_without_tokens_and_one_of_many():
    empty = judge([0] * BINS + [0, 3])
    assert (empty.tokens, empty.log10_evidence, empty.largest, empty.skipped) == (0, 0.0, None, 3)
    counts = [10**9] * BINS
    counts[7] += 10**7
    found = judge([*counts, 2, 1])
    assert found.is_lossy and found.largest.index == 7 and found.impossible == 2
    assert 0 < found.largest.low < found.largest.deviation < found.largest.high
    assert not judge([10**9] * BINS + [0, 0]).is_lossy
