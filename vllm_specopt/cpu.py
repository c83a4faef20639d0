"""Verification on a CPU: exact reads each judged row once, and the emitting row once more; sigmoid the latter alone.

The loops are compiled by numba, which vLLM itself requires, on first use (a few seconds; see :func:`warm_up`) and kept
in ``__pycache__`` beside this file, or in numba's per-user cache directory where the package is read-only
(``NUMBA_CACHE_DIR`` overrides both). One compiled version serves all dtypes and options.

Import this module only once vLLM's worker is set up: on a CPU, vLLM 0.32 scans all loaded modules when it registers
its kernels, and the scan fails on llvmlite's.
"""

import ctypes
import functools

import numpy as np
import torch

from vllm_specopt.cpu_kernels import BF16, FP16, FP32, GREEDY_BELOW, LOGITS, ONE_HOT, PROBS, verify_requests

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
    sigmoid: torch.Tensor | None = None,  # [10]
    sigmoid_requests: torch.Tensor | None = None,  # [max_reqs]
    counters: torch.Tensor | None = None,  # [>= 2, 8]
) -> None:
    """Verify draft tokens on the CPU; arguments and meaning as in :func:`vllm_specopt.verify.verify`.

    ``sigmoid`` holds the constants as that function packs them.

    Writes every element of ``token_ids`` (int32 or int64) and ``num_sampled`` (int32). Uses up to
    ``torch.get_num_threads()`` threads; the result does not depend on their number.

    Raises:
        ValueError: ``cu_num_logits`` or ``state_indices`` of some request points outside the other arguments.
    """
    num_reqs = cu_num_logits.shape[0] - 1
    num_rows, vocab_size = logits.shape
    per_state = (temperature, seeds, draft_logits, top_k, top_p, min_p, sigmoid_requests)
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
        _address(sigmoid),
        _address(sigmoid_requests),
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
        scored = _is_scored(num_reqs, temperature, state_indices, sigmoid, sigmoid_requests)
        sampling = (state_indices, top_k, top_p, min_p, vocab_size)
        swept = np.where(scored & ~_is_filtered(num_reqs, *sampling), 1, num_sampled.numpy())
        if bonus_token_ids is not None:
            swept -= num_sampled.numpy() == np.diff(cu_num_logits.numpy())
        for method, requests in enumerate((~scored, scored)):
            _count_outcomes(
                counters[method].numpy(),
                np.diff(cu_num_logits.numpy())[requests],
                num_sampled.numpy()[requests],
                swept[requests],
            )


def _per_request(values: torch.Tensor, num_reqs: int, state_indices: torch.Tensor | None) -> np.ndarray:
    return (values[:num_reqs] if state_indices is None else values[state_indices]).numpy()


def _is_scored(num_reqs: int, temperature, state_indices, sigmoid, sigmoid_requests) -> np.ndarray:
    """Which requests the sigmoid method verified, ``[num_reqs]`` bool."""
    if sigmoid is None or temperature is None:
        return np.zeros(num_reqs, dtype=bool)
    sampled = _per_request(temperature, num_reqs, state_indices) >= GREEDY_BELOW
    return sampled if sigmoid_requests is None else sampled & _per_request(sigmoid_requests, num_reqs, state_indices)


def _is_filtered(num_reqs: int, state_indices, top_k, top_p, min_p, vocab_size: int) -> np.ndarray:
    """Which requests use a filter, ``[num_reqs]`` bool."""
    found = np.zeros(num_reqs, dtype=bool)
    for values, used in (
        (top_k, lambda k: (k >= 1) & (k < vocab_size)),
        (top_p, lambda p: p < 1),
        (min_p, lambda p: p > 0),
    ):
        if values is not None:
            found |= used(_per_request(values, num_reqs, state_indices))
    return found


def _count_outcomes(
    counters: np.ndarray,  # [8]
    num_rows: np.ndarray,  # [num_reqs]
    num_sampled: np.ndarray,  # [num_reqs]
    num_swept: np.ndarray,  # [num_reqs]
) -> None:
    """Add requests to their method's counters: tokens accepted, recovered, bonus; rows read, rows not read."""
    all_accepted = num_sampled == num_rows
    num_bonus = np.count_nonzero(all_accepted & (num_rows > 1))
    num_recovered = len(num_rows) - np.count_nonzero(all_accepted)
    swept = int(num_swept.sum())
    counters[:5] += (
        int(num_sampled.sum()) - len(num_rows),
        num_recovered,
        num_bonus,
        swept,
        int(num_rows.sum()) - swept,
    )


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
    """Run a plan on torch's own threads; the number of emitting rows without a usable logit."""
    job = np.array((0, 0, 0, num_reqs, *plan), dtype=np.int64)
    num_threads = min(torch.get_num_threads(), num_reqs)
    parallel = _openmp() if num_threads > 1 and num_logits >= _MIN_LOGITS_TO_SPLIT else None
    if parallel is None:
        verify_requests.ctypes(job.ctypes.data)
    else:
        parallel(verify_requests.address, job.ctypes.data, num_threads, 0)
    _, bad_rows, misfit, *_ = job.tolist()
    if misfit:
        raise ValueError(
            f"request {misfit - 1}: cu_num_logits or state_indices points outside the other arguments "
            "(expected 1 to max_num_draft_tokens + 1 rows per request, and indices below max_reqs)"
        )
    return bad_rows


@functools.cache
def _openmp():
    """The call that opens a parallel region in the OpenMP runtime torch has loaded; None if it has none.

    GNU's and LLVM's runtimes both export it. A pool of our own would compete with torch's workers, which spin for
    milliseconds after each operation, and would not inherit the cores vLLM binds them to.
    """
    try:
        parallel = ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError):
        return None
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel
