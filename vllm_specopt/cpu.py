"""Exact verification on a CPU: reads each judged row once, and the emitting row once more.

The loops are compiled by numba, which vLLM itself requires, on first use (a few seconds; see :func:`warm_up`) and kept
in ``__pycache__`` beside this file, or in numba's per-user cache directory where the package is read-only
(``NUMBA_CACHE_DIR`` overrides both). One compiled version serves all dtypes and options.

Import this module only once vLLM's worker is set up: on a CPU, vLLM 0.32 scans all loaded modules when it registers
its kernels, and the scan fails on llvmlite's.
"""

import itertools
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from vllm_specopt.cpu_kernels import BF16, FP16, FP32, LOGITS, ONE_HOT, PROBS, verify_requests

_KIND = {torch.bfloat16: BF16, torch.float16: FP16, torch.float32: FP32}
# Below this many logits a second thread costs more than it saves.
_MIN_LOGITS_TO_SPLIT = 1 << 17


def exact_verify(
    logits: torch.Tensor,  # [num_rows, vocab]
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    draft_token_ids: torch.Tensor,  # [num_rows] or [num_rows - num_reqs]
    *,
    token_ids: torch.Tensor,  # [num_reqs, max_num_draft_tokens + 1]
    num_sampled: torch.Tensor,  # [num_reqs]
    temperature: torch.Tensor | None = None,  # [max_reqs]
    seeds: torch.Tensor | None = None,  # [max_reqs]
    positions: torch.Tensor | None = None,  # [num_rows]
    state_indices: torch.Tensor | None = None,  # [num_reqs]
    draft_probs: torch.Tensor | None = None,  # [num_rows - num_reqs, draft_vocab]
    draft_logits: torch.Tensor | None = None,  # [max_reqs, max_drafts, draft_vocab]
    top_k: torch.Tensor | None = None,  # [max_reqs]
    top_p: torch.Tensor | None = None,  # [max_reqs]
    min_p: torch.Tensor | None = None,  # [max_reqs]
    bonus_token_ids: torch.Tensor | None = None,  # [num_reqs]
    bad_row_counter: torch.Tensor | None = None,  # [1]
    counters: torch.Tensor | None = None,  # [>= 1, 8]
) -> None:
    """Verify draft tokens on the CPU; arguments and meaning as in :func:`vllm_specopt.verify.verify`.

    Writes every element of ``token_ids`` (int32 or int64) and ``num_sampled`` (int32). Uses up to
    ``torch.get_num_threads()`` threads; the result does not depend on their number.

    Raises:
        ValueError: ``cu_num_logits`` or ``state_indices`` of some request points outside the other arguments.
    """
    num_reqs = cu_num_logits.shape[0] - 1
    num_rows, vocab_size = logits.shape
    per_state = (temperature, seeds, draft_logits, top_k, top_p, min_p)
    num_states = min((t.shape[0] for t in per_state if t is not None), default=1 << 62)
    mode, draft = ONE_HOT, None
    draft_stride = draft_position_stride = 0
    if draft_probs is not None:
        mode, draft, draft_stride = PROBS, draft_probs, draft_probs.stride(0)
    elif draft_logits is not None:
        mode, draft = LOGITS, draft_logits
        draft_stride, draft_position_stride, _ = draft_logits.stride()
    if draft is not None:
        vocab_size = min(vocab_size, draft.shape[-1])
    plan = (
        num_rows,
        vocab_size,
        logits.data_ptr(),
        logits.stride(0),
        _KIND[logits.dtype],
        *_ints(cu_num_logits),
        *_ints(draft_token_ids),
        int(draft_token_ids.shape[0] != num_rows),
        _address(temperature),
        _address(seeds),
        *_ints(positions),
        *_ints(state_indices),
        num_states,
        mode,
        _address(draft),
        draft_stride,
        draft_position_stride,
        _KIND[draft.dtype] if draft is not None else BF16,
        *_ints(top_k),
        _address(top_p),
        _address(min_p),
        *_ints(bonus_token_ids),
        token_ids.data_ptr(),
        token_ids.stride(0),
        token_ids.shape[1],
        int(token_ids.dtype == torch.int64),
        num_sampled.data_ptr(),
    )
    bad_rows = _run(plan, num_reqs, num_rows * vocab_size)
    if bad_rows and bad_row_counter is not None:
        bad_row_counter += bad_rows
    if counters is not None:
        _count_outcomes(counters[0].numpy(), cu_num_logits.numpy(), num_sampled.numpy(), bonus_token_ids is not None)


