"""A comparison under way: its servers, the client that drives them, and what each part adds to the record."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from vllm_specopt.benchmarks.errors import CliError
from vllm_specopt.benchmarks.processes import Server, free_port
from vllm_specopt.benchmarks.progress import Stages
from vllm_specopt.benchmarks.serve import extend, fit, servers
from vllm_specopt.benchmarks.serve.arms import Arm
from vllm_specopt.benchmarks.serve.client_process import Client
from vllm_specopt.benchmarks.serve.plan import Cell, Plan, portable
from vllm_specopt.benchmarks.serve.settings import Settings, wide_pair

RECORD = "ab.json"
MAX_CELL_FAILURES = 2
# Seconds on two quiet cores, for the progress bar only.
START_SECONDS, GREEDY_SECONDS, PROFILE_SECONDS, CELL_SECONDS, TOKENS_PER_SECOND = 25.0, 8.0, 8.0, 2.0, 400.0
REHEARSAL_SECONDS = 30.0


class Comparison:
    """A run of `specopt ab`: its record, and the servers and the client while they live."""

    def __init__(self, settings: Settings, record: dict, scratch: Path, stages: Stages) -> None:
        self.settings, self.plan, self.record = settings, settings.plan, record
        self.started = time.monotonic()
        self.scratch, self.stages = scratch, stages
        self.servers: dict[str, servers.Endpoint] = {}
        self.processes: dict[str, Server] = {}
        self.client: Client | None = None
        self.failures: dict[str, int] = {}

    def run(self) -> None:
        """Run what is missing in the record; every finished part is written at once."""
        if self.settings.extended:
            with self.stages.next():
                self._extend(*self.settings.extended)
        with ExitStack() as stack:
            # The client is replaced after a timeout, so it is looked up when all is stopped.
            stack.callback(self._stop_client)
            for number, arm in enumerate(self.plan.all_arms()):
                with self.stages.next():
                    self._guard(arm.name, partial(self._start, arm, number, stack))
            # With all told to stop at once, they do so side by side.
            stack.callback(self._terminate_servers)
            for arm in self.plan.all_arms():
                with self.stages.next():
                    self._guard(arm.name, partial(self._greedy, arm))
            if self.plan.minutes:
                with self.stages.next():
                    if "fit" not in self.record:
                        self._fit(self.plan.minutes)
            for cell in self.plan.cells():
                with self.stages.next():
                    if cell.key not in self.record["cells"]:
                        self._cell(cell)
            for arm in self.plan.all_arms():
                with self.stages.next():
                    self._guard(arm.name, partial(self._profile, arm))

    def _terminate_servers(self) -> None:
        for server in self.processes.values():
            server.process.terminate()

    def save(self) -> None:
        """Write the record; a reader finds the old one or the new one, never half of one."""
        path = self.settings.out / RECORD
        fresh = path.with_suffix(".tmp")
        fresh.write_text(json.dumps(self.record) + "\n")
        fresh.replace(path)

    def _guard(self, name: str, part: Callable[[], None]) -> None:
        """Run a part of an arm; if it fails the arm is out, and the others go on."""
        found = self.record["arms"].setdefault(name, {})
        if found.get("error"):
            return
        try:
            part()
        except CliError as error:
            self._drop(name, str(error))
        self.save()

    def _drop(self, name: str, reason: str) -> None:
        self.record["arms"][name]["error"] = reason
        self.stages.say(f"arm {name} failed: {reason}")
        if process := self.processes.get(name):
            process.stop()

    def _start(self, arm: Arm, number: int, stack: ExitStack) -> None:
        found = self.record["arms"][arm.name]
        if arm.url:
            self.servers[arm.name] = server = servers.Endpoint(arm.url, self.plan.served_name)
            if not server.healthy():
                raise CliError(f"no vLLM server answers at {arm.url}.")
        else:
            port = free_port(self.settings.port + number if self.settings.port else 0)
            profiles = self.scratch / f"profiles-{number}"
            command = servers.server_command(self.plan, arm, port, profiles)
            log = self.settings.out / (re.sub(r"[^\w.-]+", "-", arm.name).strip("-") + ".log")
            process = stack.enter_context(Server(command, log, environment(self.plan.on_cpu), port))
            self.processes[arm.name] = process
            process.wait_ready(self.stages.tick)
            if wrong := servers.worker_problem(arm, log.read_text(errors="replace")):
                raise CliError(f"{wrong} ({log}).")
            found["command"] = [portable(part).replace(str(self.scratch), "SCRATCH") for part in command]
            self.servers[arm.name] = servers.Endpoint(process.url, self.plan.served_name)
        server = self.servers[arm.name]
        found["kv_cache_tokens"] = server.kv_cache_tokens()
        for temperature in self.plan.temperatures:
            servers.burst(server, self.plan, temperature)

    def _greedy(self, arm: Arm) -> None:
        found = self.record["arms"][arm.name]
        if "greedy" not in found:
            found["greedy"] = servers.greedy_completions(self.servers[arm.name], self.plan, self.stages.tick)

    def _extend(self, folders: tuple[Path, Path], vocab_size: int) -> None:
        made = wide_pair(self.settings.out)[0].parent
        # Written last, so that an interrupted process leaves nothing that looks whole.
        if not (made / "wide_pair.json").exists():
            log, env = self.scratch / "pair.log", environment(self.plan.on_cpu)
            extend.extend(folders, made, log, env, self.stages.tick, vocab_size=vocab_size)

    def _fit(self, minutes: float) -> None:
        """Rehearse every point on the baseline, then choose the requests and repeats that fit into the time left."""
        arm = next((name for name, found in self.record["arms"].items() if not found.get("error")), None)
        try:
            self._start_client()
            found = [
                self._rehearse(arm, temperature, slots)
                for temperature in self.plan.temperatures if arm
                for slots in self.plan.concurrency
            ]  # fmt: skip
        except CliError as error:
            self.stages.say(f"the rehearsal failed, so every run gets its full number of requests: {error}")
            return
        later = PROFILE_SECONDS * len(self.plan.all_arms()) * len(self.plan.temperatures)
        left = 60 * minutes - (time.monotonic() - self.started) - later
        chosen = fit.fit(self.plan, found, left)
        self.record["fit"] = chosen | {
            "asked": fit.asked(self.plan),
            "rehearsals": [asdict(each) for each in found],
        }
        self.plan = self.plan.fitted(chosen)
        self.record["config"] = json.loads(json.dumps(self.plan.describe()))
        self.save()
        self.stages.replan(cell_stages(self.plan, chosen["seconds"] / len(self.plan.cells())))
        sizes = ", ".join(f"{requests} at {slots} in flight" for slots, requests in chosen["requests"].items())
        over = "" if chosen["seconds"] <= left else ": the least there is, and more than the minutes asked for"
        lasts = f"about {chosen['seconds'] / 60:.0f} min{over}"
        self.stages.say(f"{chosen['repeats']} repeats, requests per run: {sizes}; {lasts}")

    def _rehearse(self, arm: str, temperature: float, slots: int) -> fit.Rehearsal:
        count, started = fit.rehearsal_requests(slots), time.monotonic()
        plan, cell = replace(self.plan, num_prompts=count), Cell(arm, temperature, slots, 0)
        one = servers.run_cell(plan, cell, self.servers[arm].url, self._call, self.scratch)
        overhead = time.monotonic() - started - one["duration"]
        return fit.Rehearsal(temperature, slots, count, round(one["duration"], 3), round(overhead, 3))

    def _profile(self, arm: Arm) -> None:
        found = self.record["arms"][arm.name]
        if process := self.processes.get(arm.name):
            found["peak_mib"] = servers.peak_mib(process.process.pid)
            found["gpu_mib"] = None if self.plan.on_cpu else servers.gpu_mib(process.process.pid)
            number = [each.name for each in self.plan.all_arms()].index(arm.name)
            found["scopes"] = {
                f"{temperature:g}": servers.sampler_share(
                    self.servers[arm.name], self.plan, temperature, self.scratch / f"profiles-{number}"
                )
                for temperature in self.plan.temperatures
            }

    def _cell(self, cell: Cell) -> None:
        if self.record["arms"][cell.arm].get("error"):
            return
        try:
            url = self.servers[cell.arm].url
            load = os.getloadavg()[0]
            found = servers.run_cell(self.plan, cell, url, self._call, self.scratch)
            self.record["cells"][cell.key] = found | {"load_average": round(load, 2)}
            self.record["failed_cells"].pop(cell.key, None)
        except CliError as error:
            self.record["failed_cells"][cell.key] = str(error)
            self.failures[cell.arm] = self.failures.get(cell.arm, 0) + 1
            if not self.servers[cell.arm].healthy():
                process = self.processes.get(cell.arm)
                last = f"; the end of {process.log}:\n{process.last_lines()}" if process else ""
                self._drop(cell.arm, f"its server no longer answers{last}")
            elif self.failures[cell.arm] >= MAX_CELL_FAILURES:
                self._drop(cell.arm, f"{MAX_CELL_FAILURES} of its runs failed, the last one: {error}")
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
            self.client = Client(self.scratch / "client-start.log", environment(self.plan.on_cpu)).__enter__()
            if self.client.line(300, self.stages.tick) != "ready\n":
                raise CliError(f"vLLM's client does not start:\n{self.client.last_lines()}")
        return self.client

    def _stop_client(self) -> None:
        client, self.client = self.client, None
        if client is not None:
            client.stop()


def environment(on_cpu: bool) -> dict[str, str]:
    """Return the variables of servers and client; what the user has set for the CPU cache wins."""
    cpu = {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
    return servers.ENV | (cpu if on_cpu else {})


def stages(plan: Plan, extended: bool = False) -> list[tuple[str, float]]:
    """Return the parts of a run in order, with the seconds each is expected to take."""
    names = [arm.name for arm in plan.all_arms()]
    found = [("extending the vocabulary", extend.SECONDS)] if extended else []
    found += [(f"starting {name}", START_SECONDS) for name in names]
    found += [(f"greedy completions: {name}", GREEDY_SECONDS) for name in names]
    # The sizes are chosen once the servers have been heard; until then the minutes are what there is to show.
    own = sum(seconds for _, seconds in found) + PROFILE_SECONDS * len(names)
    each = max(60 * plan.minutes - own, 0) / len(plan.cells()) if plan.minutes and not plan.sizes else None
    found += [("choosing the number of requests", REHEARSAL_SECONDS)] if plan.minutes else []
    return found + cell_stages(plan, each)


def cell_stages(plan: Plan, seconds: float | None = None) -> list[tuple[str, float]]:
    """Return the parts of a run from its first cell on; ``seconds`` are those of one cell, where they are known."""
    found = []
    for cell in plan.cells():
        tokens = plan.requests(cell.concurrency) * plan.output_len
        name = f"{cell.arm}, T = {cell.temperature:g}, {cell.concurrency} in flight, repeat {cell.repeat + 1}"
        found.append((name, CELL_SECONDS + tokens / TOKENS_PER_SECOND if seconds is None else seconds))
    return found + [(f"profiling {arm.name}", PROFILE_SECONDS) for arm in plan.all_arms()]
