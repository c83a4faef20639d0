"""Filters on rows of which much is kept: ours beside stock V2, medians of 20 calls on a cold cache with spread."""

from __future__ import annotations

import csv
import sys
import time
from dataclasses import replace

import torch

from first_run import batches, timing
from first_run.places import REHEARSE, RESULTS
from vllm_specopt.benchmarks.kernels import measure, peers
from vllm_specopt.benchmarks.kernels.grid import Case
from vllm_specopt.benchmarks.kernels.inputs import make_inputs

# Deviation of normal logits (None: rows as in the grid), and filters at T = 1.
ROWS = (
    (None, {"top_p": 0.9}),
    (0.5, {"top_p": 0.9}),
    (2.0, {"top_p": 0.9}),
    (2.0, {"top_k": 2000, "top_p": 0.95}),
    (0.5, {"top_k": 50}),
)
SHAPES = ((2, 1),) if REHEARSE else ((64, 7), (1, 3))
WHO = ("ours", "stock-v2")


def main(seconds: float) -> None:
    """Measure for at most this long."""
    deadline = time.monotonic() + seconds
    device = timing.device()
    peers.prepare(device)
    flusher = measure.cache_flusher(device)
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / "flat_rows.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("batch", "num_drafts", "deviation", "top_k", "top_p", "who", "us", "p20_us", "p80_us"))
        for batch, num_drafts in SHAPES:
            for deviation, filters in ROWS:
                if time.monotonic() > deadline:
                    return
                case = replace(Case(batch, num_drafts, 3000 if REHEARSE else Case.vocab), **filters)
                inputs = make_inputs(case, device, batches.SEED)
                if deviation:
                    generator = torch.Generator(device).manual_seed(batches.SEED)
                    inputs.batch.logits.normal_(std=deviation, generator=generator)
                for one in peers.implementations(inputs):
                    if not isinstance(one, tuple) and one.name in WHO:
                        told = (batch, num_drafts, deviation or "as in the grid", case.top_k, case.top_p, one.name)
                        rows.writerow((*told, *timing.timed(one.call, flusher).values()))
                        file.flush()


if __name__ == "__main__":
    main(float(sys.argv[1]))
