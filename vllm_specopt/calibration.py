"""The calibrated sigmoid: what ``specopt calibrate`` writes, and reading and checking it at start-up.

A calibration estimates a row's normaliser (log-sum-exp of logits / temperature) from a small part of the vocabulary;
see ``kernels/calibrated.py`` for the formula. It belongs to one pair of models. Imports neither torch nor vLLM.
"""

import functools
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
FORMS = ("one_hot", "probs", "logits")
NUM_COEFFICIENTS = 4
MAX_COEFFICIENT, MAX_TAIL, MAX_BLOCK = 1e4, 40.0, 512


@dataclass(frozen=True)
class Model:
    """What a model is known by. digest: of its configuration; bytes: of its weight files, None where not local."""

    name: str
    vocab_size: int
    digest: str
    bytes: int | None


@dataclass(frozen=True)
class Calibration:
    """Estimators of one pair's normalisers.

    block_size: Tokens per vocabulary block; block b begins at token ``b * block_size``.
    blocks: Block numbers, the one that holds most probability first.
    num_blocks: How many of them are read, by form of the draft distribution (in the order of ``FORMS``).
    coefficients: By form: (constant, temperature, partial log-sum-exp, extra) of the target's estimator, then, for
        logits, the draft's.
    tail: How far alpha lies above the normaliser. The larger, the closer a ratio of sigmoids is to one of
        probabilities; the difference is about exp(-tail).
    """

    vocab_size: int
    block_size: int
    blocks: tuple[int, ...]
    num_blocks: tuple[int, int, int]
    coefficients: tuple[tuple[tuple[float, ...], ...], ...]
    tail: float
    target: Model
    draft: Model
    path: str = ""

    def __hash__(self) -> int:
        """Without the blocks, of which there are thousands: verify() looks its tensors up by this in every step."""
        return hash((self.vocab_size, self.block_size, self.num_blocks, self.coefficients, self.tail))

    def read_blocks(self, form: str) -> tuple[int, ...]:
        """The blocks read with drafts of a form, in ascending order."""
        return tuple(sorted(self.blocks[: self.num_blocks[FORMS.index(form)]]))

    def estimators(self, form: str) -> tuple[tuple[float, ...], ...]:
        """Coefficients of the target's estimator, and of the draft's for logits."""
        return self.coefficients[FORMS.index(form)]

    def packed(self, form: str) -> list[float]:
        """What the backends read, ``[10]``: tail, the target's coefficients, the draft's (or zeros), 0."""
        target, *draft = self.estimators(form)
        return [self.tail, *target, *(draft[0] if draft else [0.0] * NUM_COEFFICIENTS), 0.0]


def describe(model_config) -> Model:
    """Describe a model from vLLM's ``ModelConfig``, the same way when calibrating and when serving.

    A local model's config.json is taken as it is; what a library makes of a remote one may change with its version.
    """
    folder = Path(model_config.model)
    config = model_config.hf_config.to_dict()
    sizes = []
    if (folder / "config.json").is_file():
        config = json.loads((folder / "config.json").read_text())
        sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()
    return Model(folder.name, model_config.get_vocab_size(), digest, sum(sizes) or None)


def check_models(calibration: Calibration, vllm_config) -> None:
    """Refuse a calibration that was made for other models than the engine's.

    The draft is not compared where it is no model of its own (n-gram and the like).

    Raises:
        ValueError: A model differs; the message names the file and the field.
    """
    speculative = vllm_config.speculative_config
    configs = {"target": vllm_config.model_config}
    if speculative is not None and speculative.method == "draft_model":
        configs["draft"] = speculative.draft_model_config
    for role, model_config in configs.items():
        made_for, found = getattr(calibration, role), describe(model_config)
        for key in ("vocab_size", "digest", "bytes"):
            was, now = getattr(made_for, key), getattr(found, key)
            if was != now and None not in (was, now):
                raise ValueError(
                    f"specopt.sigmoid.calibration {calibration.path} was made for another {role} model: "
                    f"models.{role}.{key} is {was!r} ({made_for.name}), and the engine's is {now!r} ({found.name})"
                )


def load(path: str) -> Calibration:
    """Read a calibration file.

    Raises:
        ValueError: The file is missing or malformed; the message names it and the field.
    """
    resolved = Path(path).expanduser().resolve()
    try:
        changed = resolved.stat().st_mtime_ns
    except OSError as error:
        raise ValueError(f"specopt.sigmoid.calibration {resolved} cannot be read: {error.strerror}") from error
    return _load(resolved, changed)


