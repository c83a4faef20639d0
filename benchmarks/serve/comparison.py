"""A comparison under way: its servers, the client that drives them, and what each part adds to the record."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from vllm_specopt.benchmarks import record as records
from vllm_specopt.benchmarks.errors import CliError
from vllm_specopt.benchmarks.processes import ChildProcess, Server, free_port
from vllm_specopt.benchmarks.progress import Stages
from vllm_specopt.benchmarks.serve import fit, servers
from vllm_specopt.benchmarks.serve.arms import Arm
from vllm_specopt.benchmarks.serve.client import Client
from vllm_specopt.benchmarks.serve.plan import Cell, Plan, portable
from vllm_specopt.benchmarks.serve.settings import Settings, wide_pair

RECORD = "ab.json"
MAX_CELL_FAILURES = 2
# Seconds on two quiet cores, for the progress bar only.
EXTENSION_SECONDS, START_SECONDS, REHEARSAL_SECONDS, TEXTS_SECONDS, PROFILE_SECONDS = 12.0, 25.0, 30.0, 8.0, 12.0
CLIENT_SECONDS, CELL_SECONDS, TOKENS_PER_SECOND = 15.0, 2.0, 400.0


class Comparison:
    """What served and offline comparisons share: the record, and what happens to an arm that fails."""

    def __init__(self, settings: Settings, record: dict, scratch: Path, stages: Stages) -> None:
        self.settings, self.plan, self.record = settings, settings.plan, record
        self.scratch, self.stages = scratch, stages

    def run(self) -> None:
        """Run what is missing in the record; every finished part is written at once."""
        raise NotImplementedError

    def save(self) -> None:
        """Write the record."""
        records.save(self.settings.out / RECORD, self.record)

    def guard(self, name: str, part: Callable[[], None]) -> None:
        """Run a part of an arm; if it fails the arm is out, and the others go on.

        Raises:
            CliError: It failed before anything was measured: the others have the same model, and likely the same fault.
        """
        found = self.record["arms"].setdefault(name, {})
        if found.get("error"):
            return
        try:
            part()
        except CliError as error:
            if not self.record["cells"] and not self.record["failed_cells"]:
                found["error"] = str(error)
                raise CliError(f"arm {name} failed: {error}", error.exit_code) from error
            self.drop(name, str(error))
        self.save()

    def log(self, arm: Arm) -> Path:
        """Return where the log of an arm's process goes."""
        return self.settings.out / (re.sub(r"[^\w.-]+", "-", arm.name).strip("-") + ".log")

    def drop(self, name: str, reason: str) -> None:
        """Note that an arm is out."""
        self.record["arms"][name]["error"] = reason
        self.stages.say(f"arm {name} failed: {reason}")

    def extend(self) -> None:
        """Give the models a larger vocabulary, if that was asked for, unless an earlier run has done so."""
        if not self.settings.extended:
            return
        (target, draft), vocab_size = self.settings.extended
        made = wide_pair(self.settings.out)[0].parent
        with self.stages.next():
            # Written last, so that an interrupted process leaves nothing that looks whole.
            if (made / "wide_pair.json").exists():
                return
            command = [sys.executable, "-m", "vllm_specopt.benchmarks.serve.wide_pair", str(made)]
            command += ["--vocab-size", str(vocab_size), "--target", str(target)]
            command += ["--draft", str(draft)] if draft else ["--no-draft"]
            with ChildProcess(command, self.scratch / "pair.log", servers.environment(self.plan.on_cpu)) as child:
                if status := child.wait(self.stages.tick):
                    raise CliError(f"the vocabulary could not be extended (status {status}): {child.reason()}.")


