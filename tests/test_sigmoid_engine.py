"""The method sigmoid in real engines, for all requests and by request: V1, V2 under Triton's interpreter, a server."""

import json
import runpy
import sys
from pathlib import Path

import httpx
import pytest

from vllm_specopt.benchmarks.host import small_model_dtype
from vllm_specopt.cli.process import Server, free_port
from vllm_specopt.integration.config import SpecoptConfig

pytest.importorskip("vllm")
pytestmark = pytest.mark.engine

ROOT = Path(__file__).parents[1]
DRAFT_GREEDY = {"model": str(ROOT / "models" / "specopt-draft"), "num_speculative_tokens": 3}
DRAFT_PROBABILISTIC = {**DRAFT_GREEDY, "draft_sample_method": "probabilistic"}
SIGMOID = {"method": "sigmoid", "sigmoid": "paper"}
CHOICE = {"method": "exact", "sigmoid": "paper", "allow_per_request": True}
CHOOSE_SIGMOID = {"extra_args": {"specopt": {"method": "sigmoid"}}}
WARNING = "does not follow the target model's distribution"
START = runpy.run_path(str(ROOT / "tests" / "engine" / "run_engines.py"))["start"]


def prompts(count: int) -> list[str]:
    lines = (ROOT / "models" / "prompts.jsonl").read_text().splitlines()[:count]
    return [json.loads(line)["prompt"] for line in lines]


def engine(name: str, speculative: dict, option: dict | None, batches: dict, count: int) -> dict:
    llm = {
        "model": str(ROOT / "models" / "specopt-target"),
        "speculative_config": speculative,
        "additional_config": {"specopt": option} if option else {},
        "dtype": small_model_dtype(),
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "enable_prefix_caching": False,
        "max_model_len": 256,
        "max_num_seqs": count,
    }
    listed = [{"name": key, "prompts": prompts(count), "sampling": value} for key, value in batches.items()]
    return {"name": name, "llm": llm, "batches": listed}


def sampling(count: int, tokens: int, temperature: float, chosen=()) -> list[dict]:
    """Seeded parameters; the requests whose index modulo 2 is in ``chosen`` ask for sigmoid."""
    return [
        {
            "temperature": temperature,
            "seed": index,
            "max_tokens": tokens,
            "ignore_eos": True,
            **(CHOOSE_SIGMOID if index % 2 in chosen else {}),
        }
        for index in range(count)
    ]


def batches(count: int, tokens: int) -> dict:
    return {
        "greedy": sampling(count, tokens, 0.0, (1,)),
        "none": sampling(count, tokens, 1.0),
        "some": sampling(count, tokens, 1.0, (1,)),
        "all": sampling(count, tokens, 1.0, (0, 1)),
    }


@pytest.fixture(scope="module", params=["V1", "V2", pytest.param("V2, sigmoid", marks=pytest.mark.long)])
def ran(request, tmp_path_factory):
    """A stock engine, one with sigmoid, and one where requests choose, on each runner.

    In the interpreter an engine takes long: that of V2 in which all requests follow sigmoid is left to the long tests.
    """
    runner, with_sigmoid = request.param[:2], request.param != "V2"
    count, tokens = (16, 20) if runner == "V1" else (6, 8)
    greedy = {"greedy": sampling(count, tokens, 0.0)}
    engines = [
        engine("stock", DRAFT_GREEDY, None, greedy, count),
        engine("sigmoid", DRAFT_PROBABILISTIC, SIGMOID, greedy | {"all": sampling(count, tokens, 1.0)}, count),
        engine("choice", DRAFT_GREEDY, CHOICE, batches(count, tokens), count),
    ]
    engines = [each for each in engines if with_sigmoid or each["name"] != "sigmoid"]
    return runner, *START(engines, tmp_path_factory.mktemp("engines"), runner)


def tokens_of(results, name, batch):
    return results[name]["batches"][batch]["token_ids"]


def test_greedy_output_equals_stock(ran):
    _, results, _ = ran
    stock = tokens_of(results, "stock", "greedy")
    for name in results:
        assert tokens_of(results, name, "greedy") == stock, name


def test_a_request_gets_the_method_it_chose_beside_others(ran):
    """With one-hot drafts a seeded request's tokens depend on its method alone, so both kinds can be told apart."""
    _, results, _ = ran
    none, some, every = (tokens_of(results, "choice", batch) for batch in ("none", "some", "all"))
    assert some[::2] == none[::2]
    assert some[1::2] == every[1::2]
    differ = [left != right for left, right in zip(none, every, strict=True)]
    assert sum(differ) > len(differ) / 2


def test_the_log_says_what_is_on_and_what_it_costs(ran):
    runner, results, logs = ran
    backend = "cpu" if runner == "V1" else "triton"
    active = f"specopt: active: runner={runner} method=%s backend={backend} device=cpu"
    assert logs["choice"].count(active % "exact" + " per_request=allowed") == logs["choice"].count(WARNING) == 1
    assert "0.62 for every token" in logs["choice"]
    if "sigmoid" in logs:
        assert logs["sigmoid"].count(active % "sigmoid") == logs["sigmoid"].count(WARNING) == 1
        assert "0.62 for every token" not in logs["sigmoid"]
    assert all(results[name]["stock_calls"] == {} for name in results if name != "stock")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    port = free_port()
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(ROOT / "models" / "specopt-target")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--served-model-name", "target"]
    command += ["--max-model-len", "256", "--dtype", small_model_dtype()]
    command += ["--speculative-config", json.dumps(DRAFT_PROBABILISTIC)]
    command += ["--additional-config", json.dumps({"specopt": CHOICE})]
    env = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "TRITON_INTERPRET": "0"}
    with Server(command, tmp_path_factory.mktemp("serving") / "server.log", env, port) as running:
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

    from vllm_specopt.integration import plugin

    monkeypatch.setattr(plugin, "_active_config", lambda vllm_config: config)
    plugin.check_request(None, {"specopt": None})
    with pytest.raises(VLLMValidationError, match=message):
        plugin.check_request(None, {"specopt": {"method": "sigmoid"}})
