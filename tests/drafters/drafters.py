"""The drafters of the table: how each is configured on each model runner, or why it is not there.

A reason names the line of vLLM 0.32.0 that says so.
"""

from __future__ import annotations

import importlib.util
import runpy
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"
TARGET, HEADS = MODELS / "specopt-target", MODELS / "heads"
NUMBER = 3
"""Draft tokens of a step."""
NGRAM = {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
NONE_OF_THEM = "not in vLLM: none of the methods of `config/speculative.py:73`"
NOT_ON_V2 = "not on V2: `config/vllm.py:2928`"
NO_PARALLEL_V2 = "not on V2: `config/vllm.py:2943`"


@dataclass(frozen=True)
class Drafter:
    """A row of the table.

    Attributes:
        title: Its name there.
        speculative: ``speculative_config`` without the number of drafts; None if vLLM has no such method.
        model: Name of the function of ``models/heads/checkpoints.py`` that writes ``speculative_config["model"]``.
        target: Name of such a function for the target; the shipped one if empty.
        absent: Why it does not run, by runner.
        note: What the reader must know of the weights.
    """

    title: str
    speculative: dict | None = None
    model: str = ""
    target: str = ""
    absent: dict[str, str] = field(default_factory=dict)
    note: str = ""


def both(reason: str) -> dict[str, str]:
    """The same reason on both runners."""
    return {"V1": reason, "V2": reason}


DRAFTERS = {
    "draft model": Drafter("draft model", {"model": str(MODELS / "specopt-draft")}),
    "n-gram": Drafter("n-gram", {"method": "ngram", **NGRAM}),
    "n-gram GPU": Drafter(
        "n-gram GPU",
        {"method": "ngram_gpu", **NGRAM},
        absent={"V1": "not on a CPU: needs pinned memory, `v1/worker/gpu_model_runner.py:628`"},
    ),
    "suffix": Drafter(
        "suffix decoding",
        {"method": "suffix", "suffix_decoding_min_token_prob": 0.0},
        absent={"V2": NOT_ON_V2}
        | (
            {}
            if importlib.util.find_spec("arctic_inference")
            else {"V1": "not run: arctic-inference was not installed; run by `tests/test_neighbours.py` where it is"}
        ),
    ),
    "EAGLE": Drafter("EAGLE", {"method": "eagle", "model": str(HEADS / "eagle")}),
    "EAGLE-3": Drafter("EAGLE-3", {"method": "eagle3", "model": str(HEADS / "eagle3")}),
    "MTP": Drafter("MTP (MiMo)", {"method": "mtp"}, target="mimo"),
    "Medusa": Drafter("Medusa", {"method": "medusa", "model": str(HEADS / "medusa")}, absent={"V2": NOT_ON_V2}),
    "MLP speculator": Drafter(
        "MLP speculator",
        absent={"V1": "not on V1: `v1/worker/gpu_model_runner.py:659`, nor in the registry of models", "V2": NOT_ON_V2},
    ),
    "Hydra": Drafter("Hydra", absent=both(NONE_OF_THEM)),
    "lookahead": Drafter("lookahead decoding", absent=both(NONE_OF_THEM)),
    "DFlash": Drafter("DFlash", {"method": "dflash"}, model="dflash", note="random weights"),
    "DSpark": Drafter(
        "DSpark",
        {"method": "dspark"},
        model="dspark",
        absent={"V1": "not on V1: `config/vllm.py:2978`"},
        note="random weights",
    ),
    "parallel EAGLE-3": Drafter(
        "parallel EAGLE-3 (P-EAGLE)",
        {"method": "eagle3", "parallel_drafting": True},
        model="parallel_eagle3",
        absent={"V2": NO_PARALLEL_V2},
        note="trained for the first draft token only",
    ),
    "parallel draft model": Drafter(
        "parallel draft model (PARD)",
        {"parallel_drafting": True},
        model="parallel_draft",
        absent={"V2": NO_PARALLEL_V2},
        note="trained for the first draft token only",
    ),
    "custom class": Drafter(
        "`custom_class`",
        {"method": "custom_class", "model": "repeated.LastOccurrence"},
        absent={"V2": NOT_ON_V2},
        note="`tests/drafters/repeated.py`",
    ),
}
RUNNABLE = {runner: [name for name, each in DRAFTERS.items() if runner not in each.absent] for runner in ("V1", "V2")}
KINDS = {
    "greedy": {"temperature": 0.0},
    "T = 1": {"temperature": 1.0},
    "T = 0.8, top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
}
steps = SimpleNamespace(**runpy.run_path(str(ROOT / "tests" / "engine" / "steps.py")))


def batches(number: int, max_tokens: int) -> list[dict]:
    """A batch of seeded requests for each of KINDS."""
    made = []
    for name, kind in KINDS.items():
        prompts, sampling = steps.requests(number, max_tokens, (kind,))
        made.append({"name": name, "prompts": prompts, "sampling": sampling})
    return made


def engines(names: list[str], folder: Path, number: int, max_tokens: int) -> list[dict]:
    """Engines of these drafters, and before them one without speculation for each target that they need."""
    make = runpy.run_path(str(HEADS / "checkpoints.py"))
    work, made, plain = batches(number, max_tokens), [], {}
    for name in names:
        drafter = DRAFTERS[name]
        target = drafter.target and make[drafter.target](folder / drafter.target)
        more = {"disable_log_stats": False, "max_num_seqs": 16} | ({"model": target} if target else {})
        if drafter.target not in plain:
            plain[drafter.target] = steps.engine(plain_name(name), None, work, **more)
            made.append(plain[drafter.target])
        speculative = drafter.speculative | {"num_speculative_tokens": NUMBER}
        if drafter.model:
            speculative["model"] = make[drafter.model](folder / drafter.model)
        made.append(steps.engine(name, speculative, work, **more))
    return made


def plain_name(name: str) -> str:
    """The engine without speculation that has the target of the drafter ``name``."""
    return f"plain {DRAFTERS[name].target}".strip()


def start(engines: list[dict], folder: Path, runner: str) -> tuple[dict, dict]:
    """Run engines as ``run_engines.start`` does, with this folder importable, for ``custom_class``."""
    import os

    found = runpy.run_path(str(ROOT / "tests" / "engine" / "run_engines.py"))
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *([before] if before else [])])
    try:
        return found["start"](engines, folder, runner)
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def equal_share(found: list[list[int]], expected: list[list[int]]) -> float:
    """Share of the expected tokens that were found in their places."""
    pairs = [pair for one, other in zip(found, expected, strict=True) for pair in zip(one, other, strict=False)]
    return sum(a == b for a, b in pairs) / sum(map(len, expected))


def compared(result: dict, plain: dict) -> dict:
    """What the table says of an engine's ``result``, beside the batches of one without speculation."""
    found = result["batches"]
    ids = {kind: (found[kind]["token_ids"], plain[kind]["token_ids"]) for kind in KINDS}
    shares = [equal_share(*each) for kind, each in ids.items() if kind != "greedy"]
    return {
        "sampler": result["sampler"],
        "stock_calls": result["stock_calls"],
        "greedy": ids["greedy"][0] == ids["greedy"][1],
        "seeded": sum(shares) / len(shares),
        "acceptance_length": {kind: round(acceptance_length(found[kind]), 3) for kind in KINDS},
        "drafts": {kind: found[kind]["drafts"] for kind in KINDS},
    }


def acceptance_length(batch: dict) -> float:
    """Mean tokens of a step that verified drafts."""
    return 1 + batch["accepted"] / max(batch["drafts"], 1)
