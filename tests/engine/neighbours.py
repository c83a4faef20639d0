"""Features beside which verification runs: each engine with draft tokens must emit what it emits without.

Usage: ``python neighbours.py RESULT.json [ENGINE ...]``, in the environment of a runner (``run_engines.environment``).
Writes, per feature, whether the seeded and greedy requests of both engines have equal tokens, and what else must hold.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET, DRAFT = ROOT / "models" / "specopt-target", ROOT / "models" / "specopt-draft"
DRAFTS = 3
LINES = [json.loads(line)["prompt"] for line in (ROOT / "models" / "prompts.jsonl").read_text().splitlines()[:6]]


def adapter(folder: Path, seed: int = 0) -> str:
    """A LoRA adapter of the target with random weights, large enough to change the text."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((TARGET / "config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(config["num_hidden_layers"]):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{name}.lora_A.weight"] = torch.randn(8, hidden, generator=generator) * 0.2
        weights[f"{name}.lora_B.weight"] = torch.randn(heads * width, 8, generator=generator) * 0.2
    save_file(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj"], "bias": "none"})
    )
    return str(folder)


def start(drafts: bool, **more):
    """An engine of the target, with the drop-in."""
    from vllm import LLM

    # A CPU worker of vLLM 0.32 looks into every loaded module and stumbles over this one, which numba loads.
    sys.modules.pop("llvmlite.binding.ffi", None)
    speculative = {"model": str(DRAFT), "num_speculative_tokens": DRAFTS} | more.pop("speculative", {})
    args = {
        "model": str(TARGET),
        "dtype": "float32",
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "max_model_len": 256,
        "max_num_seqs": 16,
        "block_size": 32,
        "enable_prefix_caching": False,
        "additional_config": {"specopt": "exact"},
        "speculative_config": speculative if drafts else None,
    }
    return LLM(**(args | more))


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


def lora(llm, path):
    """Requests with an adapter and without, in one batch."""
    from vllm.lora.request import LoRARequest

    request = LoRARequest("random", 1, path)
    params = [seeded(i) for i in range(len(LINES))]
    with_it = tokens(emitted(llm, LINES, params, lora_request=[request if i % 2 else None for i in range(len(LINES))]))
    without = tokens(emitted(llm, LINES, params))
    changed = [a != b for a, b in zip(with_it, without, strict=True)]
    return with_it, {"the adapter changes its requests alone": changed == [bool(i % 2) for i in range(len(LINES))]}


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


# A name, what it starts, what it runs.
FEATURES = {
    "prefix caching, log probabilities": ({"enable_prefix_caching": True}, prefix_caching),
    "n completions of a seeded request": ({}, several),
    "streaming, stop strings, minimum length": ({}, streamed),
    "aborted requests beside others": ({}, aborted),
    "dynamic number of drafts": (
        {"speculative": {"num_speculative_tokens_per_batch_size": [[1, 4, 3], [5, 64, 1]]}},
        plain,
    ),
    "n-gram, drafts of any length": (
        {"speculative": {"model": None, "method": "ngram", "prompt_lookup_max": 3, "prompt_lookup_min": 1}},
        plain,
    ),
    "LoRA on the target": ({"enable_lora": True, "max_lora_rank": 8}, lora),
    "pipeline parallel": ({"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}, plain),
}


def main(result: str, *names: str) -> None:
    """Run features one after another; an error is what vLLM said."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = adapter(Path(folder))
        for name in names or FEATURES:
            more, run = FEATURES[name]
            each = {}
            for drafts in (False, True):
                args = {key: value for key, value in more.items() if drafts or key != "speculative"}
                try:
                    llm = start(drafts, **args)
                    each[drafts] = run(llm, path) if run is lora else run(llm)
                except Exception as error:
                    each[drafts] = None, {f"{type(error).__name__}: {error}"[:300]: False}
                llm = None
                gc.collect()
            equal = each[False][0] is not None and each[False][0] == each[True][0]
            found[name] = {
                "equal": equal,
                "without drafts": each[False][1],
                "with drafts": each[True][1],
                "requests": len(each[True][0] or []),
            }
            print(name, json.dumps(found[name]), flush=True)
            Path(result).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
