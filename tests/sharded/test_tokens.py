"""What ranks decide on their shards is what ``verify`` decides on the whole logits, token for token."""

import itertools
from typing import NamedTuple

import pytest
import torch
from support.emulated_ranks import verify_on_ranks

from vllm_specopt.cpu.rows import TILE as CPU_TILE
from vllm_specopt.kernels.shapes import DEFAULTS
from vllm_specopt.testing import LOGITS, NO_DRAFT, PROBS, Batch, random_batch
from vllm_specopt.verify import verify

TILES = {"triton": DEFAULTS.tile, "cpu": CPU_TILE}
DEVICES = {"triton": "cuda" if torch.cuda.is_available() else "cpu", "cpu": "cpu"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DRAFTS = [NO_DRAFT, PROBS, LOGITS]
RAGGED = [3, 0, 5, 1]


class Layout(NamedTuple):
    """Vocabulary and columns per rank, in tiles, and ranks."""

    vocab: float
    ranks: int
    padded: float


LAYOUTS = {
    "one rank": Layout(2.3, 1, 2.375),
    "a cut tile": Layout(2.9, 2, 1.5),
    "cuts beside whole tiles": Layout(6.75, 4, 1.75),
    "on the borders": Layout(3.4, 4, 1),
    "an empty rank": Layout(2.9, 4, 1.25),
    "an empty rank, on the borders": Layout(2, 4, 1),
    "all in one cut tile": Layout(0.7, 2, 0.375),
    "several boundaries in a tile": Layout(1.6, 8, 0.25),
}


@pytest.fixture(params=["triton", "cpu"])
def backend(request):
    return request.param


def check(batch: Batch, backend: str, ranks: int, padded: int) -> torch.Tensor:
    """Compare what every rank emits and counts with the whole logits' verification; return its counters."""
    batch = batch.to(DEVICES[backend])
    bad_rows, counters = torch.zeros(1, dtype=torch.int64), torch.zeros(5, 8, dtype=torch.int64)
    bad_rows, counters = bad_rows.to(DEVICES[backend]), counters.to(DEVICES[backend])
    expected = verify(*batch.args(), **batch.kwargs, bad_row_counter=bad_rows, counters=counters, backend=backend)
    found, meeting = verify_on_ranks(batch, ranks, padded, backend)
    for token_ids, num_sampled, bad_rows_here, counters_here in found:
        assert torch.equal(token_ids, expected.token_ids)
        assert torch.equal(num_sampled, expected.num_sampled)
        assert torch.equal(bad_rows_here, bad_rows)
        if backend == "cpu":
            # A single rank stops reading at a rejection.
            unread = batch.num_reqs if batch.kwargs.get("bonus_token_ids") is not None else 0
            assert counters_here[0, 4] == unread
            assert counters_here[0, 3:5].sum() == counters[0, 3:5].sum()
            counters_here[0, 3:5] = counters[0, 3:5]
        assert torch.equal(counters_here, counters)
    is_sampled = not {"draft_probs", "draft_logits"}.isdisjoint(batch.kwargs) and "temperature" in batch.kwargs
    sums = 1 if backend == "cpu" and "temperature" in batch.kwargs else 0
    assert meeting.exchanges == [(4 if is_sampled else 2) + sums] * ranks
    return counters[0]


def size(backend: str, tiles: float) -> int:
    return int(tiles * TILES[backend])


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=[name.replace(" ", "-") for name in LAYOUTS])
def test_tokens_of_the_whole_rows(backend, layout, draft):
    number = list(LAYOUTS.values()).index(layout)
    accepted = recovered = 0
    for seed in range(number, number + (1 if backend == "triton" else 6)):
        batch = random_batch(
            seed=seed,
            num_drafts=RAGGED,
            vocab_size=size(backend, layout.vocab),
            draft=draft,
            dtype=DTYPES[seed % 3],
            rows_layout=seed % 2 == 0,
            temperatures=(0.0, 0.5, 1.0, 1.7) if seed % 4 else (0.7, 1.3),
        )
        counters = check(batch, backend, layout.ranks, size(backend, layout.padded))
        accepted, recovered = accepted + counters[0], recovered + counters[1]
    assert backend == "triton" or (accepted > 0 and recovered > 0)


