"""Rules and warm-up of the V2 adapter on hand-built steps."""

import pytest
import torch
from engine.v2_steps import (
    COUNTS,
    CPU,
    MIXED,
    PLAIN,
    PROCESSED,
    SLOTS,
    VOCAB,
    Step,
    assert_follows,
    sampling,
)
from support.launch_keys import recorded, unexpected
from vllm.v1.worker.gpu.spec_decode import rejection_sampler as stock

from vllm_specopt.integration.config import SpecoptConfig
from vllm_specopt.integration.metrics import Account
from vllm_specopt.integration.v2_sampler import Sampler as PlainSampler
from vllm_specopt.rules import PAPER, BlockConstants, BudgetConstants, TypicalConstants


@pytest.mark.parametrize(
    ("rule", "draft"),
    [
        (PAPER, False),
        (PAPER, True),
        (BlockConstants(), True),
        (TypicalConstants(0.3, 0.6), True),
        (BudgetConstants(0.3), False),
    ],
    ids=["sigmoid one-hot", "sigmoid", "block", "typical", "budget"],
)
@pytest.mark.parametrize("by_request", [False, True], ids=["all", "by-request"])
@pytest.mark.parametrize("dicts", [PLAIN, MIXED], ids=["plain", "filters"])
def case_rules_equal_reference_token_for_token(rule, draft, by_request, dicts):
    """Requests in slots of odd index ask for the rule, or all requests get it."""
    asking = {"extra_args": {"specopt": rule.NAME}} if by_request else {}
    chosen = [d | (asking if i % 2 else {}) for i, d in enumerate(dicts)]
    params = sampling(chosen, seed=2)
    step = Step(params, COUNTS, seed=2)
    config = SpecoptConfig("exact" if by_request else rule.NAME, rule=rule, allow_per_request=by_request)

    lists, _ = step.run(step.configured(config), draft)
    flags = torch.zeros(SLOTS, dtype=torch.bool)
    flags[step.slots.long()] = torch.tensor(["extra_args" in d for d in chosen])
    reference = step.reference(draft=draft, rule=rule, rule_requests=flags if by_request else None)
    assert_follows(lists, reference)


@pytest.mark.parametrize(
    ("choice", "draft", "pad"),
    [
        ("exact", False, 0),
        ("exact", True, 5),
        ("per-request", False, 5),
        ("block", True, 5),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ("exact", True, 0),
                ("sigmoid", True, 5),
                ("per-request", True, 0),
                ("typical", True, 0),
                ("budget", False, 5),
            )
        ),
    ],
)
def case_warm_up_launches_what_serving_does(monkeypatch, choice, draft, pad):
    """By what Triton would compile for each launch; among them chunks whose small tensors start at any element."""
    by_choice = choice == "per-request"
    constants = {"exact": None, "block": BlockConstants(), "typical": TypicalConstants(0.3, 0.6)}.get(choice, PAPER)
    constants = BudgetConstants(0.3) if choice == "budget" else constants
    config = SpecoptConfig("exact" if by_choice else choice, rule=constants, allow_per_request=by_choice)
    asking = {"extra_args": {"specopt": "sigmoid"}} if by_choice else {}

    greedy, sampled, penalised = {"temperature": 0.0}, {"temperature": 1.0}, PROCESSED["penalties"]
    more = [{}, penalised, *([asking, penalised | asking] if asking else [])]
    with recorded(run=False) as served:
        for chunk in (100, 9, 5, 1):
            monkeypatch.setattr(stock, "MAX_CHUNK_BYTES", chunk * VOCAB * 4)
            for dicts in ([greedy] * 6, [sampled] * 6, PLAIN, MIXED):
                for also in more[: 1 if chunk == 100 else None]:
                    params = sampling([d | (also if i % 2 else {}) for i, d in enumerate(dicts)])
                    step = Step(params, COUNTS, pad=pad)
                    step.run(step.configured(config), draft)
    with recorded() as warmed:
        example = torch.zeros(3, VOCAB + pad, dtype=torch.bfloat16)[:, :VOCAB]
        step.rejection_sampler.warm_up(example, step.draft_logits if draft else None)
    expected = {"statistics_kernel", "decide_kernel"} | ({"residual_kernel"} if draft else set())
    assert {name for name, *_ in warmed} == expected
    assert not unexpected(served, warmed), "compiles while serving"
    if pad:
        # Without padding, rows after the first start at 16 bytes or not, and these few steps lack some of the cases.
        assert not unexpected(warmed, served), "compiled in vain"
    assert not step.rejection_sampler.account.counters.any(), "the dummy requests were counted"


@pytest.mark.parametrize("pad", [0, 5])
def case_warm_up_launches_what_draws_without_drafts_do(pad):
    with recorded(run=False) as served:
        for dicts in ([{"temperature": 0.0}] * 6, PLAIN, MIXED):
            for also in ({}, PROCESSED["penalties"]):
                params = sampling([d | (also if i % 2 else {}) for i, d in enumerate(dicts)])
                Step(params, [0] * 6, pad=pad).draw()
    step = Step(sampling(PLAIN), [0] * 6, pad=pad)
    ours = PlainSampler(step.sampler, Account(CPU))
    with recorded() as warmed:
        ours.warm_up(torch.zeros(3, VOCAB + pad, dtype=torch.bfloat16)[:, :VOCAB])
    assert not unexpected(served, warmed), "compiles while serving"
    assert not unexpected(warmed, served), "compiled in vain"
    assert not ours.account.bad_rows.any() and not ours.account.counters.any(), "the dummy requests were counted"
