"""Launch shapes on this card: one parameter after the other, the call's time on the cases that it can change.

Every timing is a row of sweep.csv at once; the best shapes so far are in launch_table.json, which the kernels load from
there (SPECOPT_LAUNCH_TABLE) or from kernels/tables/. A shape replaces the one before it if it is faster by MARGIN in
the geometric mean over its cases: less may be noise.
"""

from __future__ import annotations

import csv
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton

from first_run import batches, timing
from first_run.places import REHEARSE, RESULTS, STANDIN, save
from vllm_specopt.benchmarks.kernels import measure
from vllm_specopt.kernels import launch, shapes
from vllm_specopt.kernels.shapes import DEFAULTS, Shapes

MARGIN = 0.01
# Of the requests of a case: shapes change rounding, which changes a draw once in a long while.
MOST_DIFFERING = 0.02
SHAPES = ((64, 7), (256, 3), (1, 3))
CSV_NAME, TABLE = "sweep.csv", RESULTS / "launch_table.json"
# Seconds after which a variant counts as failed: some keep the assembler busy for minutes.
ASSEMBLER_SECONDS = 12
# Kept for a profile of each form with the defaults and with the best shapes.
PROFILING_SECONDS = 2 if REHEARSE else 14
COLUMNS = ("parameter", "value", "case", "us", "p20_us", "p80_us", *Shapes._fields, "note")


@dataclass(frozen=True)
class Parameter:
    """A field of Shapes, values to try, and (form, batch, drafts) of the cases that it can change."""

    name: str
    values: tuple[int, ...]
    cases: tuple[tuple[str, int, int], ...]


ONE_HOT = tuple(("one-hot", *shape) for shape in SHAPES)
DRAFTED = tuple(("draft logits", *shape) for shape in SHAPES)
FILTERED = (("top-p", 64, 7), ("top-k, top-p", 64, 7), ("top-p", 1, 3), ("top-k, top-p", 1, 3))
PARAMETERS = (
    Parameter("statistics_steps", (1, 2, 4, 8), (*ONE_HOT, DRAFTED[0], FILTERED[0])),
    Parameter("filter_tile", (128, 256, 512), FILTERED),
    Parameter("filter_warps", (4, 8, 16), FILTERED),
    Parameter("filter_registers", (64, 128, 256), FILTERED),
    Parameter("residual_steps", (2, 4, 8, 16), DRAFTED),
    Parameter("residual_warps", (1, 2, 4), DRAFTED),
    Parameter("tile", (512, 1024, 2048), (*ONE_HOT, DRAFTED[0])),
    Parameter("statistics_warps", (1, 2), (*ONE_HOT, DRAFTED[0])),
    Parameter("decide_warps", (1, 2, 4), ONE_HOT),
)
TINY = (
    Parameter("tile", (64, 128), (("one-hot", 2, 1),)),
    Parameter("residual_steps", (2, 4), (("draft logits", 2, 1),)),
)


def parameters() -> tuple[Parameter, ...]:
    return TINY if REHEARSE else PARAMETERS


def variations() -> Iterator[tuple[Shapes, tuple[tuple[str, int, int], ...]]]:
    """Shapes one step away from the defaults, and their cases: what a sweep asks for unless it finds better ones."""
    for parameter in parameters():
        for value in parameter.values:
            yield DEFAULTS._replace(**{parameter.name: value}), parameter.cases


def use(chosen: Shapes) -> None:
    """Have every launch take these shapes."""
    launch.shapes_of = lambda device: chosen


def main(seconds: float) -> None:
    """Sweep for at most this long."""
    deadline = time.monotonic() + seconds - PROFILING_SECONDS
    limit_assembler()
    sweep = Sweep(measure.cache_flusher(timing.device()), deadline)
    with sweep.open():
        best = sweep.run()
    found: dict[str, dict] = {"defaults": {}, "best": {}}
    for form in batches.FORMS:
        call = sweep.caller((form, 64, 7))
        for name, chosen in (("defaults", DEFAULTS), ("best", best)):
            use(chosen)
            found[name][form] = timing.kernel_times(call, sweep.flusher)
        save("kernels", found)
    print(best, found)


