"""What a row costs the CPU backend, against merely reading it: one thread, cold caches, in turns.

Usage: ``python -m vllm_specopt.benchmarks.kernels.row_cost [--out FILE]``. A ``verified`` row is one of a request whose
drafts all survive; an ``emitting`` one is the only row of a request without drafts. Reading adds up 8-byte words.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch

from vllm_specopt.benchmarks.kernels.measure import cache_flusher, load_average
from vllm_specopt.verify import verify

VOCAB, BATCH, NUM_DRAFTS = 151_936, 32, 4
SETTINGS = {
    "T = 1": {"temperature": 1.0},
    "T = 0.8, top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "T = 1, top-k 50": {"temperature": 1.0, "top_k": 50},
    "greedy": {"temperature": 0.0},
}


@numba.njit(nogil=True)
def _read(words):
    total = np.int64(0)
    for word in words:
        total += word
    return total


def rows_of(seed: int) -> torch.Tensor:
    """``[BATCH * (NUM_DRAFTS + 1), VOCAB]`` bf16: peaked as a model's, a wide body and one token far above it."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(BATCH * (NUM_DRAFTS + 1), VOCAB, generator=generator) * 2
    best = torch.randint(VOCAB, (len(logits), 1), generator=generator)
    return logits.scatter_(1, best, 16.0).to(torch.bfloat16)


def calls_of(logits: torch.Tensor, setting: dict) -> dict:
    """What is timed: name to (call, rows that it reads)."""
    rows = len(logits)
    per_row: dict[str, Any] = {name: torch.full((rows,), value) for name, value in setting.items()}
    width = NUM_DRAFTS + 1
    # The rows of a request share its seed.
    per_row["seeds"] = torch.arange(rows) // width
    positions = torch.arange(rows)
    ends, cu = torch.arange(rows + 1, dtype=torch.int32), torch.arange(BATCH + 1, dtype=torch.int32) * width
    none = torch.zeros(0, dtype=torch.int64)
    emitted = verify(logits, ends, none, 0, positions=positions, **per_row).token_ids[:, 0].long()
    drafts = emitted.view(BATCH, width)[:, :-1].reshape(-1).contiguous()
    per_request = {name: values[::width].contiguous() for name, values in per_row.items()}
    all_accepted = lambda: verify(logits, cu, drafts, NUM_DRAFTS, positions=positions, **per_request)  # noqa: E731
    assert (all_accepted().num_sampled == width).all()
    words = logits.view(torch.int64).numpy().ravel()
    return {
        "read": (lambda: _read(words), rows),
        "verified": (all_accepted, rows),
        "emitting": (lambda: verify(logits, ends, none, 0, positions=positions, **per_row), rows),
    }


def measure(rounds: int) -> list[dict]:
    """Microseconds per row by setting, and the ratio to reading, as medians over rounds."""
    torch.set_num_threads(1)
    logits, flusher, found = rows_of(1), cache_flusher(torch.device("cpu")), []
    for name, setting in SETTINGS.items():
        calls = calls_of(logits, setting)
        taken: dict[str, list[float]] = {kind: [] for kind in calls}
        for number in range(rounds + 2):
            for kind, (call, rows) in list(calls.items())[:: 1 if number % 2 else -1]:
                flusher.fill_(number % 100)
                began = time.perf_counter()
                call()
                if number >= 2:
                    taken[kind].append((time.perf_counter() - began) * 1e6 / rows)
        row = {"setting": name} | {f"{kind}_us": round(statistics.median(values), 1) for kind, values in taken.items()}
        for kind in ("verified", "emitting"):
            ratios = [ours / read for ours, read in zip(taken[kind], taken["read"], strict=True)]
            row[f"{kind}_over_read"] = round(statistics.median(ratios), 2)
        found.append(row)
    return found


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="also write JSON there")
    given = parser.parse_args()
    load = load_average()
    rows = measure(given.rounds)
    if given.out:
        record = {"vocab": VOCAB, "requests": BATCH, "drafts": NUM_DRAFTS, "load_average": load, "rows": rows}
        given.out.write_text(json.dumps(record, indent=1) + "\n")
    print("| one thread | reading a row, us | verified row | emitting row | verified / read | emitting / read |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for row in rows:
        print(f"| {' | '.join(str(value) for value in row.values())} |")


if __name__ == "__main__":
    main()
