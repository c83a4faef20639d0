"""The benchmark of one rank's part verifies what whole rows do; its times mean something on a GPU only."""

import pytest
import torch

from vllm_specopt.benchmarks.kernels import sharded_times


@pytest.mark.parametrize("draft", sharded_times.ALL_FORMS)
def test_ranks_exchange_what_whole_rows_decide(draft, monkeypatch):
    monkeypatch.setattr(sharded_times, "RANKS", (2,))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = sharded_times.make_batch(2, 1, draft, 700, device)
    ranks = sharded_times.Ranks(batch, 2)
    whole, part = sharded_times.implementations(batch)[:2]
    expected = whole.call(0)
    most = int(expected.num_sampled.sum())
    for found in part.call(0), ranks.verify(1):
        assert 2 <= sharded_times.emitted(expected, found, draft) <= most
        assert torch.equal(found.token_ids, part.call(0).token_ids)
    with pytest.raises(RuntimeError, match="other tokens"):
        sharded_times.emitted(expected, found._replace(token_ids=found.token_ids.clone().fill_(1)), draft)
    assert len(ranks.exchanged) >= 2 and all(len(each) == 2 for each in ranks.exchanged)
