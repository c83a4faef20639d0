"""Measure in vLLM how many draft tokens of the pair the target accepts, and add it to metrics.json.

vLLM's CPU fallback of the kernel that spreads each request's temperature over its tokens leaves its output unwritten,
so `expand_batch_to_tokens` is replaced by the same operation in PyTorch before the engine starts. Otherwise vLLM is
left as it is: no plugin is loaded.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["VLLM_PLUGINS"] = ""
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

import torch
import vllm
from vllm import LLM, SamplingParams
from vllm.v1.sample import rejection_sampler

HERE = Path(__file__).parent


def expand_batch_to_tokens(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """Repeat each request's value for each of its draft tokens, `replace_from` exchanged for `replace_to`."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    values = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return values.repeat_interleave(counts.long(), output_size=num_tokens)


def measure(prompts: list[str], method: str, temperatures: list[float], args: argparse.Namespace) -> list[dict]:
    """Generate from all the prompts at each temperature; return one row of acceptance figures for each."""
    llm = LLM(
        model=str(args.target),
        speculative_config={
            "model": str(args.draft),
            "num_speculative_tokens": args.speculative_tokens,
            "draft_sample_method": method,
        },
        dtype="bfloat16",
        max_model_len=1024,
        max_num_seqs=args.max_num_seqs,
        enforce_eager=True,
        distributed_executor_backend="uni",
        disable_log_stats=False,
        enable_prefix_caching=False,
        seed=args.seed,
    )

    def counters() -> tuple[int, int, int]:
        found = {metric.name: metric for metric in llm.get_metrics()}
        names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")
        return tuple(found[f"vllm:spec_decode_{name}"].value for name in names)

    rows = []
    for temperature in temperatures:
        before = counters()
        sampling = SamplingParams(temperature=temperature, max_tokens=args.output_tokens, ignore_eos=True)
        llm.generate(prompts, sampling)
        drafts, drafted, accepted = (after - start for after, start in zip(counters(), before, strict=True))
        rows.append(
            {
                "draft_sample_method": method,
                "temperature": temperature,
                "draft_tokens": drafted,
                "accepted_tokens": accepted,
                "acceptance_rate": round(accepted / drafted, 4),
                "mean_acceptance_length": round(1 + accepted / drafts, 4),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    """Measure one way of drafting and merge its rows into metrics.json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=["greedy", "probabilistic"])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 0.0])
    parser.add_argument("--target", type=Path, default=HERE / "specopt-target")
    parser.add_argument("--draft", type=Path, default=HERE / "specopt-draft")
    parser.add_argument("--speculative-tokens", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--max-num-seqs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--metrics", type=Path, default=HERE / "metrics.json")
    args = parser.parse_args()
    lines = (HERE / "prompts.jsonl").read_text(encoding="utf-8").splitlines()[: args.prompts]
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    rows = measure([json.loads(line)["prompt"] for line in lines], args.method, args.temperatures, args)

    metrics = json.loads(args.metrics.read_text(encoding="utf-8"))
    conditions = {
        "vllm": vllm.__version__,
        "command": " ".join(["python models/acceptance.py", *sys.argv[1:]]),
        "prompts": len(lines),
        "output_tokens": args.output_tokens,
        "num_speculative_tokens": args.speculative_tokens,
    }
    kept = [row for row in metrics.get("vllm_acceptance", []) if row["draft_sample_method"] != args.method]
    metrics["vllm_acceptance"] = kept + [row | conditions for row in rows]
    args.metrics.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
