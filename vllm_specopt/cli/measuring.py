"""The commands `specopt bench`, `bench-engine`, `ab` and `quality`: their options and help."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vllm_specopt.cli.errors import CliError, told


def bench(
    suite: Annotated[
        str,
        typer.Option(help="Which cases: quick, cpu, cpu-lines, gpu or rehearsal (Triton's interpreter, tiny shapes)."),
    ] = "quick",
    case: Annotated[
        str | None, typer.Option(help="Only cases whose name this regular expression matches, or is.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for kernel_bench.csv and its plots.")] = Path("reports/bench"),
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU if there is one.")] = "auto",
    repeats: Annotated[int, typer.Option(min=5, help="Timed calls per implementation and case.")] = 20,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads on a CPU. (default: PyTorch's)")] = None,
    minutes: Annotated[float | None, typer.Option(min=0.1, help="Begin no case after this long.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Name the cases and stop.")] = False,
) -> None:
    """Time verification, ours beside vLLM's own samplers, on the same tensors.

    Checks each case against a float64 reference first: what fails the check has no number. Adds one row per case and
    implementation to kernel_bench.csv, and draws plots from it. Exit status: 0 all measured, 1 a check failed,
    2 bad input.
    """
    from vllm_specopt.benchmarks.kernels.command import run

    with told("bench"):
        code = run(suite, case, out, device, repeats, threads, minutes, list_)
    raise typer.Exit(code)


def cost(
    out: Annotated[Path, typer.Option(help="Folder for cost.csv and cost.json.")] = Path("reports/cost"),
    case: Annotated[str | None, typer.Option(help="Only settings whose name contains this.")] = None,
    arch: Annotated[list[int] | None, typer.Option(help="80, 90 or 100; repeat it. (default: all three)")] = None,
) -> None:
    """Count what verification costs on a GPU, ours beside vLLM's V2 kernels, from machine code; needs no GPU.

    Compiles every kernel, counts the instructions it issues by pipe, and models a time per card, which is never a
    measurement. Exit status: 0, 1 one of our kernels exceeds its budget, 2 bad input.
    """
    from vllm_specopt.benchmarks.kernels.cost_command import run

    with told("cost"):
        code = run(out, case, arch or [80, 90, 100])
    raise typer.Exit(code)


def bench_engine(
    arm: Annotated[
        list[str] | None,
        typer.Option(
            help="stock, stock-repaired (CPU), exact, sigmoid, or NAME=JSON; repeat it. (default: the first three)"
        ),
    ] = None,
    drafting: Annotated[
        list[str] | None, typer.Option(help="greedy, ngram or probabilistic; repeat it. (default: all three)")
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Runs per arm and way of drafting. (default: 4; 3 with --quick)")
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests, all in flight at once.")] = 16,
    output_len: Annotated[int, typer.Option(min=2, max=512, help="Tokens per request.")] = 32,
    draft_tokens: Annotated[int, typer.Option(min=1, max=128, help="Draft tokens per step.")] = 4,
    vocab_size: Annotated[
        int, typer.Option(min=0, help="Extend the pair's vocabulary to this many tokens; 0 leaves it.")
    ] = 151_936,
    width: Annotated[
        int, typer.Option(help="Give both models matrices this many times as wide (1, 4, 16), which change nothing.")
    ] = 1,
    extra_layers: Annotated[int, typer.Option(min=0, help="Add layers to the target, which change nothing.")] = 0,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Torch threads on a CPU. (default: cores less one, as vLLM)")
    ] = None,
    target: Annotated[Path | None, typer.Option(help="Folder of the target model. (default: the shipped one)")] = None,
    draft: Annotated[Path | None, typer.Option(help="Folder of the draft model. (default: the shipped one)")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='JSON lines, each with a "prompt". (default: the shipped ones)')
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for engine_ab.json and engine_ab.md.")] = Path("reports"),
    quick: Annotated[
        bool, typer.Option("--quick", help="Three runs of two arms, greedy drafting: a first impression.")
    ] = False,
) -> None:
    """Time whole vLLM engines that differ in the sampler only, over a large vocabulary.

    Each run is a process of its own; the arms take turns. Prints ratios with intervals, acceptance and where the time
    goes, and leaves engine_ab.json and engine_ab.md. Exit status: 0 measured, 1 a run failed or completions at
    temperature 0 differ, 2 bad input.
    """
    from vllm_specopt.cli.engine import run

    with told("bench-engine"):
        code = run(
            arms=arm or [],
            drafting=drafting or [],
            repeats=repeats,
            requests=requests,
            output_len=output_len,
            draft_tokens=draft_tokens,
            vocab_size=vocab_size,
            threads=threads,
            target=target,
            draft=draft,
            prompts=prompts,
            out=out,
            quick=quick,
            argv=sys.argv[1:],
            width=width,
            extra_layers=extra_layers,
        )
    raise typer.Exit(code)


def ab(
    target: Annotated[
        str | None, typer.Argument(help="Target model, a folder or owner/name. (default: the shipped one)")
    ] = None,
    draft: Annotated[str | None, typer.Option(help="Draft model: 4 draft tokens a step, drawn from it.")] = None,
    speculative_config: Annotated[
        str | None, typer.Option(metavar="JSON", help="vLLM's --speculative-config, instead of --draft.")
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=JSON]",
            help="stock, stock-repaired (CPU), a method, or any name and the plugin's option, such as "
            '\'mine={"method": "exact"}\'; repeat it, the first is the baseline. (default: stock and exact)',
        ),
    ] = None,
    workload: Annotated[
        str,
        typer.Option(help="shipped, random, FILE.jsonl, sharegpt:FILE, spec-bench:FILE or speed-bench:DIR."),
    ] = "shipped",
    concurrency: Annotated[str, typer.Option(help="Requests in flight, with commas between.")] = "1,8,32",
    temperature: Annotated[str, typer.Option(help="Temperatures, with commas between.")] = "0,1",
    top_p: Annotated[float, typer.Option(min=0.01, max=1, help="Top-p at temperatures above 0.")] = 1.0,
    num_prompts: Annotated[
        int | None, typer.Option(min=1, help="Requests per run. (default: 4 per request in flight, at least 24)")
    ] = None,
    output_len: Annotated[int, typer.Option(min=2, help="Tokens per request.")] = 64,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Runs of every arm at every point. (default: 4; 2 with --quick)")
    ] = None,
    serve_arg: Annotated[
        list[str] | None, typer.Option(help="A further argument of `vllm serve` in every arm; repeat it.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=1,
            help="Choose the number of requests so that all is done in this time. (default: 14 for the shipped pair)",
        ),
    ] = None,
    vocab_size: Annotated[
        int, typer.Option(min=0, help="Extend the models' vocabulary to this size, as `bench-engine` does.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the prompts' order; repeat i uses seed + i.")] = 0,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of ab.json, report.md and report.html.")] = Path(
        "reports/ab"
    ),
    fresh: Annotated[
        bool, typer.Option("--fresh/--resume", help="Drop the record in the folder, or go on with it.")
    ] = False,
    stock_url: Annotated[str | None, typer.Option(metavar="URL", help="A running stock server.")] = None,
    specopt_url: Annotated[str | None, typer.Option(metavar="URL", help="A running server with the option.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65000, help="First port of the servers; 0 takes free ones.")] = 0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which one run of the client is stopped.")] = 600,
    quick: Annotated[bool, typer.Option("--quick", help="Two repeats: a first impression.")] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="Spread the servers over a running Ray cluster, each on a slot of its own.")
    ] = False,
    ray_address: Annotated[str, typer.Option(help="The cluster; auto finds the one this machine is in.")] = "auto",
    ray_gpus: Annotated[
        float | None, typer.Option(min=0, help="GPUs one server takes. (default: 1; 0 with vLLM for CPUs)")
    ] = None,
    ray_cpus: Annotated[float, typer.Option(min=0, help="CPU slots one server takes.")] = 1,
) -> None:
    """Serve a model with and without the plugin and compare what users see.

    Real `vllm serve` processes, one per arm and one more of the baseline for the noise, take turns under
    `vllm bench serve`. Leaves ab.json and, as views of it, report.md and report.html. Run the same line again to go on
    after an interruption. Exit status: 0 all measured, 1 an arm or a run failed or exact's greedy completions differ,
    2 bad input.
    """
    from vllm_specopt.benchmarks.serve.command import run
    from vllm_specopt.benchmarks.serve.settings import checked

    with told("ab"):
        if ray and (stock_url or specopt_url or port):
            raise CliError("--ray starts its own servers: leave --stock-url, --specopt-url and --port out.", 2)
        if ray and (minutes or vocab_size):
            raise CliError("--minutes and --vocab-size are for servers on this machine: leave them out with --ray.", 2)
        settings = checked(
            target=target, draft=draft, speculative_config=speculative_config, arms=arm or [], spec=workload,
            concurrency=concurrency, temperature=temperature, top_p=top_p, num_prompts=num_prompts,
            output_len=output_len, repeats=repeats, serve_args=serve_arg or [], seed=seed, out=out, fresh=fresh,
            stock_url=stock_url, specopt_url=specopt_url, port=port, timeout=timeout, quick=quick,
            minutes=minutes, vocab_size=vocab_size, ray=ray,
        )  # fmt: skip
        cluster = None
        if ray:
            from vllm_specopt.benchmarks.serve.cluster import Slot
            from vllm_specopt.benchmarks.serve.placements import Cluster

            gpus = (0 if settings.plan.on_cpu else 1) if ray_gpus is None else ray_gpus
            cluster = Cluster(ray_address, Slot(gpus, ray_cpus))
        code = run(settings, sys.argv[1:], cluster)
    raise typer.Exit(code)
