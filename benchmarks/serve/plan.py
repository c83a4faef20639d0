"""Arms, points, cells and order of a comparison: what `specopt ab` runs. Nothing here measures.

A cell is one run of one arm at one point (temperature and top-p) and concurrency: one `vllm bench serve` on a server,
or one generation in an offline engine. The arms take turns: A B C in one repeat, C B A in the next. Served, all are up
at once, and idle servers cost nothing. The baseline runs twice, in two processes that know nothing of each other; the
ratio of these two is the noise.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from vllm_specopt.benchmarks.record import CHECKOUT
from vllm_specopt.benchmarks.serve.arms import REPAIRED, STOCK, Arm
from vllm_specopt.benchmarks.serve.workloads import Workload

NOISE_SUFFIX = " (again)"
GREEDY = "T = 0"
# What repaired.py says in the log of every process it is in.
REPAIRED_LINE = "specopt ab: expand_kernel repaired"
REQUESTS_PER_SLOT = 4
# Characters of a setting in a sentence.
MOST_SHOWN = 40
MIN_REQUESTS = 24
PLAIN = Arm("no speculation", {"method": "exact"}, speculates=False)
"""The drop-in without drafts: seeded texts have to be the same there. It is not timed."""


@dataclass(frozen=True)
class Point:
    """The sampling parameters of a cell."""

    temperature: float
    top_p: float = 1.0

    def __str__(self) -> str:
        return f"T = {self.temperature:g}" + (f", top-p {self.top_p:g}" if self.top_p < 1 else "")

    def sampling(self) -> dict:
        """Return them as requests take them; top-p means nothing at temperature 0."""
        found = {"temperature": self.temperature}
        return found | ({"top_p": self.top_p} if self.temperature and self.top_p < 1 else {})


@dataclass(frozen=True)
class Cell:
    """One run: ``point`` as text, ``repeat`` counts from 0."""

    arm: str
    point: str
    concurrency: int
    repeat: int

    @property
    def key(self) -> str:
        """The name of the cell in the record."""
        return f"{self.arm}|{self.point}|c{self.concurrency}|r{self.repeat}"


@dataclass(frozen=True)
class Plan:
    """What one comparison runs; the first of ``arms`` is the baseline. Times are in seconds.

    noise: Whether the baseline runs twice.
    plain: Whether seeded texts are compared with those of the drop-in without speculation.
    offline: Whether the arms are engines without a server.
    minutes: To fit into: the cells' sizes are then known once the servers have been heard.
    only: The arm and the repeat that a part of the comparison is of.
    name: The models for readers; empty: the target's.
    """

    arms: tuple[Arm, ...]
    target: str
    served_name: str
    speculation: dict | None
    workload: Workload
    concurrency: tuple[int, ...]
    points: tuple[Point, ...]
    num_prompts: int | None
    output_len: int
    repeats: int
    seed: int
    serve_args: tuple[str, ...]
    timeout: float
    on_cpu: bool
    noise: bool = True
    plain: bool = False
    offline: bool = False
    minutes: float | None = None
    sizes: tuple[tuple[int, int], ...] | None = None
    only: tuple[str, int] | None = None
    name: str = ""

    @property
    def baseline(self) -> Arm:
        """The arm the others are compared with."""
        return self.arms[0]

    @property
    def noise_name(self) -> str:
        """The name of the baseline's second process."""
        return self.baseline.name + NOISE_SUFFIX

    def timed_arms(self) -> list[Arm]:
        """Return the arms with the noise arm at the end; a server that runs already is asked twice."""
        found = [*self.arms, *([replace(self.baseline, name=self.noise_name)] if self.noise else [])]
        return [arm for arm in found if not self.only or arm.name == self.only[0]]

    def all_arms(self) -> list[Arm]:
        """Return the arms that are started."""
        return [*self.timed_arms(), *([PLAIN] if self.plain else [])]

    def cells(self) -> list[Cell]:
        """Return every cell in the order of running: whole repeats, and in each the arms side by side."""
        names = [arm.name for arm in self.timed_arms()]
        return [
            Cell(name, str(point), concurrency, repeat)
            for repeat in range(self.repeats)
            if not self.only or repeat == self.only[1]
            for point in self.points
            for concurrency in self.concurrency
            for name in (names if repeat % 2 == 0 else names[::-1])
        ]

    def sampling(self, point: str) -> dict:
        """Return the sampling parameters of a point by its text."""
        return next(each.sampling() for each in (*self.points, Point(0.0)) if str(each) == point)

    def compared(self, arm: Arm) -> list[str]:
        """Return the points at which an arm's texts are compared: greedily with the baseline's, else with `PLAIN`'s."""
        greedy = [GREEDY] if arm != PLAIN else []
        seeded = [str(point) for point in self.points if point.temperature] if self.plain else []
        return greedy + (seeded if arm.option == PLAIN.option else [])

    def requests(self, concurrency: int) -> int:
        """Return the requests of a cell: as asked or as fitted, else the full number; offline, all are in flight."""
        if self.offline:
            return self.num_prompts or concurrency
        return self.num_prompts or dict(self.sizes or ()).get(concurrency) or self.full_requests(concurrency)

    def full_requests(self, concurrency: int) -> int:
        """Return how many requests keep the slots filled a few times."""
        return max(MIN_REQUESTS, REQUESTS_PER_SLOT * concurrency)

    def fitted(self, found: dict) -> Plan:
        """Return the plan with the sizes and repeats of ``fit.fit``, which may have been through JSON."""
        sizes = tuple((int(slots), requests) for slots, requests in found["requests"].items())
        return replace(self, sizes=sizes, repeats=found["repeats"])

    def describe(self) -> dict:
        """Return the configuration for the record; a run is continued only under an equal one."""
        return {
            "plain": self.plain,
            "offline": self.offline,
            "target": self.name or portable(self.target),
            "speculation": json.loads(portable(json.dumps(self.speculation))),
            "workload": self.workload.name,
            "concurrency": list(self.concurrency),
            "points": {str(point): point.sampling() for point in self.points},
            "requests": {str(slots): self.requests(slots) for slots in self.concurrency},
            "minutes": self.minutes,
            "output_len": self.output_len,
            "repeats": self.repeats,
            "seed": self.seed,
            "serve_args": list(self.serve_args),
            # Behind the others: which arms there are follows from the points, too.
            "arms": {arm.name: asdict(arm) for arm in self.timed_arms()},
            "baseline": self.baseline.name,
            "noise": self.noise_name if self.noise else None,
        }


