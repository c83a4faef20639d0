"""Checkpoints that are the shipped ones in another form, for drafters that need one.

Each function writes a folder that vLLM loads and returns its path. Nothing is trained here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
TARGET, DRAFT = HERE.parent / "specopt-target", HERE.parent / "specopt-draft"
WEIGHTS = "model.safetensors"


def _config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _write(folder: Path, config: dict, weights: dict[str, torch.Tensor] | None = None) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if weights is not None:
        save_file(weights, folder / WEIGHTS, {"format": "pt"})
    return str(folder)


def mimo(folder: Path) -> str:
    """The target as a MiMo model, which carries the MTP layer: the same weights, and biases of zero."""
    config = _config(TARGET)
    weights = load_file(TARGET / WEIGHTS)
    sizes = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"], "v": config["num_key_value_heads"]}
    for layer in range(config["num_hidden_layers"]):
        for name, heads in sizes.items():
            bias = torch.zeros(heads * config["head_dim"], dtype=torch.bfloat16)
            weights[f"model.layers.{layer}.self_attn.{name}_proj.bias"] = bias
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    for name, weight in load_file(HERE / "mtp" / WEIGHTS).items():
        weights[f"model.mtp_layers.0.{name}"] = weight
    config |= {"architectures": ["MiMoForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": False,
               "num_nextn_predict_layers": 1}  # fmt: skip
    path = _write(folder, config, weights)
    for file in (*TARGET.glob("tokenizer*"), TARGET / "generation_config.json"):
        shutil.copy(file, folder)
    return path


def parallel_eagle3(folder: Path) -> str:
    """The EAGLE-3 head drafting all tokens in one pass (P-EAGLE), trained for the first of them only."""
    weights, config = load_file(HERE / "eagle3" / WEIGHTS), _config(HERE / "eagle3")
    weights["mask_hidden"] = torch.zeros(1, weights["fc.weight"].shape[1], dtype=torch.bfloat16)
    return _write(folder, config | {"mask_token_id": 0}, weights)


def parallel_draft(folder: Path) -> str:
    """The draft model drafting all tokens in one pass (PARD), trained for the first of them only."""
    return _write(folder, _config(DRAFT) | {"pard_token": 0}, load_file(DRAFT / WEIGHTS))


def _random(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Weights of these shapes in bf16, the same each time; norms are one."""
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    ones = {name: torch.ones(shape) for name, shape in shapes.items() if len(shape) == 1}
    return {name: weight.to(torch.bfloat16) for name, weight in (made | ones).items()}


def dflash(folder: Path, more: dict | None = None, shapes: dict[str, tuple[int, ...]] | None = None) -> str:
    """A DFlash head of one layer with random weights; ``more`` goes into its configuration, ``shapes`` are added."""
    target = _config(TARGET)
    kept = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size", "rms_norm_eps",
            "max_position_embeddings", "rope_parameters", "intermediate_size", "hidden_act", "dtype")  # fmt: skip
    config = {key: target[key] for key in kept} | {"architectures": ["DFlashDraftModel"], "model_type": "qwen3",
              "num_hidden_layers": 1, "tie_word_embeddings": False, "attention_bias": False,
              "dflash_config": {"mask_token_id": 0, "target_layer_ids": [0, 1, 3]}}  # fmt: skip
    size, between, head = target["hidden_size"], target["intermediate_size"], target["head_dim"]
    values = target["num_key_value_heads"] * head
    layer = {
        **{f"self_attn.{name}_proj": (rows, size) for name, rows in (("q", size), ("k", values), ("v", values))},
        **{"self_attn.o_proj": (size, size), "self_attn.q_norm": (head,), "self_attn.k_norm": (head,)},
        **{"mlp.gate_proj": (between, size), "mlp.up_proj": (between, size), "mlp.down_proj": (size, between)},
        **{"input_layernorm": (size,), "post_attention_layernorm": (size,)},
    }
    all_shapes = {f"layers.0.{name}.weight": shape for name, shape in layer.items()}
    all_shapes |= {"fc.weight": (size, 3 * size), "hidden_norm.weight": (size,), "norm.weight": (size,)}
    return _write(folder, config | (more or {}), _random(all_shapes | (shapes or {})))


def dspark(folder: Path, block: int = 3, rank: int = 8) -> str:
    """A DSpark head of one layer with random weights."""
    more = {"architectures": ["Qwen3DSparkModel"], "block_size": block, "markov_rank": rank,
            "markov_head_type": "vanilla", "target_layer_ids": [0, 1, 3]}  # fmt: skip
    tokens = _config(TARGET)["vocab_size"]
    return dflash(folder, more, {f"markov_head.markov_w{i}.weight": (tokens, rank) for i in (1, 2)})


def foreign(folder: Path, name: str, **changed: int) -> str:
    """The configuration of the head ``name`` as if it were of another target, ``hidden_size`` or ``vocab_size``."""
    return _write(folder, _config(HERE / name) | changed)
