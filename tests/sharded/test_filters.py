"""Filtered requests on shards: the tokens of the whole rows, and where too many pass the filters the first of them."""

from typing import NamedTuple

import pytest
import torch
from support.emulated_ranks import verify_on_ranks

from vllm_specopt.kernels.shapes import DEFAULTS
from vllm_specopt.sharded import shards_of, verify_sharded
from vllm_specopt.testing import LOGITS, NO_DRAFT, PROBS, Batch, random_batch
from vllm_specopt.verify import verify

TILE = DEFAULTS.filter_tile
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL = ("top_k", "top_p", "min_p")
DRAFTS = [NO_DRAFT, PROBS, LOGITS]
RAGGED = [3, 0, 5, 1]


class Seen(NamedTuple):
    """Requests that ended early; draft tokens accepted and replaced."""

    early: int
    accepted: int
    recovered: int


def check(batch: Batch, ranks: int, padded: int) -> Seen:
    """Compare what every rank emits with the whole logits' verification.

    A request that ends early has some of the tokens, from the first on, and its bad rows are not counted.
    """
    batch = batch.to(DEVICE)
    bad_rows, counters = (torch.zeros(size, dtype=torch.int64, device=DEVICE) for size in ((1,), (5, 8)))
    expected = verify(*batch.args(), **batch.kwargs, bad_row_counter=bad_rows, counters=counters, backend="triton")
    found, meeting = verify_on_ranks(batch, ranks, padded, "triton")
    is_sampled = not {"draft_probs", "draft_logits"}.isdisjoint(batch.kwargs)
    assert meeting.exchanges == [5 if is_sampled else 3] * ranks
    token_ids, num_sampled, _, counted = found[0]
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
    places = torch.arange(token_ids.shape[1], device=DEVICE)
    is_emitted = places < num_sampled[:, None]
    assert (num_sampled >= 1).all() and (num_sampled <= expected.num_sampled).all()
    assert torch.equal(token_ids, torch.where(is_emitted, expected.token_ids, -1))
    early = int((num_sampled < expected.num_sampled).sum())
    # Each token is a surviving draft, a replaced one or a bonus, but for requests without drafts.
    num_drafts = batch.cu_num_logits.diff() - 1
    assert counted[0, :3].sum() == num_sampled.sum() - (num_drafts == 0).sum()
    assert torch.equal(counted[0, 3:5], counters[0, 3:5])
    if not early:
        assert torch.equal(counted, counters) and torch.equal(found[0][2], bad_rows)
    return Seen(early, int(counted[0, 0]), int(counted[0, 1]))


LAYOUTS = [
    (2.3, 1, 2.375),
    (2.9, 2, 1.5),
    (6.75, 4, 1.75),
    (3.4, 4, 1),
    (2.9, 4, 1.25),
    (0.7, 2, 0.375),
    (1.6, 8, 0.25),
]
# Of tiles of rows, four of which are a residual's.
WIDER = [(9.3, 2, 5.125), (6, 2, 3), (17, 4, 4.375)]


@pytest.mark.parametrize(
    ("vocab", "ranks", "padded", "draft"),
    [(*layout, NO_DRAFT) for layout in LAYOUTS]
    + [(*layout, draft) for layout in (*LAYOUTS[1:3], *WIDER) for draft in (PROBS, LOGITS)],
)
def test_tokens_of_the_whole_rows(vocab, ranks, padded, draft):
    """Rows of few tokens, where the ranks meet in all ways; all or some requests filter."""
    for seed in range(3):
        batch = random_batch(
            seed=seed,
            num_drafts=RAGGED,
            vocab_size=int(vocab * TILE),
            draft=draft,
            dtype=DTYPES[seed],
            rows_layout=seed == 1,
            filters=ALL if seed else ("top_p",),
            spread=9.0,
            temperatures=(0.0, 0.5, 1.0) if seed else (0.7,),
        )
        assert check(batch, ranks, int(padded * TILE)).early == 0


def flat_batch(seed: int, num_drafts: list[int], vocab_size: int, filters: dict[str, float]) -> Batch:
    """Every request has these filters; its drafts are what it emits without speculation, so that all survive."""
    batch = random_batch(
        seed=seed, num_drafts=num_drafts, vocab_size=vocab_size, spread=0.3, dtype=DTYPES[seed % 3], temperatures=(1.0,)
    )
    num_slots = len(batch.kwargs["temperature"])
    for name, value in filters.items():
        batch.kwargs[name] = torch.full((num_slots,), value, dtype=torch.int32 if name == "top_k" else torch.float32)
    rows = torch.arange(len(batch.logits) + 1, dtype=torch.int32)
    request = torch.repeat_interleave(torch.arange(len(num_drafts)), torch.tensor(num_drafts) + 1)
    states = batch.kwargs.get("state_indices", torch.arange(len(num_drafts)))
    kwargs = batch.kwargs | {"state_indices": states[request]}
    alone = Batch(batch.logits, rows, torch.zeros(0, dtype=torch.int64), 0, kwargs).to(DEVICE)
    tokens = verify(*alone.args(), **alone.kwargs, backend="triton").token_ids.cpu()
    is_last = torch.zeros(len(batch.logits), dtype=torch.bool)
    is_last[batch.cu_num_logits[1:].long() - 1] = True
    batch.draft_token_ids = tokens[~is_last, 0]
    return batch


