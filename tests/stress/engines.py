"""Run plain and speculating V1 engines in this process, one after another, and write down what they emitted.

Usage: ``python engines.py REQUEST.json RESULT.json``. The request lists engines, each with the keyword arguments of
``LLM`` and batches. A batch has prompts (text, or lists of token ids) and sampling parameters (one dict, or a list of
one per prompt); with ``abort_after`` it is stepped that often, all its requests are aborted in one call, and the result
is how many are unfinished after the next step.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path


def main(request_path: str, result_path: str) -> None:
    """Run the request."""
    from vllm import LLM

    with open(request_path) as file:
        engines = json.load(file)
    results = {}
    for engine in engines:
        # A CPU worker of vLLM 0.32 stumbles over this module, which numba loads; see tests/engine/run_engines.py.
        sys.modules.pop("llvmlite.binding.ffi", None)
        started = time.perf_counter()
        llm = LLM(**engine["llm"])
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        sampler, steps = getattr(runner, "rejection_sampler", None), []
        if sampler is not None:
            record_drafts(sampler, steps)
        result = results[engine["name"]] = {"sampler": type(sampler).__module__} | {
            name: {} for name in ("batches", "drafts", "preemptions")
        }
        for batch in engine["batches"]:
            steps.clear()
            preempted = counter(llm, "vllm:num_preemptions")
            run = aborted if "abort_after" in batch else generated
            result["batches"][batch["name"]] = run(llm, batch)
            print(f"{time.perf_counter() - started:.0f} s: {engine['name']}, {batch['name']}", flush=True)
            result["preemptions"][batch["name"]] = counter(llm, "vllm:num_preemptions") - preempted
            result["drafts"][batch["name"]] = [list(kind) for kind in sorted(set(map(tuple, steps)))]
        del llm, runner, sampler
        gc.collect()
    with open(result_path, "w") as file:
        json.dump(results, file)


def generated(llm, batch: dict) -> list[dict]:
    """Token ids and log probabilities of the emitted tokens, request by request."""
    outputs = llm.generate(_prompts(batch), _params(batch), use_tqdm=False)
    return [
        {
            "token_ids": list(output.outputs[0].token_ids),
            "logprobs": output.outputs[0].logprobs
            and [
                at[token].logprob
                for at, token in zip(output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True)
            ],
        }
        for output in outputs
    ]


def aborted(llm, batch: dict) -> int:
    """Abort every request of a batch at once, after some steps; return how many are left after the next one."""
    engine, params = llm.llm_engine, _params(batch)
    names = []
    for index, prompt in enumerate(_prompts(batch)):
        asked = params[index] if isinstance(params, list) else params
        names.append(engine.add_request(f"abort-{index}", prompt, asked) or f"abort-{index}")
    finished = [output for _ in range(batch["abort_after"]) for output in engine.step() if output.finished]
    assert not finished, "requests ended before they were aborted, so this shows nothing"
    engine.abort_request(names, internal=True)
    engine.step()
    return engine.get_num_unfinished_requests() + len(
        llm.llm_engine.model_executor.driver_worker.worker.model_runner.requests
    )


def record_drafts(sampler, steps: list) -> None:
    """Note, step by step, the least and the greatest number of draft tokens among the requests."""
    original = sampler.forward

    def forward(metadata, *args, **kwargs):
        steps.append((min(metadata.num_draft_tokens), max(metadata.num_draft_tokens)))
        return original(metadata, *args, **kwargs)

    sampler.forward = forward


def counter(llm, name: str) -> int:
    """One of vLLM's counters; 0 if this engine keeps no statistics."""
    if not llm.llm_engine.log_stats:
        return 0
    return sum(int(metric.value) for metric in llm.get_metrics() if metric.name == name)


def _prompts(batch: dict) -> list:
    return [{"prompt_token_ids": prompt} if isinstance(prompt, list) else prompt for prompt in batch["prompts"]]


def _params(batch: dict):
    from vllm import SamplingParams

    params = batch["sampling"]
    return [SamplingParams(**p) for p in params] if isinstance(params, list) else SamplingParams(**params)


def start(engines: list[dict], folder: Path) -> dict:
    """Run engines in a process of their own and return the results by engine name."""
    (folder / "request.json").write_text(json.dumps(engines))
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from support import prepared

    status, log = prepared.run("V1", __file__, "request.json", "result.json", cwd=folder)
    assert status == 0, log[-4000:]
    return json.loads((folder / "result.json").read_text())


if __name__ == "__main__":
    main(*sys.argv[1:])
