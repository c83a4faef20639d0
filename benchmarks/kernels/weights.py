"""How often each basic block of a kernel runs, from how often the loops and conditions of its source do.

A machine loop belongs to the source loop that most of its instructions come from; ptxas may have unrolled it, which
shows in instructions that occur several times for one line of PTX. A block behind a branch belongs to the sides of the
source's conditions that most of its instructions come from. Every block gets a weight: one of a loop or condition that
is not described raises an error that lists all of these.
"""

from __future__ import annotations

import collections
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from vllm_specopt.benchmarks.kernels.machine_code import Block, Frame, Instruction, Loop, MachineCode, pipe
from vllm_specopt.benchmarks.kernels.regions import ELSE, LOOP, Region, place_of

# Instructions of which one line of PTX makes exactly one.
COUNTABLE = ("load", "store", "shared", "shuffle", "barrier", "mufu")


class Undescribed(ValueError):
    """Loops or conditions whose frequency a description lacks, or has for nothing."""


@dataclass(frozen=True)
class Visit:
    """A region in one inlined call: functions from the kernel inwards, and the region."""

    calls: tuple[str, ...]
    region: Region

    @property
    def text(self) -> str:
        return " -> ".join((*self.calls[:-1], self.region.text))


@dataclass
class Weighted:
    """A block with the number of times a thread runs it, and why."""

    block: Block
    weight: float
    reasons: list[str] = field(default_factory=list)


@cache
def visits_of(frames: tuple[Frame, ...]) -> tuple[Visit, ...]:
    """Regions around a place and around the calls that lead to it, outermost first; none that is static."""
    visits: list[Visit] = []
    calls: tuple[str, ...] = ()
    for frame in frames:
        place = place_of(frame.file, frame.line)
        calls = (*calls, place.function)
        visits += [Visit(calls, region) for region in place.regions if not region.static]
    return tuple(dict.fromkeys(visits))


def weigh(code: MachineCode, runs: Mapping[str, float]) -> list[Weighted]:
    """Weigh every block.

    runs: "function: for ..." or "function: while ..." to the number of rounds per entry, "function: if ..." to the
        probability that it holds where it is reached. What follows the colon may be the beginning of the header. A
        prefix "caller -> " restricts an entry to the function inlined there; the longest entry that fits counts.

    Raises:
        Undescribed: a loop or condition that shows in the machine code is missing, or an entry fits nothing at all.
    """
    weigher = _Weigher(code, runs)
    weighted = [weigher.weighted(block) for block in code.blocks if block.reachable]
    weigher.check()
    return weighted


