"""Run the two Ray examples on a local Ray node without a GPU and write down what came out.

Usage: ``python ray_llm.py serve|data REQUEST.json RESULT.json``. The request has ``target``, ``draft``, ``prompts`` and
``engine_kwargs``; the result has the completions per prompt and the plugin's lines from the workers' logs.
"""

import json
import runpy
import sys
import time
from pathlib import Path

import httpx
from ray_cluster import local_cluster

from vllm_specopt.benchmarks.processes import free_port

EXAMPLES = Path(__file__).parents[2] / "examples"
NUM_CPUS = 8
MAX_TOKENS = 16
READY_SECONDS = 240


def serve_examples(request: dict) -> list[str]:
    """Return one completion per prompt from the OpenAI API of ray_serve.py."""
    from ray import serve

    example, port = runpy.run_path(str(EXAMPLES / "ray_serve.py")), free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    config = example["llm_config"](request["target"], request["draft"], on_cpu=True, **request["engine_kwargs"])
    serve.run(example["build_openai_app"]({"llm_configs": [config]}), blocking=False)
    try:
        url = f"http://127.0.0.1:{port}/v1/completions"
        return [ask(url, Path(request["target"]).name, prompt) for prompt in request["prompts"]]
    finally:
        serve.shutdown()


def ask(url: str, model: str, prompt: str) -> str:
    """Return the greedy completion of one prompt; the first request may find the route not there yet."""
    body = {"model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True}
    deadline = time.monotonic() + READY_SECONDS
    while (answer := httpx.post(url, json=body, timeout=120)).status_code in (404, 503):
        assert time.monotonic() < deadline, answer.text
        time.sleep(0.5)
    return answer.raise_for_status().json()["choices"][0]["text"]


def data_examples(request: dict) -> list[str]:
    """Return one completion per prompt from the dataset of ray_data.py."""
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    example = runpy.run_path(str(EXAMPLES / "ray_data.py"))
    sampling = {"max_tokens": MAX_TOKENS, "temperature": 0.0, "ignore_eos": True}
    complete = example["processor"](
        request["target"], request["draft"], sampling, on_cpu=True, **request["engine_kwargs"]
    )
    rows = complete(ray.data.from_items([{"prompt": prompt} for prompt in request["prompts"]])).take_all()
    found = {row["prompt"]: row["completion"] for row in rows}
    return [found[prompt] for prompt in request["prompts"]]


def main(which: str, request_path: str, result_path: str) -> None:
    """Run one example."""
    request = json.loads(Path(request_path).read_text())
    with local_cluster([0], num_cpus=NUM_CPUS) as worker_log:
        texts = {"serve": serve_examples, "data": data_examples}[which](request)
        said = sorted({line[line.index("specopt:") :] for line in worker_log().splitlines() if "specopt:" in line})
    Path(result_path).write_text(json.dumps({"texts": texts, "worker_lines": said}))


if __name__ == "__main__":
    main(*sys.argv[1:])
