"""Run vLLM engines one after another in this process and write down what they emitted.

Usage: ``python run_engines.py REQUEST.json RESULT.json``. The request lists engines; each has the keyword arguments of
``LLM`` and batches of (prompts, sampling parameters). The result holds, per engine, its samplers' classes, how often
the stock verification ran, and per batch the token ids and log probabilities. With ``"warm_up": ROWS`` the engine
warms up first and verifies in chunks of at most that many rows; then the result holds what it launched that it had not
before. With statistics switched on it holds the number of preemptions, together and per batch, and per batch the steps
that verified drafts and the draft tokens that they accepted, together and by their place among the drafts.
A batch with ``"abort_after"`` is stepped that often, all its requests are aborted in one call, and its result is how
many are unfinished after the next step. ``"drafts": true`` keeps V1's least and greatest number of drafts of each step.
With ``"reference": true`` each verification is done by the reference too, on the engine's own logits, drafts and seeds.
Engines that audit leave their counts.
"""

import contextlib
import gc
import json
import re
import sys
from collections import Counter
from pathlib import Path


def main(request_path: str, result_path: str) -> None:
    """Run the request; a batch's sampling parameters are one dict for all prompts or a list of one per prompt."""
    from vllm import LLM, SamplingParams

    with open(request_path) as file:
        engines = json.load(file)
    calls = count_stock_calls()
    results = {}
    for engine in engines:
        print(f"engine {engine['name']}", file=sys.stderr, flush=True)
        calls.clear()
        # A CPU worker of vLLM 0.32 looks into every loaded module and stumbles over this one, which numba loads: no
        # engine would start in a process that has run ngram drafting or our CPU backend.
        sys.modules.pop("llvmlite.binding.ffi", None)
        llm = LLM(**engine["llm"])
        runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
        # With drafts, and without; an engine that does not speculate has no other.
        samplers = getattr(runner, "rejection_sampler", None) or runner.sampler, runner.sampler
        names = [f"{type(sampler).__module__}.{type(sampler).__qualname__}" for sampler in samplers]
        result = {"sampler": names[0], "plain_sampler": names[1], "batches": {}}
        counted = not engine["llm"].get("disable_log_stats", True)
        for batch in engine["batches"]:
            params = batch["sampling"]
            for given in params if isinstance(params, list) else [params]:
                # JSON has no integer keys.
                if bias := given.get("logit_bias"):
                    given["logit_bias"] = {int(token): value for token, value in bias.items()}
            params = [SamplingParams(**p) for p in params] if isinstance(params, list) else SamplingParams(**params)
            prompts = [{"prompt_token_ids": p} if isinstance(p, list) else p for p in batch["prompts"]]
            if "abort_after" in batch:
                result["batches"][batch["name"]] = aborted(llm, runner, prompts, params, batch["abort_after"])
                continue
            before = speculation(llm) if counted else {}
            with contextlib.ExitStack() as stack:
                if "warm_up" in engine:
                    stack.enter_context(watched_launches(runner, result, engine))
                if "reference" in engine:
                    stack.enter_context(compared_with_reference(result))
                if "drafts" in engine:
                    stack.enter_context(recorded_drafts(runner, result, batch["name"]))
                outputs = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
            result["batches"][batch["name"]] = {
                "token_ids": [list(output.token_ids) for output in outputs],
                "logprobs": [
                    output.logprobs and [{k: v.logprob for k, v in at.items()} for at in output.logprobs]
                    for output in outputs
                ],
            }
            if counted:
                after = speculation(llm)
                counts = {name: [b - a for a, b in zip(before[name], after[name], strict=True)] for name in after}
                drafts, accepted = counts["drafts"][0], counts["accepted_by_position"]
                counted_here = {"drafts": drafts, "accepted": sum(accepted), "accepted_by_position": accepted,
                                "preemptions": counts["preemptions"][0]}  # fmt: skip
                result["batches"][batch["name"]] |= counted_here
        result["stock_calls"] = dict(calls)
        auditor = getattr(getattr(runner.sampler, "account", None), "auditor", None)
        if auditor is not None:
            result["audit"] = auditor.counts.sum(0).tolist()
        if counted:
            result["preemptions"] = speculation(llm)["preemptions"][0]
        results[engine["name"]] = result
        del llm, runner, samplers
        gc.collect()
    with open(result_path, "w") as file:
        json.dump(results, file, default=len)


def speculation(llm) -> dict[str, list[int]]:
    """How many steps of requests verified drafts so far, how many accepted the first draft token, the second ...

    And how often a request was preempted.
    """
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    found = {"drafts": [0], "accepted_by_position": [], "preemptions": [metrics["vllm:num_preemptions"].value]}
    if "vllm:spec_decode_num_drafts" in metrics:
        found["drafts"] = [metrics["vllm:spec_decode_num_drafts"].value]
        found["accepted_by_position"] = list(metrics["vllm:spec_decode_num_accepted_tokens_per_pos"].values)
    return found


