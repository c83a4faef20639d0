"""Scores of texts against references: word error rate, ROUGE, repeated n-grams, and intervals over seeds.

The scores are jiwer's and rouge-score's; texts go in as they are, so case and punctuation count in a word error rate
(rouge-score itself lowers the case and drops punctuation).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from vllm_specopt.benchmarks.intervals import mean_interval

METRICS = {"wer": ("wer",), "rouge": ("rouge1", "rouge2", "rougeL")}
"""What each metric of the command computes. All in percent."""
PACKAGES = {"wer": "jiwer", "rouge": "rouge_score"}
LOWER_IS_BETTER = frozenset({"wer"})


def scores(metrics: Sequence[str], references: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
    """Score one text per reference; the names are those of ``METRICS``, the values percent."""
    found = {}
    if "wer" in metrics:
        found["wer"] = word_error_rate(references, texts)
    if "rouge" in metrics:
        found |= rouge(references, texts)
    return found


def word_error_rate(references: Sequence[str], texts: Sequence[str]) -> float:
    """Substituted, lost and added words of all texts, in percent of all words of the references."""
    import jiwer

    return 100 * jiwer.wer(list(references), list(texts))


def rouge(references: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
    """Mean F-measures of ROUGE-1, ROUGE-2 and ROUGE-L over the texts, in percent, words not stemmed."""
    from rouge_score.rouge_scorer import RougeScorer

    names = METRICS["rouge"]
    scorer = RougeScorer(names, use_stemmer=False)
    found = [scorer.score(reference, text) for reference, text in zip(references, texts, strict=True)]
    return {name: 100 * statistics.fmean(item[name].fmeasure for item in found) for name in names}


def repetition_rate(texts: Sequence[str], size: int) -> float | None:
    """Share of the word n-grams of ``size`` that occurred before in the same text; None where no text has one."""
    total = repeated = 0
    for text in texts:
        words = text.split()
        grams = [tuple(words[start : start + size]) for start in range(len(words) - size + 1)]
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / total if total else None


def perplexity(log_probs: Sequence[float]) -> float | None:
    """exp of the mean negative log probability; None without tokens."""
    if not log_probs:
        return None
    # A token that the target rules out has log probability -inf: the text is then infinitely surprising.
    mean = -math.fsum(log_probs) / len(log_probs)
    return math.exp(mean) if mean < 700 else math.inf


def interval(values: Sequence[float | None]) -> dict | None:
    """Mean of one value per seed and half the width of its 95 % confidence interval (Student's t).

    ``half_width`` is None for one value; the result is None where a value is missing.
    """
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return None
    if len(known) == 1:
        return {"mean": float(known[0]), "half_width": None, "seeds": 1}
    mean, low, _ = mean_interval(known)
    return {"mean": mean, "half_width": mean - low, "seeds": len(known)}
