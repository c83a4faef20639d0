"""Memory of a server's engine processes over a run, resident and in use, and whether it grows."""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
from pathlib import Path

import httpx

# The worker's heap was seen to grow for several minutes and to shrink now and then later.
WARM_UP = 1 / 3


class Watch:
    """Samples the memory of the processes of a server, every ``period`` seconds.

    Attributes:
        samples: (seconds, MiB) of resident memory by process name, and under ``Worker, in use`` what the C heap of the
            worker holds (``malloc_in_use.py``).
    """

    def __init__(self, group: int, url: str, period: float = 0.5) -> None:
        self.samples: dict[str, list[tuple[float, float]]] = {}
        self._group, self._url, self._period = group, url, period
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
        with httpx.Client(base_url=self._url, timeout=30) as client:
            while not self._ended.wait(self._period):
                for pid, name in processes(self._group).items():
                    self._add(name, resident_mib(pid))
                with contextlib.suppress(httpx.HTTPError):
                    self._add("Worker, in use", in_use_mib(client))

    def _add(self, name: str, mib: float | None) -> None:
        if mib is not None:
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


def in_use_mib(client: httpx.Client) -> float:
    """What the C heap of a server's one worker holds."""
    answer = client.post("/collective_rpc", json={"method": "malloc_in_use_mib"}).raise_for_status()
    [mib] = answer.json()["results"]
    return float(mib)


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
