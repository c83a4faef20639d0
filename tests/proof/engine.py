"""End to end: real V1 engines, drafts drawn by vLLM's own drafter, texts against the target model's distribution.

A verifier can be right and the engine's output still biased: by drafts that are not drawn from the distribution handed
over, or that share their noise with the verifier. Only the emitted text shows that. Many requests continue one prompt;
each token is compared with the target's own distribution after the tokens before it, which transformers computes from
the same weights. The first token is left out, for no verification emits it.
"""

import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from engine import steps
from support import prepared

from proof.judgement import Judgement, judge
from vllm_specopt.kernels.reference.rows import filter_row_ref

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"
SCRIPT = Path(__file__).with_name("engine_draws.py")
# After this beginning and its likeliest token nearly half of the drafts are rejected.
PROMPT, PROMPT_TOKENS, NUM_DRAFTS, MAX_TOKENS = 7, 10, 4, 3
SETTINGS = {"T = 1": {"temperature": 1.0}, "T = 0.8, top-p 0.9": {"temperature": 0.8, "top_p": 0.9}}
SEEDS = ("seeded", "unseeded")
STATISTICS = (
    "second token",
    "second token, an accepted draft",
    "second token, a recovered one",
    "third token",
    "third token, after an accepted draft",
    "third token, after a recovered one",
)
SHARED_NOISE = "drafter shares the residual's u"


@dataclass(frozen=True)
class Draws:
    """What requests emitted: ``tokens`` ``[requests, 3]``, and ``accepted`` ``[requests]`` drafts of the first step."""

    tokens: np.ndarray
    accepted: np.ndarray


def prompt_ids() -> list[int]:
    """The beginning of one of the shipped prompts."""
    from tokenizers import Tokenizer

    encoded = Tokenizer.from_file(str(MODELS / "specopt-target" / "tokenizer.json")).encode(steps.prompts()[PROMPT])
    return encoded.ids[:PROMPT_TOKENS]


def draw(settings: dict[str, dict], requests: int, seed: int, shared_noise: int = 0) -> dict[str, Draws]:
    """Run an engine.

    Args:
        settings: Sampling parameters by name. Each is used by seeded requests and by unseeded ones, two batches.
        requests: Number in each batch.
        seed: Of the engine; the requests' own follow from it.
        shared_noise: Number of requests in one more batch at the end, whose drafter shares its noise with the verifier.

    Returns:
        The draws by name: ``"T = 1, seeded"`` and so on, then ``SHARED_NOISE``.
    """
    speculative = {"model": str(MODELS / "specopt-draft"), "num_speculative_tokens": NUM_DRAFTS}
    speculative["draft_sample_method"] = "probabilistic"
    llm = steps.arguments(speculative, max_model_len=64, max_num_seqs=256, num_gpu_blocks_override=512, seed=seed)
    common = {"max_tokens": MAX_TOKENS, "ignore_eos": True, "detokenize": False}
    batches = [
        {
            "name": f"{name}, {seeds}",
            "sampling": common | sampling,
            "requests": requests,
            "first_seed": 1 + seed * requests if seeds == "seeded" else None,
        }
        for name, sampling in settings.items()
        for seeds in SEEDS
    ]
    if shared_noise:
        sampling = common | SETTINGS["T = 1"]
        batches.append({"name": SHARED_NOISE, "sampling": sampling, "requests": shared_noise, "first_seed": None})
    request = {"llm": llm, "prompt": prompt_ids(), "batches": batches, "shared_noise": SHARED_NOISE}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "request.json").write_text(json.dumps(request))
        status, log = prepared.run("V1", SCRIPT, "request.json", "result.npz", cwd=folder)
        if status:
            raise RuntimeError(f"the engine ended with {status}: {log[-2000:]}")
        with np.load(Path(folder) / "result.npz") as found:
            return {name: Draws(found[name][:, :MAX_TOKENS], found[name][:, MAX_TOKENS]) for name in found}


@cache
def _model(name: str):
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    # Its lines would run into those of the proof.
    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32).eval()


def _scaled(name: str, prefixes: np.ndarray, temperature: float) -> torch.Tensor:
    prompt = torch.tensor(prompt_ids()).expand(len(prefixes), -1)
    ids = torch.cat([prompt, torch.from_numpy(prefixes)], 1)
    with torch.inference_mode():
        return torch.cat([_model(name)(part).logits[:, -1] for part in ids.split(1024)]).double() / temperature


def target_distribution(prefixes: np.ndarray, sampling: dict) -> np.ndarray:
    """The target's distribution after the prompt and each prefix ``[n, length]``: ``[n, vocab]`` float64."""
    scaled = _scaled("specopt-target", prefixes, sampling["temperature"])
    return (
        torch.stack([filter_row_ref(row, 0, sampling.get("top_p", 1.0), 0.0)[0] for row in scaled]).softmax(1).numpy()
    )


def draft_distribution(prefixes: np.ndarray, sampling: dict) -> np.ndarray:
    """The same of the drafter, to which vLLM applies the temperature alone."""
    return _scaled("specopt-draft", prefixes, sampling["temperature"]).softmax(1).numpy()


def _accepted_distribution(prefixes: np.ndarray, sampling: dict) -> np.ndarray:
    return np.minimum(target_distribution(prefixes, sampling), draft_distribution(prefixes, sampling))


def _recovered_distribution(prefixes: np.ndarray, sampling: dict) -> np.ndarray:
    return np.clip(target_distribution(prefixes, sampling) - draft_distribution(prefixes, sampling), 0, None)


def judge_next(prefixes: np.ndarray, tokens: np.ndarray, distribution, sampling: dict, alpha: float) -> Judgement:
    """Test tokens ``[n]`` against a distribution given the prefixes ``[n, length]``, all prefixes in one table."""
    distinct, which, counts = np.unique(prefixes, axis=0, return_inverse=True, return_counts=True)
    expected = distribution(distinct, sampling)
    expected *= (counts / len(tokens) / expected.sum(1))[:, None]
    observed = np.zeros(expected.shape)
    np.add.at(observed, (which.ravel(), tokens), 1)
    # The engine's logits differ from these in the last digits, and with them what top-p keeps at its threshold.
    return judge(observed.ravel(), expected.ravel(), alpha, strict=False)


def judge_draws(draws: Draws, sampling: dict, alpha: float) -> dict[str, Judgement]:
    """All statistics of one batch.

    How the second token came about must not matter for the third, so that has the target's distribution in either case.
    """
    first, both = draws.tokens[:, :1], draws.tokens[:, :2]
    everything, accepted = np.ones(len(first), bool), draws.accepted > 0
    tests = (
        (first, 1, target_distribution, everything),
        (first, 1, _accepted_distribution, accepted),
        (first, 1, _recovered_distribution, ~accepted),
        (both, 2, target_distribution, everything),
        (both, 2, target_distribution, accepted),
        (both, 2, target_distribution, ~accepted),
    )
    return {
        name: judge_next(prefixes[group], draws.tokens[group, column], distribution, sampling, alpha)
        for name, (prefixes, column, distribution, group) in zip(STATISTICS, tests, strict=True)
    }
