"""The reference itself: its law by enumeration, its filters by definition, its random numbers by known answers."""

import itertools
import math

import pytest
import torch

from vllm_specopt.kernels import reference
from vllm_specopt.kernels.reference import (
    acceptance_probability_ref,
    acceptance_uniform_ref,
    exact_verify_ref,
    exponential_ref,
    filter_row_ref,
    philox_ref,
    residual_ref,
)


def conditional_laws(vocab_size: int, depth: int, gen: torch.Generator, kind: str) -> dict:
    """A next-token law for every prefix up to ``depth`` tokens."""

    def law():
        logits = torch.randn(vocab_size, generator=gen, dtype=torch.float64) * (6 if kind == "peaked" else 1)
        if kind == "sparse":
            logits[torch.randperm(vocab_size, generator=gen)[: vocab_size // 2]] = -math.inf
        return logits.softmax(0)

    prefixes = (p for n in range(depth + 1) for p in itertools.product(range(vocab_size), repeat=n))
    return {prefix: law() for prefix in prefixes}


def sequence_law(laws: dict, vocab_size: int, length: int) -> dict:
    joint = {}
    for sequence in itertools.product(range(vocab_size), repeat=length):
        joint[sequence] = math.prod(float(laws[sequence[:i]][sequence[i]]) for i in range(length))
    return joint


@pytest.mark.parametrize("kind", ["flat", "peaked", "sparse", "identical", "one-hot"])
@pytest.mark.parametrize(("vocab_size", "num_drafts"), [(2, 4), (3, 3), (4, 2), (5, 1)])
def test_emitted_sequences_have_the_target_law(kind, vocab_size, num_drafts):
    """Sum over all drafts and outcomes; what is emitted, continued by the target, must be the target's joint law."""
    gen = torch.Generator().manual_seed(vocab_size)
    length = num_drafts + 1
    target = conditional_laws(vocab_size, num_drafts, gen, "flat" if kind == "identical" else kind)
    draft = target if kind == "identical" else conditional_laws(vocab_size, num_drafts, gen, kind)
    if kind == "one-hot":
        draft = {prefix: torch.eye(vocab_size, dtype=torch.float64)[law.argmax()] for prefix, law in draft.items()}
    expected = sequence_law(target, vocab_size, length)
    emitted = dict.fromkeys(expected, 0.0)

    def continue_with_target(prefix, probability):
        for tail in itertools.product(range(vocab_size), repeat=length - len(prefix)):
            sequence = prefix + tail
            steps = range(len(prefix), length)
            emitted[sequence] += probability * math.prod(float(target[sequence[:i]][sequence[i]]) for i in steps)

    for drafts in itertools.product(range(vocab_size), repeat=num_drafts):
        reached = math.prod(float(draft[drafts[:i]][drafts[i]]) for i in range(num_drafts))
        for i in range(num_drafts):
            target_law, draft_law = target[drafts[:i]], draft[drafts[:i]]
            accept = acceptance_probability_ref(target_law[drafts[i]], draft_law[drafts[i]])
            residual = residual_ref(target_law, draft_law)
            for token in range(vocab_size):
                recovered = float(residual[token] / residual.sum())
                continue_with_target((*drafts[:i], token), reached * (1 - accept) * recovered)
            reached *= accept
        continue_with_target(drafts, reached)
    total_variation = sum(abs(emitted[s] - expected[s]) for s in expected) / 2
    assert total_variation <= 1e-12


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
