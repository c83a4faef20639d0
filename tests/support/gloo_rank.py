"""One of several processes that verify random batches together, exchanging over gloo; a JSON line for each batch.

Usage: gloo_rank.py RANK RANKS STORE, where STORE is a file that does not exist.
"""

import json
import sys

import torch
import torch.distributed as dist
from support.emulated_ranks import local_logits

from vllm_specopt.sharded import shards_of, verify_sharded
from vllm_specopt.testing import LOGITS, NO_DRAFT, PROBS, Batch, random_batch

STEPS = 30


def batch_of(step: int) -> tuple[Batch, int]:
    """A step's batch, and the columns of each of two ranks, with padding."""
    draft = (NO_DRAFT, PROBS, LOGITS)[step % 3]
    vocab_size = 900 + 37 * step
    batch = random_batch(seed=step, num_drafts=[3, 0, 2, 4], vocab_size=vocab_size, draft=draft, dtype=torch.bfloat16)
    return batch, vocab_size // 2 + 24


def main() -> None:
    rank, ranks, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)

    def gather(tensor: torch.Tensor) -> torch.Tensor:
        together = tensor.new_empty(ranks * len(tensor))
        dist.all_gather_into_tensor(together, tensor)
        return together.unflatten(0, (ranks, -1))

    for step in range(STEPS):
        batch, padded = batch_of(step)
        shard = shards_of(batch.logits.shape[1], ranks, padded)[rank]
        local = local_logits(batch.logits, shard, padded)
        verified = verify_sharded(local, *batch.args()[1:], **batch.kwargs, shard=shard, gather=gather)
        print(json.dumps([verified.token_ids.tolist(), verified.num_sampled.tolist()]), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
