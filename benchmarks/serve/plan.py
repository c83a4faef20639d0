"""Arms, cells and order of the serving comparison: what `specopt ab` runs. Nothing here measures.

A cell is one `vllm bench serve` of one arm at one temperature and concurrency. All arms are served at once, and idle
servers cost nothing, so the arms take turns without a restart: A B C in one repeat, C B A in the next. The baseline is
served twice, by two processes that know nothing of each other; the ratio of these two is the noise.
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
# What repaired.py says in the log of every process it is in.
REPAIRED_LINE = "specopt ab: expand_kernel repaired"
REQUESTS_PER_SLOT = 4
MIN_REQUESTS = 24


@dataclass(frozen=True)
class Cell:
    """One run of the client: ``repeat`` counts from 0."""

    arm: str
    temperature: float
    concurrency: int
    repeat: int

    @property
    def key(self) -> str:
        """The name of the cell in the record."""
        return f"{self.arm}|T{self.temperature:g}|c{self.concurrency}|r{self.repeat}"


@dataclass(frozen=True)
class Plan:
    """What one comparison runs; the first of ``arms`` is the baseline. Times are in seconds."""

    arms: tuple[Arm, ...]
    target: str
    served_name: str
    tokenizer: str
    speculation: dict | None
    workload: Workload
    concurrency: tuple[int, ...]
    temperatures: tuple[float, ...]
    top_p: float
    num_prompts: int | None
    output_len: int
    repeats: int
    seed: int
    serve_args: tuple[str, ...]
    timeout: float
    on_cpu: bool
    # To fit into: the cells' sizes are then known once the servers have been heard.
    minutes: float | None = None
    sizes: tuple[tuple[int, int], ...] | None = None

    @property
    def baseline(self) -> Arm:
        """The arm the others are compared with."""
        return self.arms[0]

    @property
    def noise(self) -> Arm:
        """The baseline once more: a server of its own, or the same one where the servers were running already."""
        base = self.baseline
        return Arm(base.name + NOISE_SUFFIX, base.option, base.repair, base.url)

    def all_arms(self) -> list[Arm]:
        """Return the arms with the noise arm at the end."""
        return [*self.arms, self.noise]

    def cells(self) -> list[Cell]:
        """Return every cell in the order of running: whole repeats, and in each the arms side by side."""
        names = [arm.name for arm in self.all_arms()]
        return [
            Cell(name, temperature, concurrency, repeat)
            for repeat in range(self.repeats)
            for temperature in self.temperatures
            for concurrency in self.concurrency
            for name in (names if repeat % 2 == 0 else names[::-1])
        ]

    def requests(self, concurrency: int) -> int:
        """Return the requests of a cell: as asked or as fitted, else the full number."""
        return self.num_prompts or dict(self.sizes or ()).get(concurrency) or self.full_requests(concurrency)

    def full_requests(self, concurrency: int) -> int:
        """Return how many requests keep the slots filled a few times."""
        return max(MIN_REQUESTS, REQUESTS_PER_SLOT * concurrency)

    def fitted(self, found: dict) -> Plan:
        """Return the plan with the sizes and repeats of ``serving_fit.fit``, which may have been through JSON."""
        sizes = tuple((int(slots), requests) for slots, requests in found["requests"].items())
        return replace(self, sizes=sizes, repeats=found["repeats"])

    def sampling(self, temperature: float) -> dict:
        """Return the sampling parameters of a cell; top-p means nothing at temperature 0."""
        return {"temperature": temperature} | ({"top_p": self.top_p} if temperature and self.top_p < 1 else {})

    def describe(self) -> dict:
        """Return the configuration for the record; a run is continued only under an equal one."""
        return {
            "arms": {arm.name: asdict(arm) for arm in self.all_arms()},
            "baseline": self.baseline.name,
            "noise": self.noise.name,
            "target": portable(self.target),
            "speculation": json.loads(portable(json.dumps(self.speculation))),
            "workload": self.workload.name,
            "concurrency": list(self.concurrency),
            "temperatures": list(self.temperatures),
            "top_p": self.top_p,
            "requests": {str(slots): self.requests(slots) for slots in self.concurrency},
            "minutes": self.minutes,
            "output_len": self.output_len,
            "repeats": self.repeats,
            "seed": self.seed,
            "serve_args": list(self.serve_args),
        }


def portable(text: str) -> str:
    """Return a command's part as a reader elsewhere would type it, without where this checkout and Python are."""
    text = text.replace(f"{Path(sys.executable).parent}/", "")
    return text.replace(f"{CHECKOUT}/", "")


def changed_settings(old: dict, new: dict) -> list[str]:
    """Return what differs between two configurations, one ``name: old there, new now`` per setting."""
    keys = dict.fromkeys([*old, *new])
    return [f"{key}: {old.get(key)} there, {new.get(key)} now" for key in keys if old.get(key) != new.get(key)]


def with_repaired(arms: list[Arm], by_default: bool, temperatures: tuple[float, ...]) -> tuple[list[Arm], str | None]:
    """Return the arms to run on a CPU, the baseline first, and the notice to print, if any.

    Above temperature 0 stock's speculation on a CPU draws from another distribution, so ``stock-repaired`` takes the
    place of ``stock``, or stands beside it where ``stock`` was asked for.
    """
    names = [arm.name for arm in arms]
    if STOCK not in names or not any(temperatures):
        return sorted(arms, key=lambda arm: arm.name != REPAIRED), None
    kept = [arm for arm in arms if arm.name not in ((STOCK, REPAIRED) if by_default else (REPAIRED,))]
    how = "in the place of" if by_default else "beside"
    return [Arm(REPAIRED, repair=True), *kept], (
        "On CPU, stock vLLM reads uninitialised memory for temperature, top-k and top-p when it speculates at a "
        f"temperature above 0: {REPAIRED}, with that one function replaced, runs {how} {STOCK}."
    )
