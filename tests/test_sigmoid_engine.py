"""Sigmoid by request: from a served request to the rule, and where it is refused (engines: test_rules_engine.py)."""

from pathlib import Path

import httpx
import pytest
from support import serving

from vllm_specopt.integration.config import SpecoptConfig

pytest.importorskip("vllm")

ROOT = Path(__file__).parents[1]
DRAFT = {"model": str(ROOT / "models" / "specopt-draft"), "num_speculative_tokens": 3}
DRAFT_PROBABILISTIC = {**DRAFT, "draft_sample_method": "probabilistic"}
CHOICE = {"method": "exact", "sigmoid": "paper", "allow_per_request": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serving")
    with serving.server(folder, DRAFT_PROBABILISTIC, CHOICE, "--max-model-len", "256") as running:
        running.wait_ready(lambda: None, timeout=300)
        yield running


def ask(server, **extra) -> httpx.Response:
    request = {"model": "target", "prompt": "def read(path):\n    ", "max_tokens": 96, "temperature": 1.0, "seed": 3}
    return httpx.post(f"{server.url}/v1/completions", json=request | {"ignore_eos": True, "n": 2} | extra, timeout=120)


def drafted_and_accepted(server) -> tuple[float, float]:
    lines = httpx.get(f"{server.url}/metrics", timeout=30).text.splitlines()
    names = ("vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total")
    return tuple(next(float(line.split()[-1]) for line in lines if line.startswith(name)) for name in names)


@pytest.mark.long
@pytest.mark.engine
@pytest.mark.parametrize(("xargs", "low", "high"), [({"specopt": "sigmoid"}, 0.99, 1.0), ({}, 0.1, 0.97)])
def test_a_served_request_chooses_by_vllm_xargs(server, xargs, low, high):
    """With the paper's constants and draft probabilities nearly everything is accepted; exact accepts less."""
    before = drafted_and_accepted(server)
    assert ask(server, vllm_xargs=xargs).status_code == 200
    drafted, accepted = (after - b for after, b in zip(drafted_and_accepted(server), before, strict=True))
    assert drafted > 100
    assert low <= accepted / drafted <= high


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "the request asks specopt for the method 'sigmoid', but specopt is not active here"),
        (SpecoptConfig("exact"), "the method 'sigmoid', but the server lacks \"allow_per_request\": true"),
    ],
)
def test_a_choice_the_server_does_not_allow_is_refused(monkeypatch, config, message):
    from vllm.exceptions import VLLMValidationError

    from vllm_specopt.integration import validation

    monkeypatch.setattr(validation, "active_config", lambda vllm_config: config)
    validation.check_request(None, {"specopt": None})
    with pytest.raises(VLLMValidationError, match=message):
        validation.check_request(None, {"specopt": {"method": "sigmoid"}})
