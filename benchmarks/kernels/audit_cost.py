"""What the audit of a step costs the CPU backend, as a multiple of its verification: one thread, cold caches, in turns.

Usage: ``python -m vllm_specopt.benchmarks.kernels.audit_cost [--out FILE]``. ``audited`` is the verification and the
audit that takes its notes; ``swept`` the same with an audit that sweeps the rows anew, as beside vLLM's own sampler.
Peaked rows are the benchmark's; on flat ones every token is about as probable as any other.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

from vllm_specopt.audit import audit, new_counts
from vllm_specopt.benchmarks import record
from vllm_specopt.benchmarks.kernels.grid import Case
from vllm_specopt.benchmarks.kernels.inputs import Inputs, make_inputs
from vllm_specopt.benchmarks.kernels.measure import cache_flusher
from vllm_specopt.verify import Notes, verify

BATCH, NUM_DRAFTS, SEED, WARM_UPS = 8, 3, 7, 2
SETTINGS: dict[str, dict] = {
    "T = 1": {"temperature": 1.0},
    "T = 0.8, top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
}
ROWS = ("peaked", "flat")
CALLS = ("verified", "audited", "swept")


def step(inputs: Inputs, number: int, kind: str, counts: torch.Tensor) -> int:
    """Run a step, with an audit unless it is only ``verified``; return how many tokens it emitted."""
    batch = inputs.round(number)
    notes = Notes() if kind == "audited" else None
    verified = verify(*batch.args(), **batch.kwargs, notes=notes)
    if kind != "verified":
        audit(batch.logits, batch.cu_num_logits, verified.token_ids, counts, notes=notes, **batch.kwargs)
    return int(verified.num_sampled.sum())


def measure(rounds: int) -> list[dict]:
    """Microseconds of a step by setting and rows, and ratios to its verification alone, as medians over rounds."""
    torch.set_num_threads(1)
    flusher, found = cache_flusher(torch.device("cpu")), []
    for setting, parameters in SETTINGS.items():
        for rows in ROWS:
            inputs = make_inputs(Case(BATCH, NUM_DRAFTS, **parameters), torch.device("cpu"), SEED)
            if rows == "flat":
                inputs.batch.logits.normal_(std=0.5, generator=torch.Generator().manual_seed(SEED))
            counts, emitted = new_counts(1, "cpu"), []
            taken: dict[str, list[float]] = {kind: [] for kind in CALLS}
            for number in range(rounds + WARM_UPS):
                for kind in CALLS[:: 1 if number % 2 else -1]:
                    flusher.fill_(number % 100)
                    began = time.perf_counter()
                    tokens = step(inputs, number, kind, counts)
                    if number >= WARM_UPS:
                        taken[kind].append((time.perf_counter() - began) * 1e6)
                        emitted.append(tokens)
            row = {"setting": setting, "rows": rows, "emitted": round(statistics.mean(emitted), 1)}
            row |= {f"{kind}_us": round(statistics.median(times), 1) for kind, times in taken.items()}
            for kind in CALLS[1:]:
                ratios = [one / other for one, other in zip(taken[kind], taken["verified"], strict=True)]
                row[f"{kind}_over_verified"] = round(statistics.median(ratios), 3)
            found.append(row)
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, help="also write JSON there")
    given = parser.parse_args()
    made = record.conditions(sys.argv[1:], f"python -m {__spec__.name}")
    rows = measure(given.rounds)
    if given.out:
        made |= {"case": {"batch": BATCH, "num_drafts": NUM_DRAFTS, "vocab": Case.vocab, "dtype": "bf16"}, "rows": rows}
        record.save(given.out, made, indent=1)
    print("| setting | rows | tokens per step | verified, us | audited, us | swept, us | audited | swept |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        print(f"| {' | '.join(str(value) for value in row.values())} |")


if __name__ == "__main__":
    main()
