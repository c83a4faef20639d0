"""vLLM's own client, `vllm bench serve`: its command line for a cell, its result as part of the record.

Importing vLLM takes longer than many a cell. Run as a program, this module imports it once and then forks for every
command it reads from its input: the fork runs vLLM's `main` on the command line as the shell would have.
Each input line is ``{"argv": [...], "log": PATH}``, each output line the exit status.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Self

import numpy as np

from vllm_specopt.benchmarks.processes import ChildProcess, end_with_parent
from vllm_specopt.benchmarks.serve.plan import Cell, Plan

MOST_WARMUPS = 8
PERCENTILES = (50, 90, 99)
LATENCIES = ("ttft", "tpot", "itl")
# A latency's distribution is kept as these quantiles of its values in seconds.
QUANTILES = tuple(round(0.025 * step, 3) for step in range(41))
COUNTS = ("num_drafts", "draft_tokens", "accepted_tokens")


def command(plan: Plan, cell: Cell, url: str, result: Path) -> list[str]:
    """Return the arguments of `vllm` for one cell; the prompts depend on the repeat, not on the arm."""
    sampling = plan.sampling(cell.point)
    return [
        "bench", "serve", "--backend", "openai", "--endpoint", "/v1/completions", "--base-url", url,
        "--model", plan.target, "--served-model-name", plan.served_name, "--tokenizer", plan.target,
        *plan.workload.args, "--seed", str(plan.seed + cell.repeat),
        "--num-prompts", str(plan.requests(cell.concurrency)), "--max-concurrency", str(cell.concurrency),
        "--num-warmups", str(min(cell.concurrency, MOST_WARMUPS)), "--ignore-eos", "--disable-tqdm",
        *(part for key, value in sampling.items() for part in (f"--{key.replace('_', '-')}", f"{value:g}")),
        "--percentile-metrics", ",".join(LATENCIES),
        "--metric-percentiles", ",".join(map(str, PERCENTILES)), "--save-result", "--save-detailed",
        "--result-dir", str(result.parent), "--result-filename", result.name,
    ]  # fmt: skip


def summarise(bench: dict) -> dict:
    """Return what the record keeps of a client's result: rates, latencies in ms, quantiles in s, acceptance."""
    found = {key: bench[key] for key in ("completed", "failed", "duration", "total_output_tokens")}
    found |= {"requests_per_s": bench["request_throughput"], "tokens_per_s": bench["output_throughput"]}
    for name in LATENCIES:
        keys = ("mean", "median", *(f"p{percentile}" for percentile in PERCENTILES))
        found[name] = {key: round(bench[f"{key}_{name}_ms"], 4) for key in keys if f"{key}_{name}_ms" in bench}
    gaps = [itls for itls in bench["itls"] if itls]
    tokens = [length - 1 for length, itls in zip(bench["output_lens"], bench["itls"], strict=True) if itls]
    values = {
        "ttft": bench["ttfts"],
        "tpot": [sum(itls) / max(count, 1) for itls, count in zip(gaps, tokens, strict=True)],
        "itl": [gap for itls in gaps for gap in itls],
    }
    found["quantiles"] = {
        name: [round(float(value), 6) for value in np.quantile(data, QUANTILES)]
        for name, data in values.items()
        if data
    }
    if "spec_decode_num_drafts" in bench:
        found |= {key: bench[f"spec_decode_{key}"] for key in COUNTS}
        found["accepted_per_position"] = bench["spec_decode_per_position_acceptance_rates"]
    return found


class Client(ChildProcess):
    """vLLM's client, imported once: each call is one `vllm bench serve`."""

    def __init__(self, log: Path, env: dict[str, str]) -> None:
        super().__init__([sys.executable, "-m", "vllm_specopt.benchmarks.serve.client"], log, env)

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env={**os.environ, **self.env}, start_new_session=True, preexec_fn=end_with_parent,
            )  # fmt: skip
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin: IO[bytes] = self.process.stdin
        self.stdout: IO[bytes] = self.process.stdout
        return self

    def send(self, line: str) -> None:
        """Write a line to it; BrokenPipeError if it has ended."""
        self.stdin.write(f"{line}\n".encode())
        self.stdin.flush()

    def line(self, timeout: float, tick: Callable[[], None]) -> str | None:
        """Return the next line it prints, "" if it has ended, or None after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as ready:
            ready.register(self.stdout, selectors.EVENT_READ)
            while time.monotonic() < deadline:
                tick()
                if ready.select(0.2):
                    return self.stdout.readline().decode()
        return None

    def stop(self) -> None:
        """End it with whatever command it runs."""
        with suppress(BrokenPipeError):
            self.stdin.close()
        super().stop()
        self.stdout.close()


def serve_commands() -> None:
    """Run the commands of standard input, each in a fork, until it ends; the fork exits as `vllm` would."""
    import vllm.benchmarks.serve  # noqa: F401 - what takes the time
    from vllm.entrypoints.cli.main import main

    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if pid := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
            continue
        end_with_parent()
        log = os.open(asked["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(log, stream)
        sys.stdin = open(os.devnull)  # noqa: SIM115 - lives as long as the fork
        sys.argv = ["vllm", *asked["argv"]]
        main()
        return


if __name__ == "__main__":
    serve_commands()
