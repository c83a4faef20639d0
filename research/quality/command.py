"""Has a pair of models write texts under every method of verification, and scores them against references."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from rich.console import Console

from research.quality import arms, engine, report
from research.quality.arms import Arm, Plan
from research.quality.settings import Options, plans
from vllm_specopt.benchmarks.errors import CliError
from vllm_specopt.benchmarks.folders import make_writable
from vllm_specopt.benchmarks.processes import answer, stopped_by_signals
from vllm_specopt.benchmarks.progress import Stages
from vllm_specopt.benchmarks.record import conditions, save

RECORD, PAGE, PLOT, TEXTS = "quality.json", "quality.md", "quality.svg", "texts"
# Seconds and tokens per second on two quiet cores, for the progress bar only.
START_SECONDS, TOKENS_PER_SECOND = 20.0, 800.0


def run(options: Options, out: Path, fresh: bool, argv: list[str]) -> int:
    """Run the command and return its exit status; raise CliError for bad input (2) or a failed run (1)."""
    asked = plans(options)
    # A task's record lies in a folder of its own.
    folders = [out if options.target else out / plan.name for plan in asked]
    for folder in folders:
        _prepare(folder)
    records = [_record(plan, folder, fresh, argv) for plan, folder in zip(asked, folders, strict=True)]
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 170)
    left = [
        (plan, arm)
        for plan, record in zip(asked, records, strict=True)
        for arm in plan.arms
        if not is_done(record, arm)
    ]
    stages = [(f"{plan.name}: {arm.name}", _seconds(plan)) for plan, arm in left]
    stages += [(f"{plan.name}: perplexity", _seconds(plan)) for plan in asked]
    with (
        stopped_by_signals(),
        tempfile.TemporaryDirectory(prefix="specopt-quality-") as scratch,
        Stages(console, stages) as progress,
    ):
        for plan, record, folder in zip(asked, records, folders, strict=True):
            for arm in (arm for owner, arm in left if owner is plan):
                with progress.next():
                    _run_arm(plan, arm, record, folder, Path(scratch), progress)
        for plan, record, folder in zip(asked, records, folders, strict=True):
            with progress.next():
                _add_perplexities(plan, record, folder, Path(scratch), progress)
    for plan, record, folder in zip(asked, records, folders, strict=True):
        _show(console, plan, record, folder)
    if len(records) > 1:
        _draw(console, records, out)
    pairs = [(record, arm.name) for plan, record in zip(asked, records, strict=True) for arm in plan.arms]
    failed = any("error" in record["arms"][name] or "perplexity_error" in record for record, name in pairs)
    return int(failed)


def _record(plan: Plan, folder: Path, fresh: bool, argv: list[str]) -> dict:
    """A new record, or the one in the folder if it was made with the same settings."""
    path = folder / RECORD
    if not fresh and path.exists():
        try:
            record = json.loads(path.read_text())
            before = record["config"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CliError(f"{path} is no record of `python -m research.quality`: drop it with --fresh.", 2) from error
        now = json.loads(json.dumps(plan.describe()))
        if before != now:
            changed = ", ".join(key for key in now if before.get(key) != now[key])
            raise CliError(f"{path} was made with other settings ({changed}): name another folder, or --fresh.", 2)
        return record
    return conditions(argv, "python -m research.quality") | {"config": plan.describe(), "arms": {}}


def key(arm: Arm) -> str:
    """What an arm is known by in a record: its option."""
    return json.dumps(arm.option)


def is_done(record: dict, arm: Arm) -> bool:
    """Whether a record holds an arm as it is now."""
    found = record["arms"].get(arm.name, {})
    return "runs" in found and found["option"] == key(arm)


def _prepare(folder: Path) -> None:
    """Check that the reports can be written before anything is measured."""
    try:
        make_writable(folder)
        make_writable(folder / TEXTS)
    except OSError as error:
        raise CliError(f"{folder} cannot be written ({error.strerror}): name another folder with -o.", 2) from error


def _seconds(plan: Plan) -> float:
    tokens = len(plan.items) * plan.seeds * len(plan.temperatures) * plan.max_tokens
    return START_SECONDS + tokens / TOKENS_PER_SECOND


def _run_arm(plan: Plan, arm: Arm, record: dict, folder: Path, scratch: Path, progress: Stages) -> None:
    """Add an arm to the record: what it measured, or why it failed."""
    try:
        result = _call(plan, plan.request(arm), scratch, progress)
        if wrong := arms.problem(arm, result):
            raise CliError(wrong)
        (folder / TEXTS / f"{arm.name}.json").write_text(json.dumps(result["runs"]))
        record["arms"][arm.name] = {"option": key(arm)} | arms.summarised(plan, result)
    except CliError as error:
        record["arms"][arm.name] = {"option": key(arm), "error": str(error)}
        progress.say(f"{plan.name}: the arm {arm.name} failed: {error}")
    _write(record, folder)


def _add_perplexities(plan: Plan, record: dict, folder: Path, scratch: Path, progress: Stages) -> None:
    """Score the texts of all arms that have no perplexity yet, in one engine with the target alone."""
    missing: dict[str, slice] = {}
    texts: list[dict] = []
    for name, arm in record["arms"].items():
        if "runs" in arm and any("perplexity" not in run for run in arm["runs"]):
            found = arms.answers({"runs": json.loads((folder / TEXTS / f"{name}.json").read_text())})
            missing[name] = slice(len(texts), len(texts) + len(found))
            texts += found
    if not missing:
        return
    try:
        log_probs = _call(plan, plan.score_request(texts), scratch, progress)["log_probs"]
    except CliError as error:
        record["perplexity_error"] = str(error)
        progress.say(f"{plan.name}: the perplexities are missing: {error}")
    else:
        record.pop("perplexity_error", None)
        for name, part in missing.items():
            arms.add_perplexities(record["arms"][name]["runs"], log_probs[part])
    _write(record, folder)


def _call(plan: Plan, request: dict, scratch: Path, progress: Stages) -> dict:
    """Run one engine in a process of its own and return its result."""
    return answer(engine.__name__, request, scratch, plan.env(), progress.tick)[0]


def _write(record: dict, folder: Path) -> None:
    """Replace the record as a whole, so that an interruption leaves the old one."""
    names = [arm.name for arm in arms.arms()]
    record["arms"] = {name: record["arms"][name] for name in names if name in record["arms"]}
    save(folder / RECORD, record, indent=1)


def _show(console: Console, plan: Plan, record: dict, folder: Path) -> None:
    left = [folder / RECORD, folder / PAGE]
    (folder / PAGE).write_text(report.markdown(record))
    for temperature in record["config"]["temperatures"]:
        console.print(report.table(record, temperature))
    for line in [*report.notes(record), *(f"left: {path}" for path in left)]:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    _draw(console, [record], folder)


def _draw(console: Console, records: list[dict], folder: Path) -> None:
    from research.quality.plot import plot

    if plot(records, folder / PLOT):
        console.print(f"left: {folder / PLOT}", highlight=False, markup=False, soft_wrap=True)
