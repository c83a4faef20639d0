"""Share of the model runner's time spent sampling, from the traces of vLLM's own profiler."""

from __future__ import annotations

import gzip
import json
import statistics
from collections.abc import Iterable
from pathlib import Path

# With VLLM_CUSTOM_SCOPES_FOR_PROFILING=1 the V1 model runner marks the parts of each step with these, side by side.
PREFIX = "gpu_model_runner: "
SAMPLE = "sample"


def summarise(traces: Iterable[Path]) -> dict | None:
    """Return steps, milliseconds per scope and the share of sampling, or None where the traces hold no such scope.

    Milliseconds are those of so many median steps: among a few steps, one that the machine interrupts outweighs what
    sampling takes in all of them.
    """
    microseconds: dict[str, list[float]] = {}
    for path in traces:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for event in json.loads(content)["traceEvents"]:
            name = event.get("name", "")
            if event.get("ph") == "X" and isinstance(name, str) and name.startswith(PREFIX):
                microseconds.setdefault(name.removeprefix(PREFIX), []).append(event["dur"])
    steps = len(microseconds.get(SAMPLE, ()))
    if not steps:
        return None
    medians = {scope: statistics.median(found) for scope, found in microseconds.items()}
    ordered = sorted(medians.items(), key=lambda pair: -pair[1])
    return {
        "steps": steps,
        "milliseconds": {scope: round(steps * median / 1000, 3) for scope, median in ordered},
        "sampling_share": medians[SAMPLE] / sum(medians.values()),
    }
