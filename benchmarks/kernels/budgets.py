"""Upper bounds for what our kernels may cost, counted from machine code for sm_90 at V = 151,936; none may spill.

Unit ``element``: instructions per logit that a sweep of all rows reads; ``pair``: per target logit and draft logit of
the rejected rows; ``row``: warp instructions per target row; ``logit``: per logit of all target rows, read or not;
``share``: modelled time that the audit of every step adds to its verification, as a part of it, on the worst card,
unless the verification is mostly launches (the audit is one more). Of a tenth of the steps it adds a tenth of that.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_specopt.benchmarks.kernels.cost import AUDIT, AUDITED, Counted
from vllm_specopt.benchmarks.kernels.cost_model import CARDS
from vllm_specopt.benchmarks.kernels.counting import Count
from vllm_specopt.benchmarks.kernels.grid import LOGITS

ARCHITECTURE = 90
# What a logit of another dtype may cost more.
DTYPE_FACTOR = {"bf16": 1.0, "fp16": 1.5, "fp32": 1.5}


@dataclass(frozen=True)
class Budget:
    """A bound for the kernels of a step whose names contain ``kernel``; an empty one means all of them.

    settings: Beginnings of the settings it holds for.
    least_warps: Warps that an SM must be able to hold, where logits are bf16.
    """

    kernel: str
    settings: tuple[str, ...]
    unit: str
    limit: float
    least_warps: int = 0
    flat: bool = False


FILTERED = ("top-p", "top-k", "min-p")
BUDGETS = (
    Budget("statistics", ("one-hot",), "element", 10.0, least_warps=24),
    Budget("statistics", ("draft logits",), "element", 10.0),
    Budget("decide", ("one-hot",), "row", 3000.0),
    Budget("residual", ("draft logits",), "pair", 20.0),
    Budget("decide", FILTERED, "logit", 30.0),
    Budget("decide", FILTERED, "logit", 90.0, flat=True),
    Budget(AUDIT, (AUDITED,), "share", 0.30),
)


def violations(counted: Iterable[Counted]) -> list[str]:
    """What exceeds its budget, spills, or is nowhere to be found; empty if all is well."""
    found = []
    for step in counted:
        for count in step.counts:
            if count.spilled:
                found.append(f"{_where(step)}: {count.kernel} spills {count.spilled} bytes")
        for budget in BUDGETS if step.architecture == ARCHITECTURE else ():
            if not step.setting.startswith(budget.settings) or budget.flat != step.step.flat:
                continue
            counts = [count for count in step.counts if budget.kernel in count.kernel and count.num_warps]
            if not counts:
                found.append(f"{_where(step)}: no kernel is called {budget.kernel}")
                continue
            used = spent(step, counts, budget.unit)
            if used is None:
                continue
            limit = budget.limit * DTYPE_FACTOR[step.step.case.dtype]
            if used > limit:
                found.append(f"{_where(step)}: {budget.kernel or 'all'} {used:.3g} per {budget.unit}, budget {limit:g}")
            fewest = min(count.warps for count in counts)
            if step.step.case.dtype == "bf16" and fewest < budget.least_warps:
                found.append(f"{_where(step)}: {budget.kernel} {fewest} warps per SM, budget {budget.least_warps}")
    return found


def spent(step: Counted, counts: Iterable[Count], unit: str) -> float | None:
    """Instructions in a budget's unit; None where it does not apply: no row was rejected, so that there is no pair."""
    counts, case = list(counts), step.step.case
    warp_instructions = sum(count.warp_instructions for count in counts)
    rows = case.batch * (case.num_drafts + 1)
    if unit == "share":
        cards = [card for card in CARDS if card.architecture == step.architecture]
        verification = step.without_audit()
        return max(
            (step.audit_share(card) for card in cards if not verification.is_mostly_launches(card)), default=None
        )
    if unit == "row":
        return warp_instructions / rows
    read = step.elements
    if unit == "element" and case.draft == LOGITS:
        read += case.batch * case.num_drafts * case.vocab
    if unit == "pair":
        # Programs of a rejected row read two rows; those of a request without a rejection read none.
        read = sum(count.loaded for count in counts) / 2 / (4 if case.dtype == "fp32" else 2)
        if read < case.vocab:
            return None
    return warp_instructions * 32 / read


def _where(step: Counted) -> str:
    case = step.step.case
    return f"{step.setting}, B = {case.batch}, K = {case.num_drafts}, sm_{step.architecture}"
