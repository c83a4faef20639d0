"""Workloads of the serving comparison, none of which needs a hub: what `vllm bench serve` is told, and the prompts."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path

RANDOM_INPUT_LEN = 64
NUM_RANDOM_PROMPTS = 32


@dataclass(frozen=True)
class Workload:
    """A workload by ``name``: ``args`` for `vllm bench serve`, ``prompts`` (texts or token ids) for the greedy check.

    ``caveat`` says what a reader has to know of it, or is None.
    """

    name: str
    args: tuple[str, ...]
    prompts: tuple
    caveat: str | None = None


def workload(spec: str, output_len: int, shipped: Path, vocab_size: int, seed: int) -> Workload:
    """Return the workload of a specification (``shipped``, ``random``, a file, or ``KIND:PATH``).

    Raises:
        ValueError: The file is missing, empty or not of its kind, or the kind is unknown.
    """
    kind, colon, rest = spec.partition(":")
    length = str(output_len)
    args: tuple[str, ...]
    if spec == "random":
        args = ("random", "--random-input-len", str(RANDOM_INPUT_LEN), "--random-output-len", length)
        caveat = "Random tokens understate acceptance: no draft model foresees them."
        return Workload(spec, ("--dataset-name", *args), _random_prompts(vocab_size, seed), caveat)
    if spec == "shipped" or (not colon and spec.endswith(".jsonl")):
        path = shipped if spec == "shipped" else _existing(spec)
        args = ("custom", "--dataset-path", str(path), "--skip-chat-template", "--custom-output-len", length)
        return Workload(spec, ("--dataset-name", *args), _jsonl(path, "prompt"))
    if kind == "sharegpt" and rest:
        path = _existing(rest)
        args = ("sharegpt", "--dataset-path", str(path), "--sharegpt-output-len", length)
        return Workload(spec, ("--dataset-name", *args), _sharegpt(path))
    if kind == "spec-bench" and rest:
        path = _existing(rest)
        args = ("spec_bench", "--dataset-path", str(path), "--spec-bench-output-len", length)
        return Workload(spec, ("--dataset-name", *args), _jsonl(path, "turns"))
    if kind == "speed-bench" and rest:
        path = Path(rest)
        if not path.is_dir():
            raise ValueError(f"{path} is no folder: speed-bench takes the folder that holds SPEED-Bench's files")
        args = ("speed_bench", "--dataset-path", str(path.resolve()), "--speed-bench-output-len", length)
        return Workload(spec, ("--dataset-name", *args), _random_prompts(vocab_size, seed))
    raise ValueError(
        f"there is no workload {spec!r}: take shipped, random, FILE.jsonl, sharegpt:FILE, spec-bench:FILE or "
        "speed-bench:DIR"
    )


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise ValueError(f"the prompt file {path} does not exist")
    return Path(path).resolve()


def _jsonl(path: Path, field: str) -> tuple[str, ...]:
    try:
        found = [json.loads(line)[field] for line in path.read_text().splitlines() if line.strip()]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f'{path} must hold one JSON object with "{field}" per line') from error
    return _some([text if isinstance(text, str) else text[0] for text in found], path)


def _sharegpt(path: Path) -> tuple[str, ...]:
    try:
        content = json.loads(path.read_text())
        found = [item["conversations"][0]["value"] for item in content if len(item["conversations"]) >= 2]
    except (ValueError, KeyError, TypeError, IndexError, OSError) as error:
        raise ValueError(f'{path} is no ShareGPT file: a JSON list of objects with "conversations"') from error
    return _some(found, path)


def _some(prompts: list[str], path: Path) -> tuple[str, ...]:
    if not any(prompts):
        raise ValueError(f"{path} holds no prompts")
    return tuple(prompts)


def _random_prompts(vocab_size: int, seed: int) -> tuple[list[int], ...]:
    draw = random.Random(seed)
    return tuple([draw.randrange(vocab_size) for _ in range(RANDOM_INPUT_LEN)] for _ in range(NUM_RANDOM_PROMPTS))
