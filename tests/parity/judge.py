"""From what a column emitted to one verdict a cell."""

from __future__ import annotations

import itertools
import json
import re

from parity import law
from parity.rows import BLOCK, STOPS, Column, Row

WORKS, REFUSED, WRONG, CRASHES = VERDICTS = "works", "refused", "wrong", "crashes"
REFUSALS = ("VLLMValidationError", "ValueError", "ValidationError")
# Of about 100 tests of a law one in a hundred runs would fall below by chance; the seeds are fixed, so runs repeat.
MIN_P_VALUE = 1e-4
# Logarithm of how many times likelier the draws must be than under the distribution without the parameter.
TOLD_APART = 7.0
CLOSE = 5e-3
START_OF_THINKING, END_OF_THINKING = 8, 9
LONGEST = 4 * BLOCK


def judge(row: Row, column: Column, found: dict, plain: dict) -> tuple[str, str]:
    """Verdict and, unless it is plainly ``works``, what was seen.

    Args:
        row: The row.
        column: The column.
        found: What ``column.py`` wrote for this cell.
        plain: The same for decoding without speculation on the same runner.
    """
    if error := found.get("error"):
        message = shorten(error["message"] or error["type"])
        if error["type"] in REFUSALS:
            return REFUSED, ("at start-up: " if error.get("start") else "") + message
        return CRASHES, f"{error['type']}: {message}"
    if row.check == "async_on" and not found["async_scheduling"]:
        return REFUSED, "vLLM's CPU platform turns async scheduling off"
    problems = list(_problems(row, column, found, plain))
    if problems:
        return WRONG, "; ".join(problems)
    return WORKS, ""


