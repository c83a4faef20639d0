"""The `specopt` command, put together; each sub-command imports what it needs when it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import vllm_specopt
from vllm_specopt.cli import measuring
from vllm_specopt.cli.errors import told

app = typer.Typer(
    name="specopt",
    help="Drop-in verification for vLLM's speculative decoding.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"vllm-specopt {vllm_specopt.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command()(measuring.demo)
app.command()(measuring.bench)
app.command()(measuring.cost)
app.command()(measuring.ab)


@app.command()
def doctor(
    model: Annotated[str | None, typer.Option(help="Target model. (default: the shipped one)")] = None,
    speculative_config: Annotated[str | None, typer.Option(help="JSON, as given to vllm serve.")] = None,
    additional_config: Annotated[
        str | None, typer.Option(help="JSON, as given to vllm serve. (default: the method exact)")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say whether verification by the drop-in would run here, with which parts, correctly, and how fast.

    Without --model the shipped pair is taken; where it is not there, only the installation is checked. Exit status:
    0 all good, 1 something would not work, 2 bad input.
    """
    from vllm_specopt.cli.doctor import run

    with told("doctor"):
        code = run(model, speculative_config, additional_config, json_)
    raise typer.Exit(code)


@app.command()
def audit(
    target: Annotated[str, typer.Argument(help="URL of a running server, or a model to serve.", show_default=False)],
    follow: Annotated[bool, typer.Option("--follow", help="Go on reading the server until interrupted.")] = False,
    tokens: Annotated[int, typer.Option(min=1000, help="Tokens to have a started server emit.")] = 20_000,
    speculative_config: Annotated[str | None, typer.Option(help="JSON, as given to vllm serve.")] = None,
    additional_config: Annotated[
        str | None, typer.Option(help="JSON, as given to vllm serve. (default: the method exact)")
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port of a started server; 0 takes a free one.")] = 0,
) -> None:
    """Say whether a server's output follows the target's distribution, as far as its audit has seen.

    A model is served, driven with prompts at several temperatures, and judged. Exit status: 0 no sign of loss, 1 lossy,
    or too few tokens to say, or a run failed, 2 bad input.
    """
    from vllm_specopt.cli.audit import run

    with told("audit"):
        code = run(target, follow, tokens, speculative_config, additional_config, port)
    raise typer.Exit(code)


@app.command()
def fingerprints(
    vllm: Annotated[
        Path | None, typer.Option(help="Folder of a vLLM, the package or what it lies in. (default: the installed one)")
    ] = None,
    against: Annotated[Path | None, typer.Option(help="Folder of another vLLM: print the differences from it.")] = None,
) -> None:
    """List the parts of vLLM that the drop-in relies on, and say which are not as in the versions that it knows.

    Reads sources and imports nothing. Exit status: 0 every part is known, 1 one is not, 2 bad input.
    """
    from vllm_specopt.cli.fingerprints import run

    with told("fingerprints"):
        code = run(vllm, against)
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
