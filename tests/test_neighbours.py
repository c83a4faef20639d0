"""Features beside which verification runs, in V1 engines on a CPU: the tokens are those without draft tokens."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.engine, pytest.mark.long]

ENGINE = Path(__file__).parent / "engine"
FEATURES = (
    "prefix caching, log probabilities",
    "n completions of a seeded request",
    "streaming, stop strings, minimum length",
    "aborted requests beside others",
    "dynamic number of drafts",
    "n-gram, drafts of any length",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    result = tmp_path_factory.mktemp("neighbours") / "result.json"
    environment = runpy.run_path(str(ENGINE / "run_engines.py"))["environment"]("V1")
    command = [sys.executable, str(ENGINE / "neighbours.py"), str(result), *FEATURES]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    return json.loads(result.read_text())


@pytest.mark.parametrize("feature", FEATURES)
def test_the_tokens_are_those_without_draft_tokens(found, feature):
    outcome = found[feature]
    assert outcome["equal"] and outcome["requests"] > 0
    for arm in ("without drafts", "with drafts"):
        assert all(outcome[arm].values()), outcome[arm]
