"""Run every drafter that vLLM has here and write docs/drafters.md: is the text the one without speculation?

Usage: ``python tests/drafters/run.py [--runner V1] [--only NAME ...]``. Each engine runs in a process of its own.
What came out is kept in ``benchmarks/results/drafters/``; the table is written from there, and says "not run" of what
is missing. ``--runner`` alone only writes the table.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from drafters.table import (
    DRAFTERS,
    NUMBER,
    ROOT,
    RUNNABLE,
    acceptance_length,
    compared,
    engines,
    plain_name,
    start,
)

RESULTS, PAGE = ROOT / "benchmarks" / "results" / "drafters", ROOT / "docs" / "drafters.md"
SIZES = {"V1": (8, 32), "V2": (4, 10)}
"""Requests of a batch and their tokens."""
COLUMNS = {"V1": "V1 on a CPU", "V2": "V2 in Triton's interpreter", "GPU": "vLLM 0.33 on an H100"}
ON_GPU = ROOT / "benchmarks" / "results" / "nvidia-h100" / "drafters.json"
ABSENT_ON_GPU = {
    "n-gram GPU": "not run: the one configuration tried had no compilation mode, which this drafter wants",
    "suffix": "not run: the host has no arctic-inference",
    **dict.fromkeys(("Medusa", "MLP speculator", "staged"), "not in vLLM 0.33"),
}
INTRODUCTION = """# Drafters