class Sweep:
    """A coordinate descent over the shapes."""

    def __init__(self, flusher: torch.Tensor, deadline: float) -> None:
        self.flusher, self.deadline = flusher, deadline
        self.callers: dict = {}
        self.expected: dict = {}
        self.measured: dict[str, dict[str, float]] = {}

    def open(self):
        """Begin the record; to be used as a context."""
        RESULTS.mkdir(parents=True, exist_ok=True)
        self.file = (RESULTS / CSV_NAME).open("w", newline="")
        self.rows = csv.DictWriter(self.file, COLUMNS, restval="", lineterminator="\n")
        self.rows.writeheader()
        return self.file

    def caller(self, of: tuple[str, int, int]):
        """The call of a case; tensors of two cases are kept at most."""
        if of not in self.callers:
            self.callers = dict([*self.callers.items()][-1:])
            self.callers[of] = batches.caller(batches.case(*of))
        return self.callers[of]

    def run(self) -> Shapes:
        """Try all parameters; return the best shapes found in the time."""
        best = DEFAULTS
        self.leave(best)
        for parameter in parameters():
            values = [getattr(best, parameter.name), *parameter.values]
            tried = {value: best._replace(**{parameter.name: value}) for value in values}
            times: dict[int, dict] = {value: {} for value in tried}
            for of in parameter.cases:
                for value, chosen in tried.items():
                    if time.monotonic() < self.deadline and (found := self.time(parameter.name, value, of, chosen)):
                        times[value][of] = found
            chosen_value = better(times, values[0])
            if chosen_value != values[0]:
                best = tried[chosen_value]
            self.measured[parameter.name] = {str(value): mean(found) for value, found in times.items() if found}
            self.leave(best)
        return best

    def time(self, name: str, value: int, of: tuple[str, int, int], chosen: Shapes) -> float | None:
        """Microseconds of a case with some shapes; None if it failed, with a note in the record."""
        row = {"parameter": name, "value": value, "case": batches.case(*of).name} | chosen._asdict()
        call = self.caller(of)
        if of not in self.expected:
            use(DEFAULTS)
            self.expected[of] = call(0).token_ids.cpu()
        use(chosen)
        try:
            differing = (call(0).token_ids.cpu() != self.expected[of]).any(1).double().mean().item()
            if differing > MOST_DIFFERING and not STANDIN:
                raise ValueError(f"{100 * differing:.0f} % of the requests emit other tokens than with the defaults")
            row |= timing.timed(call, self.flusher)
        except Exception as error:  # A shape that does not compile must not end the sweep.
            row["note"] = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        self.rows.writerow(row)
        self.file.flush()
        return row.get("us")

    def leave(self, best: Shapes) -> None:
        """Write the table of the best shapes so far."""
        device = shapes.device_name(timing.device())
        versions = {"torch": torch.__version__, "triton": triton.__version__}
        shapes.write(
            TABLE, device, best, versions=versions, mean_us=self.measured, is_measurement=not (STANDIN or REHEARSE)
        )


def better(times: dict[int, dict], now: int) -> int:
    """The value with the least geometric mean over the cases that all values of now were timed on."""
    base = times[now]
    ratios = {
        value: math.exp(sum(math.log(found[of] / base[of]) for of in base) / len(base))
        for value, found in times.items()
        if base and found.keys() >= base.keys()
    }
    best = min(ratios, key=ratios.get, default=now)
    return best if ratios.get(best, 1.0) < 1 - MARGIN else now


def mean(found: dict) -> float:
    return round(math.exp(sum(map(math.log, found.values())) / len(found)), 2)


def limit_assembler() -> None:
    """End an assembler that takes too long, so that its variant counts as failed."""
    from triton.backends.nvidia import compiler

    original = compiler.subprocess.run

    def run(command, **keywords):
        limit = {"timeout": ASSEMBLER_SECONDS} if "ptxas" in str(command[0]) and not STANDIN else {}
        return original(command, **(limit | keywords))

    compiler.subprocess = type("limited", (), vars(subprocess) | {"run": staticmethod(run)})


if __name__ == "__main__":
    main(float(sys.argv[1]))
