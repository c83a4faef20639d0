"""Run every proof on all cores, show the table, write reports/prove.json; exit 1 if anything failed."""

import argparse
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from proof import fuzz, jobs, report

ROOT = Path(__file__).resolve().parents[2]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, prog="make prove ARGS=")
    parser.add_argument("--quick", action="store_true", help="a small form of everything, a minute or two")
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    parser.add_argument("--only", nargs="+", choices=jobs.SECTIONS, default=jobs.SECTIONS, help="some sections")
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1), help="processes (default 2)")
    parser.add_argument("--report", type=Path, default=ROOT / "reports" / "prove.json", help="where the rows go")
    parser.add_argument("--resume", action="store_true", help="keep what the report has and do what is missing")
    parser.add_argument("--join", type=Path, nargs="+", default=[], help="take over what other reports have, too")
    parser.add_argument("--markdown", type=Path, help="write the table as Markdown too")
    parser.add_argument("--backend", choices=("cpu", "triton"), help="what concerns this backend only (default both)")
    parser.add_argument("--batch", type=int, help="repeat one batch of the fuzz run --seed, on --backend, and stop")
    return parser.parse_args(arguments)


def repeat_batch(options: argparse.Namespace) -> int:
    """Check one batch of the fuzz run and say whether it equals the reference."""
    backend = options.backend or "cpu"
    plan = fuzz.random_plan(options.seed, options.batch, backend)
    print(plan)
    try:
        fuzz.check_plan(plan, backend, jobs.device_of(backend), fuzz.FuzzResult())
    except AssertionError as error:
        print(f"fails: {error}")
        return 1
    print("equals the reference")
    return 0


def run(options: argparse.Namespace, console: Console) -> list[jobs.Row]:
    """Do the jobs that no earlier report has; saves the report after each."""
    size = jobs.QUICK if options.quick else jobs.FULL
    conditions = {"quick": options.quick, "seed": options.seed}
    earlier = ([options.report] if options.resume else []) + options.join
    rows, done = [], set()
    for path in earlier:
        found = [row for row in report.load(path, conditions) if row.job not in done]
        rows, done = rows + found, done | {row.job for row in found}
    wanted = [job for job in jobs.plan_jobs(size, options.only) if options.backend in (None, job.backend)]
    missing = [job for job in wanted if job.name not in done]
    start = time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} jobs"))
    with (
        ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool,
        Progress(*columns, TimeElapsedColumn(), console=console) as progress,
    ):
        report.save(options.report, conditions, rows, 0.0, options.workers)
        task = progress.add_task("proving", total=len(missing))
        futures = {pool.submit(jobs.run_job, job, size, options.seed): job for job in missing}
        for future in as_completed(futures):
            rows += future.result()
            report.save(options.report, conditions, rows, time.perf_counter() - start, options.workers)
            progress.advance(task)
            for row in future.result():
                if not row.passed:
                    progress.console.print(
                        f"FAILED {row.section}: {row.case} ({row.backend}): {row.note}", markup=False
                    )
    return rows


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.batch is not None:
        return repeat_batch(options)
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    rows = report.merge(run(options, console))
    console.print(report.table(rows))
    if options.markdown:
        options.markdown.write_text(report.markdown(rows))
    failed = [row for row in rows if not row.passed]
    print(f"{len(rows) - len(failed)} of {len(rows)} hold; {report.shown(options.report)}", flush=True)
    for row in failed:
        print(json.dumps({"failed": row.case, "section": row.section, "backend": row.backend, "why": row.note}))
    return 1 if failed else 0
