"""`specopt audit`: reads what a server's audit has counted, or starts a server, drives it and judges."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx
from rich.console import Console
from rich.text import Text

from vllm_specopt.benchmarks.processes import Server, free_port
from vllm_specopt.cli.errors import CliError
from vllm_specopt.evidence import ALARM, BINS, COLUMNS, Verdict, judge

BARS = " ▁▂▃▄▅▆▇█"
FOLLOW_SECONDS = 5.0
ENOUGH = 1000
"""Audited tokens below which there is no verdict yet."""
TEMPERATURES = (0.7, 1.0, 1.3)
CONCURRENCY = 16


class Counts(NamedTuple):
    """``[COLUMNS]`` each: of all tokens, and of those whose rows the audit swept itself."""

    all: list[int]
    afresh: list[int]


def run(
    target: str, follow: bool, tokens: int, speculative_config: str | None, additional_config: str | None, port: int
) -> int:
    """Run `specopt audit` and return its exit status; raise CliError for bad input (2) or a failed run (1)."""
    if target.startswith(("http://", "https://")):
        if speculative_config is not None or additional_config is not None:
            raise CliError("a URL is of a server that runs already: leave its configurations out.", 2)
        return watch(target.rstrip("/"), follow)
    if follow:
        raise CliError("--follow goes with the URL of a running server.", 2)
    return drive(target, tokens, speculative_config, additional_config, port)


def watch(url: str, follow: bool) -> int:
    """Print a running server's verdict, with ``follow`` again and again until interrupted."""
    console = Console()
    while True:
        verdicts = read(url)
        show(console, verdicts)
        if not follow:
            return exit_code(verdicts)
        try:
            time.sleep(FOLLOW_SECONDS)
        except KeyboardInterrupt:
            return exit_code(verdicts)


def read(url: str) -> dict[tuple[str, str, str], Counts]:
    """What was counted by model, engine and method, from a server's metrics."""
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


def parse(text: str) -> dict[tuple[str, str, str], Counts]:
    """The same from the text of the metrics."""
    try:
        from prometheus_client.parser import text_string_to_metric_families
    except ImportError as error:
        raise CliError(f"prometheus_client is not installed beside {sys.executable}; vLLM brings it.", 2) from error

    places = {"specopt:audit_impossible_tokens_total": BINS, "specopt:audit_skipped_tokens_total": BINS + 1}
    found: dict[tuple[str, str, str], Counts] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            place = places.get(sample.name)
            if sample.name == "specopt:audited_tokens_total":
                place = int(sample.labels["bin"])
            if place is not None:
                key = tuple(sample.labels.get(name, "") for name in ("model_name", "engine", "method"))
                counts = found.setdefault(key, Counts([0] * COLUMNS, [0] * COLUMNS))  # type: ignore[arg-type]
                counts.all[place] += int(sample.value)
                if sample.labels.get("sweep") == "afresh":
                    counts.afresh[place] += int(sample.value)
    return found


def show(console: Console, found: dict[tuple[str, str, str], Counts]) -> None:
    """Print the verdicts."""
    for (model, engine, method), counts in found.items():
        verdict = judge(*counts)
        console.print(
            Text(f"{model}, engine {engine}, method {method}: {sentence(verdict)}", style=style(verdict)),
            soft_wrap=True,
        )
        if verdict.largest is not None:
            largest = verdict.largest
            console.print(
                Text(f"  |{picture(counts.all)}| share of tokens by bin, half the height being 1/{BINS}"),
                soft_wrap=True,
            )
            console.print(
                Text(
                    f"  {verdict.tokens:,} tokens, evidence 10^{verdict.log10_evidence:.1f}, bias at most "
                    f"{100 * verdict.bias:.2g} %; bin {largest.index} deviates most, by {100 * largest.deviation:+.2f} "
                    f"({100 * largest.low:+.2f} to {100 * largest.high:+.2f}) points"
                ),
                soft_wrap=True,
            )
        if verdict.impossible or verdict.skipped:
            console.print(Text(f"  {verdict.impossible:,} impossible tokens, {verdict.skipped:,} tokens not audited"))


def sentence(verdict: Verdict) -> str:
    """What a verdict says."""
    if verdict.is_lossy:
        return "LOSSY: the output does not follow the target's distribution"
    if verdict.tokens < ENOUGH:
        return f"no verdict yet: fewer than {ENOUGH} tokens"
    if verdict.log10_evidence > 1:
        return f"watch it: the evidence is between 10 and {ALARM:.0e}"
    return "no sign of loss"


def style(verdict: Verdict) -> str:
    """Colour of a verdict."""
    return "red" if verdict.is_lossy else "yellow" if "no sign" not in sentence(verdict) else "green"


def picture(counts: list[int]) -> str:
    """A bar for each bin; half as high as they can be where all is well."""
    total = sum(counts[:BINS]) or 1
    heights = (round(count / total * BINS * (len(BARS) - 1) / 2) for count in counts[:BINS])
    return "".join(BARS[min(height, len(BARS) - 1)] for height in heights)


def exit_code(found: dict[tuple[str, str, str], Counts]) -> int:
    """1 if any method is lossy, or there is no verdict at all."""
    verdicts = [judge(*counts) for counts in found.values()]
    return int(any(each.is_lossy for each in verdicts) or all(each.tokens < ENOUGH for each in verdicts))


def drive(target: str, tokens: int, speculative_config: str | None, additional_config: str | None, port: int) -> int:
    """Start a server with an audit, have it emit so many tokens, and judge."""
    option = with_audit(additional_config)
    if speculative_config is not None:
        _json("--speculative-config", speculative_config)
    vllm = shutil.which("vllm", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if vllm is None:
        raise CliError(f"vllm is not installed beside {sys.executable}.", 2)
    port = free_port(port)
    command = [vllm, "serve", target, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "target", "--additional-config", json.dumps(option)]
    if speculative_config is not None:
        command += ["--speculative-config", speculative_config]
    console = Console()
    with (
        tempfile.TemporaryDirectory(prefix="specopt-audit-") as scratch,
        Server(command, Path(scratch) / "server.log", {}, port) as server,
        console.status("starting the server") as status,
    ):
        server.wait_ready(lambda: None)
        emitted, requests = 0, 0
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            while emitted < tokens:
                emitted += sum(pool.map(lambda i: ask(server, i), range(requests, requests + 2 * CONCURRENCY)))
                requests += 2 * CONCURRENCY
                status.update(f"{emitted:,} of {tokens:,} tokens")
        # A worker writes its numbers twice a second.
        time.sleep(1.5)
        found = read(server.url)
    show(console, found)
    return exit_code(found)


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
    """The configuration with the audit switched on; the method is exact unless it says another."""
    config = {} if additional_config is None else _json("--additional-config", additional_config)
    option = config.get("specopt", "exact")
    option = {"method": option} if isinstance(option, str) else option
    if not isinstance(option, dict):
        raise CliError("--additional-config has a specopt that is neither a method nor a mapping.", 2)
    return config | {"specopt": {"audit": True} | option}


def _json(name: str, text: str) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CliError(f"{name} is not JSON ({error}).", 2) from error
    if not isinstance(value, dict):
        raise CliError(f"{name} is {text}, expected a JSON object.", 2)
    return value
