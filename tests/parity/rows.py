"""The parity matrix as data: its columns, the engines each column starts, and its rows.

A row names one thing a user may ask for. Its greedy requests must emit what the same runner emits without speculation
(and something else than without the parameter); its sampled requests must follow the exact distribution of
the target model.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = ROOT / "models" / "specopt-target"
DRAFT = ROOT / "models" / "specopt-draft"

MAX_TOKENS, NUM_DRAFTS = 12, 3
BLOCK = 32


@dataclass(frozen=True)
class Column:
    """One way to decode: without speculation, or with the stock verification or ours.

    requests: Sampled requests per row; few where every kernel runs in Triton's interpreter.
    """

    name: str
    title: str
    runner: str
    arm: str
    requests: int

    @property
    def plain(self) -> str:
        """The column that decodes without speculation on the same runner."""
        return f"plain-{self.runner.lower()}"


COLUMNS = {
    column.name: column
    for column in (
        Column("plain-v1", "plain V1", "V1", "plain", 256),
        Column("stock-v1", "stock V1", "V1", "stock", 256),
        Column("ours-v1", "ours V1", "V1", "ours", 256),
        Column("plain-v2", "plain V2", "V2", "plain", 24),
        Column("stock-v2", "stock V2", "V2", "stock", 24),
        Column("ours-v2", "ours V2", "V2", "ours", 24),
    )
}

# Arguments of each engine beside the common ones; several engine-wide rows share one start.
ENGINES: dict[str, dict] = {
    "base": {
        "async_scheduling": True,
        "max_logprobs": -1,
        "reasoning_config": {"reasoning_start_str": "def", "reasoning_end_str": ")"},
    },
    # Thinking starts with a common token, so that it starts again.
    "prefix": {
        "logprobs_mode": "processed_logprobs",
        "enable_prefix_caching": True,
        "reasoning_config": {"reasoning_start_str": "(", "reasoning_end_str": ")"},
    },
    "chunked": {
        "logprobs_mode": "raw_logits",
        "async_scheduling": False,
        "enable_chunked_prefill": True,
        "max_num_batched_tokens": 24,
        "max_num_seqs": 4,
    },
    # A request of the longest length takes four blocks; six are too few for the four that run together.
    "preempted": {"logprobs_mode": "processed_logits", "num_gpu_blocks_override": 6, "max_num_seqs": 4},
    "custom": {"logits_processors": None},
}


@dataclass(frozen=True)
class Row:
    """One row.

    greedy: Parameters of the greedy requests; None if there are none.
    sampled: Parameters of the sampled requests, checked against the exact distribution; None if there are none.
    engine: The engine that runs them, a key of ``ENGINES``.
    prompts: Which prompts the greedy requests take: ``short``, ``long``, ``shared`` (the same twice) or ``thinking``.
    bites: Whether the greedy output must differ from that without the parameters.
    check: A further check by name, see ``judge.CHECKS``.
    drafts: Whether draft tokens must have been verified.
    """

    name: str
    greedy: dict | None = None
    sampled: dict | None = None
    engine: str = "base"
    prompts: str = "short"
    bites: bool = True
    check: str | None = None
    expect: dict = field(default_factory=dict)
    drafts: bool = True


# Parameters whose value is large enough to be seen in a few hundred draws.
BIAS = {"logit_bias": {token: 6.0 for token in range(300, 308)}}
EVEN = list(range(0, 512, 2))
STOPS = list(range(0, 240, 2))
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}, "required": ["n"]}
PROCESSED = {"repetition_penalty": 1.4, "logprobs": 2}
SAMPLED_LOGPROBS = {"temperature": 0.5, "logprobs": 1}
SPECIFIC = {"logprob_token_ids": [5, 17, 300]}
EVERYTHING = {
    **{"temperature": 0.8, "min_p": 0.05, "top_k": 30, "top_p": 0.9, "allowed_token_ids": list(range(0, 512, 3))},
    **{"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.5, "logprobs": 1, **BIAS},
}

ROWS = (
    Row("greedy", greedy={}, bites=False),
    Row("temperature", sampled={"temperature": 0.4}),
    Row("top-k", sampled={"top_k": 2}),
    Row("top-p", sampled={"top_p": 0.4}),
    Row("min-p", sampled={"min_p": 0.3}),
    Row("seed", sampled={"temperature": 1.5}, check="repeats"),
    Row("repetition penalty", greedy={"repetition_penalty": 1.4}, sampled={"repetition_penalty": 1.8}),
    Row("frequency penalty", greedy={"frequency_penalty": 1.5}, sampled={"frequency_penalty": 2.0}),
    Row("presence penalty", greedy={"presence_penalty": 1.5}, sampled={"presence_penalty": 2.0}),
    Row("bad words", greedy={"bad_words": ["self", "return", "the", "def", "(", ":", "."]}),
    Row("allowed tokens", greedy={"allowed_token_ids": EVEN}, sampled={"allowed_token_ids": EVEN}),
    Row("min tokens", greedy={"min_tokens": 6, "stop_token_ids": STOPS, "ignore_eos": False}, check="min_tokens"),
    Row("logit bias", greedy=BIAS, sampled=BIAS),
    Row("stop strings", greedy={"stop": ["e", "("]}, check="stopped"),
    Row("stop strings, shown", {"stop": ["e", "("], "include_stop_str_in_output": True}, check="stopped"),
    Row("stop token ids", greedy={"stop_token_ids": STOPS}, check="stopped"),
    Row("logprobs, raw", greedy=PROCESSED, sampled=SAMPLED_LOGPROBS, check="raw_logprobs"),
    Row("logprobs, processed", PROCESSED, SAMPLED_LOGPROBS, engine="prefix", check="processed_logprobs"),
    Row("logprobs, raw logits", PROCESSED, SAMPLED_LOGPROBS, engine="chunked", check="raw_logits"),
    Row("logprobs, processed logits", PROCESSED, SAMPLED_LOGPROBS, engine="preempted", check="processed_logits"),
    Row(
        "logit bias and min-p, logprobs processed",
        greedy={**BIAS, "logprobs": 2},
        sampled={"min_p": 0.3, "logprobs": 1},
        engine="prefix",
        check="processed_logprobs",
    ),
    Row(
        "logprobs of specific tokens",
        greedy={**SPECIFIC, "max_tokens": 8},
        sampled={**SPECIFIC, "temperature": 0.5},
        bites=False,
        check="specific_logprobs",
    ),
    Row("logprobs of all tokens", greedy={"logprobs": -1}, bites=False, check="all_logprobs"),
    Row("logprobs, flat", PROCESSED | {"flat_logprobs": True}, SAMPLED_LOGPROBS, check="raw_logprobs"),
    Row("all of these at once", sampled=EVERYTHING, engine="prefix", check="processed_logprobs"),
    Row("prompt logprobs", greedy={"prompt_logprobs": 2}, bites=False, check="prompt_logprobs"),
    Row(
        "structured output: JSON schema",
        greedy={"structured_outputs": {"json": SCHEMA}, "ignore_eos": False, "max_tokens": 24},
        check="json",
    ),
    Row(
        "structured output: regex",
        greedy={"structured_outputs": {"regex": "[a-c]{3}-[0-9]{2}"}, "ignore_eos": False},
        check="matches",
        expect={"regex": "[a-c]{3}-[0-9]{2}"},
    ),
    Row(
        "structured output: grammar",
        greedy={"structured_outputs": {"grammar": 'root ::= "ab" ("+" [0-9])'}, "ignore_eos": False},
        check="matches",
        expect={"regex": r"ab\+[0-9]"},
    ),
    Row(
        "structured output: choice",
        greedy={"structured_outputs": {"choice": ["yellow", "violet"]}, "ignore_eos": False},
        check="matches",
        expect={"regex": "yellow|violet"},
    ),
    Row("thinking budget", greedy={"thinking_token_budget": 4}, prompts="thinking", check="thinking"),
    Row(
        "thinking budget, thinking more than once",
        greedy={"thinking_token_budget": 2, "max_tokens": 60},
        engine="prefix",
        check="thinks_again",
    ),
    Row("one token", greedy={"max_tokens": 1}, bites=False, check="one_token", drafts=False),
    Row("the model's longest sequence", {"max_tokens": 200}, prompts="long", bites=False, check="longest"),
    Row(
        "repetition detection",
        greedy={"repetition_detection": {"max_pattern_size": 3, "min_count": 3}, "allowed_token_ids": [300]},
        check="repetition",
    ),
    Row("n > 1", sampled={"n": 4, "temperature": 0.8}, check="several"),
    Row("custom logits processors", greedy={"extra_args": {"ban": EVEN}}, engine="custom", check="banned"),
    Row(
        "custom logits processors that read the text so far",
        greedy={"extra_args": {"not_twice": True}, "allowed_token_ids": [300, 301, 302]},
        engine="custom",
        check="not_twice",
    ),
    Row("prefix caching", greedy={}, engine="prefix", prompts="shared", bites=False, check="cached"),
    Row("chunked prefill", greedy={}, engine="chunked", prompts="long", bites=False, check="chunked"),
    Row("async scheduling on", greedy={}, sampled={"temperature": 0.7}, bites=False, check="async_on"),
    Row("async scheduling off", {}, {"temperature": 0.7}, engine="chunked", bites=False, check="async_off"),
    Row("chunked prefill and a seed", sampled={"temperature": 0.7}, engine="chunked", bites=False, check="seeded"),
    Row("preemption", greedy={"max_tokens": 72}, engine="preempted", prompts="long", bites=False, check="preempted"),
)
