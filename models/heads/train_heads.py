"""Train heads that draft for specopt-target, on the same corpus, and write them as vLLM reads them.

Every head learns the target's own next-token distribution, from hidden states that the target computes on windows of
the corpus. One pass of the target serves all heads. The number of steps is fixed and so are the seeds: on one machine
the same command makes the same weights.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent
MODELS = HERE.parent
sys.path[:0] = [str(MODELS), str(HERE)]
from corpus import collect, split  # noqa: E402
from heads import MTP, Eagle, Eagle3, Hydra, Medusa  # noqa: E402
from train import encode, windows  # noqa: E402

TARGET = MODELS / "specopt-target"
AUX_LAYERS = (1, 2, 4)
STEPS, MEDUSA_HEADS = 2, 3
"""Drafted positions that a head with attention is trained for; heads of Medusa, and of Hydra."""
ROOM = max(STEPS, MEDUSA_HEADS)
"""Positions at the end of a window whose later tokens are not all known."""
DRAFT_VOCAB, INTERMEDIATE, HYDRA_WIDTH = 256, 480, 160
LENGTH = 256
NAMES = ["eagle3", "eagle", "mtp", "medusa", "hydra"]


class Target:
    """The frozen target, and what the heads read of it."""

    def __init__(self, folder: Path):
        self.model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.config, self.lm_head = self.model.config, self.model.lm_head.weight.detach()
        self._before_norm: torch.Tensor | None = None
        self.model.model.layers[-1].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> None:
        self._before_norm = output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def __call__(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features by head and "logits", each [B, T, ...], and "embedded" tokens, of tokens [B, T]."""
        out = self.model(input_ids=tokens, output_hidden_states=True)
        last = self._before_norm
        assert last is not None
        # Transformers' last entry is normed; vLLM hands over the layer's own output.
        states = [*out.hidden_states[:-1], last]
        normed = out.hidden_states[-1]
        return {
            "eagle3": torch.cat([states[i] for i in AUX_LAYERS], dim=-1),
            "eagle": normed,
            "mtp": last,
            "medusa": normed,
            "hydra": normed,
            "embedded": self.model.model.embed_tokens(tokens),
            "logits": out.logits,
        }


