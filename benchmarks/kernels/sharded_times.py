"""Time of one rank's part of a sharded step on one GPU, beside the whole rows' verification there.

Usage: ``python -m vllm_specopt.benchmarks.kernels.sharded_times [--vocab-size N] [--only 64x7 ...] [--out FILE]``. What
the ranks exchange is computed beforehand; an exchange is then a copy of it on the same GPU: what a link adds is left
out, and the gather that whole rows need first as well. Shapes, drafts and ranks are those of ``sharded_bytes``, rows
those of the benchmark at T = 1, with top-p at T = 0.7, and once more flat ones, of which most tokens are kept, so that
requests end early. Nothing is timed before ranks have emitted what whole rows do. On a CPU, for the tests, Triton's
interpreter has to be on, and times mean nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vllm_specopt.benchmarks import record, tables
from vllm_specopt.benchmarks.kernels import measure
from vllm_specopt.benchmarks.kernels.grid import Case
from vllm_specopt.benchmarks.kernels.inputs import make_inputs
from vllm_specopt.benchmarks.kernels.peers import Implementation
from vllm_specopt.benchmarks.kernels.sharded_bytes import FILTERED, FORMS, RANKS, SHAPES, VOCAB_SIZE
from vllm_specopt.sharded import shards_of, verify_sharded
from vllm_specopt.testing import Batch
from vllm_specopt.verify import Verified, verify

SEED = 7
FLAT = ", flat rows"
ALL_FORMS = (*FORMS, *(form + FLAT for form in FORMS if form.endswith(FILTERED)))
HEADINGS = ("requests x drafts", "drafts", "whole rows us", *(f"one rank of {ranks} us" for ranks in RANKS), "tokens")


class _MissingExchange(Exception):
    """A rank has come to an exchange that is not known yet."""


def make_batch(batch: int, num_drafts: int, form: str, vocab_size: int, device: torch.device) -> Batch:
    """Arguments of ``verify`` by one of ALL_FORMS."""
    kind = form.removesuffix(FLAT)
    case = Case(batch, num_drafts, vocab_size, draft=kind.removesuffix(FILTERED))
    if kind.endswith(FILTERED):
        case = replace(case, top_p=0.9, temperature=0.7)
    made = make_inputs(case, device, SEED).round(0)
    if kind != form:
        made.logits.normal_(std=0.5, generator=torch.Generator(device).manual_seed(SEED))
    logits, starts, drafts, most_drafts = made.args()
    return Batch(logits, starts, drafts, most_drafts, made.kwargs | {"backend": "triton"})


class Ranks:
    """The ranks of a sharded step on one GPU.

    exchanged: What each exchange of the step leaves on every rank, ``[ranks, length]`` fp32.
    """

    def __init__(self, batch: Batch, ranks: int) -> None:
        self.batch, vocab_size = batch, batch.logits.shape[1]
        self.shards = shards_of(vocab_size, ranks, -(-vocab_size // ranks))
        self.parts = [batch.logits[:, s.first : s.first + s.columns].contiguous() for s in self.shards]
        self.exchanged: list[torch.Tensor] = []
        while brought := [each for rank in range(ranks) if (each := self._next_brought(rank)) is not None]:
            # As integers: not all of them are numbers.
            self.exchanged.append(torch.stack([each.view(torch.int32) for each in brought]).view(torch.float32))

    def verify(self, rank: int) -> Verified:
        """One rank's part of the step.

        Raises:
            _MissingExchange: Its arguments are what the rank brings to an exchange that is not among ``exchanged``.
        """
        known = iter(self.exchanged)

        def gather(buffer: torch.Tensor) -> torch.Tensor:
            together = next(known, None)
            if together is None:
                raise _MissingExchange(buffer)
            return together.clone()

        _logits, *args = self.batch.args()
        return verify_sharded(self.parts[rank], *args, shard=self.shards[rank], gather=gather, **self.batch.kwargs)

    def _next_brought(self, rank: int) -> torch.Tensor | None:
        """What a rank brings to the first exchange that is not known; None behind the last."""
        try:
            self.verify(rank)
        except _MissingExchange as missing:
            return missing.args[0]
        return None


def implementations(batch: Batch) -> list[Implementation]:
    """The whole rows' verification, and of each number of ranks the first one's part."""

    def named(name: str, call) -> Implementation:
        return Implementation(name, lambda _number: call(), lambda result: result, lambda: None)

    def rank_of(ranks: int) -> Implementation:
        together = Ranks(batch, ranks)
        return named(str(ranks), lambda: together.verify(0))

    return [named("whole", lambda: verify(*batch.args(), **batch.kwargs)), *map(rank_of, RANKS)]


def rows(shapes: Sequence[tuple[int, int]], vocab_size: int, device: torch.device, rounds: int) -> Iterator[dict]:
    """One row per shape and form of the drafts: medians and quartiles of the times, us, and tokens emitted.

    Raises:
        RuntimeError: A rank emits something else than whole rows do.
    """
    flusher = measure.cache_flusher(device)
    for batch, num_drafts in shapes:
        for draft in ALL_FORMS:
            timed = implementations(make_batch(batch, num_drafts, draft, vocab_size, device))
            for each in timed:
                measure.warm_up(each, device)
            tokens = {each.name: emitted(timed[0].call(0), each.call(0), draft) for each in timed}
            row: dict = {"batch": batch, "num_drafts": num_drafts, "draft": draft, "tokens": tokens}
            for name, samples in measure.time_rounds(timed, device, flusher, rounds, seconds=2.0).items():
                low, middle, high = statistics.quantiles(samples.time_us, n=4)
                row[name] = {"us": round(middle, 1), "quartiles": [round(low, 1), round(high, 1)]}
            yield row


def emitted(whole: Verified, part: Verified, draft: str) -> int:
    """How many tokens a rank emits, which are those of whole rows, or the first of them where rows are flat."""
    places = torch.arange(part.token_ids.shape[1], device=part.token_ids.device)
    is_cut = places >= part.num_sampled[:, None]
    if not torch.equal(part.token_ids, whole.token_ids.masked_fill(is_cut, -1)):
        raise RuntimeError(f"a rank emits other tokens than whole rows do ({draft})")
    if not draft.endswith(FLAT) and not torch.equal(part.num_sampled, whole.num_sampled):
        raise RuntimeError(f"a rank emits fewer tokens than whole rows do ({draft})")
    return int(part.num_sampled.sum())


def cells(row: dict) -> list[str]:
    """A row of the table."""
    tokens = row["tokens"]
    times = [f"{row[name]['us']:.0f}" for name in ("whole", *map(str, RANKS))]
    return [f"{row['batch']} x {row['num_drafts']}", row["draft"], *times, " / ".join(map(str, tokens.values()))]


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
    made["case"] = {"vocab": given.vocab_size, "dtype": "bf16"}
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
    found = []
    for row in rows(given.only, given.vocab_size, device, given.rounds):
        found.append(row)
        if given.out:
            record.save(given.out, made | {"rows": found}, indent=1)
    print("\n".join(tables.markdown(HEADINGS, map(cells, found), ("requests x drafts", "drafts"))))


if __name__ == "__main__":
    main()
