"""Arms and requests of the quality benchmark: what `python -m research.quality` runs. Nothing here measures.

An arm is one engine (``engine.py``), a process of its own; its texts are scored here, and their perplexity comes
from one more engine with the target alone.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from research.quality import scores
from vllm_specopt.benchmarks.record import CHECKOUT
from vllm_specopt.benchmarks.serve.engine import ENV

TARGET, DRAFT, EXACT, EXACT_CHOSEN = "target", "draft", "exact", "exact-chosen"
SCALES = (1e0, 1e1, 1e4)
BUDGETS = (0.01, 0.05, 0.2, 1.0)
# epsilon and delta; Medusa's own are 0.09 and 0.3.
TYPICAL = ((0.3, 0.55), (0.09, 0.3), (0.01, 0.1))
TEXTS_SHOWN = 3
BATCHED_TOKENS = 4096
COUNTS = ("tokens", "cut", "num_drafts", "num_draft_tokens", "num_accepted_tokens")


@dataclass(frozen=True)
class Arm:
    """Who writes the texts: the target or the draft alone, or both with a method of verification.

    chosen: The draft proposes its likeliest tokens, not drawn ones.
    """

    name: str
    option: dict | None = None
    chosen: bool = False

    @property
    def speculates(self) -> bool:
        """Whether both models take part."""
        return self.option is not None


def arms() -> tuple[Arm, ...]:
    """All arms; those of a family behind each other, from the strictest to the laxest."""
    scaled = {f"sigmoid-{scale:.0e}".replace("+0", ""): {"alpha": -scale, "beta": scale} for scale in SCALES}
    budgets = {f"budget-{delta:g}": {"delta": delta} for delta in BUDGETS}
    typical = {f"typical-{epsilon:g}": {"epsilon": epsilon, "delta": delta} for epsilon, delta in TYPICAL}
    return (
        Arm(TARGET),
        Arm(DRAFT),
        Arm(EXACT, {"method": "exact"}),
        *(Arm(name, {"method": "sigmoid", "sigmoid": value}) for name, value in scaled.items()),
        Arm(EXACT_CHOSEN, {"method": "exact"}, chosen=True),
        *(Arm(name, {"method": "budget", "budget": value}, chosen=True) for name, value in budgets.items()),
        *(Arm(name, {"method": "typical", "typical": value}, chosen=True) for name, value in typical.items()),
    )


@dataclass(frozen=True)
class Plan:
    """What is run on one set of items.

    items: (prompt, reference) of each.
    law_items: On how many of them the emitted law is computed, per seed, where drafts are drawn; 0 leaves it out.
    ngram: Words per n-gram of the repetition rate.
    """

    name: str
    target: str
    draft: str
    items: tuple[tuple[str, str], ...]
    metrics: tuple[str, ...]
    arms: tuple[Arm, ...]
    temperatures: tuple[float, ...]
    seeds: int
    max_tokens: int
    stop: tuple[str, ...]
    dtype: str
    draft_tokens: int
    max_model_len: int
    max_num_seqs: int
    law_items: int
    ngram: int
    threads: int | None
    on_cpu: bool

    def _llm(self, model: str, **more) -> dict:
        if self.on_cpu:
            # vLLM's CPU worker stops at a seeded request whose prompt is split over steps.
            more |= {"enable_chunked_prefill": False, "max_num_batched_tokens": max(BATCHED_TOKENS, self.max_model_len)}
        return {
            "model": model,
            "dtype": self.dtype,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "enforce_eager": self.on_cpu,
            "distributed_executor_backend": "uni",
            "disable_log_stats": False,
            "enable_prefix_caching": False,
            "seed": 0,
        } | more

    def request(self, arm: Arm) -> dict:
        """What ``engine.py`` is asked for one arm. The arms that speculate differ by the option only."""
        more: dict = {}
        if arm.speculates:
            more["speculative_config"] = {
                "model": self.draft,
                "num_speculative_tokens": self.draft_tokens,
                "draft_sample_method": "greedy" if arm.chosen else "probabilistic",
            }
            more["additional_config"] = {"specopt": arm.option}
        return {
            "llm": self._llm(self.draft if arm.name == DRAFT else self.target, **more),
            "prompts": [prompt for prompt, _ in self.items],
            "temperatures": self.temperatures,
            "seeds": self.seeds,
            "max_tokens": self.max_tokens,
            "stop": list(self.stop),
            "law_items": min(self.law_items, len(self.items)) if arm.speculates and not arm.chosen else 0,
        }

    def score_request(self, texts: list[dict]) -> dict:
        """What ``engine.py`` is asked to score texts, ``{"prompt": ids, "answer": ids}``, with the target.

        An engine writes one token after what it reads, so that an answer which fills its context loses the last one.
        """
        texts = [
            text | {"answer": text["answer"][: max(self.max_model_len - 1 - len(text["prompt"]), 0)]} for text in texts
        ]
        return {"llm": self._llm(self.target), "score": texts}

    def env(self) -> dict[str, str]:
        """Environment variables of every engine; the network stays out of it where both models are local."""
        is_local = Path(self.target).is_dir() and Path(self.draft).is_dir()
        found = {
            key: value
            for key, value in ENV.items()
            if (self.on_cpu or not key.startswith("VLLM_CPU_")) and (is_local or not key.endswith("_OFFLINE"))
        }
        found["PYTHONPATH"] = os.pathsep.join([str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return found | ({"OMP_NUM_THREADS": str(self.threads)} if self.threads else {})

    def describe(self) -> dict:
        """The configuration for the record, models by name; with an equal one a record can be gone on with."""
        items = hashlib.sha256(json.dumps(self.items).encode()).hexdigest()[:16]
        return {
            "name": self.name,
            "target": shown(self.target),
            "draft": shown(self.draft),
            "items": len(self.items),
            "items_digest": items,
            "metrics": list(self.metrics),
            "temperatures": list(self.temperatures),
            "seeds": self.seeds,
            "max_tokens": self.max_tokens,
            "stop": list(self.stop),
            "dtype": self.dtype,
            "draft_tokens": self.draft_tokens,
            "max_model_len": self.max_model_len,
            "max_num_seqs": self.max_num_seqs,
            "law_items": self.law_items,
            "ngram": self.ngram,
            "threads": self.threads,
        }


def shown(model: str) -> str:
    """A model's name without the path to it."""
    folder = Path(model)
    return "/".join(folder.parts[-2:]) if folder.is_dir() else model