def drafted(name: str, head: nn.Module, found: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """A head's logits at each step, [B, R, V], for the R roots whose later tokens are all in the window."""
    roots = found["logits"].shape[1] - ROOM
    features = found[name][:, :roots]
    if name == "medusa":
        return head(features)
    if name == "hydra":
        later = [found["embedded"][:, step : step + roots] for step in range(1, MEDUSA_HEADS + 1)]
        return head(features, torch.stack(later, dim=2))
    past, logits = [], []
    for step in range(1, STEPS + 1):
        made, features = head(found["embedded"][:, step : step + roots], features, past)
        logits.append(made)
    return logits


def wanted(found: dict[str, torch.Tensor], step: int, kept: torch.Tensor | None) -> torch.Tensor:
    """The target's distribution [B, R, V] of what ``step`` drafts, or of the kept tokens alone."""
    roots = found["logits"].shape[1] - ROOM
    logits = found["logits"][:, step : step + roots]
    return (logits if kept is None else logits[..., kept]).softmax(dim=-1)


def fit(
    heads: dict[str, nn.Module], target: Target, stream: torch.Tensor, kept: torch.Tensor, args: argparse.Namespace
) -> dict[str, float]:
    """Train all heads for ``args.steps`` batches; return each one's mean loss over the last tenth of them."""
    optimizers = {name: torch.optim.AdamW(head.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
                  for name, head in heads.items()}  # fmt: skip
    last: dict[str, list[float]] = {name: [] for name in heads}
    batches = windows(stream, random.Random(args.seed), lambda: LENGTH, args.batch_tokens)
    for index in tqdm(range(args.steps), mininterval=5):
        found = target(next(batches)[:, :-1])
        done = index / args.steps
        rate = args.learning_rate * min(done / 0.02 + 0.05, 1.0) * (1.0 - done)
        for name, head in heads.items():
            losses = [
                F.cross_entropy(
                    logits.flatten(0, 1), wanted(found, step, kept if name == "eagle3" else None).flatten(0, 1)
                )
                for step, logits in enumerate(drafted(name, head, found), 1)
            ]
            loss = torch.stack([0.8**i * each for i, each in enumerate(losses)]).sum()
            loss.backward()
            nn.utils.clip_grad_norm_(head.parameters(), 1.0)
            optimizers[name].param_groups[0]["lr"] = rate
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            if index >= args.steps - max(args.steps // 10, 1):
                last[name].append(losses[0].item())
    return {name: round(sum(each) / len(each), 4) for name, each in last.items()}


@torch.no_grad()
def agreement(
    heads: dict[str, nn.Module], target: Target, stream: torch.Tensor, kept: torch.Tensor
) -> dict[str, list[float]]:
    """How often each step's likeliest token is the target's, on held-out windows: what greedy decoding accepts."""
    starts = torch.linspace(0, len(stream) - LENGTH - 1, 16).long().tolist()
    found = target(torch.stack([stream[start : start + LENGTH] for start in starts]))
    rates = {}
    for name, head in heads.items():
        rates[name] = []
        for step, logits in enumerate(drafted(name, head, found), 1):
            tokens = logits.argmax(dim=-1)
            tokens = kept[tokens] if name == "eagle3" else tokens
            rates[name].append(round((tokens == wanted(found, step, None).argmax(dim=-1)).double().mean().item(), 4))
    return rates


def configuration(name: str) -> dict:
    """The config.json of a head, after the target's."""
    target = json.loads((TARGET / "config.json").read_text(encoding="utf-8"))
    kept = {key: target[key] for key in ("hidden_size", "vocab_size", "dtype")}
    if name == "hydra":
        return kept | {"architectures": ["HydraModel"], "model_type": "hydra", "num_heads": MEDUSA_HEADS,
                       "hidden_width": HYDRA_WIDTH}  # fmt: skip
    if name == "medusa":
        return kept | {"architectures": ["MedusaModel"], "model_type": "medusa", "num_heads": MEDUSA_HEADS,
                       "num_hidden_layers": 1, "original_lm_head": True}  # fmt: skip
    config = target | {"num_hidden_layers": 1, "intermediate_size": INTERMEDIATE, "tie_word_embeddings": False}
    if name == "eagle3":
        config |= {
            "architectures": ["LlamaForCausalLMEagle3"],
            "draft_vocab_size": DRAFT_VOCAB,
            "target_hidden_size": target["hidden_size"],
            "eagle_aux_hidden_state_layer_ids": list(AUX_LAYERS),
        }
    return config


def save(name: str, head: nn.Module, folder: Path, vocab_size: int, kept: torch.Tensor) -> None:
    """Write a head in bf16. MTP's layer gets no config: a target carries it (see ``checkpoints.py``)."""
    tensors = {key: value.detach().to(torch.bfloat16).contiguous() for key, value in head.state_dict().items()}
    if name == "eagle3":
        tensors["d2t"] = kept - torch.arange(len(kept))
        tensors["t2d"] = torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, kept, True)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    if name != "mtp":
        text = json.dumps(configuration(name), indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Train, measure and write the heads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--files", type=int, default=40, help="of the corpus")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=NAMES, default=NAMES, help="heads; each comes out as among all")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    started = time.monotonic()

    train, held_out = split(collect())
    texts, held_out_texts = list(train.values()), list(held_out.values())
    random.Random(args.seed).shuffle(texts)
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    stream, held_out_stream = encode(tokenizer, texts[: args.files]), encode(tokenizer, held_out_texts[:8])
    counted = Counter(stream.tolist())
    kept = torch.tensor(sorted(sorted(range(len(tokenizer)), key=lambda token: -counted[token])[:DRAFT_VOCAB]))

    target = Target(TARGET)
    smaller = {"intermediate_size": INTERMEDIATE, "draft_vocab_size": DRAFT_VOCAB}
    small = LlamaConfig(**target.config.to_dict() | smaller)
    heads = {
        "eagle3": Eagle3(small, target.lm_head[kept]),
        "eagle": Eagle(small, target.lm_head),
        "mtp": MTP(target.config, target.lm_head),
        "medusa": Medusa(target.config, target.lm_head, MEDUSA_HEADS),
        # Behind the others: the order decides what each starts from.
        "hydra": Hydra(target.config, target.lm_head, MEDUSA_HEADS, HYDRA_WIDTH),
    }
    heads = {name: heads[name] for name in args.only}
    losses = fit(heads, target, stream, kept, args)
    for name, head in heads.items():
        head.bfloat16().float()
        save(name, head, args.out / name, target.config.vocab_size, kept)
    rates = agreement(heads, target, held_out_stream, kept)
    path = args.out / "metrics.json"
    metrics = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, head in heads.items():
        metrics[name] = {
            "parameters": sum(p.numel() for p in head.parameters()),
            "last_loss": losses[name],
            "held_out_agreement_by_step": rates[name],
            "tokens_seen": args.steps * (args.batch_tokens // LENGTH) * LENGTH,
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "transformers": transformers.__version__},
            "command": " ".join(["python models/heads/train_heads.py", *sys.argv[1:]]),
            "seconds": math.ceil(time.monotonic() - started),
        }  # fmt: skip
    if "eagle3" in heads:
        covered = sum(counted[token] for token in kept.tolist()) / len(stream)
        metrics["eagle3"]["draft_vocabulary_covers"] = round(covered, 4)
    path.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
