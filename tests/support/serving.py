"""The shipped target behind `vllm serve`, on a CPU."""

import json
import sys
from pathlib import Path

from support.prepared import environment

from vllm_specopt.benchmarks.host import small_model_dtype
from vllm_specopt.benchmarks.processes import Server, free_port

MODELS = Path(__file__).parents[2] / "models"
ENV = environment("V1") | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def launch_line(port: int, speculation: dict | None, option: object, *more: str) -> list[str]:
    """The command: ``option`` is what the configuration has under "specopt", ``more`` further arguments."""
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(MODELS / "specopt-target")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--served-model-name", "target"]
    command += ["--dtype", small_model_dtype(), *more]
    command += ["--speculative-config", json.dumps(speculation)] if speculation else []
    return [*command, "--additional-config", json.dumps({"specopt": option})]


def server(folder: Path, speculation: dict, option: object, *more: str) -> Server:
    """A server not yet started, which logs to ``server.log`` in a folder."""
    port = free_port()
    return Server(launch_line(port, speculation, option, *more), folder / "server.log", ENV, port)
