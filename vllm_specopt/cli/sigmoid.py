"""The commands `specopt calibrate` and `specopt quality`: their options and help."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vllm_specopt.cli.errors import told


def calibrate(
    target: Annotated[
        str | None, typer.Argument(help="Target model, a folder or owner/name. (default: the shipped one)")
    ] = None,
    draft: Annotated[
        str | None, typer.Argument(help="Draft model, a folder or owner/name. (default: the shipped one)")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSON lines, each with a "prompt". (default: the shipped ones)')
    ] = None,
    output: Annotated[Path, typer.Option("-o", "--output", help="The calibration file.")] = Path("calibration.json"),
    report: Annotated[Path | None, typer.Option(help="Folder for curve.csv and curve.svg.")] = None,
    temperature: Annotated[str, typer.Option(help="Temperatures, with commas between.")] = "0.7,1",
    bytes_: Annotated[
        float, typer.Option("--bytes", min=0, max=100, help="Percent of the exact method's bytes to read at most.")
    ] = 10,
    acceptance: Annotated[
        float,
        typer.Option(min=10, max=100, help="Percent of the exact method's acceptance to keep; less is more faithful."),
    ] = 100,
    block_size: Annotated[
        int | None, typer.Option(min=1, max=512, help="Tokens per block, a power of two. (default: by vocabulary)")
    ] = None,
    rows: Annotated[int, typer.Option(min=50, help="Rows kept of each half of the prompts.")] = 3000,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens per request.")] = 32,
    draft_tokens: Annotated[int, typer.Option(min=1, max=128, help="Draft tokens per step.")] = 4,
) -> None:
    """Calibrate the sigmoid method for a pair of models, and say what it costs in quality.

    Runs the pair through vLLM with the exact method, fits on every other prompt, checks on the rest, and writes a file
    for {"sigmoid": {"calibration": FILE}}. Exit status: 0 written, 1 the run failed, 2 bad input.
    """
    from vllm_specopt.cli.calibrate import run

    with told("calibrate"):
        code = run(
            target=target, draft=draft, prompts=prompts, output=output, report=report, temperature=temperature,
            budget=bytes_ / 100, acceptance=acceptance / 100, block_size=block_size, rows=rows, output_len=output_len,
            draft_tokens=draft_tokens, argv=sys.argv[1:],
        )  # fmt: skip
    raise typer.Exit(code)


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
    calibration: Annotated[Path | None, typer.Option(help="File of `specopt calibrate` for the pair.")] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="target, draft, exact, sigmoid-1e1, sigmoid-1e3, sigmoid-1e4, sigmoid-1e5 or calibrated; repeat it. "
            "(default: all)"
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
    from vllm_specopt.cli.quality import run
    from vllm_specopt.cli.quality_input import Options

    with told("quality"):
        options = Options(
            target=target, draft=draft, data=data, metrics=metric or [], tasks=task or [], calibration=calibration,
            arms=arm or [], seeds=seeds, temperature=temperature, max_tokens=max_tokens, limit=limit, stop=stop or [],
            dtype=dtype, draft_tokens=draft_tokens, max_model_len=max_model_len, concurrency=concurrency,
            law_prompts=law_prompts, ngram=ngram, threads=threads,
        )  # fmt: skip
        code = run(options, out, fresh, sys.argv[1:])
    raise typer.Exit(code)
