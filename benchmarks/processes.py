"""Child processes of the command line tools: vLLM servers and clients that are always stopped again."""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

import httpx

from vllm_specopt.benchmarks.errors import CliError
from vllm_specopt.integration import reasons

POLL_SECONDS = 0.2
STOP_SECONDS = 10.0
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def end_with_parent() -> None:
    """Have the kernel send this process SIGTERM when the thread that started it ends, even by SIGKILL (Linux only)."""
    if _LIBC:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class ChildProcess:
    """A command in a process group of its own, writing to a log file; leaving the context stops the whole group."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str]) -> None:
        self.command = command
        self.log = log
        self.env = env

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self.env},
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait(self, tick: Callable[[], None]) -> int:
        """Wait for the command to end, calling `tick` meanwhile, and return its exit status."""
        while self.process.poll() is None:
            tick()
            time.sleep(POLL_SECONDS)
        return self.process.returncode

    def stop(self) -> None:
        """End the command and every process it left in its group: SIGTERM first, SIGKILL for what remains."""
        try:
            if self.process.poll() is None:
                self.process.terminate()
            deadline = time.monotonic() + STOP_SECONDS
            while self._group_exists() and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
        finally:
            if self._group_exists():
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _group_exists(self) -> bool:
        self.process.poll()
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def last_lines(self, count: int = 15) -> str:
        """Return the end of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-count:])

    def reason(self) -> str:
        """Return the line of the log that says why it ended, without a full stop."""
        return reasons.of_log(self.log.read_text(errors="replace")).rstrip(".")


def answer(
    module: str, request: dict, scratch: Path, env: dict[str, str], tick: Callable[[], None], kept: Path | None = None
) -> tuple[dict, str]:
    """Run a module on a request in a process of its own; return the result it leaves and what it logged.

    Its log goes to ``kept``, else to the scratch folder.

    Raises:
        CliError: It ended with another status than 0.
    """
    asked, answered = scratch / "request.json", scratch / "result.json"
    log = kept or scratch / "run.log"
    answered.unlink(missing_ok=True)
    asked.write_text(json.dumps(request))
    with ChildProcess([sys.executable, "-m", module, str(asked), str(answered)], log, env) as child:
        if status := child.wait(tick):
            named = f" (its log: {kept})" if kept else ""
            raise CliError(f"its process ended with status {status}: {child.reason()}{named}.")
    return json.loads(answered.read_text()), log.read_text(errors="replace")


class Server(ChildProcess):
    """A `vllm serve` process that is ready once `wait_ready` has returned."""

    def __init__(self, command: list[str], log: Path, env: dict[str, str], port: int) -> None:
        super().__init__(command, log, env)
        self.url = f"http://127.0.0.1:{port}"
        self._client = httpx.Client(base_url=self.url, timeout=300)

    def post(self, path: str, body: dict) -> httpx.Response:
        """Send one request and return the answer; raise CliError if the server refuses or does not answer."""
        try:
            return self._client.post(path, json=body).raise_for_status()
        except httpx.HTTPError as error:
            raise CliError(
                f"the server failed {path} ({str(error).splitlines()[0]}): {self.reason()} (its log: {self.log})."
            ) from error

    def wait_ready(self, tick: Callable[[], None], timeout: float = 600.0) -> None:
        """Return when /health answers; raise CliError if the server ends or stays silent for `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise CliError(
                    f"vLLM ended with status {self.process.returncode} before it was ready: {self.reason()} "
                    f"(its log: {self.log})."
                )
            try:
                if self._client.get("/health", timeout=5).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            tick()
            time.sleep(POLL_SECONDS)
        raise CliError(f"vLLM was not ready after {timeout:.0f} s: {self.reason()} (its log: {self.log}).")


def free_port(wanted: int = 0) -> int:
    """Return `wanted`, or some free port for 0; raise CliError if `wanted` is taken.

    A server opens its port seconds later, so the free one lies where the system does not pick ports for others (from
    32768 on) and Ray's workers do not either (up to 19999).
    """
    if not wanted:
        for port in random.sample(range(20000, 32768), 100):
            with suppress(CliError):
                return free_port(port)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted))
        except OSError as error:
            raise CliError(f"port {wanted} cannot be used ({error.strerror}): name another with --port.", 2) from error
        return probe.getsockname()[1]


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that the servers are stopped."""

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
