"""`specopt audit`: judges what a server's audit has counted; the server runs, or is started and driven."""

from __future__ import annotations

import re
import time

from rich.console import Console
from rich.text import Text

from vllm_specopt.benchmarks.errors import CliError
from vllm_specopt.benchmarks.serve.audit import Counts, drive, read
from vllm_specopt.evidence import ALARM, BINS, Verdict, judge

BARS = " ▁▂▃▄▅▆▇█"
FOLLOW_SECONDS = 5.0
ENOUGH = 1000
"""Audited tokens below which there is no verdict yet."""


def run(
    target: str, follow: bool, tokens: int, speculative_config: str | None, additional_config: str | None, port: int
) -> int:
    """Run `specopt audit` and return its exit status; raise CliError for bad input (2) or a failed run (1)."""
    if target.startswith(("http://", "https://")):
        if speculative_config is not None or additional_config is not None:
            raise CliError("a URL is of a server that runs already: leave its configurations out.", 2)
        return watch(target.rstrip("/"), follow)
    if re.fullmatch(r"[\w.-]+:\d+(/.*)?", target):
        raise CliError(f"{target} is no model: if it is a running server, begin it with http://.", 2)
    if follow:
        raise CliError("--follow goes with the URL of a running server.", 2)
    console = Console()
    with console.status("starting the server") as status:
        found = drive(
            target, tokens, speculative_config, additional_config, port,
            tick=lambda emitted: status.update(f"{emitted:,} of {tokens:,} tokens"),
        )  # fmt: skip
    show(console, found)
    return exit_code(found)


def watch(url: str, follow: bool) -> int:
    """Print a running server's verdict, with ``follow`` again and again until interrupted."""
    console = Console()
    while True:
        verdicts = read(url)
        show(console, verdicts)
        if not follow:
            return exit_code(verdicts)
        try:
            time.sleep(FOLLOW_SECONDS)
        except KeyboardInterrupt:
            return exit_code(verdicts)


def show(console: Console, found: Counts) -> None:
    """Print the verdicts."""
    for (model, engine, method), counts in found.items():
        verdict = judge(*counts)
        console.print(
            Text(f"{model}, engine {engine}, method {method}: {sentence(verdict)}", style=style(verdict)),
            soft_wrap=True,
        )
        if verdict.largest is not None:
            largest = verdict.largest
            console.print(
                Text(f"  |{picture(counts.all)}| share of tokens by bin, half the height being 1/{BINS}"),
                soft_wrap=True,
            )
            console.print(
                Text(
                    f"  {verdict.tokens:,} tokens, evidence 10^{verdict.log10_evidence:.1f}, bias at most "
                    f"{100 * verdict.bias:.2g} %; bin {largest.index} deviates most, by {100 * largest.deviation:+.2f} "
                    f"({100 * largest.low:+.2f} to {100 * largest.high:+.2f}) points"
                ),
                soft_wrap=True,
            )
        if verdict.impossible or verdict.skipped:
            console.print(Text(f"  {verdict.impossible:,} impossible tokens, {verdict.skipped:,} tokens not audited"))


def sentence(verdict: Verdict) -> str:
    """What a verdict says."""
    if verdict.is_lossy:
        return "LOSSY: the output does not follow the target's distribution"
    if verdict.tokens < ENOUGH:
        return f"no verdict yet: fewer than {ENOUGH} tokens"
    if verdict.log10_evidence > 1:
        return f"watch it: the evidence is between 10 and {ALARM:.0e}"
    return "no sign of loss"


def style(verdict: Verdict) -> str:
    """Colour of a verdict."""
    return "red" if verdict.is_lossy else "yellow" if "no sign" not in sentence(verdict) else "green"


def picture(counts: list[int]) -> str:
    """A bar for each bin; half as high as they can be where all is well."""
    total = sum(counts[:BINS]) or 1
    heights = (round(count / total * BINS * (len(BARS) - 1) / 2) for count in counts[:BINS])
    return "".join(BARS[min(height, len(BARS) - 1)] for height in heights)


def exit_code(found: Counts) -> int:
    """1 if any method is lossy, or there is no verdict at all."""
    verdicts = [judge(*counts) for counts in found.values()]
    return int(any(each.is_lossy for each in verdicts) or all(each.tokens < ENOUGH for each in verdicts))
