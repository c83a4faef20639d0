"""What the audit of a step costs, as a multiple of its verification: cold caches, in turns; on a CPU one thread.

Usage: ``python -m vllm_specopt.benchmarks.kernels.audit_cost [--rounds N] [--out FILE]``, on the GPU if there is one.
``audited`` is the verification and the audit that takes its notes; ``swept`` the same with an audit that sweeps the
rows anew, as beside vLLM's own sampler. Peaked rows are the benchmark's; on flat ones every token is about as probable
as any other.
"""

import argparse
import statistics
import sys
from functools import partial
from pathlib import Path

import torch

from vllm_specopt.audit import audit, new_counts
from vllm_specopt.benchmarks import record, tables
from vllm_specopt.benchmarks.kernels import measure
from vllm_specopt.benchmarks.kernels.grid import LOGITS, Case
from vllm_specopt.benchmarks.kernels.inputs import Inputs, make_inputs
from vllm_specopt.benchmarks.kernels.peers import Implementation
from vllm_specopt.verify import Notes, verify

SEED, SECONDS = 7, 60.0
SHAPES = {"cpu": ((8, 3),), "cuda": ((1, 3), (8, 3), (64, 7))}
"""Requests and draft tokens."""
SETTINGS: dict[str, dict] = {
    "T = 1": {"temperature": 1.0},
    "T = 0.8, top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
}
SAMPLED: dict[str, dict] = {"T = 0.7, sampled drafts": {"temperature": 0.7, "draft": LOGITS}}
"""On a GPU only."""
ROWS = ("peaked", "flat")
CALLS = ("verified", "audited", "swept")
HEADINGS = ("requests x drafts", "setting", "rows", "tokens per step", *(f"{call}, us" for call in CALLS), *CALLS[1:])


def step(inputs: Inputs, counts: torch.Tensor, kind: str, number: int) -> torch.Tensor:
    """Run a step, with an audit unless it is only ``verified``; how many tokens each request emitted."""
    batch = inputs.round(number)
    audited = {name: each for name, each in batch.kwargs.items() if not name.startswith("draft")}
    notes = Notes() if kind == "audited" else None
    verified = verify(*batch.args(), **batch.kwargs, notes=notes)
    if kind != "verified":
        audit(batch.logits, batch.cu_num_logits, verified.token_ids, counts, notes=notes, **audited)
    return verified.num_sampled


def measured(case: Case, rows: str, device: torch.device, flusher: torch.Tensor, rounds: int) -> dict:
    """Microseconds of a step, medians with quartiles, and ratios to its verification alone, medians over rounds."""
    inputs = make_inputs(case, device, SEED)
    if rows == "flat":
        inputs.batch.logits.normal_(std=0.5, generator=torch.Generator(device).manual_seed(SEED))
    counts = new_counts(1, device)
    calls = [
        Implementation(kind, partial(step, inputs, counts, kind), lambda result: result, lambda: None) for kind in CALLS
    ]
    for each in calls:
        measure.warm_up(each, device)
    samples = measure.time_rounds(calls, device, flusher, rounds, SECONDS)
    emitted = [int(torch.as_tensor(output).sum()) for each in samples.values() for output in each.outputs]
    row: dict = {"emitted": round(statistics.mean(emitted), 1)}
    for kind in CALLS:
        low, middle, high = statistics.quantiles(samples[kind].time_us, n=4)
        row |= {f"{kind}_us": round(middle, 1), f"{kind}_quartiles": [round(low, 1), round(high, 1)]}
    for kind in CALLS[1:]:
        ratios = [a / b for a, b in zip(samples[kind].time_us, samples["verified"].time_us, strict=True)]
        row[f"{kind}_over_verified"] = round(statistics.median(ratios), 3)
    return row


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab-size", type=int, default=Case.vocab)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, help="also write JSON there")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    made = record.conditions(sys.argv[1:], f"python -m {__spec__.name}")
    settings = SETTINGS | (SAMPLED if device.type == "cuda" else {})
    flusher, found = measure.cache_flusher(device), []
    for batch, num_drafts in SHAPES[device.type]:
        for setting, parameters in settings.items():
            for rows in ROWS:
                case = Case(batch, num_drafts, given.vocab_size, **parameters)
                head = {"batch": batch, "num_drafts": num_drafts, "setting": setting, "rows": rows}
                found.append(head | measured(case, rows, device, flusher, given.rounds))
                if given.out:
                    made["case"] = {"vocab": given.vocab_size, "dtype": "bf16"}
                    record.save(given.out, made | {"rows": found}, indent=1)
    print("\n".join(tables.markdown(HEADINGS, map(cells, found), HEADINGS[:3])))


def cells(row: dict) -> list[str]:
    """A row of the table."""
    shape = f"{row['batch']} x {row['num_drafts']}"
    times = [f"{row[f'{kind}_us']:.1f}" for kind in CALLS]
    ratios = [f"{row[f'{kind}_over_verified']:.2f}" for kind in CALLS[1:]]
    return [shape, row["setting"], row["rows"], f"{row['emitted']}", *times, *ratios]


if __name__ == "__main__":
    main()