def _count_outcomes(
    counters: np.ndarray,  # [8]
    cu_num_logits: np.ndarray,  # [num_reqs + 1]
    num_sampled: np.ndarray,  # [num_reqs]
    bonus_is_given: bool,
) -> None:
    """Add a batch to its method's counters: tokens accepted, recovered, bonus; rows read, rows not read."""
    num_rows = np.diff(cu_num_logits)
    all_accepted = num_sampled == num_rows
    num_bonus = np.count_nonzero(all_accepted & (num_rows > 1))
    num_recovered = len(num_rows) - np.count_nonzero(all_accepted)
    # A request's rows are read up to the one it emits from.
    num_swept = int(num_sampled.sum()) - bonus_is_given * np.count_nonzero(all_accepted)
    num_accepted = int(num_sampled.sum()) - len(num_rows)
    counters[:5] += (num_accepted, num_recovered, num_bonus, num_swept, int(num_rows.sum()) - num_swept)


def warm_up(dtype: torch.dtype = torch.bfloat16) -> None:
    """Compile the loops, or load them from the cache, so that the first request does not wait.

    Args:
        dtype: Logits dtype that will be served. All share one compiled version.
    """
    logits = torch.zeros(1, 1, dtype=dtype)
    exact_verify(
        logits,
        torch.tensor([0, 1]),
        torch.zeros(0, dtype=torch.int64),
        token_ids=torch.empty(1, 1, dtype=torch.int64),
        num_sampled=torch.empty(1, dtype=torch.int32),
    )


def _address(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _ints(tensor: torch.Tensor | None) -> tuple[int, int]:
    """Address of a tensor of indices, and whether they are 64 bits wide."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), int(tensor.dtype == torch.int64))


def _run(plan: tuple[int, ...], num_reqs: int, num_logits: int) -> int:
    num_threads = min(torch.get_num_threads(), num_reqs)
    if num_threads == 1 or num_logits < _MIN_LOGITS_TO_SPLIT:
        return _checked(verify_requests(0, num_reqs, plan))
    # Requests differ in cost (they stop at their first rejection), so each thread takes the next one when free.
    order = itertools.count()

    def work() -> int:
        bad_rows = 0
        while (request := next(order)) < num_reqs:
            bad_rows += _checked(verify_requests(request, request + 1, plan))
        return bad_rows

    helpers = [_pool(num_threads - 1).submit(work) for _ in range(num_threads - 1)]
    try:
        bad_rows = work()
    finally:
        # The tensors must outlive every thread that reads them.
        results = [helper.exception() or helper.result() for helper in helpers]
    for result in results:
        if isinstance(result, BaseException):
            raise result
        bad_rows += result
    return bad_rows


def _checked(result: int) -> int:
    if result < 0:
        raise ValueError(
            f"request {-1 - result}: cu_num_logits or state_indices points outside the other arguments "
            "(expected 1 to max_num_draft_tokens + 1 rows per request, and indices below max_reqs)"
        )
    return result


_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_pools_lock = threading.Lock()


def _pool(num_threads: int) -> ThreadPoolExecutor:
    # Keyed by process: threads do not survive a fork.
    key = (os.getpid(), num_threads)
    with _pools_lock:
        if key not in _pools:
            _pools[key] = ThreadPoolExecutor(num_threads, "specopt", initializer=_use_all_cores)
        return _pools[key]


def _use_all_cores() -> None:
    """Let a thread run on every core of this process.

    vLLM binds each OpenMP thread, the main thread included, to one core, and new threads inherit that.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = set()
    for thread in os.listdir("/proc/self/task"):
        try:
            cores |= os.sched_getaffinity(int(thread))
        except OSError:
            continue
    os.sched_setaffinity(0, cores)
