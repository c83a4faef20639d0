"""Arms, workloads and order of the engine benchmark: what `specopt bench-engine` runs. Nothing here measures.

A run is one process with one engine (``engine.py``): one arm, one way of drafting, each of its workloads once. Per
way of drafting the arms take turns, there and back (A B, B A, ...), so that a drift of the machine hits all alike, and
the i-th run of an arm is compared with the i-th run of the baseline, its neighbour in time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from vllm_specopt.benchmarks.host import small_model_dtype
from vllm_specopt.benchmarks.serve.arms import REPAIRED, STOCK, Arm
from vllm_specopt.benchmarks.serve.engine import ENV

DRAFTING = ("greedy", "ngram", "probabilistic")
# The longest and the shortest run of tokens that vLLM's n-gram drafter looks up in a request's own text.
NGRAM = {"prompt_lookup_max": 3, "prompt_lookup_min": 1}
WORKLOADS = {
    "T = 1": {"temperature": 1.0},
    "T = 0.8, top-p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "T = 0": {"temperature": 0.0},
}
KERNELS = ("statistics_kernel", "decide_kernel", "residual_kernel")
ENTRY_POINTS = "vllm.general_plugins"
WARMUP_LEN = 6
MAX_MODEL_LEN = 1024


@dataclass(frozen=True)
class Plan:
    """What one benchmark runs.

    repeats: Runs per arm and way of drafting.
    """

    arms: tuple[Arm, ...]
    drafting: tuple[str, ...]
    prompts: tuple[str, ...]
    repeats: int
    output_len: int
    num_speculative_tokens: int
    threads: int | None
    on_cpu: bool

    @property
    def dtype(self) -> str:
        """The number type of every engine."""
        return small_model_dtype() if self.on_cpu else "bfloat16"

    @property
    def baseline(self) -> Arm:
        """The arm the others are compared with: ``stock-repaired`` where it takes part, else the first."""
        return next((arm for arm in self.arms if arm.name == REPAIRED), self.arms[0])

    def order(self) -> list[tuple[str, int, Arm]]:
        """Return the runs as (drafting, repeat, arm).

        On a CPU, stock as it comes runs once: at a temperature above 0 its numbers are no comparison.
        """
        runs = []
        for drafting in self.drafting:
            for repeat in range(self.repeats):
                arms = self.arms if repeat % 2 == 0 else self.arms[::-1]
                once = self.on_cpu and len(self.arms) > 1 and repeat > 0
                runs += [(drafting, repeat, arm) for arm in arms if not (once and arm.name == STOCK)]
        return runs

    def workloads(self, drafting: str) -> dict[str, dict]:
        """Return the sampling parameters by workload. At T = 0 a draft model's two ways are one: it is run once."""
        repeated = drafting == "probabilistic" and "greedy" in self.drafting
        return {name: sampling for name, sampling in WORKLOADS.items() if sampling["temperature"] > 0 or not repeated}

    def request(self, pair: tuple[Path, Path], vocab_size: int, drafting: str, repeat: int, arm: Arm) -> dict:
        """Return what ``engine.py`` is asked for one run; the arms differ by the option and the repair only.

        ``vocab_size`` is the original one: tokens from there on are counted apart.
        """
        target, draft = pair
        if drafting == "ngram":
            drafter = {"method": "ngram"} | NGRAM
        else:
            drafter = {"model": str(draft), "draft_sample_method": drafting}
        llm = {
            "model": str(target),
            "speculative_config": drafter | {"num_speculative_tokens": self.num_speculative_tokens},
            "dtype": self.dtype,
            "max_model_len": MAX_MODEL_LEN,
            "max_num_seqs": len(self.prompts),
            "enforce_eager": self.on_cpu,
            "distributed_executor_backend": "uni",
            "disable_log_stats": False,
            "enable_prefix_caching": False,
            "seed": repeat,
        }
        if arm.option:
            llm["additional_config"] = {"specopt": arm.option}
        return {
            "llm": llm,
            "repair": arm.repair,
            "prompts": self.prompts,
            "warmup_len": WARMUP_LEN,
            "output_len": self.output_len,
            "original_vocab_size": vocab_size,
            "workloads": self.workloads(drafting),
        }

    def env(self) -> dict[str, str]:
        """Return the environment variables of every run; on a CPU they set the number of threads."""
        found = {key: value for key, value in ENV.items() if self.on_cpu or not key.startswith("VLLM_CPU_")}
        return found | ({"OMP_NUM_THREADS": str(self.threads)} if self.threads else {})

    def describe(self) -> dict:
        """Return the configuration for the record."""
        return {
            "arms": {arm.name: {"specopt": arm.option, "repaired": arm.repair} for arm in self.arms},
            "baseline": self.baseline.name,
            "drafting": list(self.drafting),
            "workloads": {drafting: list(self.workloads(drafting)) for drafting in self.drafting},
            "requests": len(self.prompts),
            "output_len": self.output_len,
            "warmup_len": WARMUP_LEN,
            "num_speculative_tokens": self.num_speculative_tokens,
            "repeats": self.repeats,
            "threads": self.threads,
            "dtype": self.dtype,
            "env": self.env(),
        }


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


def is_registered() -> bool:
    """Whether vLLM can find the plugin, which takes its metadata beside its modules."""
    return any(entry.value.startswith("vllm_specopt") for entry in entry_points(group=ENTRY_POINTS))
