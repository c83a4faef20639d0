"""Sigmoid verification: both backends against the float64 reference, token for token, and its law by formula."""

import math

import pytest
import torch

from vllm_specopt.kernels.reference import verify_ref
from vllm_specopt.kernels.reference.sigmoid import sigmoid_score_ref
from vllm_specopt.rules import PAPER, SigmoidConstants
from vllm_specopt.testing import LOGITS, NO_DRAFT, PROBS, assert_matches_reference, random_batch
from vllm_specopt.verify import verify

DEVICES = {"cpu": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
ALL_FILTERS = ("top_k", "top_p", "min_p")
DRAFTS = (NO_DRAFT, PROBS, LOGITS)
CONSTANTS = {
    "paper": PAPER,
    "unit": SigmoidConstants(-5.0, 5.0, -5.0, 5.0),
    "clipping": SigmoidConstants(0.0, 1.5, 0.0, 1.5),
    "centred": SigmoidConstants(6.0, 7.0, 5.5, 6.5, clip=False),
    "unlike": SigmoidConstants(-8.0, 2.0, -6.0, 5.0),
    "huge": SigmoidConstants(-1e25, 1e25, -1e25, 1e25),
}
# Of all requests below, the largest share that a reference margin may exclude from the comparison.
MAX_EXCLUDED = 0.02


def sigmoid_batch(constants, *, mixed=False, **case):
    batch = random_batch(**case)
    batch.kwargs["rule"] = constants
    if mixed:
        generator = torch.Generator().manual_seed(case["seed"])
        batch.kwargs["rule_requests"] = torch.rand(len(batch.kwargs["temperature"]), generator=generator) < 0.6
    return batch


def check(backend, batches):
    excluded = total = 0
    for batch in batches:
        _, close = assert_matches_reference(batch, backend, DEVICES[backend])
        excluded, total = excluded + close, total + batch.num_reqs
    assert excluded <= max(1, MAX_EXCLUDED * total)


@pytest.mark.parametrize("constants", CONSTANTS.values(), ids=CONSTANTS)
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("backend", DEVICES)
def test_matches_reference(backend, draft, constants):
    """Every dtype, both layouts of draft ids, ragged drafts, placeholders, mixed methods, with and without filters."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    sizes = ((0, 300), (1, 37)) if backend == "triton" else ((0, 3000), (1, 37), (2, 4100), (3, 513))
    check(
        backend,
        (
            sigmoid_batch(
                constants,
                mixed=(seed + DRAFTS.index(draft)) % 2 == 0,
                seed=seed,
                num_drafts=[3, 0, 5, 1] if backend == "triton" else [3, 0, 5, 1, 9, 2, 4, 6],
                vocab_size=vocab,
                dtype=dtypes[(seed + DRAFTS.index(draft)) % 3],
                draft=draft,
                filters=ALL_FILTERS if seed % 2 else (),
                rows_layout=seed % 2 == 0,
            )
            for seed, vocab in sizes
        ),
    )


@pytest.mark.parametrize("draft", DRAFTS)
def test_interpreted_kernels_over_several_tiles(draft):
    case = {"seed": 7, "num_drafts": [2, 1], "vocab_size": 8195, "dtype": torch.bfloat16, "draft": draft}
    check("triton", [sigmoid_batch(PAPER, **case)])


@pytest.mark.parametrize("backend", DEVICES)
@pytest.mark.parametrize("draft", [PROBS, LOGITS])
def test_draft_vocabulary_narrower_than_the_targets(backend, draft):
    batch = sigmoid_batch(PAPER, seed=5, num_drafts=[3] * 5, vocab_size=500, draft=draft, draft_vocab_size=460)
    verified, _ = assert_matches_reference(batch, backend, DEVICES[backend])
    assert verified.token_ids.max() < 460


@pytest.mark.parametrize("backend", DEVICES)
@pytest.mark.parametrize("draft", DRAFTS)
def test_exact_requests_do_not_notice_sigmoid_ones(backend, draft):
    batch = sigmoid_batch(
        PAPER, mixed=True, seed=12, num_drafts=[3, 2, 4, 1, 2, 3], vocab_size=700, draft=draft, temperatures=(1.4,)
    ).to(DEVICES[backend])
    mixed = verify(*batch.args(), **batch.kwargs, backend=backend).token_ids
    flags = batch.kwargs.pop("rule_requests")[batch.kwargs["state_indices"].long()]
    every = verify(*batch.args(), **batch.kwargs, backend=backend).token_ids
    del batch.kwargs["rule"]
    exact = verify(*batch.args(), **batch.kwargs, backend=backend).token_ids
    assert flags.any() and not flags.all()
    assert torch.equal(mixed[~flags], exact[~flags])
    assert torch.equal(mixed[flags], every[flags])
    assert not torch.equal(exact, every)


@pytest.mark.parametrize("backend", DEVICES)
@pytest.mark.parametrize("draft", DRAFTS)
def test_judging_reads_two_numbers(backend, draft):
    """Judged rows that hold NaN everywhere but at the drafted token decide as the whole rows do."""
    batch = sigmoid_batch(
        PAPER, seed=2, num_drafts=[5] * 6, vocab_size=400, draft=draft, temperatures=(1.0,), shuffled_state=False
    )
    batch.draft_token_ids.clamp_(0, 399)
    whole = verify(*batch.to(DEVICES[backend]).args(), **batch.to(DEVICES[backend]).kwargs, backend=backend)
    judged = torch.ones(36, dtype=torch.bool)
    judged[5::6] = False
    token = batch.draft_token_ids.long()[:, None]
    for tensor in [batch.logits] + [batch.kwargs[k] for k in ("draft_probs",) if k in batch.kwargs]:
        rows = tensor[judged] if tensor is batch.logits else tensor
        bare = torch.full_like(rows, float("nan")).scatter(1, token, rows.gather(1, token))
        tensor[judged if tensor is batch.logits else ...] = bare
    if draft == LOGITS:
        table = batch.kwargs["draft_logits"]
        positions = token.view(6, 5, 1)
        batch.kwargs["draft_logits"] = torch.full_like(table, float("nan")).scatter(
            2, positions, table.gather(2, positions)
        )
    bare = verify(*batch.to(DEVICES[backend]).args(), **batch.to(DEVICES[backend]).kwargs, backend=backend)
    assert torch.equal(bare.num_sampled, whole.num_sampled)
    full = whole.num_sampled == 6
    assert full.any() if draft != NO_DRAFT else (whole.num_sampled > 1).any()
    assert torch.equal(bare.token_ids[full], whole.token_ids[full])


def special_rows(vocab_size: int) -> torch.Tensor:
    """NaN, infinities and their mixtures, one row each."""
    nan, inf = float("nan"), float("inf")
    rows = torch.randn(9, vocab_size, generator=torch.Generator().manual_seed(0))
    rows[0] = nan
    rows[1] = -inf
    rows[2, 5:9] = inf
    rows[3, ::2] = nan
    rows[4, 3:] = -inf
    rows[5] = torch.where(torch.arange(vocab_size) % 3 == 0, nan, -inf)
    rows[6, -1] = inf
    rows[7] = 0.0
    return rows


@pytest.mark.parametrize("backend", DEVICES)
@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize(("name", "filtered"), [("paper", False), ("centred", False), ("paper", True)])
def test_rows_that_go_bad(backend, draft, name, filtered):
    """Each special row as the judged, the bonus and the draft's row; ids stay valid and bad rows are counted."""
    vocab_size = 50
    batch = sigmoid_batch(
        CONSTANTS[name],
        seed=9,
        num_drafts=[1] * 18 + [0] * 9,
        vocab_size=vocab_size,
        draft=draft,
        temperatures=(0.8,),
        shuffled_state=False,
    )
    batch.logits[0:18:2] = special_rows(vocab_size)
    batch.logits[36:] = special_rows(vocab_size)
    if draft == PROBS:
        batch.kwargs["draft_probs"][9:18] = special_rows(vocab_size)
    if draft == LOGITS:
        batch.kwargs["draft_logits"][9:18, 0] = special_rows(vocab_size)
    if filtered:
        batch.kwargs |= {
            "top_k": torch.full((27,), 4, dtype=torch.int32),
            "min_p": torch.full((27,), 0.01),
        }
    batch.kwargs["bad_row_counter"] = torch.zeros(1, dtype=torch.int64)
    expected = verify_ref(*batch.args(), **{k: v for k, v in batch.kwargs.items() if k != "bad_row_counter"})
    on_device = batch.to(DEVICES[backend])
    verified = verify(*on_device.args(), **on_device.kwargs, backend=backend)
    assert verified.token_ids.tolist() == expected.token_ids.tolist()
    assert int(on_device.kwargs["bad_row_counter"]) == expected.bad_rows > 0


@pytest.mark.parametrize("backend", DEVICES)
def test_the_only_possible_token_is_emitted_though_rejected(backend):
    """With top-k 1 a rejected one-hot draft leaves no other token; it comes back as the recovered one."""
    logits = torch.zeros(32, 30)
    logits[:, 4] = 1.0
    kwargs = {"temperature": torch.ones(16), "seeds": torch.arange(16), "top_k": torch.ones(16, dtype=torch.int32)}
    args = (logits, torch.arange(0, 34, 2), torch.full((16,), 4))
    args, kwargs = [a.to(DEVICES[backend]) for a in args], {k: v.to(DEVICES[backend]) for k, v in kwargs.items()}
    verified = verify(*args, 1, **kwargs, rule=PAPER, backend=backend)
    rejected = verified.num_sampled == 1
    assert 2 < int(rejected.sum()) < 12
    assert (verified.token_ids[:, 0] == 4).all()


NUM_DRAWS = 40_000


def draws(draft, constants, target, draft_row, token):
    """Outcomes of many requests with one judged row: how many accepted ``token``, and counts of what came instead."""
    vocab_size = len(target)
    kwargs = {"temperature": torch.full((NUM_DRAWS,), 0.7), "seeds": torch.arange(NUM_DRAWS) * 7919}
    if draft == PROBS:
        kwargs["draft_probs"] = draft_row.expand(NUM_DRAWS, vocab_size).contiguous()
    if draft == LOGITS:
        kwargs["draft_logits"] = draft_row.expand(NUM_DRAWS, 1, vocab_size).contiguous()
    logits = target.repeat(2 * NUM_DRAWS, 1)
    cu = torch.arange(0, 2 * NUM_DRAWS + 1, 2)
    drafts = torch.full((NUM_DRAWS,), token)
    verified = verify(logits, cu, drafts, 1, **kwargs, rule=constants, backend="cpu")
    accepted = verified.num_sampled == 2
    recovered = torch.bincount(verified.token_ids[~accepted, 0], minlength=vocab_size)
    bonus = torch.bincount(verified.token_ids[accepted, 1], minlength=vocab_size)
    return int(accepted.sum()), recovered, bonus


def assert_follows(counts: torch.Tensor, law: torch.Tensor):
    """Chi-square at about one in a million; nothing outside the support."""
    assert (counts[law == 0] == 0).all()
    expected = (law / law.sum() * counts.sum())[law > 0]
    statistic = float(((counts[law > 0] - expected) ** 2 / expected).sum())
    freedom = int((law > 0).sum()) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 12


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("name", ["paper", "unit", "centred"])
def test_law_by_formula(draft, name):
    """Acceptance min(1, target score / draft score), residual max(difference, 0), bonus from the target's softmax."""
    constants = CONSTANTS[name] if name != "centred" else SigmoidConstants(1.0, 2.0, 0.5, 1.5, clip=False)
    target = torch.tensor([1.0, -1.0, 2.0, 0.5, -2.0, 0.0, -math.inf])
    draft_logits = torch.tensor([2.0, 0.5, -1.0, 0.5, 1.0, -3.0, 1.0])
    token, temperature = 4, 0.7

    def score(scaled, alpha, beta):
        values = ((scaled.double() - alpha) / (beta - alpha)).sigmoid()
        return torch.where(scaled < alpha, 0.0, torch.where(scaled > beta, 1.0, values)) if constants.clip else values

    scaled = draft_logits / temperature
    law = (target / temperature).double().softmax(0)
    target_score = score(target / temperature, constants.target_alpha, constants.target_beta)
    if draft == NO_DRAFT:
        draft_row, accept, residual = None, float(target_score[token]), law.clone()
        residual[token] = 0
    else:
        draft_row = draft_logits if draft == LOGITS else scaled.softmax(0)
        of = scaled if draft == LOGITS else scaled.log_softmax(0)
        draft_score = score(of, constants.draft_alpha, constants.draft_beta)
        accept = min(1.0, float(target_score[token] / draft_score[token]))
        residual = (target_score - draft_score).clamp(min=0)
    accepted, recovered, bonus = draws(draft, constants, target, draft_row, token)
    assert abs(accepted - accept * NUM_DRAWS) <= 5 * math.sqrt(NUM_DRAWS * accept * (1 - accept)) + 3
    if recovered.sum() > 200:
        assert_follows(recovered, residual)
    if bonus.sum() > 200:
        assert_follows(bonus, law)
    assert name == "paper" or recovered.sum() > 200


def test_what_the_papers_constants_accept():
    """A ten-nat disagreement passes with probability 0.9998; only what is ruled out is rejected."""
    logits = torch.tensor([0.0, 10.0, -math.inf, math.inf, math.nan])
    scores, *_ = sigmoid_score_ref(logits, 1.0, -1e4, 1e4, True)
    assert scores[:2].tolist() == pytest.approx([0.622459, 0.622577], abs=1e-6)
    assert float(scores[0] / scores[1]) == pytest.approx(0.99981, abs=1e-5)
    assert scores[2:].tolist() == [0.0, 1.0, 0.0]
    batch = sigmoid_batch(
        PAPER, seed=1, num_drafts=[8] * 250, vocab_size=64, draft=LOGITS, temperatures=(1.0,), shuffled_state=False
    )
    # Drafts of a model that has nothing to do with the target.
    batch.draft_token_ids = torch.randint(64, (2000,), generator=torch.Generator().manual_seed(1))
    exact = {k: v for k, v in batch.kwargs.items() if k != "rule"}
    rate = {
        name: float((verify(*batch.args(), **kwargs, backend="cpu").num_sampled - 1).sum()) / 2000
        for name, kwargs in (("sigmoid", batch.kwargs), ("exact", exact))
    }
    assert rate["sigmoid"] > 0.99 > 0.6 > rate["exact"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rule_requests": torch.ones(2, dtype=torch.bool)}, "rule is None, expected a rule's constants"),
        (
            {"rule": PAPER, "rule_requests": torch.ones(2)},
            "rule_requests has dtype float32, expected one of bool",
        ),
        (
            {"rule": PAPER, "rule_requests": torch.ones(3, dtype=torch.bool)},
            "rule_requests has length 3, expected 2",
        ),
        ({"rule": SigmoidConstants(1.0, 1.0, 0.0, 1.0)}, "target_alpha 1.0 and target_beta 1.0"),
        ({"rule": SigmoidConstants(0.0, 1.0, 0.0, math.inf)}, "draft_alpha 0.0 and draft_beta inf"),
    ],
)
def test_wrong_argument(arguments, message):
    batch = random_batch(seed=1, num_drafts=[2, 3], vocab_size=20, shuffled_state=False)
    with pytest.raises(ValueError, match=message):
        verify(*batch.args(), **batch.kwargs, **arguments)
