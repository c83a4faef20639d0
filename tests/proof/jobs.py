"""What a run consists of: jobs that any process can do, each giving rows of the table."""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch

from proof import biased, determinism, engine, enumeration, equality, fuzz, rounding
from proof.cases import make_cases
from proof.draws import STATISTICS, WrongGreedy, backend_verifier, draw_case, judge_case
from proof.judgement import FAMILY_ALPHA
from vllm_specopt.rules import BlockConstants
from vllm_specopt.testing import LOGITS, MARGIN, PROBS

LOSSLESS = {"exact": None, "block": BlockConstants()}
"""The methods that claim to be lossless, each as ``verify`` takes it."""
TOKENS = STATISTICS[:2]
"""What tokens come out, whatever the number of drafts that survive."""
RANKS = Path(__file__).resolve().parents[1] / "stress" / "ranks.py"
ACCEPTANCE = "acceptance of chosen drafts is p(x)"
KEPT = "drafts kept are the most that one chain allows"
CLOSE_SHARE = {"equality": 0.02, "fuzz": 0.1}
"""Largest share of requests that may be left out as too close to call: fuzzing makes ties and empty residuals. In a
case of V tokens a draw lies within MARGIN of one of V boundaries with a chance of up to 2 MARGIN V besides."""
SECTIONS = ("enumeration", "distribution", "bias", "rounding", "engine", "equality", "fuzz", "determinism", "ranks")


@dataclass(frozen=True)
class Size:
    """How much a run does.

    ``fuzz`` and ``determinism`` count batches, ``equality`` requests per case, ``engine`` requests per batch and those
    of a biased engine, ``ranks`` steps, ``probes`` boundaries of a row.
    """

    draws: int
    engine: tuple[int, int]
    equality: dict
    fuzz: dict
    determinism: dict
    probes: int
    ranks: int
    chunks: int


FULL = Size(
    2_000_000,
    (6_000, 8_000),
    {"cpu": 1000, "triton": 750},
    {"cpu": 100_000, "triton": 5_000},
    {"cpu": 2_000, "triton": 100},
    1_000,
    2_000,
    20,
)
QUICK = Size(
    40_000, (200, 2_000), {"cpu": 40, "triton": 2}, {"cpu": 300, "triton": 12}, {"cpu": 40, "triton": 2}, 20, 100, 1
)


@dataclass(frozen=True)
class Job:
    """One unit of work; ``name`` is unique in a run, ``part`` tells chunks of one row apart."""

    section: str
    backend: str
    item: str
    method: str = "exact"
    part: int = 0

    @property
    def name(self) -> str:
        return f"{self.section}/{self.backend}/{self.method}/{self.item}/{self.part}"


@dataclass
class Row:
    """A line of the table. draws: observations, requests, batches or sequences, as ``unit`` says."""

    section: str
    case: str
    backend: str
    draws: int
    unit: str
    p_value: float | None = None
    total_variation: float | None = None
    bound: float | None = None
    passed: bool = True
    note: str = ""
    seconds: float = 0.0
    job: str = ""
    extra: dict = field(default_factory=dict)


def drawn_backends() -> tuple[str, ...]:
    """Backends fast enough to be drawn from: Triton on a GPU only."""
    return ("cpu", "triton") if torch.cuda.is_available() else ("cpu",)


