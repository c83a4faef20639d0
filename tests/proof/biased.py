"""Rules that look right and are not, and one that is: the test of the test.

The rules run on arrays in double precision with an independent generator, in the steps of the kernels: masses of tiles,
a tile, a token within it. Each wrong one differs from the correct one in one place. Drafters that share the verifier's
noise instead leave the verifier alone, an error that a verifier cannot see.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from proof.cases import Case
from proof.draws import Drafter, Step, Verifier
from vllm_specopt.kernels.reference.noise import ACCEPTANCE, DRAW, MASK32, RESIDUAL, STREAM
from vllm_specopt.testing import NO_DRAFT

TILE = 4
ONE_HOT, SPARSE, WIDE = "one-hot drafts of a random drafter", "disjoint supports, one-hot drafts", "vocabulary 300"
SAMPLED = ("flat", "peaked")
FILTERED = ("top-k on the target", "top-p on the target", "min-p on the target")


def pick(weights: np.ndarray, uniform: np.ndarray, tile_weights: np.ndarray | None = None) -> np.ndarray:
    """One index per row in proportion to the weights: a tile by running sum, then a token by running sum within it.

    tile_weights: what the masses of tiles are taken from, if not from the weights.
    """
    masses = _tiles(weights if tile_weights is None else tile_weights).sum(2)
    masses = np.where(_tiles(weights).max(2) > 0, masses, 0.0)
    tile, share = _cross(masses, uniform * masses.sum(1))
    return _in_tile(weights, tile, share)


def _tiles(weights: np.ndarray) -> np.ndarray:
    padded = np.pad(weights, ((0, 0), (0, -weights.shape[1] % TILE)))
    return padded.reshape(len(weights), -1, TILE)


def _cross(masses: np.ndarray, goal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First place whose running sum passes the goal, and how much of its own mass the goal needs."""
    running, rows = masses.cumsum(1), np.arange(len(masses))
    passed = (running > goal[:, None]) & (masses > 0)
    place = np.where(passed.any(1), passed.argmax(1), masses.shape[1] - 1 - (masses[:, ::-1] > 0).argmax(1))
    own = masses[rows, place]
    return place, (goal - (running[rows, place] - own)) / np.where(own > 0, own, 1.0)


def _in_tile(weights: np.ndarray, tile: np.ndarray, share: np.ndarray) -> np.ndarray:
    fine = _tiles(weights)[np.arange(len(weights)), tile]
    return tile * TILE + _cross(fine, share * fine.sum(1))[0]


def _one_late(weights, uniform):
    return np.minimum(pick(weights, uniform) + 1, weights.shape[1] - 1)


def _same_share(weights, uniform):
    masses = _tiles(weights).sum(2)
    return _in_tile(weights, _cross(masses, uniform * masses.sum(1))[0], uniform)


def _first_at_goal(weights, uniform):
    """The first token at which the running sum reaches the goal; u may be 0."""
    running, uniform = weights.cumsum(1), np.floor(uniform * 1024) / 1024
    return (running >= (uniform * running[:, -1])[:, None]).argmax(1)


def _few_bits(weights, uniform):
    return pick(weights, (np.floor(uniform * 512) + 0.5) / 512)


def _unclamped(target, draft):
    return target - draft


def _kept(case: Case, more: int) -> np.ndarray:
    """The target's probabilities with the threshold of the filters so many values further down."""
    raw = replace(case, filters=()).target_probs
    rows, kept = raw.reshape(-1, case.vocab_size), (case.target_probs > 0).reshape(-1, case.vocab_size)
    result = np.empty_like(rows)
    for row, keep, out in zip(rows, kept, result, strict=True):
        values = np.unique(row)[::-1]
        threshold = values[max(0, len(np.unique(row[keep])) - 1 + more)]
        out[:] = np.where(row >= threshold, row, 0.0)
    return (result / result.sum(1, keepdims=True)).reshape(raw.shape)


@dataclass(frozen=True)
class Rule:
    """A rule, right if nothing is changed. cases: on which it must be caught, each alone.

    pick: draws a token. target: its probabilities, of a case. tile_weights: of a case, where tiles are chosen by
    something else. residual, ratio: of sampled drafts. redraws: a chosen draft is tested, and where it fails the row is
    drawn from anew. one_uniform: for all positions of a request. one_word: for acceptance and residual.
    """

    cases: tuple[str, ...]
    pick: Callable = pick
    target: Callable = lambda case: case.target_probs
    tile_weights: Callable | None = None
    residual: Callable = lambda target, draft: np.clip(target - draft, 0, None)
    ratio: Callable = lambda target, draft: target / draft
    redraws: bool = False
    one_uniform: bool = False
    one_word: bool = False


