"""The benchmark of one rank's part verifies what whole rows do; its times mean something on a GPU only."""

import pytest
import torch

from vllm_specopt.benchmarks.kernels import sharded_times
from vllm_specopt.benchmarks.kernels.sharded_bytes import FORMS


@pytest.mark.parametrize("draft", FORMS)
def test_ranks_exchange_what_whole_rows_decide(draft, monkeypatch):
    monkeypatch.setattr(sharded_times, "RANKS", (2,))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = sharded_times.make_batch(2, 1, draft, 700, device)
    ranks = sharded_times.Ranks(batch, 2)
    whole, part = sharded_times.implementations(batch)[:2]
    expected = whole.call(0)
    for found in part.call(0), ranks.verify(1):
        assert torch.equal(found.token_ids, expected.token_ids)
        assert torch.equal(found.num_sampled, expected.num_sampled)
    assert len(ranks.exchanged) >= 2 and all(len(each) == 2 for each in ranks.exchanged)
