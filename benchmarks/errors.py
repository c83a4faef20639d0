"""The error that a command turns into one sentence and an exit status, and what raises it for JSON in an option."""

from __future__ import annotations

import json

from vllm_specopt.integration.config import parse


class CliError(Exception):
    """A run cannot go on: the message is for the user, `exit_code` for the shell (1 a run failed, 2 bad input)."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def json_object(flag: str, text: str) -> dict:
    """The object that an option's text is; raise CliError (2) where it is none."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise CliError(f"{flag} is not JSON ({error.msg} at character {error.pos + 1}).", 2) from error
    if not isinstance(value, dict):
        raise CliError(f"{flag} is {text}, expected a JSON object.", 2)
    return value


def checked_option(additional_config: dict) -> dict:
    """The value of --additional-config as it is; raise CliError (2) where the plugin would refuse its option."""
    try:
        parse(additional_config)
    except ValueError as error:
        raise CliError(f"--additional-config: {error}.", 2) from error
    return additional_config