RULES = {
    "correct": Rule((*SAMPLED, ONE_HOT, SPARSE, WIDE, *FILTERED)),
    "a boundary one token late": Rule((ONE_HOT,), pick=_one_late),
    "reaching the goal is enough, u may be 0": Rule((SPARSE,), pick=_first_at_goal),
    "u itself again within the tile": Rule((ONE_HOT,), pick=_same_share),
    "u of 9 bits": Rule((WIDE,), pick=_few_bits),
    "one u for all positions": Rule((*SAMPLED, ONE_HOT), one_uniform=True),
    "a rejected one-hot draft's row drawn from anew": Rule((ONE_HOT,), redraws=True),
    "acceptance and residual share their u": Rule(SAMPLED, one_word=True),
    "recovers from the target": Rule(SAMPLED, residual=lambda target, draft: target),
    "residual without its clamp": Rule(SAMPLED, residual=_unclamped),
    "accepts by the square root of the ratio": Rule(SAMPLED, ratio=lambda target, draft: np.sqrt(target / draft)),
    "a filter keeps one value more": Rule(FILTERED, target=lambda case: _kept(case, 1)),
    "a filter keeps one value less": Rule(FILTERED, target=lambda case: _kept(case, -1)),
    "masses of tiles from before the filter": Rule(
        FILTERED, tile_weights=lambda case: replace(case, filters=()).target_probs
    ),
}


def rule_verifier(name: str, seed: int) -> Verifier:
    """One of RULES on arrays."""
    rule, rng = RULES[name], np.random.default_rng([2, seed])

    def run(step: Step) -> tuple[np.ndarray, np.ndarray]:
        case, num_reqs = step.case, len(step.drafts)
        targets = rule.target(case)
        tile_weights = None if rule.tile_weights is None else rule.tile_weights(case)
        token_ids = np.full((num_reqs, case.num_drafts + 1), -1)
        num_sampled = np.zeros(num_reqs, np.int64)
        active, first_uniform = np.arange(num_reqs), rng.random(num_reqs)

        def uniforms():
            return first_uniform[active] if rule.one_uniform else rng.random(len(active))

        def draw(weights, uniform, coarse):
            return rule.pick(weights, uniform) if coarse is None else pick(weights, uniform, coarse)

        for i in range(case.num_drafts + 1 if num_reqs else 0):
            place, here = (step.offset + i, step.classes[active, i]), np.arange(len(active))
            target, uniform = targets[place], uniforms()
            coarse = None if tile_weights is None else tile_weights[place]
            tokens = np.full(len(active), -1) if i == case.num_drafts else step.drafts[active, i]
            if i == case.num_drafts or case.draft_form == NO_DRAFT:
                emitted = draw(target, uniform, coarse)
                accepted = emitted == tokens
                if rule.redraws and i < case.num_drafts:
                    emitted = np.where(accepted, emitted, pick(target, rng.random(len(active))))
            else:
                draft = case.draft_probs[min(step.offset + i, case.num_drafts), step.classes[active, i]]
                accepted = uniform <= rule.ratio(target[here, tokens], draft[here, tokens])
                residual_uniform = uniform if rule.one_word else uniforms()
                weights = rule.residual(target, draft)
                coarse = None if coarse is None else rule.residual(coarse, draft)
                emitted = np.where(accepted, tokens, draw(weights, residual_uniform, coarse))
            token_ids[active, i] = emitted
            num_sampled[active[~accepted]] = i + 1
            active = active[accepted]
            if not len(active):
                break
        return token_ids, num_sampled

    return run


def philox_words(seeds: np.ndarray, positions: np.ndarray, purpose: int) -> tuple[np.ndarray, np.ndarray]:
    """First two words of the kernels' Philox4x32-10 for arrays of seeds and positions."""
    mask, shift = np.uint64(MASK32), np.uint64(32)
    seeds, positions = seeds.astype(np.uint64), positions.astype(np.uint64)
    key0, key1 = seeds & mask, seeds >> shift
    c0, c1 = np.full(len(seeds), purpose, np.uint64), positions & mask
    c2, c3 = positions >> shift, np.full(len(seeds), STREAM, np.uint64)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> shift) ^ c1 ^ key0, b & mask, (a >> shift) ^ c3 ^ key1, a & mask
        key0, key1 = (key0 + np.uint64(0x9E3779B9)) & mask, (key1 + np.uint64(0xBB67AE85)) & mask
    return c0, c1


def uniforms_of(seeds: np.ndarray, positions: np.ndarray, purpose: int) -> np.ndarray:
    """The verifier's own uniforms, of the acceptance test or of a draw."""
    high, low = philox_words(seeds, positions, purpose)
    if purpose == ACCEPTANCE:
        return ((high >> np.uint64(9)).astype(np.float64) + 0.5) * 2.0**-23
    high, low = (word.astype(np.float64) for word in (high >> np.uint64(6), low >> np.uint64(6)))
    return (high * 2.0**26 + low + 0.5) * 2.0**-52


def sharing_drafter(purpose: int) -> Drafter:
    """Drafts of the right distribution, drawn by inversion with the uniforms that the verifier uses for ``purpose``."""

    def draft(case: Case, offset, classes, seeds, positions, rng) -> np.ndarray:
        return pick(case.draft_probs[offset, classes], uniforms_of(seeds, positions, purpose))

    return draft


@dataclass(frozen=True)
class SharedNoise:
    """Drafts drawn with the verifier's own uniforms. caught: whether the tokens' distribution must be seen to change.

    A one-hot draft only decides how many tokens a step emits, not which: there nothing must change but the acceptance.
    """

    cases: tuple[str, ...]
    purpose: int
    caught: bool


SHARED_NOISE = {
    "drafts share the residual's u": SharedNoise(SAMPLED, RESIDUAL, True),
    "drafts share the acceptance's u": SharedNoise(SAMPLED, ACCEPTANCE, True),
    "one-hot drafts share the draw's u": SharedNoise((ONE_HOT, SPARSE), DRAW, False),
}
