"""Resident memory of a server's engine process over a run, and whether it grows."""

from __future__ import annotations

import statistics
import threading
import time
from pathlib import Path

# The worker's heap was seen to grow for several minutes and to shrink now and then later.
WARM_UP = 1 / 3


class Watch:
    """Samples the resident memory of the processes of a group, in MiB by process name, every ``period`` seconds."""

    def __init__(self, group: int, period: float = 0.5) -> None:
        self.samples: dict[str, list[tuple[float, float]]] = {}
        self._group, self._period = group, period
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._started = time.monotonic()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(self._period):
            for pid, name in processes(self._group).items():
                if mib := resident_mib(pid):
                    self.samples.setdefault(name, []).append((time.monotonic() - self._started, mib))


def processes(group: int) -> dict[int, str]:
    """Process ids of a process group, as ``EngineCore``, ``Worker`` (by the names vLLM gives them) or ``APIServer``."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[2]) != group:
                continue
            command = (folder / "cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError, IndexError):
            continue
        if b"resource_tracker" in b" ".join(command):
            continue
        name = next((x for x in ("EngineCore", "Worker") if x.encode() in command[0]), "APIServer")
        found[int(folder.name)] = name
    return found


def resident_mib(pid: int) -> float | None:
    """Resident memory of a process; None if it has ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return None


def trend(samples: list[tuple[float, float]]) -> dict[str, float]:
    """Medians of the second and of the last third (the first is the warm-up), and the growth between them."""
    kept = [mib for _, mib in samples[int(len(samples) * WARM_UP) :]]
    half = max(len(kept) // 2, 1)
    first, last = statistics.median(kept[:half]), statistics.median(kept[-half:])
    return {
        "samples": len(samples),
        "second_third_mib": round(first, 1),
        "last_third_mib": round(last, 1),
        "growth_mib": round(last - first, 1),
        "peak_mib": round(max(mib for _, mib in samples), 1),
    }
