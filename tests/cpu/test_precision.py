"""How far rounding moves the distributions that the CPU backend draws from: total variation at most 1e-6.

A token's probability is the length of the u that lead to it: its weight in the running sum of its tile, which ends
where the tile's own sum, rounded to single precision, says. So the distribution that is implied follows from the sums
and weights the backend computes with, exactly; no sample is needed.
"""

import numpy as np
import pytest
import torch
from numba import njit
from scipy.stats import chisquare

from vllm_specopt.cpu.memory import BF16, FP16, FP32, INF, floats
from vllm_specopt.cpu.plan import PROBS, scratch_at
from vllm_specopt.cpu.rows import TILE, Row, weigh_tile
from vllm_specopt.cpu.rules.exact import Rest, weigh_residual
from vllm_specopt.cpu.sweeps import sweep
from vllm_specopt.cpu.target import Target
from vllm_specopt.kernels.reference.noise import DRAW, draw_uniform_ref
from vllm_specopt.kernels.reference.rows import target_row_ref
from vllm_specopt.testing import is_drawn
from vllm_specopt.verify import verify

KINDS = {torch.bfloat16: BF16, torch.float16: FP16, torch.float32: FP32}
VOCAB = 151_936
NUM_TILES = -(-VOCAB // TILE)
LARGEST_TOTAL_VARIATION = 1e-6


@njit
def leave(address, kind, vocab, scale, draft, sums, weights, rest):
    """What the backend computes of a row: sums of tiles, weights, and the residual against draft probabilities."""
    _, size = scratch_at(np.int64(0), vocab)
    memory = np.empty(size, np.uint8)
    scratch, _ = scratch_at(np.int64(memory.ctypes.data), vocab)
    row = Row(address, kind, vocab, np.float32(0.0), np.int64(0))
    row, frame, mass = sweep(row, scale, scratch.left, scratch.tile)
    target = Target(row, frame, mass, -INF, row, -INF, np.int64(-1))
    draft_row = Row(draft, np.int64(FP32), vocab, np.float32(0.0), np.int64(0))
    other = Rest(np.int64(PROBS), draft_row, frame, np.float32(1.0), 1.0)
    for tile in range(len(sums)):
        sums[tile] = floats(scratch.left.sums, len(sums))[tile]
        weigh_tile(row, frame, tile * TILE, -INF, scratch.tile, scratch.weights)
        weights[tile] = floats(scratch.weights, TILE)
        weigh_residual(target, other, tile * TILE, scratch)
        rest[tile] = floats(scratch.weights, TILE)
    return mass + memory[0]


def implied(sums: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The probability of each token, ``[num_tiles, TILE]`` float64."""
    sums, running = sums.double().unsqueeze(1), weights.double().cumsum(1)
    last = (weights > 0) & (running == running[:, -1:])
    ends = torch.where(last, sums, running.minimum(sums))
    return ends.diff(dim=1, prepend=torch.zeros_like(sums)).clamp(min=0) / sums.sum()


def row_of(shape: str, gen: torch.Generator) -> torch.Tensor:
    if shape == "equal":
        return torch.full((VOCAB,), 3.7)
    if shape == "flat":
        return torch.randn(VOCAB, generator=gen) * 0.05
    if shape == "normal":
        return torch.randn(VOCAB, generator=gen) * 2.5 - 4
    if shape == "peaked":
        return torch.randn(VOCAB, generator=gen) * 2 + 12.0 * (torch.arange(VOCAB) == 70_000)
    if shape == "rising":
        return torch.linspace(-90, 20, VOCAB)
    return torch.empty(VOCAB).exponential_(generator=gen) * 1.5


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("shape", ["equal", "flat", "normal", "peaked", "rising", "zipf"])
@pytest.mark.parametrize("dtype", KINDS, ids=["bf16", "fp16", "fp32"])
def test_total_variation_from_rounding(dtype, shape, temperature):
    gen = torch.Generator().manual_seed(5)
    row = row_of(shape, gen).to(dtype)
    draft = (row.float() + torch.randn(VOCAB, generator=gen)).softmax(0)
    sums, weights, rest = torch.empty(NUM_TILES), torch.empty(NUM_TILES, TILE), torch.empty(NUM_TILES, TILE)
    temperature = float(torch.tensor(temperature))
    scale = np.float32(1.4426950408889634 / temperature)
    leave(row.data_ptr(), KINDS[dtype], VOCAB, scale, draft.data_ptr(), sums.numpy(), weights.numpy(), rest.numpy())
    probs = (row.double() / temperature).softmax(0)
    found = implied(sums, weights).view(-1)
    assert float((found[:VOCAB] - probs).abs().sum() / 2) <= LARGEST_TOTAL_VARIATION
    assert not found[VOCAB:].any()
    residual = (probs - draft.double()).clamp(min=0)
    assert float((rest.double().view(-1)[:VOCAB] - residual).abs().sum() / 2) <= LARGEST_TOTAL_VARIATION


@pytest.mark.parametrize("shape", ["equal", "flat", "normal", "rising", "zipf"])
def test_large_rows_draw_by_inversion(shape):
    """Where boundaries lie closer together than the margin, a drawn token's interval must hold u all the same."""
    row = row_of(shape, torch.Generator().manual_seed(7)).bfloat16()
    num_rows = 200
    tokens, _ = verify(
        row.expand(num_rows, VOCAB),
        torch.arange(num_rows + 1),
        torch.zeros(0, dtype=torch.int64),
        0,
        temperature=torch.full((num_rows,), 0.75),
        seeds=torch.full((num_rows,), 9),
        positions=torch.arange(num_rows),
    )
    _, probs, _ = target_row_ref(row, 0.75)
    for position, token in enumerate(tokens[:, 0].tolist()):
        assert is_drawn(probs, draw_uniform_ref(9, position, DRAW), token, LARGEST_TOTAL_VARIATION)


TARGET = torch.tensor([1.0, 0.3, 0.3, -0.5, 2.0, -1.5, 0.9])
DRAFT = torch.tensor([0.05, 0.3, 0.15, 0.1, 0.2, 0.1, 0.1])


@pytest.mark.parametrize("filters", [(0, 1.0), (4, 1.0), (0, 0.8), (5, 0.75)], ids=["none", "top-k", "top-p", "both"])
@pytest.mark.parametrize("draft", ["one-hot", "probs"])
def test_emitted_tokens_follow_the_target(draft, filters):
    """First and second emitted token over 200,000 requests with two drafts each, against the exact distribution."""
    num_reqs, vocab = 200_000, len(TARGET)
    gen = torch.Generator().manual_seed(17)
    second = TARGET.flip(0) * 0.7
    top_k, top_p = filters
    token_ids, num_sampled = verify(
        torch.stack([TARGET, second, TARGET]).repeat(num_reqs, 1),
        torch.arange(0, 3 * num_reqs + 1, 3),
        torch.multinomial(DRAFT, 2 * num_reqs, replacement=True, generator=gen),
        2,
        temperature=torch.full((num_reqs,), 0.8),
        seeds=torch.randint(-(2**63), 2**63 - 1, (num_reqs,), generator=gen),
        top_k=torch.full((num_reqs,), top_k) if top_k else None,
        top_p=torch.full((num_reqs,), top_p) if top_p < 1 else None,
        draft_probs=DRAFT.repeat(2 * num_reqs, 1) if draft == "probs" else None,
    )
    for column, row in enumerate((TARGET, second)):
        emitted = token_ids[num_sampled > column, column]
        probs = target_row_ref(row, float(torch.tensor(0.8)), top_k, top_p, 0.0)[1]
        counts = torch.bincount(emitted, minlength=vocab).double()
        assert not counts[probs == 0].any()
        kept = probs > 0
        assert chisquare(counts[kept].numpy(), (probs[kept] * counts.sum()).numpy()).pvalue > 1e-3