@functools.lru_cache(maxsize=8)
def _load(path: Path, changed: int) -> Calibration:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"specopt.sigmoid.calibration {path} is no JSON file: {error}") from error
    try:
        return parse(content, str(path))
    except _Malformed as error:
        raise ValueError(f"specopt.sigmoid.calibration {path}: {error}") from error


class _Malformed(Exception):
    """A field is not what it should be; the message names it."""


def parse(content: Any, path: str = "") -> Calibration:
    """Turn a file's content into a calibration; raises ``_Malformed`` with the first field that is wrong."""
    if not isinstance(content, Mapping):
        raise _Malformed("it holds no object")
    if content.get("format") != FORMAT:
        raise _Malformed(f"format is {content.get('format')!r}, expected {FORMAT}")
    vocab_size = _integer(content, "vocab_size", 1, 1 << 24)
    block_size = _integer(content, "block_size", 1, MAX_BLOCK)
    if block_size & (block_size - 1):
        raise _Malformed(f"block_size is {block_size}, expected a power of two")
    total = -(-vocab_size // block_size)
    blocks = content.get("blocks")
    if not isinstance(blocks, list) or any(type(b) is not int or not 0 <= b < total for b in blocks):
        raise _Malformed(f"blocks is no list of integers from 0 to {total - 1}")
    if len(set(blocks)) != len(blocks):
        raise _Malformed("blocks names a block twice")
    tail = _number(content.get("tail"), "tail", MAX_TAIL)
    if tail < 0:
        raise _Malformed(f"tail is {tail!r}, expected 0 to {MAX_TAIL:g}")
    counts, coefficients = [], []
    for form in FORMS:
        estimator = content.get("estimators", {}).get(form) if isinstance(content.get("estimators"), Mapping) else None
        if not isinstance(estimator, Mapping):
            raise _Malformed(f"estimators.{form} is missing")
        # Without a block there is nothing to estimate from but a one-hot draft's token.
        fewest = 0 if form == "one_hot" else 1
        counts.append(_integer(estimator, "num_blocks", fewest, len(blocks), f"estimators.{form}."))
        sides = ("target", "draft") if form == "logits" else ("target",)
        coefficients.append(tuple(_coefficients(estimator.get(s), f"estimators.{form}.{s}") for s in sides))
    models = content.get("models")
    if not isinstance(models, Mapping):
        raise _Malformed("models is missing")
    described = {role: _model(models.get(role), f"models.{role}") for role in ("target", "draft")}
    if vocab_size > described["target"].vocab_size:
        raise _Malformed(f"vocab_size is {vocab_size}, the target model's is {described['target'].vocab_size}")
    return Calibration(
        vocab_size, block_size, tuple(blocks), tuple(counts), tuple(coefficients), tail, **described, path=path
    )


def content_of(calibration: Calibration) -> dict:
    """The part of a file that is read back."""
    estimators = {}
    for form, count, sides in zip(FORMS, calibration.num_blocks, calibration.coefficients, strict=True):
        estimators[form] = {"num_blocks": count} | dict(zip(("target", "draft"), map(list, sides), strict=False))
    return {
        "format": FORMAT,
        "models": {role: asdict(getattr(calibration, role)) for role in ("target", "draft")},
        "vocab_size": calibration.vocab_size,
        "block_size": calibration.block_size,
        "tail": calibration.tail,
        "estimators": estimators,
        "blocks": list(calibration.blocks),
    }


def _integer(content: Mapping, key: str, low: int, high: int, prefix: str = "") -> int:
    value = content.get(key)
    if type(value) is not int or not low <= value <= high:
        raise _Malformed(f"{prefix}{key} is {value!r}, expected an integer from {low} to {high}")
    return value


def _number(value: Any, name: str, limit: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > limit:
        raise _Malformed(f"{name} is {value!r}, expected a finite number of at most {limit:g}")
    return float(value)


def _coefficients(value: Any, name: str) -> tuple[float, ...]:
    if not isinstance(value, list) or len(value) != NUM_COEFFICIENTS:
        raise _Malformed(f"{name} is no list of {NUM_COEFFICIENTS} numbers")
    return tuple(_number(number, f"{name}[{i}]", MAX_COEFFICIENT) for i, number in enumerate(value))


def _model(value: Any, name: str) -> Model:
    if not isinstance(value, Mapping):
        raise _Malformed(f"{name} is missing")
    for key in ("name", "digest"):
        if not isinstance(value.get(key), str):
            raise _Malformed(f"{name}.{key} is {value.get(key)!r}, expected a string")
    size = value.get("bytes")
    if size is not None:
        size = _integer(value, "bytes", 1, 1 << 60, f"{name}.")
    return Model(value["name"], _integer(value, "vocab_size", 1, 1 << 24, f"{name}."), value["digest"], size)
