"""vLLM's own client, `vllm bench serve`: its command line for a cell, its result as part of the record.

Importing vLLM takes longer than many a cell. Run as a program, this module imports it once and then forks for every
command it reads from its input: the fork runs vLLM's `main` on the command line as the shell would have.
Each input line is ``{"argv": [...], "log": PATH}``, each output line the exit status.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

from vllm_specopt.benchmarks.processes import end_with_parent
from vllm_specopt.benchmarks.serve.plan import Cell, Plan

PERCENTILES = (50, 90, 99)
LATENCIES = ("ttft", "tpot", "itl")
# A latency's distribution is kept as these quantiles of its values in seconds.
QUANTILES = tuple(round(0.025 * step, 3) for step in range(41))
COUNTS = ("num_drafts", "draft_tokens", "accepted_tokens")


def command(plan: Plan, cell: Cell, url: str, result: Path) -> list[str]:
    """Return the arguments of `vllm` for one cell; the prompts depend on the repeat, not on the arm."""
    sampling = plan.sampling(cell.temperature)
    return [
        "bench", "serve", "--backend", "openai", "--endpoint", "/v1/completions", "--base-url", url,
        "--model", plan.target, "--served-model-name", plan.served_name, "--tokenizer", plan.tokenizer,
        *plan.workload.args, "--seed", str(plan.seed + cell.repeat),
        "--num-prompts", str(plan.requests(cell.concurrency)), "--max-concurrency", str(cell.concurrency),
        "--num-warmups", str(min(cell.concurrency, 8)), "--ignore-eos", "--disable-tqdm",
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
