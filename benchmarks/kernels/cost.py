"""What verification costs on a GPU that is not there: our kernels and the installed vLLM's, from their machine code.

Cases are recorded in Triton's interpreter (``steps``), each launch is compiled for every architecture and counted
(``counting``), a model turns counts into times (``cost_model``). Nothing here measures.
"""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import triton

from vllm_specopt.benchmarks.kernels.cost_model import CARDS, LAUNCH_US, Card, Modelled, model
from vllm_specopt.benchmarks.kernels.counting import Count, count_launch
from vllm_specopt.benchmarks.kernels.grid import LOGITS, Case
from vllm_specopt.benchmarks.kernels.steps import OURS, STOCK, Step, record

ARCHITECTURES = (80, 90, 100)
SHAPES = ((1, 3), (8, 3), (64, 7), (256, 3))
BLOCK = "draft logits, block"
SETTINGS: dict[str, dict] = {
    "one-hot T=0.7": {"temperature": 0.7},
    "one-hot T=1": {"temperature": 1.0},
    "draft logits": {"temperature": 0.7, "draft": LOGITS},
    BLOCK: {"temperature": 0.7, "draft": LOGITS},
    "top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "top-k 50": {"temperature": 0.7, "top_k": 50},
    "top-k 50, top-p 0.9": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
    "min-p 0.05": {"temperature": 0.7, "min_p": 0.05},
    "greedy": {"temperature": 0.0},
}
AUDIT = "audit"
"""In the names of the audit's kernels."""
AUDITED, ANEW = "audited ", "anew audited "
"""Beginnings of the names of settings whose tokens are audited, too: as in most steps, and with a sweep of its own."""
WITH_AUDIT = ("one-hot T=1", "draft logits", "top-p 0.9")
# Shape in which other dtypes and flat rows are counted too, and kernels are listed.
MORE = (64, 7)
# Rows that the interpreter runs: those of the first requests, which the rest of the batch repeats.
SAMPLED_ROWS = 8
LOGIT_BYTES = {"bf16": 2, "fp16": 2, "fp32": 4}
CSV_NAME, JSON_NAME = "cost.csv", "cost.json"


@dataclass(frozen=True)
class Counted:
    """One step on one architecture."""

    setting: str
    step: Step
    architecture: int
    counts: tuple[Count, ...]

    @property
    def elements(self) -> float:
        """Logits of the step's target rows."""
        return float(self.step.case.batch * (self.step.case.num_drafts + 1) * self.step.case.vocab)

    @property
    def floor_bytes(self) -> float:
        """Bytes of every target row and draft row, read once."""
        case = self.step.case
        rows = case.batch * (case.num_drafts + 1 + (case.num_drafts if case.draft == LOGITS else 0))
        return float(rows * case.vocab * LOGIT_BYTES[case.dtype])

    @property
    def per_element(self) -> float:
        """Instructions that a thread issues for one logit of a target row, all launches added."""
        return sum(count.warp_instructions for count in self.counts) * 32 / self.elements

    @property
    def bytes(self) -> float:
        return sum(count.bytes for count in self.counts)

    def without_audit(self) -> Counted:
        """The same step with the verification's launches alone."""
        return replace(self, counts=tuple(count for count in self.counts if AUDIT not in count.kernel))

    def audit_share(self, card: Card) -> float:
        """What the audit adds to the modelled time of the verification, as a part of it, the worse of both ends."""
        whole, rest = self.modelled(card), self.without_audit().modelled(card)
        return max(whole.low / rest.low, whole.high / rest.high) - 1.0

    def is_mostly_launches(self, card: Card) -> bool:
        """Whether launching takes more than half of the modelled time, at its low end."""
        return self.modelled(card).low < 2 * LAUNCH_US * len(self.counts)

    def modelled(self, card: Card) -> Modelled:
        """Modelled time on a card of this architecture."""
        return model(self.counts, card, self.floor_bytes)


