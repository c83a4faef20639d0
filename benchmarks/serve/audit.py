"""What a server's audit has counted, and a server that is started for one and driven."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx

from vllm_specopt.benchmarks import folders
from vllm_specopt.benchmarks.errors import CliError, checked_option, json_object
from vllm_specopt.benchmarks.processes import Server, free_port
from vllm_specopt.benchmarks.serve.servers import vllm_script
from vllm_specopt.evidence import BINS, COLUMNS

TEMPERATURES = (0.7, 1.0, 1.3)
CONCURRENCY = 16


class Audited(NamedTuple):
    """Counts ``[COLUMNS]`` of all tokens, and of those whose rows the audit swept itself."""

    all: list[int]
    afresh: list[int]


Counts = dict[tuple[str, str, str], Audited]
"""By model, engine and method."""


def read(url: str) -> Counts:
    """The counts, from a server's metrics; raise CliError (2) where there are none."""
    try:
        text = httpx.get(f"{url}/metrics", timeout=30).raise_for_status().text
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise CliError(f"{url}/metrics cannot be read ({error}).", 2) from error
    found = parse(text)
    if not found:
        raise CliError(
            f"{url} has no audit: start it with --additional-config "
            '\'{"specopt": {"method": "exact", "audit": true}}\' ("stock" for vLLM\'s own sampler).',
            2,
        )
    return found


def parse(text: str) -> Counts:
    """The same from the text of the metrics."""
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError as error:
        raise CliError(f"prometheus_client is not installed beside {sys.executable}; vLLM brings it.", 2) from error

    places = {"specopt:audit_impossible_tokens_total": BINS, "specopt:audit_skipped_tokens_total": BINS + 1}
    found: Counts = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            place = places.get(sample.name)
            if sample.name == "specopt:audited_tokens_total":
                place = int(sample.labels["bin"])
            if place is not None:
                key = tuple(sample.labels.get(name, "") for name in ("model_name", "engine", "method"))
                counts = found.setdefault(key, Audited([0] * COLUMNS, [0] * COLUMNS))  # type: ignore[arg-type]
                counts.all[place] += int(sample.value)
                if sample.labels.get("sweep") == "afresh":
                    counts.afresh[place] += int(sample.value)
    return found


def drive(
    target: str,
    tokens: int,
    speculative_config: str | None,
    additional_config: str | None,
    port: int,
    tick: Callable[[int], None],
) -> Counts:
    """Start a server with an audit and have it emit so many tokens; ``tick`` is told how many it has so far.

    Raises:
        CliError: Bad input (2), or the server failed (1).
    """
    options = ["--additional-config", json.dumps(with_audit(additional_config))]
    if speculative_config is not None:
        speculative = json_object("--speculative-config", speculative_config)
        folders.drafting(speculative)
        options += ["--speculative-config", json.dumps(speculative)]
    target = folders.model(target, "target")
    if not Path(vllm_script()).is_file():
        raise CliError(f"vllm is not installed beside {sys.executable}.", 2)
    port = free_port(port)
    command = [vllm_script(), "serve", target, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "target", *options]
    # The log of a run that fails is named in its error, and stays.
    opened, name = tempfile.mkstemp(prefix="specopt-audit-", suffix=".log")
    os.close(opened)
    log = Path(name)
    # As `specopt ab` does on a CPU, where vLLM by itself takes nearly all of the memory for its cache.
    space = {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
    with Server(command, log, space, port) as server:
        server.wait_ready(lambda: None)
        emitted, requests = 0, 0
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            while emitted < tokens:
                emitted += sum(pool.map(lambda i: ask(server, i), range(requests, requests + 2 * CONCURRENCY)))
                requests += 2 * CONCURRENCY
                tick(emitted)
        # A worker writes its numbers twice a second.
        time.sleep(1.5)
        counts = read(server.url)
    log.unlink()
    return counts


def ask(server: Server, index: int) -> int:
    """Have one request answered; how many tokens it got."""
    body = {
        "model": "target",
        "prompt": f"{index}. def",
        "max_tokens": 64,
        "ignore_eos": True,
        "temperature": TEMPERATURES[index % len(TEMPERATURES)],
    }
    if index % 2:
        body["top_p"] = 0.95
    return server.post("/v1/completions", body).json()["usage"]["completion_tokens"]


def with_audit(additional_config: str | None) -> dict:
    """The configuration with the audit switched on; the method is exact unless it says another. CliError (2) if bad."""
    config = {} if additional_config is None else json_object("--additional-config", additional_config)
    option = config.get("specopt", "exact")
    option = {"method": option} if isinstance(option, str) else option
    if not isinstance(option, dict):
        raise CliError("--additional-config has a specopt that is neither a method nor a mapping.", 2)
    return checked_option(config | {"specopt": {"audit": True} | option})
