"""Features beside which verification runs: each engine with draft tokens must emit what it emits without.

Usage: ``python neighbours.py RESULT.json [FEATURE ...]``, in the environment of a runner (``support.prepared``).
Writes, per feature, whether the seeded and greedy requests of both engines have equal tokens, and what else must hold.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import shutil
import sys
import tempfile
from functools import partial
from pathlib import Path

from engine import steps

ROOT = Path(__file__).resolve().parents[2]
TARGET, DRAFT = ROOT / "models" / "specopt-target", ROOT / "models" / "specopt-draft"
DRAFTS = 3
V2 = os.environ["VLLM_USE_V2_MODEL_RUNNER"] == "1"
RANK = 8
ADAPTED = "self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"
MODULES = [name.split(".")[1] for name in ADAPTED]
LINES = steps.prompts(6)


def adapter(model: Path, folder: Path, seed: int = 0) -> dict:
    """A LoRA adapter of a model with random weights, large enough to change the text; what it adds to each weight."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((model / "config.json").read_text())
    hidden, between = config["hidden_size"], config["intermediate_size"]
    width = config["num_attention_heads"] * config["head_dim"]
    shapes = dict(zip(ADAPTED, ((width, hidden), (hidden, width), (hidden, between)), strict=True))
    generator = torch.Generator().manual_seed(seed)
    weights, added = {}, {}
    for layer in range(config["num_hidden_layers"]):
        for name, (rows, columns) in shapes.items():
            at = f"model.layers.{layer}.{name}"
            down = torch.randn(RANK, columns, generator=generator) * 0.1
            up = torch.randn(rows, RANK, generator=generator) * 0.1
            weights[f"base_model.model.{at}.lora_A.weight"], weights[f"base_model.model.{at}.lora_B.weight"] = down, up
            added[f"{at}.weight"] = up @ down
    folder.mkdir()
    save_file(weights, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": MODULES, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return added


def merged(model: Path, folder: Path, seed: int = 1) -> str:
    """A copy of a model with an adapter in its weights: vLLM has no other way to give a draft model one."""
    from safetensors.torch import load_file, save_file

    added = adapter(model, folder / "adapter of the draft", seed)
    copy = Path(shutil.copytree(model, folder / "draft"))
    for file in copy.glob("*.safetensors"):
        weights = load_file(file)
        save_file({name: (w + added.get(name, 0)).to(w.dtype) for name, w in weights.items()}, file, {"format": "pt"})
    return str(copy)


def start(drafts: bool, **more):
    """An engine of the target, with the drop-in."""
    from vllm import LLM

    # A CPU worker of vLLM 0.32 looks into every loaded module and stumbles over this one, which numba loads.
    sys.modules.pop("llvmlite.binding.ffi", None)
    speculative = {"model": str(DRAFT), "num_speculative_tokens": DRAFTS} | more.pop("speculative", {})
    blocks = {"block_size": 32, "num_gpu_blocks_override": None}
    args = {"max_model_len": 256, "max_num_seqs": 16, "disable_log_stats": False} | blocks | more
    return LLM(**steps.arguments(speculative if drafts else None, **args))


def emitted(llm, prompts, params, **more) -> list[list[dict]]:
    """Tokens and log probabilities of each completion of each request."""
    from vllm import SamplingParams

    made = [SamplingParams(**each) for each in params]
    return [
        [
            {
                "token_ids": list(output.token_ids),
                "logprobs": output.logprobs and [{k: v.logprob for k, v in at.items()} for at in output.logprobs],
                "cached": request.num_cached_tokens,
            }
            for output in request.outputs
        ]
        for request in llm.generate(prompts, made, use_tqdm=False, **more)
    ]


def seeded(index: int, **more) -> dict:
    return {"temperature": 0.0 if index == 0 else 0.9, "seed": 50 + index, "max_tokens": 16, "ignore_eos": True} | more


def tokens(requests) -> list[list[list[int]]]:
    return [[output["token_ids"] for output in request] for request in requests]


def prefix_caching(llm):
    """Log probabilities of requests whose prompts come from the cache."""
    params = [seeded(i, logprobs=2) for i in range(len(LINES))]
    first, again = emitted(llm, LINES, params), emitted(llm, LINES, params)
    close = all(
        abs(at[token] - other[token]) < 5e-3
        for one, two in zip(first, again, strict=True)
        for at, other in zip(one[0]["logprobs"], two[0]["logprobs"], strict=True)
        for token in at.keys() & other.keys()
    )
    checks = {
        "prompts came from the cache": all(request[0]["cached"] for request in again),
        "the same tokens with and without": tokens(first) == tokens(again),
        "the same log probabilities": close,
    }
    return tokens(first), checks


def several(llm):
    """n completions of one seeded request are those of n requests with consecutive seeds."""
    whole = tokens(emitted(llm, LINES[:1], [seeded(3, n=4)]))
    alone = [tokens(emitted(llm, LINES[:1], [seeded(3, seed=53 + i)]))[0][0] for i in range(4)]
    return whole, {"completion i is that of seed + i": whole[0] == alone}


def lora(llm, path: str):
    """Requests with an adapter, without, and both in one batch."""
    from vllm.lora.request import LoRARequest

    request = LoRARequest("random", 1, path)
    params = [seeded(i) for i in range(len(LINES))]
    chosen = [request if i % 2 else None for i in range(len(LINES))]
    every, none, some = (
        tokens(emitted(llm, LINES, params, lora_request=each)) for each in ([request] * len(LINES), None, chosen)
    )
    checks = {
        "the adapter changes each text": all(a != b for a, b in zip(every, none, strict=True)),
        "in one batch each is as alone": some == [every[i] if i % 2 else none[i] for i in range(len(LINES))],
    }
    return every + none + some, checks


def twice(llm):
    """Drafts follow the texts of earlier requests, the tokens do not."""
    first, again = plain(llm)[0], plain(llm)[0]
    return first, {"again the same": first == again}


def plain(llm):
    return tokens(emitted(llm, LINES, [seeded(i) for i in range(len(LINES))])), {}


def streamed(llm):
    """Pieces as a client gets them, one engine step at a time."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine, pieces = llm.llm_engine, {}
    for i, line in enumerate(LINES):
        params = SamplingParams(**seeded(i, stop=["\n"], min_tokens=3), output_kind=RequestOutputKind.DELTA)
        engine.add_request(str(i), line, params)
    counts = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            pieces.setdefault(output.request_id.split("-")[0], []).extend(output.outputs[0].token_ids)
            counts[output.request_id] = counts.get(output.request_id, 0) + 1
    whole = tokens(emitted(llm, LINES, [seeded(i, stop=["\n"], min_tokens=3) for i in range(len(LINES))]))
    found = [[pieces[str(i)]] for i in range(len(LINES))]
    return whole, {"the pieces are the whole": found == whole, "in pieces": min(counts.values()) > 1}


def aborted(llm):
    """Requests that leave after a few steps, beside others that stay."""
    from vllm import SamplingParams

    engine, alone = llm.llm_engine, plain(llm)[0]
    for i, line in enumerate(LINES * 2):
        engine.add_request(f"{i}x", line, SamplingParams(**seeded(i % len(LINES))))
    done = {}
    for step in range(200):
        if step == 3:
            engine.abort_request([f"{i}x" for i in range(len(LINES), 2 * len(LINES))])
        for output in engine.step():
            if output.finished:
                done[output.request_id.split("x")[0]] = list(output.outputs[0].token_ids)
        if not engine.has_unfinished_requests():
            break
    stayed = [[done[str(i)]] for i in range(len(LINES)) if str(i) in done]
    return stayed, {"those that stay are as alone": stayed == alone}


def accepted(llm) -> int:
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:spec_decode_num_accepted_tokens")


WITHOUT, WITH = "without drafts", "with drafts"
NGRAM = {"model": None, "method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}
SUFFIX = {"model": None, "method": "suffix", "num_speculative_tokens": 8, "suffix_decoding_min_token_prob": 0.0}


def features(folder: Path) -> dict:
    """By name: what both engines start with, what the one with drafts has besides, and what is run."""
    path = str(folder / "adapter")
    adapter(TARGET, Path(path))
    # vLLM's CPU kernels (`lora/ops/torch_ops/lora_ops.py`) take -1, no adapter, for an index of the last slot: one more
    # slot than adapters, which stays zero.
    loras = {"enable_lora": True, "max_lora_rank": RANK, "max_loras": 2}
    if V2:
        # Else vLLM adapts the head too, for which V2 (`LoraState.make_lora_inputs`) names one adapter per request, not
        # per row of logits: a CPU stops at the first step with drafts.
        loras["lora_target_modules"] = MODULES
    shared_heads = runpy.run_path(str(ROOT / "tests" / "stress" / "ranks.py"))["shared_heads"]
    ranks = {
        "model": str(shared_heads(TARGET, folder / "target of two ranks")),
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
    }
    stages = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}
    if not V2:
        # vLLM makes the second stage's buffers when it warms up, and does not when it is eager.
        stages["enforce_eager"] = False
    return {
        "prefix caching, log probabilities": ({"enable_prefix_caching": True}, {}, prefix_caching),
        "n completions of a seeded request": ({}, {}, several),
        "streaming, stop strings, minimum length": ({}, {}, streamed),
        "aborted requests beside others": ({}, {}, aborted),
        "dynamic number of drafts": (
            {},
            {"speculative": {"num_speculative_tokens_per_batch_size": [[1, 4, 3], [5, 64, 1]]}},
            plain,
        ),
        "n-gram, drafts of any length": ({}, {"speculative": NGRAM}, plain),
        "suffix decoding": ({}, {"speculative": SUFFIX}, twice),
        "LoRA on the target": (loras, {}, partial(lora, path=path)),
        "LoRA on both models": (loras, {"speculative": {"model": merged(DRAFT, folder)}}, partial(lora, path=path)),
        "batch-sharded sampling": (ranks, {"enable_batch_sharded_sampling": True}, plain),
        # vLLM has no pipeline with drafts on a CPU: the second engine has two stages and none either.
        "pipeline parallel": ({}, {"speculative": None} | stages, plain),
    }


def main(result: str, *names: str) -> None:
    """Run features one after another; an error is what vLLM said."""
    if not V2:
        # A pipeline's stages are not eager. Read at import.
        os.environ.pop("TORCHDYNAMO_DISABLE", None)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        known = features(Path(folder))
        for name in names or known:
            both, besides, run = known[name]
            each, accepts = {}, 0
            for arm in (WITHOUT, WITH):
                drafts = arm == WITH and besides.get("speculative", {}) is not None
                more = {k: v for k, v in besides.items() if v is not None} if arm == WITH else {}
                try:
                    llm = start(drafts, **(both | more))
                    each[arm] = run(llm)
                    accepts = accepted(llm) if drafts else 0
                except Exception as error:
                    each[arm] = None, {f"{type(error).__name__}: {error}"[:300]: False}
                llm = None
                gc.collect()
            found[name] = {
                "equal": each[WITHOUT][0] is not None and each[WITHOUT][0] == each[WITH][0],
                WITHOUT: each[WITHOUT][1],
                WITH: each[WITH][1],
                "requests": len(each[WITH][0] or []),
                "accepted": accepts,
            }
            print(name, json.dumps(found[name]), flush=True)
            Path(result).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
