"""What the audit's counts say: how strong the evidence against losslessness is, and how small a bias they exclude.

Under losslessness places are independent and uniform, so that every bin has the same chance. Evidence against it is an
e-value: what a bettor would have made of 1 by betting on the next bin at fair odds, in proportion to how often each was
seen so far. Fair odds win nothing: the chance that the e-value ever exceeds 1/alpha, however often one looks, is at
most alpha (Ville's inequality). Intervals come from the same bets and hold at all times at once.

The bettor's stake is divided among Dirichlet mixtures (Krichevsky and Trofimov's among them) that trust the counts more
or less: one that trusts them soon learns a large bias quickly, and pays for it where the bias is small. Needs nothing
but the standard library.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

BINS = 32
COLUMNS = BINS + 2
"""Of the counts: bins, impossible tokens, skipped tokens."""
ALARM = 1e6
"""The e-value above which output is called lossy."""
ALPHA = 0.05
"""The intervals hold at all times together with probability 1 - ALPHA."""
CAUTION = tuple(4.0**i / 2 for i in range(12))
"""Tokens per bin that the mixtures imagine beforehand; 1/2 is Krichevsky and Trofimov's."""


@dataclass(frozen=True)
class Bin:
    """A bin's share of the tokens less what it should be, and the interval that holds the true difference."""

    index: int
    deviation: float
    low: float
    high: float


@dataclass(frozen=True)
class Verdict:
    """What counts say.

    tokens: How many are in the bins. log10_evidence: Of the e-value. largest: The bin that deviates most; None without
    tokens. bias: The total variation distance of places from the uniform distribution is at most this: how much bias is
    not excluded. impossible, skipped: Tokens that their row's parameters forbid, and tokens not audited.
    """

    tokens: int
    log10_evidence: float
    largest: Bin | None
    bias: float
    impossible: int
    skipped: int

    @property
    def is_lossy(self) -> bool:
        """Whether the evidence is beyond reasonable doubt."""
        return self.log10_evidence > math.log10(ALARM)


def judge(counts: Sequence[int], afresh: Sequence[int] | None = None) -> Verdict:
    """Judge one row of counts, ``[COLUMNS]``.

    Args:
        counts: Of all tokens.
        afresh: The part of them whose rows were swept anew, if that is not all. Half of the stake is then on them
            alone: what is wrong in the verification's own sums or thresholds shows in these only.
    """
    bins, (impossible, skipped) = counts[:BINS], counts[BINS:]
    total = sum(bins)
    if not total:
        return Verdict(0, 0.0, None, 1.0, impossible, skipped)
    index = max(range(BINS), key=lambda each: abs(bins[each] / total - 1 / BINS))
    low, high = share_interval(bins[index], total)
    largest = Bin(index, bins[index] / total - 1 / BINS, low - 1 / BINS, high - 1 / BINS)
    evidence = log_evidence(bins)
    if afresh is not None:
        evidence = _log_mean(evidence, log_evidence(afresh[:BINS]))
    return Verdict(total, evidence / math.log(10), largest, bias_bound(bins), impossible, skipped)


def log_evidence(counts: Sequence[int]) -> float:
    """Natural logarithm of the e-value against a uniform distribution over the bins."""
    return _log_bets(counts, (1,) * len(counts)) + sum(counts) * math.log(len(counts))


def share_interval(count: int, total: int, alpha: float = ALPHA / BINS) -> tuple[float, float]:
    """The shares that a bin may have: those against which the bets on it have not won 1/alpha. For all times."""
    counts, observed = (count, total - count), count / total
    goal = _log_bets(counts, (1, BINS - 1)) + math.log(alpha)

    def is_in(share: float) -> bool:
        return _log_likelihood(counts, (share, 1 - share)) >= goal

    def edge(inside: float, outside: float) -> float:
        for _ in range(60):
            middle = (inside + outside) / 2
            inside, outside = (middle, outside) if is_in(middle) else (inside, middle)
        return outside

    return edge(observed, 0.0), edge(observed, 1.0)


def bias_bound(counts: Sequence[int], alpha: float = ALPHA) -> float:
    """Largest total variation distance from uniform that the counts do not exclude. For all times.

    The bets have not won 1/alpha against the true distribution, so that the observed one's divergence from it is
    bounded, and by Pinsker's inequality its distance.
    """
    total = sum(counts)
    if not total:
        return 1.0
    observed = [count / total for count in counts]
    won = _log_bets(counts, (1,) * len(counts))
    divergence = (_log_likelihood(counts, observed) - won - math.log(alpha)) / total
    seen = sum(abs(share - 1 / len(counts)) for share in observed) / 2
    return min(1.0, seen + math.sqrt(max(0.0, divergence) / 2))


def _log_likelihood(counts: Sequence[int], shares: Sequence[float]) -> float:
    return sum(
        count * math.log(share) if share > 0 else -math.inf
        for count, share in zip(counts, shares, strict=True)
        if count
    )


def _log_bets(counts: Sequence[int], parts: Sequence[int]) -> float:
    """Log of the product of what was bet on each token's bin; a bin is a number of equal parts beforehand."""
    total, whole = sum(counts), sum(parts)
    logs = []
    for caution in CAUTION:
        bet = math.lgamma(caution * whole) - math.lgamma(total + caution * whole)
        for count, part in zip(counts, parts, strict=True):
            if count:
                bet += math.lgamma(count + caution * part) - math.lgamma(caution * part)
        logs.append(bet)
    return _log_mean(*logs)


def _log_mean(*logs: float) -> float:
    """Log of the mean."""
    best = max(logs)
    return best + math.log(sum(math.exp(each - best) for each in logs) / len(logs))
