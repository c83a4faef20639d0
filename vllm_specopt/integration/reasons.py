"""The one line of what vLLM says when it would not start that tells why: of an error, and of a server's log."""

from __future__ import annotations

import re

# What vLLM and its processes put before a line.
_PREFIX = re.compile(
    r"^(\(\S+ pid=\d+\) )?((ERROR|WARNING|INFO|DEBUG|CRITICAL) \d\d-\d\d \d\d:\d\d:\d\d (\[[^\]]*\] ?)?)?"
)
_ERROR = re.compile(r"^([\w.]*(Error|Exception|Interrupt|NotFound)|[\w ./-]*: error): \S")
# An error that only says that there was another.
_SECOND_HAND = (
    "Engine core initialization failed",
    "Engine process failed to start",
    "WorkerProc initialization failed",
)
_PYDANTIC = re.compile(r"\d+ validation errors? for ")
_PYDANTIC_VALUE = re.compile(r"^\s*(Value|Assertion) error, (?P<said>.*?)( \[type=\w+, input_value=.*)?$")


def of_error(text: str) -> str:
    """The line of an error's text that says why: pydantic's first value error, else the first line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and _PYDANTIC.search(lines[0]):
        values = (_PYDANTIC_VALUE.match(line) for line in lines)
        said = next((found["said"] for found in values if found), None)
        # Without one, the lines are a field and what is wrong with it.
        return said or re.sub(r" \[type=\w+, input_value=.*", "", ": ".join(lines[1:3]) or lines[0])
    return lines[0] if lines else ""


def of_log(text: str) -> str:
    """The line of a log that says why its process ended: the last error that is not about another, else the last."""
    lines = [_PREFIX.sub("", line).rstrip() for line in text.splitlines()]
    for number in range(len(lines) - 1, -1, -1):
        if _ERROR.match(lines[number]) and not any(said in lines[number] for said in _SECOND_HAND):
            return of_error("\n".join(lines[number : number + 4]))
    return next((line.strip() for line in reversed(lines) if line.strip()), "its log is empty")
