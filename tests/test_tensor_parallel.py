"""Two tensor-parallel ranks on a CPU emit the same tokens; `tests/stress/ranks.py` does it over 10,000 steps."""

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
    "V2 sharded": (12, "--runner", "V2", "--tokens", "16", *SHARDED),
}


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """What the two ranks of an engine did, by the engine's name; run once."""
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


@pytest.mark.parametrize("name", ["V1", "V1 sharded", "V2 sharded"])
def test_both_ranks_emit_the_same_tokens(result, name):
    first, second = result(name)["ranks"]
    assert (first.pop("rank"), second.pop("rank")) == (0, 1)
    assert first == second
    assert first["sampler"] == f"vllm_specopt.integration.{name[:2].lower()}"
    assert first["steps"] >= ENGINES[name][0]
    assert 0 < first["accepted"] < first["drafted"]
    assert first["mixed_steps"] > ENGINES[name][0] / 2


@pytest.mark.parametrize("name", ["V1 sharded", "V2 sharded"])
def test_logits_that_stay_on_their_ranks_give_the_tokens_of_whole_rows(result, name):
    assert "logits=sharded" in result(name)["log"]
    for rank in result(name)["ranks"]:
        assert rank["sharded"]["differ"] == 0
        # Every other batch has a request with top-p, which needs whole rows.
        assert 0 < rank["sharded"]["drawn"] <= rank["sharded"]["steps"] < rank["steps"]


def test_requests_were_preempted(result):
    assert result("V1 sharded")["preemptions"] > 0


@pytest.mark.parametrize("name", ["V1", "V1 sharded"])
def test_a_killed_rank_ends_the_engine_with_vllms_own_error(result, name):
    killed = result(name)["killed"]
    assert killed["raised"] == ["vllm.v1.engine.exceptions.EngineDeadError"] * 2
    assert killed["seconds"] < 60
