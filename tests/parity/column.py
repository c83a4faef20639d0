"""Run one column of the matrix: real engines one after another in this process; write down what each row emitted.

Usage: ``python column.py COLUMN RESULT.json [ROW ...] [--requests N]``, started by ``run.py`` with the environment of
its runner.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from engine import steps
from parity.rows import BLOCK, COLUMNS, DRAFT, ENGINES, MAX_TOKENS, NUM_DRAFTS, ROWS, TARGET, Column, Row


def prompts(kind: str) -> list[list[int]]:
    """Token ids of the prompts of a kind."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    ids = [tokenizer.encode(prompt) for prompt in steps.prompts(4)]
    if kind == "short":
        return [these[:16] for these in ids[:3]]
    if kind == "thinking":
        return [[*these[:16], *tokenizer.encode("def")] for these in ids[:3]]
    return [these[: BLOCK + 16] for these in ids]


def arguments(column: Column, engine: str) -> dict:
    """Keyword arguments of ``LLM`` for one engine of a column."""
    args = {
        "model": str(TARGET),
        "max_model_len": 4 * BLOCK,
        "max_num_seqs": 64 if column.runner == "V1" else 24,
        "block_size": BLOCK,
        "num_gpu_blocks_override": None,
        "disable_log_stats": False,
        "seed": 0,
        "additional_config": steps.EXACT if column.arm == "ours" else {},
        **ENGINES[engine],
    }
    speculative = {"model": str(DRAFT), "num_speculative_tokens": NUM_DRAFTS}
    args = steps.arguments(speculative if column.arm != "plain" else None, **args)
    if engine == "custom":
        args["logits_processors"] = [f"parity.processors:{name}{column.runner}" for name in ("Ban", "NotTwice")]
    return args


def replace_kernels_the_interpreter_lacks() -> None:
    """Let V2 filter by top-k and top-p with vLLM's own PyTorch code: its Triton kernel needs inline assembly."""
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
    from vllm.v1.worker.gpu.sample import sampler, states

    for module in (sampler, states):
        module.apply_top_k_top_p = apply_top_k_top_p_pytorch


# What vLLM raises for a request that it will not take; the engine is none the worse for it.
REFUSED = "VLLMValidationError"


