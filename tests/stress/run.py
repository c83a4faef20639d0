"""Put a real `vllm serve` with the drop-in under stress and check every answer.

Usage: ``python tests/stress/run.py --requests 10000 --out result.json``. Random sampling parameters, more requests in
flight than the server runs at once, too few KV cache blocks for those, clients that leave in the middle. A second
server without speculation gives the greedy answers that must be equal. Exits with 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
from killing import killed
from memory import Watch, trend
from server import ARMS, DRAFTING, MAX_NUM_SEQS, metrics, server
from workload import Choice, Request, make, plain_request, prompts, wrong

from vllm_specopt.benchmarks.processes import stopped_by_signals

START_SECONDS = 240
SECONDS_PER_REQUEST = 60
# Idle connections are kept for as long as the run takes: httpcore 1.0's pool may close one whose time is up just after
# it gave it to a request, which then fails with ReadError from ClosedResourceError. The server waits too (server.py).
IDLE_SECONDS = None
COUNTED = (
    "num_preemptions_total",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "generation_tokens_total",
    "prefix_cache_hits_total",
)
# Growth of the engine's memory, resident and in use, from the second to the last third of the run, that passes: noise,
# but no leak. One kilobyte left behind by a request would be 3.3 MiB from third to third of 10,000 requests.
GROWTH_MIB = 3.0
JUDGED_FROM = 3000


def main(argv: list[str]) -> int:
    """Run, print the result and write it down; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--concurrency", type=int, default=3 * MAX_NUM_SEQS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--arm", choices=ARMS, default="exact")
    parser.add_argument("--drafting", choices=DRAFTING, default="greedy")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--kill", choices=("EngineCore", "Worker"), help="afterwards kill this process of each server")
    parser.add_argument("--out", type=Path, help="write the result here, and the server's log beside it")
    options = parser.parse_args(argv)
    texts = prompts()
    requests = [make(index, options.seed, texts) for index in range(options.requests)]
    with stopped_by_signals(), tempfile.TemporaryDirectory(prefix="specopt-stress-") as scratch:
        with server("plain", Path(scratch) / "plain.log", dtype=options.dtype, pressed=False) as running:
            running.wait_ready(lambda: None, timeout=START_SECONDS)
            plain = plain_answers(running.url, requests, texts)
            kills = {"plain": killed(running, options.kill)} if options.kill else {}
        log = options.out.with_suffix(".server.log") if options.out else Path(scratch) / "server.log"
        with server(options.arm, log, drafting=options.drafting, dtype=options.dtype) as running:
            running.wait_ready(lambda: None, timeout=START_SECONDS)
            result = vars(options) | stress(running, requests, plain, options.concurrency)
            result["log_errors"] = errors(log)
            if options.kill:
                result["killed"] = kills | {options.arm: killed(running, options.kill)}
        del result["out"]
        result["active"] = log.read_text().count("specopt: active")
    result["wrong"] += judge(result)
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)
    return 1 if result["wrong"] else 0


def plain_answers(url: str, requests: list[Request], texts: list[str]) -> dict[str, dict]:
    """Answers of a server without speculation to each greedy request at full length, by key."""
    keys = sorted({request.key for request in requests if request.expected})
    plain = {}

    async def ask(client: httpx.AsyncClient, turns: asyncio.Semaphore, key: str) -> None:
        async with turns:
            answer = await whole(client, plain_request(key, texts))
        plain[key] = {"text": answer[0].text, "token_ids": answer[0].token_ids}

    async def ask_all() -> None:
        turns = asyncio.Semaphore(MAX_NUM_SEQS)
        async with client_of(url, MAX_NUM_SEQS) as client:
            await asyncio.gather(*(ask(client, turns, key) for key in keys))

    asyncio.run(ask_all())
    return plain