def device_of(backend: str) -> str:
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def plan_jobs(size: Size, sections: tuple[str, ...]) -> list[Job]:
    """All jobs of a run, the longest first."""
    jobs, cases = [], make_cases()
    for method in LOSSLESS:
        if method == "block":
            # Where drafts are chosen it is the exact rule.
            sampled = [case for case in cases if case.draft_form in (PROBS, LOGITS)]
            jobs += [Job("equality", b, case.name, method) for b in ("triton", "cpu") for case in sampled]
            jobs += [Job("distribution", b, case.name, method) for b in drawn_backends() for case in reversed(sampled)]
            kinds = [kind for kind in enumeration.KINDS if kind != "chosen drafts"]
            jobs += [Job("enumeration", "reference", kind, method) for kind in (*kinds, KEPT)]
            continue
        jobs += [Job("engine", "cpu", "V1 with a probabilistic drafter", method)]
        jobs += [Job("fuzz", b, "random batches", method, i) for b in ("triton", "cpu") for i in range(size.chunks)]
        jobs += [Job("equality", "triton", case.name, method) for case in cases]
        jobs += [Job("distribution", b, case.name, method) for b in drawn_backends() for case in reversed(cases)]
        jobs += [Job("determinism", b, change, method) for b in ("triton", "cpu") for change in determinism.CHANGES]
        jobs += [Job("determinism", b, kind, method) for b in ("triton", "cpu") for kind in determinism.DRAFTS]
        jobs += [Job("determinism", "cpu", "number of threads", method)]
        jobs += [Job("equality", "cpu", case.name, method) for case in cases]
        jobs += [Job("enumeration", "reference", kind, method) for kind in (*enumeration.KINDS, ACCEPTANCE)]
    jobs += [Job("ranks", "cpu", "two tensor-parallel ranks of a V1 engine")]
    rows = [f"{name}, {_short(dtype)}" for name in rounding.ROWS for dtype in rounding.DTYPES]
    jobs += [Job("rounding", backend, row) for backend in ("triton", "cpu") for row in rows]
    jobs += [Job("bias", "cpu", f"{c}: {name}") for name, shared in biased.SHARED_NOISE.items() for c in shared.cases]
    jobs += [Job("bias", "arrays", f"{c}: {name}") for name, rule in biased.RULES.items() for c in rule.cases]
    jobs += [Job("bias", "arrays", f"rounding: {name}") for name in rounding.BIASED]
    return [job for job in jobs if job.section in sections]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def alpha_per_test(num_cases: int) -> float:
    """Bonferroni: a method's error chance over every case, statistic, backend and engine, two tests each."""
    engines = len(engine.SETTINGS) * len(engine.SEEDS) * len(engine.STATISTICS)
    return FAMILY_ALPHA / (2 * (len(STATISTICS) * num_cases * len(drawn_backends()) + engines))