class Engine:
    """One engine and a count of its verifications."""

    def __init__(self, column: Column, name: str):
        from vllm import LLM

        # A CPU worker of vLLM 0.32 looks into every loaded module and stumbles over this one, which numba loads.
        sys.modules.pop("llvmlite.binding.ffi", None)
        self.column, self.name = column, name
        self.llm = LLM(**arguments(column, name))
        config = self.llm.llm_engine.vllm_config
        self.async_scheduling = bool(config.scheduler_config.async_scheduling)
        self.verifications = 0
        self.sampler = None
        if column.arm != "plain":
            self.sampler = self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.rejection_sampler
            ours = type(self.sampler).__module__.startswith("vllm_specopt.")
            assert ours == (column.arm == "ours"), f"the sampler is {type(self.sampler)}"
            self._count("forward" if column.runner == "V1" else "_verify")

    def _count(self, name: str) -> None:
        original = getattr(self.sampler, name)

        def counted(*args, **kwargs):
            self.verifications += 1
            return original(*args, **kwargs)

        setattr(self.sampler, name, counted)

    def generate(self, token_ids: list[list[int]], params: list[dict]) -> list[dict]:
        """Run requests together; one entry per completion."""
        from vllm import SamplingParams
        from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

        made = []
        for each in params:
            if "structured_outputs" in each:
                each = {**each, "structured_outputs": StructuredOutputsParams(**each["structured_outputs"])}
            if "repetition_detection" in each:
                each = {**each, "repetition_detection": RepetitionDetectionParams(**each["repetition_detection"])}
            made.append(SamplingParams(**each))
        requests = [{"prompt_token_ids": ids} for ids in token_ids]
        entries = []
        for request in self.llm.generate(requests, made, use_tqdm=False):
            for output in request.outputs:
                entries.append(
                    {
                        "prompt": list(request.prompt_token_ids),
                        "token_ids": list(output.token_ids),
                        "text": output.text,
                        "finish_reason": output.finish_reason,
                        "cached": request.num_cached_tokens,
                        "logprobs": _logprobs(output.logprobs),
                        "prompt_logprobs": _logprobs(request.prompt_logprobs),
                    }
                )
        return entries

    def preemptions(self) -> int:
        return sum(m.value for m in self.llm.get_metrics() if m.name == "vllm:num_preemptions")

    def run(self, row: Row) -> dict:
        """What one row emitted, or the error that it met."""
        before, preempted = self.verifications, self.preemptions()
        found = {"async_scheduling": self.async_scheduling}
        try:
            if row.greedy is not None:
                found["base"] = self._greedy(row, {})
                found["greedy"] = self._greedy(row, row.greedy) if row.greedy else found["base"]
                if row.prompts == "shared":
                    found["greedy"] = self._greedy(row, row.greedy)
            if row.sampled is not None:
                found["sampled"] = self._sampled(row)
                if row.check == "repeats":
                    found["again"] = self._sampled(row)
        except Exception as error:
            found["error"] = {"type": type(error).__name__, "message": str(error).strip()}
        found["verifications"] = self.verifications - before
        found["preemptions"] = self.preemptions() - preempted
        return found

    def _greedy(self, row: Row, params: dict) -> list[dict]:
        ids = prompts(row.prompts)
        common = {"temperature": 0.0, "max_tokens": row.greedy.get("max_tokens", MAX_TOKENS), "ignore_eos": True}
        return self.generate(ids, [common | params] * len(ids))

    def _sampled(self, row: Row) -> list[dict]:
        ids, number = prompts("short"), self.column.requests // row.sampled.get("n", 1)
        common = {"temperature": 1.0, "max_tokens": 6, "ignore_eos": True}
        # On a CPU a seeded request that V1 prefills in chunks ends vLLM's engine, with or without speculation: a row of
        # its own shows that, the others of that engine take no seed.
        seeded = row.engine != "chunked" or row.check == "seeded"
        params = [common | row.sampled | ({"seed": 1000 + index} if seeded else {}) for index in range(number)]
        return self.generate([ids[index % len(ids)] for index in range(number)], params)


def _logprobs(positions) -> list | None:
    """Token id to value, per position."""
    if positions is None:
        return None
    return [at and {str(token): value.logprob for token, value in at.items()} for at in positions]


def start(column: Column, name: str) -> tuple[Engine | None, dict | None]:
    """An engine, or the error that kept it from starting."""
    try:
        return Engine(column, name), None
    except Exception as error:
        return None, {"type": type(error).__name__, "message": str(error).strip(), "start": True}


def main(name: str, result: str, only: list[str], requests: int | None) -> None:
    """Run the rows of a column, engine by engine: all, or those named, whose results replace what the file holds."""
    column = COLUMNS[name] if requests is None else replace(COLUMNS[name], requests=requests)
    found = json.loads(Path(result).read_text()) if only and Path(result).exists() else {}
    if column.runner == "V2":
        replace_kernels_the_interpreter_lacks()
    for engine_name in ENGINES:
        rows = [row for row in ROWS if row.engine == engine_name and (not only or row.name in only)]
        engine = failed = None
        for row in rows:
            began = time.monotonic()
            if engine is None and failed is None:
                engine, failed = start(column, engine_name)
            found[row.name] = engine.run(row) if engine else {"error": failed}
            if engine and found[row.name].get("error", {}).get("type", REFUSED) != REFUSED:
                # What is left of the failed step must not reach the next row.
                engine = None
                gc.collect()
            print(
                f"{name}: {row.name}: {time.monotonic() - began:.1f} s {found[row.name].get('error', '')}", flush=True
            )
            Path(result).write_text(json.dumps(found))
        del engine
        gc.collect()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=COLUMNS)
    parser.add_argument("result")
    parser.add_argument("only", nargs="*", metavar="ROW")
    parser.add_argument("--requests", type=int, help="sampled requests per row")
    main(**vars(parser.parse_args()))
