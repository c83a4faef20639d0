"""The small form of ``make prove``, and tests of the proofs themselves: what is wrong must be caught."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from proof import biased, determinism, enumeration, fuzz, jobs, rounding
from proof import command as proof_command
from proof.cases import make_cases
from proof.draws import STATISTICS, backend_verifier, draw_case, independent_drafter, judge_case, make_step
from proof.equality import compare_case
from proof.judgement import judge, pool, variation_bound
from proof.report import condensed, load, merge

from vllm_specopt.kernels.reference.noise import (
    ACCEPTANCE,
    DRAW,
    RESIDUAL,
    acceptance_uniform_ref,
    draw_uniform_ref,
    philox_ref,
)
from vllm_specopt.testing import LOGITS, NO_DRAFT, PROBS

DRAWS = 20_000
CASES = make_cases()
ALPHA = jobs.alpha_per_test(len(CASES))
TRITON_DEVICE = jobs.device_of("triton")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with np.errstate(all="ignore"):
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_cpu_backend_has_the_target_distribution(case):
    counts = draw_case(case, backend_verifier("cpu"), DRAWS, seed=11)
    for statistic, judgement in judge_case(case, counts, ALPHA).items():
        assert judgement.draws >= DRAWS
        assert judgement.passed, f"{statistic}: {judgement}"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_triton_backend_has_the_target_distribution(case):
    counts = draw_case(case, backend_verifier("triton", "cuda"), DRAWS, seed=11)
    for statistic, judgement in judge_case(case, counts, ALPHA).items():
        assert judgement.passed, f"{statistic}: {judgement}"


@pytest.mark.parametrize(("rule", "case"), [(name, case) for name, rule in biased.RULES.items() for case in rule.cases])
def test_biased_rules_are_caught(rule, case):
    """By the same draws, limits and cases that the correct rule passes."""
    case = next(known for known in CASES if known.name == case)
    judgements = judge_case(case, draw_case(case, biased.rule_verifier(rule, 1), DRAWS, 5), ALPHA)
    assert all(judgement.passed for judgement in judgements.values()) == (rule == "correct"), judgements


def test_every_case_of_a_biased_rule_is_one_of_the_correct_rule():
    assert {case for rule in biased.RULES.values() for case in rule.cases} == set(biased.RULES["correct"].cases)


@pytest.mark.parametrize(
    ("name", "case"), [(name, case) for name, shared in biased.SHARED_NOISE.items() for case in shared.cases]
)
def test_drafters_that_share_the_verifiers_noise(name, case):
    """The verifier is the real one and the drafts have the right distribution; only their independence is missing.

    Of sampled drafts that must be seen. One-hot drafts have no part in which tokens come out: only more are accepted.
    """
    case, shared = next(known for known in CASES if known.name == case), biased.SHARED_NOISE[name]
    drafter = biased.sharing_drafter(shared.purpose)
    judgements = judge_case(case, draw_case(case, backend_verifier("cpu"), DRAWS, 5, drafter), ALPHA)
    assert all(judgements[statistic].passed for statistic in jobs.TOKENS) != shared.caught, judgements
    rng, seeds, positions = np.random.default_rng(0), np.arange(DRAWS), np.full(DRAWS, 5)
    drafts = drafter(case, 0, np.zeros(DRAWS, np.int64), seeds, positions, rng)
    drafted = judge(np.bincount(drafts, minlength=case.vocab_size), case.draft_probs[0, 0], ALPHA)
    assert drafted.passed, drafted


def test_uniforms_on_arrays_are_those_of_the_reference():
    seeds, positions = np.array([-5, 2**62, 7]), np.array([0, 2**35, 19])
    for purpose in (DRAW, ACCEPTANCE, RESIDUAL):
        words = np.stack(biased.philox_words(seeds, positions, purpose), 1)
        uniforms = biased.uniforms_of(seeds, positions, purpose)
        for row, (seed, position) in enumerate(zip(seeds.tolist(), positions.tolist(), strict=True)):
            assert tuple(words[row].tolist()) == philox_ref(seed, position, purpose)[:2]
            if purpose == ACCEPTANCE:
                assert uniforms[row] == acceptance_uniform_ref(seed, position)
            else:
                assert uniforms[row] == draw_uniform_ref(seed, position, purpose)


@pytest.mark.parametrize("kind", enumeration.KINDS)
@pytest.mark.parametrize(("vocab_size", "num_drafts"), enumeration.SHAPES)
def test_enumerated_distribution_is_the_targets(kind, vocab_size, num_drafts):
    """Sum over all drafts and outcomes; what is emitted, continued by the target, must have its joint distribution."""
    assert enumeration.total_variation(kind, vocab_size, num_drafts) <= enumeration.BOUND


@pytest.mark.parametrize("vocab_size", [2, 5])
def test_chosen_drafts_are_accepted_with_their_probability(vocab_size):
    assert enumeration.acceptance_error(vocab_size) <= enumeration.BOUND


def test_enumeration_catches_a_biased_rule():
    def recovers_from_target(target, draft, token, uniforms):
        emitted = enumeration.exact_step(target, draft, token, uniforms)
        if draft is None or emitted is None:
            return emitted
        return enumeration.exact_step(target, None, -1, {"draw": uniforms["residual"]})

    def accepts_by_root(target, draft, token, uniforms):
        return enumeration.exact_step(
            target, draft, token, uniforms | {"acceptance": uniforms.get("acceptance", 0) ** 2}
        )

    def draws_twice(target, draft, token, uniforms):
        drawn = enumeration.exact_step(target, draft, token, uniforms)
        if drawn is None or token < 0:
            return drawn
        return enumeration.exact_step(target, draft, -1, {"draw": 1 - uniforms["draw"]})

    for rule in (recovers_from_target, accepts_by_root):
        assert enumeration.total_variation("flat", 3, 3, rule) > 1e-3
    assert enumeration.total_variation("chosen drafts", 3, 3, draws_twice) > 1e-3
    assert enumeration.acceptance_error(3, draws_twice) > 1e-3


@pytest.mark.parametrize(
    ("name", "backend"),
    # The CPU backend's filters are left to `make prove`: here they would be compiled anew.
    [(name, b) for name in rounding.ROWS for b in ("cpu", "triton") if b == "triton" or rounding.top_p_of(name) == 1],
)
def test_rounding_hardly_moves_the_distribution(name, backend):
    """And where a backend draws one token and where the next is asked on both sides of 20 boundaries."""
    found = rounding.implied(name, torch.bfloat16, backend, jobs.device_of(backend), probes=20)
    assert found.distance <= rounding.BOUND
    assert (found.probes, found.wrong) == (40, 0)


@pytest.mark.parametrize("rule", rounding.BIASED)
def test_rounding_that_matters_is_caught(rule):
    _, expected = rounding.distributions("flat", torch.bfloat16)
    assert rounding.total_variation(rounding.BIASED[rule](expected), expected) > 100 * rounding.BOUND


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_known_distributions_add_up(case):
    for distribution in (case.first_distribution(), case.pair_distribution(), case.length_distribution()):
        assert distribution.min() >= 0
        assert distribution.sum() == pytest.approx(1, abs=1e-9)


def test_judge_rejects_and_accepts():
    rng, distribution = np.random.default_rng(0), np.array([0.5, 0.25, 0.125, 0.125, 0.0])
    assert judge(rng.multinomial(100_000, distribution), distribution, 1e-4).passed
    shifted = judge(rng.multinomial(100_000, np.array([0.51, 0.24, 0.125, 0.125, 0.0])), distribution, 1e-4)
    assert shifted.p_value < 1e-4 and not shifted.passed
    outside = judge(np.array([5000, 2500, 1250, 1249, 1]), distribution, 1e-4)
    assert outside.impossible == 1 and not outside.passed


def test_judge_has_its_error_rate():
    """Of 1000 correct samples at 1 %, about ten fail the chi-square test, and hardly any the distance."""
    rng, distribution = np.random.default_rng(1), np.random.default_rng(2).dirichlet(np.ones(40))
    judged = [judge(rng.multinomial(20_000, distribution), distribution, 0.01) for _ in range(1000)]
    assert 2 <= sum(j.p_value < 0.01 for j in judged) <= 24
    assert sum(j.total_variation > j.bound for j in judged) <= 10


def test_pooled_bins_have_enough():
    distribution = np.concatenate([np.full(4, 0.2), np.full(2000, 0.1 / 2000), np.full(5, 0.02), np.zeros(10)])
    bins = pool(distribution, 10_000)
    expected = np.bincount(bins, distribution * 10_000)
    assert expected.min() >= 25 and len(expected) > 10
    assert variation_bound(distribution, 10_000, 1e-3) < variation_bound(distribution, 1_000, 1e-3)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("place", range(1, len(CASES), 9))
def test_cases_equal_the_reference(backend, place):
    result = compare_case(CASES[place], backend, jobs.device_of(backend), 40 if backend == "cpu" else 3, seed=place)
    assert result.close <= 2


def test_greedy_batch_mates_are_checked():
    case = next(case for case in CASES if case.greedy_every)
    real = backend_verifier("cpu")

    def wrong(step):
        token_ids, num_sampled = real(step)
        greedy = step.greedy.nonzero()[0]
        token_ids[greedy[0], 0] = (token_ids[greedy[0], 0] + 1) % case.vocab_size
        return token_ids, num_sampled

    with pytest.raises(AssertionError, match="did not get its argmax"):
        draw_case(case, wrong, 1000, 0)


plans = st.builds(
    fuzz.Plan,
    value_seed=st.integers(0, 2**62),
    num_drafts=st.one_of(
        st.lists(st.integers(0, 5), min_size=1, max_size=5), st.lists(st.integers(0, 128), min_size=1, max_size=1)
    ).map(tuple),
    vocab=st.one_of(st.integers(1, 9), st.integers(1, 600), st.sampled_from([511, 512, 513, 1025, 4097])),
    draft_vocab=st.just(0),
    dtype=st.sampled_from(fuzz.DTYPES),
    draft_dtype=st.sampled_from(fuzz.DTYPES),
    draft=st.sampled_from([NO_DRAFT, PROBS, LOGITS]),
    spread=st.sampled_from([0.0, 0.3, 1.0, 2.5, 6.0]),
    ties=st.booleans(),
    poison=st.sampled_from([0.0, 0.0, 0.02, 0.3, 0.9]),
    improper=st.booleans(),
    same=st.booleans(),
    by_row=st.booleans(),
    state=st.booleans(),
    positions=st.booleans(),
    greedy=st.sampled_from(["mixed", "none", "all", "no temperature"]),
    bonus=st.booleans(),
    filters=st.lists(st.sampled_from(["top_k", "top_p", "min_p"]), unique=True).map(tuple),
    pad=st.sampled_from([0, 1, 24]),
    skip=st.sampled_from([0, 3]),
    index_bits=st.integers(0, 63),
    extra_width=st.sampled_from([0, 1, 9]),
)
draft_widths = st.sampled_from([-7, -1, 0, 0, 0, 5])


@settings(max_examples=250, deadline=None, derandomize=True)
@given(plan=plans, wider=draft_widths)
def test_cpu_backend_on_any_batch(plan, wider):
    plan = replace(plan, draft_vocab=max(1, plan.vocab + wider))
    fuzz.check_plan(plan, "cpu", "cpu", fuzz.FuzzResult())


@settings(max_examples=15, deadline=None, derandomize=True)
@given(plan=plans, wider=draft_widths)
def test_triton_backend_on_any_batch(plan, wider):
    short = tuple(min(k, 3) for k in plan.num_drafts[:2])
    plan = replace(plan, draft_vocab=max(1, plan.vocab + wider), num_drafts=short)
    fuzz.check_plan(plan, "triton", TRITON_DEVICE, fuzz.FuzzResult())


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_long_run_in_small(backend):
    result = fuzz.fuzz(1, range(200 if backend == "cpu" else 8), backend, jobs.device_of(backend))
    assert result.batches == (200 if backend == "cpu" else 8) and result.emitted > result.batches


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("dtype", fuzz.DTYPES, ids=str)
def test_rows_beyond_two_to_the_31_elements(backend, dtype):
    plan = replace(fuzz.random_plan(0, 0, backend), num_drafts=(2, 1), vocab=37, draft_vocab=37, dtype=dtype, far=True)
    batch = fuzz.build(plan)
    assert batch.logits.stride(0) * (batch.logits.shape[0] - 1) >= 2**31
    fuzz.check_plan(plan, backend, jobs.device_of(backend), fuzz.FuzzResult())


def test_fuzzing_reaches_every_corner():
    """The long run's plans hold every form at least once in a thousand."""
    seen = [fuzz.random_plan(0, index, "cpu") for index in range(2000)]
    for name in ("ties", "improper", "same", "far", "by_row", "state", "bonus", "poison"):
        assert sum(bool(getattr(plan, name)) for plan in seen) >= 2, name
    assert {plan.draft for plan in seen} == {NO_DRAFT, PROBS, LOGITS}
    assert {plan.dtype for plan in seen} == set(fuzz.DTYPES)
    assert min(plan.vocab for plan in seen) == 1 and max(plan.vocab for plan in seen) > 1000
    assert min(max(plan.num_drafts) for plan in seen) == 0 and max(max(plan.num_drafts) for plan in seen) > 100


