"""Measure verification case by case: check, then time, then record. `specopt bench` is its command line.

Each case's implementations see the same tensors and take turns. Nothing is timed before it has passed the gate: ours
must equal the float64 reference on some requests of these tensors, our adapters must equal ours, and stock must equal
ours at temperature 0; afterwards everyone's share of accepted draft tokens must be what the tensors imply.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from vllm_specopt.benchmarks.kernels import gate, measure, peers, record
from vllm_specopt.benchmarks.kernels.grid import Case
from vllm_specopt.benchmarks.kernels.inputs import Inputs, make_inputs
from vllm_specopt.benchmarks.kernels.measure import Samples
from vllm_specopt.benchmarks.kernels.peers import Implementation


@dataclass
class Options:
    """What one run does.

    repeats: Timed calls per case and implementation; fewer once a case has taken ``seconds``.
    minutes: No case is begun after this long; None means no limit.
    """

    cases: list[Case]
    device: torch.device
    out: Path
    provenance: record.Provenance
    repeats: int
    seconds: float
    minutes: float | None = None


@dataclass
class Measured:
    """One case's rows, and what was wrong, if anything was."""

    case: Case
    rows: list[dict]
    errors: list[str]


def run(options: Options) -> Iterator[Measured]:
    """Measure and record case after case, yielding each once it is recorded.

    Raises:
        RecordError: The record cannot be written.
    """
    peers.prepare(options.device)
    began = time.monotonic()
    flusher = measure.cache_flusher(options.device)
    copy_gbps = measure.copy_bandwidth(options.device)
    for case in options.cases:
        if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
            return
        measured = measure_case(case, options, flusher, copy_gbps)
        if measured.rows:
            record.write(options.out, measured.rows)
        yield measured
        gc.collect()
        if options.device.type == "cuda":
            torch.cuda.empty_cache()


def measure_case(case: Case, options: Options, flusher: torch.Tensor, copy_gbps: float) -> Measured:
    """Check and time every implementation of one case.

    One that fails is left without numbers, and with a note; when ours does, nothing of the case is kept.
    """
    inputs = make_inputs(case, options.device, options.provenance.seed)
    errors: list[str] = []
    notes: dict[str, str] = {}
    passed: list[Implementation] = []
    for built in peers.implementations(inputs):
        if isinstance(built, tuple):
            notes[built[0]] = f"not measured: {built[1]}"
            errors.append(f"{built[0]}: {built[1]}")
            continue
        problem = _problem(built.name, partial(_admit, inputs, built, passed[0] if passed else None))
        if problem is None:
            passed.append(built)
            continue
        errors.append(problem)
        if built.name == "ours":
            return Measured(case, [], errors)
        notes[built.name] = f"failed: {problem}"

    samples = measure.time_rounds(passed, options.device, flusher, options.repeats, options.seconds)
    launches = measure.count_launches(passed, options.device)
    base = record.case_columns(case) | asdict(options.provenance) | {
        "acceptance_implied": round(inputs.acceptance, 4),
        "bytes": record.counted_bytes(case),
        "copy_gbps": round(copy_gbps, 1),
        "load_average": measure.load_average(),
        "utc": record.now(),
    }  # fmt: skip
    rows = []
    for implementation in passed:
        taken = samples[implementation.name]
        counts = [gate.count_accepted(implementation.read(output), case.num_drafts) for output in taken.outputs]
        accepted, verified = ([count[place] for count in counts] for place in (0, 1))
        check = partial(gate.check_acceptance, inputs, implementation, accepted)
        # Other methods than the exact one accept otherwise than the tensors imply.
        problem = None if implementation.rule else _problem(implementation.name, check)
        if problem is not None:
            errors.append(problem)
            if implementation.name == "ours":
                return Measured(case, [], errors)
            notes[implementation.name] = f"failed: {problem}"
            continue
        row = base | _times(taken) | {
            "implementation": implementation.name,
            "acceptance": round(sum(accepted) / sum(verified), 4),
            "rows_verified": round(sum(verified) / case.batch / len(verified), 3),
            "launches": launches.get(implementation.name),
            "extra_bytes": measure.extra_memory(implementation, options.device),
        }  # fmt: skip
        row["gbps"] = round(row["bytes"] / row["time_us"] / 1e3, 2)
        row["percent_of_copy"] = round(100 * row["gbps"] / copy_gbps, 1)
        for runner in ("v1", "v2"):
            stock = next((s for name, s in samples.items() if name in STOCK[runner] and name not in notes), None)
            row[f"speedup_over_stock_{runner}"] = _ratio(stock.time_us if stock else [], taken.time_us)
            if runner == "v1":
                row["cpu_ratio_to_stock_v1"] = _ratio(stock.cpu_us if stock else [], taken.cpu_us)
        rows.append(row)
    rows += [base | {"implementation": name, "note": note} for name, note in notes.items()]
    return Measured(case, rows, errors)


STOCK = {"v1": ("stock-v1", "stock-repaired"), "v2": ("stock-v2",)}


def _admit(inputs: Inputs, implementation: Implementation, ours: Implementation | None) -> None:
    """Warm up an implementation and pass it through the gate."""
    measure.warm_up(implementation, inputs.device)
    if ours is None or implementation.rule:
        gate.check_reference(inputs, implementation)
    else:
        gate.check_same(inputs, implementation, ours)


def _problem(name: str, check: Callable[[], None]) -> str | None:
    try:
        check()
    except gate.GateError as error:
        return str(error)
    except Exception as error:  # A peer that fails must not cost the others their numbers.
        return f"{name}: {type(error).__name__}: {error}".split("\n")[0]
    return None


def _times(samples: Samples) -> dict:
    p20, median, p80 = np.percentile(samples.time_us, (20, 50, 80)).tolist()
    times: dict[str, float | None] = {"time_us": median, "p20_us": p20, "p80_us": p80}
    times |= {
        name: statistics.median(values) if values else None
        for name, values in (("host_us", samples.host_us), ("wall_us", samples.wall_us), ("cpu_us", samples.cpu_us))
    }
    rounded = {name: None if value is None else round(value, 2) for name, value in times.items()}
    return rounded | {"repeats": len(samples.time_us)}


def _ratio(stock: list[float], ours: list[float]) -> float | None:
    if not stock:
        return None
    return round(statistics.median(s / o for s, o in zip(stock, ours, strict=True)), 3)