@pytest.mark.parametrize("draft", DRAFTS)
def test_given_bonus_tokens(backend, draft):
    batch = random_batch(
        seed=6, num_drafts=[0, 1, 2, 1, 1, 1, 1, 1], vocab_size=size(backend, 1.5), draft=draft, spread=9.0
    )
    batch.kwargs["bonus_token_ids"] = torch.arange(7, 15)
    counters = check(batch, backend, 2, size(backend, 0.75))
    assert counters[2] > 0


@pytest.mark.parametrize("draft", DRAFTS)
def test_greedy_batch_without_parameters(backend, draft):
    batch = random_batch(seed=8, num_drafts=RAGGED, vocab_size=size(backend, 1.5), draft=draft, spread=9.0)
    batch.kwargs = {name: batch.kwargs[name] for name in ("draft_probs", "draft_logits") if name in batch.kwargs}
    if draft == LOGITS:
        batch.kwargs["draft_logits"] = batch.kwargs["draft_logits"][: batch.num_reqs]
    check(batch, backend, 2, size(backend, 0.75))


@pytest.mark.parametrize("draft", [PROBS, LOGITS])
@pytest.mark.parametrize("narrow", [1.7, 0.7])
def test_draft_vocabulary_narrower_than_the_targets(backend, draft, narrow):
    """The narrower one cuts the vocabulary within the last rank's tiles, or leaves that rank none."""
    for seed in range(1 if backend == "triton" else 6):
        batch = random_batch(
            seed=seed,
            num_drafts=[3, 2, 3],
            vocab_size=size(backend, 1.9),
            draft=draft,
            draft_vocab_size=size(backend, narrow),
            temperatures=(1.0,),
        )
        check(batch, backend, 2, size(backend, 1.1))


def special_rows(vocab_size: int, boundary: int) -> torch.Tensor:
    """NaN, infinities and their mixtures, one row each, also where the ranks meet."""
    nan, inf = float("nan"), float("inf")
    rows = torch.randn(12, vocab_size, generator=torch.Generator().manual_seed(0))
    rows[0] = nan
    rows[1] = -inf
    rows[2, 5:9] = inf
    rows[3, ::2] = nan
    rows[4, 3:] = -inf
    rows[5] = torch.where(torch.arange(vocab_size) % 3 == 0, nan, -inf)
    rows[6, -1] = inf
    rows[7] = 0.0
    rows[8, boundary - 1 : boundary + 1] = inf
    rows[9, :boundary] = -inf
    rows[10, boundary:] = nan
    rows[11, boundary] = inf
    return rows


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("draft", DRAFTS)
def test_rows_that_go_bad(backend, temperature, draft):
    """Each special row once as the verified and once as the bonus row; of the drafts' rows some are special, too."""
    vocab_size, padded = size(backend, 1.4), size(backend, 0.75)
    rows = special_rows(vocab_size, padded)
    for shift in range(1 if draft == NO_DRAFT else 2 if backend == "triton" else 3):
        batch = random_batch(
            seed=9 + shift,
            num_drafts=[1] * 12 + [0] * 12,
            vocab_size=vocab_size,
            draft=draft,
            temperatures=(temperature,),
            shuffled_state=False,
        )
        batch.logits[0:24:2] = rows
        batch.logits[24:] = rows
        if draft == LOGITS and shift:
            batch.kwargs["draft_logits"][:12, 0] = rows.roll(shift, 0)
        batch.draft_token_ids[[0, 1, 2, 6]] = torch.tensor([0, 0, 5, vocab_size - 1]).to(batch.draft_token_ids)
        check(batch, backend, 2, padded)


