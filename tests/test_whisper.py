"""Encoder-decoder models: vLLM drafts for Whisper with n-grams, ours verifies them; a draft model does not start."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_specopt.benchmarks.serve.engine import ENV

SCRIPT = Path(__file__).parent / "support" / "whisper.py"
NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 2, "prompt_lookup_min": 1}
EXACT = {"specopt": {"method": "exact"}}

pytestmark = [pytest.mark.engine, pytest.mark.long]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    make, root = runpy.run_path(str(SCRIPT))["make"], tmp_path_factory.mktemp("whisper")
    return {"target": make(root / "target", 2, seed=0), "draft": make(root / "draft", 1, seed=1)}


def run(folder, speculative=None, additional=None, temperature=0.0):
    request = {"speculative_config": speculative, "additional_config": additional, "temperature": temperature}
    command = [sys.executable, str(SCRIPT), str(folder), json.dumps(request)]
    return subprocess.run(command, env={**os.environ, **ENV}, capture_output=True, text=True, timeout=300)


def read(ran):
    assert ran.returncode == 0, ran.stderr[-2000:]
    return json.loads(ran.stdout.splitlines()[-1])


def test_ngrams_are_verified_exactly(folders):
    plain = read(run(folders["target"]))
    stock, ours = (read(run(folders["target"], NGRAM, additional)) for additional in (None, EXACT))
    assert len({tuple(tokens) for tokens in plain["tokens"]}) == 4
    assert plain["tokens"] == stock["tokens"] == ours["tokens"]
    assert ours["sampler"].startswith("vllm_specopt.") and stock["sampler"].startswith("vllm.v1.")
    assert stock["counts"] == ours["counts"] and min(ours["counts"].values()) > 0


def test_ngrams_at_temperature_1(folders):
    found = read(run(folders["target"], NGRAM, EXACT, temperature=1.0))
    assert found["sampler"].startswith("vllm_specopt.") and {len(tokens) for tokens in found["tokens"]} == {48}


def test_a_draft_model_does_not_start(folders):
    ran = run(folders["target"], {"model": str(folders["draft"]), "num_speculative_tokens": 3})
    assert ran.returncode != 0 and "has no attribute 'image_token_index'" in ran.stderr + ran.stdout