def aborted(llm, runner, prompts: list, params, steps: int) -> int:
    """Abort every request of a batch at once, after some steps; return how many are left after the next one."""
    engine, names = llm.llm_engine, []
    for index, prompt in enumerate(prompts):
        asked = params[index] if isinstance(params, list) else params
        names.append(engine.add_request(f"abort-{index}", prompt, asked) or f"abort-{index}")
    finished = [output for _ in range(steps) for output in engine.step() if output.finished]
    assert not finished, "requests ended before they were aborted, so this shows nothing"
    engine.abort_request(names, internal=True)
    engine.step()
    return engine.get_num_unfinished_requests() + len(runner.requests)


@contextlib.contextmanager
def recorded_drafts(runner, result: dict, batch: str):
    """Add to the result which least and greatest numbers of draft tokens a step within the block had."""
    sampler, steps = runner.rejection_sampler, set()
    original = sampler.forward

    def forward(metadata, *args, **kwargs):
        steps.add((min(metadata.num_draft_tokens), max(metadata.num_draft_tokens)))
        return original(metadata, *args, **kwargs)

    sampler.forward = forward
    yield
    sampler.forward = original
    result.setdefault("drafts", {})[batch] = sorted(steps)


@contextlib.contextmanager
def watched_launches(runner, result: dict, engine: dict):
    """Warm a V2 runner up, if that is not done, and add what it launches within the block to the engine's result."""
    from support.launch_keys import recorded, unexpected
    from vllm.v1.worker.gpu.spec_decode import rejection_sampler as stock

    from vllm_specopt.integration.warm_up import warm_up

    if "launches" not in result:
        stock.MAX_CHUNK_BYTES = engine["warm_up"] * runner.vocab_size * 4
        with recorded() as warmed:
            warm_up(runner)
        result["launches"] = {"warmed": warmed, "served": set()}
    with recorded() as served:
        yield
    launches = result["launches"]
    launches["served"] |= served
    launches["unexpected"] = unexpected(launches["served"], launches["warmed"])


@contextlib.contextmanager
def compared_with_reference(result: dict):
    """Add to the result how many requests' tokens V2 verified within the block, and how many the reference differs on.

    ``close``: requests that the reference calls too close to tell. ``accepted`` and ``recovered`` tokens, ``bonus``.
    """
    from vllm_specopt import testing
    from vllm_specopt.integration import v2
    from vllm_specopt.kernels.reference import verify_ref

    found = result.setdefault(
        "reference", dict.fromkeys(("requests", "sampled", "close", "differ", "accepted", "recovered", "bonus"), 0)
    )
    verify = v2.verify

    def compared(*args, **kwargs):
        verified = verify(*args, **kwargs)
        for name in ("bad_row_counter", "counters", "backend", "notes"):
            kwargs.pop(name)
        reference = verify_ref(*args, **kwargs)
        drafted = args[1].diff() - 1
        for request, margin in enumerate(reference.margin):
            accepted = int(verified.num_sampled[request]) - 1
            found["requests"] += 1
            found["sampled"] += kwargs["temperature"] is not None
            found["close"] += margin < testing.MARGIN
            same = verified.token_ids[request].tolist() == reference.token_ids[request].tolist()
            found["differ"] += margin >= testing.MARGIN and not same
            found["accepted"] += accepted
            found["bonus" if accepted == drafted[request] else "recovered"] += 1
        return verified

    v2.verify = compared
    try:
        yield
    finally:
        v2.verify = verify


def start(engines: list[dict], folder: Path, runner: str, **env: str) -> tuple[dict, dict]:
    """Run engines on model runner ``V1`` or ``V2`` in a process of their own, ``env`` added to its environment.

    Returns:
        The results, and what was logged, both by engine name.
    """
    from support import prepared

    (folder / "request.json").write_text(json.dumps(engines))
    status, log = prepared.run(runner, __file__, "request.json", "result.json", cwd=folder, env=env)
    assert status == 0, log[-4000:]
    parts = re.split(r"^engine (.*)$", log, flags=re.MULTILINE)
    return json.loads((folder / "result.json").read_text()), dict(zip(parts[1::2], parts[2::2], strict=True))


def count_stock_calls() -> Counter:
    """Count the stock classes' verifications, in either runner; our classes call them only to fall back."""
    calls: Counter[str] = Counter()

    def counted(owner, name):
        original = getattr(owner, name)

        def call(self, *args, **kwargs):
            calls[f"{owner.__module__}.{name}"] += 1
            return original(self, *args, **kwargs)

        setattr(owner, name, call)

    from vllm.triton_utils import HAS_TRITON
    from vllm.v1.sample.rejection_sampler import RejectionSampler

    counted(RejectionSampler, "forward")
    if HAS_TRITON:
        from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler as RejectionSamplerV2

        counted(RejectionSamplerV2, "_verify")
    return calls


if __name__ == "__main__":
    main(*sys.argv[1:])
