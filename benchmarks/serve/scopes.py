"""Share of the model runner's time spent sampling, from the traces of vLLM's own profiler."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

# With VLLM_CUSTOM_SCOPES_FOR_PROFILING=1 the V1 model runner marks the parts of each step with these, side by side.
PREFIX = "gpu_model_runner: "
SAMPLE = "sample"


def summarise(traces: Iterable[Path]) -> dict | None:
    """Return steps, milliseconds per scope and the share of sampling, or None where the traces hold no such scope."""
    microseconds: Counter[str] = Counter()
    steps = 0
    for path in traces:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        for event in json.loads(content)["traceEvents"]:
            name = event.get("name", "")
            if event.get("ph") == "X" and isinstance(name, str) and name.startswith(PREFIX):
                scope = name.removeprefix(PREFIX)
                microseconds[scope] += event["dur"]
                steps += scope == SAMPLE
    if not steps:
        return None
    return {
        "steps": steps,
        "milliseconds": {scope: round(total / 1000, 3) for scope, total in microseconds.most_common()},
        "sampling_share": microseconds[SAMPLE] / sum(microseconds.values()),
    }
