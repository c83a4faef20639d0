"""The proof carried over: where a backend is too slow to be drawn from, it must equal the reference token for token."""

from dataclasses import dataclass

import numpy as np

from proof.cases import Case
from proof.draws import FIRST_POSITION, make_step
from vllm_specopt.rules import Constants
from vllm_specopt.testing import assert_matches_reference


@dataclass
class EqualityResult:
    """requests: compared, ``close`` of them left out as too close to call. tokens: emitted by them."""

    requests: int = 0
    close: int = 0
    tokens: int = 0


def compare_case(
    case: Case, backend: str, device: str, requests: int, seed: int, rule: Constants | None = None, size: int = 250
) -> EqualityResult:
    """Verify requests of one case, with drafts from its own draft distribution, on a backend and by the reference.

    ``rule`` as ``verify`` takes it.

    Raises:
        AssertionError: A token differs.
    """
    rng = np.random.default_rng([4, seed])
    result = EqualityResult()
    for start in range(0, requests, size):
        seeds = rng.integers(-(2**63), 2**63 - 1, min(size, requests - start))
        step = make_step(case, 0, 0, seeds, np.full(len(seeds), FIRST_POSITION), rng)
        batch = step.batch()
        batch.kwargs["rule"] = rule
        verified, close = assert_matches_reference(batch, backend, device)
        result.requests += len(seeds)
        result.close += close
        result.tokens += int(verified.num_sampled.sum())
    return result
