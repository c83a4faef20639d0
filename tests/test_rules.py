"""Block, typical and budget: both backends against the float64 reference, what each promises, and the registry."""

import math
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from proof import enumeration

import vllm_specopt
from vllm_specopt.cpu import plan
from vllm_specopt.kernels import constants
from vllm_specopt.kernels.reference import verify_ref
from vllm_specopt.kernels.reference.budget import bernoulli_kl_ref, budget_test_ref, kept_probability_ref
from vllm_specopt.kernels.reference.typical import typical_threshold_ref
from vllm_specopt.rules import PAPER, RULES, SPENT_UNIT, BlockConstants, BudgetConstants, TypicalConstants, place_of
from vllm_specopt.testing import LOGITS, NO_DRAFT, PROBS, assert_matches_reference, random_batch
from vllm_specopt.verify import verify

DEVICES = {"cpu": "cpu", "triton": "cuda" if torch.cuda.is_available() else "cpu"}
ALL_FILTERS = ("top_k", "top_p", "min_p")
DRAFTS = (NO_DRAFT, PROBS, LOGITS)
GIVEN = {"block": BlockConstants(), "typical": TypicalConstants(0.3, 0.6), "budget": BudgetConstants(0.2)}
CASES = [
    (rule, draft) for rule in GIVEN for draft in DRAFTS if (rule, draft) not in (("budget", PROBS), ("budget", LOGITS))
]
# Of all requests below, the largest share that a reference margin may exclude: 2e-5 V of all draws from flat rows.
MAX_EXCLUDED = 0.03


def rule_batch(name, *, flags=None, **case):
    """A batch under a rule; flags: ``mixed``, or ``deltas`` of each request's own."""
    batch = random_batch(**case)
    batch.kwargs["rule"] = GIVEN[name]
    draws = torch.rand(len(batch.kwargs["temperature"]), generator=torch.Generator().manual_seed(case["seed"]))
    if flags == "mixed":
        batch.kwargs["rule_requests"] = draws < 0.6
    elif flags == "deltas":
        batch.kwargs["rule_requests"] = (draws - 0.4).clamp(min=0)
    return batch