def run_job(job: Job, size: Size, seed: int) -> list[Row]:
    """Do one job. A failed check is a row that did not pass; other exceptions are passed on as such rows too."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        with np.errstate(all="ignore"):
            rows = _RUN[job.section](job, size, seed)
    except Exception as error:
        kind = "" if isinstance(error, AssertionError | WrongGreedy) else f"{type(error).__name__}: "
        rows = [Row(job.section, job.item, job.backend, 0, "", passed=False, note=f"{kind}{error}")]
    for row in rows:
        if job.method != "exact":
            row.case = f"{job.method}: {row.case}"
        row.job, row.seconds = job.name, round((time.perf_counter() - start) / len(rows), 2)
    return rows


def _enumerate(job: Job, size: Size, seed: int) -> list[Row]:
    if job.item == ACCEPTANCE:
        error = max(enumeration.acceptance_error(vocab) for vocab, _ in enumeration.SHAPES)
        drafts = 3 * sum(vocab for vocab, _ in enumeration.SHAPES)
        return [Row(job.section, job.item, "reference", drafts, "drafts", None, error, enumeration.BOUND,
                    error <= enumeration.BOUND)]  # fmt: skip
    if job.item == KEPT:
        kinds = [kind for kind in enumeration.KINDS if kind != "chosen drafts"]
        found = [enumeration.accepted_lengths(kind, *shape) for kind in kinds for shape in enumeration.SHAPES]
        error = max(abs(kept - optimum) for _, kept, optimum in found)
        row = Row(job.section, job.item, "reference", len(found), "cases", None, error, enumeration.BOUND)
        row.passed = error <= enumeration.BOUND and all(kept >= by_token - 1e-12 for by_token, kept, _ in found)
        row.note = f"up to {max(kept / by_token for by_token, kept, _ in found) - 1:.1%} more than token by token"
        return [row]
    by_block = job.method == "block"
    distances = [enumeration.total_variation(job.item, *shape, by_block=by_block) for shape in enumeration.SHAPES]
    sequences = sum(vocab ** (drafts + 1) for vocab, drafts in enumeration.SHAPES)
    row = Row(job.section, job.item, "reference", sequences, "sequences", total_variation=max(distances))
    row.bound, row.passed = enumeration.BOUND, max(distances) <= enumeration.BOUND
    return [row]


def _case(name: str):
    return next((i, case) for i, case in enumerate(make_cases()) if case.name == name)


def _rows_of(job: Job, judgements: dict, item: str | None = None) -> list[Row]:
    return [
        Row(
            job.section,
            f"{item or job.item} / {statistic}",
            job.backend,
            j.draws,
            "draws",
            j.p_value,
            j.total_variation,
            j.bound,
            j.passed,
            f"{j.impossible} tokens outside the support" if j.impossible else "",
            extra=asdict(j),
        )
        for statistic, j in judgements.items()
    ]


def _distribution(job: Job, size: Size, seed: int) -> list[Row]:
    index, case = _case(job.item)
    verifier = backend_verifier(job.backend, device_of(job.backend), rule=LOSSLESS[job.method])
    counts = draw_case(case, verifier, size.draws, seed * 1000 + index)
    judgements = judge_case(case, counts, alpha_per_test(len(make_cases())))
    if job.method == "block":
        judgements = {statistic: judgements[statistic] for statistic in TOKENS}
    return _rows_of(job, judgements)


def _bias(job: Job, size: Size, seed: int) -> list[Row]:
    name, _, rule = job.item.partition(": ")
    if name == "rounding":
        _, expected = rounding.distributions("flat", torch.float32)
        distance = rounding.total_variation(rounding.BIASED[rule](expected), expected)
        caught = distance > rounding.BOUND
        return [Row(job.section, f"flat, vocabulary {rounding.VOCAB}: {rule}", "arrays", 1, "rows", None, distance,
                    rounding.BOUND, caught, "caught by: rounding" if caught else "not caught")]  # fmt: skip
    _, case = _case(name)
    alpha = alpha_per_test(len(make_cases()))
    if job.backend == "arrays":
        counts = draw_case(case, biased.rule_verifier(rule, seed), size.draws, seed)
        return [_caught(job, job.item, judge_case(case, counts, alpha), rule != "correct")]
    shared = biased.SHARED_NOISE[rule]
    counts = draw_case(case, backend_verifier("cpu"), size.draws, seed, biased.sharing_drafter(shared.purpose))
    judgements = judge_case(case, counts, alpha)
    if not shared.caught:
        judgements = {statistic: judgements[statistic] for statistic in TOKENS}
    return [_caught(job, job.item, judgements, shared.caught)]


def _caught(job: Job, case: str, judgements: dict, biased: bool = True) -> Row:
    """A row that passes if some statistic fails, or with ``biased`` off if none does."""
    worst = min(judgements.values(), key=lambda j: (j.passed, j.p_value, j.bound - j.total_variation))
    caught = [statistic for statistic, j in judgements.items() if not j.passed]
    note = f"caught by: {', '.join(caught)}" if caught else "not caught" if biased else "accepted"
    return Row(job.section, case, job.backend, worst.draws, "draws", worst.p_value, worst.total_variation,
               worst.bound, bool(caught) == biased, note)  # fmt: skip


def _rounding(job: Job, size: Size, seed: int) -> list[Row]:
    name, _, dtype = job.item.rpartition(", ")
    found = rounding.implied(name, getattr(torch, dtype), job.backend, device_of(job.backend), size.probes)
    row = Row(job.section, job.item, job.backend, found.probes, "probes", None, found.distance, rounding.BOUND)
    row.passed = found.distance <= rounding.BOUND and not found.wrong
    row.note = f"{found.wrong} boundaries lie elsewhere" if found.wrong else ""
    return [row]


def _ranks(job: Job, size: Size, seed: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "ranks.json"
        command = [sys.executable, str(RANKS), "--steps", str(size.ranks), "--out", str(out)]
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )  # fmt: skip
        if not out.exists():
            raise RuntimeError(f"the engine ended with {done.returncode}: {done.stdout[-2000:]}")
        result = json.loads(out.read_text())
    first = result["ranks"][0]
    note = f"{first['accepted']} of {first['drafted']} drafts accepted" if result["agree"] else "their tokens differ"
    return [Row(job.section, job.item, job.backend, first["steps"], "steps", passed=result["agree"], note=note)]


def _engine(job: Job, size: Size, seed: int) -> list[Row]:
    rows, alpha = [], alpha_per_test(len(make_cases()))
    for name, draws in engine.draw(engine.SETTINGS, size.engine[0], seed, size.engine[1]).items():
        sampling = engine.SETTINGS.get(name.rpartition(", ")[0], engine.SETTINGS["T = 1"])
        judgements = engine.judge_draws(draws, sampling, alpha)
        if name == engine.SHARED_NOISE:
            rows.append(_caught(job, f"V1, T = 1: {name}", judgements))
        else:
            rows += _rows_of(job, judgements, f"V1, {name}")
    return rows


def _equality(job: Job, size: Size, seed: int) -> list[Row]:
    index, case = _case(job.item)
    # The block rule shares its rows with the exact one: what is its own shows in fewer requests.
    count = size.equality[job.backend] // (3 if job.method == "block" else 1)
    result = equality.compare_case(
        case, job.backend, device_of(job.backend), count, seed * 1000 + index, LOSSLESS[job.method]
    )
    near = 2 * MARGIN * case.vocab_size * result.tokens
    return [_counted(job, result.requests, "requests", result.requests, result.close, near, tokens=result.tokens)]


def _fuzz(job: Job, size: Size, seed: int) -> list[Row]:
    share = size.fuzz[job.backend] // size.chunks
    indices = range(job.part * share, (job.part + 1) * share)
    result = fuzz.fuzz(seed, indices, job.backend, device_of(job.backend))
    return [_counted(job, result.batches, "batches", result.requests, result.close, tokens=result.emitted)]


def _counted(job: Job, draws: int, unit: str, requests: int, close: int, near: float = 0.0, **extra) -> Row:
    """near: Requests that are expected to be left out for their number of boundaries."""
    row = Row(job.section, job.item, job.backend, draws, unit, extra={"requests": requests, "close": close, **extra})
    row.passed = close <= max(3, CLOSE_SHARE[job.section] * requests + near)
    row.note = f"{close} of {requests} requests too close to call"
    return row


def _determinism(job: Job, size: Size, seed: int) -> list[Row]:
    count = size.determinism[job.backend]
    if job.item == "number of threads":
        result = determinism.check_threads(seed, range(max(1, count // 10)))
    elif job.item in determinism.DRAFTS:
        result = determinism.check_drafts(job.item, seed, range(count), job.backend, device_of(job.backend))
    else:
        result = determinism.check_batches(job.item, seed, range(count), job.backend, device_of(job.backend))
    return [Row(job.section, job.item, job.backend, result.requests, "requests", note=f"{result.batches} batches")]


_RUN = {
    "enumeration": _enumerate,
    "distribution": _distribution,
    "bias": _bias,
    "rounding": _rounding,
    "engine": _engine,
    "equality": _equality,
    "fuzz": _fuzz,
    "determinism": _determinism,
    "ranks": _ranks,
}