def shorten(message: str) -> str:
    """The last telling line of an error message, at most 200 characters."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    lines = [line for line in lines if not line.startswith("For further information")] or [message]
    chosen = next((line for line in lines if line.startswith("Value error, ")), lines[-1])
    chosen = re.sub(r" \[type=.*", "", chosen.removeprefix("Value error, "))
    return chosen if len(chosen) <= 200 else chosen[:197] + "..."


def _problems(row: Row, column: Column, found: dict, plain: dict):
    if row.drafts and column.arm != "plain" and not found["verifications"]:
        yield "no draft token was verified"
    if row.greedy is not None:
        expected = [entry["token_ids"] for entry in plain.get("greedy", [])]
        ours = [entry["token_ids"] for entry in found["greedy"]]
        if not expected:
            yield "decoding without speculation emitted nothing to compare with"
        elif differ := [at for at, (a, b) in enumerate(zip(ours, expected, strict=True)) if a != b]:
            yield f"greedy tokens of {len(differ)} of {len(ours)} requests differ from plain decoding"
        elif [e["text"] for e in found["greedy"]] != [e["text"] for e in plain["greedy"]]:
            yield "the text differs from plain decoding"
        if row.bites and all(a == b["token_ids"] for a, b in zip(ours, found["base"], strict=True)):
            yield "the output is that without the parameter"
    if row.sampled is not None:
        yield from _law_problems(row, found["sampled"])
    if row.check:
        yield from CHECKS[row.check](row, found, plain)


def _law_problems(row: Row, entries: list[dict]):
    p_value, draws, outside = law.fit(entries, row.sampled)
    if outside:
        yield f"{outside} of {draws} sampled tokens are ones the parameters exclude"
    elif p_value < MIN_P_VALUE:
        yield f"sampled tokens do not follow the exact distribution (chi-square p = {p_value:.1g}, {draws} draws)"
    if row.bites and row.greedy is None and row.check is None:
        # Greedy requests show that a parameter bites by themselves.
        ratio = law.log_likelihood(entries, row.sampled) - law.log_likelihood(entries, {})
        if not ratio > TOLD_APART:
            fit = f"log likelihood ratio {ratio:.1f}, {draws} draws"
            yield f"the distribution without the parameter fits as well ({fit})"


def _repeats(row, found, plain):
    first, again = ([entry["token_ids"] for entry in found[name]] for name in ("sampled", "again"))
    if first != again:
        yield f"{sum(a != b for a, b in zip(first, again, strict=True))} of {len(first)} seeded requests do not repeat"
    if len(set(map(tuple, first))) < len(first) // 2:
        yield "different seeds emit the same tokens"


def _min_tokens(row, found, plain):
    if any(len(entry["token_ids"]) < row.greedy["min_tokens"] for entry in found["greedy"]):
        yield "a completion is shorter than min_tokens"
    if not any(token in STOPS for entry in found["base"] for token in entry["token_ids"][: row.greedy["min_tokens"]]):
        yield "no completion would have stopped earlier"


def _stopped(row, found, plain):
    if all(entry["finish_reason"] != "stop" for entry in found["greedy"]):
        yield "no completion stopped"


def _values(mode):
    def check(row, found, plain):
        for ours, theirs in zip(found.get("greedy", ()), plain.get("greedy", ()), strict=False):
            for at, other in zip(ours["logprobs"] or [], theirs["logprobs"] or [], strict=False):
                shared = at.keys() & other.keys()
                if len(shared) < 2 or any(abs(at[token] - other[token]) > CLOSE for token in shared):
                    yield f"{mode} of greedy tokens differ from plain decoding's"
                    return
            if not ours["logprobs"]:
                yield "no log probabilities came back"
                return
        for entry in found["sampled"]:
            rows = law.processed_logits(entry, row.sampled) if mode.startswith("processed") else law.raw_logits(entry)
            rows = rows.log_softmax(1) if mode.endswith("logprobs") else rows
            for at, token in enumerate(entry["token_ids"]):
                if not abs(entry["logprobs"][at][str(token)] - float(rows[at, token])) < CLOSE:
                    yield f"{mode} of sampled tokens are not the target model's"
                    return

    return check


def _specific_logprobs(row, found, plain):
    wanted = set(map(str, row.greedy["logprob_token_ids"]))
    entries = [*found["greedy"], *found["sampled"]]
    if any(len(entry["logprobs"] or []) != len(entry["token_ids"]) for entry in entries):
        yield "log probabilities are missing"
        return
    for entry in entries:
        expected = law.raw_logits(entry).log_softmax(1)
        for at, token in enumerate(entry["token_ids"]):
            shown = entry["logprobs"][at]
            if shown.keys() != wanted | {str(token)}:
                yield f"the tokens shown are {sorted(map(int, shown))}"
                return
            if any(abs(value - float(expected[at, int(token)])) > CLOSE for token, value in shown.items()):
                yield "log probabilities are not the target model's"
                return


def _all_logprobs(row, found, plain):
    for entry in found["greedy"]:
        expected = law.raw_logits(entry).log_softmax(1)
        for at, shown in enumerate(entry["logprobs"]):
            if len(shown) != expected.shape[1]:
                yield f"{len(shown)} log probabilities"
                return
            if any(abs(value - float(expected[at, int(token)])) > CLOSE for token, value in shown.items()):
                yield "log probabilities are not the target model's"
                return


def _prompt_logprobs(row, found, plain):
    for entry in found["greedy"]:
        expected = law.sequence_logits(tuple(entry["prompt"])).log_softmax(1)
        values = entry["prompt_logprobs"]
        if len(values or []) != len(entry["prompt"]):
            yield "prompt log probabilities are missing"
            return
        for at, token in enumerate(entry["prompt"][1:]):
            if abs(values[at + 1][str(token)] - float(expected[at, token])) > CLOSE:
                yield "prompt log probabilities are not the target model's"
                return


def _json(row, found, plain):
    for entry in found["greedy"]:
        try:
            value = json.loads(entry["text"])
        except ValueError:
            if entry["finish_reason"] == "length" and re.match(r'\s*(\{\s*("n?)?)?', entry["text"]):
                continue
            value = None
        if not (isinstance(value, dict) and isinstance(value.get("n"), int) and 0 <= value["n"] <= 9):
            yield f"{entry['text']!r} does not follow the schema"


def _matches(row, found, plain):
    for entry in found["greedy"]:
        if not re.fullmatch(row.expect["regex"], entry["text"]):
            yield f"{entry['text']!r} does not match"


def _thinking(row, found, plain):
    budget = row.greedy["thinking_token_budget"]
    for entry in found["greedy"]:
        if END_OF_THINKING not in entry["token_ids"][: budget + 1]:
            yield f"the end of thinking is not among the first {budget + 1} tokens"
            return


def _thinks_again(row, found, plain):
    budget, again = row.greedy["thinking_token_budget"], 0
    for entry in found["greedy"]:
        ids, left, opened = entry["token_ids"], None, 0
        for token in ids:
            if left is None and token == START_OF_THINKING:
                left, opened = budget, opened + 1
            elif left is not None:
                if token != END_OF_THINKING and left == 0:
                    yield f"more than {budget} tokens of a thought"
                    return
                left = None if token == END_OF_THINKING else left - 1
        again += opened > 2
    if not again:
        yield "no completion thinks more than twice"


def _one_token(row, found, plain):
    if any(len(entry["token_ids"]) != 1 for entry in found["greedy"]):
        yield "a completion has not one token"


def _longest(row, found, plain):
    if any(len(entry["prompt"]) + len(entry["token_ids"]) != LONGEST for entry in found["greedy"]):
        yield f"a sequence has not {LONGEST} tokens"


def _repetition(row, found, plain):
    if any(entry["finish_reason"] != "repetition" for entry in found["greedy"]):
        yield f"completions end with {[entry['finish_reason'] for entry in found['greedy']]}"


def _not_twice(row, found, plain):
    if any(a == b for entry in found["greedy"] for a, b in itertools.pairwise(entry["token_ids"])):
        yield "a token follows itself"


def _several(row, found, plain):
    number = row.sampled["n"]
    groups = [found["sampled"][at : at + number] for at in range(0, len(found["sampled"]), number)]
    if any(len({tuple(entry["prompt"]) for entry in group}) != 1 for group in groups):
        yield "a request does not have n completions"
    if all(len({tuple(entry["token_ids"]) for entry in group}) == 1 for group in groups):
        yield "the n completions are all the same"


def _banned(row, found, plain):
    if any(set(entry["token_ids"]) & set(row.greedy["extra_args"]["ban"]) for entry in found["greedy"]):
        yield "a token was emitted that the processor forbids"


def _cached(row, found, plain):
    if any(not entry["cached"] for entry in found["greedy"]):
        yield "a repeated prompt did not come from the cache"


def _chunked(row, found, plain):
    if any(len(entry["prompt"]) <= 24 for entry in found["greedy"]):
        yield "the prompts fit one chunk"


def _async_off(row, found, plain):
    if found["async_scheduling"]:
        yield "async scheduling is on"


def _preempted(row, found, plain):
    if not found["preemptions"]:
        yield "no request was preempted"


CHECKS = {
    "repeats": _repeats,
    "min_tokens": _min_tokens,
    "stopped": _stopped,
    "raw_logprobs": _values("raw_logprobs"),
    "processed_logprobs": _values("processed_logprobs"),
    "raw_logits": _values("raw_logits"),
    "processed_logits": _values("processed_logits"),
    "specific_logprobs": _specific_logprobs,
    "all_logprobs": _all_logprobs,
    "prompt_logprobs": _prompt_logprobs,
    "json": _json,
    "matches": _matches,
    "thinking": _thinking,
    "thinks_again": _thinks_again,
    "one_token": _one_token,
    "longest": _longest,
    "repetition": _repetition,
    "not_twice": _not_twice,
    "several": _several,
    "banned": _banned,
    "cached": _cached,
    "chunked": _chunked,
    "seeded": lambda row, found, plain: (),
    "async_on": lambda row, found, plain: (),
    "async_off": _async_off,
    "preempted": _preempted,
}
