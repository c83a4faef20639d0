"""The launch line of the README: a real `vllm serve` with the option, asked by the openai client.

The option also lets requests choose, which changes nothing for those that do not.
"""

import json
import subprocess
import time
from itertools import accumulate

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from support import serving

from vllm_specopt.benchmarks.processes import free_port
from vllm_specopt.integration.metrics import WRITE_SECONDS

pytestmark = pytest.mark.engine

SPECULATION = {"model": str(serving.MODELS / "specopt-draft"), "num_speculative_tokens": 4}
# Scores that are 1 wherever they can be: every draft token of a request that chooses sigmoid survives.
OPTION = {"method": "exact", "sigmoid": {"alpha": -100, "beta": -99}, "allow_per_request": True}
PROMPT = "def read_lines(path):\n    "


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving.server(tmp_path_factory.mktemp("serving"), SPECULATION, OPTION) as running:
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


def streamed(server, **request) -> tuple[list[dict], dict]:
    """Per choice the text, the token ids and how many came at once; the usage that ends the stream."""
    asked = {"model": "target", "prompt": PROMPT, "stream": True, "return_token_ids": True} | request
    asked["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    choices = [{"text": "", "token_ids": [], "at_once": []} for _ in range(request.get("n", 1))]
    usage = None
    with httpx.stream("POST", f"{server.url}/v1/completions", json=asked, timeout=120) as response:
        assert response.status_code == 200
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            for piece in chunk["choices"]:
                choice = choices[piece["index"]]
                choice["text"] += piece["text"]
                choice["token_ids"] += piece["token_ids"]
                choice["at_once"].append(len(piece["token_ids"]))
                assert chunk["usage"]["completion_tokens"] == len(choice["token_ids"])
            if not chunk["choices"]:
                usage = chunk["usage"]
    return choices, usage


def test_usage_counts_what_was_streamed_to_any_length(server):
    whole = streamed(server, max_tokens=24, temperature=0.0, ignore_eos=True)[0][0]
    assert max(whole["at_once"]) > 1
    within = 0
    for length in range(1, 13):
        [choice], usage = streamed(server, max_tokens=length, temperature=0.0, ignore_eos=True)
        assert usage["completion_tokens"] == length == len(choice["token_ids"])
        assert choice["token_ids"] == whole["token_ids"][:length]
        within += length not in accumulate(whole["at_once"])
    assert within, "no length ends within what one step emitted"


@pytest.mark.parametrize("shown", [False, True])
def test_usage_counts_the_tokens_to_a_stop_string(server, shown):
    tokenizers = pytest.importorskip("tokenizers")
    whole = streamed(server, max_tokens=32, temperature=0.0)[0][0]
    tokenizer = tokenizers.Tokenizer.from_file(str(serving.MODELS / "specopt-target" / "tokenizer.json"))
    texts = [tokenizer.decode(whole["token_ids"][: i + 1]) for i in range(len(whole["token_ids"]))]
    ends = set(accumulate(whole["at_once"]))
    within = 0
    for at in range(2, len(whole["text"]) - 2, 5):
        stop = whole["text"][at : at + 2]
        [choice], usage = streamed(server, max_tokens=32, temperature=0.0, stop=stop, include_stop_str_in_output=shown)
        # The first token that completes it, and its text up to there.
        length = next(i for i, text in enumerate(texts, 1) if stop in text)
        assert usage["completion_tokens"] == length == len(choice["token_ids"])
        text = whole["text"]
        assert choice["text"] == text[: text.find(stop) + (len(stop) if shown else 0)]
        within += length not in ends
    assert within, "no stop string ends within what one step emitted"


def test_usage_sums_completions_and_each_is_that_of_its_seed(server):
    request = {"max_tokens": 20, "temperature": 0.9, "stop": ["\n\n"]}
    choices, usage = streamed(server, n=2, seed=7, **request)
    assert usage["completion_tokens"] == sum(len(choice["token_ids"]) for choice in choices)
    for index, choice in enumerate(choices):
        [alone], _ = streamed(server, seed=7 + index, **request)
        assert choice["token_ids"] == alone["token_ids"] and choice["text"] == alone["text"]


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
        ({"method": "fast"}, SPECULATION, "method"),
        # tests/test_plugin.py has the same mistake, and its sentence, without a server.
        pytest.param({"method": "sigmoid", "sigmoid": "paper"}, None, "specul", marks=pytest.mark.long),
    ],
    ids=["unknown method", "no speculation"],
)
def test_a_wrong_option_stops_the_start_before_a_model_is_loaded(option, speculation, sentence):
    command = serving.launch_line(free_port(), speculation, option)
    ended = subprocess.run(command, env=serving.ENV, capture_output=True, text=True, timeout=180)
    output = ended.stdout + ended.stderr
    assert ended.returncode != 0
    assert any("specopt" in line and sentence in line and "Error" in line for line in output.splitlines()), output
    assert "Starting to load model" not in output