def test_a_failing_batch_says_how_to_repeat_it(monkeypatch):
    def fail(*_):
        raise AssertionError("token 3 instead of 4")

    monkeypatch.setattr(fuzz, "check_plan", fail)
    with pytest.raises(AssertionError, match=r"instead of 4(.|\n)*run.py --seed 9 --batch 2 --backend cpu"):
        fuzz.fuzz(9, range(2, 4), "cpu", "cpu")
    assert proof_command.main(["--seed", "9", "--batch", "2"]) == 1


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("change", determinism.CHANGES)
def test_tokens_do_not_depend_on(change, backend):
    result = determinism.check_batches(
        change, 2, range(30 if backend == "cpu" else 2), backend, jobs.device_of(backend)
    )
    assert result.requests


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("kind", determinism.DRAFTS)
def test_tokens_do_not_depend_on_one_hot_drafts(kind, backend):
    """With any drafts, step by step, a request gets the tokens that it gets without speculation."""
    count = 100 if backend == "cpu" else 2
    assert determinism.check_drafts(kind, 2, range(count), backend, jobs.device_of(backend)).requests == 2 * count


def test_tokens_do_not_depend_on_the_number_of_threads():
    assert determinism.check_threads(2, range(3)).requests == 12


def test_determinism_check_catches_a_change(monkeypatch):
    """A verifier whose draws depend on the place in the batch must be noticed."""
    real = determinism.verify

    def by_place(*args, **kwargs):
        if kwargs.get("seeds") is not None:
            kwargs["seeds"] = kwargs["seeds"] + len(args[1])
        return real(*args, **kwargs)

    monkeypatch.setattr(determinism, "verify", by_place)
    with pytest.raises(AssertionError, match="tokens changed with more batch mates"):
        determinism.check_batches("more batch mates", 2, range(40), "cpu", "cpu")