class Served(Comparison):
    """A comparison of servers, with them and the client while they live."""

    def __init__(self, settings: Settings, record: dict, scratch: Path, stages: Stages) -> None:
        super().__init__(settings, record, scratch, stages)
        self.started = time.monotonic()
        self.servers: dict[str, servers.Endpoint] = {}
        self.processes: dict[str, Server] = {}
        self.client: Client | None = None
        self.failures: dict[str, int] = {}

    def run(self) -> None:
        """Start every arm, then compare texts, choose sizes, run the cells and profile."""
        self.extend()
        with ExitStack() as stack:
            # The client is replaced after a timeout, so it is looked up when all is stopped.
            stack.callback(self._stop_client)
            for number, arm in enumerate(self.plan.all_arms()):
                with self.stages.next():
                    self.guard(arm.name, partial(self._start, arm, number, stack))
            # With all told to stop at once, they do so side by side.
            stack.callback(self._terminate_servers)
            for arm in self.plan.all_arms():
                with self.stages.next():
                    self.guard(arm.name, partial(self._texts, arm))
            if self.plan.minutes:
                with self.stages.next():
                    if "fit" not in self.record:
                        self._fit(self.plan.minutes)
            for cell in self.plan.cells():
                with self.stages.next():
                    if cell.key not in self.record["cells"]:
                        self._cell(cell)
            for number, arm in enumerate(self.plan.timed_arms()):
                with self.stages.next():
                    self.guard(arm.name, partial(self._profile, arm, number))

    def drop(self, name: str, reason: str) -> None:
        """Note that an arm is out, and stop its server."""
        super().drop(name, reason)
        if process := self.processes.get(name):
            process.stop()

    def _terminate_servers(self) -> None:
        for server in self.processes.values():
            server.process.terminate()

    def _start(self, arm: Arm, number: int, stack: ExitStack) -> None:
        found = self.record["arms"][arm.name]
        if arm.url:
            self.servers[arm.name] = server = servers.Endpoint(arm.url, self.plan.served_name)
            if not server.healthy():
                raise CliError(f"no vLLM server answers at {arm.url}.")
        else:
            port = free_port(self.settings.port + number if self.settings.port else 0)
            command = servers.server_command(self.plan, arm, port, self.scratch / f"profiles-{number}")
            log = self.log(arm)
            process = stack.enter_context(Server(command, log, servers.environment(self.plan.on_cpu), port))
            self.processes[arm.name] = process
            process.wait_ready(self.stages.tick)
            if wrong := servers.worker_problem(arm, log.read_text(errors="replace")):
                raise CliError(f"{wrong} ({log}).")
            found["command"] = [portable(part).replace(str(self.scratch), "SCRATCH") for part in command]
            self.servers[arm.name] = server = servers.Endpoint(process.url, self.plan.served_name)
        found["kv_cache_tokens"] = server.kv_cache_tokens()
        if arm in self.plan.timed_arms():
            for point in self.plan.points:
                servers.burst(server, self.plan, str(point), servers.WARMUP_TOKENS)

    def _texts(self, arm: Arm) -> None:
        found = self.record["arms"][arm.name].setdefault("texts", {})
        for point in self.plan.compared(arm):
            if point not in found:
                found[point] = servers.texts(self.servers[arm.name], self.plan, point, self.stages.tick)

    def _fit(self, minutes: float) -> None:
        """Rehearse every point on the baseline, then choose the requests and repeats that fit into the time left."""
        arm = next((name for name, found in self.record["arms"].items() if not found.get("error")), None)
        try:
            self._start_client()
            found = [
                self._rehearse(arm, str(point), slots)
                for point in self.plan.points if arm
                for slots in self.plan.concurrency
            ]  # fmt: skip
        except CliError as error:
            self.stages.say(f"the rehearsal failed, so every run gets its full number of requests: {error}")
            return
        later = PROFILE_SECONDS * len(self.plan.timed_arms()) * len(self.plan.points)
        left = 60 * minutes - (time.monotonic() - self.started) - later
        chosen = fit.fit(self.plan, found, left)
        rehearsals = [asdict(each) for each in found]
        self.record["fit"] = chosen | {"asked": fit.asked(self.plan), "rehearsals": rehearsals}
        self.plan = self.plan.fitted(chosen)
        self.record["config"] = json.loads(json.dumps(self.plan.describe()))
        self.save()
        self.stages.replan(cell_stages(self.plan, chosen["seconds"] / len(self.plan.cells())))
        sizes = ", ".join(f"{requests} at {slots} in flight" for slots, requests in chosen["requests"].items())
        over = "" if chosen["seconds"] <= left else ": the least there is, and more than the minutes asked for"
        lasts = f"about {chosen['seconds'] / 60:.0f} min{over}"
        self.stages.say(f"{chosen['repeats']} repeats, requests per run: {sizes}; {lasts}")

    def _rehearse(self, arm: str, point: str, slots: int) -> fit.Rehearsal:
        count, started = fit.rehearsal_requests(slots), time.monotonic()
        plan, cell = replace(self.plan, num_prompts=count), Cell(arm, point, slots, 0)
        one = servers.run_cell(plan, cell, self.servers[arm].url, self._call, self.scratch)
        overhead = time.monotonic() - started - one["duration"]
        return fit.Rehearsal(point, slots, count, round(one["duration"], 3), round(overhead, 3))

    def _profile(self, arm: Arm, number: int) -> None:
        found = self.record["arms"][arm.name]
        if process := self.processes.get(arm.name):
            found["peak_mib"] = servers.peak_mib(process.process.pid)
            found["gpu_mib"] = None if self.plan.on_cpu else servers.gpu_mib(process.process.pid)
            server, profiles = self.servers[arm.name], self.scratch / f"profiles-{number}"
            found["scopes"] = {
                str(point): servers.step_parts(server, self.plan, at, profiles)
                for at, point in enumerate(self.plan.points)
            }

    def _cell(self, cell: Cell) -> None:
        if self.record["arms"][cell.arm].get("error"):
            return
        try:
            load = os.getloadavg()[0]
            found = servers.run_cell(self.plan, cell, self.servers[cell.arm].url, self._call, self.scratch)
            self.record["cells"][cell.key] = found | {"load_average": round(load, 2)}
            self.record["failed_cells"].pop(cell.key, None)
        except CliError as error:
            self.record["failed_cells"][cell.key] = str(error)
            self.failures[cell.arm] = self.failures.get(cell.arm, 0) + 1
            if not self.servers[cell.arm].healthy():
                process = self.processes.get(cell.arm)
                last = f": {process.reason()} (its log: {process.log})" if process else ""
                self.drop(cell.arm, f"its server no longer answers{last}")
            elif self.failures[cell.arm] >= MAX_CELL_FAILURES:
                self.drop(cell.arm, f"{MAX_CELL_FAILURES} of its runs failed, the last one: {error}")
            else:
                self.stages.say(f"{cell.key} failed: {error}")
        self.save()

    def _call(self, argv: list[str], log: Path, timeout: float) -> int:
        """Run `vllm` with these arguments in a fork of the client; stop it and raise CliError after `timeout`."""
        client = self._start_client()
        log.unlink(missing_ok=True)
        try:
            client.send(json.dumps({"argv": argv, "log": str(log)}))
        except BrokenPipeError as error:
            self._stop_client()
            raise CliError("vLLM's client has ended") from error
        answer = client.line(timeout, self.stages.tick)
        if not answer:
            self._stop_client()
            raise CliError(
                f"vllm bench serve took longer than {timeout:g} s (--timeout) and was stopped"
                if answer is None
                else "vLLM's client has ended"
            )
        return int(answer)

    def _start_client(self) -> Client:
        if self.client is None:
            log = self.scratch / "client-start.log"
            self.client = Client(log, servers.environment(self.plan.on_cpu)).__enter__()
            if self.client.line(300, self.stages.tick) != "ready\n":
                raise CliError(f"vLLM's client does not start: {self.client.reason()}.")
        return self.client

    def _stop_client(self) -> None:
        client, self.client = self.client, None
        if client is not None:
            client.stop()


