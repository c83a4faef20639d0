"""The error that the command line tools turn into one sentence and an exit status."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


class CliError(Exception):
    """A run cannot go on: the message is for the user, `exit_code` for the shell (1 a run failed, 2 bad input)."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def told(command: str) -> Iterator[None]:
    """End the sub-command with the error's sentence and exit status, should a ``CliError`` come out of the block."""
    try:
        yield
    except CliError as error:
        typer.echo(f"specopt {command}: {error}", err=True)
        raise typer.Exit(error.exit_code) from error
