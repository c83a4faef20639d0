"""Sampling parameters outside their range: defined, the same on every backend, and never an id out of range."""

import itertools
import math

import pytest
import torch

from vllm_specopt.rules import PAPER
from vllm_specopt.testing import LOGITS, NO_DRAFT, PROBS, assert_matches_reference, random_batch
from vllm_specopt.verify import verify

NUM_DRAFTS = [3, 0, 2, 1, 2, 4, 1, 3]
TEMPERATURES = [math.nan, math.inf, -math.inf, -1.0, 9e-6, 3.4e38, 1e31, 1.0]
TOP_P = [math.nan, math.inf, -math.inf, -1.0, 0.0, 2.0, -math.nan, 0.9]
MIN_P = [math.nan, math.inf, -math.inf, -1.0, 0.0, 2.0, 1.0, 0.05]
TOP_K = [-(2**63), 2**63 - 1, 2**32 + 3, -(2**32) + 3, 2**31, 0, -1, 5]
SEEDS = [-(2**63), 2**63 - 1, 0, -1, 1, 2**32, 2**31, 7]
CHANGES = {
    "temperature": {"temperature": TEMPERATURES},
    "top-p": {"top_p": TOP_P},
    "min-p": {"min_p": MIN_P},
    "top-k": {"top_k": TOP_K},
    "seeds": {"seeds": SEEDS},
    "filters": {"top_k": TOP_K, "top_p": TOP_P[1:] + TOP_P[:1], "min_p": MIN_P[2:] + MIN_P[:2]},
    "all": {
        "temperature": TEMPERATURES,
        "top_k": TOP_K[3:] + TOP_K[:3],
        "top_p": TOP_P[::-1],
        "min_p": MIN_P[1::-1] * 4,
    },
}


def batch_of(change, draft, dtype):
    batch = random_batch(
        seed=5, num_drafts=NUM_DRAFTS, vocab_size=203, dtype=dtype, draft=draft, temperatures=(0.7, 1.0),
        shuffled_state=False,
    )  # fmt: skip
    for name, values in CHANGES[change].items():
        batch.kwargs[name] = torch.tensor(values, dtype=torch.int64 if name in ("top_k", "seeds") else torch.float32)
    return batch


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("draft", [NO_DRAFT, PROBS, LOGITS])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_equals_the_reference(backend, draft, change):
    if backend == "triton":
        pytest.importorskip("triton")
    for dtype, sigmoid in itertools.product((torch.float32, torch.bfloat16), (None, PAPER)):
        batch = batch_of(change, draft, dtype)
        batch.kwargs["rule"] = sigmoid
        assert_matches_reference(batch, backend)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_what_they_count_as(backend):
    """NaN: greedy, or no filter; an endless temperature: every usable token alike; else the range's end."""
    row = torch.randn(1, 60, generator=torch.Generator().manual_seed(3)) * 4
    row[0, 7] = -math.inf

    def drawn(temperature, number=40, **filters):
        given = {name: torch.full((number,), value) for name, value in filters.items()}
        return verify(
            row.repeat(number, 1),
            torch.arange(number + 1),
            torch.empty(0, dtype=torch.int64),
            0,
            temperature=torch.full((number,), temperature),
            seeds=torch.arange(number),
            backend=backend,
            **given,
        ).token_ids.flatten()

    best = int(row.argmax())
    for temperature in (math.nan, -math.inf, -1.0, 0.0):
        assert (drawn(temperature) == best).all()
    for temperature in (math.inf, 3.4e38):
        counts = torch.bincount(drawn(temperature, 400), minlength=60)
        assert len(counts) == 60 and counts[7] == 0 and counts.max() < 25 and (counts > 0).sum() > 50
    plain = drawn(1.0)
    for filters in ({"top_p": math.nan}, {"min_p": math.nan}, {"top_p": math.inf}, {"min_p": -math.inf}):
        assert torch.equal(drawn(1.0, **filters), plain)
    assert torch.equal(drawn(1.0, top_k=2**32 + 3), plain) and torch.equal(drawn(1.0, top_k=3 - 2**32), plain)
    for filters in ({"top_p": -1.0}, {"top_p": -math.inf}, {"min_p": 3.0}, {"min_p": math.inf}):
        assert (drawn(1.0, **filters) == best).all()
