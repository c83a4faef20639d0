"""No number without a correct answer: what an implementation has to pass before it is timed."""

from __future__ import annotations

import math
import time

import torch

from vllm_specopt.benchmarks.kernels.inputs import Inputs
from vllm_specopt.benchmarks.kernels.peers import Implementation
from vllm_specopt.kernels.reference import verify_ref
from vllm_specopt.testing import MARGIN
from vllm_specopt.verify import Verified

REFERENCE_SECONDS = 1.0
# vLLM's top-p on a GPU is an approximation: its kept set may differ from the exact one by some per cent of the mass.
ACCEPTANCE_SLACK = 0.03


class GateError(Exception):
    """An implementation gave a wrong answer; the message says which and where."""


def check_reference(inputs: Inputs, implementation: Implementation) -> None:
    """Compare the first and the last request of round 0 with the float64 reference of the method, token for token.

    The last one is left out if the first took REFERENCE_SECONDS; an outcome too close to call in single precision is
    not compared. That all kinds of requests are right is for the tests to show; here a speed is not to be reported of
    a kernel that is wrong at this size.

    Raises:
        GateError: A token or a count differs.
    """
    found = implementation.read(implementation.call(0))
    began = time.monotonic()
    for request in dict.fromkeys((0, inputs.case.batch - 1)):
        if request and time.monotonic() - began > REFERENCE_SECONDS:
            break
        arguments, keywords = _request(inputs, request)
        reference = verify_ref(*arguments, **keywords, rule=implementation.rule)
        emitted = _tokens(found, request)
        expected = reference.token_ids[0, : reference.num_sampled[0]].tolist()
        if reference.margin[0] >= MARGIN and emitted != expected:
            raise GateError(f"{implementation.name}: request {request}: emitted {emitted}, the reference {expected}")


def check_same(inputs: Inputs, implementation: Implementation, ours: Implementation) -> None:
    """Compare all requests with ``verify()``: for stock at temperature 0, for our adapters at the case's own as well.

    Raises:
        GateError: A token or a count differs.
    """
    pairs = [("greedy", implementation.greedy(), ours.greedy())]
    if implementation.is_ours:
        seeded = implementation.seeded() if implementation.seeded else implementation.call(0)
        pairs.append(("seeded", seeded, ours.call(0)))
    for what, left, right in pairs:
        found, expected = implementation.read(left), ours.read(right)
        found, expected = (Verified(each.token_ids.cpu(), each.num_sampled.cpu()) for each in (found, expected))
        for request in range(inputs.case.batch):
            emitted, wanted = _tokens(found, request), _tokens(expected, request)
            if emitted != wanted:
                raise GateError(f"{implementation.name}, {what}: request {request}: emitted {emitted}, ours {wanted}")


def check_acceptance(inputs: Inputs, implementation: Implementation, accepted: list[int]) -> None:
    """Compare how many draft tokens survived in rounds 0, 1, ... with what the tensors imply.

    Raises:
        GateError: They are further apart than chance and vLLM's approximate top-p allow.
    """
    chances = inputs.chances.double().view(-1, inputs.case.batch, inputs.case.num_drafts)
    at_least = chances.cumprod(2)
    mean = at_least.sum(2)
    odd = 2 * torch.arange(1, inputs.case.num_drafts + 1) - 1
    variance = (at_least * odd).sum(2) - mean**2
    rounds = [number % len(chances) for number in range(len(accepted))]
    expected, deviation = float(mean[rounds].sum()), math.sqrt(max(float(variance[rounds].sum()), 0.0))
    if abs(sum(accepted) - expected) > 5 * deviation + ACCEPTANCE_SLACK * expected + 1:
        raise GateError(
            f"{implementation.name}: accepted {sum(accepted)} draft tokens in {len(accepted)} calls, "
            f"the tensors imply {expected:.0f} (standard deviation {deviation:.1f})"
        )


def count_accepted(verified: Verified, num_drafts: int) -> tuple[int, int]:
    """Return how many draft tokens survived, and how many were verified: up to each request's first rejection."""
    accepted = verified.num_sampled.long() - 1
    return int(accepted.sum()), int((accepted + 1).clamp(max=num_drafts).sum())


def _request(inputs: Inputs, request: int) -> tuple[tuple, dict]:
    """One request's arguments of the reference, on the host."""
    case, batch = inputs.case, inputs.round(0)
    width = case.num_drafts + 1
    rows = slice(request * width, (request + 1) * width)
    tokens = slice(request * case.num_drafts, (request + 1) * case.num_drafts)
    keywords = {}
    if case.temperature > 0:
        of_request = {"draft_probs": tokens, "positions": rows}
        one = slice(request, request + 1)
        keywords = {name: values[of_request.get(name, one)].cpu() for name, values in batch.kwargs.items()}
    drafts = batch.draft_token_ids[tokens].cpu()
    return (batch.logits[rows].cpu(), torch.tensor([0, width]), drafts, case.num_drafts), keywords


def _tokens(verified: Verified, request: int) -> list[int]:
    """The tokens a request emits, with everything the row holds after them that is not padding."""
    row, count = verified.token_ids[request].tolist(), int(verified.num_sampled[request])
    return row[:count] + [token for token in row[count:] if token != -1]
