"""What each part of a verification step is worth, on a CPU: the paper's baseline against ours, rung by rung.

Usage: ``python benchmarks/ablation.py OUT_FOLDER``. Rungs, on the same tensors in turns (see ``ablation_rungs.py``):
the formula in PyTorch, each idea alone in it, and our backend with the ideas together. Draft tokens come with
probabilities (fp32); logits are bf16. Leaves ablation.csv, and ablation.md and ablation.svg made from it.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import time
from pathlib import Path

import numpy as np
import torch

from vllm_specopt.benchmarks import ablation_report
from vllm_specopt.benchmarks.ablation_rungs import batch_of, rungs
from vllm_specopt.benchmarks.host import cpu_name

VOCABULARIES = {"Llama 2": 32_000, "Whisper": 51_865, "Qwen": 151_936, "Gemma": 256_000}
DRAFT_TOKENS = (1, 2, 3, 5, 8, 12, 16, 20, 32, 64, 128)
BATCHES = (1, 8)
MAX_ELEMENTS = 21_000_000


def measure(model: str, num_drafts: int, num_reqs: int, seconds: float) -> list[dict]:
    """Time all rungs of a case in turns for about that long; one row per rung."""
    vocab_size = VOCABULARIES[model]
    batch = batch_of(vocab_size, num_drafts, num_reqs)
    calls = rungs(batch, num_drafts)
    counted = {name: rung.count(batch) for name, rung in calls.items()}
    times = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    while time.perf_counter() < deadline or len(times["formula"]) < 3:
        batch["seeds"] += num_reqs
        for name, rung in calls.items():
            started = time.perf_counter()
            rung.call()
            times[name].append(1e3 * (time.perf_counter() - started))
    rows = []
    for name, found in times.items():
        p20, p50, p80 = np.quantile(found, (0.2, 0.5, 0.8))
        # The turns lie side by side in time: the median of their ratios does not see the machine's drift.
        ratio = np.median(np.array(found) / np.array(times["formula"]))
        rows.append(
            {
                "model": model, "vocab_size": vocab_size, "draft_tokens": num_drafts, "requests": num_reqs,
                "rung": name, "p20_ms": f"{p20:.4g}", "p50_ms": f"{p50:.4g}", "p80_ms": f"{p80:.4g}",
                "turns": len(found), "of_formula": f"{ratio:.4g}", "megabytes": f"{counted[name].megabytes:.4g}",
                "launches": counted[name].launches, "tokens_per_request": f"{counted[name].tokens:.4g}",
                "threads": torch.get_num_threads(), "cpu": cpu_name(), "torch": torch.__version__,
            }
        )  # fmt: skip
    return rows


def main() -> None:
    """Measure every case that fits in memory, write a row per case and rung as it is done, then the views."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seconds", type=float, default=2.0, help="per case")
    parser.add_argument("--draft-tokens", type=int, nargs="+", default=DRAFT_TOKENS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.out.mkdir(parents=True, exist_ok=True)
    path, load = args.out / "ablation.csv", os.getloadavg()[0]
    with path.open("w", newline="") as file:
        writer = None
        for model, num_drafts, num_reqs in itertools.product(VOCABULARIES, args.draft_tokens, BATCHES):
            if VOCABULARIES[model] * (num_drafts + 1) * num_reqs > MAX_ELEMENTS:
                continue
            for row in measure(model, num_drafts, num_reqs, args.seconds):
                writer = writer or csv.DictWriter(file, row.keys(), lineterminator="\n")
                if not file.tell():
                    writer.writeheader()
                writer.writerow(row)
            file.flush()
            print(f"{model}, {num_drafts} draft tokens, {num_reqs} requests", flush=True)
    command = f"python benchmarks/ablation.py {args.out} --seconds {args.seconds:g} --threads {args.threads}"
    for view in ablation_report.write(path, f"{command} (load average {load:.2f} before)"):
        print(f"left: {view}")


if __name__ == "__main__":
    main()
