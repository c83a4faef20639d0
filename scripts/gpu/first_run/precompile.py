"""Fill Triton's cache by many processes: what grid and sweep would compile one kernel after the other.

Compiles by launching: each process takes every n-th case, calls all implementations once, and drops the results.
"""

from __future__ import annotations

import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import partial

MOST, FIRST = 8, 18


def main() -> None:
    """Start the processes and wait for them."""
    count = max(1, min(MOST, (os.cpu_count() or 1) // 2))
    command = [sys.executable, "-m", "first_run.precompile"]
    workers = [subprocess.Popen([*command, str(number), str(count)]) for number in range(count)]
    sys.exit(max(worker.wait() for worker in workers))


def work(number: int, count: int) -> None:
    """One process's share."""
    import torch

    from vllm_specopt.benchmarks.kernels import peers

    peers.prepare(torch.device("cuda"))
    for task in tasks()[number::count]:
        try:
            task()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except Exception:  # What does not compile here will say so where it is measured.
            traceback.print_exc()


def tasks() -> list[Callable[[], None]]:
    """The grid's first cases, the sweep if it is asked for, then the other cases, ranks' parts and audits."""
    from first_run import sweep
    from vllm_specopt.benchmarks.kernels import grid, sharded_bytes

    cases = [partial(call_all, case) for case in grid.suite("gpu")]
    shapes = [partial(call_shapes, *variation) for variation in sweep.variations()]
    if "sweep" not in os.environ.get("ONLY", "").split():
        shapes = []
    parts = [partial(call_parts, num_drafts, draft) for draft in sharded_bytes.FORMS for num_drafts in (3, 7)]
    return cases[:FIRST] + parts + [call_audits] + shapes + cases[FIRST:]


def call_all(case) -> None:
    """Every implementation of a case, once."""
    import torch

    from vllm_specopt.benchmarks.kernels import peers
    from vllm_specopt.benchmarks.kernels.inputs import make_inputs

    for implementation in peers.implementations(make_inputs(case, torch.device("cuda"), 1)):
        if not isinstance(implementation, tuple):
            implementation.call(0)
            implementation.greedy()


def call_parts(num_drafts: int, draft: str) -> None:
    """Each rank's part of a sharded step, once."""
    import torch

    from vllm_specopt.benchmarks.kernels import sharded_times

    batch = sharded_times.make_batch(2, num_drafts, draft, sharded_times.VOCAB_SIZE, torch.device("cuda"))
    for implementation in sharded_times.implementations(batch):
        implementation.call(0)


def call_audits() -> None:
    """The audit after each kind of step, once."""
    import torch

    from vllm_specopt.audit import new_counts
    from vllm_specopt.benchmarks.kernels import audit_cost
    from vllm_specopt.benchmarks.kernels.grid import Case
    from vllm_specopt.benchmarks.kernels.inputs import make_inputs

    device = torch.device("cuda")
    for parameters in (audit_cost.SETTINGS | audit_cost.SAMPLED).values():
        inputs = make_inputs(Case(2, 3, **parameters), device, audit_cost.SEED)
        for kind in audit_cost.CALLS:
            audit_cost.step(inputs, new_counts(1, device), kind, 0)


def call_shapes(shapes, cases) -> None:
    """Our kernels with some launch shapes: a kernel's variant does not depend on the batch."""
    from first_run import batches, sweep
    from vllm_specopt.kernels.shapes import DEFAULTS

    sweep.use(shapes)
    for form, num_drafts in dict.fromkeys((form, num_drafts) for form, _, num_drafts in cases):
        batches.caller(batches.case(form, 2, num_drafts))(0)
    sweep.use(DEFAULTS)


if __name__ == "__main__":
    work(*map(int, sys.argv[1:])) if sys.argv[1:] else main()
