"""The reference itself: filters and draws by hand, random numbers by known answers (its output: test_proof.py)."""

import math

import pytest
import torch

from vllm_specopt.kernels.reference import noise, verify_ref
from vllm_specopt.kernels.reference.noise import (
    ACCEPTANCE,
    AUDIT,
    DRAW,
    RESIDUAL,
    acceptance_uniform_ref,
    draw_uniform_ref,
    philox_ref,
)
from vllm_specopt.kernels.reference.rows import argmax_ref, draw_ref, filter_row_ref, target_row_ref

PURPOSES = (DRAW, ACCEPTANCE, RESIDUAL, AUDIT)


def test_philox_known_answers(monkeypatch):
    """Test vectors of the Random123 library for philox4x32-10; the counter's last word is fixed here."""
    monkeypatch.setattr(noise, "STREAM", 0)
    assert philox_ref(0, 0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    monkeypatch.setattr(noise, "STREAM", 0xFFFFFFFF)
    assert philox_ref(-1, -1, 0xFFFFFFFF) == (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)


def is_uniform(draws: torch.Tensor) -> bool:
    """Kolmogorov-Smirnov, alpha = 0.001."""
    places = (torch.arange(len(draws)) + 0.5) / len(draws)
    return bool((draws.sort().values - places).abs().max() < 1.95 / math.sqrt(len(draws)))


def test_acceptance_uniform_is_open_and_uniform():
    draws = torch.tensor([acceptance_uniform_ref(7, position) for position in range(20000)], dtype=torch.float64)
    assert draws.min() > 0 and draws.max() < 1
    assert torch.equal(draws, draws.float().double())
    assert is_uniform(draws)


def test_draw_uniform_has_52_bits_centred_in_their_cells(monkeypatch):
    for position in range(2000):
        scaled = draw_uniform_ref(7, position, DRAW) * 2**52
        assert scaled % 1 == 0.5
        high, low = philox_ref(7, position, DRAW)[:2]
        assert int(scaled) == (high >> 6) << 26 | low >> 6
    for words, expected in (((0, 0, 0, 0), 2.0**-53), ((2**32 - 1,) * 4, 1 - 2.0**-53)):
        monkeypatch.setattr(noise, "philox_ref", lambda *_, words=words: words)
        assert draw_uniform_ref(0, 0, DRAW) == expected


def test_draw_uniforms_are_uniform_and_independent_across_purposes_positions_and_seeds():
    count = 20_000
    draws = [
        torch.tensor([draw_uniform_ref(seed, start + i, purpose) for i in range(count)], dtype=torch.float64)
        for seed, start, purpose in ((3, 0, DRAW), (3, 0, RESIDUAL), (3, 0, AUDIT), (4, 0, DRAW), (3, count, DRAW))
    ]
    draws.append(torch.tensor([acceptance_uniform_ref(3, i) for i in range(count)], dtype=torch.float64))
    assert all(is_uniform(values) for values in draws)
    # The digits below those that a draw of few bits would have.
    assert all(is_uniform(values * 2**30 % 1) for values in draws[:4])
    pairs = [(left, right) for i, left in enumerate(draws) for right in draws[:i]] + [(draws[0][1:], draws[0][:-1])]
    for left, right in pairs:
        assert abs(torch.corrcoef(torch.stack([left, right]))[0, 1]) < 4 / math.sqrt(count)


def test_every_purpose_seed_and_position_has_words_of_its_own():
    keys = [(seed, position, p) for seed in (-1, 0, 2**32) for position in (0, 1, 2**32, 2**40) for p in PURPOSES]
    assert len({philox_ref(*key) for key in keys}) == len(keys)


@pytest.mark.parametrize(
    ("uniform", "token", "margin"),
    [
        (2.0**-53, 1, 0.25 - 2.0**-53),
        (0.2, 1, 0.05),
        (0.25 - 2.0**-53, 1, 2.0**-53),
        (0.25, 3, 0.0),
        (0.25 + 2.0**-53, 3, 2.0**-53),
        (0.45, 3, 0.05),
        (0.5, 4, 0.0),
        (0.7, 4, 0.2),
        (0.95, 4, 0.45),
        (1 - 2.0**-53, 4, 0.5 - 2.0**-53),
    ],
)
def test_inversion_by_hand(uniform, token, margin):
    """Probabilities 0, 1/4, 0, 1/4, 1/2, 0: boundaries at 1/4 and 1/2, and nothing of what weighs nothing."""
    assert draw_ref(torch.tensor([0, 0.25, 0, 0.25, 0.5, 0], dtype=torch.float64), uniform) == (
        token,
        pytest.approx(margin, abs=1e-16),
    )


def test_weights_need_not_add_up_to_one():
    weights = torch.tensor([3.0, 0.0, 1.0], dtype=torch.float64)
    assert draw_ref(weights, 0.74) == (0, pytest.approx(0.04))
    assert draw_ref(weights, 0.76) == (2, pytest.approx(0.04))


def test_one_candidate_leaves_nothing_to_chance_and_none_gives_no_token():
    assert draw_ref(torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64), 0.999) == (1, math.inf)
    assert draw_ref(torch.zeros(4, dtype=torch.float64), 0.5) == (-1, math.inf)