@pytest.mark.parametrize(
    "filters",
    [{"top_p": 0.97}, {"top_k": 700}, {"min_p": 0.2}, {"top_k": 900, "top_p": 0.9, "min_p": 0.01}],
    ids=lambda filters: "+".join(filters),
)
def test_the_first_flat_row_travels_and_the_request_ends_before_the_second(filters):
    batch = flat_batch(3, [3, 0, 1], 1100, filters)
    # One draft of each request survives; the row after it is the second flat one.
    assert check(batch, 2, 552) == (2, 2, 0)


def test_peaked_rows_around_a_flat_one_are_all_emitted():
    batch = flat_batch(0, [3, 2], 1100, {"top_p": 0.97})
    peaked = [0, 2, 3, 4, 6]
    batch.logits[peaked] *= 600.0
    # The drafts of requests 0 and 1 are those of rows 0 to 2 and 4 to 5.
    for draft, row in ((0, 0), (2, 2), (3, 4)):
        batch.draft_token_ids[draft] = batch.logits[row].argmax()
    assert check(batch, 2, 552)[:2] == (0, 5)


def test_rows_without_usable_or_with_infinite_logits():
    batch = flat_batch(1, [1] * 5, 700, {"top_p": 0.9})
    batch.logits[0] = float("nan")
    batch.logits[2] = -float("inf")
    batch.logits[4, 5:9] = float("inf")
    batch.logits[6, ::2] = float("nan")
    batch.logits[8, 3:] = -float("inf")
    check(batch, 2, 352)


def test_more_candidates_on_one_rank_than_it_sends_but_few_in_all():
    """Three hundred likely tokens, all on one rank: the row travels, and the token is that of a single rank's list."""
    batch = flat_batch(2, [1, 1], 1100, {"top_p": 0.9})
    batch.logits[:, :300] += 20.0
    batch.draft_token_ids[:] = 1050
    assert check(batch, 2, 552)[:2] == (0, 0)


@pytest.mark.parametrize("draft", [PROBS, LOGITS])
def test_flat_rows_of_sampled_drafts(draft):
    """Of those that travel some draft tokens survive and others are replaced, from tiles cut at another place."""
    seen = []
    for seed in range(2):
        batch = random_batch(
            seed=seed, num_drafts=[2] + [1] * 7, vocab_size=2300, draft=draft, spread=0.3, temperatures=(1.0,)
        )
        batch.kwargs["top_p"] = torch.full((len(batch.kwargs["temperature"]),), 0.97)
        seen.append(check(batch, 2, 1160))
    assert sum(each.early for each in seen) > 0 and sum(each.recovered for each in seen) > 0


@pytest.mark.parametrize("draft", [PROBS, LOGITS])
@pytest.mark.parametrize(("spread", "top_p", "usable"), [(0.3, 0.97, 2000), (3.0, 0.5, 40)], ids=["flat", "few"])
def test_residual_without_mass_falls_back_to_what_is_kept(draft, spread, top_p, usable):
    """Draft probabilities that sum to far more than one, or a draft row that is the target's."""
    batch = random_batch(
        seed=5,
        num_drafts=[1] * 8,
        vocab_size=2300,
        draft=draft,
        spread=spread,
        temperatures=(1.0,),
        shuffled_state=False,
    )
    batch.kwargs["top_p"] = torch.full((8,), top_p)
    if draft == PROBS:
        batch.kwargs["draft_probs"] = torch.full_like(batch.kwargs["draft_probs"], 40.0)
    else:
        # The draft token is none of the usable ones, which are alike.
        batch.draft_token_ids[:] = 3
        for rows in (batch.logits, batch.kwargs["draft_logits"]):
            rows[:] = -float("inf")
            rows[..., -usable - 40 : -40] = 1.0
    assert check(batch, 2, 1160).recovered > 3


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"backend": "cpu"}, "top_p is given beside the cpu backend"),
        ({"bonus": True}, "top_p is given beside bonus_token_ids"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_beside(more, said):
    batch = random_batch(seed=0, num_drafts=[1], vocab_size=64, filters=("top_p",))
    if more.get("bonus"):
        batch.kwargs["bonus_token_ids"] = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=said):
        verify_sharded(
            *batch.args(),
            **batch.kwargs,
            shard=shards_of(64, 1, 64)[0],
            gather=lambda tensor: tensor[None],
            backend=more.get("backend", "triton"),
        )


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 4])
def test_random_steps(ranks):
    early = accepted = recovered = 0
    for seed in range(600):
        draw = torch.Generator().manual_seed(seed)
        vocab_size, num_reqs = (int(torch.randint(*span, (), generator=draw)) for span in ((1, 1500), (1, 4)))
        smallest = -(-vocab_size // ranks)
        padded = int(torch.randint(smallest, 2 * smallest + 2, (), generator=draw))
        batch = random_batch(
            seed=seed,
            num_drafts=torch.randint(0, 4, (num_reqs,), generator=draw).tolist(),
            vocab_size=vocab_size,
            draft=DRAFTS[seed // 5 % 3],
            dtype=DTYPES[seed // 3 % 3],
            rows_layout=seed % 2 == 0,
            filters=ALL[: seed % 3 + 1],
            spread=(0.3, 2.5, 9.0)[seed // 7 % 3],
        )
        found = check(batch, ranks, padded)
        early, accepted, recovered = early + found.early, accepted + found.accepted, recovered + found.recovered
    assert early > 0 and accepted > 200 and recovered > 200
