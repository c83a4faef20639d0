"""The reference itself: its filters by definition, its random numbers by known answers (its law: test_proof.py)."""

import math

import pytest
import torch

from vllm_specopt.kernels import reference
from vllm_specopt.kernels.reference import (
    acceptance_uniform_ref,
    exact_verify_ref,
    exponential_ref,
    filter_row_ref,
    philox_ref,
)


def test_philox_known_answers():
    """Test vectors of the Random123 library for philox4x32-10; the counter's last word is fixed here."""
    reference_stream = reference.STREAM
    try:
        reference.STREAM = 0
        assert philox_ref(0, 0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
        reference.STREAM = 0xFFFFFFFF
        assert philox_ref(-1, -1, 0xFFFFFFFF) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)
    finally:
        reference.STREAM = reference_stream


def test_acceptance_uniform_is_open_and_uniform():
    draws = torch.tensor([acceptance_uniform_ref(7, position) for position in range(20000)], dtype=torch.float64)
    assert draws.min() > 0 and draws.max() < 1
    assert torch.equal(draws, draws.float().double())
    deviation = (draws.sort().values - (torch.arange(20000) + 0.5) / 20000).abs().max()
    assert deviation < 1.95 / math.sqrt(20000)  # Kolmogorov-Smirnov, alpha = 0.001


def test_noise_is_exponential_and_independent_across_purposes_positions_and_tokens():
    first, second = exponential_ref(3, 5, 1, 200_000), exponential_ref(3, 5, 2, 200_000)
    shifted = exponential_ref(3, 6, 1, 200_000)
    for noise in (first, second, shifted):
        assert noise.min() > 0
        uniform = (-noise).exp().sort().values
        assert (uniform - (torch.arange(200_000) + 0.5) / 200_000).abs().max() < 1.95 / math.sqrt(200_000)
    pairs = ((first, second), (first, shifted), (first[1:], first[:-1]))
    for left, right in pairs:
        assert abs(torch.corrcoef(torch.stack([left, right]))[0, 1]) < 4 / math.sqrt(200_000)


def test_noise_of_a_token_does_not_depend_on_the_vocabulary():
    assert torch.equal(exponential_ref(1, 2, 1, 50), exponential_ref(1, 2, 1, 5000)[:50])


def kept(scaled, **filters):
    row, _ = filter_row_ref(
        torch.tensor(scaled, dtype=torch.float64).log(),
        **({"top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters),
    )
    return (row > -math.inf).nonzero()[:, 0].tolist()


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 2, 4]),  # tokens 2 and 4 tie for the second place
        ({"top_k": 3}, [1, 2, 4]),
        ({"top_k": 0}, [0, 1, 2, 3, 4]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.0}, [1]),
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 2, 4]),
        ({"top_p": 0.82}, [0, 1, 2, 4]),
        ({"top_p": 1.0}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.51}, [1]),
        ({"min_p": 0.49}, [1, 2, 4]),
        ({"min_p": 1.0}, [1]),
        ({"top_k": 3, "top_p": 0.45}, [1]),  # of the kept 0.8, token 1 alone has one half
        ({"top_k": 3, "top_p": 0.55}, [1, 2, 4]),
        ({"min_p": 0.49, "top_p": 0.49}, [1]),
    ],
    ids=str,
)
def test_filters_by_hand(filters, expected):
    """Probabilities 0.12, 0.4, 0.2, 0.08, 0.2."""
    assert kept([0.12, 0.4, 0.2, 0.08, 0.2], **filters) == expected


def test_worked_example():
    """Saturated point masses leave nothing to chance: accept, accept, reject with one possible recovered token."""
    logits = torch.full((4, 6), -math.inf)
    for row, token in enumerate((2, 4, 1, 3)):
        logits[row, token] = 0.0
    result = exact_verify_ref(
        logits,
        torch.tensor([0, 4]),
        torch.tensor([2, 4, 5]),
        3,
        temperature=torch.tensor([0.7]),
        seeds=torch.tensor([11]),
    )
    assert result.token_ids.tolist() == [[2, 4, 1, -1]]
    assert result.num_sampled.tolist() == [3]
