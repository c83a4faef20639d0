"""One placement of an A/B measured for real: a `vllm serve`, asked for completions, stopped again."""

import json
import os
import sys
import time
from pathlib import Path

from vllm_specopt.benchmarks.processes import Server, free_port

SPECULATION = {"num_speculative_tokens": 4, "draft_sample_method": "probabilistic"}


def serve_and_ask(settings: dict) -> dict:
    """Serve `target` with `draft` and `additional_config`; return the greedy tokens per prompt and the worker's line.

    ``began`` names a file that gets this process's and the server's ids once the server is up, before it is asked;
    ``pause`` is how long the first attempt then waits, for a test that ends its worker meanwhile.
    """
    port, began = free_port(), Path(settings["began"])
    log = began.with_suffix(f".{os.getpid()}.log")
    command = [
        str(Path(sys.executable).with_name("vllm")), "serve", settings["target"], "--host", "127.0.0.1",
        "--port", str(port), "--enforce-eager", "--max-model-len", "256", "--speculative-config",
        json.dumps({"model": settings["draft"], **SPECULATION}),
        "--additional-config", json.dumps(settings["additional_config"]),
    ]  # fmt: skip
    with Server(command, log, {}, port) as server:
        server.wait_ready(lambda: None, timeout=300)
        first = not began.exists()
        began.with_suffix(".part").write_text(json.dumps({"child": os.getpid(), "server": server.process.pid}))
        began.with_suffix(".part").rename(began)
        time.sleep(settings["pause"] if first else 0)
        body = {"model": settings["target"], "max_tokens": 16, "temperature": 0, "ignore_eos": True,
                "return_token_ids": True}  # fmt: skip
        tokens = [
            server.post("/v1/completions", body | {"prompt": prompt}).json()["choices"][0]["token_ids"]
            for prompt in settings["prompts"]
        ]
    said = [line[line.index("specopt:") :] for line in log.read_text().splitlines() if "specopt:" in line]
    return {"tokens": tokens, "worker_lines": said}


def sleep_or_fail(settings: dict) -> dict:
    """Wait `seconds`, leaving the id of this process in the file `began`; fail as often as `fails` says."""
    began = Path(settings["began"])
    earlier = began.read_text().split() if began.exists() else []
    began.write_text(" ".join([*earlier, str(os.getpid())]))
    if len(earlier) < settings.get("fails", 0):
        raise ValueError(f"attempt {len(earlier) + 1} fails")
    time.sleep(settings.get("seconds", 0) if not earlier else 0)
    return {"attempt": len(earlier) + 1}
