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


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks") / "result.json"
    command = [sys.executable, str(SCRIPT), "--steps", str(STEPS), "--kill", "--out", str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert out.exists(), done.stdout[-4000:]
    return json.loads(out.read_text())


def test_both_ranks_emit_the_same_tokens(result):
    first, second = result["ranks"]
    assert (first.pop("rank"), second.pop("rank")) == (0, 1)
    assert first == second
    assert first["sampler"] == "vllm_specopt.integration.v1"
    assert first["steps"] >= STEPS
    assert 0 < first["accepted"] < first["drafted"]
    assert first["mixed_steps"] > STEPS / 2


def test_a_killed_rank_ends_the_engine_with_vllms_own_error(result):
    assert result["killed"]["raised"] == ["vllm.v1.engine.exceptions.EngineDeadError"] * 2
    assert result["killed"]["seconds"] < 60
