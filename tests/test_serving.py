"""The launch line of the README: a real `vllm serve` with the option, asked by the openai client.

The option also lets requests choose, which changes nothing for those that do not.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from vllm_specopt.benchmarks.host import small_model_dtype
from vllm_specopt.cli.process import Server, free_port
from vllm_specopt.integration.metrics import WRITE_SECONDS

pytestmark = pytest.mark.engine

MODELS = Path(__file__).parents[1] / "models"
VLLM = Path(sys.executable).with_name("vllm")
ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "TRITON_INTERPRET": "0",
}
SPECULATION = {"model": str(MODELS / "specopt-draft"), "num_speculative_tokens": 4}
# Scores that are 1 wherever they can be: every draft token of a request that chooses sigmoid survives.
OPTION = {"method": "exact", "sigmoid": {"alpha": -100, "beta": -99}, "allow_per_request": True}
PROMPT = "def read_lines(path):\n    "


def launch_line(port: int, option: str | None, speculation: dict | None = SPECULATION) -> list[str]:
    command = [str(VLLM), "serve", str(MODELS / "specopt-target"), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager", "--served-model-name", "target", "--dtype", small_model_dtype()]
    if speculation:
        command += ["--speculative-config", json.dumps(speculation)]
    if option:
        command += ["--additional-config", option]
    return command


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    port = free_port()
    log = tmp_path_factory.mktemp("serving") / "server.log"
    command = launch_line(port, json.dumps({"specopt": OPTION}))
    with Server(command, log, ENV, port) as running:
        running.wait_ready(lambda: None, timeout=300)
        yield running


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")


def test_the_worker_says_active_once(server):
    lines = [line for line in server.log.read_text().splitlines() if "specopt: active" in line]
    assert len(lines) == 1
    assert "runner=V1 method=exact backend=cpu device=cpu" in lines[0]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_streaming_and_whole_completions_agree(client, temperature):
    request = {
        "model": "target",
        "prompt": PROMPT,
        "max_tokens": 40,
        "temperature": temperature,
        "top_p": 0.95,
        "seed": 12,
    }
    whole = client.completions.create(**request)
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**request, stream=True))
    assert whole.usage.completion_tokens == 40 or whole.choices[0].finish_reason == "stop"
    assert whole.choices[0].text
    assert streamed == whole.choices[0].text


def test_several_samples_of_one_prompt_differ(client):
    request = {"model": "target", "prompt": PROMPT, "max_tokens": 32, "temperature": 1.0, "n": 4}
    texts = [choice.text for choice in client.completions.create(**request).choices]
    assert len(texts) == 4
    assert len(set(texts)) > 1


def test_log_probabilities_come_with_each_token(client):
    request = {"model": "target", "prompt": PROMPT, "max_tokens": 12, "temperature": 0.0, "logprobs": 3}
    logprobs = client.completions.create(**request).choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 12
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert logprob == max(top.values()), f"the greedy token {token!r} is not the most probable one"


def scrape(server) -> dict[tuple[str, ...], float]:
    """Samples of /metrics by name and label values, those of vLLM's own labels left out once they are checked."""
    found = {}
    for family in text_string_to_metric_families(httpx.get(f"{server.url}/metrics").text):
        for sample in family.samples:
            labels = dict(sample.labels)
            if sample.name.startswith(("specopt:", "vllm:spec_decode_num")):
                assert (labels.pop("model_name"), labels.pop("engine")) == ("target", "0")
                found[sample.name, *labels.values()] = sample.value
            elif sample.name in ("vllm:generation_tokens_total", "vllm:request_success_total"):
                found[sample.name,] = found.get((sample.name,), 0) + sample.value
    return found


def settled(server) -> dict[tuple[str, ...], float]:
    time.sleep(3 * WRITE_SECONDS)
    return scrape(server)


