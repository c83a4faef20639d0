"""`python -m research.quality` in a checkout: its options and help."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from research.quality.command import run
from research.quality.settings import Options
from vllm_specopt.benchmarks.errors import CliError

app = typer.Typer(add_completion=False, rich_markup_mode="markdown", pretty_exceptions_enable=False)


@app.command()
def quality(
    target: Annotated[
        str | None, typer.Argument(help="Target model, a folder or owner/name. (default: those of the tasks)")
    ] = None,
    draft: Annotated[str | None, typer.Argument(help="Draft model, a folder or owner/name.")] = None,
    data: Annotated[
        Path | None, typer.Option(help='JSON lines with "prompt" and "reference"; no chat template is applied.')
    ] = None,
    metric: Annotated[list[str] | None, typer.Option(help="wer or rouge; repeat it.")] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="A shipped task, transcription or summary; repeat it. (default: both)")
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="target, draft, exact, exact-chosen, sigmoid-1e1, budget-0.05 and so on; repeat it. (default: all)"
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Texts per item, arm and temperature above 0.")] = 5,
    temperature: Annotated[str, typer.Option(help="Temperatures, with commas between.")] = "1",
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens per text at most. (default: 128, or by task)")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first lines only.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends a text; repeat it.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="vLLM's --dtype. (default: auto; float32 for the shipped tasks)")
    ] = None,
    draft_tokens: Annotated[int, typer.Option(min=1, max=128, help="Draft tokens per step.")] = 4,
    max_model_len: Annotated[
        int | None, typer.Option(min=8, help="vLLM's --max-model-len. (default: the models' own, at most 4096)")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 32,
    law_prompts: Annotated[
        int, typer.Option(min=0, help="Prompts per seed that are run again for the TV column; 0 leaves it out.")
    ] = 16,
    ngram: Annotated[int, typer.Option(min=1, help="Words per n-gram of the repetition rate.")] = 3,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Torch threads on a CPU. (default: cores less one, as vLLM)")
    ] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of the record, its page and plot.")] = Path(
        "reports/quality"
    ),
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Drop the record in the folder, or go on with it.")
    ] = False,
) -> None:
    """Score what a pair of models writes: alone, verified exactly, and by sigmoid at every scale.

    One vLLM engine per arm writes all texts of all seeds; jiwer or rouge-score scores them, and the target alone tells
    their perplexity. Without models the shipped tasks are run. Leaves quality.json, quality.md and quality.svg. Run the
    same line again to go on after an interruption. Exit status: 0 all measured, 1 an arm failed, 2 bad input.
    """
    try:
        options = Options(
            target=target, draft=draft, data=data, metrics=metric or [], tasks=task or [], arms=arm or [],
            seeds=seeds, temperature=temperature, max_tokens=max_tokens, limit=limit, stop=stop or [], dtype=dtype,
            draft_tokens=draft_tokens, max_model_len=max_model_len, concurrency=concurrency, law_prompts=law_prompts,
            ngram=ngram, threads=threads,
        )  # fmt: skip
        code = run(options, out, fresh, sys.argv[1:])
    except CliError as error:
        typer.echo(f"quality: {error}", err=True)
        raise typer.Exit(error.exit_code) from error
    raise typer.Exit(code)


if __name__ == "__main__":
    app()
