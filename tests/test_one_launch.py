"""The variant in one launch: the same tokens, and how many rows it reads."""

import pytest
import torch

from vllm_specopt.kernels.one_launch import verify_in_one_launch
from vllm_specopt.testing import poisoned_empty, random_batch
from vllm_specopt.verify import verify

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("rows_layout", [False, True])
def test_emits_what_two_launches_do_and_reads_no_row_behind_a_rejection(rows_layout, monkeypatch):
    """Interpreted programs run one after another, so no row that is not needed is read; a GPU may read some."""
    batch = random_batch(
        seed=3, num_drafts=[4, 0, 6, 1, 5, 7], vocab_size=3000, rows_layout=rows_layout, spread=6.0
    ).to(DEVICE)
    expected = verify(*batch.args(), **batch.kwargs, backend="triton")
    token_ids, num_sampled = torch.full_like(expected.token_ids, -7), torch.full_like(expected.num_sampled, -7)
    logits, starts = batch.logits.clone(), batch.cu_num_logits.tolist()
    needed = torch.zeros(len(logits), dtype=torch.bool)
    for start, count in zip(starts, expected.num_sampled.tolist(), strict=False):
        needed[start : start + count] = True
    assert 0 < needed.sum() < len(needed)
    monkeypatch.setattr(torch, "empty", poisoned_empty)
    tile_max = verify_in_one_launch(
        logits,
        batch.cu_num_logits,
        batch.draft_token_ids,
        token_ids=token_ids,
        num_sampled=num_sampled,
        **batch.kwargs,
    )
    assert torch.equal(token_ids, expected.token_ids)
    assert torch.equal(num_sampled, expected.num_sampled)
    largest = logits.float().nan_to_num(-1e30).amax(1)
    was_read = tile_max.amax(1) == largest
    if DEVICE == "cpu":
        assert torch.equal(was_read, needed)
    else:
        assert was_read[needed].all()
