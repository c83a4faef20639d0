"""Random completion requests for the stress run, and what must be true of every answer.

Request number ``index`` of a run is a function of the run's seed and of that number alone.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
VOCAB = 512
EOS = 0
MAX_TOKENS = 48
# Greedy requests whose answers plain decoding must give as well; each is cut to some length, save `stop`, where the
# cut would have to be made in the text.
GREEDY = {
    "pure": {},
    "repetition": {"repetition_penalty": 1.3},
    "counts": {"frequency_penalty": 0.8, "presence_penalty": 0.4},
    "bad-words": {"bad_words": ["self", "return", "the", "def"]},
    "allowed": {"allowed_token_ids": list(range(0, VOCAB, 2))},
    "minimum": {"min_tokens": 12, "stop_token_ids": list(range(40))},
    "stop": {"stop": ["\n", "):"]},
}
SHARE_GREEDY, SHARE_LEAVING, SHARE_STREAMED = 0.5, 0.2, 0.5


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        index: Its number in the run.
        body: What is posted to /v1/completions.
        expected: Key of the plain answer it must equal, ``(prompt number, name in GREEDY)``; None if it is sampled.
        leaves_after: Chunks (streamed) or seconds (whole) after which the client closes the connection; None: never.
    """

    index: int
    body: dict
    expected: tuple[int, str] | None
    leaves_after: float | None

    @property
    def key(self) -> str:
        """The plain answer's key as text."""
        return "{} {}".format(*self.expected)


@dataclass
class Choice:
    """One choice of an answer: its text, token ids, log probabilities of those (or None) and why it ended."""

    text: str
    token_ids: list[int]
    logprobs: list[float] | None
    finish_reason: str | None


def prompts() -> list[str]:
    """The shipped pair's prompts."""
    return [json.loads(line)["prompt"] for line in (ROOT / "models" / "prompts.jsonl").read_text().splitlines()]


def plain_request(key: str, texts: list[str]) -> dict:
    """Body of the request whose answer a key stands for, at full length."""
    prompt, variant = key.split(" ")
    return _body(texts[int(prompt)], GREEDY[variant] | {"temperature": 0.0, "max_tokens": MAX_TOKENS})


def make(index: int, seed: int, texts: list[str]) -> Request:
    """Request number ``index`` of the run with this seed."""
    rng = random.Random(seed * 1_000_003 + index)
    prompt = rng.randrange(len(texts))
    if rng.random() < SHARE_GREEDY:
        variant = rng.choice(["pure", "pure", *GREEDY])
        expected, parameters = (prompt, variant), GREEDY[variant] | {"temperature": 0.0}
        least = {"minimum": 12, "stop": MAX_TOKENS}.get(variant, 1)
        parameters["max_tokens"] = rng.randint(least, MAX_TOKENS)
    else:
        expected, parameters = None, _sampled(rng)
    if rng.random() < 0.2:
        parameters["logprobs"] = rng.randint(0, 3)
    parameters["stream"] = rng.random() < SHARE_STREAMED
    leaves_after = None
    if rng.random() < SHARE_LEAVING:
        leaves_after = rng.randint(1, 4) if parameters["stream"] else rng.expovariate(1.0)
    return Request(index, _body(texts[prompt], parameters), expected, leaves_after)


def _sampled(rng: random.Random) -> dict:
    parameters = {"temperature": rng.choice([0.0, 0.5, 1.0, 1.0]), "max_tokens": rng.randint(1, MAX_TOKENS)}
    choices = {
        "top_k": lambda: rng.choice([1, 5, 50, VOCAB]),
        "top_p": lambda: rng.choice([0.1, 0.8, 0.95]),
        "seed": lambda: rng.randrange(2**31),
        "repetition_penalty": lambda: rng.uniform(0.8, 1.5),
        "frequency_penalty": lambda: rng.uniform(-1, 1),
        "presence_penalty": lambda: rng.uniform(-1, 1),
        "stop": lambda: rng.choice([["\n"], ["self", "("], ["="]]),
        "min_tokens": lambda: rng.randint(1, parameters["max_tokens"]),
        "stop_token_ids": lambda: rng.sample(range(1, VOCAB), 8),
        "bad_words": lambda: rng.sample(["self", "return", "the", "def", "import", "if"], 2),
        "allowed_token_ids": lambda: sorted(rng.sample(range(VOCAB), rng.choice([3, 20, 100]))),
        "ignore_eos": lambda: True,
        "n": lambda: 2,
    }
    for name, value in choices.items():
        if rng.random() < (0.5 if name == "seed" else 0.25):
            parameters[name] = value()
    if parameters["temperature"] == 0.0:
        parameters.pop("n", None)
    return parameters


def _body(prompt: str, parameters: dict) -> dict:
    return {"model": "target", "prompt": prompt, "return_token_ids": True, "stream": False} | parameters


def wrong(request: Request, choices: list[Choice], plain: dict[str, dict]) -> list[str]:
    """What is wrong with a complete answer; ``plain`` holds plain decoding's answers by key."""
    body, found = request.body, []
    if len(choices) != body.get("n", 1):
        found.append(f"{len(choices)} choices")
    for choice in choices:
        ids, count = choice.token_ids, len(choice.token_ids)
        # A stop string is found in the text of a whole step, so the step's later tokens stay among the ids.
        by_text = "stop" in body and choice.finish_reason == "stop"
        if not all(0 <= token < VOCAB for token in ids):
            found.append(f"ids outside the vocabulary: {ids}")
        if not 1 <= count <= body["max_tokens"] or (choice.finish_reason == "length" and count != body["max_tokens"]):
            found.append(f"{count} tokens ({choice.finish_reason}) for max_tokens {body['max_tokens']}")
        if choice.finish_reason not in ("length", "stop"):
            found.append(f"finish_reason {choice.finish_reason}")
        if count < body.get("min_tokens", 0):
            found.append(f"{count} tokens for min_tokens {body['min_tokens']}")
        ends = {*body.get("stop_token_ids", ()), *(() if body.get("ignore_eos") else (EOS,))}
        if choice.finish_reason == "stop" and not by_text and ids[-1] not in ends:
            found.append(f"stopped at token {ids[-1]}")
        least = max(body.get("min_tokens", 0), 1)
        if any(token in ends for token in ids[least - 1 : -1]):
            found.append("went on after a stop token")
        if "allowed_token_ids" in body and not set(ids) <= set(body["allowed_token_ids"]):
            found.append("a token that is not allowed")
        if "logprobs" in body and (
            len(choice.logprobs or ()) != count or not all(math.isfinite(x) and x <= 0 for x in choice.logprobs)
        ):
            found.append(f"log probabilities {choice.logprobs} for {count} tokens")
        if request.expected and not _equals_plain(choice, plain[request.key], body["max_tokens"]):
            found.append(f"{choice.text!r} is not plain decoding's {plain[request.key]['text']!r}")
    return [f"request {request.index}: {what}" for what in found]


def _equals_plain(choice: Choice, plain: dict, max_tokens: int) -> bool:
    if max_tokens == MAX_TOKENS:
        return choice.text == plain["text"]
    return choice.token_ids == plain["token_ids"][:max_tokens]
