"""Train a task's target from scratch, then its draft with the target's help, and write the held-out examples.

Both are Llama checkpoints in bf16, trained in fp32 on the tokens of the reference alone. The training stops by the
clock, as in models/train.py.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import platform
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from train import save  # noqa: E402

MAX_POSITIONS, VOCAB_MULTIPLE, IGNORED = 256, 32, -100
TASKS = ("transcription", "summary")
SHAPES = {
    "target": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
               "num_key_value_heads": 4, "head_dim": 32},
    "draft": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 3,
              "num_key_value_heads": 3, "head_dim": 32},
}  # fmt: skip


class Muon:
    """Muon in fp32. PyTorch's own multiplies in bf16, which without AVX-512 is dearer than all the rest."""

    def __init__(self, matrices: list[torch.Tensor], decay: float = 0.05) -> None:
        self._matrices = [(matrix, torch.zeros_like(matrix)) for matrix in matrices]
        self._decay = decay

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Move every matrix along its orthogonalised momentum, scaled to the size of AdamW's steps."""
        for matrix, momentum in self._matrices:
            momentum.mul_(0.95).add_(matrix.grad)
            update = matrix.grad.add(momentum, alpha=0.95)
            wide = update if update.shape[0] <= update.shape[1] else update.T
            wide = wide / (wide.norm() + 1e-7)
            for _ in range(5):
                square = wide @ wide.T
                wide = 3.4445 * wide + (-4.7750 * square + 2.0315 * square @ square) @ wide
            update = wide if update.shape[0] <= update.shape[1] else wide.T
            matrix.mul_(1 - rate * self._decay).add_(update, alpha=-0.2 * rate * max(matrix.shape) ** 0.5)


def new_model(role: str, vocab_size: int) -> LlamaForCausalLM:
    """Make an untrained model whose layers begin as the identity."""
    config = LlamaConfig(
        vocab_size=math.ceil(vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        **SHAPES[role],
    )
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)
    return model


