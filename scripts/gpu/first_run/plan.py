"""The steps of a first run: what each runs, and for how long at most."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from first_run.places import PAIR, REHEARSE, RESULTS, ROOT, SCRIPTS, STANDIN

TOTAL = 570
"""Seconds from the call to its last line; the host ends a command after 600."""
SECONDS = "{seconds}"
SPARE = 8
"""Seconds kept for the summary and for what comes back."""
# The interpreter takes its time; rehearsals have no limit of 10 minutes.
PATIENCE = 40 if REHEARSE else 60 if STANDIN else 1
TESTS = (
    *("sharded/test_tokens.py", "sharded/test_filters.py", "test_audit.py", "test_triton.py", "test_filters.py"),
    *("test_sigmoid.py", "test_rules.py", "test_shapes.py"),
)
"""The kernels against the float64 reference, with poisoned outputs: rules, drafts, filters, dtypes, shapes, the audit;
and ranks, emulated one after another, against a single one.
"""
FILES = (
    "summary.txt",
    "run.json",
    "kernel_bench.csv",
    "sweep.csv",
    "launch_table.json",
    "engines.json",
    "ncu.txt",
    "logs.tar.gz",
)
"""What comes back, 8 files at most."""


@dataclass(frozen=True)
class Step:
    """A command with a limit of its own, in seconds; the run goes on whatever becomes of it.

    command: SECONDS in it stands for what the step may take when it begins.
    beside: Commands that run meanwhile; they end with the step's limit at the latest, and before the next step.
    """

    name: str
    seconds: int
    command: tuple[str, ...]
    beside: tuple[tuple[str, ...], ...] = ()

    @property
    def limit(self) -> int:
        return self.seconds * PATIENCE


ASKED = {"sweep", "drafters", "seeds", "engines"}
"""Run only where ONLY names them, or in a rehearsal."""
UNPACK = Step("unpack", 15, ("bash", str(SCRIPTS / "unpack.sh")))


def module(name: str, *arguments: str) -> tuple[str, ...]:
    """A module of this package as a command."""
    return (sys.executable, "-m", f"first_run.{name}", *arguments)


def steps() -> list[Step]:
    """The steps in their order, most telling first, and those that have to be asked for."""
    limits = {"info": 10, "tests": 200, "drafters": 150, "grid": 150, "modelled": 8, "flat": 60, "audit": 15,
              "sharded": 60, "races": 20, "engines": 177, "ncu": 12, "seeds": 75, "sweep": 50}  # fmt: skip
    commands = {name: module(name, SECONDS) for name in limits}
    commands |= {"tests": tests(), "grid": grid(), "audit": beside_verification("audit_cost"),
                 "sharded": beside_verification("sharded_times")}  # fmt: skip
    beside = {} if REHEARSE else {"tests": (module("precompile"),), "drafters": (module("warm"),)}
    return [Step(name, seconds, commands[name], beside.get(name, ())) for name, seconds in limits.items()]


def usual() -> set[str]:
    """The names of the steps that run where ONLY names none."""
    return {step.name for step in steps() if REHEARSE or step.name not in ASKED}


def tests() -> tuple[str, ...]:
    """pytest over the kernels' tests, in 10 processes on a GPU."""
    command = [sys.executable, "-m", "pytest", *(f"tests/{name}" for name in TESTS), "-q", "-p", "no:cacheprovider"]
    if REHEARSE:
        return (*command, "-k", "residual_without_mass or given_bonus or emits_what_two or table_is_found")
    if STANDIN:
        # Nothing is computed there, so nothing can be asserted.
        return ("env", "PYTHONOPTIMIZE=1", *command, "--assert=plain")
    return (*command, "--tb=short", "-n", "10", "-k", "not cpu")


def grid() -> tuple[str, ...]:
    """`specopt bench`, which writes after each case and begins none after its minutes."""
    command = [sys.executable, "-m", "vllm_specopt.cli.main", "bench", "--out", str(RESULTS)]
    if REHEARSE:
        return (*command, "--suite", "rehearsal", "--repeats", "5")
    if STANDIN:
        command[1:3] = [str(SCRIPTS / "standin" / "bench.py")]
    return (*command, "--suite", "gpu", "--device", "cuda", "--repeats", "15", "--minutes", "2.3")


def beside_verification(name: str) -> tuple[str, ...]:
    """A benchmark of what is beside the grid: the audit's cost, or one rank's part of a sharded step."""
    module = f"vllm_specopt.benchmarks.kernels.{name}"
    command = (sys.executable, "-m", module, "--out", str(RESULTS / f"{name}.json"))
    tiny = ("--vocab-size", "300", *(("--only", "2x1") if name == "sharded_times" else ()), "--rounds", "5")
    return (*command, *tiny) if REHEARSE else command


def pair() -> tuple[str, ...]:
    """Makes the engines' models on the CPU: the shipped pair, 4 times as wide, 12 layers deeper, with a vocabulary."""
    layers = "1" if STANDIN else "12"
    command = ("-m", "vllm_specopt.benchmarks.serve.wide_pair", str(PAIR), "--vocab-size", "151936", "--width", "4")
    return (
        "env",
        "CUDA_VISIBLE_DEVICES=",
        "OMP_NUM_THREADS=8",
        "nice",
        sys.executable,
        *command,
        "--extra-target-layers",
        layers,
    )


def missing_tests() -> list[str]:
    """Tests that the plan names and the checkout lacks."""
    return [name for name in TESTS if not (ROOT / "tests" / name).is_file()]
