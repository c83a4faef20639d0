"""From counts to a modelled time on a card. A model: no GPU ran any of this.

Per launch, each resource alone takes a time: instruction issue, each pipe, memory, and the one program that is as long
as its instructions make it (what remains when a grid does not fill the card). ``low`` is the longest of them, as if all
overlapped and nothing stalled; ``high`` adds memory to the longest of the others and lets an instruction of a lone warp
wait three times as long. Launches follow one another, each with its overhead.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from vllm_specopt.benchmarks.kernels.counting import Count

LAUNCH_US = 2.5
# Cycles between two instructions of one warp: dependent arithmetic mostly hidden; barriers and loads in between.
CYCLES_LOW, CYCLES_HIGH = 2.0, 6.0
ISSUE = 4.0


@dataclass(frozen=True)
class Card:
    """A GPU: name, architecture, SMs, GHz under load, sustained memory rate in TB/s, fp64 lanes per SM."""

    name: str
    architecture: int
    sms: int
    ghz: float
    terabytes: float
    fp64_lanes: int


CARDS = (
    Card("A100", 80, 108, 1.41, 2.0, 32),
    Card("H100", 90, 132, 1.755, 3.35, 64),
    Card("H200", 90, 132, 1.755, 4.8, 64),
    Card("B200", 100, 148, 1.85, 8.0, 64),
)
# Lanes per SM and cycle that serve these pipes; what shares a pipe is added up.
LANES = {
    ("mufu", "convert"): 16,
    ("fp32", "imad", "half"): 128,
    ("integer", "compare"): 64,
    ("shuffle", "shared", "local"): 32,
    ("load", "store"): 32,
    ("uniform", "constant"): 64,
}


@dataclass(frozen=True)
class Modelled:
    """Microseconds; ``floor`` is the time to read what any method must read once."""

    floor: float
    low: float
    high: float


def model(counts: Iterable[Count], card: Card, floor_bytes: float) -> Modelled:
    """Model a step: its launches one after the other."""
    counts = list(counts)
    low = sum(_launch(count, card)[0] for count in counts) + LAUNCH_US * len(counts)
    high = sum(_launch(count, card)[1] for count in counts) + LAUNCH_US * len(counts)
    return Modelled(_memory(floor_bytes, card), low, high)


def _memory(number: float, card: Card) -> float:
    return number / card.terabytes / 1e6


def _launch(count: Count, card: Card) -> tuple[float, float]:
    cycles_per_us = card.ghz * 1e3
    per_sm = {pipe: number / min(card.sms, count.programs) for pipe, number in count.pipes.items()}
    lanes = LANES | {("fp64",): card.fp64_lanes}
    pipes = [sum(per_sm.get(pipe, 0.0) for pipe in group) * 32 / width for group, width in lanes.items()]
    busy = max([sum(per_sm.values()) / ISSUE, *pipes]) / cycles_per_us
    memory = _memory(count.bytes, card)
    alone = count.per_thread / cycles_per_us
    return max(busy, memory, alone * CYCLES_LOW), max(busy + memory, alone * CYCLES_HIGH)
