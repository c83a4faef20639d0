"""The Triton kernels against the float64 reference, token for token; on a GPU if there is one, else interpreted."""

import itertools

import pytest
import torch

from vllm_specopt.kernels.launch import STEPS, TILE
from vllm_specopt.kernels.reference import verify_ref
from vllm_specopt.testing import LOGITS, NO_DRAFT, PROBS, Batch, assert_matches_reference, random_batch
from vllm_specopt.verify import verify

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ALL_FILTERS = ("top_k", "top_p", "min_p")
RAGGED = [3, 0, 5, 1, 9]
# Of the requests below, the largest share that a reference margin may exclude from the comparison.
MAX_EXCLUDED = 0.02


def check(cases):
    excluded = total = 0
    for case in cases:
        batch = random_batch(**case)
        _, close = assert_matches_reference(batch, "triton", DEVICE)
        excluded, total = excluded + close, total + batch.num_reqs
    assert excluded <= max(1, MAX_EXCLUDED * total)


@pytest.mark.parametrize("draft", [NO_DRAFT, PROBS, LOGITS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_reference(draft, dtype):
    check(
        {
            "seed": seed,
            "num_drafts": num_drafts,
            "vocab_size": vocab,
            "dtype": dtype,
            "draft": draft,
            "rows_layout": seed % 2 == 0,
        }
        for seed, vocab, num_drafts in ((0, 1000, [2, 0, 3, 1]), (1, 37, RAGGED), (2, 4100, [2, 0, 1]))
    )


@pytest.mark.parametrize("filters", [("top_k",), ("top_p",), ("min_p",), ALL_FILTERS], ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_filters_match_reference(filters, dtype):
    check(
        {
            "seed": seed,
            "num_drafts": [2, 0, 3, 1],
            "vocab_size": vocab,
            "dtype": dtype,
            "draft": draft,
            "filters": filters,
            "temperatures": (0.5, 1.0, 1.7, 0.0),
        }
        for seed, vocab, draft in ((10, 900, NO_DRAFT), (11, 64, LOGITS))
    )


@pytest.mark.parametrize(
    "vocab_size", [1, 2, 5, TILE - 1, TILE, TILE + 1, *(STEPS * TILE + more for more in (-1, 0, 1))]
)
@pytest.mark.parametrize("draft", [NO_DRAFT, LOGITS])
def test_vocabularies_around_a_tile_and_what_a_program_sweeps(vocab_size, draft):
    check(
        [{"seed": vocab_size, "num_drafts": [1, 0], "vocab_size": vocab_size, "dtype": torch.bfloat16, "draft": draft}]
    )


@pytest.mark.parametrize("draft", [PROBS, LOGITS])
def test_draft_vocabulary_narrower_than_the_targets(draft):
    batch = random_batch(seed=5, num_drafts=[3] * 6, vocab_size=500, draft=draft, draft_vocab_size=460)
    verified, _ = assert_matches_reference(batch, "triton", DEVICE)
    assert verified.token_ids.max() < 460


@pytest.mark.parametrize("draft", [PROBS, LOGITS])
def test_draft_vocabulary_narrower_than_the_targets_without_temperatures(draft):
    batch = random_batch(seed=5, num_drafts=[3, 0, 2], vocab_size=500, draft=draft, draft_vocab_size=20)
    del batch.kwargs["temperature"]
    verified, _ = assert_matches_reference(batch, "triton", DEVICE)
    assert verified.token_ids.max() < 20


@pytest.mark.parametrize("dtypes", [*itertools.permutations(DTYPES, 2)], ids=str)
@pytest.mark.parametrize("draft", [PROBS, LOGITS])
def test_draft_of_another_dtype_than_the_target(draft, dtypes):
    target, drafter = dtypes
    batch = random_batch(seed=12, num_drafts=[3, 1, 4], vocab_size=300, dtype=target, draft=draft)
    name = f"draft_{draft}"
    batch.kwargs[name] = batch.kwargs[name].to(drafter)
    assert_matches_reference(batch, "triton", DEVICE)


@pytest.mark.parametrize("draft", [NO_DRAFT, LOGITS])
def test_rows_anywhere_in_memory(draft):
    """Rows that lie apart, at addresses that are multiples of an element's size only."""
    batch = random_batch(seed=13, num_drafts=[2, 3], vocab_size=1030, dtype=torch.bfloat16, draft=draft)
    table = torch.full((len(batch.logits), 2, 1035), float("inf"), dtype=torch.bfloat16)
    batch.logits = table[:, 1, 3:1033].copy_(batch.logits)
    assert_matches_reference(batch, "triton", DEVICE)


@pytest.mark.parametrize("rejected", [None, 0, 3], ids=str)
@pytest.mark.parametrize("draft", [NO_DRAFT, LOGITS])
def test_offsets_beyond_32_bits(draft, rejected):
    """Strides fit into 32 bits; the last row, and the draft of the last entry, lie 2^31 elements behind the first."""
    far, vocab_size = 2**29 + 64, 40
    # Of this memory only what is written takes up any.
    memory = torch.empty(4 * far + 5 * vocab_size, dtype=torch.bfloat16, device=DEVICE)
    values = torch.randn(5, vocab_size, generator=torch.Generator().manual_seed(16)).bfloat16()
    logits = memory.as_strided((5, vocab_size), (far, 1)).copy_(values)
    tokens = values[:4].argmax(1)
    if rejected is not None:
        tokens[rejected] = values[rejected].argmin()
    # So cold that each row's token is its largest.
    kwargs = {"temperature": torch.full((5,), 0.001), "seeds": torch.arange(5), "state_indices": torch.tensor([4])}
    if draft == LOGITS:
        kwargs["draft_logits"] = memory.as_strided((5, 4, vocab_size), (far, vocab_size, 1), vocab_size)
        kwargs["draft_logits"][4].scatter_(1, tokens[:, None].to(DEVICE), 9.0)
    batch = Batch(logits, torch.tensor([0, 5]), tokens, 4, kwargs)
    verified, _ = assert_matches_reference(batch, "triton", DEVICE)
    assert int(verified.num_sampled) == (5 if rejected is None else rejected + 1)


@pytest.mark.parametrize("wrong", [None, 77, 0], ids=str)
def test_128_drafts_of_one_request(wrong):
    # So cold that each row's token is its largest.
    batch = random_batch(seed=15, num_drafts=[128], vocab_size=20, temperatures=(0.001,))
    batch.draft_token_ids = batch.logits[:-1].argmax(1)
    if wrong is not None:
        batch.draft_token_ids[wrong] = -1
    verified, _ = assert_matches_reference(batch, "triton", DEVICE)
    assert int(verified.num_sampled) == (129 if wrong is None else wrong + 1)


def test_realistic_vocabulary_with_filters():
    check(
        [
            {
                "seed": 3,
                "num_drafts": [2, 1],
                "vocab_size": 151936,
                "dtype": torch.bfloat16,
                "filters": ("top_p",),
                "temperatures": (0.7,),
                "shuffled_state": False,
            }
        ]
    )


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_k": 3, "top_p": 0.6}], ids="-".join)
def test_ties_are_kept_and_reached(filters):
    """Eight tokens share the threshold value; they must be reachable, nothing below may be."""
    n = 24
    logits = torch.full((n, 60), -1.0)
    logits[:, 20:28] = 2.0
    logits[:, 40] = 2.5
    dtypes = {"top_k": torch.int32, "top_p": torch.float32}
    kwargs = {name: torch.full((n,), value, dtype=dtypes[name]) for name, value in filters.items()}
    kwargs |= {"temperature": torch.ones(n), "seeds": torch.arange(n)}
    batch = Batch(logits, torch.arange(n + 1), torch.zeros(0, dtype=torch.int64), 0, kwargs)
    verified, _ = assert_matches_reference(batch, "triton", DEVICE)
    tokens = set(verified.token_ids.flatten().tolist())
    assert tokens <= {*range(20, 28), 40} and len(tokens) > 6


def special_rows(vocab_size: int) -> torch.Tensor:
    """NaN, infinities and their mixtures, one row each."""
    nan, inf = float("nan"), float("inf")
    rows = torch.randn(10, vocab_size, generator=torch.Generator().manual_seed(0))
    rows[0] = nan
    rows[1] = -inf
    rows[2, 5:9] = inf
    rows[3, ::2] = nan
    rows[4, 3:] = -inf
    rows[5] = torch.where(torch.arange(vocab_size) % 3 == 0, nan, -inf)
    rows[6, -1] = inf
    rows[7] = 0.0
    rows[8, 0] = -0.0
    return rows


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("filtered", [False, True])
@pytest.mark.parametrize("draft", [NO_DRAFT, PROBS, LOGITS])
def test_rows_that_go_bad(temperature, filtered, draft):
    """Each special row once as the verified and once as the bonus row; ids stay valid and bad rows are counted."""
    vocab_size = 50
    batch = random_batch(
        seed=9,
        num_drafts=[1] * 10 + [0] * 10,
        vocab_size=vocab_size,
        draft=draft,
        temperatures=(temperature,),
        shuffled_state=False,
    )
    batch.logits[0:20:2] = special_rows(vocab_size)
    batch.logits[20:] = special_rows(vocab_size)
    if filtered:
        batch.kwargs |= {
            "top_k": torch.full((20,), 4, dtype=torch.int32),
            "top_p": torch.full((20,), 0.9),
            "min_p": torch.full((20,), 0.01),
        }
    batch.kwargs["bad_row_counter"] = torch.zeros(1, dtype=torch.int64)
    expected = verify_ref(*batch.args(), **{k: v for k, v in batch.kwargs.items() if k != "bad_row_counter"})
    on_device = batch.to(DEVICE)
    verified = verify(*on_device.args(), **on_device.kwargs, backend="triton")
    assert verified.token_ids.tolist() == expected.token_ids.tolist()
    assert int(on_device.kwargs["bad_row_counter"]) == expected.bad_rows > 0


def test_an_infinite_logit_beats_finite_ones_of_another_tile():
    # Hot enough that the finite logits would weigh most; the infinite one is in the first of three tiles.
    logits = torch.full((8, 2 * TILE + 5), 300.0)
    logits[:, 17] = float("inf")
    tokens, _ = verify(
        logits.to(DEVICE),
        torch.arange(9, device=DEVICE),
        torch.zeros(0, dtype=torch.int64, device=DEVICE),
        0,
        temperature=torch.full((8,), 100.0, device=DEVICE),
        seeds=torch.arange(8, device=DEVICE),
        backend="triton",
    )
    assert tokens.flatten().tolist() == [17] * 8


def test_residual_without_mass_falls_back_to_the_target():
    """Draft probabilities that sum to far more than one leave no residual: the token comes from the target row."""
    batch = random_batch(
        seed=4, num_drafts=[1] * 12, vocab_size=30, draft=PROBS, temperatures=(1.0,), shuffled_state=False
    )
    batch.kwargs["draft_probs"] = torch.full_like(batch.kwargs["draft_probs"], 40.0)
    verified, _ = assert_matches_reference(batch, "triton", DEVICE)
    assert (verified.num_sampled == 1).sum() > 6


def test_given_bonus_tokens_are_used():
    batch = random_batch(seed=6, num_drafts=[0, 2, 2, 2, 2, 2], vocab_size=40, spread=12.0)
    batch.kwargs["bonus_token_ids"] = torch.tensor([7, 8, 9, 10, 11, 12])
    verified, _ = assert_matches_reference(batch, "triton", DEVICE)
    full = verified.num_sampled.cpu() == torch.tensor([1, 3, 3, 3, 3, 3])
    last = verified.token_ids.cpu().gather(1, verified.num_sampled.cpu().long()[:, None] - 1)[:, 0]
    assert full.sum() >= 2
    assert (last[full] == batch.kwargs["bonus_token_ids"][full]).all()


@pytest.mark.parametrize("draft", [NO_DRAFT, LOGITS])
def test_a_request_does_not_depend_on_its_batch_mates(draft):
    """Alone, in another order and beside others, a request's rows, drafts, seed and positions give the same tokens."""
    batch = random_batch(
        seed=21,
        num_drafts=[4, 2, 3],
        vocab_size=1500,
        dtype=torch.bfloat16,
        draft=draft,
        filters=("top_p",),
        temperatures=(0.9,),
        shuffled_state=False,
    )
    whole = verify(*batch.to(DEVICE).args(), **batch.to(DEVICE).kwargs, backend="triton")
    cu = batch.cu_num_logits.tolist()
    for req in range(3):
        rows = slice(cu[req], cu[req + 1])
        kwargs = {
            k: v[rows] if k == "positions" else v[req : req + 1] for k, v in batch.kwargs.items() if v is not None
        }
        drafts = batch.draft_token_ids[cu[req] - req : cu[req + 1] - req - 1]
        alone = verify(
            batch.logits[rows].clone().to(DEVICE),
            torch.tensor([0, cu[req + 1] - cu[req]], dtype=torch.int32, device=DEVICE),
            drafts.to(DEVICE),
            128,
            **{k: v.to(DEVICE) if k != "draft_logits" else wide(v).to(DEVICE) for k, v in kwargs.items()},
            backend="triton",
        )
        count = int(alone.num_sampled)
        assert count == int(whole.num_sampled[req])
        assert alone.token_ids[0, :count].tolist() == whole.token_ids[req, :count].tolist()


def wide(draft_logits: torch.Tensor) -> torch.Tensor:
    """The same draft logits in a table of 128 positions."""
    table = torch.full((1, 128, draft_logits.shape[-1]), float("nan"), dtype=draft_logits.dtype)
    table[:, : draft_logits.shape[1]] = draft_logits
    return table


def test_logits_are_not_modified():
    batch = random_batch(seed=2, num_drafts=[3, 2], vocab_size=100, filters=ALL_FILTERS).to(DEVICE)
    before = batch.logits.clone()
    verify(*batch.args(), **batch.kwargs, backend="triton")
    assert torch.equal(before, batch.logits)


def test_all_greedy_needs_no_parameters():
    batch = random_batch(seed=8, num_drafts=[3, 0, 2, 4], vocab_size=300, temperatures=(0.0,), spread=9.0)
    batch.kwargs = {}
    verified, close = assert_matches_reference(batch, "triton", DEVICE)
    assert close == 0
    assert verified.num_sampled.max() > 1
