"""Tensor-parallel ranks verify step after step; compare what each emitted.

Usage: ``python tests/stress/ranks.py --steps 10000 --out result.json``. Seeded and unseeded requests at temperature 1
share every batch. With ``--sharded`` each step without whole rows is verified a second time with them. The texts of
requests that are greedy or seeded are written down, to be compared with those of other numbers of ranks (``--dtype
float32 --drafting greedy``). The shipped target has 5 KV heads, which ranks cannot share, so it gets three more (and
six query heads) of zeros: the same function. With ``--kill`` a rank is killed under load afterwards, and how the engine
reports it is written down. Exits with 1 if the ranks differ.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

ENV = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    # Else each rank compiles its embedding, eager or not.
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
}
HERE = Path(__file__).resolve().parent
MODELS = HERE.parents[1] / "models"
INTERPRETER = HERE.parent / "engine" / "interpreter"
BATCH, MAX_TOKENS = 8, 160
BATCHES_SHOWN = 2
# Of 32 tokens; a batch's requests want about 60.
BLOCKS = 36
# Of an extended vocabulary's new tokens, together: both ranks' tokens are emitted.
TAIL_MASS = 0.4


def main(argv: list[str]) -> int:
    """Run, print the result and write it down; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--arm", choices=("exact", "stock"), default="exact")
    parser.add_argument("--drafting", choices=("greedy", "probabilistic"), default="probabilistic")
    parser.add_argument("--ranks", type=int, choices=(1, 2, 4), default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: what suits this CPU")
    parser.add_argument("--tokens", type=int, default=MAX_TOKENS, help="of a request")
    parser.add_argument("--runner", choices=("V1", "V2"), default="V1", help="vLLM's model runner")
    parser.add_argument("--kernels", action="store_true", help="verify as on a GPU, in Triton's interpreter; V2 does")
    parser.add_argument("--sharded", action="store_true", help="logits stay on their ranks where they can")
    parser.add_argument("--filtered", action="store_true", help="top-p in every batch, not in every other one")
    parser.add_argument("--vocab-size", type=int, help="extend the models' vocabulary to this size")
    parser.add_argument("--pressed", action="store_true", help="too few KV cache blocks, and requests that are aborted")
    parser.add_argument("--kill", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(argv)
    # The workers import the extension by its name.
    is_v2 = options.runner == "V2"
    interprets = is_v2 or options.kernels
    folders = [str(HERE), *([str(INTERPRETER)] if interprets else []), os.environ.get("PYTHONPATH", "")]
    cores = sorted(os.sched_getaffinity(0))
    binding = "|".join(str(cores[rank % len(cores)]) for rank in range(options.ranks))
    os.environ.update(ENV, VLLM_CPU_OMP_THREADS_BIND=binding, PYTHONPATH=os.pathsep.join(folders).rstrip(os.pathsep))
    is_ready = not interprets or str(INTERPRETER) in sys.path
    os.environ.update(TRITON_INTERPRET=str(int(interprets)), VLLM_USE_V2_MODEL_RUNNER=str(int(is_v2)))
    if not is_ready:
        # The interpreter has to be there before Python itself is.
        os.execv(sys.executable, [sys.executable, __file__, *argv])
    with tempfile.TemporaryDirectory(prefix="specopt-ranks-") as scratch:
        target, draft = shared_heads(MODELS / "specopt-target", Path(scratch) / "target"), MODELS / "specopt-draft"
        if options.vocab_size:
            target, draft = extended(target, draft, Path(scratch) / "extended", options.vocab_size)
        llm = engine(options, target, draft)
        result = {"arm": options.arm, "drafting": options.drafting} | verified(llm, options)
        if options.pressed:
            found = [metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions"]
            result["preemptions"] = sum(found)
        if options.kill:
            result["killed"] = killed(llm)
    result["agree"] = len({rank["digest"] for rank in result["ranks"]}) == 1
    text = json.dumps(result, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text, flush=True)
    status = 0 if result["agree"] else 1
    if options.kill:
        # The engine has lost a rank: leave without waiting for it.
        os._exit(status)
    # Else the process waits at its end for an engine that nobody has told to stop, now and then for good.
    llm.llm_engine.engine_core.shutdown()
    return status


def shared_heads(source: Path, folder: Path) -> Path:
    """Copy a model with heads of zeros added so that four ranks can share its KV heads; return the folder."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    heads, kv_heads, head_dim = (config[x] for x in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    group = heads // kv_heads
    if kv_heads % 4 == 0:
        return folder
    new_kv_heads = next(n for n in range(kv_heads + 1, 99) if n % 4 == 0 and config["hidden_size"] % (n * group) == 0)
    new_heads = group * new_kv_heads
    rows = {"q_proj": new_heads, "k_proj": new_kv_heads, "v_proj": new_kv_heads}
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        kind = name.split(".")[-2] if name.count(".") > 1 else ""
        if kind in rows:
            added = rows[kind] * head_dim - weight.shape[0]
            weights[name] = torch.cat([weight, weight.new_zeros(added, weight.shape[1])])
        elif kind == "o_proj":
            added = new_heads * head_dim - weight.shape[1]
            weights[name] = torch.cat([weight, weight.new_zeros(weight.shape[0], added)], dim=1).contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config |= {"num_attention_heads": new_heads, "num_key_value_heads": new_kv_heads}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def extended(target: Path, draft: Path, folder: Path, vocab_size: int) -> tuple[Path, Path]:
    """The pair with a larger vocabulary; return the folders."""
    from vllm_specopt.benchmarks.serve.wide_pair import make_pair

    prompts = [json.loads(line)["prompt"] for line in (MODELS / "prompts.jsonl").read_text().splitlines()]
    make_pair(target, draft, prompts, folder, vocab_size, tail_mass=TAIL_MASS)
    return folder / "target", folder / "draft"


def engine(options: argparse.Namespace, target: Path, draft: Path):
    """An engine on that many ranks."""
    from vllm import LLM

    from vllm_specopt.benchmarks.host import small_model_dtype

    speculative = {"model": str(draft), "num_speculative_tokens": 4}
    if options.drafting == "probabilistic":
        speculative["draft_sample_method"] = "probabilistic"
    option = {"method": "exact"} | ({"sharded": True} if options.sharded else {})
    return LLM(
        model=str(target),
        dtype=options.dtype or small_model_dtype(),
        tensor_parallel_size=options.ranks,
        distributed_executor_backend="mp",
        worker_extension_cls="record_verified.RecordVerified",
        speculative_config=speculative,
        additional_config={"specopt": option} if options.arm == "exact" else {},
        enforce_eager=True,
        max_model_len=512,
        max_num_seqs=BATCH,
        disable_log_stats=not options.pressed,
        **({"block_size": 32, "num_gpu_blocks_override": BLOCKS} if options.pressed else {}),
    )


def requests(first: int, tokens: int = MAX_TOKENS, filtered: bool = False) -> tuple[list[str], list]:
    """Prompts and sampling parameters of one batch: every other request has a seed, one in eight is greedy.

    In every other batch, or with ``filtered`` in every one, half of the requests have top-p.
    """
    from vllm import SamplingParams

    texts = [json.loads(line)["prompt"] for line in (MODELS / "prompts.jsonl").read_text().splitlines()]
    params = [
        SamplingParams(
            temperature=0.0 if index % 8 == 7 else 1.0,
            top_p=0.9 if index // 2 % 2 and (filtered or first // BATCH % 2) else 1.0,
            seed=first + index if index % 2 else None,
            max_tokens=tokens,
            ignore_eos=True,
        )
        for index in range(BATCH)
    ]
    return [texts[(first + index) % len(texts)] for index in range(BATCH)], params


def verified(llm, options: argparse.Namespace) -> dict:
    """Generate until each rank has verified so many steps; return all ranks' records, and the first texts."""
    if options.kernels:
        llm.collective_rpc("use_kernels")
    if options.sharded:
        llm.collective_rpc("warm_up_parts")
    llm.collective_rpc("start_recording")
    started, first, texts = time.monotonic(), 0, {}
    while True:
        prompts, params = requests(first, options.tokens, options.filtered)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        if first < BATCHES_SHOWN * BATCH:
            shown = [i for i, one in enumerate(params) if one.temperature == 0 or one.seed is not None]
            texts |= {first + i: list(outputs[i].outputs[0].token_ids) for i in shown}
        first += BATCH
        if options.pressed:
            abort(llm.llm_engine, first)
        ranks = llm.collective_rpc("recorded")
        if min(rank["steps"] for rank in ranks) >= options.steps:
            seconds = round(time.monotonic() - started, 1)
            return {"seconds": seconds, "requests": first, "ranks": ranks, "texts": texts}


def abort(engine, first: int) -> None:
    """Start requests and give them up after a few steps."""
    ids = [f"aborted-{first + index}" for index in range(BATCH)]
    for request_id, prompt, params in zip(ids, *requests(first), strict=True):
        engine.add_request(request_id, prompt, params)
    for _ in range(8):
        engine.step()
    engine.abort_request(ids)
    while engine.has_unfinished_requests():
        engine.step()


def killed(llm) -> dict:
    """Kill rank 1 under load; return what ``generate`` raised then, on a second call, and after how long."""
    victim = llm.collective_rpc("process_id")[1]
    threading.Timer(0.5, os.kill, (victim, signal.SIGKILL)).start()
    started = time.monotonic()
    raised = [raises(llm), raises(llm)]
    return {"raised": raised, "seconds": round(time.monotonic() - started, 1)}


def raises(llm) -> str:
    """Name of what ``generate`` raises under a load that outlasts the kill."""
    try:
        for first in range(0, 100 * BATCH, BATCH):
            llm.generate(*requests(first), use_tqdm=False)
    except Exception as error:
        return f"{type(error).__module__}.{type(error).__qualname__}"
    return "nothing"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
