"""Run vLLM engines with and without Ray's executor in this process and write down what they emitted.

Usage: ``python ray_engine.py REQUEST.json RESULT.json``. The request has ``nodes``, each the number of logical GPUs of
one local Ray node, ``batches`` by name (prompts, one dict of sampling parameters per prompt) and ``engines`` (name,
keyword arguments of ``LLM``). The result holds, per engine, what each worker says about itself and the token ids.
"""

import gc
import json
import sys

from ray.util import remove_placement_group
from ray_cluster import local_cluster


def allow_ray_on_cpu() -> None:
    """Let vLLM's CPU platform run in Ray workers that hold a logical GPU; vLLM itself refuses Ray without a GPU."""
    from vllm.platforms import current_platform

    current_platform.ray_device_key = "GPU"


def describe(worker) -> dict:
    """Return what one worker runs with: its process, Ray node, rank and sampler."""
    import os

    import ray

    sampler = getattr(worker.model_runner, "rejection_sampler", None)
    in_ray = ray.is_initialized() and ray.get_runtime_context().worker.mode == ray.WORKER_MODE
    return {
        "pid": os.getpid(),
        "rank": worker.rank,
        "node": ray.get_runtime_context().get_node_id() if in_ray else None,
        "sampler": sampler and f"{type(sampler).__module__}.{type(sampler).__qualname__}",
        "additional_config": worker.vllm_config.additional_config,
    }


def run(engine: dict, batches: dict) -> dict:
    """Start one engine, generate every batch, stop it."""
    from vllm import LLM, SamplingParams

    # See tests/engine/run_engines.py: vLLM's CPU worker stumbles over this module once numba has run.
    sys.modules.pop("llvmlite.binding.ffi", None)
    llm = LLM(**engine["llm"])
    found = {"executor": type(llm.llm_engine.model_executor).__name__, "batches": {}}
    for name, (prompts, sampling) in batches.items():
        outputs = llm.generate(prompts, [SamplingParams(**each) for each in sampling], use_tqdm=False)
        found["batches"][name] = [list(output.outputs[0].token_ids) for output in outputs]
    found["workers"] = llm.collective_rpc(describe)
    group = llm.llm_engine.vllm_config.parallel_config.placement_group
    llm.llm_engine.engine_core.shutdown()
    del llm
    gc.collect()
    if group is not None:
        # vLLM keeps its devices until Ray is shut down, and the next engine needs them.
        remove_placement_group(group)
    return found


def main(request_path: str, result_path: str) -> None:
    """Run the request; the engines that use Ray share one local cluster."""
    with open(request_path) as file:
        request = json.load(file)
    allow_ray_on_cpu()
    with local_cluster(request["nodes"], allow_ray_on_cpu) as worker_log:
        results = {engine["name"]: run(engine, request["batches"]) for engine in request["engines"]}
        results["worker log"] = worker_log()
    with open(result_path, "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