Written by `make drafters`; do not edit. The verification step gets token ids, and probabilities where drafts are
sampled; it does not know who drafted. This table shows it for every drafter that vLLM can build at this size: real
engines ({versions}), single precision, {number} draft tokens a step, the shipped target, heads of
[models/heads](../models/README.md#heads). Each seeded request must get the text that it gets without speculation:

- *greedy*: `same` if all greedy texts are equal;
- *seeded*: the share of equal tokens, of requests with T = 1 and with T = 0.8 and top-p 0.9;
- then the acceptance length (tokens of a step that verified drafts) at T = 0 and at T = 1, with 95 % intervals that
  take steps as independent.

V1: {v1[0]} requests of {v1[1]} tokens for each of the three; V2: {v2[0]} of {v2[1]}. Drafts are chosen, not sampled:
vLLM's default, which accepts little at T = 1. Source lines are those of vLLM 0.32.0. What ran is in
[benchmarks/results/drafters](../benchmarks/results/drafters).

On the H100: vLLM 0.33.0, bf16 in its batch-invariant mode (TRITON_ATTN), where logits do not depend on the batch,
CUDA graphs, 32 requests of 64 tokens for each of the three, by `ONLY=drafters bash scripts/gpu/first_run.sh`
([rows](../benchmarks/results/nvidia-h100/drafters.json)). In float32 instead, where the last bits of the logits differ,
greedy texts were the same and {float32} of the seeded tokens (draft model, EAGLE-3; V2).
"""
NOTES = """
What makes drafts shorter or more:

- *Number by batch size*: `num_speculative_tokens_per_batch_size`, on both runners, 0 switches speculation off; the
  older `disable_by_batch_size` is not in vLLM 0.32.
- *Threshold*: suffix decoding leaves out drafts below `suffix_decoding_min_token_prob` (0 here, to draft more).
  Adaptive verification cuts drafts by the drafter's confidence, on the device and under CUDA graphs only. There stock's
  sampler stays and the worker says so: log probabilities find their rows through host indices that are stale then.
- *Stages* (a drafter that is itself sped up by a smaller one): vLLM has none.

vLLM 0.33 has neither Medusa nor MLP speculators any more (`config/speculative.py:74` there).

A head that was made for a target of another hidden size, or an EAGLE or EAGLE-3 head of another vocabulary, stops the
start; the message names both sizes. vLLM itself checks only draft models.
"""


@functools.cache
def plain(target: str, runner: str) -> dict:
    """What the batches of an engine without speculation emit. ``target`` as in ``Drafter``."""
    name = next(name for name, drafter in DRAFTERS.items() if drafter.target == target and drafter.speculative)
    with tempfile.TemporaryDirectory() as folder:
        listed = engines([name], Path(folder), *SIZES[runner])[:1]
        return start(listed, Path(folder), runner)[0][plain_name(name)]["batches"]


def run(name: str, runner: str) -> dict:
    """Run one drafter and compare it with no speculation; what went wrong is kept as "error"."""
    expected = plain(DRAFTERS[name].target, runner)
    with tempfile.TemporaryDirectory() as folder:
        try:
            results, _ = start(engines([name], Path(folder), *SIZES[runner])[1:], Path(folder), runner)
        except AssertionError as error:
            lines = [line for line in str(error).splitlines() if "Error" in line]
            return {"error": lines[-1].strip() if lines else "no error named"}
    return compared(results[name], expected) | {
        "requests": SIZES[runner][0],
        "tokens": SIZES[runner][1],
        "num_speculative_tokens": NUMBER,
        "versions": {name: importlib.metadata.version(name) for name in ("vllm", "torch", "vllm-specopt")},
    }


def path_of(name: str, column: str) -> Path:
    """Where a cell's results are."""
    return RESULTS / f"{column}-{name}.json".replace(",", "").replace(" ", "-").lower()


def cell(name: str, column: str) -> str:
    """A cell of the table, from what was run, or why nothing was."""
    drafter = DRAFTERS[name]
    if column == "GPU":
        cells = [f"{each['runner']}: {summary(each)}" for each in on_gpu() if each["drafter"] == name]
        return "; ".join(cells) or ABSENT_ON_GPU.get(name, "not run")
    if column in drafter.absent:
        return drafter.absent[column]
    path = path_of(name, column)
    if not path.exists():
        return "not run"
    found = json.loads(path.read_text())
    return f"does not start: `{found['error']}`" if "error" in found else summary(found)


@functools.cache
def on_gpu() -> list[dict]:
    """What the GPU's engines emitted in vLLM's batch-invariant mode."""
    return [each for each in json.loads(ON_GPU.read_text())["drafters"] if each["kind"] == "invariant"]


def summary(found: dict) -> str:
    """A drafter's cell, from what ``compared`` made of it; the GPU's first records have no counts by position."""
    if "batches" in found:
        lengths = (acceptance_length(found["batches"][kind]) for kind in ("greedy", "T = 1"))
        shown = " / ".join(f"{mean:.2f} ± {half:.2f}" for mean, half in lengths)
    else:
        shown = " / ".join(f"{found['acceptance_length'][kind]:.2f}" for kind in ("greedy", "T = 1"))
    ours = "" if found["sampler"].startswith("vllm_specopt") and not found["stock_calls"] else " (stock's sampler)"
    greedy = "same" if found["greedy"] else "**differs**"
    return f"greedy {greedy}, seeded {found['seeded']:.1%}; {shown}{ours}"


def page() -> str:
    """The document."""
    versions = f"vLLM 0.32.0, torch {importlib.metadata.version('torch')}"
    single = [each["seeded"] for each in json.loads(ON_GPU.read_text())["drafters"] if each["kind"] == "float32"]
    float32 = " and ".join(f"{share:.1%}" for share in single)
    lines = [INTRODUCTION.format(versions=versions, number=NUMBER, v1=SIZES["V1"], v2=SIZES["V2"], float32=float32)]
    lines += ["| drafter | " + " | ".join(COLUMNS.values()) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for name, drafter in DRAFTERS.items():
        title = f"{drafter.title} ({drafter.note})" if drafter.note else drafter.title
        lines.append(f"| {title} | " + " | ".join(cell(name, column) for column in COLUMNS) + " |")
    return "\n".join(lines) + "\n" + NOTES


def main() -> None:
    """Run what is asked for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runner", choices=list(SIZES), nargs="*", default=list(SIZES))
    parser.add_argument("--only", nargs="*", choices=list(DRAFTERS), default=list(DRAFTERS), metavar="NAME")
    args = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for runner in args.runner:
        for name in args.only:
            if name in RUNNABLE[runner]:
                found = run(name, runner)
                path_of(name, runner).write_text(json.dumps(found, indent=1) + "\n")
                print(runner, name, json.dumps(found), flush=True)
                PAGE.write_text(page(), encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
