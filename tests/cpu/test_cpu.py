"""The CPU backend against the float64 reference, token for token, and against the enumerated target law.

Regimes that catch distinct bugs: vocabularies around the tile size, ragged requests (none, all and some accepted),
filters with ties, rows with NaN and infinities, draft distributions that are not distributions.
"""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from vllm_specopt import cpu
from vllm_specopt.cpu.plan import POOL
from vllm_specopt.cpu.rows import TILE
from vllm_specopt.kernels.reference import verify_ref
from vllm_specopt.kernels.reference.rows import target_row_ref
from vllm_specopt.verify import verify

# A logit 20 nats below the largest has a relative error of about 20 * 2^-23 in its single-precision weight.
MARGIN = 5e-6
MAX_EXCLUDED_SHARE = 0.01
POISON = -77
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(scope="module", autouse=True)
def tally():
    """Requests compared with the reference, and how many of them were too close to call: those must be few."""
    compared = {"requests": 0, "excluded": 0}
    assert_equals_reference.tally = compared
    yield compared
    assert compared["excluded"] <= MAX_EXCLUDED_SHARE * max(compared["requests"], 100)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_batch(
    seed,
    num_drafts,
    vocab,
    *,
    dtype=torch.float32,
    draft="one-hot",
    draft_vocab=None,
    spread=2.0,
    filters=(),
    greedy_every=0,
    placeholders=0.0,
    states=False,
    positions=True,
    pad=0,
    compact=True,
    index_dtype=torch.int64,
):
    """Arguments of ``verify`` for requests with ``num_drafts[r]`` drafts, whose drafts are plausible to the target."""
    gen = generator(seed)
    num_reqs, num_rows = len(num_drafts), sum(num_drafts) + len(num_drafts)
    narrow = min(vocab, draft_vocab or vocab)
    max_reqs = num_reqs + (3 if states else 0)
    state_indices = torch.randperm(max_reqs, generator=gen)[:num_reqs] if states else None
    logits = (torch.randn(num_rows, vocab + pad, generator=gen) * spread).to(dtype)[:, :vocab]
    starts = torch.tensor([0, *itertools.accumulate(k + 1 for k in num_drafts)])
    judged = torch.cat([torch.arange(int(s), int(s) + k) for s, k in zip(starts, num_drafts, strict=False)])
    temperature = 0.5 + torch.rand(max_reqs, generator=gen)
    if greedy_every:
        temperature[::greedy_every] = 0.0
    close = logits[judged.long(), :narrow].float() + torch.randn(len(judged), narrow, generator=gen) * 0.5
    tokens = (close + torch.randn(close.shape, generator=gen)).argmax(1) if len(judged) else torch.zeros(0).long()
    best = logits[judged.long()].float().argmax(1) if len(judged) else tokens
    tokens = torch.where(torch.rand(len(judged), generator=gen) < 0.4, best.clamp(max=narrow - 1), tokens)
    bad = torch.rand(len(judged), generator=gen) < placeholders
    wrong = torch.tensor([-1, vocab, vocab + 5, -(2**31)])[torch.randint(4, (len(judged),), generator=gen)]
    tokens = torch.where(bad, wrong, tokens)
    if not compact:
        rows = torch.full((num_rows,), 3)
        rows[judged.long() + 1] = tokens
        tokens = rows
    arguments = {
        "logits": logits,
        "cu_num_logits": starts.to(index_dtype),
        "draft_token_ids": tokens.to(index_dtype),
        "max_num_draft_tokens": max(num_drafts),
        "temperature": temperature,
        "seeds": torch.randint(-(2**63), 2**63 - 1, (max_reqs,), generator=gen),
        "state_indices": None if state_indices is None else state_indices.to(index_dtype),
    }
    if positions:
        arguments["positions"] = torch.randint(0, 2**31 - 1, (num_rows,), generator=gen).to(index_dtype)
        if index_dtype == torch.int64:
            arguments["positions"][0] += 2**40
    if draft == "probs":
        arguments["draft_probs"] = close.softmax(1)
    elif draft == "logits":
        width = max(num_drafts)
        draft_logits = torch.randn(max_reqs, width, narrow + pad, generator=gen)[:, :, :narrow]
        for r, k in enumerate(num_drafts):
            first = int(starts[r]) - r
            draft_logits[r if state_indices is None else int(state_indices[r]), :k] = close[first : first + k]
        arguments["draft_logits"] = draft_logits.to(dtype)
    if "top_k" in filters:
        arguments["top_k"] = torch.randint(0, min(vocab + 3, 60), (max_reqs,), generator=gen).to(index_dtype)
    if "top_p" in filters:
        arguments["top_p"] = (torch.rand(max_reqs, generator=gen) * 1.2).clamp(max=1.0)
    if "min_p" in filters:
        arguments["min_p"] = torch.rand(max_reqs, generator=gen) * 0.2
    return arguments


