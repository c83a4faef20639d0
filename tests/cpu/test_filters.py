"""Filters of the CPU backend where they differ in how much of a row they read: peaked, flat, tied, crowded rows."""

import math

import pytest
import torch
from support.cpu_checks import Tally, sampled_batch

from vllm_specopt.cpu.plan import POOL
from vllm_specopt.cpu.rows import TILE
from vllm_specopt.kernels.reference.noise import DRAW, draw_uniform_ref
from vllm_specopt.kernels.reference.rows import target_row_ref
from vllm_specopt.testing import NO_DRAFT, PROBS, assert_matches_reference, is_drawn, random_batch
from vllm_specopt.verify import verify

VOCAB = 6 * POOL
NUM_ROWS = 24
NO_TOKENS = torch.zeros(0, dtype=torch.int64)


@pytest.fixture(scope="module")
def tally():
    compared = Tally()
    yield compared
    compared.assert_few_were_close()


@pytest.mark.parametrize("levels", [1, 2, 5, 40])
@pytest.mark.parametrize("filters", [("top_k",), ("top_p",), ("min_p", "top_k", "top_p")], ids="+".join)
@pytest.mark.parametrize("draft", [NO_DRAFT, PROBS])
def test_ties(tally, levels, filters, draft):
    shape = {"seed": levels, "num_drafts": [2] * 40, "vocab_size": 3000}
    batch = random_batch(**shape, dtype=torch.bfloat16, draft=draft, filters=filters)
    gen = torch.Generator().manual_seed(3)
    batch.logits[:] = torch.randint(levels, batch.logits.shape, generator=gen) * 0.5
    tally.check(batch)


def rows_of(shape: str, gen: torch.Generator) -> torch.Tensor:
    """Rows with more candidates than are gathered, at distances of very different size."""
    logits = torch.randn(NUM_ROWS, VOCAB, generator=gen)
    if shape == "flat":
        logits *= 1e-3
    elif shape == "wide":
        logits *= 1e30
    elif shape == "two scales":
        logits[:, ::2] = logits[:, ::2] * 1e-6 - 0.5
    elif shape == "masked":
        logits[:, ::3] = torch.finfo(torch.float32).min
    elif shape == "signed zeros":
        logits = logits.sign() * 0.0
    return logits


@pytest.mark.parametrize("shape", ["normal", "flat", "wide", "two scales", "masked", "signed zeros"])
@pytest.mark.parametrize("filters", [("top_k",), ("top_p",), ("min_p",), ("top_k", "top_p", "min_p")], ids="+".join)
def test_many_candidates(shape, filters):
    """Among thousands of nearly equal masses some always lie within the margin, so the draw is judged by its u."""
    gen = torch.Generator().manual_seed(4)
    logits = rows_of(shape, gen)
    kwargs = {
        "top_k": torch.randint(1, VOCAB, (NUM_ROWS,), generator=gen),
        "top_p": 0.3 + 0.65 * torch.rand(NUM_ROWS, generator=gen),
        "min_p": 0.2 * torch.rand(NUM_ROWS, generator=gen),
    }
    kwargs = {name: kwargs[name] for name in filters}
    verified, _ = assert_matches_reference(sampled_batch(logits, 0, NO_TOKENS, **kwargs), "cpu")
    for row in range(NUM_ROWS):
        each = {name: values[row].item() for name, values in kwargs.items()}
        _, probs, _ = target_row_ref(logits[row], 1.0, **each)
        # One token more or less among those that top-p or min-p keeps moves every boundary.
        slack = 2e-6 + 2 * float(probs[probs > 0].min()) * (filters != ("top_k",))
        assert is_drawn(probs, draw_uniform_ref(row, 0, DRAW), int(verified.token_ids[row, 0]), slack)


@pytest.mark.parametrize("size", [POOL - 1, POOL, POOL + 1])
def test_around_the_number_of_values_that_are_gathered(size):
    logits = torch.full((NUM_ROWS, VOCAB), -30.0)
    places = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(6))[:size]
    logits[:, places] = torch.linspace(0, 3, size)
    kwargs = {"top_k": torch.full((NUM_ROWS,), size), "min_p": torch.full((NUM_ROWS,), 1e-3)}
    batch = sampled_batch(logits, 0, NO_TOKENS, **kwargs)
    tokens = verify(*batch.args(), **batch.kwargs).token_ids[:, 0].tolist()
    kept = torch.full((VOCAB,), -math.inf, dtype=torch.float64)
    kept[places] = logits[0, places].double()
    for row, token in enumerate(tokens):
        assert is_drawn(kept.softmax(0), draw_uniform_ref(row, 0, DRAW), token, 2e-6)


@pytest.mark.parametrize("top_k", [2, 20, 100, 2000, VOCAB - 1])
def test_top_k_however_it_is_bounded(tally, top_k):
    """By tiles, by groups of a tile, or not at all; tiles without a finite logit among them."""
    gen = torch.Generator().manual_seed(top_k)
    logits = (torch.randn(NUM_ROWS, VOCAB, generator=gen) * 9).bfloat16()
    logits[:, TILE : 5 * TILE] = -math.inf
    logits[::2, : 40 * TILE] = -math.inf
    tally.check(sampled_batch(logits, 0, NO_TOKENS, top_k=torch.full((NUM_ROWS,), top_k)))