def test_drafts_check_catches_a_draw_that_depends_on_them(monkeypatch):
    real = determinism.verify

    def by_drafts(*args, **kwargs):
        if kwargs.get("seeds") is not None and len(args[2]):
            kwargs["seeds"] = kwargs["seeds"] + int(args[2][0])
        return real(*args, **kwargs)

    monkeypatch.setattr(determinism, "verify", by_drafts)
    with pytest.raises(AssertionError, match="tokens changed with any drafts"):
        determinism.check_drafts("any drafts", 2, range(40), "cpu", "cpu")


def test_second_steps_read_the_next_position():
    case = CASES[0]
    rng, seeds = np.random.default_rng(0), np.arange(4)
    step = make_step(case, 1, np.array([0, 1, 0, 1]), seeds, np.full(4, 18), rng, independent_drafter)
    batch = step.batch()
    rows = case.num_drafts + 1
    assert torch.equal(batch.logits[rows], case.target[1, 1])
    assert batch.kwargs["positions"][:rows].tolist() == list(range(18, 18 + rows))


def test_run_writes_its_report_and_resumes(tmp_path, capsys, monkeypatch):
    path = tmp_path / "prove.json"
    arguments = ["--quick", "--only", "enumeration", "--workers", "1", "--report", str(path)]
    assert proof_command.main(arguments) == 0
    record = json.loads(path.read_text())
    of_blocks = [f"block: {kind}" for kind in (*enumeration.KINDS, jobs.KEPT) if kind != "chosen drafts"]
    assert [row["case"] for row in record["rows"]] == [*enumeration.KINDS, jobs.ACCEPTANCE, *of_blocks]
    assert "11 of 11 hold" in capsys.readouterr().out
    record["rows"][0] |= {"passed": False, "total_variation": 0.25, "note": "biased"}
    path.write_text(json.dumps(record))
    rows = load(path, {"quick": True, "seed": 0})
    assert len(rows) == 10, "a failed row is run again"
    monkeypatch.setattr(proof_command, "run", lambda *_: [jobs.Row(**row) for row in record["rows"]])
    assert proof_command.main(arguments) == 1
    assert '"why": "biased"' in capsys.readouterr().out


