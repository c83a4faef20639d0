"""Times, launches and memory of a call, on a GPU or a CPU.

Implementations of a case take turns within each round, in alternating order, so that whatever else the machine does
falls on all of them; ratios are taken round by round. Caches are cold: before each call a buffer larger than the last
cache is overwritten, outside the timed region.

On a GPU three times are told apart. ``time_us`` is what the device takes, from event to event: a sleeping kernel goes
ahead of the first event, so that the host has queued the whole call before the device begins and the host's own time
stays out. Calls that wait for the device along the way pay for it. ``host_us`` is what the host takes to queue a call,
``wall_us`` what a lone call takes from start to result on an idle device. vLLM runs its sampler outside its CUDA
graphs, so no graphs are used here either.

On a CPU ``time_us`` is wall time, and ``cpu_us`` the processor time of all threads. On a busy machine wall times of
long calls grow more than those of short ones, which may slip through between two turns of the others: there, compare
``cpu_us``.
"""

from __future__ import annotations

import ctypes
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from vllm_specopt.benchmarks.kernels.peers import Implementation

MIN_ROUNDS = 5
WARM_UPS = 3
# Cycles per microsecond that the sleeping kernel assumes; a slower clock only makes it sleep longer.
SLEEP_CYCLES_PER_US = 2000
MAX_SLEEP_US = 20_000
CPU_CACHE_BYTES = 64 << 20


@dataclass
class Samples:
    """Microseconds per round of one implementation, and the outputs of those rounds."""

    time_us: list[float] = field(default_factory=list)
    host_us: list[float] = field(default_factory=list)
    wall_us: list[float] = field(default_factory=list)
    cpu_us: list[float] = field(default_factory=list)
    outputs: list[object] = field(default_factory=list)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cache_flusher(device: torch.device) -> torch.Tensor:
    """A buffer twice as large as the last cache: filling it leaves the cache cold."""
    size = CPU_CACHE_BYTES
    if device.type == "cuda":
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(max(size, CPU_CACHE_BYTES), dtype=torch.uint8, device=device)


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a large copy on the device, bytes read plus bytes written; the best of several."""
    size = (2 << 30) if device.type == "cuda" else (256 << 20)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(8):
        synchronize(device)
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            target.copy_(source)
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            target.copy_(source)
            seconds.append(time.perf_counter() - began)
    return 2 * size / min(seconds) / 1e9


def warm_up(implementation: Implementation, device: torch.device) -> None:
    """Run a few calls, which also compiles what is compiled on first use."""
    for number in range(WARM_UPS):
        implementation.call(number)
    synchronize(device)


def time_rounds(
    implementations: list[Implementation], device: torch.device, flusher: torch.Tensor, rounds: int, seconds: float
) -> dict[str, Samples]:
    """Time all implementations in turns.

    Args:
        rounds: How many to run; fewer, but at least MIN_ROUNDS, once ``seconds`` have passed.
    """
    samples = {implementation.name: Samples() for implementation in implementations}
    one_round = _gpu_round if device.type == "cuda" else _cpu_round
    began = time.monotonic()
    for number in range(rounds):
        for implementation in implementations[:: 1 if number % 2 == 0 else -1]:
            one_round(implementation, number, samples[implementation.name], flusher)
        if number + 1 >= MIN_ROUNDS and time.monotonic() - began > seconds:
            break
    return samples


def _cpu_round(implementation: Implementation, number: int, samples: Samples, flusher: torch.Tensor) -> None:
    flusher.fill_(number % 100)
    began, began_cpu = time.perf_counter(), time.process_time()
    output = implementation.call(number)
    samples.time_us.append((time.perf_counter() - began) * 1e6)
    samples.cpu_us.append((time.process_time() - began_cpu) * 1e6)
    samples.outputs.append(output)


def _gpu_round(implementation: Implementation, number: int, samples: Samples, flusher: torch.Tensor) -> None:
    flusher.fill_(number % 100)
    torch.cuda.synchronize()
    began = time.perf_counter()
    implementation.call(number)
    queued = time.perf_counter()
    torch.cuda.synchronize()
    samples.wall_us.append((time.perf_counter() - began) * 1e6)
    samples.host_us.append((queued - began) * 1e6)

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flusher.fill_(number % 100)
    sleep_us = min(3 * statistics.median(samples.host_us) + 50, MAX_SLEEP_US)
    torch.cuda._sleep(int(sleep_us * SLEEP_CYCLES_PER_US))
    start.record()
    output = implementation.call(number)
    end.record()
    end.synchronize()
    samples.time_us.append(start.elapsed_time(end) * 1e3)
    samples.outputs.append(output)


def count_launches(implementations: list[Implementation], device: torch.device) -> dict[str, int]:
    """Kernels, copies and fills that one call of each puts on a GPU; empty where they cannot be counted."""
    if device.type != "cuda":
        return {}
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    # One profile for all, since starting one is slow; the sleeping kernel marks where the next one begins.
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for implementation in implementations:
            torch.cuda._sleep(1000)
            implementation.call(0)
            torch.cuda.synchronize()
    counts: list[int] = []
    on_device = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    for event in sorted(on_device, key=lambda event: event.time_range.start):
        if "spin_kernel" in event.name:
            counts.append(0)
        elif counts:
            counts[-1] += 1
    if len(counts) != len(implementations):
        return {}
    return {implementation.name: count for implementation, count in zip(implementations, counts, strict=True)}


def extra_memory(implementation: Implementation, device: torch.device) -> int | None:
    """Bytes that a call takes at its peak beyond what was allocated before, results included.

    On a GPU from the caching allocator's counters. On Linux without a GPU, growth of the resident set: the allocator
    first gives back what it holds, so that a call cannot live on what earlier ones left. Elsewhere None.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = implementation.call(0)
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident_bytes("VmRSS")
        kept = implementation.call(0)
        after = _resident_bytes("VmHWM")
    except (OSError, AttributeError, ValueError):
        return None
    del kept
    return max(after - before, 0)


def _resident_bytes(entry: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) * 1024


def load_average() -> float | None:
    """The machine's load over the last minute, where it says."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
