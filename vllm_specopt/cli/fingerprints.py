"""`specopt fingerprints`: what `vllm_specopt.integration.sources` finds, as a table, sentences and diffs."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from vllm_specopt.benchmarks.errors import CliError
from vllm_specopt.integration.sources import KNOWN, examine, installed, package, sentences, version


def run(vllm: Path | None, against: Path | None) -> int:
    """Print the table, what differs and the diffs; return 0 where every part is known, else 1.

    Args:
        vllm: A vLLM's folder: the package, or what it lies in. None: the installed one, which is not imported.
        against: The folder of another vLLM, whose source the diffs start from.

    Raises:
        CliError: A folder holds no vLLM, or none is installed (exit status 2).
    """
    try:
        root = installed() if vllm is None else package(vllm)
        other = None if against is None else package(against)
    except LookupError as error:
        raise CliError(str(error), 2) from error
    parts = examine(root, other)
    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 120)
    table = Table("runner", "part", "in", "fingerprint", "", title=f"vLLM {version(root)} in {root}")
    for part in parts:
        style = "green" if part.state == KNOWN else "bold red"
        table.add_row(part.runner, part.name, part.path, part.fingerprint, f"[{style}]{part.state}[/]")
    console.print(table)
    for line in sentences(parts, root, other):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    return 0 if all(part.state == KNOWN for part in parts) else 1
