"""Whole engines on the V2 runner: ours and stock with greedy drafts, with sampled ones, ours without drafts; then V1.

Last, with 7 sampled draft tokens: exact, block, stock, and stock's own block verification.

Texts at temperature 0 must be stock's. Every workload is generated four times in each engine, in turns: what the
slowest takes over the fastest is noise. Then PyTorch's profiler tells the GPU time of each kernel. vLLM's monitor warns
of kernels that compile while an engine serves; ours must not be among them, vLLM's own may be. CUDA graphs are on.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from first_run.places import PAIR, REHEARSE, RESULTS, ROOT, SCRIPTS, STANDIN, save, tail

FOLDER = RESULTS / "engine"
WORKLOADS = {
    "T = 0": {"temperature": 0.0},
    "T = 1": {"temperature": 1.0, "seed": 7},
    "T = 0.8, top-p 0.9": {"temperature": 0.8, "top_p": 0.9, "seed": 7},
}
AGAIN = " again"
TIMES = 2 if REHEARSE else 4
PROFILED_LENGTH = 32
LEAST_SECONDS = 20
# vLLM captures steps of up to 512 tokens on this card: 128 requests of 4.
REQUESTS, LENGTH = (2, 6) if REHEARSE else (4, 8) if STANDIN else (128, 128)
ENV = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
CPU_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@dataclass(frozen=True)
class Run:
    """One engine. arm: stock, exact or block. drafting: greedy, probabilistic, or no. runner: V1 or V2.

    kind: bfloat16, float32, or invariant (bfloat16 in vLLM's batch-invariant mode). number: draft tokens of a step.
    rule: vLLM's own rule of verification, for stock.
    """

    arm: str
    drafting: str
    runner: str = "V2"
    kind: str = "bfloat16"
    number: int = 3
    rule: str = "standard"

    @property
    def name(self) -> str:
        kind = "" if self.kind == "bfloat16" else f", {self.kind}"
        rule = "" if self.rule == "standard" else f" {self.rule}"
        number = "" if self.number == 3 else f"{self.number} "
        return f"{self.arm}{rule}, {number}{self.drafting} drafts, {self.runner}{kind}"

    @property
    def requests(self) -> int:
        """Requests of a batch: as many as REQUESTS of 4 rows have rows."""
        return max(2, REQUESTS * 4 // (self.number + 1))


def runs() -> list[Run]:
    """Most telling first."""
    first = [Run("exact", "greedy"), Run("stock", "greedy"), Run("exact", "no")]
    if REHEARSE:
        return first
    sampled = [Run(arm, "probabilistic") for arm in ("exact", "stock")]
    longer = [Run(arm, "probabilistic", number=7) for arm in ("exact", "block", "stock")]
    longer.append(Run("stock", "probabilistic", number=7, rule="block"))
    return first[:2] + sampled + first[2:] + [Run(arm, "greedy", "V1") for arm in ("exact", "stock")] + longer


def chosen() -> list[Run]:
    """Those whose names SPECOPT_ENGINES matches."""
    pattern = re.compile(os.environ.get("SPECOPT_ENGINES", ""))
    return [run for run in runs() if pattern.search(run.name)]


def workloads(run: Run) -> dict[str, dict]:
    """The workloads in turns; the interpreter lacks what vLLM's top-p needs for a request's first token."""
    chosen = {name: each for name, each in workloads_once(run).items() if not (REHEARSE and "top_p" in each)}
    turns = ["", AGAIN, *(f"{AGAIN} {number}" for number in range(3, TIMES + 1))][:TIMES]
    return {name + turn: sampling for turn in turns for name, sampling in chosen.items()}


def workloads_once(run: Run) -> dict[str, dict]:
    """WORKLOADS; T = 0.7 in place of T = 0 where rules for sampled drafts are compared."""
    if run.number == 3:
        return WORKLOADS
    return {"T = 0.7": {"temperature": 0.7, "seed": 7}} | {k: each for k, each in WORKLOADS.items() if k != "T = 0"}


def request(run: Run, pair: Path, prompts: list[str]) -> dict:
    """What engine.py is asked for."""
    llm: dict = {
        "model": str(pair / "target"),
        "dtype": "float32" if REHEARSE or run.kind == "float32" else "bfloat16",
        "max_model_len": 512 if REHEARSE else 1024,
        "max_num_seqs": run.requests,
        "distributed_executor_backend": "uni",
        "disable_log_stats": False,
        "enable_prefix_caching": False,
        "seed": 0,
    }
    if run.drafting != "no":
        llm["speculative_config"] = {
            "model": str(pair / "draft"),
            "draft_sample_method": run.drafting,
            "num_speculative_tokens": run.number,
            "rejection_sample_method": run.rule,
        }
    if run.arm != "stock":
        llm["additional_config"] = {"specopt": {"method": run.arm}}
    if REHEARSE:
        llm["enforce_eager"] = True
    else:
        # Without torch.compile an engine starts in seconds; steps of verification still run as full CUDA graphs.
        compilation = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}
        llm |= {"gpu_memory_utilization": 0.5, "compilation_config": compilation}
        if os.environ.get("SPECOPT_PLAIN_LAYERS") == "1":
            # vLLM's compiled operators did not load (unpack.sh): those of PyTorch and Triton.
            compilation["custom_ops"] = ["none"]
            native = {name: ["native"] for name in ("rms_norm", "fused_add_rms_norm")}
            llm |= {"attention_backend": "TRITON_ATTN", "kernel_config": {"ir_op_priority": native}}
    return {"llm": llm, "repair": False, "prompts": enough(prompts, run.requests), "warmup_len": 3 if REHEARSE else 16,
            "output_len": LENGTH, "original_vocab_size": 512, "workloads": workloads(run),
            "keep_token_ids": True, "profiled": [] if REHEARSE or STANDIN else list(workloads_once(run)),
            "profiled_len": PROFILED_LENGTH}  # fmt: skip


def enough(prompts: list[str], requests: int) -> list[str]:
    """As many prompts as there are requests; behind the given ones the same, turned about."""
    turned = (each[cut:] + each[:cut] for cut in (40, 80) for each in prompts)
    return list(itertools.islice(itertools.chain(prompts, turned), requests))


def main(seconds: float) -> None:
    """Run engine after engine while there is time, and write engines.json after each."""
    deadline = time.monotonic() + seconds - 3
    pair = shipped_pair() if REHEARSE else wait_for_pair(deadline)
    prompts = shipped_prompts()
    FOLDER.mkdir(parents=True, exist_ok=True)
    found: list[dict] = []
    failed = 0
    for run in chosen():
        left = deadline - time.monotonic()
        if left < LEAST_SECONDS:
            print(f"no time for {run.name}")
            continue
        result = engine(run, request(run, pair, prompts), left)
        failed += "problem" in result
        found.append(result)
        save("engines", {"runs": [public(each) for each in found], "texts": texts(found)})
        print(run.name, "status", result["status"], result["wall_seconds"], "s", flush=True)
    sys.exit(int(failed > 0))


def shipped_prompts() -> list[str]:
    lines = (ROOT / "models" / "prompts.jsonl").read_text().splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def shipped_pair() -> Path:
    """The shipped models under the names that a made pair has."""
    PAIR.mkdir(parents=True, exist_ok=True)
    for role in ("target", "draft"):
        link = PAIR / role
        if not link.exists():
            link.symlink_to(ROOT / "models" / f"specopt-{role}")
    return PAIR


def wait_for_pair(deadline: float) -> Path:
    """The folder of the models once they are made."""
    while not (PAIR / "wide_pair.json").is_file():
        if deadline - time.monotonic() < LEAST_SECONDS:
            raise SystemExit(f"the models are not made; the end of their log:\n{tail(RESULTS / 'pair.log')}")
        time.sleep(0.5)
    return PAIR


def engine(run: Run, asked: dict, seconds: float) -> dict:
    """Run one engine in a process of its own; its result, and what was wrong, if anything was."""
    from vllm_specopt.benchmarks.serve.arms import Arm
    from vllm_specopt.benchmarks.serve.engine import compiled_in_flight, problem

    name = re.sub(r"\W+", "-", run.name)
    question, answer, log = (FOLDER / f"{name}.{end}" for end in ("ask.json", "json", "log"))
    question.write_text(json.dumps(asked))
    answer.unlink(missing_ok=True)
    program = [str(SCRIPTS / "standin" / "engine.py")] if STANDIN else ["-m", "vllm_specopt.benchmarks.serve.engine"]
    began = time.monotonic()
    with log.open("w") as file:
        try:
            status: int | str = subprocess.run(
                [sys.executable, *program, str(question), str(answer)],
                stdout=file, stderr=file, env=environment(run), timeout=seconds,
            ).returncode  # fmt: skip
        except subprocess.TimeoutExpired:
            status = "stopped at its limit"
    said = log.read_text(errors="replace")
    result = json.loads(answer.read_text()) if status == 0 and answer.is_file() else {}
    result |= {"name": run.name, "arm": run.arm, "drafting": run.drafting, "runner": run.runner, "status": status,
               "wall_seconds": round(time.monotonic() - began, 1),
               "compiled_in_flight": compiled_in_flight(said),
               "attention": sorted(set(re.findall(r"Using (\S+) (?:attention )?backend", said))),
               "active": re.findall(r"specopt: (?:not )?active: .*", said)[:1],
               "warmed_up": re.findall(r"specopt: warmed up in ([\d.]+) s", said)[:1]}  # fmt: skip
    if status != 0:
        result["problem"] = f"status {status}; the end of its log: {said[-2000:]}"
    elif wrong := problem(Arm.named(run.arm, on_cpu=False), result):
        result["problem"] = wrong
    return result


def environment(run: Run) -> dict[str, str]:
    """What chooses the model runner; in a rehearsal also what makes V2 run in the interpreter."""
    found = os.environ | ENV | {"VLLM_USE_V2_MODEL_RUNNER": "0" if run.runner == "V1" else "1"}
    if run.kind == "invariant":
        found["VLLM_BATCH_INVARIANT"] = "1"
    if REHEARSE:
        interpreter = str(ROOT / "tests" / "engine" / "interpreter")
        found |= CPU_ENV | {"PYTHONPATH": os.pathsep.join([interpreter, found["PYTHONPATH"]])}
    return found


def public(result: dict) -> dict:
    """A result without its token ids, each workload once: median seconds of its generations, and all of them."""
    kept = dict(result)
    works = result.get("workloads", {})
    kept["workloads"] = {
        name: {key: value for key, value in work.items() if key != "token_ids"} | seconds(works, name)
        for name, work in works.items()
        if AGAIN not in name
    }
    return kept


def seconds(works: dict, workload: str) -> dict:
    """Median, all, and slowest over fastest."""
    every = [work["seconds"] for name, work in works.items() if name.split(AGAIN)[0] == workload]
    return {"seconds": statistics.median(every), "every": [round(each, 3) for each in every],
            "noise": round(max(every) / min(every), 3)}  # fmt: skip


def texts(found: list[dict]) -> list[dict]:
    """How many completions are the same, token for token, and how much of the others is, where they should be."""
    by_name = {result["name"]: result.get("workloads", {}) for result in found}
    trio = (Run("exact", "greedy"), Run("exact", "no"), Run("stock", "greedy"))
    ours, plain, stock = (by_name.get(run.name, {}) for run in trio)
    pairs = [("ours and stock", "T = 0", ours, stock), ("ours and plain", "T = 0", ours, plain)]
    pairs += [("ours and plain", name, ours, plain) for name in WORKLOADS if name != "T = 0"]
    compared = []
    for who, name, left, right in pairs:
        if name in left and name in right:
            shared = [common(*both) for both in zip(left[name]["token_ids"], right[name]["token_ids"], strict=True)]
            same = sum(share == 1 for share in shared)
            compared.append({"who": who, "workload": name, "identical": same, "completions": len(shared),
                             "shared_prefix": round(sum(shared) / len(shared), 4)})  # fmt: skip
    return compared


def common(left: list[int], right: list[int]) -> float:
    """The share of two texts before they differ."""
    length = max(len(left), len(right))
    return next((i / length for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), 1.0)


if __name__ == "__main__":
    main(float(sys.argv[1]))
