"""The drafters of the table: how each is configured on each model runner, or why it is not there.

A reason names the line of vLLM 0.32.0 that says so.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
from dataclasses import dataclass, field
from pathlib import Path

from engine import run_engines, steps
from support import prepared

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"
DRAFT = str(MODELS / "specopt-draft")
TARGET, HEADS = MODELS / "specopt-target", MODELS / "heads"
NUMBER = 3
"""Draft tokens of a step."""
NGRAM = {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
NONE_OF_THEM = "not in vLLM: none of the methods of `config/speculative.py:73`"
IN_EXAMPLES = "a `custom_class` in [examples/drafters](../examples/drafters)"
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
        more: What else ``additional_config`` holds.
        absent: Why it does not run, by runner.
        needs: A module without which it is not run; the row is then what was run where it is there.
        note: What the reader must know of the weights.
    """

    title: str
    speculative: dict | None = None
    model: str = ""
    target: str = ""
    more: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    needs: str = ""
    note: str = ""


DRAFTERS = {
    "draft model": Drafter("draft model", {"model": DRAFT}),
    "by batch size": Drafter(
        "draft model, number of drafts by batch size",
        {"model": DRAFT, "num_speculative_tokens_per_batch_size": [[1, 1, 3], [2, 2, 0], [3, 5, 1], [6, 16, 2]]},
        note="3 for one request, none for 2",
    ),
    "n-gram": Drafter("n-gram", {"method": "ngram", **NGRAM}),
    "n-gram GPU": Drafter(
        "n-gram GPU",
        {"method": "ngram_gpu", **NGRAM},
        absent={"V1": "not on a CPU: needs pinned memory, `v1/worker/gpu_model_runner.py:628`"},
    ),
    "suffix": Drafter(
        "suffix decoding",
        {"method": "suffix", "suffix_decoding_min_token_prob": 0.0},
        absent={"V2": NOT_ON_V2},
        needs="arctic_inference",
        note="needs arctic-inference, built from source",
    ),
    "EAGLE": Drafter("EAGLE", {"method": "eagle", "model": str(HEADS / "eagle")}),
    "EAGLE-3": Drafter("EAGLE-3", {"method": "eagle3", "model": str(HEADS / "eagle3")}),
    "MTP": Drafter("MTP (MiMo)", {"method": "mtp"}, target="mimo"),
    "Medusa": Drafter("Medusa", {"method": "medusa", "model": str(HEADS / "medusa")}, absent={"V2": NOT_ON_V2}),
    "MLP speculator": Drafter(
        "MLP speculator",
        absent={"V1": "not on V1: `v1/worker/gpu_model_runner.py:659`, nor in the registry of models", "V2": NOT_ON_V2},
    ),
    "Medusa, custom class": Drafter(
        "Medusa, for vLLM 0.33",
        {"method": "custom_class", "model": "medusa_hydra.Medusa"},
        more={"heads": str(HEADS / "medusa")},
        absent={"V2": NOT_ON_V2},
        note=IN_EXAMPLES,
    ),
    "Hydra": Drafter(
        "Hydra",
        {"method": "custom_class", "model": "medusa_hydra.Hydra"},
        more={"heads": str(HEADS / "hydra")},
        absent={"V2": NOT_ON_V2},
        note=IN_EXAMPLES,
    ),
    "lookahead": Drafter(
        "lookahead decoding, in one chain",
        {"method": "custom_class", "model": "lookahead.Lookahead"},
        absent={"V2": NOT_ON_V2},
        note=IN_EXAMPLES,
    ),
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
    "staged": Drafter("staged speculative decoding", absent={"V1": NONE_OF_THEM, "V2": NONE_OF_THEM}),
    "adaptive": Drafter(
        "adaptive verification",
        {"method": "dspark", "enable_adaptive_verification": True},
        model="dspark",
        absent={"V1": "not on V1: `config/vllm.py:2981`", "V2": "needs CUDA graphs, `config/vllm.py:3013`"},
        note="drafts by the drafter's confidence; [stock's sampler](supported.md)",
    ),
    "custom class": Drafter(
        "`custom_class`",
        {"method": "custom_class", "model": "repeated.LastOccurrence"},
        absent={"V2": NOT_ON_V2},
        note="`tests/drafters/repeated.py`",
    ),
}
RUNNABLE = {
    runner: [
        name
        for name, each in DRAFTERS.items()
        if runner not in each.absent and (not each.needs or importlib.util.find_spec(each.needs))
    ]
    for runner in ("V1", "V2")
}
KINDS = {
    "greedy": {"temperature": 0.0},
    "T = 1": {"temperature": 1.0},
    "T = 0.8, top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
}


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
        made[-1]["llm"]["additional_config"] |= drafter.more
    return made


def plain_name(name: str) -> str:
    """The engine without speculation that has the target of the drafter ``name``."""
    return f"plain {DRAFTERS[name].target}".strip()


def start(engines: list[dict], folder: Path, runner: str) -> tuple[dict, dict]:
    """Run engines as ``run_engines.start`` does, with what ``custom_class`` names importable."""
    folders = [str(Path(__file__).parent), str(ROOT / "examples" / "drafters")]
    path = prepared.environment(runner)["PYTHONPATH"]
    return run_engines.start(engines, folder, runner, PYTHONPATH=os.pathsep.join([*folders, path]))


def equal_share(found: list[list[int]], expected: list[list[int]]) -> float:
    """Share of the expected tokens that were found in their places."""
    pairs = [pair for one, other in zip(found, expected, strict=True) for pair in zip(one, other, strict=False)]
    return sum(a == b for a, b in pairs) / sum(map(len, expected))


def compared(result: dict, plain: dict) -> dict:
    """What is kept of an engine's ``result``, beside the batches of one without speculation."""
    found = result["batches"]
    ids = {kind: (found[kind]["token_ids"], plain[kind]["token_ids"]) for kind in KINDS}
    shares = [equal_share(*each) for kind, each in ids.items() if kind != "greedy"]
    return {
        "sampler": result["sampler"],
        "stock_calls": result["stock_calls"],
        "greedy": ids["greedy"][0] == ids["greedy"][1],
        "seeded": sum(shares) / len(shares),
        "batches": {kind: {name: found[kind][name] for name in ("drafts", "accepted_by_position")} for kind in KINDS},
    }


def acceptance_length(batch: dict) -> tuple[float, float]:
    """Mean tokens of a step that verified drafts, and half the width of its 95 % interval, steps being independent.

    Args:
        batch: "drafts", the steps, and "accepted_by_position", how many accepted the first draft token, the second ...
    """
    number = max(batch["drafts"], 1)
    shares = [accepted / number for accepted in batch["accepted_by_position"]]
    mean = sum(shares)
    # The square of n is the sum of the first n odd numbers.
    variance = sum((2 * i + 1) * share for i, share in enumerate(shares)) - mean**2
    return 1 + mean, 1.96 * (max(variance, 0.0) / max(number - 1, 1)) ** 0.5