def problem(arm: Arm, result: dict) -> str | None:
    """Why the result of a run is not one of its arm, if it is not."""
    if arm.speculates != result["sampler"].startswith("vllm_specopt."):
        return f"ran the sampler {result['sampler']}"
    return None


def summarised(plan: Plan, result: dict) -> dict:
    """The record of one arm: its scores by run, and the first texts. Perplexities are added later."""
    references = [reference for _, reference in plan.items]
    runs = []
    for run in result["runs"]:
        drafted, drafts = run.get("num_draft_tokens"), run.get("num_drafts")
        law = run.get("law") or {}
        runs.append(
            {
                "temperature": run["temperature"],
                "seed": run["seed"],
                "seconds": round(run["seconds"], 3),
                **{key: run[key] for key in COUNTS if key in run},
                **scores.scores(plan.metrics, references, run["texts"]),
                "acceptance_rate": run["num_accepted_tokens"] / drafted if drafted else None,
                "acceptance_length": 1 + run["num_accepted_tokens"] / drafts if drafts else None,
                "tokens_per_second": run["tokens"] / run["seconds"],
                "repetition": scores.repetition_rate(run["texts"], plan.ngram),
                "law": law or None,
                "tv": law.get("tv"),
            }
        )
    first = result["runs"][0]["texts"][:TEXTS_SHOWN]
    return {key: result[key] for key in ("engine_seconds", "sampler", "dtype")} | {
        "runs": runs,
        "texts": [
            {"prompt": prompt, "reference": reference, "text": text}
            for (prompt, reference), text in zip(plan.items, first, strict=False)
        ],
    }


def answers(result: dict) -> list[dict]:
    """The texts of an arm as token ids, run after run, for ``Plan.score_request``."""
    return [
        {"prompt": prompt, "answer": answer}
        for run in result["runs"]
        for prompt, answer in zip(run["prompt_token_ids"], run["token_ids"], strict=True)
    ]


def add_perplexities(runs: list[dict], log_probs: Sequence[Sequence[float]]) -> None:
    """Add to each run of an arm the perplexity of its texts, from one list of log probabilities per text."""
    per_run = len(log_probs) // len(runs)
    for number, run in enumerate(runs):
        texts = log_probs[number * per_run : (number + 1) * per_run]
        run["perplexity"] = scores.perplexity([value for text in texts for value in text])