def portable(text: str) -> str:
    """Return a command's part as a reader elsewhere would type it, without where this checkout and Python are."""
    text = text.replace(f"{Path(sys.executable).parent}/", "")
    return text.replace(f"{CHECKOUT}/", "")


def changed_setting(old: dict, new: dict) -> str | None:
    """Return the first difference between two configurations as ``name: old there, new now``, shortened, or None."""

    def short(value: object) -> str:
        text = " + ".join(value) if isinstance(value, dict) else str(value)
        return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 1]}…"

    for key in dict.fromkeys([*new, *old]):
        there, now = old.get(key), new.get(key)
        if there == now:
            continue
        if isinstance(there, dict) and isinstance(now, dict) and there.keys() == now.keys():
            return f"{key} {changed_setting(there, now)}"
        return f"{key}: {short(there)} there, {short(now)} now"
    return None


def with_repaired(arms: list[Arm], by_default: bool, points: tuple[Point, ...]) -> tuple[list[Arm], str | None]:
    """Return the arms to run on a CPU, the baseline first, and the notice to print, if any.

    Above temperature 0 stock's speculation on a CPU draws from another distribution, so ``stock-repaired`` takes the
    place of ``stock``, or stands beside it where ``stock`` was asked for.
    """
    names = [arm.name for arm in arms]
    if STOCK not in names or not any(point.temperature for point in points):
        return sorted(arms, key=lambda arm: arm.name != REPAIRED), None
    kept = [arm for arm in arms if arm.name not in ((STOCK, REPAIRED) if by_default else (REPAIRED,))]
    how = "in the place of" if by_default else "beside"
    return [Arm(REPAIRED, repair=True), *kept], (
        "On CPU, stock vLLM reads uninitialised memory for temperature, top-k and top-p when it speculates at a "
        f"temperature above 0: {REPAIRED}, with that one function replaced, runs {how} {STOCK}."
    )