def plan(
    shapes: Iterable[tuple[int, int]] = SHAPES,
    settings: Iterable[str] = tuple(SETTINGS),
    more: tuple[int, int] = MORE,
) -> list[tuple[str, Step]]:
    """(setting, step) of everything that is counted: ours beside stock, some audited; in shape ``more`` also ours
    in other dtypes and on flat rows."""
    steps = []
    for name in settings:
        for batch, num_drafts in shapes:
            case = Case(batch, num_drafts, **SETTINGS[name])
            sampled = max(1, SAMPLED_ROWS // (num_drafts + 1))
            steps += [(name, Step(who, case, sampled=sampled, block=name == BLOCK)) for who in (OURS, STOCK)]
            if name in WITH_AUDIT:
                steps.append((AUDITED + name, Step(OURS, case, sampled=sampled, audit=True)))
            if (batch, num_drafts) != more:
                continue
            steps += [
                (f"{name}, {dtype}", Step(OURS, replace(case, dtype=dtype), sampled=sampled, block=name == BLOCK))
                for dtype in ("fp32", "fp16")
            ]
            if case.filters != "none":
                steps.append((f"{name}, flat rows", Step(OURS, case, flat=True, sampled=sampled)))
            if name in WITH_AUDIT:
                flat = Step(OURS, case, flat=True, sampled=sampled, audit=True)
                steps.append((f"{AUDITED}{name}, flat rows", flat))
                steps.append((ANEW + name, Step(OURS, case, sampled=sampled, audit=True, anew=True)))
    return steps


def count_steps(
    planned: list[tuple[str, Step]],
    architectures: Iterable[int] = ARCHITECTURES,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Counted]:
    """Count steps on every architecture.

    Raises:
        RuntimeError: the interpreter's process failed, with its last words.
    """
    halves = [[item for item in planned if item[1].who == who] for who in (OURS, STOCK)]
    halves = [half for half in halves if half]
    tell("running the steps in the interpreter")
    with ThreadPoolExecutor(2) as pool:
        recorded = list(pool.map(lambda half: record([step for _, step in half]), halves))
    counted = []
    for half, answers in zip(halves, recorded, strict=True):
        for (setting, step), launches in zip(half, answers, strict=True):
            tell(f"{step.who}: {setting}, B = {step.case.batch}, K = {step.case.num_drafts}")
            for architecture in architectures:
                strict = step.who == OURS
                counts = tuple(count_launch(launch, architecture, strict) for launch in launches)
                counted.append(Counted(setting, step, architecture, counts))
    return counted


def write(counted: list[Counted], out: Path) -> None:
    """Write ``cost.csv``, a row for each launch, and ``cost.json``, which also has the modelled times."""
    out.mkdir(parents=True, exist_ok=True)
    rows = [_row(step, number, count) for step in counted for number, count in enumerate(step.counts)]
    with (out / CSV_NAME).open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (out / JSON_NAME).write_text(json.dumps(_document(counted), indent=1) + "\n")


def _row(step: Counted, number: int, count: Count) -> dict:
    case = step.step.case
    return {
        "setting": step.setting,
        "who": step.step.who,
        "batch": case.batch,
        "num_drafts": case.num_drafts,
        "dtype": case.dtype,
        "architecture": step.architecture,
        "launch": number + 1,
        "kernel": count.kernel,
        "programs": count.programs,
        "num_warps": count.num_warps,
        "registers": count.registers,
        "warps_per_sm": count.warps,
        "spilled_bytes": count.spilled,
        "shared_bytes": count.shared,
        "instructions_per_thread": round(count.per_thread, 1),
        "instructions_per_element": round(count.warp_instructions * 32 / step.elements, 3),
        "loaded_bytes": round(count.loaded),
        "stored_bytes": round(count.stored),
        "loads_found": round(count.loads_found, 3),
    }


def _document(counted: list[Counted]) -> dict:
    steps = []
    for step in counted:
        cards = [card for card in CARDS if card.architecture == step.architecture]
        steps.append(
            {
                "setting": step.setting,
                "who": step.step.who,
                "case": asdict(step.step.case),
                "flat_rows": step.step.flat,
                "architecture": step.architecture,
                "launches": len(step.counts),
                "instructions_per_element": step.per_element,
                "bytes": step.bytes,
                "floor_bytes": step.floor_bytes,
                "model_us": {card.name: asdict(step.modelled(card)) for card in cards},
                "audit_share": {card.name: step.audit_share(card) for card in cards} if step.step.audit else None,
                "kernels": [asdict(count) for count in step.counts],
            }
        )
    return {"note": "counts from machine code and a model of cards; no GPU ran this", **_versions(), "steps": steps}


def _versions() -> dict:
    try:
        vllm = version("vllm")
    except PackageNotFoundError:
        vllm = None
    return {"triton": triton.__version__, "vllm": vllm, "python": platform.python_version()}
