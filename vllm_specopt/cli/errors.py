"""What turns an error of a tool into one sentence and an exit status."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from vllm_specopt.benchmarks.errors import CliError


@contextmanager
def told(command: str) -> Iterator[None]:
    """End the sub-command with the error's sentence and exit status, should a ``CliError`` come out of the block."""
    try:
        yield
    except CliError as error:
        typer.echo(f"specopt {command}: {error}", err=True)
        raise typer.Exit(error.exit_code) from error
