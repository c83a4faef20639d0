"""Whether the text of a seeded request depends on speculation: engines with drafts and without, all at once.

With bfloat16 the logits of a step with drafts differ from those of one without, whatever the sampler. They agree in
float32 to its last bits, and in vLLM's batch-invariant mode to the bit. Nothing is timed here.
"""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from first_run import engines
from first_run.engines import Run
from first_run.places import REHEARSE, save

PAIRS = (("exact", "float32"), ("exact", "invariant"), ("stock", "float32"))
PLAIN, DRAFTS = "no", "greedy"
CACHE_BYTES = 4 << 30


def main(seconds: float) -> None:
    """Write seeds.json: per pair of engines and workload, how many of the completions are the same."""
    deadline = time.monotonic() + seconds - 3
    pair = engines.shipped_pair() if REHEARSE else engines.wait_for_pair(deadline)
    prompts = engines.shipped_prompts()
    engines.FOLDER.mkdir(parents=True, exist_ok=True)
    chosen = PAIRS[:1] if REHEARSE else PAIRS
    runs = [Run(arm, drafting, kind=kind) for arm, kind in chosen for drafting in (DRAFTS, PLAIN)]
    left = deadline - time.monotonic()
    with ThreadPoolExecutor(1 if REHEARSE else len(runs)) as pool:
        results = list(pool.map(lambda run: engines.engine(run, request(run, pair, prompts), left), runs))
    found = [told(*results[i : i + 2], *chosen[i // 2]) for i in range(0, len(results), 2)]
    save("seeds", found)
    print(json.dumps(found, indent=1))
    sys.exit(int(any("problem" in result for result in results)))


def request(run: Run, pair: Path, prompts: list[str]) -> dict:
    """What engine.py is asked for: each workload once, and engines that leave room for each other."""
    asked = engines.request(run, pair, prompts)
    asked["workloads"] = {name: each for name, each in asked["workloads"].items() if engines.AGAIN not in name}
    asked["profiled"] = []
    if not REHEARSE:
        # vLLM wants this share of the card free when it starts, and takes the bytes that are named.
        room = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": CACHE_BYTES}
        asked["llm"] |= room | {"attention_backend": "TRITON_ATTN"}
    return asked


def told(drafts: dict, plain: dict, arm: str, kind: str) -> dict:
    """What two engines' completions have in common."""
    texts = {}
    for name, work in drafts.get("workloads", {}).items():
        if name in plain.get("workloads", {}):
            both = zip(work["token_ids"], plain["workloads"][name]["token_ids"], strict=True)
            shared = [engines.common(*each) for each in both]
            accepted = work["accepted_tokens"] / max(work["draft_tokens"], 1)
            texts[name] = {"identical": sum(each == 1 for each in shared), "completions": len(shared),
                           "shared_prefix": round(sum(shared) / len(shared), 4),
                           "draft_tokens_accepted": round(accepted, 3)}  # fmt: skip
    problems = [each["problem"][-600:] for each in (drafts, plain) if "problem" in each]
    return {"arm": arm, "kind": kind, "texts": texts} | ({"problems": problems} if problems else {})


if __name__ == "__main__":
    main(float(sys.argv[1]))
