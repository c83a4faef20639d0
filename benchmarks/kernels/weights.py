"""How often each basic block of a kernel runs, from how often the loops and conditions of its source do.

A machine loop belongs to the source loop that most of its instructions come from; ptxas may have unrolled it, which
shows in instructions that occur several times for one line of PTX. A block behind a branch belongs to the sides of the
source's conditions that most of its instructions come from. Every block gets a weight; a machine loop without a source
loop, and a loop or condition whose frequency is unknown, raise an error.
"""

from __future__ import annotations

import collections
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

from vllm_specopt.benchmarks.kernels.machine_code import Block, Frame, Instruction, Loop, MachineCode, pipe
from vllm_specopt.benchmarks.kernels.regions import ELSE, LOOP, THEN, Region, place_of

# Instructions of which one line of PTX makes exactly one.
COUNTABLE = ("load", "store", "shared", "shuffle", "barrier", "mufu")
MOSTLY, NEARLY_ALL = 0.5, 0.9


class Undescribed(ValueError):
    """The machine code holds a loop or a branch of which nothing says how often it runs."""


@dataclass(frozen=True)
class Visit:
    """A region in one inlined call: functions from the kernel inwards, and the region."""

    calls: tuple[str, ...]
    region: Region

    @property
    def text(self) -> str:
        return " -> ".join((*self.calls[:-1], self.region.text))


Frequency = Callable[[Visit], float | None]
"""Rounds of a loop per entry, or the probability that a condition holds where it is reached; None: unknown."""


def counted(counts: Mapping[tuple, int]) -> Frequency:
    """Frequencies from what ``watching`` counted; what was never reached has 0."""
    everywhere: collections.Counter[tuple] = collections.Counter()
    for (calls, line, kind), number in counts.items():
        everywhere[calls[-1], line, kind] += number

    def frequency(visit: Visit) -> float:
        line = visit.region.line
        for key, table in ((visit.calls, counts), (visit.calls[-1], everywhere)):
            number = {kind: table.get((key, line, kind), 0) for kind in ("round", "entry", "then", "else")}
            if visit.region.kind == LOOP and number["entry"]:
                return number["round"] / number["entry"]
            if visit.region.kind != LOOP and number["then"] + number["else"]:
                return number["then"] / (number["then"] + number["else"])
        return 0.0

    return frequency


def described(runs: Mapping[str, float]) -> Frequency:
    """Frequencies from a table: "function: for ..." or "function: if ...", the header or how it begins.

    A prefix "caller -> " restricts an entry to the function inlined there; the longest entry that fits counts. An
    ``if`` that returns at once is taken never unless the table says so.
    """

    def frequency(visit: Visit) -> float | None:
        *calls, header = visit.text.split(" -> ")
        fitting = []
        for key in runs:
            *callers, own = key.split(" -> ")
            if header.startswith(own) and all(caller in calls for caller in callers):
                fitting.append(key)
        if not fitting:
            return 0.0 if visit.region.returns else None
        return float(runs[max(fitting, key=len)])

    return frequency


@dataclass
class Weighted:
    """A block with the number of times a thread runs it, and why.

    is_rest: Of an unrolled loop, all of whose rounds count as the unrolled body's.
    """

    block: Block
    weight: float
    reasons: list[str] = field(default_factory=list)
    is_rest: bool = False


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


def weigh(code: MachineCode, frequency: Frequency) -> list[Weighted]:
    """Weigh every block that can be reached.

    Raises:
        Undescribed: names every loop and condition that shows in the machine code and has no frequency.
    """
    weigher = Weigher(code, frequency)
    weighted = [weigher.weighted(block) for block in code.blocks if block.reachable]
    if weigher.missing:
        raise Undescribed("\n  ".join([f"{code.compiled.name}, not described:", *sorted(weigher.missing)]))
    return weighted


