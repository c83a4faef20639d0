"""The commands `specopt bench`, `cost`, `ab` and `demo`: their options and help."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from vllm_specopt.cli.errors import told


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
    concurrency: Annotated[
        str | None, typer.Option(help="Requests in flight, with commas between. (default: 1,8,32; 16 with --offline)")
    ] = None,
    temperature: Annotated[
        str, typer.Option(help="Temperatures, with commas between; 0.8:0.9 is temperature 0.8 with top-p 0.9.")
    ] = "0,1",
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
        int, typer.Option(min=0, help="Extend the models' vocabulary to this size, 151936 for instance.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed of the prompts' order; repeat i uses seed + i.")] = 0,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of ab.json, report.md and report.png.")] = Path(
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
    noise: Annotated[
        bool,
        typer.Option("--noise/--no-noise", help="Run the baseline twice, to see what two equal processes differ by."),
    ] = True,
    plain: Annotated[
        bool, typer.Option("--plain", help="Compare seeded texts with the drop-in's without speculation, too.")
    ] = False,
    offline: Annotated[
        bool, typer.Option("--offline", help="Engines without a server, a process per arm and repeat, in turns.")
    ] = False,
    ray: Annotated[
        bool, typer.Option("--ray", help="Spread the servers over a running Ray cluster, each on a slot of its own.")
    ] = False,
    ray_address: Annotated[str, typer.Option(help="The cluster; auto finds the one this machine is in.")] = "auto",
    ray_gpus: Annotated[
        float | None, typer.Option(min=0, help="GPUs one server takes. (default: 1; 0 with vLLM for CPUs)")
    ] = None,
    ray_cpus: Annotated[float, typer.Option(min=0, help="CPU slots one server takes.")] = 1,
) -> None:
    """Run a model with and without the plugin and compare what users see.

    Real `vllm serve` processes, one per arm and one more of the baseline for the noise, take turns under
    `vllm bench serve`; with --offline, engines without a server. Leaves ab.json and, as views of it, report.md and
    report.png. Run the same line again to go on after an interruption. Exit status: 0 all measured, 1 an arm or a run
    failed or exact's greedy texts differ, 2 bad input.
    """
    from vllm_specopt.benchmarks.serve.command import run
    from vllm_specopt.benchmarks.serve.settings import checked

    with told("ab"):
        settings = checked(
            target=target, draft=draft, speculative_config=speculative_config, arms=arm, spec=workload,
            concurrency=concurrency, temperature=temperature, num_prompts=num_prompts, output_len=output_len,
            repeats=repeats, serve_args=serve_arg, seed=seed, out=out, fresh=fresh, stock_url=stock_url,
            specopt_url=specopt_url, port=port, timeout=timeout, quick=quick, minutes=minutes, vocab_size=vocab_size,
            noise=noise, plain=plain, offline=offline, ray=ray,
        )  # fmt: skip
        cluster = None
        if ray:
            from vllm_specopt.benchmarks.serve.cluster import Cluster

            gpus = (0 if settings.plan.on_cpu else 1) if ray_gpus is None else ray_gpus
            cluster = Cluster(ray_address, gpus, ray_cpus)
        code = run(settings, sys.argv[1:], cluster)
    raise typer.Exit(code)


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of ab.json, report.md and report.png.")] = Path(
        "reports/demo"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="A quarter of the requests in the timed runs.")] = False,
) -> None:
    """Serve the shipped pair with 151,936 tokens, stock and exact, and compare the two: a preset of `specopt ab`.

    Checks that greedy texts are stock's and seeded ones the same without speculation. Exit status: 0 greedy texts
    identical, 1 not or a run failed, 2 bad input.
    """
    from vllm_specopt.benchmarks.serve.command import run
    from vllm_specopt.benchmarks.serve.settings import demo_settings

    with told("demo"):
        code = run(demo_settings(out, quick), sys.argv[1:])
    raise typer.Exit(code)
