"""The engine under stress, small: what `tests/stress/run.py` does with 10,000 requests (docs/stress.md), with 150."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm")
pytestmark = [pytest.mark.engine, pytest.mark.long]

SCRIPT = Path(__file__).with_name("stress") / "run.py"
REQUESTS = 150


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("stress") / "result.json"
    command = [sys.executable, str(SCRIPT), "--requests", str(REQUESTS), "--kill", "Worker", "--out", str(out)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=400)
    assert out.exists(), done.stdout[-4000:]
    return json.loads(out.read_text())


def test_nothing_is_wrong_with_any_answer_or_with_the_engine(result):
    assert result["wrong"] == []
    assert result["log_errors"] == []
    assert result["left_in_engine"] == {"running": 0, "waiting": 0}


def test_the_run_was_a_stress(result):
    counts, metrics = result["counts"], result["metrics"]
    assert counts["sent"] == REQUESTS
    assert counts["compared with plain"] > REQUESTS / 4
    assert min(counts["left streamed"], counts["left whole"]) > 0
    assert metrics["num_preemptions"] > 0
    assert 0 < metrics["spec_decode_num_accepted_tokens"] < metrics["spec_decode_num_draft_tokens"]
    assert result["active"] == 1


def test_a_killed_worker_is_reported_as_without_the_drop_in(result):
    ours, plain = result["killed"]["exact"], result["killed"]["plain"]
    assert set(ours["answers"]) == set(plain["answers"])
    assert ours["exit"] is not None, "the server hangs"
    assert (ours["exit"], ours["later"]) == (plain["exit"], plain["later"])
