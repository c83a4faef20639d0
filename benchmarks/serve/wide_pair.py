"""Make a target and draft pair with a large vocabulary out of one with a small one.

Sampling is cheap over the 512 tokens of the shipped pair and costly over the 151,936 of a large model. Here both
models get the large vocabulary and otherwise stay what they are. Token i of the new ones is a rare variant of token
i modulo the original size, the same one in both models:

- its input embedding is that token's, so that a text goes on as before should one be emitted;
- its row of the LM head is that token's, plus noise (the tail's logits then spread as in a large model), less a
  multiple of a direction on which all final hidden states have nearly the same projection (least squares on the
  prompts). The multiple is set so that the new tokens together hold the wanted probability on average.

The rows of the original tokens are copied, so their logits are the original ones. Embeddings are untied. To make
a model heavier, layers can be added that compute as the others do and change nothing (their output projections are
zero), and the matrices can be made wider (wide_shape.py).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_specopt.benchmarks.record import CHECKOUT
from vllm_specopt.benchmarks.serve.wide_shape import widen

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Standard deviation of the noise in the new tokens' logits, about that of the logits among rare tokens.
NOISE = 1.0
NUM_FITTED, NUM_MEASURED, CHUNK = 256, 512, 64
INFO = "wide_pair.json"
COPIED = ("generation_config.json", "tokenizer_config.json")


def make_pair(
    target: Path, draft: Path | None, prompts: list[str], out: Path, vocab_size: int = 151_936,
    tail_mass: float = 0.002, extra_target_layers: int = 0, width: int = 1, seed: int = 0,
) -> dict:  # fmt: skip
    """Write the extended pair to ``out/target`` and ``out/draft``; without a draft, the target alone.

    Args:
        target, draft: Folders of two Llama models that share one vocabulary; the draft may be None.
        prompts: Text to fit on (the first half) and to measure on (the second half); at least two.
        out: Folder to write to; made if it does not exist.
        vocab_size: Size to extend to; at least the original one.
        tail_mass: Probability the new tokens together hold at temperature 1, on average.
        extra_target_layers: Layers without effect to add to the target.
        width: Factor of both models' widths; a power of 4.
        seed: Seed of the noise.

    Returns:
        Sizes, seconds, and per model the tail's measured probability; ``overlap`` is the expected acceptance of a
        sampled draft token, the sum over tokens of the smaller probability, before and after.

    Raises:
        ValueError: The vocabularies differ, or an argument is out of range.
    """
    started = time.perf_counter()
    models = {"target": target} | ({"draft": draft} if draft else {})
    configs = {role: json.loads((folder / "config.json").read_text()) for role, folder in models.items()}
    original = {role: config["vocab_size"] for role, config in configs.items()}
    if len(set(original.values())) > 1:
        raise ValueError(f"the target has {original['target']} tokens and the draft {original['draft']}: not a pair")
    if vocab_size < original["target"]:
        raise ValueError(f"vocab_size is {vocab_size}, expected at least {original['target']}")
    if not 0 < tail_mass < 1:
        raise ValueError(f"tail_mass is {tail_mass}, expected a number between 0 and 1")
    if len(prompts) < 2:
        raise ValueError(f"{len(prompts)} prompts are given, expected at least 2")
    info = {"vocab_size": vocab_size, "original_vocab_size": original["target"], "tail_mass_wanted": tail_mass,
            "extra_target_layers": extra_target_layers, "width": width, "seed": seed, "models": {}}  # fmt: skip
    logits = {}
    for number, (role, folder) in enumerate(models.items()):
        layers = extra_target_layers if role == "target" else 0
        hidden = [states(folder, prompts[: len(prompts) // 2]), states(folder, prompts[len(prompts) // 2 :])]
        tensors = {name: tensor.contiguous() for name, tensor in load_file(folder / "model.safetensors").items()}
        generator = torch.Generator().manual_seed(2 * seed + number)
        head = tensors.get(HEAD, tensors[EMBEDDING])
        tensors[HEAD] = wide_head(head, hidden[0], vocab_size, tail_mass, generator)
        tensors[EMBEDDING] = tensors[EMBEDDING][torch.arange(vocab_size) % head.shape[0]]
        add_layers(tensors, configs[role]["num_hidden_layers"], layers)
        logits[role] = (spread(hidden[1], NUM_MEASURED), tensors[HEAD])
        tensors, config = widen(tensors, configs[role], width, generator)
        info["models"][role] = write(out / role, folder, tensors, config, vocab_size, layers)
    tails, overlap = measure(logits, original["target"])
    info |= {"overlap": overlap} if draft else {}
    for role, tail in tails.items():
        info["models"][role]["tail_mass"] = tail
    info["seconds"] = round(time.perf_counter() - started, 1)
    return info


@torch.inference_mode()
def states(folder: Path, prompts: list[str]) -> torch.Tensor:
    """Return what the LM head sees at every position of some prompts, ``[positions, hidden]`` fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [model.model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0] for text in prompts]
    return torch.cat(rows)


