"""The audit: both backends against the reference."""

import itertools
import os

import pytest
import torch
from support.audited import CONSTANTS, FILTERS, audit_step, parameters
from support.launch_keys import recorded

from vllm_specopt.audit import NOT_AUDITED, audit, new_counts
from vllm_specopt.evidence import BINS, COLUMNS
from vllm_specopt.kernels import audit as kernels
from vllm_specopt.kernels import variants
from vllm_specopt.kernels.reference.audit import audit_ref
from vllm_specopt.rules import RULES
from vllm_specopt.testing import LOGITS, MARGIN, NO_DRAFT, poisoned_empty, random_batch
from vllm_specopt.verify import Notes, verify

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("cpu", "triton")


count = kernels._count


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_without_rows(backend):
    counts, none = new_counts(1, device_of(backend)), torch.zeros(2, 0, dtype=torch.int64)
    arguments = {"temperature": torch.ones(2), "seeds": torch.zeros(2, dtype=torch.int64)}
    tensors = [t.to(counts.device) for t in (torch.zeros(0, 50), torch.tensor([0, 0, 0]), none)]
    audit(*tensors, counts, **{k: v.to(counts.device) for k, v in arguments.items()}, backend=backend)
    assert counts.sum() == 0


def device_of(backend: str) -> str:
    return DEVICE if backend == "triton" else "cpu"


