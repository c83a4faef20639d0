"""The CPU backend against the float64 reference, token for token.

Regimes that catch distinct bugs: vocabularies around the tile size, ragged requests (none, all and some accepted),
rows with NaN, infinities and logits beyond a reference of their own, draft distributions that are not distributions.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.cpu_checks import Tally, sampled_batch

from vllm_specopt import cpu
from vllm_specopt.cpu.rows import TILE
from vllm_specopt.kernels.reference import verify_ref
from vllm_specopt.rules import PAPER
from vllm_specopt.testing import LOGITS, NO_DRAFT, PROBS, random_batch
from vllm_specopt.verify import verify

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DTYPE_NAMES = ["bf16", "fp16", "fp32"]
DRAFTS = [NO_DRAFT, PROBS, LOGITS]
RAGGED = [0, 1, 2, 3, 4, 5, 0, 3, 7, 1] * 3


@pytest.fixture(scope="module")
def tally():
    compared = Tally()
    yield compared
    compared.assert_few_were_close()


@pytest.mark.parametrize("filters", [(), ("top_k",), ("top_p",), ("min_p",), ("min_p", "top_k", "top_p")], ids="+".join)
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
def test_matches_reference(tally, dtype, draft, filters):
    batch = random_batch(seed=11, num_drafts=RAGGED, vocab_size=1337, dtype=dtype, draft=draft, filters=filters)
    num_sampled = tally.check(batch).num_sampled
    assert (num_sampled == 1).any() and (num_sampled > 2).any()
    batch.kwargs["rule"] = PAPER
    batch.kwargs["rule_requests"] = torch.arange(len(batch.kwargs["seeds"])) % 3 > 0
    tally.check(batch)


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("vocab", [1, 2, 3, 15, 63, TILE - 1, TILE, TILE + 1, 2 * TILE + 17, 5000])
def test_vocabulary_sizes(tally, vocab, draft):
    filters = ("top_k", "top_p") if vocab % 2 else ()
    shape = {"seed": vocab, "num_drafts": RAGGED[:20], "vocab_size": vocab}
    tally.check(random_batch(**shape, dtype=torch.bfloat16, draft=draft, filters=filters))


@pytest.mark.parametrize("narrow", [700, 1100])
@pytest.mark.parametrize("draft", [PROBS, LOGITS])
def test_draft_vocabulary_of_another_size(tally, draft, narrow):
    batch = random_batch(seed=3, num_drafts=RAGGED, vocab_size=1000, draft=draft, filters=("top_p",))
    name = "draft_probs" if draft == PROBS else "draft_logits"
    wide = torch.nn.functional.pad(batch.kwargs[name], (0, 100), value=0.5)
    batch.kwargs[name] = wide[..., :narrow]
    assert int(tally.check(batch).token_ids.max()) < min(1000, narrow)


@pytest.mark.parametrize("wide", [False, True], ids=["int32", "int64"])
@pytest.mark.parametrize("rows_layout", [False, True], ids=["compact", "by-row"])
def test_layouts(tally, wide, rows_layout):
    filters, dtype = ("top_k", "top_p", "min_p"), torch.int64 if wide else torch.int32
    for positions, states in itertools.product([True, False], repeat=2):
        batch = random_batch(
            seed=8, num_drafts=RAGGED, vocab_size=300, draft=LOGITS, filters=filters, rows_layout=rows_layout,
            shuffled_state=states,
        )  # fmt: skip
        batch.cu_num_logits, batch.draft_token_ids = batch.cu_num_logits.to(dtype), batch.draft_token_ids.to(dtype)
        batch.kwargs["token_dtype"] = dtype
        batch.kwargs["top_k"] = batch.kwargs["top_k"].to(dtype)
        batch.kwargs["positions"] = (batch.kwargs["positions"] if wide else torch.arange(len(batch.logits))).to(dtype)
        if states:
            batch.kwargs["state_indices"] = batch.kwargs["state_indices"].to(dtype)
        if not positions:
            batch.kwargs["positions"] = None
        tally.check(batch)
        batch.kwargs["bonus_token_ids"] = torch.arange(len(RAGGED)).to(dtype)
        tally.check(batch)


def test_all_greedy_without_temperature(tally):
    batch = random_batch(seed=2, num_drafts=RAGGED, vocab_size=900, dtype=torch.bfloat16, spread=0.5)
    batch.kwargs = {}
    tally.check(batch)


def spoil_rows(logits: torch.Tensor, gen: torch.Generator) -> None:
    """Put every other row into one of nine conditions that a row should not be in."""
    nan, inf = math.nan, math.inf
    for row in range(0, len(logits), 2):
        kind = (row // 2) % 9
        some = torch.randperm(logits.shape[1], generator=gen)[:40]
        if kind < 3:
            logits[row] = (nan, -inf, inf)[kind]
        elif kind == 3:
            logits[row, some] = nan
        elif kind == 4:
            logits[row, some] = -inf
        elif kind == 5:
            logits[row, some[:2]] = inf
        elif kind == 6:
            logits[row, some[0]], logits[row, some[1:]] = inf, nan
        elif kind == 7:
            logits[row], logits[row, some[:3]] = -inf, 1.0
        else:
            logits[row] = torch.finfo(logits.dtype).min
            logits[row, some] = torch.linspace(-2, 2, 40).to(logits.dtype)


@pytest.mark.parametrize("method", [None, PAPER], ids=["exact", "sigmoid"])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
@pytest.mark.parametrize("draft", DRAFTS)
def test_rows_that_went_bad(tally, dtype, draft, method):
    filters = ("top_p", "top_k", "min_p")
    batch = random_batch(seed=6, num_drafts=[2] * 60, vocab_size=700, dtype=dtype, draft=draft, filters=filters)
    spoil_rows(batch.logits, torch.Generator().manual_seed(1))
    batch.kwargs["rule"] = method
    if draft == LOGITS:
        batch.kwargs["draft_logits"][::3, 0, :350] = math.nan
        batch.kwargs["draft_logits"][1::6, 0] = -math.inf
        batch.kwargs["draft_logits"][2::6, 0, 5] = math.inf
    for without in ("", "top_p", "top_k", "min_p"):
        batch.kwargs.pop(without, None)
        expected = verify_ref(*batch.args(), **batch.kwargs)
        counted = batch.kwargs | {"bad_row_counter": torch.tensor([5])}
        verify(*batch.args(), **counted, backend="cpu")
        assert int(counted["bad_row_counter"]) - 5 == expected.bad_rows > 5
        tally.check(batch)


@pytest.mark.parametrize("scale", [3e4, 1e9, 1e30])
@pytest.mark.parametrize("filters", [(), ("top_k", "top_p", "min_p")], ids=["none", "all"])
def test_logits_beyond_a_reference_of_their_own(tally, scale, filters):
    """Scaled logits whose whole part single precision cannot hold beside a fraction: small differences still count."""
    gen = torch.Generator().manual_seed(4)
    batch = random_batch(seed=5, num_drafts=[3] * 40, vocab_size=1300, draft=PROBS, filters=filters, spread=1.0)
    logits = batch.logits
    logits[:] = torch.randn(logits.shape, generator=gen) * scale
    top = logits.argmax(1, keepdim=True)
    for step in (1, 2, 5):
        near = torch.nextafter(logits.gather(1, top), torch.tensor(-math.inf))
        logits.scatter_(1, (top + step) % 1300, near)
    tally.check(batch)
    batch.kwargs["temperature"][:] = 2e-5
    logits[:] = torch.randn(logits.shape, generator=gen)
    tally.check(batch)


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("step", [30.0, 70.0, 200.0])
def test_reference_that_has_to_follow(tally, step, draft):
    """Every tile lies above the one before, by more than weights may grow; what was summed before becomes small."""
    batch = random_batch(seed=12, num_drafts=[2] * 40, vocab_size=6 * TILE, draft=draft)
    rising = torch.arange(6).repeat_interleave(TILE) * step
    batch.logits += rising - 3 * step
    if draft == LOGITS:
        batch.kwargs["draft_logits"] += rising - 3 * step
    # Elsewhere both probabilities are below what single precision holds.
    batch.draft_token_ids = torch.where(batch.draft_token_ids < 0, -1, 5 * TILE + batch.draft_token_ids % TILE)
    tally.check(batch)


def test_improper_draft_probs(tally):
    batch = random_batch(seed=9, num_drafts=[3] * 80, vocab_size=400, draft=PROBS)
    probs, gen = batch.kwargs["draft_probs"], torch.Generator().manual_seed(2)
    probs *= torch.rand(len(probs), 1, generator=gen) * 2
    for spoiled in (math.nan, -1.0, 0.0):
        probs[torch.rand(probs.shape, generator=gen) < 0.1] = spoiled
    probs[::17, ::5] = math.inf
    tally.check(batch)


def test_empty_residual_draws_from_the_target(tally):
    logits = torch.zeros(40 * 2, 8)
    logits[:, 2:] = -math.inf
    probs = torch.zeros(40, 8)
    probs[:, :2] = 0.5
    verified = tally.check(sampled_batch(logits, 1, torch.full((40,), 5), draft_probs=probs))
    assert (verified.num_sampled == 1).all()
    assert set(verified.token_ids[:, 0].tolist()) == {0, 1}


def test_independent_of_batch_mates_and_threads():
    shape = {"seed": 13, "num_drafts": [4] * 12, "vocab_size": 20_011}
    batch = random_batch(**shape, dtype=torch.bfloat16, draft=PROBS, filters=("top_p",))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = verify(*batch.args(), **batch.kwargs).token_ids
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(verify(*batch.args(), **batch.kwargs).token_ids, alone)
    finally:
        torch.set_num_threads(threads)
    for r in (0, 5, 11):
        rows, tokens = slice(5 * r, 5 * r + 5), slice(4 * r, 4 * r + 4)
        of_request = {"positions": rows, "draft_probs": tokens, "state_indices": slice(r, r + 1)}
        kwargs = {name: value[of_request.get(name, slice(None))] for name, value in batch.kwargs.items()}
        single = verify(batch.logits[rows], torch.tensor([0, 5]), batch.draft_token_ids[tokens], 4, **kwargs)
        assert torch.equal(single.token_ids, alone[r : r + 1])


@pytest.mark.parametrize("num_threads", [1, 2])
def test_arguments_that_do_not_fit(num_threads):
    batch = random_batch(seed=1, num_drafts=[2] * 8, vocab_size=40_000, dtype=torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        batch.kwargs["state_indices"][3] = 10_000
        with pytest.raises(ValueError, match=r"request 3: .*expected"):
            verify(*batch.args(), **batch.kwargs)
        batch.kwargs = {name: value[:8] for name, value in batch.kwargs.items() if name in ("temperature", "seeds")}
        batch.cu_num_logits[-1] += 1
        with pytest.raises(ValueError, match=r"request 7: .*expected"):
            verify(*batch.args(), **batch.kwargs)
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    num_drafts=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    vocab=st.integers(1, 1200),
    dtype=st.sampled_from(DTYPES),
    draft=st.sampled_from(DRAFTS),
    spread=st.sampled_from([0.0, 0.1, 1.0, 4.0, 30.0]),
    filters=st.sets(st.sampled_from(["top_k", "top_p", "min_p"])),
    states=st.booleans(),
    rows_layout=st.booleans(),
    method=st.sampled_from([None, PAPER]),
)
def test_any_batch(tally, seed, num_drafts, vocab, dtype, draft, spread, filters, states, rows_layout, method):
    batch = random_batch(
        seed=seed, num_drafts=[*num_drafts, 1], vocab_size=vocab, dtype=dtype, draft=draft, spread=spread,
        filters=tuple(filters), shuffled_state=states, rows_layout=rows_layout,
    )  # fmt: skip
    batch.kwargs["rule"] = method
    tally.check(batch)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES)
def test_warm_up(dtype):
    cpu.warm_up(dtype)
