"""What `specopt bench` can run: cases, and named suites of them.

Not the full product of the parameters: each suite is a base case and lines through it, so that every plot varies one
parameter while the others stand still.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

VOCABS = (32000, 51865, 128256, 151936, 262144)
DRAFTS = (1, 3, 5, 7, 20, 64, 128)
ACCEPTANCE = {"low": 0.2, "middle": 0.6, "high": 0.9}
ONE_HOT, PROBS, LOGITS = "one-hot", "probs", "logits"


@dataclass(frozen=True)
class Case:
    """One batch: every request has the same parameters and ``num_drafts`` draft tokens.

    acceptance: What the inputs are built for: probability that a draft token survives, given that it is verified.
    draft: Form of the draft distribution. Model runner V1 knows one-hot and probs, V2 one-hot and logits.
    noisy: The draft distribution is the target's with noise on its logits: a rejected draft is not impossible then.
    """

    batch: int
    num_drafts: int
    vocab: int = 151936
    dtype: str = "bf16"
    draft: str = ONE_HOT
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    acceptance: float = ACCEPTANCE["middle"]
    noisy: bool = False

    @property
    def filters(self) -> str:
        """The sampling filters in one word, ``none`` without any."""
        named = [("topk", self.top_k, 0), ("topp", self.top_p, 1.0), ("minp", self.min_p, 0.0)]
        return "+".join(f"{name}{value:g}" for name, value, unused in named if value != unused) or "none"

    @property
    def name(self) -> str:
        """All parameters in one word; what --case matches."""
        return (
            f"v{self.vocab}-b{self.batch}-k{self.num_drafts}-{self.dtype}-{self.draft}-t{self.temperature:g}-"
            f"{self.filters}-a{self.acceptance:g}{'-noisy' if self.noisy else ''}"
        )


def _variants(base: Case, changes: Iterable[dict]) -> list[Case]:
    return [replace(base, **change) for change in changes]


def _configurations(temperature: float) -> list[dict]:
    """Every form of draft and every filter, as changes to a case."""
    top_p, top_k = {"top_p": 0.9}, {"top_k": 50}
    return [
        {"temperature": temperature},
        {"temperature": 1.0},
        {"temperature": 1.0, "draft": PROBS},
        {"temperature": 1.0, "draft": LOGITS},
        {"temperature": temperature, "draft": LOGITS},
        {"temperature": temperature, **top_p},
        {"temperature": 1.0, **top_k},
        {"temperature": temperature, **top_p, **top_k},
        {"temperature": temperature, "min_p": 0.1},
        {"temperature": temperature, "draft": LOGITS, **top_p},
        {"temperature": 0.0},
    ]


GPU_SHAPES = ((64, 7), (256, 3), (1, 3))
"""Batches and drafts that come first on a GPU, the most telling in front."""


def _gpu() -> list[Case]:
    """The most important cases first: a run may be cut short."""
    top_p = {"temperature": 0.7, "top_p": 0.9}
    first: list[dict] = [{"temperature": 0.7}, {"temperature": 1.0}, {"temperature": 0.7, "draft": LOGITS}, top_p]
    first.append({**top_p, "top_k": 50})
    most_telling = [Case(*shape, **change) for change in first for shape in GPU_SHAPES]
    plain, filtered = {"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.9}
    drafted = {"draft": LOGITS}
    lines = (plain, filtered, drafted)
    cases = [case for shape in GPU_SHAPES[:2] for case in _variants(Case(*shape), _configurations(0.7))]
    cases += [Case(*shape, draft=LOGITS, noisy=True) for shape in GPU_SHAPES]
    batches = [Case(batch, 3, **line) for line in lines for batch in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    drafts = [Case(8, num_drafts, **line) for line in lines for num_drafts in DRAFTS]
    vocabs = [Case(32, 5, vocab, **line) for line in lines for vocab in VOCABS]
    acceptances = [Case(64, 7, acceptance=a, **line) for line in (plain, drafted) for a in ACCEPTANCE.values()]
    dtypes = [Case(64, 7, dtype="fp32", **line) for line in lines]
    return most_telling + cases + batches + drafts + vocabs + acceptances + dtypes


def _cpu() -> list[Case]:
    configurations: tuple[dict, ...] = (
        {},
        {"draft": PROBS},
        {"temperature": 0.8, "top_p": 0.9},
        {"top_k": 50},
        {"temperature": 0.0},
    )
    cases = [Case(batch, 4, **configuration) for configuration in configurations for batch in (1, 8, 32)]
    return [*cases, Case(32, 4, draft=PROBS, noisy=True)]


def _cpu_lines() -> list[Case]:
    plain: dict = {}
    filtered = {"temperature": 0.8, "top_p": 0.9}
    # Nearly everything is accepted along K, so that nearly every row is verified.
    drafts = [Case(2, num_drafts, acceptance=0.99, **line) for line in (plain, filtered) for num_drafts in DRAFTS]
    vocabs = [Case(8, 4, vocab, **line) for line in (plain, filtered) for vocab in VOCABS]
    acceptances = [Case(8, 4, acceptance=a) for a in ACCEPTANCE.values()]
    return drafts + vocabs + acceptances + [Case(8, 4, dtype="fp32"), Case(8, 4, min_p=0.1)]


def _quick() -> list[Case]:
    filtered = {"temperature": 0.7, "top_p": 0.9}
    configurations: tuple[dict, ...] = ({}, {"draft": PROBS}, {"draft": LOGITS}, filtered, {"temperature": 0.0})
    return [Case(batch, 3, 32000, **configuration) for batch in (1, 8) for configuration in configurations]


def _rehearsal() -> list[Case]:
    base = Case(2, 1, 300, dtype="fp32")
    changes = (
        {"temperature": 0.7},
        {"draft": PROBS},
        {"draft": LOGITS, "dtype": "bf16", "noisy": True},
        {"top_p": 0.9, "dtype": "bf16"},
        {"temperature": 0.0},
    )
    return _variants(base, changes)


class Suite(NamedTuple):
    """What a suite is for, its cases, and the seconds after which a case is not repeated any further."""

    purpose: str
    cases: Callable[[], list[Case]]
    seconds: float


SUITES = {
    "quick": Suite("a first look, on whatever the machine has (under a minute)", _quick, 1.0),
    "cpu": Suite("V = 151,936, K = 4, B = 1 to 32: what vLLM on a CPU does (some minutes)", _cpu, 20.0),
    "cpu-lines": Suite("on a CPU along K = 1 to 128, the vocabulary and acceptance (some minutes)", _cpu_lines, 8.0),
    "gpu": Suite("the grid for one large GPU: all drafts and filters, B, K, V, acceptance, fp32", _gpu, 3.0),
    "rehearsal": Suite("tiny shapes through Triton's interpreter: the GPU's code, meaningless times", _rehearsal, 0.1),
}


def suite(name: str, pattern: str | None = None) -> list[Case]:
    """Cases of a suite, each once; with a pattern, those whose name it matches (a regular expression, anywhere).

    Raises:
        ValueError: There is no such suite, the pattern is no regular expression, or it matches no case.
    """
    if name not in SUITES:
        raise ValueError(f"there is no suite {name!r}: take one of {', '.join(SUITES)}.")
    cases = list(dict.fromkeys(SUITES[name].cases()))
    if pattern is None:
        return cases
    try:
        matches = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"--case {pattern!r} is no regular expression ({error}).") from error
    # A name holds characters that mean something else in a pattern.
    found = [case for case in cases if case.name == pattern] or [case for case in cases if matches.search(case.name)]
    if not found:
        raise ValueError(f"no case of suite {name!r} matches {pattern!r}: --suite {name} --list names them all.")
    return found
