"""Kill one process of a server under load and say how the server reports it."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import httpx
from memory import processes
from server import metrics

IN_FLIGHT = 12
EXIT_SECONDS = 60


def killed(running, victim: str) -> dict:
    """Kill a server's ``EngineCore`` or ``Worker`` while requests are in flight.

    Returns:
        ``answers``: how often each HTTP status or client error was seen by clients that had asked again and again
        until then; ``exit``: the server's exit status (None: still there after a minute); ``later``: what a request
        gets afterwards; ``seconds`` until the server ended.
    """
    [pid] = [pid for pid, name in processes(running.process.pid).items() if name == victim]
    return asyncio.run(_killed(running, pid))


async def _killed(running, pid: int) -> dict:
    body = {"model": "target", "prompt": "def ", "max_tokens": 240, "ignore_eos": True, "temperature": 1.0}
    async with httpx.AsyncClient(base_url=running.url, timeout=EXIT_SECONDS) as client:
        asked = [asyncio.create_task(_failure(client, body)) for _ in range(IN_FLIGHT)]
        while not (await asyncio.to_thread(metrics, running.url))["num_requests_running"]:
            assert not any(task.done() for task in asked), "a request failed before the process was killed"
        os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        answers = await asyncio.gather(*asked)
        while running.process.poll() is None and time.monotonic() - started < EXIT_SECONDS:
            await asyncio.sleep(0.2)
        return {
            "answers": {str(answer): answers.count(answer) for answer in sorted(set(answers), key=str)},
            "exit": running.process.poll(),
            "later": await _answer(client, body | {"max_tokens": 1}),
            "seconds": round(time.monotonic() - started, 1),
        }


async def _failure(client: httpx.AsyncClient, body: dict) -> int | str:
    while (answer := await _answer(client, body)) == 200:
        pass
    return answer


async def _answer(client: httpx.AsyncClient, body: dict) -> int | str:
    try:
        return (await client.post("/v1/completions", json=body)).status_code
    except httpx.HTTPError as error:
        return type(error).__name__
