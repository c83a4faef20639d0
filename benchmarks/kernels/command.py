"""`specopt bench`: progress and tables around the kernel benchmark; nothing here measures."""

from __future__ import annotations

import importlib.util
import os
import shlex
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vllm_specopt.benchmarks.errors import CliError
from vllm_specopt.benchmarks.kernels import grid
from vllm_specopt.benchmarks.progress import Stages

SEED = 1
HEADINGS = (
    "implementation",
    "µs",
    "p20 – p80",
    "GB/s",
    "% of\ncopy",
    "launches",
    "extra\nMiB",
    "accepted",
    "× stock\nV1",
    "× stock\nV2",
    "× V1,\nCPU time",
)


def run(
    suite: str, pattern: str | None, out: Path, device: str, repeats: int, threads: int | None, minutes: float | None,
    listed: bool,
) -> int:  # fmt: skip
    """Run `specopt bench` and return its exit status: 0, or 1 if a check failed; raise CliError (2) for bad input."""
    try:
        cases = grid.suite(suite, pattern)
    except ValueError as error:
        raise CliError(str(error), 2) from error
    console = Console()
    if listed:
        for case in cases:
            console.print(case.name, highlight=False, markup=False, soft_wrap=True)
        return 0
    if suite == "rehearsal":
        # Triton reads this when it is imported.
        os.environ["TRITON_INTERPRET"] = "1"
        device = "cpu"

    import torch

    from vllm_specopt.benchmarks.kernels import bench, measure, peers, record

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cpu", "cuda"):
        raise CliError(f"--device is {device!r}: take cpu, cuda or auto.", 2)
    if device == "cuda" and not torch.cuda.is_available():
        raise CliError("--device cuda: PyTorch sees no GPU on this machine; take --device cpu.", 2)
    if threads:
        torch.set_num_threads(threads)
    record.prepare(out)
    chosen = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    command = shlex.join(["specopt", "bench", *_arguments(suite, pattern, out, device, repeats, threads, minutes)])
    provenance = record.Provenance.of(chosen, suite, command, SEED, peers.interpreted())
    options = bench.Options(cases, chosen, out, provenance, repeats, grid.SUITES[suite].seconds, minutes)
    if not console.is_terminal:
        console.width = max(console.width, 140)
    for line in (
        f"Suite {suite}, {len(cases)} cases: {grid.SUITES[suite].purpose}",
        _heading(provenance, peers.has_vllm(), chosen),
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    load, cores = measure.load_average(), os.cpu_count() or 1
    if device == "cpu" and load is not None and load > 0.75 * cores:
        console.print(
            f"The machine is busy (load average {load:.1f} on {cores} cores), which costs long calls more than short "
            "ones: compare processor times (the last column), not wall times.",
            highlight=False,
            soft_wrap=True,
        )
    return _measure(console, bench.run(options), cases, out)


def _arguments(suite, pattern, out, device, repeats, threads, minutes) -> list[str]:
    found = ["--suite", suite, "--device", device, "--repeats", str(repeats), "--out", str(out)]
    found += ["--case", pattern] if pattern else []
    found += ["--threads", str(threads)] if threads else []
    return found + (["--minutes", f"{minutes:g}"] if minutes else [])


def _heading(provenance, has_vllm: bool, device) -> str:
    if not has_vllm:
        stock = "vLLM is not installed: ours alone is measured"
    else:
        stock = f"vLLM {provenance.vllm}"
        if device.type == "cpu":
            stock += ", V1 repaired (as it comes it reads uninitialised memory here), V2 not measured (needs Triton)"
    if "interpreter" in provenance.device:
        stock = f"vLLM {provenance.vllm}; the times mean nothing" if has_vllm else stock
    return f"{provenance.device}, torch {provenance.torch}, Triton {provenance.triton or 'not installed'}; {stock}"


def _measure(console: Console, results, cases: list[grid.Case], out: Path) -> int:
    """Show results as they come, then what is left behind; return the exit status."""
    # Seconds on two quiet cores, for the progress bar only.
    seconds = [1 + case.batch * (case.num_drafts + 1) * case.vocab / 2e7 for case in cases]
    failed, done = [], 0
    with Stages(console, list(zip([case.name for case in cases], seconds, strict=True))) as progress:
        for _ in cases:
            with progress.next():
                measured = next(results, None)
            if measured is None:
                break
            done += 1
            if measured.rows:
                console.print(table(measured.case.name, measured.rows))
            failed += measured.errors
            for error in measured.errors:
                progress.say(f"failed: {error}")
    if done < len(cases):
        console.print(f"Time is up: {len(cases) - done} cases were not begun, {cases[done].name} and after it.")
    if failed:
        console.print(f"{len(failed)} checks failed; what failed has no number.", highlight=False)
    paths = [path for path in [out / "kernel_bench.csv"] if path.exists()]
    if paths:
        from vllm_specopt.benchmarks.kernels import report

        paths.append(report.write(out))
    if paths and importlib.util.find_spec("matplotlib"):
        from vllm_specopt.benchmarks.kernels import plots

        paths += plots.draw(out)
    elif paths:
        console.print("No plots: matplotlib is not installed (pip install 'vllm-specopt[bench]').", markup=False)
    for path in paths:
        console.print(f"left: {path}", highlight=False, markup=False, soft_wrap=True)
    return 1 if failed else 0


def table(title: str, rows: list[dict]) -> Table:
    """Return one case's table: a row per implementation, the fastest in bold."""
    drawn = Table(title=title, title_justify="left")
    for heading in HEADINGS:
        drawn.add_column(heading, justify="left" if heading == "implementation" else "right", no_wrap=True)
    fastest = min((row["time_us"] for row in rows if row.get("time_us")), default=None)
    for row in rows:
        if row.get("time_us") is None:
            drawn.add_row(row["implementation"], "no number", *[""] * (len(HEADINGS) - 2))
            continue
        memory = row["extra_bytes"]
        drawn.add_row(
            row["implementation"],
            f"{row['time_us']:,.1f}",
            f"{row['p20_us']:,.1f} – {row['p80_us']:,.1f}",
            f"{row['gbps']:,.1f}",
            f"{row['percent_of_copy']:.1f}",
            _shown(row["launches"], "d"),
            "" if memory is None else f"{memory / 2**20:,.1f}",
            f"{row['acceptance']:.3f}",
            _shown(row["speedup_over_stock_v1"], ".2f"),
            _shown(row["speedup_over_stock_v2"], ".2f"),
            _shown(row["cpu_ratio_to_stock_v1"], ".2f"),
            style="bold" if row["time_us"] == fastest else None,
        )
    return drawn


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