def run(arguments, counter=None, token_dtype=torch.int64):
    """Call the backend itself on poisoned outputs."""
    keywords = {k: v for k, v in arguments.items() if k != "max_num_draft_tokens"}
    num_reqs = len(arguments["cu_num_logits"]) - 1
    token_ids = torch.full((num_reqs, arguments["max_num_draft_tokens"] + 1), POISON, dtype=token_dtype)
    num_sampled = torch.full((num_reqs,), POISON, dtype=torch.int32)
    cpu.verify_batch(**keywords, token_ids=token_ids, num_sampled=num_sampled, bad_row_counter=counter)
    return token_ids, num_sampled


def assert_equals_reference(arguments, *, crowded=False, token_dtype=torch.int64):
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor)}
    counter = torch.tensor([5])
    token_ids, num_sampled = run(arguments, counter, token_dtype)
    expected = verify_ref(**arguments)
    clear = torch.tensor(expected.margin) >= MARGIN
    assert torch.equal(token_ids[clear].long(), expected.token_ids[clear])
    assert torch.equal(num_sampled[clear], expected.num_sampled[clear])
    assert int(counter) - 5 == expected.bad_rows
    if not crowded:
        assert_equals_reference.tally["requests"] += len(clear)
        assert_equals_reference.tally["excluded"] += int((~clear).sum())
    for name, tensor in before.items():
        assert torch.equal(arguments[name].nan_to_num(7.0), tensor.nan_to_num(7.0)), f"{name} was modified"
    return expected


RAGGED = [0, 1, 2, 3, 4, 5, 0, 3, 7, 1] * 4


@pytest.mark.parametrize("filters", [(), ("top_k",), ("top_p",), ("min_p",), ("min_p", "top_k", "top_p")], ids="+".join)
@pytest.mark.parametrize("draft", ["one-hot", "probs", "logits"])
@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16", "fp32"])
def test_matches_reference(dtype, draft, filters):
    arguments = make_batch(
        11, RAGGED, 1337, dtype=dtype, draft=draft, filters=filters, greedy_every=5, placeholders=0.1, pad=3
    )
    expected = assert_equals_reference(arguments)
    assert (expected.num_sampled == 1).any() and (expected.num_sampled > 2).any()


@pytest.mark.parametrize("draft", ["one-hot", "probs", "logits"])
@pytest.mark.parametrize("vocab", [1, 2, 3, 15, 63, TILE - 1, TILE, TILE + 1, 2 * TILE + 17, 5000])
def test_vocabulary_sizes(vocab, draft):
    filters = ("top_k", "top_p") if vocab % 2 else ()
    assert_equals_reference(make_batch(vocab, RAGGED[:20], vocab, dtype=torch.bfloat16, draft=draft, filters=filters))


@pytest.mark.parametrize("draft", ["one-hot", "probs", "logits"])
@pytest.mark.parametrize("filters", [(), ("min_p", "top_k", "top_p")], ids="+".join)
def test_large_vocabulary(draft, filters):
    arguments = make_batch(5, [3, 0, 2], 151_936, dtype=torch.bfloat16, draft=draft, filters=filters, spread=3.0)
    assert_equals_reference(arguments)


@pytest.mark.parametrize("draft_vocab", [700, 1100])
@pytest.mark.parametrize("draft", ["probs", "logits"])
def test_narrower_draft_vocabulary(draft, draft_vocab):
    arguments = make_batch(3, RAGGED, 1000, draft=draft, draft_vocab=draft_vocab, placeholders=0.1, filters=("top_p",))
    if draft_vocab > 1000:
        name = "draft_probs" if draft == "probs" else "draft_logits"
        wide = torch.nn.functional.pad(arguments[name], (0, draft_vocab - 1000), value=0.5)
        arguments[name] = wide
    expected = assert_equals_reference(arguments)
    assert int(expected.token_ids.max()) < min(1000, draft_vocab)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("compact", [True, False], ids=["compact", "by-row"])
def test_layouts(index_dtype, compact):
    for positions, states in itertools.product([True, False], repeat=2):
        arguments = make_batch(
            8, RAGGED, 300, draft="logits", filters=("top_k", "top_p", "min_p"), greedy_every=4, placeholders=0.2,
            states=states, positions=positions, compact=compact, index_dtype=index_dtype,
        )  # fmt: skip
        assert_equals_reference(arguments, token_dtype=index_dtype)
        arguments["bonus_token_ids"] = torch.arange(len(RAGGED)).to(index_dtype) + 1000
        assert_equals_reference(arguments, token_dtype=index_dtype)


