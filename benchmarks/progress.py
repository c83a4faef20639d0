"""Progress of a run with a known plan: a bar with the time left on a terminal, one line per stage elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn


class Stages:
    """A context manager that shows where a run is.

    Args:
        console: Where to.
        plan: The name and the expected seconds of each stage.
        is_known: Whether these seconds are more than a guess. If not, the time left is told from the half on, when what
            is done says how fast this machine is.
    """

    def __init__(self, console: Console, plan: list[tuple[str, float]], is_known: bool = False) -> None:
        self._console = console
        self._is_known = is_known
        self._plan = plan
        self._number = 0
        self._elapsed = 0.0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=sum(seconds for _, seconds in plan), left="")

    def __enter__(self) -> Stages:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @contextmanager
    def next(self) -> Iterator[None]:
        """Run the next stage of the plan in this context."""
        name, _ = self._plan[self._number]
        self._started = time.monotonic()
        description = f"{name} ({self._number + 1}/{len(self._plan)})"
        self._bar.update(self._task, description=description)
        self.tick()
        if not self._console.is_terminal:
            line = ", ".join(filter(None, (description, self._left())))
            self._console.print(line, highlight=False, markup=False)
        yield
        self._elapsed += time.monotonic() - self._started
        self._number += 1

    def replan(self, plan: list[tuple[str, float]]) -> None:
        """Replace the stages after the current one by others whose seconds are known."""
        self._is_known = True
        self._plan = [*self._plan[: self._number + 1], *plan]
        self._bar.update(self._task, total=sum(seconds for _, seconds in self._plan))

    def say(self, text: str) -> None:
        """Print a message above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def tick(self) -> None:
        """Move the bar on within the current stage."""
        elapsed = min((time.monotonic() - self._started) / self._pace(), self._plan[self._number][1])
        self._bar.update(self._task, completed=self._before() + elapsed, left=self._left())

    def _before(self) -> float:
        return sum(seconds for _, seconds in self._plan[: self._number])

    def _pace(self) -> float:
        """Seconds that a second of the plan takes on this machine, as the stages so far show; 1 to begin with."""
        weight = sum(seconds for _, seconds in self._plan) / len(self._plan)
        return (self._elapsed + weight) / (self._before() + weight)

    def _left(self) -> str:
        if not self._is_known and self._before() < sum(seconds for _, seconds in self._plan) / 2:
            return ""
        now, *later = (self._pace() * seconds for _, seconds in self._plan[self._number :])
        return f"about {max(now - (time.monotonic() - self._started), 0.0) + sum(later):.0f} s left"