def test_only_as_many_draws_as_boundaries_explain_may_be_too_close():
    job = jobs.Job("equality", "triton", "a case")
    assert not jobs._counted(job, 750, "requests", 750, 67).passed
    assert jobs._counted(job, 750, "requests", 750, 67, near=60.0).passed
    assert not jobs._counted(job, 750, "requests", 750, 76, near=60.0).passed


def test_chunks_of_one_row_are_added_up():
    rows = [
        jobs.Row("fuzz", "random batches", "cpu", 10, "batches", extra={"close": 1, "requests": 30}, job="a"),
        jobs.Row("fuzz", "random batches", "cpu", 12, "batches", extra={"close": 2, "requests": 40}, job="b"),
        jobs.Row("fuzz", "random batches", "triton", 5, "batches", passed=False, note="no", job="c"),
    ]
    cpu, triton = merge(rows)
    assert (cpu.draws, cpu.passed, cpu.note) == (22, True, "3 of 70 requests too close to call")
    assert not triton.passed
    both = [
        jobs.Row("distribution", "flat / a", "cpu", 10, "draws", 0.2, 0.01, 0.1),
        jobs.Row("distribution", "flat / b", "cpu", 10, "draws", 0.1, 0.05, 0.1),
    ]
    (row,) = condensed(both)
    assert (row.case, row.draws, row.p_value, row.total_variation, row.passed) == ("flat", 10, 0.1, 0.05, True)
    both[0].passed, both[0].note = False, "biased"
    assert not condensed(both)[0].passed and condensed(both)[0].note == "biased"
    assert set(STATISTICS) == {"first token", "pair of tokens", "accepted length and its token"}