def test_rows_with_nan_and_infinities():
    nan, inf = math.nan, math.inf
    probs = [
        target_row_ref(torch.tensor(row), 0.7)[1].tolist() for row in ([nan, 0.0, -inf, 0.0], [1.0, inf, inf, nan])
    ]
    assert probs == [[0, 0.5, 0, 0.5], [0, 0.5, 0.5, 0]]
    assert target_row_ref(torch.tensor([nan, -inf]), 1.0)[1].tolist() == [0, 0]
    assert argmax_ref(torch.tensor([nan, 1.0, 3.0, 3.0])) == 2


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
    result = verify_ref(
        logits,
        torch.tensor([0, 4]),
        torch.tensor([2, 4, 5]),
        3,
        temperature=torch.tensor([0.7]),
        seeds=torch.tensor([11]),
    )
    assert result.token_ids.tolist() == [[2, 4, 1, -1]]
    assert result.num_sampled.tolist() == [3]
    assert result.margin == [math.inf]


@pytest.mark.parametrize("filters", [{}, {"top_k": torch.tensor([4])}, {"top_p": torch.tensor([0.8])}], ids=str)
def test_one_hot_drafts_do_not_change_the_tokens(filters):
    """The token of a row is the one drawn from it alone, whatever is drafted; right drafts are all accepted."""
    logits = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(9, 14)
    common = {"temperature": torch.tensor([0.9]), "seeds": torch.tensor([5]), **filters}
    drawn = [
        int(
            verify_ref(
                logits[i : i + 1], torch.tensor([0, 1]), torch.tensor([]), 0, positions=rows[i : i + 1], **common
            ).token_ids[0, 0]
        )
        for i in range(5)
    ]
    for i, token in enumerate(drawn):
        row = target_row_ref(logits[i], float(common["temperature"][0]), **{k: v[0].item() for k, v in filters.items()})
        assert token == draw_ref(row[1], draw_uniform_ref(5, int(rows[i]), DRAW))[0]
    wrong = [(token + 1) % 12 for token in drawn]
    for drafts in (drawn[:4], wrong[:4], [-1] * 4, [*drawn[:2], wrong[2], drawn[3]], [drawn[0], 99, *drawn[2:4]]):
        result = verify_ref(logits, torch.tensor([0, 5]), torch.tensor(drafts), 4, positions=rows, **common)
        count = int(result.num_sampled[0])
        accepted = next((i for i, (a, b) in enumerate(zip(drafts, drawn, strict=False)) if a != b), 4)
        assert count == accepted + 1
        assert result.token_ids[0, :count].tolist() == drawn[:count]


def test_a_sampled_draft_is_tested_and_its_replacement_drawn_by_uniforms_of_their_own():
    """Target (1/2, 1/2, 0), draft (0, 1/2, 1/2): token 1 always survives, token 2 is always replaced by token 0."""
    logits = torch.tensor([[0.0, 0.0, -math.inf]] * 2)
    for seed in range(20):
        for token, emitted in ((1, 1), (2, 0)):
            result = verify_ref(
                logits,
                torch.tensor([0, 2]),
                torch.tensor([token]),
                1,
                temperature=torch.tensor([1.0]),
                seeds=torch.tensor([seed]),
                draft_probs=torch.tensor([[0.0, 0.5, 0.5]]),
            )
            assert int(result.token_ids[0, 0]) == emitted
            assert int(result.num_sampled[0]) == (2 if token == 1 else 1)
