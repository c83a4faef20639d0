"""Cut the prompts of prompts.jsonl out of the held-out files.

Each line holds "prompt" and "output_tokens", the keys of vLLM's custom benchmark dataset, and "source", the file
of the standard library that the prompt was cut from.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from pathlib import Path

from corpus import collect, split
from transformers import AutoTokenizer, PreTrainedTokenizerFast

HERE = Path(__file__).parent
BLOCK_START = re.compile(r"(?:(?<=\n\n)|\A(?=r?\"\"\"))(?= {0,8}(?:async def |def |class |@\w|r?\"\"\"))")
WORD_END = re.compile(r"\S(?=\s)")
MIN_TOKENS, MAX_TOKENS, OUTPUT_TOKENS = 60, 200, 128


def cut(text: str, start: int, tokenizer: PreTrainedTokenizerFast, length: int) -> str | None:
    """Return about `length` tokens of `text` from `start`, ending where a word ends, or None where too few are left."""
    window = text[start : start + 12 * length]
    offsets = tokenizer.backend_tokenizer.encode(window).offsets
    if len(offsets) <= length:
        return None
    limit = offsets[length - 1][1]
    end = max((match.end() for match in WORD_END.finditer(window, 0, limit + 1)), default=0)
    prompt = window[:end]
    return prompt if len(tokenizer(prompt)["input_ids"]) >= MIN_TOKENS else None


def build(
    files: dict[str, str], train: dict[str, str], tokenizer: PreTrainedTokenizerFast, count: int, seed: int
) -> list[dict]:
    """Cut `count` prompts out of `files`, one file after the other, none of which occurs in `train`."""
    rng = random.Random(seed)
    starts = {name: [match.start() for match in BLOCK_START.finditer(text)] for name, text in files.items()}
    for places in starts.values():
        rng.shuffle(places)
    prompts: list[dict] = []
    while len(prompts) < count and any(starts.values()):
        for name in sorted(starts):
            if not starts[name] or len(prompts) == count:
                continue
            prompt = cut(files[name], starts[name].pop(), tokenizer, rng.randint(MIN_TOKENS + 5, MAX_TOKENS))
            if prompt and not any(prompt in other for other in train.values()):
                prompts.append({"prompt": prompt, "output_tokens": OUTPUT_TOKENS, "source": name})
    return prompts


def main() -> None:
    """Write prompts.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, default=HERE / "specopt-target")
    parser.add_argument("--out", type=Path, default=HERE / "prompts.jsonl")
    parser.add_argument("--count", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train, held_out = split(collect())
    prompts = build(held_out, train, AutoTokenizer.from_pretrained(args.tokenizer), args.count, args.seed)
    with args.out.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(prompt) + "\n" for prompt in prompts)
    print(f"{len(prompts)} prompts out of {len({prompt['source'] for prompt in prompts})} held-out files")


if __name__ == "__main__":
    main()
