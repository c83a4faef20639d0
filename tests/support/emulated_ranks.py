"""Tensor-parallel ranks as threads of one process, of which one runs at a time: Triton's interpreter has one state."""

import threading
from collections.abc import Callable

import torch

from vllm_specopt.sharded import Shard, shards_of, verify_sharded
from vllm_specopt.testing import Batch, poisoned_empty


class Meeting:
    """What the ranks exchange, and the lock that lets one of them run."""

    def __init__(self, ranks: int):
        self.running = threading.Lock()
        self.exchanges = [0] * ranks
        self._barrier = threading.Barrier(ranks)
        self._brought: list[torch.Tensor | None] = [None] * ranks

    def gather_of(self, rank: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """The ``gather`` of a rank."""

        def gather(tensor: torch.Tensor) -> torch.Tensor:
            assert tensor.is_contiguous() and tensor.dtype is torch.float32 and tensor.dim() == 1
            self.exchanges[rank] += 1
            self._brought[rank] = tensor
            self.running.release()
            try:
                self._barrier.wait()
                together = torch.stack([each.view(torch.int32) for each in self._brought]).view(torch.float32)
                # Nobody brings the next before all have taken this one.
                self._barrier.wait()
            finally:
                self.running.acquire()
            return together

        return gather

    def abort(self) -> None:
        """Let nobody wait for a rank that failed."""
        self._barrier.abort()


def run_ranks(function: Callable, ranks: int) -> tuple[list, Meeting]:
    """Call ``function(rank, gather)`` as every rank; what they return, and the meeting."""
    meeting, found, errors = Meeting(ranks), [None] * ranks, []

    def run(rank: int) -> None:
        with meeting.running:
            try:
                found[rank] = function(rank, meeting.gather_of(rank))
            except BaseException as error:
                errors.append(error)
                meeting.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        if not isinstance(error, threading.BrokenBarrierError):
            raise error
    return found, meeting


def local_logits(logits: torch.Tensor, shard: Shard, padded: int) -> torch.Tensor:
    """A rank's columns of whole logits, with +inf in those that are padding: a reader would emit their tokens."""
    local = torch.full((len(logits), padded), float("inf"), dtype=logits.dtype, device=logits.device)
    local[:, : shard.columns] = logits[:, shard.first : shard.first + shard.columns]
    return local


def verify_on_ranks(batch: Batch, ranks: int, padded: int, backend: str) -> tuple[list, Meeting]:
    """What ``verify_sharded`` returns on each rank, followed by its bad rows and counters, outputs poisoned."""
    shards = shards_of(batch.logits.shape[1], ranks, padded)

    def verify_as(rank: int, gather: Callable) -> tuple:
        bad_rows, counters = torch.zeros(1, dtype=torch.int64), torch.zeros(5, 8, dtype=torch.int64)
        bad_rows, counters = bad_rows.to(batch.logits.device), counters.to(batch.logits.device)
        verified = verify_sharded(
            local_logits(batch.logits, shards[rank], padded),
            *batch.args()[1:],
            **batch.kwargs,
            shard=shards[rank],
            gather=gather,
            bad_row_counter=bad_rows,
            counters=counters,
            backend=backend,
        )
        return *verified, bad_rows, counters

    original, torch.empty = torch.empty, poisoned_empty
    try:
        return run_ranks(verify_as, ranks)
    finally:
        torch.empty = original
