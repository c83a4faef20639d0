"""Features beside which verification runs, in engines on a CPU: the tokens are those without draft tokens."""

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.prepared import environment

pytest.importorskip("vllm")
# Half a minute each on V1, a minute or two on V2.
pytestmark = [pytest.mark.engine, pytest.mark.long]

ENGINE = Path(__file__).parent / "engine"
FEATURES = (
    "prefix caching, log probabilities",
    "n completions of a seeded request",
    "streaming, stop strings, minimum length",
    "aborted requests beside others",
    "dynamic number of drafts",
    "n-gram, drafts of any length",
    "suffix decoding",
    "LoRA on the target",
    "LoRA on both models",
    "batch-sharded sampling",
    "pipeline parallel",
)
# vLLM has suffix decoding on V1 and batch-sharded sampling on V2 only.
NOT_THERE = ("V2", "suffix decoding"), ("V1", "batch-sharded sampling")
CASES = [case for case in itertools.product(("V1", "V2"), FEATURES) if case not in NOT_THERE]
LIBRARY = pytest.mark.skipif(importlib.util.find_spec("arctic_inference") is None, reason="no arctic-inference")


@pytest.mark.parametrize(
    ("runner", "feature"),
    [pytest.param(*case, marks=[LIBRARY] * (case[1] == "suffix decoding"), id=" ".join(case)) for case in CASES],
)
def test_the_tokens_are_those_without_draft_tokens(tmp_path, runner, feature):
    result = tmp_path / "result.json"
    command = [sys.executable, str(ENGINE / "neighbours.py"), str(result), feature]
    done = subprocess.run(command, env=environment(runner), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    outcome = json.loads(result.read_text())[feature]
    for arm in ("without drafts", "with drafts"):
        assert all(outcome[arm].values()), outcome[arm]
    assert outcome["equal"] and outcome["requests"] > 0
    assert outcome["accepted"] > 0 or feature == "pipeline parallel"
