"""The audit's statistic: places by enumeration, and evidence by simulation."""

import itertools
import runpy
from pathlib import Path

import pytest
import torch
from proof.enumeration import _block as block_with
from proof.enumeration import block_lengths, continued, exact_step, measures, outcomes
from support.audited import CONSTANTS, FILTERS, audit_step

from vllm_specopt.audit import new_counts
from vllm_specopt.evidence import BINS, judge
from vllm_specopt.kernels.reference.audit import place_ref
from vllm_specopt.kernels.reference.noise import DRAW, PREFIX, RESIDUAL
from vllm_specopt.rules import RULES
from vllm_specopt.testing import LOGITS, NO_DRAFT, random_batch
from vllm_specopt.verify import verify


def tied_distributions(vocab_size: int, depth: int, gen: torch.Generator) -> dict:
    """A distribution for every prefix, in which tokens are often exactly as probable as others."""
    prefixes = (p for n in range(depth + 1) for p in itertools.product(range(vocab_size), repeat=n))
    return {p: torch.randint(4, (vocab_size,), generator=gen).double().softmax(0) for p in prefixes}


def emitted_by_steps(step):
    """What one step emits: (prefix, token, probability) for each of its tokens."""

    def emitted(target, draft, drafts, mass):
        for i, token in enumerate((*drafts, -1)):
            prefix = drafts[:i]
            row = None if draft is None or token < 0 else draft[prefix]
            found = outcomes(step, target[prefix], row, token)
            for other, share in found.items():
                yield prefix, token if other is None else other, mass * share
            mass *= found.get(None, 0.0)
            if mass == 0:
                break

    return emitted


def emitted_by_block(target, draft, drafts, mass):
    targets = [target[drafts[:i]] for i in range(len(drafts) + 1)]
    sampled = [draft[drafts[:i]] for i in range(len(drafts))]
    for length, share in enumerate(block_lengths(targets, sampled, drafts)):
        for i in range(length):
            yield drafts[:i], drafts[i], mass * share
        fixed = {PREFIX + length: 2.0**-60}
        if share > 0:
            following = measures(
                lambda u, fixed=fixed: block_with(targets, sampled, drafts, fixed | {RESIDUAL: u, DRAW: u})[1]
            )
            for token, part in following.items():
                yield drafts[:length], token, mass * share * part


def unevenness(emitted, draft_is_sampled=True, vocab_size=3, num_drafts=3) -> float:
    """By how much the density of places departs from 1, at each position of a step given that it emits there."""
    gen = torch.Generator().manual_seed(5)
    target, draft = (tied_distributions(vocab_size, num_drafts, gen) for _ in range(2))
    cases = continued(draft, (), 1.0, num_drafts).items() if draft_is_sampled else [((0, 1, 1), 1.0), ((2, -1, 0), 1.0)]
    pieces: dict[int, list] = {}
    for drafts, mass in cases:
        for prefix, token, share in emitted(target, draft if draft_is_sampled else None, drafts, mass):
            row = target[prefix]
            low, high = (place_ref(row.log(), row, token, uniform) for uniform in (0.0, 1.0))
            pieces.setdefault(len(prefix), []).append((low, high, share))
    assert len(pieces) == num_drafts + 1 if draft_is_sampled else pieces
    worst = 0.0
    for found in pieces.values():
        total = sum(share for _, _, share in found)
        edges = sorted({edge for low, high, _ in found for edge in (low, high)})
        for low, high in itertools.pairwise(edges):
            if high - low > 1e-9:
                middle = (low + high) / 2
                density = sum(share / (to - start) for start, to, share in found if start < middle < to)
                worst = max(worst, abs(density / total - 1))
    return worst


def test_places_are_uniform_for_lossless_rules():
    assert unevenness(emitted_by_steps(exact_step)) < 1e-9
    assert unevenness(emitted_by_steps(exact_step), draft_is_sampled=False) < 1e-9
    assert unevenness(emitted_by_block) < 1e-9


def test_places_are_not_uniform_where_the_recovered_token_comes_from_the_target():
    def from_target(target, draft, token, uniforms):
        found = exact_step(target, draft, token, uniforms)
        return found if found is None else exact_step(target, None, -1, {"draw": uniforms["residual"]})

    def step(target, draft, token, uniforms):
        return exact_step(target, None, token, uniforms) if draft is None else from_target(
            target, draft, token, uniforms
        )  # fmt: skip

    assert unevenness(emitted_by_steps(step)) > 0.05


@pytest.mark.parametrize("method", RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_evidence_is_found_against_lossy_rules_alone(method, dtype):
    """Real verification of random rows, many equal logits among those in bf16; every request has a seed of its own."""
    counts = new_counts(len(RULES), "cpu")
    place, draft = list(RULES).index(method), LOGITS if RULES[method].lossless else NO_DRAFT
    emitted = 0
    for seed in range(60):
        batch = random_batch(
            seed=seed,
            num_drafts=[4] * 24,
            vocab_size=40,
            dtype=dtype,
            draft=draft,
            temperatures=(0.6, 1.0, 1.5),
            filters=() if seed % 2 else FILTERS,
        )
        verified = verify(*batch.args(), **batch.kwargs, rule=CONSTANTS[method], backend="cpu")
        emitted += int(verified.num_sampled.sum())
        audit_step(batch, verified, counts, method=place, backend="cpu")
    verdict = judge(counts[place].tolist())
    assert verdict.tokens == emitted > 3000 and verdict.impossible == verdict.skipped == 0
    assert not counts[[i for i in range(len(RULES)) if i != place]].any()
    if RULES[method].lossless:
        assert verdict.log10_evidence < 0
    else:
        assert verdict.is_lossy


def test_planted_faults_are_found_and_a_clean_run_is_not():
    run = runpy.run_path(str(Path(__file__).parent / "audit" / "run.py"))
    # With the two others, near a good drafter's distribution, the alarm takes longer than a test should.
    for name in ("accepts_by_the_root", "forgets_top_p", "is_2_percent_too_warm"):
        tokens, counts = run["tokens_to_alarm"](run[name], 1, 200_000)
        assert judge(counts).is_lossy and tokens < 200_000, name
    largest, counts = run["largest_evidence"](4, 100_000)
    assert largest < 1.3 and counts[BINS] == 0


def test_what_shared_noise_emits_is_calculated_as_it_happens():
    calculated = runpy.run_path(str(Path(__file__).parent / "audit" / "shared_noise.py"))
    gen, runs = torch.Generator().manual_seed(0), 200_000
    target, draft = (1.5 * torch.randn(2, 4, 6, generator=gen, dtype=torch.float64)).softmax(2)
    output = calculated["emitted"](target, draft)
    noise = torch.empty(runs, 4, 6, dtype=torch.float64).exponential_(generator=gen)
    drafts, recovered = (noise / draft).argmin(2), (noise / (target - draft).clamp(min=0)).argmin(2)
    ratio = (target / draft).expand(runs, 4, 6).gather(2, drafts[:, :, None])[:, :, 0]
    tokens = torch.where(torch.rand(runs, 4, generator=gen) < ratio, drafts, recovered)
    seen = torch.nn.functional.one_hot(tokens, 6).double().mean(0)
    spread = (output * (1 - output) / runs).sqrt()
    assert ((seen - output).abs() < 5 * spread).all()
    assert ((output - target).abs() > 10 * spread).any()
    places = calculated["shares"](target, target)
    torch.testing.assert_close(places, torch.full_like(places, 1 / BINS))
