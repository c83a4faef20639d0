"""vLLM's client as a child process that runs one `vllm bench serve` after another."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Self

from vllm_specopt.benchmarks.processes import ChildProcess, end_with_parent


class Client(ChildProcess):
    """vLLM's client, imported once (see client.py): each call is one `vllm bench serve`."""

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
