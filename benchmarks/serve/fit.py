"""How many requests each cell of a serving comparison gets, so that all of it fits into the minutes asked for.

A rehearsal of every point, short runs of the client on the baseline, tells what a wave of requests and the client
itself take here. The same share of the full number of requests is then taken at every concurrency; where even the
smallest run is too long, repeats go first.
"""

from __future__ import annotations

from dataclasses import dataclass

from vllm_specopt.benchmarks.serve.plan import Plan

# What the rehearsal cannot see: how far an hour's speed on a shared machine wanders.
MARGIN = 0.9
LEAST_REQUESTS, LEAST_REPEATS = 8, 2
SHARES = tuple(share / 50 for share in range(50, 0, -1))


@dataclass(frozen=True)
class Rehearsal:
    """One short run at a point: its requests, the seconds they took, and the client's own seconds around them."""

    point: str
    concurrency: int
    requests: int
    load: float
    overhead: float

    def seconds(self, requests: int) -> float:
        """Return what a run with so many requests takes."""
        return self.overhead + self.load * requests / self.requests


def rehearsal_requests(concurrency: int) -> int:
    """Return the requests of a rehearsal: one wave, and a few where one request is in flight."""
    return max(4, concurrency)


def fit(plan: Plan, rehearsals: list[Rehearsal], seconds: float) -> dict:
    """Return the requests by concurrency, the repeats, and the seconds expected for a plan's cells.

    Args:
        plan: The comparison; its own repeats are the most that are run.
        rehearsals: One for each point and concurrency.
        seconds: What the cells may take.
    """

    def expected(sizes: dict[int, int], repeats: int) -> float:
        once = sum(each.seconds(sizes[each.concurrency]) for each in rehearsals)
        return once * repeats * len(plan.timed_arms())

    def waves(slots: int, requests: float) -> int:
        """Whole waves: with a rest of one, most of a cell would be a request by itself."""
        return slots * max(-(-LEAST_REQUESTS // slots), round(requests / slots))

    least = {slots: waves(slots, 0) for slots in plan.concurrency}
    for repeats in range(plan.repeats, min(LEAST_REPEATS, plan.repeats) - 1, -1):
        for share in SHARES:
            sizes = {slots: waves(slots, share * plan.full_requests(slots)) for slots in plan.concurrency}
            if expected(sizes, repeats) <= MARGIN * seconds:
                return {"requests": sizes, "repeats": repeats, "seconds": round(expected(sizes, repeats))}
    return {"requests": least, "repeats": repeats, "seconds": round(expected(least, repeats))}


def asked(plan: Plan) -> dict:
    """Return what the sizes of a plan's cells were chosen for."""
    return {"minutes": plan.minutes, "repeats": plan.repeats}


def fitted(plan: Plan, record: dict) -> Plan:
    """Return the plan with the sizes that a record has chosen for it, if it has."""
    fit = record.get("fit")
    return plan.fitted(fit) if fit and fit["asked"] == asked(plan) else plan
