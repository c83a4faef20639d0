"""The servers of the stress run, and their metrics: the shipped pair behind ``vllm serve`` on 127.0.0.1."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import httpx
from workload import ROOT

from vllm_specopt.benchmarks.processes import Server, free_port

HERE = Path(__file__).parent
ENV = {
    "HF_HUB_OFFLINE": "1",
    # glibc's own threshold, but fixed. It grows by default, large buffers then lie among small ones in the heap, and
    # resident memory rises for many minutes with any sampler, though no more of it is in use.
    "MALLOC_MMAP_THRESHOLD_": str(128 << 10),
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]),
    "TRITON_INTERPRET": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "3600",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_USE_V2_MODEL_RUNNER": "0",
}
MAX_NUM_SEQS = 16
# A request of the run holds up to 8 blocks of 32 tokens; 16 such requests do not fit, so some are preempted.
BLOCKS = 52
DRAFT_MODEL = {"model": str(ROOT / "models" / "specopt-draft"), "num_speculative_tokens": 4}
DRAFTING = {
    "greedy": DRAFT_MODEL,
    "probabilistic": {**DRAFT_MODEL, "draft_sample_method": "probabilistic"},
    "ngram": {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 1},
}
ARMS = ("plain", "stock", "stock-repaired", "exact")


def server(arm: str, log: Path, *, drafting: str = "greedy", dtype: str = "float32", pressed: bool = True) -> Server:
    """A server not yet started: ``plain`` decoding, or speculation verified by stock or by the drop-in.

    Args:
        arm: One of ``ARMS``.
        log: Where it logs to.
        drafting: One of ``DRAFTING``.
        dtype: Of the models.
        pressed: Whether it has too few KV cache blocks for the requests it runs at once.
    """
    port = free_port()
    if arm == "stock-repaired":
        command = [sys.executable, "-m", "vllm_specopt.benchmarks.serve.repaired"]
    else:
        command = [str(Path(sys.executable).with_name("vllm"))]
    command += ["serve", str(ROOT / "models" / "specopt-target")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "target", "--enforce-eager"]
    command += ["--worker-extension-cls", "malloc_in_use.MallocInUse"]
    command += ["--max-model-len", "256", "--max-num-seqs", str(MAX_NUM_SEQS), "--dtype", dtype, "--block-size", "32"]
    # Whole prompts: on a CPU vLLM 0.32 cannot take back a seeded request's draw at the end of a part of one.
    command += ["--max-num-batched-tokens", str(MAX_NUM_SEQS * 512)]
    if pressed:
        command += ["--num-gpu-blocks-override", str(BLOCKS)]
    if arm != "plain":
        command += ["--speculative-config", json.dumps(DRAFTING[drafting])]
    if arm == "exact":
        command += ["--additional-config", json.dumps({"specopt": {"method": "exact"}})]
    return Server(command, log, ENV, port)


def metrics(url: str) -> dict[str, float]:
    """Sums over their labels of vLLM's metrics, by name without ``vllm:``."""
    found: dict[str, float] = {}
    for line in httpx.get(f"{url}/metrics", timeout=30).text.splitlines():
        if line.startswith("vllm:"):
            name = line.removeprefix("vllm:").split("{")[0]
            found[name] = found.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
    return found
