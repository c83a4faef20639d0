"""Whether a folder can take what a run will leave in it, or holds a model: asked before anything is measured."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from vllm_specopt.benchmarks.errors import CliError

# Methods whose "model" in --speculative-config is none, and the names that stand for one.
NO_MODEL = {"custom_class", "extract_hidden_states", "ngram", "ngram_gpu", "suffix"}


def make_writable(folder: Path) -> None:
    """Create a folder where there is none, and write a file in it that is gone at once.

    Raises:
        OSError: One of the two cannot be done.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def offline() -> bool:
    """Whether Hugging Face's hub is not to be asked."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def model(name: str, role: str, is_offline: bool | None = None) -> str:
    """A model's resolved folder, or its name on a hub; raise CliError (2) where vLLM would find neither.

    Args:
        name: A folder, or owner/name.
        role: For the sentence: target or draft.
        is_offline: Whether only what was downloaded before counts; None asks the environment.
    """
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return str(folder.resolve())
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise CliError(f"{folder} is no model folder (it has no config.json): name the {role} model.", 2)
    if (offline() if is_offline is None else is_offline) and not _downloaded(name):
        raise CliError(
            f"the {role} model {name} is no folder and was not downloaded before, and vLLM runs without the hub here "
            f"(HF_HUB_OFFLINE): download it, or name its folder.", 2,
        )  # fmt: skip
    return name


def drafting(speculative: dict, is_offline: bool | None = None) -> None:
    """Check the draft model of a speculative configuration, if it names one, as :func:`model` does."""
    name = speculative.get("model")
    method = speculative.get("method")
    if not isinstance(name, str) or {method, name.strip("[]")} & NO_MODEL:
        return
    # Without a method, package.module.Class is a class that proposes drafts.
    if method is not None or not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", name):
        model(name, "draft", is_offline)


def _downloaded(name: str) -> bool:
    """Whether the hub's cache has a model's configuration; assumed where the cache is another's than Hugging Face's."""
    if os.environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true"):
        return True
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return True
    return isinstance(try_to_load_from_cache(name, "config.json"), str)
