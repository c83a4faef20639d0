"""One run of the engine benchmark: one vLLM engine in this process, every workload timed in it.

Usage: ``python engine.py REQUEST.json RESULT.json``, started by ``engine_ab.py``. All arms are run and timed by the
same code; only the option (and, where the request says so, the repair of one stock function) differs.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import zlib
from collections import defaultdict
from pathlib import Path

ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
       "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # fmt: skip
SPEC_DECODE = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")


class Timers:
    """Seconds and calls by label. A call within another of the same label is part of it."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget what was timed so far."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: defaultdict[str, int] = defaultdict(int)
        self._depth: defaultdict[str, int] = defaultdict(int)

    def wrap(self, owner: object, name: str, label: str) -> None:
        """Time every call of an attribute of an object or class."""
        original = getattr(owner, name)

        def timed(*args, **kwargs):
            self._depth[label] += 1
            started = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self._depth[label] -= 1
                if not self._depth[label]:
                    self.seconds[label] += time.perf_counter() - started
                    self.calls[label] += 1

        setattr(owner, name, timed)


def repair_expand_kernel() -> None:
    """Replace the function that on a CPU leaves the expanded temperature, top-k and top-p unwritten."""
    import torch
    from vllm.utils import cpu_triton_utils

    def expand(output, input_val, cu_num_tokens, replace_from, replace_to, MAX_NUM_TOKENS=None):
        counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
        values = torch.where(input_val == replace_from, torch.full_like(input_val, replace_to), input_val)
        output.copy_(values.repeat_interleave(counts.long(), output_size=output.shape[0]))

    cpu_triton_utils._expand_kernel_impl = expand


def expands_parameters() -> bool:
    """Whether vLLM's own expansion of a sampling parameter to draft tokens works in this process."""
    import torch
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    found = expand_batch_to_tokens(torch.tensor([0.5, 0.75]), torch.tensor([2, 5], dtype=torch.int32), 5)
    return found.tolist() == [0.5, 0.5, 0.75, 0.75, 0.75]


def time_parts(runner, timers: Timers) -> None:
    """Time the parts of model runner V1's step. The samplers' classes are wrapped, as both are called through them."""
    for sampler in {type(runner.sampler), type(runner.rejection_sampler)}:
        timers.wrap(sampler, "__call__", "sampler")
    timers.wrap(runner, "execute_model", "target")
    timers.wrap(runner.model, "compute_logits", "target LM head")
    timers.wrap(runner.drafter, "propose", "drafting")
    if hasattr(runner.drafter, "model"):
        timers.wrap(runner.drafter.model, "compute_logits", "draft LM head")
        timers.wrap(runner.drafter, "_sample_draft_tokens", "draft LM head and sampling")


def reset_peak() -> bool:
    """Let the kernel count this process's peak memory anew; return whether it does."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_mib() -> float:
    """Return the peak resident memory since the last reset that worked."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) / 1024, 1)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


class GpuMemory:
    """The GPU memory that PyTorch hands out above what is held now: weights and KV cache are in place."""

    def __init__(self) -> None:
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        self._held = torch.cuda.memory_allocated()

    def above(self) -> float:
        """Return the peak since then, in MiB."""
        import torch

        return round((torch.cuda.max_memory_allocated() - self._held) / 2**20, 1)


def counters(llm) -> dict[str, int]:
    """Return vLLM's counts of drafts, draft tokens and accepted tokens so far; 0 in an engine without speculation."""
    found = {metric.name: metric.value for metric in llm.get_metrics() if hasattr(metric, "value")}
    return {name: found.get(f"vllm:spec_decode_{name}", 0) for name in SPEC_DECODE}


def timed_generate(llm, prompts: list[str], sampling: dict, request: dict, timers: Timers | None) -> dict:
    """Warm up, generate once, and return what was measured."""
    import torch
    from vllm import SamplingParams

    def params(length: int) -> SamplingParams:
        return SamplingParams(**sampling, max_tokens=length, ignore_eos=True)

    llm.generate(prompts, params(request["warmup_len"]), use_tqdm=False)
    before = counters(llm)
    resets = reset_peak()
    device = GpuMemory() if torch.cuda.is_available() else None
    if timers:
        timers.reset()
    started, cpu_started = time.perf_counter(), time.process_time()
    outputs = llm.generate(prompts, params(request["output_len"]), use_tqdm=False)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    drafts, drafted, accepted = (after - before[name] for name, after in counters(llm).items())
    token_ids = [list(output.outputs[0].token_ids) for output in outputs]
    kept = {"token_ids": token_ids} if request.get("keep_token_ids") else {}
    return kept | {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens": sum(map(len, token_ids)),
        "tail_tokens": sum(token >= request["original_vocab_size"] for ids in token_ids for token in ids),
        "drafts": drafts,
        "draft_tokens": drafted,
        "accepted_tokens": accepted,
        "steps": timers.calls["target"] if timers else None,
        "parts": dict(timers.seconds) if timers else None,
        "peak_mib": peak_mib(),
        "peak_is_of_workload": resets,
        "gpu_peak_mib": device and device.above(),
        "digests": [zlib.crc32(repr(ids).encode()) for ids in token_ids],
    }


def gpu_kernels(llm, prompts: list[str], sampling: dict, length: int) -> dict:
    """Generate under PyTorch's profiler; GPU time and calls by kernel, and the drafts that were verified meanwhile."""
    import torch
    from torch.profiler import ProfilerActivity, profile
    from vllm import SamplingParams

    before = counters(llm)
    try:
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            llm.generate(prompts, SamplingParams(**sampling, max_tokens=length, ignore_eos=True), use_tqdm=False)
            torch.cuda.synchronize()
        events = [(event.self_device_time_total, event.count, event.key[:100]) for event in found.key_averages()]
    except Exception as error:  # A host without the profiler's library still has its times.
        return {"problem": repr(error)[:300]}
    kernels = [
        {"name": name, "calls": calls, "us": round(us, 1)} for us, calls, name in sorted(events, reverse=True) if us > 0
    ]
    return {"drafts": counters(llm)["num_drafts"] - before["num_drafts"], "kernels": kernels}


def main(request_path: str, result_path: str) -> None:
    """Build the engine of the request, run its workloads, write the result."""
    request = json.loads(Path(request_path).read_text())
    if request["repair"]:
        repair_expand_kernel()
    import torch
    from vllm import LLM

    started = time.perf_counter()
    llm = LLM(**request["llm"])
    loaded = time.perf_counter() - started
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    # An engine that does not speculate has one sampler only.
    sampler = getattr(runner, "rejection_sampler", None) or runner.sampler
    on_cpu = runner.device.type == "cpu"
    # On a GPU the host runs ahead of the device, so that host time does not tell what a step spends.
    timers = Timers() if on_cpu and hasattr(runner, "drafter") else None
    if timers:
        time_parts(runner, timers)
    workloads = {
        name: timed_generate(llm, request["prompts"], sampling, request, timers)
        for name, sampling in request["workloads"].items()
    }
    profiled = {
        name: gpu_kernels(llm, request["prompts"], request["workloads"][name], request["profiled_len"])
        for name in request.get("profiled", ())
    }
    config = llm.llm_engine.vllm_config
    result = {
        "gpu_kernels": profiled,
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "cudagraph_mode": getattr(config.compilation_config.cudagraph_mode, "name", None),
        "engine_seconds": round(loaded, 1),
        "sampler": f"{type(sampler).__module__}.{type(sampler).__qualname__}",
        "expands_parameters": expands_parameters() if timers else None,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "workloads": workloads,
    }
    Path(result_path).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
