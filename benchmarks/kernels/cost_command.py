"""`specopt cost`: progress and tables around the counts of machine code; nothing here counts."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vllm_specopt.benchmarks.errors import CliError


def run(out: Path, pattern: str | None, architectures: list[int]) -> int:
    """Run `specopt cost` and return its exit status: 0, or 1 if a budget is exceeded; raise CliError for bad input."""
    os.environ.pop("TRITON_INTERPRET", None)
    from vllm_specopt.benchmarks.kernels import budgets, cost

    if unknown := set(architectures) - set(cost.ARCHITECTURES):
        raise CliError(f"--arch is {unknown.pop()}: take 80, 90 or 100.", 2)
    planned = [(setting, step) for setting, step in cost.plan() if not pattern or pattern in setting]
    if not planned:
        raise CliError(f"--case {pattern!r} is in none of: {', '.join(cost.SETTINGS)}", 2)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 160)
    with tempfile.TemporaryDirectory() as cache, console.status("...") as status:
        os.environ["TRITON_CACHE_DIR"] = cache
        counted = cost.count_steps(planned, architectures, lambda text: status.update(text))
    cost.write(counted, out)
    for architecture in architectures:
        here = [step for step in counted if step.architecture == architecture]
        console.print(_kernels(here, architecture))
        console.print(_steps(here, architecture))
    console.print(f"{out / cost.CSV_NAME}, {out / cost.JSON_NAME}")
    found = budgets.violations(step for step in counted if step.step.who == cost.OURS)
    for line in found:
        console.print(f"over budget: {line}", style="red", highlight=False)
    return 1 if found else 0


def _kernels(counted: list, architecture: int) -> Table:
    from vllm_specopt.benchmarks.kernels.cost import MORE

    table = Table(title=f"sm_{architecture}: kernels, B = {MORE[0]}, K = {MORE[1]}", title_justify="left")
    for name in ("setting", "who", "kernel"):
        table.add_column(name)
    for name in ("programs", "registers", "warps/SM", "spilled", "shared", "instr./element", "MB", "pipes"):
        table.add_column(name, justify="right")
    for step in counted:
        if (step.step.case.batch, step.step.case.num_drafts) != MORE:
            continue
        for count in step.counts:
            most = sorted(count.pipes.items(), key=lambda item: -item[1])[:4]
            total = count.warp_instructions or 1.0
            table.add_row(
                step.setting,
                step.step.who,
                count.kernel,
                f"{count.programs:,}" if count.num_warps else "",
                *([str(count.registers), str(count.warps), str(count.spilled), str(count.shared)] if count.num_warps
                  else [""] * 4),
                f"{count.warp_instructions * 32 / step.elements:.2f}" if count.num_warps else "",
                f"{count.bytes / 1e6:.1f}",
                " ".join(f"{name} {100 * number / total:.0f}%" for name, number in most),
            )  # fmt: skip
    return table


def _steps(counted: list, architecture: int) -> Table:
    from vllm_specopt.benchmarks.kernels.cost_model import CARDS

    cards = [card for card in CARDS if card.architecture == architecture]
    table = Table(title=f"sm_{architecture}: steps; times are a model, not a measurement", title_justify="left")
    for name in ("setting", "B", "K", "who"):
        table.add_column(name)
    for name in ("launches", "instr./element", "MB", "x floor"):
        table.add_column(name, justify="right")
    for card in cards:
        table.add_column(f"{card.name}: floor", justify="right")
        table.add_column(f"{card.name}: model, us", justify="right")
    for step in counted:
        times = []
        for card in cards:
            modelled = step.modelled(card)
            times += [f"{modelled.floor:.1f}", f"{modelled.low:.0f} - {modelled.high:.0f}"]
        table.add_row(
            step.setting,
            str(step.step.case.batch),
            str(step.step.case.num_drafts),
            step.step.who,
            str(len(step.counts)),
            f"{step.per_element:.1f}",
            f"{step.bytes / 1e6:.1f}",
            f"{step.bytes / step.floor_bytes:.2f}",
            *times,
        )
    return table
