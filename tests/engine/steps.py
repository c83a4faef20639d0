"""Seeded requests whose text must not depend on speculation, and the engines that they are put to."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXACT = {"specopt": {"method": "exact"}}
NGRAM = {"method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}
MIN_P = {"temperature": 1.0, "min_p": 0.05}
# What the requests take in turn, so that batches are mixed.
KINDS = (
    {"temperature": 0.7},
    {"temperature": 2.0},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 20},
    {"temperature": 0.8, "top_p": 0.95, "top_k": 40},
    {"temperature": 0.9, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
    {"temperature": 0.0},
    MIN_P,
    {"temperature": 1.0, "presence_penalty": 0.5, "top_p": 0.95},
    {"temperature": 1.0, "logit_bias": {token: 3.0 for token in range(300, 320)}},
)


def drafting(num_drafts: dict[str, int]) -> dict[str, dict | None]:
    """Speculative configurations by name: ``off``, ``ngram`` and ``draft-K``; the numbers are of draft tokens."""
    draft_model = str(ROOT / "models" / "specopt-draft")
    return {
        name: None
        if name == "off"
        else NGRAM | {"num_speculative_tokens": number}
        if name == "ngram"
        else {"model": draft_model, "num_speculative_tokens": number}
        for name, number in num_drafts.items()
    }


def prompts(number: int | None = None) -> list[str]:
    """So many of the shipped prompts, or all."""
    found = [json.loads(line)["prompt"] for line in (ROOT / "models" / "prompts.jsonl").read_text().splitlines()]
    assert number is None or len(found) >= number
    return found[:number]


def requests(number: int, max_tokens: int, kinds=KINDS) -> tuple[list[str], list[dict]]:
    """Prompts and sampling parameters of so many requests, each with its own seed."""
    sampling = [
        kinds[index % len(kinds)] | {"seed": 1000 + index, "max_tokens": max_tokens, "ignore_eos": True}
        for index in range(number)
    ]
    return prompts(number), sampling


def arguments(speculative: dict | None, **more) -> dict:
    """Keyword arguments of ``LLM``: the option, the shipped pair, single precision, no server; changed by ``more``."""
    return {
        "model": str(ROOT / "models" / "specopt-target"),
        "speculative_config": speculative,
        "additional_config": dict(EXACT),
        "dtype": "float32",
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "enable_prefix_caching": False,
        "max_model_len": 512,
        # Of 128 tokens each: enough for every request, and sooner made than a gigabyte.
        "num_gpu_blocks_override": 256,
        **more,
    }


def engine(name: str, speculative: dict | None, batches: list[dict], **llm) -> dict:
    """An engine as ``run_engines.py`` takes it, of these arguments."""
    return {"name": name, "llm": arguments(speculative, **llm), "batches": batches}


def batches(texts: list[str], sampling: list[dict], alone: int, noise: dict | None = None) -> list[dict]:
    """All requests at once; reversed, between others without seeds; and the first ones each on its own."""
    noise = noise or {"temperature": 1.0, "max_tokens": 7}
    mixed = [(p, s) for pair in zip(texts, sampling, strict=True) for p, s in (pair, (pair[0], noise))][::-1]
    return [
        {"name": "together", "prompts": texts, "sampling": sampling},
        {"name": "mixed", "prompts": [p for p, _ in mixed], "sampling": [s for _, s in mixed]},
        *(
            {"name": f"alone {index}", "prompts": [texts[index]], "sampling": [sampling[index]]}
            for index in range(alone)
        ),
    ]


def pairs(result: dict, expected: list[list[int]], alone: int) -> list[tuple[str, int, list[int], list[int]]]:
    """(batch, request, its tokens, those expected) of all batches of an engine."""
    together = result["batches"]["together"]["token_ids"]
    mixed = result["batches"]["mixed"]["token_ids"][::-1][::2]
    parts = [("together", index, tokens) for index, tokens in enumerate(together)]
    parts += [("mixed", index, tokens) for index, tokens in enumerate(mixed)]
    parts += [("alone", index, result["batches"][f"alone {index}"]["token_ids"][0]) for index in range(alone)]
    return [(batch, index, tokens, expected[index]) for batch, index, tokens in parts]


def differing(result: dict, expected: list[list[int]], alone: int) -> list[str]:
    """Which requests of an engine's batches have other tokens than expected, and where they part."""
    found = []
    for batch, index, tokens, wanted in pairs(result, expected, alone):
        if tokens != wanted:
            at = next((i for i, (a, b) in enumerate(zip(tokens, wanted, strict=False)) if a != b), "length")
            found.append(f"request {index} {batch}, token {at}")
    return found