def test_all_greedy_without_temperature():
    arguments = make_batch(2, RAGGED, 900, dtype=torch.bfloat16, spread=0.5)
    arguments["temperature"] = arguments["seeds"] = None
    assert_equals_reference(arguments)


def test_verify_overwrites_poisoned_memory(monkeypatch):
    real_empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: real_empty(*a, **k).fill_(POISON))
    arguments = make_batch(4, RAGGED, 200)
    result = verify(**arguments)
    assert torch.equal(result.token_ids, verify_ref(**arguments).token_ids)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("draft", ["one-hot", "probs", "logits"])
def test_rows_that_went_bad(dtype, draft):
    nan, inf = math.nan, math.inf
    arguments = make_batch(6, [2] * 60, 700, dtype=dtype, draft=draft, filters=("top_p", "top_k", "min_p"))
    arguments["temperature"][::4] = 0.0
    logits, gen = arguments["logits"], generator(1)
    for row in range(0, len(logits), 2):
        kind = (row // 2) % 9
        some = torch.randperm(700, generator=gen)[:40]
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
            logits[row] = torch.finfo(dtype).min
            logits[row, some] = torch.linspace(-2, 2, 40).to(dtype)
    if draft == "logits":
        arguments["draft_logits"][::3, 0, :350] = nan
        arguments["draft_logits"][1::6, 0] = -inf
        arguments["draft_logits"][2::6, 0, 5] = inf
    for top_p in (None, arguments["top_p"]):
        arguments["top_p"] = top_p
        assert assert_equals_reference(arguments).bad_rows > 5


def test_improper_draft_probs():
    arguments = make_batch(9, [3] * 80, 400, draft="probs")
    probs, gen = arguments["draft_probs"], generator(2)
    probs *= torch.rand(len(probs), 1, generator=gen) * 2
    probs[torch.rand(probs.shape, generator=gen) < 0.1] = math.nan
    probs[torch.rand(probs.shape, generator=gen) < 0.1] = -1.0
    probs[torch.rand(probs.shape, generator=gen) < 0.1] = 0.0
    probs[::17, ::5] = math.inf
    assert_equals_reference(arguments)


def test_empty_residual_draws_from_the_target():
    logits = torch.zeros(40 * 2, 8)
    logits[:, 2:] = -math.inf
    probs = torch.zeros(40, 8)
    probs[:, :2] = 0.5
    arguments = {
        "logits": logits,
        "cu_num_logits": torch.arange(0, 82, 2),
        "draft_token_ids": torch.full((40,), 5),
        "max_num_draft_tokens": 1,
        "temperature": torch.ones(40),
        "seeds": torch.arange(40),
        "draft_probs": probs,
    }
    token_ids, num_sampled = run(arguments)
    assert (num_sampled == 1).all()
    assert torch.equal(token_ids, verify_ref(**arguments).token_ids)
    assert set(token_ids[:, 0].tolist()) == {0, 1}


@pytest.mark.parametrize("levels", [1, 2, 5, 40])
@pytest.mark.parametrize("filters", [("top_k",), ("top_p",), ("min_p", "top_k", "top_p")], ids="+".join)
def test_ties(levels, filters):
    arguments = make_batch(levels, [2] * 40, 3000, dtype=torch.bfloat16, filters=filters, greedy_every=6)
    arguments["logits"][:] = torch.randint(levels, arguments["logits"].shape, generator=generator(3)) * 0.5
    assert_equals_reference(arguments)


@pytest.mark.parametrize("shape", ["flat", "wide", "two-scales", "masked"])
def test_thresholds_among_many_candidates(shape):
    """More candidates than the pool holds, at distances that one histogram cannot resolve."""
    arguments = make_batch(21, [1] * 30, 6 * POOL, filters=("top_k", "top_p"), spread=1.0)
    logits, gen = arguments["logits"], generator(4)
    arguments["top_k"] = torch.randint(1, 6 * POOL, (30,), generator=gen)
    arguments["top_p"] = 0.3 + 0.65 * torch.rand(30, generator=gen)
    arguments["temperature"] = torch.ones(30)
    if shape == "flat":
        logits *= 1e-3
    elif shape == "wide":
        logits *= 1e30
    elif shape == "two-scales":
        logits[:, ::2] = logits[:, ::2] * 1e-6 - 0.5
    else:
        logits[:, ::3] = torch.finfo(torch.float32).min
    # Among thousands of nearly equal masses some always lie within the margin of top_p.
    assert_equals_reference(arguments, crowded=True)
    arguments["top_p"] = None
    assert_equals_reference(arguments)


def test_independent_of_batch_mates_and_threads():
    arguments = make_batch(13, [4] * 12, 20_011, dtype=torch.bfloat16, draft="probs", filters=("top_p",), states=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone, _ = run(arguments)
        for count in (2, 3):
            torch.set_num_threads(count)
            assert torch.equal(run(arguments)[0], alone)
    finally:
        torch.set_num_threads(threads)
    for r in (0, 5, 11):
        single = dict(arguments)
        single["logits"] = arguments["logits"][5 * r : 5 * r + 5]
        single["positions"] = arguments["positions"][5 * r : 5 * r + 5]
        single["draft_probs"] = arguments["draft_probs"][4 * r : 4 * r + 4]
        single["draft_token_ids"] = arguments["draft_token_ids"][4 * r : 4 * r + 4]
        single["state_indices"] = arguments["state_indices"][r : r + 1]
        single["cu_num_logits"] = torch.tensor([0, 5])
        assert torch.equal(run(single)[0], alone[r : r + 1])


@pytest.mark.parametrize("num_threads", [1, 2])
def test_arguments_that_do_not_fit(num_threads):
    arguments = make_batch(1, [2] * 8, 40_000, dtype=torch.bfloat16, states=True)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        arguments["state_indices"][3] = 10_000
        with pytest.raises(ValueError, match=r"request 3: .*expected"):
            run(arguments)
        arguments["state_indices"] = None
        arguments["cu_num_logits"][-1] += 1
        with pytest.raises(ValueError, match=r"request 7: .*expected"):
            run(arguments)
    finally:
        torch.set_num_threads(threads)


LAW_LOGITS = torch.tensor([1.0, 0.3, 0.3, -0.5, 2.0, -1.5, 0.9])
LAW_DRAFT = torch.tensor([0.05, 0.3, 0.15, 0.1, 0.2, 0.1, 0.1])


@pytest.mark.parametrize("filters", [(0, 1.0), (4, 1.0), (0, 0.8), (5, 0.75)], ids=["none", "top-k", "top-p", "both"])
@pytest.mark.parametrize("draft", ["one-hot", "probs"])
def test_emitted_tokens_follow_the_target(draft, filters):
    """First and second emitted token over 200,000 requests with two drafts each, against the enumerated law."""
    num_reqs, vocab = 200_000, len(LAW_LOGITS)
    gen = generator(17)
    second = LAW_LOGITS.flip(0) * 0.7
    logits = torch.stack([LAW_LOGITS, second, LAW_LOGITS]).repeat(num_reqs, 1)
    tokens = torch.multinomial(LAW_DRAFT, 2 * num_reqs, replacement=True, generator=gen)
    top_k, top_p = filters
    arguments = {
        "logits": logits,
        "cu_num_logits": torch.arange(0, 3 * num_reqs + 1, 3),
        "draft_token_ids": tokens,
        "max_num_draft_tokens": 2,
        "temperature": torch.full((num_reqs,), 0.8),
        "seeds": torch.randint(-(2**63), 2**63 - 1, (num_reqs,), generator=gen),
        "top_k": torch.full((num_reqs,), top_k) if top_k else None,
        "top_p": torch.full((num_reqs,), top_p) if top_p < 1 else None,
        "draft_probs": LAW_DRAFT.repeat(2 * num_reqs, 1) if draft == "probs" else None,
    }
    token_ids, num_sampled = run(arguments)
    for column, row in enumerate((LAW_LOGITS, second)):
        emitted = token_ids[num_sampled > column, column]
        law = target_row_ref(row, float(torch.tensor(0.8)), top_k, top_p, 0.0)[1]
        counts = torch.bincount(emitted, minlength=vocab).double()
        assert not counts[law == 0].any()
        kept = law > 0
        assert chisquare(counts[kept].numpy(), (law[kept] * counts.sum()).numpy()).pvalue > 1e-3


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**31),
    num_drafts=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    vocab=st.integers(1, 1200),
    dtype=st.sampled_from(DTYPES),
    draft=st.sampled_from(["one-hot", "probs", "logits"]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 4.0, 30.0]),
    filters=st.sets(st.sampled_from(["top_k", "top_p", "min_p"])),
    layout=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    placeholders=st.sampled_from([0.0, 0.3]),
)
def test_any_batch(seed, num_drafts, vocab, dtype, draft, spread, filters, layout, placeholders):
    states, positions, compact = layout
    arguments = make_batch(
        seed, [*num_drafts, 1], vocab, dtype=dtype, draft=draft, spread=spread, filters=tuple(filters),
        placeholders=placeholders, states=states, positions=positions, compact=compact, greedy_every=3,
    )  # fmt: skip
    assert_equals_reference(arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=["bf16", "fp16", "fp32"])
def test_warm_up(dtype):
    cpu.warm_up(dtype)
