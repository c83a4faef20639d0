"""One vLLM engine in this process, every workload timed in it: an arm of `specopt ab --offline`, or of the GPU run.

Usage: ``python -m vllm_specopt.benchmarks.serve.engine REQUEST.json RESULT.json``. All arms are run and timed by the
same code; only the option (and, where the request says so, the repair of one stock function) differs.
"""

from __future__ import annotations

import json
import os
import re
import resource
import sys
import time
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from vllm_specopt.benchmarks.repair import repair_expand_kernel

if TYPE_CHECKING:
    from vllm_specopt.benchmarks.serve.arms import Arm

KERNELS = ("statistics_kernel", "decide_kernel", "residual_kernel", "audit_sweep_kernel", "audit_kernel")

ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
       "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}  # fmt: skip
SPEC_DECODE = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")


def problem(arm: Arm, result: dict) -> str | None:
    """Why the result of a run is not one of its arm, if it is not."""
    ours = result["sampler"].startswith("vllm_specopt.")
    if ours != (arm.option is not None):
        return f"the arm {arm.name} ran the sampler {result['sampler']}"
    if ours := set(result.get("compiled_in_flight", ())).intersection(KERNELS):
        return f"the arm {arm.name} compiled {', '.join(sorted(ours))} while it served"
    if arm.repair and not result["expands_parameters"]:
        return f"the arm {arm.name} is not repaired: vLLM's expand_kernel still leaves its output unwritten"
    return None


def compiled_in_flight(log: str) -> list[str]:
    """Names of the kernels that vLLM's monitor saw compiled while an engine served; some of vLLM's own are normal."""
    return sorted({name.split(".")[-1] for name in re.findall(r"compilation during inference: ([\w.]*\w)", log)})


def expands_parameters() -> bool:
    """Whether vLLM's own expansion of a sampling parameter to draft tokens works in this process."""
    import torch
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    found = expand_batch_to_tokens(torch.tensor([0.5, 0.75]), torch.tensor([2, 5], dtype=torch.int32), 5)
    return found.tolist() == [0.5, 0.5, 0.75, 0.75, 0.75]


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


def timed_generate(llm, prompts: list, sampling: dict, request: dict) -> dict:
    """Warm up, generate once, and return what was measured."""
    import torch
    from vllm import SamplingParams

    def params(length: int) -> SamplingParams:
        return SamplingParams(**sampling, max_tokens=length, ignore_eos=True)

    llm.generate(prompts, params(request["warmup_len"]), use_tqdm=False)
    before = counters(llm)
    resets = reset_peak()
    device = GpuMemory() if torch.cuda.is_available() else None
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
        "drafts": drafts,
        "draft_tokens": drafted,
        "accepted_tokens": accepted,
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


def trace(llm, request: dict) -> None:
    """Generate under vLLM's own profiler, a few steps per workload; its traces go where the engine was told."""
    from vllm import SamplingParams

    for number, sampling in enumerate(request["workloads"].values()):
        llm.start_profile(f"P{number}", max_iterations=request["traced"]["steps"])
        params = SamplingParams(**sampling, max_tokens=request["traced"]["tokens"], ignore_eos=True)
        llm.generate(request["prompts"], params, use_tqdm=False)
        llm.stop_profile()


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
    workloads = {
        name: timed_generate(llm, request["prompts"], sampling, request)
        for name, sampling in request["workloads"].items()
    }
    if "traced" in request:
        trace(llm, request)
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
        "expands_parameters": expands_parameters() if on_cpu and hasattr(runner, "drafter") else None,
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "workloads": workloads,
    }
    Path(result_path).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
