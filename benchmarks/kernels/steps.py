"""What is counted: a step of ours and the same step of the installed vLLM's model runner V2, on the benchmark's rows.

Run as a module, it prints the launches of the steps asked for: the interpreter needs a process of its own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from vllm_specopt.audit import audit, new_counts
from vllm_specopt.benchmarks.kernels import peers
from vllm_specopt.benchmarks.kernels.grid import Case
from vllm_specopt.benchmarks.kernels.inputs import Inputs, make_inputs
from vllm_specopt.benchmarks.kernels.watching import Launch, install, watch
from vllm_specopt.testing import Batch
from vllm_specopt.verify import Notes, verify

OURS, STOCK = "ours", "stock-v2"
SEED = 7
# Stock spreads one launch over an H100's SMs.
SMS = 132


@dataclasses.dataclass(frozen=True)
class Step:
    """One implementation's step of a case.

    flat: Rows of small random logits instead of the benchmark's: every token may be kept.
    sampled: Requests that are run; the others of the batch repeat them.
    block: Whether drafts are judged as a block.
    audit: Whether the step's tokens are audited, too; ``anew``: by an audit that sweeps the rows itself.
    """

    who: str
    case: Case
    flat: bool = False
    sampled: int = 8
    block: bool = False
    audit: bool = False
    anew: bool = False

    @property
    def requests(self) -> int:
        return min(self.sampled, self.case.batch)


def record(steps: list[Step]) -> list[list[Launch]]:
    """Launches of each step, from one process that interprets."""
    question = json.dumps([dataclasses.asdict(step) for step in steps])
    env = os.environ | {"TRITON_INTERPRET": "1", "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-m", __name__], input=question, env=env, capture_output=True, text=True)
    if ended.returncode:
        raise RuntimeError(f"the interpreter's process failed:\n{ended.stderr[-4000:]}")
    answer = json.loads(ended.stdout.splitlines()[-1])
    return [[Launch.from_json(launch) for launch in launches] for launches in answer]


def launches_of(step: Step) -> list[Launch]:
    """Launches of one step, in this process, which interprets."""
    inputs = tiled_inputs(step)
    name = f"{step.who}-block" if step.block else step.who
    implementation = (peers.ours if step.who == OURS else peers.v2)(name, inputs)
    call: Callable[[], object] = lambda: implementation.call(0)  # noqa: E731
    if step.case.temperature == 0:
        call = implementation.greedy
    elif step.audit:
        call = _audited(inputs, Notes(wanted=not step.anew))
    on_a_gpu = _as_on_a_gpu() if step.who == STOCK else contextlib.nullcontext()
    with on_a_gpu, watch(step.case.batch, len(inputs.batch.logits), step.requests) as launches:
        call()
    return launches


def _audited(inputs: Inputs, notes: Notes) -> Callable[[], None]:
    batch, counts = inputs.round(0), new_counts(1, "cpu")
    taken: dict[str, Any] = {name: value for name, value in batch.kwargs.items() if name != "draft_logits"}

    def call() -> None:
        verified = verify(*batch.args(), **batch.kwargs, notes=notes, token_dtype=torch.int32, backend="triton")
        audit(batch.logits, batch.cu_num_logits, verified.token_ids, counts, **taken, notes=notes, backend="triton")

    return call


def tiled_inputs(step: Step) -> Inputs:
    """A batch in which the rows of a few requests repeat."""
    case, requests = step.case, step.requests
    few = make_inputs(replace(case, batch=requests), torch.device("cpu"), SEED)
    if step.flat:
        few.batch.logits.normal_(std=0.5, generator=torch.Generator().manual_seed(SEED))
    repeats = -(-case.batch // requests)
    rows = case.batch * (case.num_drafts + 1)

    def tile(value: torch.Tensor, length: int, dim: int = 0) -> torch.Tensor:
        return torch.cat([value] * repeats, dim).narrow(dim, 0, length)

    kwargs = {name: tile(value, len(value) * case.batch // requests) for name, value in few.batch.kwargs.items()}
    drafts = tile(few.drafts, case.batch * case.num_drafts, 1)
    positions = tile(few.positions, rows, 1)
    cu = torch.arange(case.batch + 1, dtype=torch.int32) * (case.num_drafts + 1)
    batch = Batch(tile(few.batch.logits, rows), cu, drafts[0], case.num_drafts, kwargs)
    return Inputs(case, SEED, batch, drafts, few.chances, positions, few.acceptance)


class _OnCuda(torch.Tensor):
    """A tensor that says it is on a GPU, where stock asks before it picks a kernel."""

    device = property(lambda self: torch.device("cuda", 0))


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Stock's top-k and top-p take the way they take on an NVIDIA GPU."""
    from vllm.platforms import current_platform
    from vllm.v1.sample.ops import topk_topp_sampler, topk_topp_triton

    original = topk_topp_triton.apply_top_k_top_p_triton
    topk_topp_triton._TRITON_BUFFER_CACHE.clear()
    topk_topp_triton._TRITON_SPLIT_CACHE.clear()

    def apply(logits, *args):
        original(logits.as_subclass(_OnCuda), *args)
        return logits

    with (
        mock.patch.object(topk_topp_sampler, "apply_top_k_top_p_triton", apply),
        mock.patch.object(topk_topp_triton, "num_compute_units", lambda *args: SMS),
        mock.patch.object(type(current_platform), "is_cuda_alike", lambda self: True),
    ):
        yield


def main() -> None:
    install()
    asked = [Step(**fields | {"case": Case(**fields["case"])}) for fields in json.load(sys.stdin)]
    if any(step.who != OURS for step in asked):
        peers.prepare(torch.device("cpu"))
    print(json.dumps([[launch.as_json() for launch in launches_of(step)] for step in asked]))


if __name__ == "__main__":
    main()
