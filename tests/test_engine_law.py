"""The law end to end, small: what ``make prove`` does with real V1 engines (tests/proof/engine.py)."""

import numpy as np
import pytest

pytest.importorskip("vllm")
pytest.importorskip("transformers")

from proof import engine
from proof.judgement import FAMILY_ALPHA

pytestmark = pytest.mark.engine

REQUESTS, BIASED = 1000, 2500
BATCHES = [f"{setting}, {seeds}" for setting in engine.SETTINGS for seeds in engine.SEEDS]
# Two tests of each statistic of each batch.
ALPHA = FAMILY_ALPHA / (2 * len(BATCHES) * len(engine.STATISTICS))


@pytest.fixture(scope="module")
def drawn():
    return engine.draw(engine.SETTINGS, REQUESTS, seed=0, shared_noise=BIASED)


@pytest.mark.parametrize("batch", BATCHES)
def test_engine_has_the_target_law_with_vllms_own_drafter(drawn, batch):
    draws = drawn[batch]
    judgements = engine.judge_draws(draws, engine.SETTINGS[batch.rpartition(", ")[0]], ALPHA)
    assert tuple(judgements) == engine.STATISTICS
    assert judgements["second token"].draws == REQUESTS == len(draws.tokens)
    assert 0.2 < (draws.accepted > 0).mean() < 0.8, "drafts are all accepted or all rejected: this shows little"
    assert all(judgement.passed for judgement in judgements.values()), judgements


def test_a_drafter_that_shares_its_noise_with_the_verifier_is_caught(drawn):
    draws = drawn[engine.SHARED_NOISE]
    judgements = engine.judge_draws(draws, engine.SETTINGS["T = 1"], ALPHA)
    assert not judgements["second token, a recovered one"].passed
    assert judgements["second token, an accepted draft"].passed, "drafts and acceptance are as they should be"


def test_a_slightly_wrong_temperature_is_caught(drawn):
    draws = [drawn[f"T = 1, {seeds}"] for seeds in engine.SEEDS]
    both = engine.Draws(*(np.concatenate([getattr(d, name) for d in draws]) for name in ("tokens", "accepted")))
    assert all(j.passed for j in engine.judge_draws(both, {"temperature": 1.0}, ALPHA).values())
    assert not all(j.passed for j in engine.judge_draws(both, {"temperature": 1.1}, ALPHA).values())


def test_seeded_requests_differ_from_each_other(drawn):
    assert len(np.unique(drawn["T = 1, seeded"].tokens, axis=0)) > REQUESTS / 10
