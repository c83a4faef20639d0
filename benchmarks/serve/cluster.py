"""Spread the served runs of an A/B over a Ray cluster.

A *placement* is one arm in one repeat: one server and every cell measured on it. The placements of one repeat run one
after another in one Ray actor, which keeps its GPU (or CPU slots) throughout: arms are compared on the same device, and
repeats spread over the cluster. What fails is run once more and marked; the other placements go on.

The measurement itself runs in a child of the actor that ends, with its servers, as soon as the actor is gone: Ray does
not stop what a killed worker has started.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ATTEMPTS = 2
POLL_SECONDS = 0.5
CONNECT_SECONDS = 5.0
# A lost worker's server has this long to end and to free its memory before the placement starts again.
SETTLE_SECONDS = 12.0
LOG_LINES = 15


class ClusterError(Exception):
    """Ray or a cluster that can hold a server is missing; the message is one sentence for the user."""


@dataclass(frozen=True)
class Placement:
    """One arm in one repeat.

    Args:
        arm: Name of the arm.
        repeat: Number of the repeat; placements of the same repeat share a device.
        settings: What the measuring function is called with, as JSON can hold it. Paths must exist on every node.
    """

    arm: str
    repeat: int
    settings: dict


@dataclass(frozen=True)
class Slot:
    """What one server takes of the cluster."""

    num_gpus: float = 1
    num_cpus: float = 1

    def __str__(self) -> str:
        return f"{self.num_gpus:g} GPU and {self.num_cpus:g} CPU" if self.num_gpus else f"{self.num_cpus:g} CPU"


@contextmanager
def connected(address: str = "auto") -> Iterator[None]:
    """Connect this process to a running cluster, unless it is connected, and leave it again; raise ClusterError."""
    if importlib.util.find_spec("ray") is None:
        raise ClusterError(f"Ray is not installed beside {sys.executable}: pip install 'vllm-specopt[ray]'.")
    import ray

    if ray.is_initialized():
        yield
        return
    _check_address(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address}: start one with `ray start --head`, or give the address of one."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise ClusterError where nothing listens at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or "://" in address:
        return
    try:
        socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({error}): give the address that `ray start --head` printed."
        ) from error


def capacity(slot: Slot) -> int:
    """Return how many servers the connected cluster can hold at once; raise ClusterError if that is none."""
    import ray

    wanted = {name: amount for name, amount in (("GPU", slot.num_gpus), ("CPU", slot.num_cpus)) if amount}
    fits = [
        min((int(node["Resources"].get(name, 0) // amount) for name, amount in wanted.items()), default=1)
        for node in ray.nodes()
        if node["Alive"]
    ]
    if not sum(fits):
        raise ClusterError(f"none of the cluster's {len(fits)} nodes has {slot} for a server.")
    return sum(fits)


def run(
    placements: list[Placement],
    function: str,
    slot: Slot,
    on_result: Callable[[dict], None] = lambda result: None,
    tick: Callable[[], None] = lambda: None,
) -> list[dict]:
    """Run every placement on the connected cluster.

    Args:
        placements: In the order in which those of one repeat are to run.
        function: ``module:name`` of what measures one placement, importable on every node: called with the
            placement's settings, it starts the server, measures all cells, stops the server and returns a dict that
            JSON can hold.
        slot: What one server takes.
        on_result: Called with each finished placement's entry, for a record that survives an interruption.
        tick: Called about twice a second.

    Returns:
        One entry per placement, in their order: ``arm``, ``repeat``, ``result`` (what the function returned, None if
        both attempts failed), ``attempts``, ``failures`` (one sentence or log excerpt per failed attempt) and
        ``node`` (address, host and GPU ids the last attempt ran on).

    Raises:
        ClusterError: No node can hold a server.
    """
    import ray

    waiting = [_Repeat(found, slot, function) for found in _by_repeat(placements).values()]
    free = capacity(slot)
    running: dict[Any, _Repeat] = {}
    entries: dict[tuple[str, int], dict] = {}
    try:
        while waiting or running:
            while waiting and free:
                repeat = waiting.pop(0)
                running[repeat.submit()] = repeat
                free -= 1
            done, _ = ray.wait(list(running), timeout=POLL_SECONDS)
            tick()
            for reference in done:
                repeat = running.pop(reference)
                entry = repeat.take(reference, tick)
                if entry is not None:
                    entries[entry["arm"], entry["repeat"]] = entry
                    on_result(entry)
                if repeat.placements:
                    running[repeat.submit()] = repeat
                else:
                    repeat.release()
                    free += 1
    finally:
        for repeat in running.values():
            repeat.release()
    return [entries[placement.arm, placement.repeat] for placement in placements]


def _by_repeat(placements: list[Placement]) -> dict[int, list[Placement]]:
    found: dict[int, list[Placement]] = {}
    for placement in placements:
        found.setdefault(placement.repeat, []).append(placement)
    return found


@dataclass
class _Repeat:
    """The placements of one repeat that are still to run, and the actor that runs them."""

    placements: list[Placement]
    slot: Slot
    function: str
    actor: Any = None
    where: Any = None
    node: dict = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def submit(self):
        """Start the first placement, in the actor there is or a new one; return the reference of its result."""
        import ray

        if self.actor is None:
            options = {"num_gpus": self.slot.num_gpus, "num_cpus": self.slot.num_cpus, "max_restarts": 0}
            self.actor = ray.remote(_Worker).options(**options).remote()
            self.where = self.actor.where.remote()
        return self.actor.run.remote(self.function, self.placements[0].settings)

    def take(self, reference, tick: Callable[[], None]) -> dict | None:
        """Return the entry of a placement that is through; None if it has failed and is to run once more."""
        import ray

        result, lost = None, False
        try:
            result = ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            self.failures.append(str(error.cause))
        except ray.exceptions.RayError as error:
            lost = True
            self.failures.append(f"the worker was lost ({str(error).strip().splitlines()[0]})")
        try:
            self.node = ray.get(self.where)
        except ray.exceptions.RayError:
            self.node = self.node or {}
        if lost:
            self.release()
            _wait(SETTLE_SECONDS if len(self.failures) < ATTEMPTS else 0, tick)
        if result is None and len(self.failures) < ATTEMPTS:
            return None
        placement = self.placements.pop(0)
        attempts = len(self.failures) + (result is not None)
        entry = {"arm": placement.arm, "repeat": placement.repeat, "attempts": attempts, "failures": self.failures,
                 "node": self.node, "result": result}  # fmt: skip
        self.failures = []
        return entry

    def release(self) -> None:
        """End the actor and give its slot back."""
        import ray

        if self.actor is not None:
            ray.kill(self.actor)
            self.actor = None


def _wait(seconds: float, tick: Callable[[], None]) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        tick()
        time.sleep(POLL_SECONDS)


class _Worker:
    """Holds one slot of the cluster and measures placements in it, each in a child process."""

    def where(self) -> dict:
        """Return where this slot is."""
        import ray

        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return {"address": ray.util.get_node_ip_address(), "host": socket.gethostname(), "gpus": gpus,
                "node": context.get_node_id()}  # fmt: skip

    def run(self, function: str, settings: dict) -> dict:
        """Measure one placement; raise RuntimeError with the end of the log if that fails."""
        with tempfile.TemporaryDirectory(prefix="specopt-ray-") as folder:
            asked, answered, log = (Path(folder) / name for name in ("settings.json", "result.json", "log"))
            asked.write_text(json.dumps(settings))
            command = [sys.executable, "-m", "vllm_specopt.benchmarks.serve.cluster", function, asked, answered]
            with log.open("wb") as out:
                # Nothing is written to its standard input: that this end closes tells the child to stop.
                child = subprocess.Popen(
                    list(map(str, command)), stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True
                )
                status = child.wait()
            if status:
                end = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
                raise RuntimeError(f"status {status}, the end of its log:\n{end}")
            return json.loads(answered.read_text())


def stop_with_parent() -> None:
    """End this process in order, so that whatever it has started is stopped, once its standard input closes.

    The parent keeps the other end of a pipe open: it closes however the parent ends.
    """

    def leave(number: int, _: object) -> None:
        sys.exit(128 + number)

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)
        os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGTERM, leave)
    threading.Thread(target=watch, daemon=True).start()


def main(function: str, settings: str, result: str) -> None:
    """Measure one placement: the child's side of `_Worker.run`."""
    stop_with_parent()
    module, _, name = function.partition(":")
    measured = getattr(importlib.import_module(module), name)(json.loads(Path(settings).read_text()))
    Path(result).write_text(json.dumps(measured))


if __name__ == "__main__":
    main(*sys.argv[1:])
