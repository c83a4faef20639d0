"""The benchmark of one rank's part runs; its times mean something on a GPU only."""

import pytest
import torch

from vllm_specopt.benchmarks.kernels import sharded_times
from vllm_specopt.benchmarks.kernels.sharded_bytes import FORMS, RANKS


@pytest.mark.parametrize("draft", FORMS)
def test_one_ranks_part_beside_whole_rows(draft, monkeypatch):
    monkeypatch.setattr(sharded_times, "RANKS", RANKS[:1])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    whole, part = sharded_times.implementations(*sharded_times.arguments(2, 1, draft, 700, device))
    token_ids, num_sampled = whole.call(0)
    assert ((token_ids >= 0) & (token_ids < 700) | (token_ids == -1)).all() and (num_sampled >= 1).all()
    found = part.call(0)
    # All exchanges are with itself: a token that another rank would find is nowhere.
    assert found.token_ids.shape == token_ids.shape and (found.num_sampled >= 1).all()
