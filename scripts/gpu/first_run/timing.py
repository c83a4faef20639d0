"""Device time of a call on a cold cache, and of each of our kernels in it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from first_run.places import REHEARSE, STANDIN
from vllm_specopt.benchmarks.serve.engine import KERNELS

WARM_UPS, ROUNDS = 3, 20
# About 1 ms: the host queues the call meanwhile, also a slow one that takes 0.5 ms for it.
SLEEP_CYCLES = 2_000_000


def device() -> torch.device:
    """Where the run computes."""
    return torch.device("cpu" if REHEARSE else "cuda")


def timed(call: Callable[[int], object], flusher: torch.Tensor) -> dict[str, float]:
    """Microseconds of a call: median, 20th and 80th percentile. ``call`` gets the number of the round."""
    if flusher.device.type != "cuda":
        call(0)
        began = time.perf_counter()
        call(1)
        taken = round((time.perf_counter() - began) * 1e6, 1)
        return {"us": taken, "p20_us": taken, "p80_us": taken}
    for number in range(WARM_UPS):
        call(number)
    times = []
    for number in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flusher.fill_(number)
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        call(number)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    times.sort()
    low, high = times[ROUNDS // 5], times[-1 - ROUNDS // 5]
    return {"us": round(statistics.median(times), 2), "p20_us": round(low, 2), "p80_us": round(high, 2)}


def kernel_times(call: Callable[[int], object], flusher: torch.Tensor) -> dict[str, float]:
    """Mean microseconds of each of our kernels in a call, by PyTorch's profiler; empty where it has none to watch."""
    if flusher.device.type != "cuda" or STANDIN:
        return {}
    from torch.profiler import ProfilerActivity, profile

    call(0)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for number in range(5):
            flusher.fill_(number)
            call(number)
        torch.cuda.synchronize()
    events = {event.key: event for event in profiler.key_averages()}
    return {name: round(events[name].device_time_total / events[name].count, 2) for name in KERNELS if name in events}