def test_metrics_agree_with_vllms_own(server, client):
    before = settled(server)
    client.completions.create(model="target", prompt=PROMPT, max_tokens=24, temperature=0.0)
    client.completions.create(model="target", prompt=PROMPT, max_tokens=40, temperature=0.8, n=3)
    counts = settled(server)

    def since(*key):
        return counts[key] - before.get(key, 0)

    tokens = {
        outcome: since("specopt:tokens_total", "exact", outcome) for outcome in ("accepted", "recovered", "bonus")
    }
    drafted = counts["vllm:spec_decode_num_draft_tokens_total",]
    assert 0 < counts["vllm:spec_decode_num_accepted_tokens_total",] < drafted
    assert tokens["accepted"] == since("vllm:spec_decode_num_accepted_tokens_total")
    assert tokens["recovered"] + tokens["bonus"] == since("vllm:spec_decode_num_drafts_total")
    # Each of the four requests gets its first token without drafts, and may lose up to 4 behind its last.
    generated = since("vllm:generation_tokens_total")
    assert 4 * (1 - 4) <= generated - sum(tokens.values()) <= 4
    assert 0 < since("specopt:verified_steps_total", "exact") == since("specopt:verification_seconds_count", "exact")
    assert since("specopt:verification_seconds_sum", "exact") > 0
    swept, skipped = (since("specopt:rows_total", "exact", outcome) for outcome in ("swept", "skipped"))
    assert swept >= sum(tokens.values())
    assert swept + skipped >= since("vllm:spec_decode_num_draft_tokens_total") + tokens["recovered"] + tokens["bonus"]
    assert counts["specopt:bad_rows_total", "exact"] == 0


def ask(server, **extra) -> httpx.Response:
    request = {"model": "target", "prompt": PROMPT, "max_tokens": 96, "temperature": 1.0, "seed": 3, "ignore_eos": True}
    return httpx.post(f"{server.url}/v1/completions", json=request | extra, timeout=120)


@pytest.mark.parametrize(("xargs", "low", "high"), [({"specopt": "sigmoid"}, 0.99, 1.0), ({}, 0.01, 0.9)])
def test_a_served_request_chooses_by_vllm_xargs(server, xargs, low, high):
    before = scrape(server)
    assert ask(server, n=2, vllm_xargs=xargs).status_code == 200
    after = scrape(server)
    drafted, accepted = (
        after[key] - before.get(key, 0)
        for key in (("vllm:spec_decode_num_draft_tokens_total",), ("vllm:spec_decode_num_accepted_tokens_total",))
    )
    assert drafted > 100
    assert low <= accepted / drafted <= high


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("fast", "extra_args['specopt'] is 'fast', expected 'exact' or 'sigmoid'"),
        (1, "extra_args['specopt'] is 1, expected 'exact' or 'sigmoid'"),
        (["sigmoid"], "extra_args['specopt'] is ['sigmoid'], expected 'exact' or 'sigmoid'"),
    ],
)
def test_a_malformed_choice_is_refused_with_400(server, value, message):
    response = ask(server, vllm_xargs={"specopt": value})
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert ask(server, max_tokens=1).status_code == 200


@pytest.mark.parametrize(
    ("option", "speculation", "sentence"),
    [
        ('{"specopt": {"method": "fast"}}', SPECULATION, "method"),
        # tests/test_plugin.py has the same mistake, and its sentence, without a server.
        pytest.param('{"specopt": {"method": "sigmoid", "sigmoid": "paper"}}', None, "specul", marks=pytest.mark.long),
    ],
    ids=["unknown method", "no speculation"],
)
def test_a_wrong_option_stops_the_start_before_a_model_is_loaded(option, speculation, sentence):
    command = launch_line(free_port(), option, speculation)
    ended = subprocess.run(command, env=os.environ | ENV, capture_output=True, text=True, timeout=180)
    output = ended.stdout + ended.stderr
    assert ended.returncode != 0
    assert any("specopt" in line and sentence in line and "Error" in line for line in output.splitlines()), output
    assert "Starting to load model" not in output
