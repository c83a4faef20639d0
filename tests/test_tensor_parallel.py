"""Tensor-parallel ranks on a CPU emit the same tokens; `tests/stress/ranks.py` does it over 10,000 steps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="vLLM binds each rank to a core of its own"),
]

SCRIPT = Path(__file__).with_name("stress") / "ranks.py"
STEPS = 60
# Ranks meet inside a tile of the vocabulary.
VOCAB = 4100
SHARDED = ("--sharded", "--vocab-size", str(VOCAB))
ENGINES = {
    "V1": (STEPS, "--kill"),
    "V1 sharded": (STEPS, "--kill", "--pressed", *SHARDED),
    "V2 sharded": (12, "--runner", "V2", "--tokens", "16", "--drafting", "greedy", "--filtered", *SHARDED),
    "V2 sharded, sampled drafts": (12, "--runner", "V2", "--tokens", "16", "--filtered", *SHARDED),
    "V1 sharded, kernels": (12, "--kernels", "--tokens", "16", "--filtered", *SHARDED),
    "V1 sharded, four ranks": (40, "--ranks", "4", "--tokens", "48", *SHARDED),
}
# The texts of seeded requests depend on the drafts where these are sampled.
TEXTS = (60, "--dtype", "float32", "--drafting", "greedy", "--tokens", "48", "--vocab-size", str(VOCAB))
ENGINES |= {
    f"V1, texts of {ranks}": (*TEXTS, "--ranks", str(ranks), *(SHARDED[:1] if ranks > 1 else ())) for ranks in (1, 2, 4)
}
LONG = ("V2 sharded, sampled drafts", "V1 sharded, kernels", "V1 sharded, four ranks")


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What the ranks of an engine did, by the name of the engine; run once."""
    known = {}

    def run(name: str) -> dict:
        if name not in known:
            steps, *arguments = ENGINES[name]
            out = tmp_path_factory.mktemp("ranks") / "result.json"
            command = [sys.executable, str(SCRIPT), "--steps", str(steps), *arguments, "--out", str(out)]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
            assert out.exists(), done.stdout[-4000:]
            known[name] = json.loads(out.read_text()) | {"log": done.stdout}
        return known[name]

    return run


def named(*names: str) -> pytest.MarkDecorator:
    """Engines of a test; some are for the long tests."""
    marks = {name: pytest.mark.long if name in LONG else () for name in names}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=marks[name]) for name in names])


@named("V1", "V1 sharded", "V2 sharded", *LONG)
def test_all_ranks_emit_the_same_tokens(result, name):
    ranks = result(name)["ranks"]
    assert [rank.pop("rank") for rank in ranks] == list(range(4 if "four" in name else 2))
    first = ranks[0]
    assert all(rank == first for rank in ranks)
    assert first["sampler"] == f"vllm_specopt.integration.{name[:2].lower()}"
    assert first["steps"] >= ENGINES[name][0]
    assert 0 < first["accepted"] < first["drafted"]
    assert first["mixed_steps"] > ENGINES[name][0] / 2


@named("V1 sharded", "V2 sharded", *LONG)
def test_logits_that_stay_on_their_ranks_give_the_tokens_of_whole_rows(result, name):
    assert "logits=sharded" in result(name)["log"]
    for rank in result(name)["ranks"]:
        sharded = rank["sharded"]
        assert sharded["differ"] == 0
        assert 0 < sharded["drawn"] <= sharded["steps"]
        if name.startswith("V2") or "kernels" in name:
            assert sharded["filtered"] > 0 and sharded["early"] > 0
        else:
            # Every other batch has requests with top-p, for which the CPU backend needs whole rows.
            assert sharded["filtered"] == 0 and sharded["steps"] < rank["steps"]


@pytest.mark.long
@pytest.mark.parametrize("ranks", [2, 4])
def test_texts_are_those_of_one_rank(result, ranks):
    """Greedy and seeded; in single precision, in which sums over ranks differ too little to change a text."""
    alone, shared = result("V1, texts of 1"), result(f"V1, texts of {ranks}")
    assert shared["ranks"][0]["sharded"]["drawn"] > 0
    assert len(alone["texts"]) == 8 and alone["texts"] == shared["texts"]


def test_requests_were_preempted(result):
    assert result("V1 sharded")["preemptions"] > 0


@pytest.mark.parametrize("name", ["V1", "V1 sharded"])
def test_a_killed_rank_ends_the_engine_with_vllms_own_error(result, name):
    killed = result(name)["killed"]
    assert killed["raised"] == ["vllm.v1.engine.exceptions.EngineDeadError"] * 2
    assert killed["seconds"] < 60