@pytest.mark.parametrize(("name", "draft"), CASES)
@pytest.mark.parametrize("backend", DEVICES)
def test_matches_reference(backend, name, draft):
    """Every dtype, both layouts of draft ids, ragged drafts, placeholders, mixed rules, with and without filters."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    sizes = ((0, 300), (1, 37)) if backend == "triton" else ((0, 900), (1, 37), (2, 1100), (3, 513), (4, 300), (5, 64))
    excluded = total = 0
    for seed, vocab in sizes:
        batch = rule_batch(
            name,
            flags=(None, "mixed", "deltas" if name == "budget" else None)[(seed + DRAFTS.index(draft)) % 3],
            seed=seed,
            num_drafts=[3, 0, 5, 1] if backend == "triton" else [3, 0, 5, 1, 9, 2, 4, 6],
            vocab_size=vocab,
            dtype=dtypes[(seed + DRAFTS.index(draft)) % 3],
            draft=draft,
            filters=ALL_FILTERS if seed % 2 else (),
            rows_layout=seed % 2 == 0,
        )
        _, close = assert_matches_reference(batch, backend, DEVICES[backend])
        excluded, total = excluded + close, total + batch.num_reqs
    assert excluded <= max(1, MAX_EXCLUDED * total)


@pytest.mark.parametrize(("name", "draft"), [("block", LOGITS), ("block", PROBS), ("typical", NO_DRAFT)])
def test_interpreted_kernels_over_several_tiles(name, draft):
    case = {"seed": 7, "num_drafts": [2, 1], "vocab_size": 8195, "dtype": torch.bfloat16, "draft": draft}
    assert_matches_reference(rule_batch(name, **case), "triton", DEVICES["triton"])


@pytest.mark.parametrize("backend", DEVICES)
@pytest.mark.parametrize("draft", [PROBS, LOGITS])
def test_blocks_with_a_narrower_draft_vocabulary_and_given_bonus_tokens(backend, draft):
    batch = rule_batch("block", seed=5, num_drafts=[3] * 6, vocab_size=500, draft=draft, draft_vocab_size=460)
    batch.kwargs["bonus_token_ids"] = torch.arange(6, dtype=torch.int32)
    verified, _ = assert_matches_reference(batch, backend, DEVICES[backend])
    assert verified.token_ids.max() < 460


@pytest.mark.parametrize("backend", DEVICES)
@pytest.mark.parametrize("draft", [PROBS, LOGITS])
def test_blocks_in_rows_without_a_usable_logit(backend, draft):
    """The target's row, the draft's, and one with +inf; nothing is emitted that the reference does not emit."""
    batch = rule_batch("block", seed=6, num_drafts=[4] * 8, vocab_size=120, draft=draft, temperatures=(1.0,))
    batch.logits[2::5] = -math.inf
    batch.logits[6::10] = math.nan
    batch.logits[9, 17] = math.inf
    if draft == LOGITS:
        batch.kwargs["draft_logits"][3, 1] = -math.inf
    else:
        batch.kwargs["draft_probs"][7] = 0
    counter = torch.zeros(1, dtype=torch.int64)
    batch.kwargs["bad_row_counter"] = counter
    on_device = batch.to(DEVICES[backend])
    assert_matches_reference(on_device.to("cpu"), backend, DEVICES[backend])
    verify(*on_device.args(), **on_device.kwargs, backend=backend)
    reference = verify_ref(*batch.args(), **{k: v for k, v in batch.kwargs.items() if k != "bad_row_counter"})
    assert int(on_device.kwargs["bad_row_counter"]) > 0 and reference.bad_rows > 0


@pytest.mark.parametrize("backend", DEVICES)
def test_blocks_of_chosen_drafts_are_verified_exactly(backend):
    batch = random_batch(seed=3, num_drafts=[3, 0, 2, 5], vocab_size=90, filters=ALL_FILTERS).to(DEVICES[backend])
    found = []
    for rule in (None, BlockConstants()):
        counters = torch.zeros(len(RULES), 8, dtype=torch.int64, device=DEVICES[backend])
        verified = verify(*batch.args(), **batch.kwargs, rule=rule, counters=counters, backend=backend)
        found.append((verified, counters))
    (exact, counted), (block, counted_too) = found
    assert torch.equal(exact.token_ids, block.token_ids) and torch.equal(exact.num_sampled, block.num_sampled)
    assert torch.equal(counted, counted_too)


@pytest.mark.parametrize("backend", DEVICES)
@pytest.mark.parametrize(
    ("name", "draft"), [("block", PROBS), ("block", LOGITS), ("typical", LOGITS), ("budget", NO_DRAFT)]
)
def test_exact_requests_do_not_notice_others(backend, name, draft):
    batch = rule_batch(
        name, flags="mixed", seed=12, num_drafts=[3, 2, 4, 1, 2, 3], vocab_size=300, draft=draft, temperatures=(1.4,)
    ).to(DEVICES[backend])
    mixed = verify(*batch.args(), **batch.kwargs, backend=backend).token_ids
    flags = batch.kwargs.pop("rule_requests")[batch.kwargs["state_indices"].long()]
    every = verify(*batch.args(), **batch.kwargs, backend=backend).token_ids
    del batch.kwargs["rule"]
    exact = verify(*batch.args(), **batch.kwargs, backend=backend).token_ids
    assert flags.any() and not flags.all()
    assert torch.equal(mixed[~flags], exact[~flags])
    assert torch.equal(mixed[flags], every[flags])


@pytest.mark.parametrize("kind", [kind for kind in enumeration.KINDS if kind != "chosen drafts"])
@pytest.mark.parametrize(("vocab_size", "num_drafts"), enumeration.SHAPES)
def test_blocks_are_lossless_and_keep_as_many_drafts_as_one_chain_can(kind, vocab_size, num_drafts):
    assert enumeration.total_variation(kind, vocab_size, num_drafts, by_block=True) <= enumeration.BOUND
    by_token, kept, optimum = enumeration.accepted_lengths(kind, vocab_size, num_drafts)
    assert kept >= by_token - 1e-12
    assert kept == pytest.approx(optimum, abs=1e-12)


def test_a_prefix_that_failed_is_tested_by_another_number_in_the_next_step():
    """Else what failed here would fail again, and the text would lean away from the drafts."""
    from vllm_specopt.kernels.reference.noise import PREFIX, acceptance_uniform_ref

    in_this_step = {acceptance_uniform_ref(5, 40, PREFIX + length) for length in range(1, 129)}
    in_the_next = {acceptance_uniform_ref(5, 41, PREFIX + length) for length in range(1, 129)}
    assert len(in_this_step | in_the_next) == 256


@pytest.mark.parametrize("delta", [0.0, 0.01, 0.2, 3.0])
def test_a_budget_is_kept_and_used_up(delta):
    """For every token: acceptance is h, nothing else changes, and the divergence is the budget, or all there is."""
    gen = torch.Generator().manual_seed(3)
    target = (torch.randn(6, generator=gen, dtype=torch.float64) * 2).softmax(0)
    for token, prob in enumerate(target.tolist()):
        kept = kept_probability_ref(prob, delta)
        spent = bernoulli_kl_ref(kept, prob)
        assert prob <= kept <= 1 and spent <= delta + 1e-12
        assert kept == 1.0 or spent == pytest.approx(delta, abs=1e-9)
        emitted = torch.where(torch.arange(6) == token, kept, target * (1 - kept) / (1 - prob))
        assert float((emitted * (emitted / target).log()).nan_to_num(0.0).sum()) <= delta + 1e-12


@pytest.mark.parametrize("backend", ["cpu"])
def test_a_budget_emits_what_it_promises(backend):
    """Of 40,000 requests with one draft token: the distribution, and what the counter says was spent."""
    requests, vocab, delta = 40_000, 7, 0.15
    row = torch.randn(vocab, generator=torch.Generator().manual_seed(1)) * 1.5
    target, token = row.double().softmax(0), 4
    counters = torch.zeros(len(RULES), 8, dtype=torch.int64)
    verified = verify(
        row.expand(2 * requests, -1),
        torch.arange(0, 2 * requests + 1, 2, dtype=torch.int32),
        torch.full((requests,), token),
        1,
        temperature=torch.ones(requests),
        seeds=torch.arange(requests),
        rule=BudgetConstants(delta),
        counters=counters,
        backend=backend,
    )
    prob = float(target[token])
    kept = kept_probability_ref(prob, delta)
    expected = torch.where(torch.arange(vocab) == token, kept, target * (1 - kept) / (1 - prob))
    found = verified.token_ids[:, 0].bincount(minlength=vocab) / requests
    assert ((found - expected).abs() < 5 * (expected * (1 - expected) / requests).sqrt()).all()
    assert int(counters[place_of(BudgetConstants(delta)), 5]) * SPENT_UNIT == pytest.approx(delta * requests, rel=1e-4)


def test_without_a_budget_nothing_differs_from_exact():
    batch = random_batch(seed=4, num_drafts=[3] * 8, vocab_size=50)
    exact = verify(*batch.args(), **batch.kwargs).token_ids
    assert torch.equal(verify(*batch.args(), **batch.kwargs, rule=BudgetConstants(0.0)).token_ids, exact)
    target = torch.tensor([0.5, 0.5], dtype=torch.float64)
    assert all(budget_test_ref(target, 0, seed, 0, 1e9)[0] is None for seed in range(50))


def test_typical_keeps_what_is_probable_and_lets_the_row_decide_on_the_rest():
    batch = random_batch(
        seed=8, num_drafts=[1] * 60, vocab_size=40, temperatures=(1.0,), shuffled_state=False, draft=PROBS
    )
    batch.draft_token_ids.clamp_(0, 39)
    given = TypicalConstants(0.25, 0.5)
    typical = verify(*batch.args(), **batch.kwargs, rule=given)
    del batch.kwargs["draft_probs"]
    by_row = verify(*batch.args(), **batch.kwargs)
    probs = batch.logits[::2].double().softmax(1)
    tokens = batch.draft_token_ids.long()
    is_probable = torch.tensor(
        [float(row[token]) > typical_threshold_ref(row, 0.25, 0.5) for row, token in zip(probs, tokens, strict=True)]
    )
    assert is_probable.any() and not is_probable.all()
    assert (typical.num_sampled[is_probable] == 2).all()
    assert torch.equal(typical.token_ids[~is_probable], by_row.token_ids[~is_probable])


def test_every_rule_has_its_number_and_its_files():
    package = Path(vllm_specopt.__file__).parent
    for place, (name, rule) in enumerate(RULES.items()):
        assert getattr(constants, name.upper()).value == getattr(plan, name.upper()) == place
        assert rule.name == name and (rule.constants is None or name == rule.constants.NAME)
        for folder in ("kernels/rules", "kernels/reference", "cpu/rules"):
            home = Path(vllm_specopt.kernels.__path__[-1]).parent if folder.startswith("kernels") else package
            assert (home / folder / f"{name}.py").is_file()
    assert fields(BlockConstants) == () and place_of(PAPER) == 1 and place_of(None) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": BudgetConstants(-0.1)}, "expected a finite delta of at least 0"),
        ({"rule": BudgetConstants(math.nan)}, "expected a finite delta of at least 0"),
        ({"rule": TypicalConstants(1.5, 0.1)}, "expected epsilon from 0 to 1"),
        ({"rule": BudgetConstants(0.1), "draft_probs": torch.zeros(2, 9)}, "draft_probs is given, expected None"),
        ({"rule": BlockConstants(), "rule_requests": torch.ones(2)}, "rule_requests has dtype float32"),
        ({"rule_requests": torch.ones(2, dtype=torch.bool)}, "rule is None, expected a rule's constants"),
        ({"counters": torch.zeros(2, 8, dtype=torch.int64)}, "counters has 2 rows, expected at least 5"),
    ],
)
def test_bad_input_is_one_sentence(changes, message):
    arguments = (torch.zeros(4, 9), torch.tensor([0, 2, 4]), torch.zeros(2, dtype=torch.int64), 1)
    keywords = {"temperature": torch.ones(2), "seeds": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message) as error:
        verify(*arguments, **(keywords | changes))
    assert "\n" not in str(error.value)
