"""Time of one rank's part of a sharded step on one GPU, beside the whole rows' verification there.

Usage: ``python -m vllm_specopt.benchmarks.kernels.sharded_times [--vocab-size N] [--only 64x7 ...] [--out FILE]``. An
exchange is a copy on the same GPU, as if all ranks had sent the same: what a link adds is left out, and of the gather
that whole rows need first as well. Shapes, drafts and ranks are those of ``sharded_bytes``. On a CPU, for the tests,
Triton's interpreter has to be on, and times mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from vllm_specopt.benchmarks import record, tables
from vllm_specopt.benchmarks.kernels import measure
from vllm_specopt.benchmarks.kernels.peers import Implementation
from vllm_specopt.benchmarks.kernels.sharded_bytes import DTYPE, FILTERED, FORMS, RANKS, SHAPES, VOCAB_SIZE
from vllm_specopt.sharded import shards_of, verify_sharded
from vllm_specopt.testing import LOGITS
from vllm_specopt.verify import verify

SPREAD = 3.0
HEADINGS = ("requests x drafts", "drafts", "whole rows us", *(f"one rank of {ranks} us" for ranks in RANKS))


def arguments(batch: int, num_drafts: int, draft: str, vocab_size: int, device: torch.device) -> tuple[tuple, dict]:
    """Arguments of ``verify`` for random rows; half of one-hot drafts are the row's most likely token."""
    generator = torch.Generator(device).manual_seed(0)
    num_rows = batch * (num_drafts + 1)
    logits = torch.randn(num_rows, vocab_size, generator=generator, device=device, dtype=DTYPE) * SPREAD
    drafts = logits.argmax(1)
    kwargs = {
        "temperature": torch.ones(batch, device=device),
        "seeds": torch.arange(batch, device=device),
        "backend": "triton",
    }
    if draft.startswith(LOGITS):
        rows = logits.view(batch, num_drafts + 1, vocab_size)[:, :-1]
        noise = torch.randn(rows.shape, generator=generator, device=device, dtype=DTYPE)
        kwargs["draft_logits"] = rows + 0.7 * noise
    if draft.endswith(FILTERED):
        kwargs["top_p"] = torch.full((batch,), 0.9, device=device)
    starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * (num_drafts + 1)
    drafts = torch.where(torch.arange(num_rows, device=device) % 4 < 2, drafts, 0).roll(1)
    return (logits, starts, drafts, num_drafts), kwargs


def implementations(args: tuple, kwargs: dict) -> list[Implementation]:
    """The whole rows' verification, and of each number of ranks the first one's part."""
    vocab_size = args[0].shape[1]

    def rank_of(ranks: int) -> Implementation:
        shard = shards_of(vocab_size, ranks, -(-vocab_size // ranks))[0]
        part = args[0][:, : shard.columns].contiguous()

        def gather(buffer: torch.Tensor) -> torch.Tensor:
            return buffer.expand(ranks, -1).contiguous()

        def call(_number: int):
            return verify_sharded(part, *args[1:], shard=shard, gather=gather, **kwargs)

        return Implementation(str(ranks), call, lambda result: result, lambda: None)

    whole = Implementation("whole", lambda _number: verify(*args, **kwargs), lambda result: result, lambda: None)
    return [whole, *map(rank_of, RANKS)]


def rows(shapes: Sequence[tuple[int, int]], vocab_size: int, device: torch.device, rounds: int) -> list[dict]:
    """One row per shape and form of the drafts: medians and quartiles of the times, us."""
    flusher = measure.cache_flusher(device)
    found = []
    for batch, num_drafts in shapes:
        for draft in FORMS:
            timed = implementations(*arguments(batch, num_drafts, draft, vocab_size, device))
            for each in timed:
                measure.warm_up(each, device)
            row: dict = {"batch": batch, "num_drafts": num_drafts, "draft": draft}
            for name, samples in measure.time_rounds(timed, device, flusher, rounds, seconds=2.0).items():
                low, middle, high = statistics.quantiles(samples.time_us, n=4)
                row[name] = {"us": round(middle, 1), "quartiles": [round(low, 1), round(high, 1)]}
            found.append(row)
    return found


def cells(row: dict) -> list[str]:
    """A row of the table."""
    times = [f"{row[name]['us']:.0f}" for name in ("whole", *map(str, RANKS))]
    return [f"{row['batch']} x {row['num_drafts']}", row["draft"], *times]


def shape(text: str) -> tuple[int, int]:
    """Requests and drafts of "64x7"."""
    batch, _, num_drafts = text.partition("x")
    return int(batch), int(num_drafts)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    parser.add_argument("--only", nargs="+", type=shape, default=SHAPES, metavar="BxK", help="requests x drafts")
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path, help="also write JSON there")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    made = record.conditions(sys.argv[1:], f"python -m {__spec__.name}")
    found = rows(given.only, given.vocab_size, device, given.rounds)
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        made |= {"case": {"vocab": given.vocab_size, "dtype": "bf16", "spread": SPREAD}, "rows": found}
        record.save(given.out, made, indent=1)
    print("\n".join(tables.markdown(HEADINGS, map(cells, found), ("requests x drafts", "drafts"))))


if __name__ == "__main__":
    main()