def stages(plan: Plan) -> list[tuple[str, float]]:
    """Return the parts of a served comparison in order, with the seconds each is expected to take."""
    found = [(f"starting {arm.name}", START_SECONDS) for arm in plan.all_arms()]
    found += [(f"texts of {arm.name}", TEXTS_SECONDS) for arm in plan.all_arms()]
    # The sizes are chosen once the servers have been heard; until then the minutes are what there is to show.
    own = sum(seconds for _, seconds in found) + PROFILE_SECONDS * len(plan.timed_arms())
    each = max(60 * plan.minutes - own, 0) / len(plan.cells()) if plan.minutes and not plan.sizes else None
    found += [("choosing the number of requests", REHEARSAL_SECONDS)] if plan.minutes else []
    return found + cell_stages(plan, each)


def cell_stages(plan: Plan, seconds: float | None = None) -> list[tuple[str, float]]:
    """Return the parts of a run from its first cell on; ``seconds`` are those of one cell, where they are known."""
    found: list[tuple[str, float]] = []
    for cell in plan.cells():
        tokens = plan.requests(cell.concurrency) * plan.output_len
        name = f"{cell.arm}, {cell.point}, {cell.concurrency} in flight, repeat {cell.repeat + 1}"
        # The first one starts the client.
        guess = CELL_SECONDS + tokens / TOKENS_PER_SECOND + (0 if found else CLIENT_SECONDS)
        found.append((name, guess if seconds is None else seconds))
    return found + [(f"profiling {arm.name}", PROFILE_SECONDS) for arm in plan.timed_arms()]