class Weigher:
    """Weighs one kernel's blocks and collects in ``missing`` what has no frequency, counting it once."""

    def __init__(self, code: MachineCode, frequency: Frequency) -> None:
        self.code = code
        self.frequency = frequency
        self.weighted = cache(self.weighted)  # type: ignore[method-assign] # a cache that ends with the object
        self.missing: set[str] = set()
        self.postdominators = _postdominators(code)
        self.shares = _chained_shares(code)
        self._place_the_nameless()
        self.source_loop: dict[int, Visit] = {}
        self.unrolled: dict[int, int] = {}
        for loop in code.loops:
            self._identify(loop)

    def weighted(self, block: Block) -> Weighted:
        """A block with its weight."""
        result = self._from_its_places(block)
        bound = self._bound(block)
        if result.weight > bound:
            result.weight = bound
            result.reasons.append(f"at most {bound:g}, by what leads to it")
        return result

    def _bound(self, block: Block) -> float:
        """A block runs at most as often as one that always runs before it, times the rounds of loops in between."""
        if not block.runs:
            return 0.0
        around = self.code.loops_around(block.number)
        for number in sorted(self.code.dominators[block.number] - {block.number}, key=self._depth, reverse=True):
            before = self.code.loops_around(number)
            leading = self.weighted(self.code.blocks[number])
            if all(loop in around for loop in before) and not leading.is_rest:
                between = Weighted(block, leading.weight)
                for loop in around:
                    if loop not in before:
                        self._apply_loop(loop, between)
                return between.weight
        return 1.0

    def _depth(self, number: int) -> int:
        return len(self.code.dominators[number])

    def _place_the_nameless(self) -> None:
        """Blocks of which no instruction has a place run as often as one that runs exactly when they do, or at most as
        often as the last one before them."""
        for number in sorted((n for n, shares in self.shares.items() if not shares), key=self._depth):
            dominators, around = self.code.dominators, self.code.loops_around(number)
            alike = [
                n
                for n, shares in self.shares.items()
                if shares
                and self.code.loops_around(n) == around
                and (
                    (number in dominators[n] and n in self.postdominators[number])
                    or (n in dominators[number] and number in self.postdominators[n])
                )
            ]
            before = dominators[number] - {number}
            nearest = min(alike, key=lambda n: abs(self._depth(n) - self._depth(number)), default=None)
            if nearest is None and before:
                nearest = max(before, key=self._depth)
            if nearest is not None:
                self.shares[number] = self.shares[nearest]

    def _from_its_places(self, block: Block) -> Weighted:
        result = Weighted(block, 1.0)
        if block.slow:
            result.weight, result.reasons = 0.0, [f"reached through {block.slow}"]
            return result
        around = self.code.loops_around(block.number)
        for loop in around:
            self._apply_loop(loop, result)
        machine_loops = {self.source_loop.get(loop.header) for loop in around}
        for visit in self._visits(block.number):
            if visit.region.kind == LOOP:
                unrolled = any(v == visit and self.unrolled[h] > 1 for h, v in self.source_loop.items())
                if visit not in machine_loops and unrolled:
                    result.weight, result.reasons, result.is_rest = 0.0, [f"rest of the unrolled {visit.text}"], True
            elif self._is_branch(block, visit):
                share = self._lookup(visit)
                share = 1 - share if visit.region.kind == ELSE else share
                result.weight *= share
                result.reasons.append(f"{share:g} {'' if visit.region.kind == THEN else 'else of '}{visit.text}")
        return result

    def _visits(self, number: int) -> list[Visit]:
        visits = [visit for visit, share in self.shares[number].items() if share >= MOSTLY]
        successors = set(self.code.blocks[number].successors)
        entered = [loop for loop in self.code.loops if successors == {loop.header} and number not in loop.blocks]
        if entered:
            # What leads into a loop and nowhere else belongs there, though constants made for it may come from afar.
            (header,) = successors
            visits = [visit for visit in visits if self.shares[header].get(visit, 0) >= MOSTLY]
        return visits

    def _identify(self, loop: Loop) -> None:
        inner = [other for other in self.code.loops if other.blocks < loop.blocks]
        own = loop.blocks - set().union(*(other.blocks for other in inner))
        outer = {self.source_loop.get(other.header) for other in self.code.loops if other.blocks > loop.blocks}
        instructions = [i for number in sorted(own) for i in self.code.blocks[number].instructions]
        candidates = [
            visit
            for visit, share in _shares(instructions).items()
            if visit.region.kind == LOOP and visit not in outer and share >= MOSTLY
        ]
        if not candidates:
            self.missing.add(f"a machine loop that is no loop of the source, at {instructions[-1].frames}")
            return
        source = candidates[-1]
        self.source_loop[loop.header] = source
        from_it = [i for i in instructions if _innermost_loop(i) == source]
        countable = [i for i in from_it if pipe(i.name) in COUNTABLE] or from_it
        copies = collections.Counter((i.ptx_line, i.name) for i in countable)
        self.unrolled[loop.header] = statistics.mode(sorted(copies.values()))

    def _apply_loop(self, loop: Loop, result: Weighted) -> None:
        visit = self.source_loop.get(loop.header)
        if visit is None:
            return
        rounds = self._lookup(visit)
        factor = self.unrolled[loop.header]
        if factor < max(self.unrolled[header] for header, other in self.source_loop.items() if other == visit):
            result.weight, result.is_rest = 0.0, True
            result.reasons.append(f"rest of the unrolled {visit.text}")
            return
        result.weight *= rounds / factor
        result.reasons.append(f"{rounds:g}{f' / {factor}' if factor > 1 else ''} x {visit.text}")

    def _is_branch(self, block: Block, visit: Visit) -> bool:
        """Whether a branch decides about this side of a condition, rather than a selection of values."""
        lacking = self._last_dominator_without(block, visit)
        if lacking is None or block.number in self.postdominators[lacking]:
            return False
        visits = self._visits(block.number)
        outer = [v for v in visits[: visits.index(visit)] if v.region.kind != LOOP]
        alone = all(self._last_dominator_without(block, other) != lacking for other in outer)
        # Behind one branch for two conditions, a side that only part of the block comes from may be a selection.
        return alone or self.shares[block.number][visit] >= NEARLY_ALL

    def _last_dominator_without(self, block: Block, visit: Visit) -> int | None:
        lacking = [n for n in self.code.dominators[block.number] if self.shares[n].get(visit, 0) < MOSTLY]
        return max(lacking, key=self._depth, default=None)

    def _lookup(self, visit: Visit) -> float:
        found = self.frequency(visit)
        if found is None:
            self.missing.add(visit.text)
            return 1.0
        return found