def batches(
    examples: Iterator[tuple[str, str]], tokenizer: PreTrainedTokenizerFast, size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (input ids, labels) ``[size, length]``, labels of prompts and padding ignored."""
    encode = tokenizer.backend_tokenizer.encode
    while True:
        pairs = [
            (encode(p).ids, [*encode(r).ids, tokenizer.eos_token_id]) for p, r in (next(examples) for _ in range(size))
        ]
        length = max(len(prompt) + len(reference) for prompt, reference in pairs)
        ids = torch.full((size, length), tokenizer.eos_token_id)
        labels = torch.full((size, length), IGNORED)
        for row, (prompt, reference) in enumerate(pairs):
            end = len(prompt) + len(reference)
            ids[row, :end] = torch.tensor(prompt + reference)
            labels[row, len(prompt) : end] = torch.tensor(reference)
        yield ids[:, :-1], labels[:, 1:]


def answers(model: LlamaForCausalLM, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Log probabilities ``[tokens, vocab]`` at the places of the reference."""
    hidden = model.model(input_ids=ids).last_hidden_state[labels != IGNORED]
    return F.log_softmax(model.lm_head(hidden).float(), dim=-1)


def fit(
    role: str,
    model: LlamaForCausalLM,
    data: Iterator[tuple[torch.Tensor, torch.Tensor]],
    args: argparse.Namespace,
    seconds: float,
    teacher: LlamaForCausalLM | None = None,
) -> dict:
    """Train for `seconds` on the references, or mostly towards a teacher's probabilities; return what was seen."""
    named = list(model.named_parameters())
    muon = Muon([p for name, p in named if p.ndim == 2 and ".layers." in name])
    others = [p for name, p in named if p.ndim != 2 or ".layers." not in name]
    adamw = torch.optim.AdamW(others, args.learning_rate, (0.9, 0.95), weight_decay=0.0, fused=True)
    started, cpu_started = time.monotonic(), time.process_time()
    seen, steps, recent = 0, 0, None
    model.train()
    with tqdm(total=round(seconds), desc=f"{args.task} {role}", unit="s", mininterval=10) as bar:
        while (progress := min((time.monotonic() - started) / seconds, 1.0)) < 1.0:
            ids, labels = next(data)
            rate = args.learning_rate * min(progress / 0.02 + 0.05, 1.0) * (1.0 - progress)
            adamw.param_groups[0]["lr"] = rate
            found = answers(model, ids, labels)
            loss = data_loss = F.nll_loss(found, labels[labels != IGNORED])
            if teacher is not None:
                with torch.no_grad():
                    wanted = answers(teacher, ids, labels)
                divergence = F.kl_div(found, wanted, reduction="batchmean", log_target=True)
                loss = args.distillation_weight * divergence + (1 - args.distillation_weight) * data_loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adamw.step()
            muon.step(rate)
            model.zero_grad(set_to_none=True)
            seen, steps = seen + ids.numel(), steps + 1
            recent = data_loss.item() if recent is None else 0.95 * recent + 0.05 * data_loss.item()
            bar.set_postfix(loss=f"{recent:.3f}", steps=steps, tokens=seen, refresh=False)
            bar.update(int(time.monotonic() - started) - bar.n)
    return {
        "minutes": round(seconds / 60, 1),
        "cpu_minutes": round((time.process_time() - cpu_started) / 60, 1),
        "steps": steps,
        "tokens_seen": seen,
        "last_loss": round(recent, 4),
    }


@torch.no_grad()
def evaluate(models: dict[str, LlamaForCausalLM], ids: torch.Tensor, labels: torch.Tensor) -> dict:
    """Loss of both models on held-out references, and how much of their laws the two share (mean of sum of minima)."""
    laws = {role: answers(model, ids, labels) for role, model in models.items()}
    wanted = labels[labels != IGNORED]
    return {
        "held_out_loss": {role: round(F.nll_loss(law, wanted).item(), 4) for role, law in laws.items()},
        "shared_probability": round(torch.minimum(laws["target"].exp(), laws["draft"].exp()).sum(-1).mean().item(), 4),
    }


def main() -> None:
    """Train, save and measure one task's pair."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--target-minutes", type=float, default=20.0)
    parser.add_argument("--draft-minutes", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=32, help="examples per step")
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--distillation-weight", type=float, default=0.5)
    parser.add_argument("--held-out", type=int, default=120, help="examples to write and measure on")
    parser.add_argument("--data-only", action="store_true", help="write eval.jsonl, train nothing")
    parser.add_argument("--draft-only", action="store_true", help="keep the target that is there")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    task = importlib.import_module(args.task)
    folder = args.out / args.task
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=task.tokenizer_object(),
        bos_token=task.END,
        eos_token=task.END,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    held_out = task.held_out(args.held_out, random.Random(f"held-out {args.seed}"))
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "eval.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"prompt": p, "reference": r}) + "\n" for p, r in held_out)
    if args.data_only:
        return

    data = batches(task.training(random.Random(args.seed)), tokenizer, args.batch)
    trained: dict = {}
    if args.draft_only:
        trained = json.loads((folder / "metrics.json").read_text())["training"]
        target = LlamaForCausalLM.from_pretrained(folder / "target", dtype=torch.float32, use_cache=False)
    else:
        target = new_model("target", len(tokenizer))
        trained["target"] = fit("target", target, data, args, 60 * args.target_minutes)
        save(target, tokenizer, folder / "target")
    draft = new_model("draft", len(tokenizer))
    trained["draft"] = fit("draft", draft, data, args, 60 * args.draft_minutes, teacher=target.eval())
    save(draft, tokenizer, folder / "draft")

    saved = {role: LlamaForCausalLM.from_pretrained(folder / role, dtype=torch.float32).eval() for role in SHAPES}
    metrics = {
        "parameters": {role: sum(p.numel() for p in model.parameters()) for role, model in saved.items()},
        "training": trained,
        **evaluate(saved, *next(batches(iter(held_out), tokenizer, len(held_out)))),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "command": " ".join(["python models/tasks/train_tasks.py", *sys.argv[1:]]),
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
