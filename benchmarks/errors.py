"""The error that a command turns into one sentence and an exit status."""

from __future__ import annotations


class CliError(Exception):
    """A run cannot go on: the message is for the user, `exit_code` for the shell (1 a run failed, 2 bad input)."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
