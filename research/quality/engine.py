"""One arm of the quality benchmark: one vLLM engine in this process writes all texts of all seeds.

Usage: ``python engine.py REQUEST.json RESULT.json``, started by ``python -m research.quality``. With ``"score"`` in the
request the engine writes nothing and tells instead what log probabilities it gives to texts that are there.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from vllm_specopt.benchmarks.serve.engine import counters

WARMUP_ITEMS, WARMUP_LEN = 8, 8
SEED_STRIDE = 1_000_003


def request_seed(seed: int, line: int) -> int:
    """The seed of a line's request in a run; no two requests share one."""
    return seed * SEED_STRIDE + line


def params(request: dict, temperature: float, seed: int) -> list:
    """Sampling parameters of every item."""
    from vllm import SamplingParams

    common = {"temperature": temperature, "max_tokens": request["max_tokens"], "stop": request["stop"]}
    return [SamplingParams(**common, seed=request_seed(seed, line)) for line in range(len(request["prompts"]))]


def measure(llm, request: dict, temperature: float, seed: int) -> dict:
    """Write one text per item, timed, and count what speculation did."""
    speculates = "speculative_config" in request["llm"]
    chosen = params(request, temperature, seed)
    before = counters(llm) if speculates else {}
    started = time.perf_counter()
    outputs = llm.generate(request["prompts"], chosen, use_tqdm=False)
    seconds = time.perf_counter() - started
    written = [output.outputs[0] for output in outputs]
    run = {
        "temperature": temperature,
        "seed": seed,
        "seconds": seconds,
        "tokens": sum(len(text.token_ids) for text in written),
        "cut": sum(text.finish_reason == "length" for text in written),
        "texts": [text.text for text in written],
        "token_ids": [list(text.token_ids) for text in written],
        "prompt_token_ids": [list(output.prompt_token_ids) for output in outputs],
    }
    return run | ({name: after - before[name] for name, after in counters(llm).items()} if speculates else {})


def measure_law(llm, request: dict, sampler: type, temperature: float, seed: int) -> dict | None:
    """Write some of the items again, not timed, and compute the law that they were drawn from."""
    from research.quality.law import law
    from research.quality.rows import verified_rows
    from vllm_specopt.integration.config import parse

    vocab_size = llm.llm_engine.vllm_config.model_config.get_vocab_size()
    number = request["law_items"]
    with verified_rows(sampler, vocab_size, seed) as reservoir:
        llm.generate(request["prompts"][:number], params(request, temperature, seed)[:number], use_tqdm=False)
    config = parse(request["llm"]["additional_config"])
    assert config is not None, "the arm runs our sampler"
    return law(reservoir, sampler, config)


def write_texts(llm, request: dict) -> dict:
    """Run every temperature and seed; at temperature 0 a seed changes nothing, and one is run."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    sampler = type(runner.rejection_sampler) if "speculative_config" in request["llm"] else type(runner.sampler)
    request_warm = request | {"prompts": request["prompts"][:WARMUP_ITEMS], "max_tokens": WARMUP_LEN}
    runs = []
    for temperature in request["temperatures"]:
        llm.generate(request_warm["prompts"], params(request_warm, temperature, request["seeds"]), use_tqdm=False)
        for seed in range(request["seeds"] if temperature > 0 else 1):
            run = measure(llm, request, temperature, seed)
            if "additional_config" in request["llm"] and temperature > 0 and request["law_items"]:
                run["law"] = measure_law(llm, request, sampler, temperature, seed)
            runs.append(run)
    return {
        "sampler": f"{sampler.__module__}.{sampler.__qualname__}",
        "dtype": str(runner.model_config.dtype).removeprefix("torch."),
        "runs": runs,
    }


def score_texts(llm, texts: list[dict]) -> dict:
    """Log probabilities that the engine's model gives to each text's tokens after its prompt, at temperature 1."""
    from vllm import SamplingParams, TokensPrompt

    wanted = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=text["prompt"] + text["answer"]) for text in texts]
    found = []
    for text, output in zip(texts, llm.generate(prompts, wanted, use_tqdm=False), strict=True):
        ids = text["prompt"] + text["answer"]
        places = range(len(text["prompt"]), len(ids))
        found.append([output.prompt_logprobs[place][ids[place]].logprob for place in places])
    return {"log_probs": found}


def main(request_path: str, result_path: str) -> None:
    """Build the engine of the request, do what it asks, write the result."""
    request = json.loads(Path(request_path).read_text())
    from vllm import LLM

    started = time.perf_counter()
    llm = LLM(**request["llm"])
    loaded = time.perf_counter() - started
    result = score_texts(llm, request["score"]) if "score" in request else write_texts(llm, request)
    Path(result_path).write_text(json.dumps({"engine_seconds": round(loaded, 1)} | result))


if __name__ == "__main__":
    main(*sys.argv[1:])