class _Weigher:
    def __init__(self, code: MachineCode, runs: Mapping[str, float]) -> None:
        self.code = code
        self.runs = dict(runs)
        self.missing: set[str] = set()
        self.used: set[str] = set()
        self.seen: set[str] = set()
        self.postdominators = _postdominators(code)
        self.visits = {block.number: self._majority(block.instructions) for block in code.blocks}
        self.source_loop: dict[int, Visit] = {}
        self.unrolled: dict[int, int] = {}
        for loop in code.loops:
            self._identify(loop)

    def weighted(self, block: Block) -> Weighted:
        result = Weighted(block, 1.0)
        if block.slow:
            result.weight, result.reasons = 0.0, [f"reached through {block.slow}"]
            return result
        around = self.code.loops_around(block.number)
        for loop in around:
            self._apply_loop(loop, result)
        machine_loops = {self.source_loop.get(loop.header) for loop in around}
        for visit in self.visits[block.number]:
            region = visit.region
            if region.kind == LOOP:
                main = [h for h, v in self.source_loop.items() if v == visit and self.unrolled[h] > 1]
                if visit not in machine_loops and main:
                    result.weight, result.reasons = 0.0, [f"rest of the unrolled {visit.text}"]
            elif self._is_branch(block, visit):
                share = self._lookup(visit)
                share = 1 - share if region.kind == ELSE else share
                result.weight *= share
                result.reasons.append(f"{share:g} {'else of ' if region.kind == ELSE else ''}{visit.text}")
        return result

    def check(self) -> None:
        """Raise Undescribed if anything is missing or superfluous."""
        unused = [key for key in self.runs if key not in self.used and not self._fits_anything(key)]
        if self.missing or unused:
            lines = [f"not described: {text!r}" for text in sorted(self.missing)]
            lines += [f"described, but nowhere in {self.code.compiled.name}: {text!r}" for text in unused]
            raise Undescribed("\n".join([f"{self.code.compiled.name}:", *lines]))

    def _innermost_loop(self, instruction: Instruction) -> Visit | None:
        return next((v for v in reversed(visits_of(instruction.frames)) if v.region.kind == LOOP), None)

    def _majority(self, instructions: list[Instruction]) -> tuple[Visit, ...]:
        """Visits that at least half of the instructions with a known place come from, outermost first."""
        counts: collections.Counter[Visit] = collections.Counter()
        depth: dict[Visit, int] = {}
        known = 0
        for instruction in instructions:
            known += bool(instruction.frames)
            for number, visit in enumerate(visits_of(instruction.frames)):
                counts[visit] += 1
                depth[visit] = number
        self.seen |= {visit.text for visit in counts}
        found = [visit for visit, count in counts.items() if 2 * count >= known]
        return tuple(sorted(found, key=depth.__getitem__))

    def _identify(self, loop: Loop) -> None:
        inner = [other for other in self.code.loops if other.blocks < loop.blocks]
        own = loop.blocks - set().union(*(other.blocks for other in inner))
        outer = {
            self.source_loop[other.header]
            for other in self.code.loops
            if other.blocks > loop.blocks and other.header in self.source_loop
        }
        instructions = [i for number in sorted(own) for i in self.code.blocks[number].instructions]
        candidates = [v for v in self._majority(instructions) if v.region.kind == LOOP and v not in outer]
        if not candidates:
            place = instructions[-1].frames
            self.missing.add(f"a machine loop that is no loop of the source, at {place}")
            return
        self.source_loop[loop.header] = candidates[-1]
        own_lines = [i for i in instructions if self._innermost_loop(i) == candidates[-1]]
        countable = [i for i in own_lines if pipe(i.name) in COUNTABLE] or own_lines
        copies = collections.Counter((i.ptx_line, i.name) for i in countable)
        self.unrolled[loop.header] = statistics.mode(sorted(copies.values()))

    def _apply_loop(self, loop: Loop, result: Weighted) -> None:
        visit = self.source_loop.get(loop.header)
        if visit is None:
            return
        rounds = self._lookup(visit)
        same = [h for h, other in self.source_loop.items() if other == visit]
        most = max(self.unrolled[header] for header in same)
        factor = self.unrolled[loop.header]
        if factor < most:
            result.weight *= 0.0
            result.reasons.append(f"rest of the unrolled {visit.text}")
            return
        result.weight *= rounds / factor
        result.reasons.append(f"{rounds:g}{f' / {factor}' if factor > 1 else ''} x {visit.text}")

    def _conditional(self, number: int, since: int) -> bool:
        """Whether a thread that comes by one block can miss another."""
        return number not in self.postdominators[since]

    def _is_branch(self, block: Block, visit: Visit) -> bool:
        """Whether a branch decides about this visit to a side of a condition, rather than a selection of values."""
        lacking = self._last_dominator_without(block, visit)
        if lacking is None or not self._conditional(block.number, lacking):
            return False
        position = self.visits[block.number].index(visit)
        outer = [v for v in self.visits[block.number][:position] if v.region.kind != LOOP]
        # An inner condition that has no branch of its own was turned into selections behind the outer one's branch.
        return not any(self._last_dominator_without(block, other) == lacking for other in outer)

    def _last_dominator_without(self, block: Block, visit: Visit) -> int | None:
        lacking = [n for n in self.code.dominators[block.number] if visit not in self.visits[n]]
        return max(lacking, key=lambda n: len(self.code.dominators[n]), default=None)

    def _lookup(self, visit: Visit) -> float:
        fitting = [key for key in self.runs if _fits(key, visit)]
        if not fitting:
            self.missing.add(visit.text)
            return 1.0
        best = max(fitting, key=len)
        self.used.update(fitting)
        return float(self.runs[best])

    def _fits_anything(self, key: str) -> bool:
        return any(_fits_text(key, text) for text in self.seen)


def _fits(key: str, visit: Visit) -> bool:
    return _fits_text(key, visit.text)


def _fits_text(key: str, text: str) -> bool:
    *callers, own = key.split(" -> ")
    *calls, region = text.split(" -> ")
    return region.startswith(own) and all(caller in calls for caller in callers)


def _postdominators(code: MachineCode) -> dict[int, set[int]]:
    numbers = [block.number for block in code.blocks if block.reachable]
    everything = set(numbers)
    found = {n: set(everything) for n in numbers}
    changed = True
    while changed:
        changed = False
        for number in reversed(numbers):
            after = [found[n] for n in code.blocks[number].successors if n in everything]
            leaves = code.blocks[number].instructions[-1].name == "EXIT"
            now = (set.intersection(*after) if after and not leaves else set()) | {number}
            if now != found[number]:
                found[number], changed = now, True
    return found
