"""Compare the text of seeded requests between engines: no speculation, n-gram, draft models, preempted, alone, mixed.

Usage: ``python tests/engine/seeds.py [--runner V1] [--requests 48] [--tokens 32] [--alone 12] [--out FILE]``. Prints
a table of equal tokens, writes it as JSON, and exits with 1 if one token differs. Models run in single precision.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from engine import run_engines, steps

BASE = "off"
DRAFTING = {BASE: 0, "ngram": 4, "draft-1": 1, "draft-2": 2, "draft-4": 4, "draft-8": 8}


def engines(requests: int, tokens: int, alone: int) -> list[dict]:
    """The engines: each form of drafting, and two with so small a cache that requests are preempted and resumed."""
    prompts, sampling = steps.requests(requests, tokens)
    batches = steps.batches(prompts, sampling, alone)
    drafting = steps.drafting(DRAFTING)
    listed = [steps.engine(name, drafts, batches, max_num_seqs=32) for name, drafts in drafting.items()]
    small = {"max_num_seqs": 16, "block_size": 32, "num_gpu_blocks_override": 44, "disable_log_stats": False}
    for name in (BASE, "draft-4"):
        crowded = [batch for batch in batches if not batch["name"].startswith("alone")]
        listed.append(steps.engine(f"{name}, preempted", drafting[name], crowded, **small))
    return listed


def compare(results: dict, alone: int) -> list[dict]:
    """Per engine: requests and tokens compared with those of ``off``, equal tokens, preemptions, first differences."""
    expected = results[BASE]["batches"]["together"]["token_ids"]
    rows = []
    for name, result in results.items():
        is_whole = "alone 0" in result["batches"]
        pairs = steps.pairs(result, expected, alone if is_whole else 0)
        rows.append(
            {
                "engine": name,
                "requests": len(pairs),
                "tokens": sum(len(wanted) for _, _, _, wanted in pairs),
                "equal": sum(a == b for _, _, got, wanted in pairs for a, b in zip(got, wanted, strict=False)),
                "preemptions": result.get("preemptions", 0),
                "stock_calls": result["stock_calls"],
                "differing": steps.differing(result, expected, alone if is_whole else 0),
            }
        )
    return rows


def run(runner: str, requests: int, tokens: int, alone: int) -> list[dict]:
    """Start the engines in a process of their own and compare."""
    with tempfile.TemporaryDirectory() as folder:
        results, _ = run_engines.start(engines(requests, tokens, alone), Path(folder), runner)
    return compare(results, alone)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runner", choices=("V1", "V2"), default="V1")
    parser.add_argument("--requests", type=int, default=48, help="at most 96")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--alone", type=int, default=12, help="requests that also run on their own")
    parser.add_argument("--out", type=Path, default=Path("reports") / "seeds.json")
    given = parser.parse_args()
    rows = run(given.runner, given.requests, given.tokens, given.alone)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({"runner": given.runner, "tokens": given.tokens, "engines": rows}, indent=1) + "\n")
    print(f"| {given.runner} engine | requests compared | tokens | equal | preemptions |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        share = row["equal"] / row["tokens"]
        print(f"| {row['engine']} | {row['requests']} | {row['tokens']:,} | {share:.2%} | {row['preemptions']} |")
    return int(any(row["differing"] or row["stock_calls"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