def check(
    batch, token_ids, num_sampled, backend, monkeypatch, method=0, notes=None, logits=None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare places and counts with the reference's; return both. ``logits``: what the audit is given instead."""
    expected = audit_ref(batch.logits, batch.cu_num_logits, token_ids, num_sampled=num_sampled, **parameters(batch))
    on_device = batch.to(device_of(backend))
    ids = token_ids.to(device_of(backend))
    sampled = None if num_sampled is None else num_sampled.to(ids.device)
    counts, places = new_counts(len(RULES) + 1, ids.device), torch.full(ids.shape, 7.0, device=ids.device)
    before = [t.clone() for t in (on_device.logits, ids, *on_device.kwargs.values()) if isinstance(t, torch.Tensor)]
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned_empty)
        audit(
            on_device.logits if logits is None else logits.to(ids.device),
            on_device.cu_num_logits,
            ids,
            counts,
            num_sampled=sampled,
            notes=notes,
            places=places,
            method=method,
            backend=backend,
            **parameters(on_device),
        )
    after = [t for t in (on_device.logits, ids, *on_device.kwargs.values()) if isinstance(t, torch.Tensor)]
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(before, after, strict=True))
    places, counts = places.cpu(), counts.cpu()
    far = expected.margins > MARGIN
    assert far.float().mean() > 0.95
    assert torch.equal(places.isnan(), expected.places.isnan())
    assert ((places - expected.places).abs().nan_to_num() < 2e-6)[far].all()
    seen = places[~places.isnan()].double()
    bins = torch.histc((seen * BINS).clamp(max=BINS - 1).floor(), BINS, 0, BINS)
    row = counts[method]
    # A place beside a bin's edge may lie in either: fp32 rounds it.
    assert (row[:BINS] - bins).abs().sum() <= 2 * ((seen * BINS + 0.5) % 1 - 0.5).abs().lt(1e-5).sum()
    assert row[:BINS].sum() == len(seen)
    if far.all():
        assert row[BINS] == expected.impossible
    assert row[BINS + 1] == expected.skipped
    assert counts.sum() - row.sum() == 0
    return places, row


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("filters", [(), *((name,) for name in FILTERS), FILTERS], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_matches_reference(backend, filters, dtype, monkeypatch):
    audited = 0
    for seed, vocab_size, num_drafts in ((0, 1000, [2, 0, 3, 1]), (1, 37, [3, 0, 5, 1, 9]), (2, 4100, [2, 0, 1])):
        batch = random_batch(
            seed=seed,
            num_drafts=num_drafts,
            vocab_size=vocab_size,
            dtype=dtype,
            filters=filters,
            temperatures=(0.0, 0.7, 1.3, NOT_AUDITED),
        )
        kwargs = batch.kwargs | {"temperature": batch.kwargs["temperature"].abs()}
        verified = verify(*batch.args(), **kwargs, token_dtype=torch.int32 if seed else torch.int64, backend="cpu")
        places, _ = check(batch, verified.token_ids, verified.num_sampled, backend, monkeypatch, method=seed)
        again, _ = check(batch, verified.token_ids, None, backend, monkeypatch, method=len(RULES))
        assert torch.equal(places.nan_to_num(9.0), again.nan_to_num(9.0))
        # Any token may be audited, drawn or not.
        anything = torch.randint(-2, vocab_size + 2, verified.token_ids.shape, generator=torch.manual_seed(seed))
        _, row = check(batch, anything, torch.tensor(num_drafts) + 1, backend, monkeypatch)
        audited += int(row[:BINS].sum())
    assert audited > 10


def verified_with_notes(batch, backend, monkeypatch, **more):
    """What a backend emits for a batch, and its notes; memory is poisoned."""
    notes, on_device = Notes(), batch.to(device_of(backend))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", poisoned_empty)
        verified = verify(*on_device.args(), **on_device.kwargs, **more, notes=notes, backend=backend)
    return verified.token_ids.cpu(), notes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("filters", [(), FILTERS], ids=["plain", "filtered"])
@pytest.mark.parametrize("draft", [NO_DRAFT, LOGITS], ids=str)
@pytest.mark.parametrize("method", RULES)
def test_notes_of_a_verification_stand_in_for_a_sweep(backend, filters, draft, method, monkeypatch):
    if (method == "budget" and draft != NO_DRAFT) or (method == "block" and draft == NO_DRAFT):
        pytest.skip("not of this rule")
    for seed, vocab_size, dtype in ((3, 1000, torch.bfloat16), (4, 2100, torch.float32)):
        batch = random_batch(
            seed=seed,
            num_drafts=[2, 0, 3, 1],
            vocab_size=vocab_size,
            dtype=dtype,
            draft=draft,
            filters=filters,
            temperatures=(0.0, 0.7, 1.3, 1.0),
        )
        token_ids, notes = verified_with_notes(batch, backend, monkeypatch, rule=CONSTANTS[method])
        assert (notes.left is None) == (backend == "triton" and method == "sigmoid")
        check(batch, token_ids, None, backend, monkeypatch, notes=notes)
        # Any token may be audited, drawn or not, and any row.
        anything = torch.randint(-2, vocab_size + 2, token_ids.shape, generator=torch.manual_seed(seed))
        check(batch, anything, torch.tensor([3, 1, 4, 2]), backend, monkeypatch, notes=notes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("filters", [(), ("top_p",)], ids=["plain", "filtered"])
def test_with_notes_only_tiles_that_reach_the_token_are_read(backend, filters, monkeypatch):
    batch = random_batch(
        seed=7, num_drafts=[0] * 8, vocab_size=4096, dtype=torch.float32, filters=filters, temperatures=(1.0,)
    )
    token_ids, notes = verified_with_notes(batch, backend, monkeypatch)
    tiles = batch.logits.view(8, -1, 1024)
    reached = batch.logits.gather(1, token_ids.long())
    spoilt = tiles.where(tiles.amax(2, keepdim=True) >= reached[..., None], torch.nan)
    assert spoilt.isnan().any(1).any()
    check(batch, token_ids, None, backend, monkeypatch, notes=notes, logits=spoilt.view(8, -1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_narrow_draft_vocabulary_leaves_no_notes(backend, monkeypatch):
    batch = random_batch(seed=7, num_drafts=[2, 1], vocab_size=300, draft=LOGITS, temperatures=(1.0,))
    batch.kwargs["draft_logits"] = batch.kwargs["draft_logits"][..., :200].contiguous()
    batch.draft_token_ids %= 200
    token_ids, notes = verified_with_notes(batch, backend, monkeypatch)
    assert notes.left is None
    check(batch, token_ids, None, backend, monkeypatch, notes=notes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("filtered", [False, True])
def test_rows_that_go_bad(backend, filtered, monkeypatch):
    nan, inf = float("nan"), float("inf")
    rows = torch.randn(9, 50, generator=torch.manual_seed(0))
    rows[0] = nan
    rows[1] = -inf
    rows[2, 5:9] = inf
    rows[3, ::2] = nan
    rows[4, 3:] = -inf
    rows[5] = 0.0
    rows[6, 0] = -0.0
    rows[7] = 300.0
    rows[8, 7] = 300.0
    for token in (0, 1, 7, 49):
        batch = random_batch(
            seed=1, num_drafts=[0] * 9, vocab_size=50, temperatures=(0.8,), filters=FILTERS if filtered else ()
        )
        batch.logits = rows
        _, notes = verified_with_notes(batch, backend, monkeypatch)
        check(batch, torch.full((9, 1), token), None, backend, monkeypatch, notes=notes)
        places, row = check(batch, torch.full((9, 1), token), None, backend, monkeypatch)
        assert places[:2].isnan().all() and not places[2:].isnan().any()
        assert row[BINS + 1] == 2
        # Not among the infinite ones, NaN, and -inf.
        expected = {0: [2, 3], 1: [2], 7: [4], 49: [2, 4]}[token]
        assert set(expected) <= set((places[:, 0] == 1).nonzero()[:, 0].tolist())
        assert row[BINS] >= len(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_tokens_share_their_mass(backend, monkeypatch):
    """Four of five tokens are equal: places of any of these are spread over all they have; the first is above them."""
    n = 128
    logits = torch.zeros(n, 5)
    logits[:, 3] = 1.0
    batch = random_batch(seed=0, num_drafts=[0] * n, vocab_size=5, temperatures=(1.0,))
    batch.logits = logits
    top = float(logits[0].softmax(0)[3])
    places, _ = check(batch, torch.arange(n)[:, None] % 2, None, backend, monkeypatch)
    assert places.min() > top and places.min() < top + 0.03 and places.max() > 0.97
    places, _ = check(batch, torch.full((n, 1), 3), None, backend, monkeypatch)
    assert places.max() < top and places.max() > top - 0.03 and places.min() < 0.03


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32], ids=str)
def test_requests_count_for_the_method_they_follow(backend, dtype):
    device = device_of(backend)
    batch = random_batch(seed=4, num_drafts=[2, 1, 3, 0], vocab_size=30, temperatures=(1.0,)).to(device)
    verified = verify(*batch.args(), **batch.kwargs)
    flags = torch.zeros(len(batch.kwargs["temperature"]), dtype=dtype, device=device)
    follows = batch.kwargs["state_indices"].long()[::2]
    flags[follows] = 1 if dtype is torch.bool else 0.01
    counts = new_counts(len(RULES), device)
    audit_step(batch, verified, counts, method=4, rule_requests=flags, backend=backend)
    assert counts[4].sum() == verified.num_sampled[::2].sum()
    assert counts[0].sum() == verified.num_sampled[1::2].sum()
    assert counts.sum() == verified.num_sampled.sum()


@pytest.mark.parametrize("filters", [(), ("top_k",)], ids=["plain", "filtered"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_any_number_of_programs_may_share_a_row(dtype, filters, monkeypatch):
    """Most tokens of the row lie above the audited one, and of equal ones some in every program's part."""
    shared_by = []
    monkeypatch.setattr(kernels, "_count", lambda variant, grid, *args, **kw: shared_by.append(grid[0]) or count(
        variant, grid, *args, **kw))  # fmt: skip
    batch = random_batch(seed=5, num_drafts=[1, 0, 2], vocab_size=9000, spread=0.1, dtype=dtype, temperatures=(1.0,))
    if filters:
        batch.kwargs["top_k"] = torch.full_like(batch.kwargs["temperature"], 8000).int()
    _, notes = verified_with_notes(batch, "triton", monkeypatch)
    middle = batch.logits.argsort(1)[:, 4000]
    token_ids = torch.stack([middle[row : row + 3] for row in (0, 2, 2)])
    for programs, parts in ((1, 1), (20, 2), (4096, 9)):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        for given in (notes, None):
            check(batch, token_ids, torch.tensor([2, 1, 3]), "triton", monkeypatch, notes=given)
            assert shared_by.pop() == (1 if filters and given is None else parts)


def test_a_wide_row_of_which_much_is_kept(monkeypatch):
    batch = random_batch(seed=2, num_drafts=[1, 0], vocab_size=9000, spread=0.1, temperatures=(1.0,))
    batch.kwargs |= {"top_k": torch.full_like(batch.kwargs["temperature"], 7000).int()}
    for backend in BACKENDS:
        token_ids, notes = verified_with_notes(batch, backend, monkeypatch)
        check(batch, token_ids, None, backend, monkeypatch)
        check(batch, token_ids, None, backend, monkeypatch, notes=notes)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_may_lie_anywhere(backend, monkeypatch):
    batch = random_batch(seed=13, num_drafts=[2, 3], vocab_size=1030, dtype=torch.bfloat16)
    table = torch.full((len(batch.logits), 2, 1035), float("inf"), dtype=torch.bfloat16)
    batch.logits = table[:, 1, 3:1033].copy_(batch.logits)
    verified = verify(*batch.args(), **batch.kwargs)
    wide = torch.full((2, 9), -77)
    wide[:, 2:6] = verified.token_ids
    check(batch, wide[:, 2:6], verified.num_sampled, backend, monkeypatch)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="launches are recorded in the interpreter")
def test_a_variant_is_compiled_once(monkeypatch):
    compiled: dict[tuple, set] = {}
    taken = []

    def variant_of(*args):
        taken.append(variants.variant_of(*args))
        return taken[-1]

    monkeypatch.setattr(kernels, "variant_of", variant_of)
    for dtype, filters, shuffled, seed in itertools.product(
        (torch.float32, torch.bfloat16), ((), FILTERS), (False, True), (1, 2)
    ):
        batch = random_batch(
            seed=seed, num_drafts=[1, 2], vocab_size=100, dtype=dtype, filters=filters, shuffled_state=shuffled
        )
        ids = torch.zeros(2, 3, dtype=torch.int64)
        for change in (
            {},
            {"positions": None},
            {"num_sampled": torch.ones(2, dtype=torch.int32)},
            {"rule_requests": torch.ones(len(batch.kwargs["temperature"]), dtype=torch.bool), "method": 1},
            {"method": 16},
            {"places": torch.zeros(2, 3)},
        ):
            for tokens in (ids, ids.int()):
                with recorded(run=False) as keys:
                    arguments = parameters(batch) | change
                    audit(batch.logits, batch.cu_num_logits, tokens, new_counts(17, "cpu"), **arguments,
                          backend="triton")  # fmt: skip
                assert compiled.setdefault(taken[-1], keys) == keys
    assert 20 < len(compiled) < len(taken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": torch.zeros(1, 5, dtype=torch.int64)}, f"counts has 5 columns, expected {COLUMNS}"),
        ({"token_ids": torch.zeros(3, 2, dtype=torch.int64)}, "token_ids has length 3, expected 2"),
        ({"temperature": torch.ones(2).half()}, "temperature has dtype float16, expected one of float32"),
        ({"seeds": None}, "seeds is None, expected a tensor"),
        ({"method": 7}, "method is 7, expected 0 to 0"),
        ({"places": torch.zeros(2, 5)}, r"places has shape \(2, 5\), expected \(2, 2\), contiguous"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_arguments_are_told(change, message):
    arguments = {
        "logits": torch.zeros(3, 4),
        "cu_num_logits": torch.tensor([0, 2, 3]),
        "token_ids": torch.zeros(2, 2, dtype=torch.int64),
        "counts": new_counts(1, "cpu"),
        "temperature": torch.ones(2),
        "seeds": torch.zeros(2, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=message):
        audit(**(arguments | change))