def test_a_bad_row_that_keeps_its_draft_is_not_counted_for_the_bonus_token(backend):
    """Greedy, without a usable logit: the argmax is token 0, and what is emitted is the bonus token that was given."""
    logits = torch.full((2, 40), float("nan"))
    kwargs = {"bonus_token_ids": torch.tensor([7])}
    batch = Batch(logits, torch.tensor([0, 2]), torch.tensor([0]), 1, kwargs)
    counts = torch.zeros(1, dtype=torch.int64, device=DEVICES[backend])
    on_device = batch.to(DEVICES[backend])
    tokens, _ = verify(*on_device.args(), **on_device.kwargs, bad_row_counter=counts, backend=backend)
    assert tokens.tolist() == [[0, 7]] and int(counts) == 0
    check(batch, backend, 2, 24)


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("spread", [40.0, 3000.0])
def test_logits_far_apart(backend, draft, spread):
    """References that move many times over a row, and logits too large for a reference of their own."""
    for seed in range(1 if backend == "triton" else 8):
        batch = random_batch(
            seed=seed,
            num_drafts=RAGGED,
            vocab_size=size(backend, 3.3),
            draft=draft,
            spread=spread,
            temperatures=(0.02, 1.0, 40.0, 2000.0, 2e-5),
        )
        # Tiles of ascending logits.
        batch.logits += torch.linspace(0, 3 * spread, batch.logits.shape[1])
        check(batch, backend, 4, size(backend, 0.875))


@pytest.mark.parametrize("draft", [PROBS, LOGITS])
def test_residual_without_mass_falls_back_to_the_target(backend, draft):
    """Draft probabilities that sum to far more than one, or a draft row that is the target's."""
    batch = random_batch(seed=4, num_drafts=[1] * 12, vocab_size=size(backend, 1.5), draft=draft, temperatures=(1.0,))
    if draft == PROBS:
        batch.kwargs["draft_probs"] = torch.full_like(batch.kwargs["draft_probs"], 40.0)
    else:
        # A lone usable token, which is not the draft's: what is left of it after itself is nothing.
        batch.draft_token_ids[:] = 3
        batch.logits[:, 4:] = batch.logits[:, :4] = -float("inf")
        batch.logits[:, 700 % batch.logits.shape[1]] = 1.0
        batch.kwargs["draft_logits"][:] = -float("inf")
        batch.kwargs["draft_logits"][:, :, 700 % batch.logits.shape[1]] = 1.0
    counters = check(batch, backend, 2, size(backend, 0.75))
    assert counters[1] > 6


def test_many_drafts_of_one_request(backend):
    batch = random_batch(seed=15, num_drafts=[128], vocab_size=20, temperatures=(0.001,))
    batch.draft_token_ids = batch.logits[:-1].argmax(1)
    batch.draft_token_ids[77] = -1
    counters = check(batch, backend, 2, 12)
    assert counters[0] == 77


def test_tokens_of_int32(backend):
    batch = random_batch(seed=16, num_drafts=RAGGED, vocab_size=size(backend, 1.4), draft=PROBS)
    batch.kwargs["token_dtype"] = torch.int32
    check(batch, backend, 2, size(backend, 0.75))


@pytest.mark.parametrize("draft", [NO_DRAFT, LOGITS])
def test_a_realistic_vocabulary(draft):
    batch = random_batch(
        seed=3, num_drafts=[2, 1], vocab_size=151936, dtype=torch.bfloat16, draft=draft, temperatures=(0.7,)
    )
    for ranks in (2, 4, 8):
        check(batch, "cpu", ranks, 151936 // ranks)


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 4])
def test_ten_thousand_random_steps(ranks):
    accepted = recovered = 0
    for seed, draft in zip(range(10_000), itertools.cycle(DRAFTS), strict=False):
        draw = torch.Generator().manual_seed(seed)
        vocab_size, num_reqs = (int(torch.randint(*span, (), generator=draw)) for span in ((1, 2600), (1, 6)))
        smallest = -(-vocab_size // ranks)
        padded = int(torch.randint(smallest, 2 * smallest + 2, (), generator=draw))
        batch = random_batch(
            seed=seed,
            num_drafts=torch.randint(0, 5, (num_reqs,), generator=draw).tolist(),
            vocab_size=vocab_size,
            draft=draft,
            dtype=DTYPES[seed // 3 % 3],
            rows_layout=seed % 2 == 0,
            spread=(0.5, 2.5, 30.0)[seed // 7 % 3],
        )
        counters = check(batch, "cpu", ranks, padded)
        accepted, recovered = accepted + int(counters[0]), recovered + int(counters[1])
    assert accepted > 5_000 and recovered > 5_000