def spread(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return about ``count`` rows at equal distances."""
    return rows[:: max(1, len(rows) // count)][:count]


def wide_head(
    head: torch.Tensor, hidden: torch.Tensor, vocab_size: int, tail_mass: float, generator: torch.Generator
) -> torch.Tensor:
    """Return an LM head of ``vocab_size`` rows that begins with ``head`` (see the module's description)."""
    original = head.shape[0]
    direction = torch.linalg.lstsq(hidden, torch.ones(len(hidden), 1), driver="gelsd").solution.squeeze(1)
    scale = NOISE / hidden.norm(dim=1).mean()
    rows = head.float()[torch.arange(original, vocab_size) % original]
    rows += scale * torch.randn(rows.shape, generator=generator)
    sample = spread(hidden, NUM_FITTED)
    if len(rows):
        tail = torch.cat([(part @ rows.T).logsumexp(dim=1) for part in sample.split(CHUNK)])
        odds = tail - (sample @ head.float().T).logsumexp(dim=1)
        rows -= distance(odds, sample @ direction, tail_mass) * direction
    return torch.cat([head, rows.to(head.dtype)])


def distance(log_odds: torch.Tensor, projection: torch.Tensor, tail_mass: float) -> float:
    """Return how far to move the tail's logits for its mean probability to be ``tail_mass``, by bisection."""
    low, high = -100.0, 100.0
    for _ in range(50):
        middle = (low + high) / 2
        if (log_odds - middle * projection).sigmoid().mean() > tail_mass:
            low = middle
        else:
            high = middle
    return middle


def add_layers(tensors: dict[str, torch.Tensor], num_layers: int, count: int) -> None:
    """Add layers without effect: copies of the last one with zeros for the two projections into the residual stream."""
    last = f"model.layers.{num_layers - 1}."
    for name in [name for name in tensors if name.startswith(last)]:
        silent = name.endswith(("o_proj.weight", "down_proj.weight"))
        for index in range(num_layers, num_layers + count):
            copy = torch.zeros_like(tensors[name]) if silent else tensors[name].clone()
            tensors[name.replace(last, f"model.layers.{index}.")] = copy


def write(folder: Path, source: Path, tensors: dict, config: dict, vocab_size: int, extra_layers: int) -> dict:
    """Write one model with its tokenizer, in which the new tokens are called ``<extra_513>`` and so on."""
    folder.mkdir(parents=True, exist_ok=True)
    config = config | {"vocab_size": vocab_size, "tie_word_embeddings": False}
    config["num_hidden_layers"] += extra_layers
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {f"<extra_{index}>": index for index in range(len(vocabulary), vocab_size)}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer) + "\n")
    for name in COPIED:
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    size = (folder / "model.safetensors").stat().st_size
    parameters = sum(tensor.numel() for tensor in tensors.values())
    return {"hidden_size": config["hidden_size"], "layers": config["num_hidden_layers"], "parameters": parameters,
            "bytes": size}  # fmt: skip


def measure(models: dict[str, tuple[torch.Tensor, torch.Tensor]], original: int) -> tuple[dict, dict]:
    """Measure the written heads on hidden states: the tail's probability per model, and the pair's overlap."""
    masses: dict[str, list] = {role: [] for role in models}
    overlaps: dict[str, list] = {"before": [], "after": []}
    for parts in zip(*(hidden.split(CHUNK) for hidden, _ in models.values()), strict=True):
        wide = [part @ head.float().T for part, (_, head) in zip(parts, models.values(), strict=True)]
        narrow = [logits[:, :original].softmax(dim=1) for logits in wide]
        wide = [logits.softmax(dim=1) for logits in wide]
        for role, probs in zip(models, wide, strict=True):
            masses[role].append(probs[:, original:].sum(dim=1))
        # Of one model alone this is 1.
        overlaps["before"].append(torch.minimum(narrow[0], narrow[-1]).sum(dim=1))
        overlaps["after"].append(torch.minimum(wide[0], wide[-1]).sum(dim=1))
    tails = {}
    for role, found in masses.items():
        tail = torch.cat(found)
        quantiles = tail.quantile(torch.tensor([0.5, 0.99])).tolist()
        tails[role] = dict(zip(("mean", "median", "p99"), map(rounded, [tail.mean().item(), *quantiles]), strict=True))
    return tails, {name: rounded(torch.cat(found).mean().item()) for name, found in overlaps.items()}


def rounded(value: float) -> float:
    """Round to three significant digits."""
    return round(value, 2 - math.floor(math.log10(abs(value)))) if value else 0.0


def main() -> None:
    """Write a pair to the folder named, with what was measured in ``wide_pair.json``, and print that."""
    models = CHECKOUT / "models"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--target", type=Path, default=models / "specopt-target")
    parser.add_argument("--draft", type=Path, default=models / "specopt-draft")
    parser.add_argument("--no-draft", dest="draft", action="store_const", const=None, help="extend the target alone")
    parser.add_argument("--prompts", type=Path, default=models / "prompts.jsonl")
    parser.add_argument("--vocab-size", type=int, default=151_936)
    parser.add_argument("--tail-mass", type=float, default=0.002)
    parser.add_argument("--extra-target-layers", type=int, default=0)
    parser.add_argument("--width", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = vars(parser.parse_args())
    args["prompts"] = [json.loads(line)["prompt"] for line in args["prompts"].read_text().splitlines()]
    try:
        info = make_pair(**args)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    (args["out"] / INFO).write_text(json.dumps(info, indent=2) + "\n")
    print(json.dumps(info, indent=2))


if __name__ == "__main__":
    main()
