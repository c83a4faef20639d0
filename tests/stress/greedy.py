"""Greedy speculation equals plain decoding: all prompts, every drafter, 1, 4 and 8 drafts; and what of the logits.

Usage: ``python tests/stress/greedy.py [--dtype float32|bfloat16] [--tokens 64]``. Prints a row per engine: requests,
tokens, and how many requests differ from plain decoding in the same precision. The first rows are plain decoding
against itself with other batch sizes: where those differ, vLLM's logits depend on the batch, whatever the sampler.
Exits with 1 if an engine differs in float32.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from server import DRAFTING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine import steps
from engine.run_engines import start


def main(argv: list[str]) -> int:
    """Run the engines and print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args(argv)
    engines = [engine(f"plain, {size} at once", options, size) for size in (96, 1, 7)]
    for drafting, speculative in DRAFTING.items():
        for drafts in (1, 4, 8):
            config = speculative | {"num_speculative_tokens": drafts}
            engines.append(engine(f"{drafting}, {drafts} drafts", options, 96, config))
    with tempfile.TemporaryDirectory(prefix="specopt-greedy-") as folder:
        results, _ = start(engines, Path(folder), "V1")
    plain, status = results["plain, 96 at once"]["batches"]["greedy"], 0
    print(f"{options.dtype}: {len(plain['token_ids'])} requests of {options.tokens} tokens")
    for name, result in results.items():
        differ, logprobs = (
            sum(ours != theirs for ours, theirs in zip(result["batches"]["greedy"][what], plain[what], strict=True))
            for what in ("token_ids", "logprobs")
        )
        print(f"  {name:28} differ in tokens: {differ:3}   in a bit of a log probability: {logprobs:3}")
        status |= differ > 0 and options.dtype == "float32"
    return int(status)


def engine(name: str, options, size: int, speculative: dict | None = None) -> dict:
    """One engine's request: all prompts, greedy, with log probabilities."""
    sampling = {"temperature": 0.0, "max_tokens": options.tokens, "ignore_eos": True, "logprobs": 0}
    batches = [{"name": "greedy", "prompts": steps.prompts(), "sampling": sampling}]
    llm = {"dtype": options.dtype, "max_num_seqs": size, "num_gpu_blocks_override": None}
    return steps.engine(name, speculative, batches, additional_config=steps.EXACT if speculative else {}, **llm)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
