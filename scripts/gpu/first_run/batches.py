"""Calls of ``verify`` over a benchmark's case, for what times or profiles them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from first_run.places import REHEARSE
from first_run.timing import device
from vllm_specopt.benchmarks.kernels.grid import LOGITS, Case
from vllm_specopt.benchmarks.kernels.inputs import make_inputs
from vllm_specopt.verify import Verified, verify

FORMS = {
    "one-hot": {"temperature": 0.7},
    "draft logits": {"temperature": 0.7, "draft": LOGITS},
    "top-p": {"temperature": 0.7, "top_p": 0.9},
    "top-k, top-p": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
}
SEED = 1


def case(form: str, batch: int, num_drafts: int) -> Case:
    """A case of the grid; a tiny one in a rehearsal."""
    if REHEARSE:
        return Case(2, 1, 300, dtype="bf16", **FORMS[form])
    return Case(batch, num_drafts, **FORMS[form])


def caller(of: Case) -> Callable[[int], Verified]:
    """``verify`` over a case as a function of the round."""
    inputs = make_inputs(of, device(), SEED)
    rounds = [inputs.round(number) for number in range(4)]

    def call(number: int) -> Verified:
        batch = rounds[number % 4]
        return verify(*batch.args(), **batch.kwargs, token_dtype=torch.int32, backend="triton")

    return call
