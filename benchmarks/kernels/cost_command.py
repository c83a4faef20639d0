"""`specopt cost`: progress and tables around the counts of machine code; nothing here counts."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vllm_specopt.benchmarks import tables
from vllm_specopt.benchmarks.errors import CliError

KERNEL_HEADINGS = ("setting", "who", "kernel", "programs", "registers", "warps/SM", "spilled", "shared",
                   "instr./element", "MB", "pipes")  # fmt: skip
STEP_HEADINGS = ("setting", "B", "K", "who", "launches", "instr./element", "MB", "x floor")


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
    for line in (*_audits(counted), *sorted(_lower_bounds(counted))):
        console.print(line, highlight=False)
    found = budgets.violations(step for step in counted if step.step.who == cost.OURS)
    for line in found:
        console.print(f"over budget: {line}", style="red", highlight=False)
    return 1 if found else 0


def _lower_bounds(counted: list) -> set[str]:
    """What to say of kernels whose loads were not all found."""
    from vllm_specopt.benchmarks.kernels.counting import LOADS_FOUND

    return {
        f"sm_{step.architecture}, {step.step.who}'s {count.kernel}, {step.setting}: at least so many instructions; "
        f"those counted load {100 * count.loads_found:.0f} % of the bytes"
        for step in counted
        for count in step.counts
        if count.loads_found < LOADS_FOUND
    }


def _audits(counted: list) -> list[str]:
    """What audits add to the modelled time of their verification."""
    from vllm_specopt.benchmarks.kernels.cost_model import CARDS

    lines = []
    for step in counted:
        for card in CARDS if step.step.audit else ():
            if card.architecture == step.architecture:
                where = f"{step.setting}, B = {step.step.case.batch}, K = {step.step.case.num_drafts}"
                share = step.audit_share(card)
                lines.append(
                    f"{card.name}, {where}: {share:.1%} more than the verification; of a tenth {share / 10:.1%}"
                )
    return lines


def _kernels(counted: list, architecture: int) -> Table:
    from vllm_specopt.benchmarks.kernels.cost import MORE

    cells = []
    for step in counted:
        if (step.step.case.batch, step.step.case.num_drafts) != MORE:
            continue
        for count in step.counts:
            most = sorted(count.pipes.items(), key=lambda item: -item[1])[:4]
            total = count.warp_instructions or 1.0
            own = [f"{count.programs:,}", *map(str, (count.registers, count.warps, count.spilled, count.shared))]
            own.append(f"{count.warp_instructions * 32 / step.elements:.2f}")
            cells.append((
                step.setting, step.step.who, count.kernel, *(own if count.num_warps else [""] * len(own)),
                f"{count.bytes / 1e6:.1f}", " ".join(f"{name} {100 * number / total:.0f}%" for name, number in most),
            ))  # fmt: skip
    title = f"sm_{architecture}: kernels, B = {MORE[0]}, K = {MORE[1]}"
    return tables.terminal(title, KERNEL_HEADINGS, cells, KERNEL_HEADINGS[:3])


def _steps(counted: list, architecture: int) -> Table:
    from vllm_specopt.benchmarks.kernels.cost_model import CARDS

    cards = [card for card in CARDS if card.architecture == architecture]
    cells = []
    for step in counted:
        modelled = [step.modelled(card) for card in cards]
        cells.append((
            step.setting, str(step.step.case.batch), str(step.step.case.num_drafts), step.step.who,
            str(len(step.counts)), f"{step.per_element:.1f}", f"{step.bytes / 1e6:.1f}",
            f"{step.bytes / step.floor_bytes:.2f}",
            *(text for each in modelled for text in (f"{each.floor:.1f}", f"{each.low:.0f} - {each.high:.0f}")),
        ))  # fmt: skip
    headings = [*STEP_HEADINGS, *(f"{card.name}: {what}" for card in cards for what in ("floor", "model, us"))]
    title = f"sm_{architecture}: steps; times are a model, not a measurement"
    return tables.terminal(title, headings, cells, STEP_HEADINGS[:4])
