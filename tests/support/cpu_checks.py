"""What the tests of the CPU backend share: comparisons with the reference, and how many were too close to call."""

import torch

from vllm_specopt.testing import Batch, assert_matches_reference
from vllm_specopt.verify import Verified

MAX_CLOSE_SHARE = 0.02


class Tally:
    """Requests compared with the reference, and how many of them were left out; those must be few."""

    def __init__(self):
        self.requests = self.close = 0

    def check(self, batch: Batch) -> Verified:
        """Compare a batch with the reference."""
        verified, close = assert_matches_reference(batch, "cpu")
        self.requests += batch.num_reqs
        self.close += close
        return verified

    def assert_few_were_close(self) -> None:
        """Raise if the comparisons have shown too little."""
        assert self.close <= MAX_CLOSE_SHARE * max(self.requests, 100), (self.close, self.requests)


def sampled_batch(logits: torch.Tensor, num_drafts: int, tokens: torch.Tensor, **kwargs) -> Batch:
    """Requests of ``num_drafts`` drafts each at temperature 1, seeded by their number; ``kwargs`` add or replace."""
    num_reqs = len(logits) // (num_drafts + 1)
    starts = torch.arange(num_reqs + 1) * (num_drafts + 1)
    kwargs = {"temperature": torch.ones(num_reqs), "seeds": torch.arange(num_reqs)} | kwargs
    return Batch(logits, starts, tokens, num_drafts, kwargs)
