"""A job: what one call of compiled code is handed, by its address, and how the threads that share it divide it up."""

import numpy as np
from numba import carray, types
from numba.np.unsafe.ndarray import to_fixed_tuple

from vllm_specopt.cpu.memory import fetch_add, jit, pointer, write_int
from vllm_specopt.cpu.plan import Plan, scratch_at

# In 64-bit words: requests and workers that have begun, emitting rows without a usable logit, 1 + a request that does
# not fit; then the plan.
JOB_REQUESTS, JOB_WORKERS, JOB_BAD_ROWS, JOB_MISFIT, JOB_PLAN = range(5)
PLAN_LENGTH = len(Plan._fields)


@jit
def join(job):
    """The plan of a job, and the memory of the thread that calls."""
    plan = Plan(*to_fixed_tuple(carray(pointer(job + 8 * JOB_PLAN, types.int64), PLAN_LENGTH), PLAN_LENGTH))
    worker = fetch_add(job + 8 * JOB_WORKERS, np.int64(1))
    scratch, _ = scratch_at(plan.memory + worker * plan.memory_per_worker, plan.vocab)
    return plan, scratch


@jit
def next_request(job):
    """The number of a request that nobody has begun; it may lie beyond the last one."""
    return fetch_add(job + 8 * JOB_REQUESTS, np.int64(1))


@jit
def tell_misfit(job, request):
    """Note that a request's arguments do not fit together."""
    write_int(job + 8 * JOB_MISFIT, 0, True, 1 + request)
