"""Train the target from scratch on Python's standard library, then distil the draft from it.

Both are Llama checkpoints in bf16 with one byte-level BPE tokenizer. The training stops by the clock: the learning
rate falls linearly to zero over the minutes given, so any budget ends in a usable model.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from corpus import collect, split
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
END_OF_TEXT = "<|endoftext|>"
MAX_POSITIONS = 1024
# Short windows first: attention is the dearest part of a small model on a CPU.
SHORT, LONG, LONG_FROM = 256, 512, 0.7
SHAPES = {
    "target": {"hidden_size": 320, "intermediate_size": 960, "num_hidden_layers": 4, "num_attention_heads": 10,
               "num_key_value_heads": 5, "head_dim": 32},
    "draft": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 32},
}  # fmt: skip


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer whose only special token both begins and ends a file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Encode the texts as one stream of tokens, each text with the end-of-text token before it."""
    ids: list[int] = []
    for text in texts:
        ids.append(tokenizer.eos_token_id)
        ids.extend(tokenizer.backend_tokenizer.encode(text).ids)
    return torch.tensor(ids)


def byte_lengths(tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    """Return how many bytes of text each token stands for (none for the special token)."""
    # A byte-level token is written with one character for each byte.
    pieces = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    return torch.tensor([0 if piece == END_OF_TEXT else len(piece) for piece in pieces])


def new_model(role: str, vocab_size: int) -> LlamaForCausalLM:
    """Make an untrained model of the shape of `role`, "target" or "draft"."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        **SHAPES[role],
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        # Layers that begin as the identity learn faster in the first few hundred steps.
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)
    return model


def windows(stream: torch.Tensor, rng: random.Random, length: Callable[[], int], tokens: int) -> Iterator[torch.Tensor]:
    """Yield batches [tokens / length, length + 1] for ever, every pass over the stream cut at a new offset."""
    while True:
        size = length()
        offset = rng.randrange(size)
        starts = list(range(offset, len(stream) - size - 1, size))
        rng.shuffle(starts)
        while len(starts) * size >= tokens and length() == size:
            batch, starts = starts[: tokens // size], starts[tokens // size :]
            yield torch.stack([stream[start : start + size + 1] for start in batch])


def optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or ".layers." not in name]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def fit(
    role: str,
    model: LlamaForCausalLM,
    stream: torch.Tensor,
    loss_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    args: argparse.Namespace,
    seconds: float,
) -> int:
    """Train `model` on windows of `stream` for `seconds`; return the number of tokens seen."""
    chosen = optimizers(model, args.learning_rate)
    started = time.monotonic()
    seen = 0

    def done() -> float:
        return min((time.monotonic() - started) / seconds, 1.0)

    def length() -> int:
        return SHORT if done() < LONG_FROM else LONG

    batches = windows(stream, random.Random(args.seed), length, args.batch_tokens)
    model.train()
    with tqdm(total=round(seconds), desc=role, unit="s", mininterval=5) as bar:
        while (progress := done()) < 1.0:
            batch = next(batches)
            rate = args.learning_rate * min(progress / 0.02 + 0.05, 1.0) * (1.0 - progress)
            for optimizer in chosen:
                for group in optimizer.param_groups:
                    group["lr"] = rate
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits = model(input_ids=batch[:, :-1]).logits
            loss = loss_of(logits.float(), batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in chosen:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            seen += batch[:, 1:].numel()
            bar.set_postfix(loss=f"{loss.item():.3f}", tokens=seen, refresh=False)
            bar.update(int(time.monotonic() - started) - bar.n)
    return seen


def data_loss(logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the next tokens."""
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def distillation_loss(target: LlamaForCausalLM, weight: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Return the loss weight * KL(target || draft) + (1 - weight) * data loss."""

    def loss(logits: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            wanted = F.log_softmax(target(input_ids=batch[:, :-1]).logits.float(), dim=-1).flatten(0, 1)
        found = F.log_softmax(logits, dim=-1).flatten(0, 1)
        divergence = F.kl_div(found, wanted, reduction="batchmean", log_target=True)
        return weight * divergence + (1.0 - weight) * F.nll_loss(found, batch[:, 1:].flatten())

    return loss


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save a copy of the model in bf16, with its tokenizer."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.config.use_cache = True
    copy.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    copy.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(folder)
    # Transformers 5 writes a class name that earlier releases do not know.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config = {key: value for key, value in config.items() if key not in ("backend", "is_local", "local_files_only")}
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


@torch.no_grad()
def evaluate(
    target: LlamaForCausalLM, draft: LlamaForCausalLM, stream: torch.Tensor, lengths: torch.Tensor, tokens: int
) -> dict:
    """Measure both models on held-out windows of 512 tokens spread evenly over `stream`.

    The agreement rates are the chances that speculative decoding at temperature 1 accepts a first draft token after a
    held-out prefix: of a token sampled from the draft, and of the draft's most likely token.
    """
    count = min(tokens // LONG, (len(stream) - 1) // LONG)
    starts = torch.linspace(0, len(stream) - LONG - 1, count).long().tolist()
    nats = {"target": 0.0, "draft": 0.0}
    accepted = {"sampled": 0.0, "greedy": 0.0}
    size = 0
    for first in tqdm(range(0, count, 8), desc="held-out", mininterval=5):
        batch = torch.stack([stream[start : start + LONG + 1] for start in starts[first : first + 8]])
        wanted = batch[:, 1:, None]
        p, q = (F.log_softmax(model(input_ids=batch[:, :-1]).logits.float(), dim=-1) for model in (target, draft))
        for role, found in (("target", p), ("draft", q)):
            nats[role] -= found.gather(2, wanted).sum().item()
        p, q = p.exp(), q.exp()
        accepted["sampled"] += torch.minimum(p, q).sum().item()
        accepted["greedy"] += p.gather(2, q.argmax(dim=2, keepdim=True)).sum().item()
        size += lengths[batch[:, 1:]].sum().item()
    total = count * LONG
    return {
        "held_out_tokens": total,
        "held_out_bytes": size,
        "perplexity": {role: round(math.exp(value / total), 4) for role, value in nats.items()},
        "bits_per_byte": {role: round(value / math.log(2) / size, 4) for role, value in nats.items()},
        "agreement_at_temperature_1": {kind: round(value / total, 4) for kind, value in accepted.items()},
    }


def main() -> None:
    """Train, save and measure the pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--target-minutes", type=float, default=24.0)
    parser.add_argument("--draft-minutes", type=float, default=7.5)
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--distillation-weight", type=float, default=0.9)
    parser.add_argument("--eval-tokens", type=int, default=131072)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    started = time.monotonic()

    train, held_out = split(collect())
    tokenizer = train_tokenizer(list(train.values()), args.vocab_size)
    texts = list(train.values())
    random.Random(args.seed).shuffle(texts)
    stream, held_out_stream = encode(tokenizer, texts), encode(tokenizer, list(held_out.values()))
    print(f"train: {len(train)} files, {len(stream)} tokens; held-out: {len(held_out)}, {len(held_out_stream)}")

    seen = {}
    folders = {role: args.out / f"specopt-{role}" for role in SHAPES}
    target = new_model("target", args.vocab_size)
    seen["target"] = fit("target", target, stream, data_loss, args, 60 * args.target_minutes)
    save(target, tokenizer, folders["target"])
    teacher = LlamaForCausalLM.from_pretrained(folders["target"], dtype=torch.bfloat16).eval()
    draft = new_model("draft", args.vocab_size)
    distillation = distillation_loss(teacher, args.distillation_weight)
    seen["draft"] = fit("draft", draft, stream, distillation, args, 60 * args.draft_minutes)
    save(draft, tokenizer, folders["draft"])

    saved = {role: LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
             for role, folder in folders.items()}  # fmt: skip
    metrics = {
        "parameters": {role: sum(p.numel() for p in model.parameters()) for role, model in saved.items()},
        **evaluate(saved["target"], saved["draft"], held_out_stream, byte_lengths(tokenizer), args.eval_tokens),
        "tokens_seen": seen,
        "corpus": {
            "train_files": len(train),
            "train_bytes": sum(len(text.encode()) for text in train.values()),
            "train_tokens": len(stream),
            "held_out_files": len(held_out),
            "held_out_bytes": sum(len(text.encode()) for text in held_out.values()),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "command": " ".join(["python models/train.py", *sys.argv[1:]]),
        "seconds": round(time.monotonic() - started),
    }  # fmt: skip
    (args.out / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