def stress(running, requests: list[Request], plain: dict[str, dict], concurrency: int) -> dict:
    """Send the requests, ``concurrency`` at a time, and return what happened."""
    counts, found = Counter(), []

    async def work(client: httpx.AsyncClient, todo) -> None:
        for request in todo:
            counts["sent"] += 1
            try:
                choices = await send(client, request)
            except httpx.HTTPError as error:
                answer = error.response.text if isinstance(error, httpx.HTTPStatusError) else ""
                found.append(f"request {request.index}: {causes(error)} {answer} for {request.body}")
                continue
            if choices is None:
                counts["left streamed" if request.body["stream"] else "left whole"] += 1
                continue
            counts["completed"] += 1
            counts["tokens"] += sum(len(choice.token_ids) for choice in choices)
            counts["compared with plain"] += bool(request.expected)
            counts["compared with plain, pure greedy"] += bool(request.expected and request.expected[1] == "pure")
            found.extend(wrong(request, choices, plain))

    async def work_all() -> None:
        todo = iter(requests)
        async with client_of(running.url, 2 * concurrency) as client:
            await asyncio.gather(*(work(client, todo) for _ in range(concurrency)))

    started = time.monotonic()
    with Watch(running.process.pid, running.url) as watch:
        asyncio.run(work_all())
        seconds = time.monotonic() - started
    if running.process.poll() is not None:
        listed = "\n".join(errors(running.log)[:40])
        sys.exit(f"the server ended after {seconds:.0f} s; the errors in its log:\n{listed or running.last_lines(40)}")
    left = drained(running.url)
    after = metrics(running.url)
    if running.process.poll() is not None or httpx.get(f"{running.url}/health", timeout=10).status_code != 200:
        found.append("the server is not healthy after the run")
    return {
        "seconds": round(seconds, 1),
        "requests_per_second": round(len(requests) / seconds, 2),
        "counts": dict(counts),
        "metrics": {name.removesuffix("_total"): int(after.get(name, 0)) for name in COUNTED},
        "left_in_engine": left,
        "memory": {name: trend(samples) for name, samples in watch.samples.items()},
        "memory_samples": {name: samples[:: max(len(samples) // 60, 1)] for name, samples in watch.samples.items()},
        "wrong": found,
    }


async def send(client: httpx.AsyncClient, request: Request) -> list[Choice] | None:
    """Send one request; None if its client left before the end."""
    if request.body["stream"]:
        return await streamed(client, request)
    try:
        return await asyncio.wait_for(whole(client, request.body), request.leaves_after)
    except TimeoutError:
        return None


async def whole(client: httpx.AsyncClient, body: dict) -> list[Choice]:
    """Post a request and return its choices."""
    answer = (await client.post("/v1/completions", json=body)).raise_for_status().json()
    return [
        Choice(
            choice["text"],
            choice["token_ids"],
            choice["logprobs"]["token_logprobs"] if choice.get("logprobs") else None,
            choice["finish_reason"],
        )
        for choice in sorted(answer["choices"], key=lambda choice: choice["index"])
    ]


async def streamed(client: httpx.AsyncClient, request: Request) -> list[Choice] | None:
    """Post a streamed request and put its choices together; None if its client left before the end."""
    choices: dict[int, Choice] = {}
    async with client.stream("POST", "/v1/completions", json=request.body) as response:
        if response.is_error:
            await response.aread()
        response.raise_for_status()
        chunks = 0
        async with contextlib.aclosing(response.aiter_lines()) as lines:
            async for line in lines:
                if not line.startswith("data: {"):
                    continue
                for part in json.loads(line.removeprefix("data: ")).get("choices", ()):
                    choice = choices.setdefault(part["index"], Choice("", [], None, None))
                    choice.text += part["text"]
                    choice.token_ids += part.get("token_ids") or []
                    if part.get("logprobs"):
                        choice.logprobs = (choice.logprobs or []) + part["logprobs"]["token_logprobs"]
                    choice.finish_reason = part.get("finish_reason") or choice.finish_reason
                chunks += 1
                if request.leaves_after is not None and chunks >= request.leaves_after:
                    return None
    return [choices[index] for index in sorted(choices)]


def client_of(url: str, connections: int) -> httpx.AsyncClient:
    """A client of the server with at most so many connections."""
    limits = httpx.Limits(max_connections=connections, keepalive_expiry=IDLE_SECONDS)
    return httpx.AsyncClient(base_url=url, timeout=SECONDS_PER_REQUEST, limits=limits)


def causes(error: BaseException | None) -> str:
    """An error and what it comes from, the last cause last."""
    found = []
    while error:
        found.append(f"{type(error).__module__}.{error!r}")
        error = error.__cause__ or error.__context__
    return " from ".join(found)


def errors(log: Path) -> list[str]:
    """Lines of a server's log that report an error."""
    return [x for x in log.read_text(errors="replace").splitlines() if " ERROR " in x or "Traceback" in x]


def drained(url: str, timeout: float = 20.0) -> dict[str, int]:
    """Requests the engine still holds once it had time to drop those whose clients left."""
    deadline = time.monotonic() + timeout
    while True:
        now = metrics(url)
        left = {name: int(now[f"num_requests_{name}"]) for name in ("running", "waiting")}
        if not any(left.values()) or time.monotonic() > deadline:
            return left
        time.sleep(0.5)


def judge(result: dict) -> list[str]:
    """What is wrong with the run as a whole."""
    found = []
    if any(result["left_in_engine"].values()):
        found.append(f"the engine still holds requests: {result['left_in_engine']}")
    if not result["metrics"]["num_preemptions"]:
        found.append("nothing was preempted, so this shows nothing about preemption")
    if result["log_errors"]:
        found.append(f"the server logged {len(result['log_errors'])} errors")
    if result["active"] != (result["arm"] == "exact"):
        found.append("the drop-in was active in the wrong arm")
    for name in ("EngineCore", "Worker", "Worker, in use"):
        growth = result["memory"][name]["growth_mib"]
        if result["requests"] >= JUDGED_FROM and growth > GROWTH_MIB:
            found.append(f"memory grew by {growth} MiB ({name}) from the second third of the run to the last")
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