def _innermost_loop(instruction: Instruction) -> Visit | None:
    return next((v for v in reversed(visits_of(instruction.frames)) if v.region.kind == LOOP), None)


def _shares(instructions: list[Instruction]) -> dict[Visit, float]:
    """Share of the instructions with a known place that come from each visit; outermost first."""
    counts: collections.Counter[Visit] = collections.Counter()
    depth: dict[Visit, int] = {}
    known = 0
    for instruction in instructions:
        known += bool(instruction.frames)
        for number, visit in enumerate(visits_of(instruction.frames)):
            counts[visit] += 1
            depth[visit] = number
    return {visit: counts[visit] / known for visit in sorted(counts, key=depth.__getitem__)}


def _chained_shares(code: MachineCode) -> dict[int, dict[Visit, float]]:
    """Shares of every block, over all blocks of its chain: those that nothing leaves or enters in between.

    A rare way that leaves and joins a chain splits off blocks too short to tell where they come from.
    """
    found: dict[int, dict[Visit, float]] = {}
    follows: dict[int, int] = {}
    for block in code.blocks:
        if block.runs and len(block.successors) == 1 and not block.leaves:
            (after,) = block.successors
            if [n for n in code.blocks[after].predecessors if code.blocks[n].runs] == [block.number]:
                follows[block.number] = after
    for number in {block.number for block in code.blocks if block.runs} - set(follows.values()):
        chain = [number]
        while chain[-1] in follows:
            chain.append(follows[chain[-1]])
        shares = _shares([i for n in chain for i in code.blocks[n].instructions])
        found |= dict.fromkeys(chain, shares)
    return found


def _postdominators(code: MachineCode) -> dict[int, set[int]]:
    numbers = [block.number for block in code.blocks if block.runs]
    everything = set(numbers)
    found = {n: set(everything) for n in numbers}
    changed = True
    while changed:
        changed = False
        for number in reversed(numbers):
            after = [found[n] for n in code.blocks[number].successors if n in everything]
            leaves = code.blocks[number].leaves
            now = (set.intersection(*after) if after and not leaves else set()) | {number}
            if now != found[number]:
                found[number], changed = now, True
    return found
