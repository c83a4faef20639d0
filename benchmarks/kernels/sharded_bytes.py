"""What sharded verification sends instead of logits: bytes and modelled time by rank and step. A model: no GPU ran it.

Usage: ``python -m vllm_specopt.benchmarks.kernels.sharded_bytes [--out FILE]``. Bytes are those of the buffers that the
host side allocates and hands to ``gather``, and launches those that it makes, with the kernels themselves left out.

Gathering, each rank receives the other ranks' logits, writes them, copies them into rows (as vLLM's ``all_gather`` of
the last dimension does) and reads the rows. Sharded, it reads its own columns. The model adds up: bytes received at the
link's rate, an assumed latency of every exchange, bytes of memory at the card's rate, and the overhead of every launch.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch

from vllm_specopt.benchmarks import record, tables
from vllm_specopt.benchmarks.kernels.cost_model import CARDS, LAUNCH_US
from vllm_specopt.kernels.variants import Launcher
from vllm_specopt.sharded import shards_of, verify_sharded
from vllm_specopt.testing import LOGITS, NO_DRAFT
from vllm_specopt.verify import verify

VOCAB_SIZE, DTYPE = 151936, torch.bfloat16
SHAPES = ((64, 7), (256, 3), (8, 3))
FILTERED = ", top-p"
FORMS = (NO_DRAFT, NO_DRAFT + FILTERED, LOGITS, LOGITS + FILTERED)
RANKS = (2, 4, 8)
CARD = next(card for card in CARDS if card.name == "H100")
NVLINK_GIGABYTES = 450.0
LATENCY_US = 15.0
"""Of an exchange of a few bytes: assumed, about that of a small all-gather of NCCL within a machine."""
HEADINGS = (
    "requests x drafts", "drafts", "ranks", "received, gathered MB", "received, sharded MB", "ratio", "exchanges",
    "exchange, gathered us", "exchange, sharded us", "step, gathered us", "step, sharded us",
)  # fmt: skip


class Step(NamedTuple):
    """What a rank does in a step: bytes received from others, exchanges, bytes of memory moved, launches."""

    received: int
    exchanges: int
    memory: int
    launches: int

    @property
    def exchange_us(self) -> float:
        """Modelled time of the exchanges alone."""
        return self.exchanges * LATENCY_US + self.received / NVLINK_GIGABYTES / 1e3

    @property
    def step_us(self) -> float:
        """Modelled time of the whole step, nothing overlapping."""
        return self.exchange_us + self.memory / CARD.terabytes / 1e6 + self.launches * LAUNCH_US


def arguments(batch: int, num_drafts: int, draft: str, columns: int) -> tuple[tuple, dict]:
    """Arguments of a step of which only shapes count."""
    num_rows = batch * (num_drafts + 1)
    kwargs = {"temperature": torch.ones(batch), "seeds": torch.zeros(batch, dtype=torch.int64), "backend": "triton"}
    if draft.startswith(LOGITS):
        # The same memory for all: what is drafted from is on every rank already.
        kwargs["draft_logits"] = torch.empty(1, 1, VOCAB_SIZE, dtype=DTYPE).expand(batch, num_drafts, -1)
    if draft.endswith(FILTERED):
        kwargs["top_p"] = torch.full((batch,), 0.9)
    rows = torch.arange(batch + 1, dtype=torch.int32) * (num_drafts + 1)
    logits = torch.empty(num_rows, columns, dtype=DTYPE)
    return (logits, rows, torch.zeros(num_rows, dtype=torch.int64), num_drafts), kwargs


def sharded_step(batch: int, num_drafts: int, draft: str, ranks: int) -> Step:
    """Count a step on shards."""
    padded = -(-VOCAB_SIZE // ranks)
    args, kwargs = arguments(batch, num_drafts, draft, padded)
    sent: list[int] = []

    def gather(buffer: torch.Tensor) -> torch.Tensor:
        sent.append(buffer.numel() * buffer.element_size())
        return buffer.expand(ranks, -1).contiguous()

    with mock.patch.object(Launcher, "__call__") as launch:
        verify_sharded(*args, shard=shards_of(VOCAB_SIZE, ranks, padded)[0], gather=gather, **kwargs)
    read = args[0].numel() * DTYPE.itemsize
    drafts = batch * num_drafts * padded * DTYPE.itemsize if draft.startswith(LOGITS) else 0
    return Step((ranks - 1) * sum(sent), len(sent), read + drafts + 2 * ranks * sum(sent), launch.call_count)


def gathered_step(batch: int, num_drafts: int, draft: str, ranks: int) -> Step:
    """Count a step that gathers all logits first."""
    args, kwargs = arguments(batch, num_drafts, draft, VOCAB_SIZE)
    with mock.patch.object(Launcher, "__call__") as launch:
        verify(*args, **kwargs)
    logits = args[0].numel() * DTYPE.itemsize
    drafts = batch * num_drafts * VOCAB_SIZE * DTYPE.itemsize if draft.startswith(LOGITS) else 0
    # Written as received, read and written by the copy into rows (a launch more), read by the sweep.
    return Step(logits * (ranks - 1) // ranks, 1, 4 * logits + drafts, launch.call_count + 1)


def rows() -> list[dict]:
    """One row per shape, form of the drafts and number of ranks."""
    found = []
    for batch, num_drafts in SHAPES:
        for draft in FORMS:
            for ranks in RANKS:
                gathered = gathered_step(batch, num_drafts, draft, ranks)
                sharded = sharded_step(batch, num_drafts, draft, ranks)
                row = {"batch": batch, "num_drafts": num_drafts, "draft": draft, "ranks": ranks}
                for name, step in (("gathered", gathered), ("sharded", sharded)):
                    row[name] = step._asdict() | {
                        "exchange_us": round(step.exchange_us, 1),
                        "step_us": round(step.step_us, 1),
                    }
                found.append(row)
    return found


def cells(row: dict) -> list[str]:
    """A row of the table."""
    gathered, sharded = row["gathered"], row["sharded"]
    return [
        f"{row['batch']} x {row['num_drafts']}",
        row["draft"],
        str(row["ranks"]),
        f"{gathered['received'] / 1e6:.1f}",
        f"{sharded['received'] / 1e6:.2f}",
        f"{gathered['received'] / sharded['received']:.0f}",
        str(sharded["exchanges"]),
        f"{gathered['exchange_us']:.0f}",
        f"{sharded['exchange_us']:.0f}",
        f"{gathered['step_us']:.0f}",
        f"{sharded['step_us']:.0f}",
    ]


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="also write JSON there")
    given = parser.parse_args()
    made = record.conditions(sys.argv[1:], f"python -m {__spec__.name}")
    found = rows()
    if given.out:
        made |= {
            "model": {
                "card": CARD.name,
                "link_gigabytes": NVLINK_GIGABYTES,
                "latency_us": LATENCY_US,
                "memory_terabytes": CARD.terabytes,
                "launch_us": LAUNCH_US,
            },
            "case": {"vocab": VOCAB_SIZE, "dtype": "bf16"},
            "rows": found,
        }
        given.out.parent.mkdir(parents=True, exist_ok=True)
        record.save(given.out, made, indent=1)
    print("\n".join(tables.markdown(HEADINGS, map(cells, found), ("requests x drafts", "drafts"))))


if __name__ == "__main__":
    main()
