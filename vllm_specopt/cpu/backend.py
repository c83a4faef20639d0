"""The Python side of the CPU backend: from tensors to addresses, and onto torch's threads."""

from __future__ import annotations

import ctypes
import functools
import struct
from typing import ClassVar

import numpy as np
import torch

from vllm_specopt.cpu.job import JOB_BAD_ROWS, JOB_MISFIT, JOB_PLAN, PLAN_LENGTH
from vllm_specopt.cpu.memory import BF16, FP16, FP32
from vllm_specopt.cpu.notes import size_of_note
from vllm_specopt.cpu.plan import LOGITS, ONE_HOT, PROBS, scratch_at
from vllm_specopt.cpu.requests import verify_requests

KIND = {torch.bfloat16: BF16, torch.float16: FP16, torch.float32: FP32}
# Below this many logits a second thread costs more than it saves.
_MIN_LOGITS_TO_SPLIT = 1 << 17
_ANY_STATE = 1 << 62
_INT64 = torch.int64
_ALIGNMENT = 64
_JOB, _JOB_BEGINS = struct.Struct(f"{JOB_PLAN + PLAN_LENGTH}q"), (0,) * JOB_PLAN


def verify_batch(
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
    rule: int = 0,
    constants: torch.Tensor | None = None,
    rule_requests: torch.Tensor | None = None,  # [max_reqs]
    counters: torch.Tensor | None = None,  # [num_rules, 8]
    takes_notes: bool = False,
) -> torch.Tensor | None:
    """Verify draft tokens on the CPU; arguments and meaning as in :func:`vllm_specopt.verify.verify`.

    ``rule`` is a place in the registry, ``constants`` are packed as that function does.

    Writes every element of ``token_ids`` (int32 or int64) and ``num_sampled`` (int32). Uses up to
    ``torch.get_num_threads()`` threads; the result does not depend on their number. Returns notes of the rows for
    ``audit_batch`` if they are to be taken.

    Raises:
        ValueError: ``cu_num_logits`` or ``state_indices`` of some request points outside the other arguments.
    """
    num_rows, vocab_size = logits.shape
    draft = draft_probs if draft_probs is not None else draft_logits
    if draft is not None:
        vocab_size = min(vocab_size, draft.shape[-1])
    notes = torch.empty(num_rows, note_words(vocab_size), dtype=_INT64) if takes_notes else None
    common = common_of(
        logits, cu_num_logits, token_ids, num_sampled, vocab_size, rule, counters, notes,
        temperature=temperature,
        seeds=seeds,
        positions=positions,
        state_indices=state_indices,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        rule_requests=rule_requests,
        num_states=_ANY_STATE if draft_logits is None else len(draft_logits),
    )  # fmt: skip
    own = (
        0,
        *drafts_of(draft_token_ids, num_rows, draft_probs, draft_logits),
        *ints_of(bonus_token_ids),
        address_of(constants),
    )
    bad_rows = run(verify_requests, common, own, "1 to max_num_draft_tokens + 1")
    if bad_rows and bad_row_counter is not None:
        bad_row_counter += bad_rows
    return notes


def drafts_of(draft_token_ids, num_rows: int, draft_probs, draft_logits) -> tuple[int, ...]:
    """What a verification is told of its drafts, in the plan's order."""
    tokens = (*ints_of(draft_token_ids), draft_token_ids.shape[0] != num_rows)
    if draft_probs is not None:
        return (*tokens, PROBS, draft_probs.data_ptr(), draft_probs.stride(0), 0, KIND[draft_probs.dtype])
    if draft_logits is not None:
        return (*tokens, LOGITS, draft_logits.data_ptr(), *draft_logits.stride()[:2], KIND[draft_logits.dtype])
    return (*tokens, ONE_HOT, 0, 0, 0, 0)


def common_of(
    logits,
    cu_num_logits,
    token_ids,
    num_sampled,
    vocab_size: int,
    rule: int,
    counters,
    notes,
    *,
    temperature,
    seeds,
    positions=None,
    state_indices=None,
    top_k=None,
    top_p=None,
    min_p=None,
    rule_requests=None,
    num_states: int = _ANY_STATE,
) -> tuple[int, ...]:
    """What a verification and an audit are both told, in the plan's order from the number of requests on."""
    per_state = (temperature, seeds, top_k, top_p, min_p, rule_requests)
    return (
        cu_num_logits.shape[0] - 1,
        logits.shape[0],
        vocab_size,
        logits.data_ptr(),
        logits.stride(0),
        KIND[logits.dtype],
        *ints_of(cu_num_logits),
        address_of(temperature),
        address_of(seeds),
        *ints_of(positions),
        *ints_of(state_indices),
        min([num_states, *(len(each) for each in per_state if each is not None)]),
        *ints_of(top_k),
        address_of(top_p),
        address_of(min_p),
        address_of(rule_requests),
        rule_requests is not None and rule_requests.dtype is torch.float32,
        token_ids.data_ptr(),
        token_ids.stride(0),
        token_ids.shape[1],
        token_ids.dtype is _INT64,
        *ints_of(num_sampled),
        rule,
        address_of(counters),
        address_of(notes),
    )


def run(entry, common: tuple[int, ...], own: tuple[int, ...], rows: str) -> int:
    """Run a compiled entry point on as many threads as pay.

    Args:
        entry: Of :func:`vllm_specopt.cpu.cache.compile_entry`.
        common: Of :func:`common_of`. own: What the entry alone is told; what is left out is 0.
        rows: How many rows a request may have, in words.

    Returns:
        How many rows emitted a token without a usable logit.

    Raises:
        ValueError: A request's arguments do not fit together.
    """
    num_reqs, num_rows, vocab_size = common[:3]
    num_workers = workers_for(num_reqs, num_rows * vocab_size)
    per_worker = memory_per_worker(vocab_size)
    memory = Memory.take(num_workers * per_worker)
    plan = (memory.address, per_worker, *common, *own)
    _JOB.pack_into(memory.job, 0, *_JOB_BEGINS, *plan, *(0,) * (PLAN_LENGTH - len(plan)))
    if num_workers > 1:
        openmp()(entry.address, memory.job_address, num_workers, 0)
    else:
        entry.ctypes(memory.job_address)
    bad_rows, misfit = int(memory.job[JOB_BAD_ROWS]), int(memory.job[JOB_MISFIT])
    Memory.idle.append(memory)
    if misfit:
        raise ValueError(
            f"request {misfit - 1}: cu_num_logits or state_indices points outside the other arguments "
            f"(expected {rows} rows per request, and indices below max_reqs)"
        )
    return bad_rows


def warm_up(dtype: torch.dtype = torch.bfloat16) -> None:
    """Compile the loops, or load them from the cache, so that the first request does not wait.

    Args:
        dtype: Logits dtype that will be served. All share one compiled version.
    """
    verify_batch(
        torch.zeros(1, 1, dtype=dtype),
        torch.tensor([0, 1]),
        torch.zeros(0, dtype=torch.int64),
        token_ids=torch.empty(1, 1, dtype=torch.int64),
        num_sampled=torch.empty(1, dtype=torch.int32),
    )


def workers_for(num_reqs: int, num_logits: int) -> int:
    """How many threads share a batch."""
    if num_reqs < 2 or num_logits < _MIN_LOGITS_TO_SPLIT or openmp() is None:
        return 1
    return min(torch.get_num_threads(), num_reqs)


def address_of(tensor: torch.Tensor | None) -> int:
    """Address of a tensor's first element; 0 if there is none."""
    return 0 if tensor is None else tensor.data_ptr()


def ints_of(tensor: torch.Tensor | None) -> tuple[int, int]:
    """Address of a tensor of indices, and whether they are 64 bits wide."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.dtype is _INT64)


@functools.lru_cache(maxsize=32)
def memory_per_worker(vocab_size: int) -> int:
    """Bytes that a thread computes in."""
    _, size = scratch_at.py_func(0, vocab_size)
    return -(-size // _ALIGNMENT) * _ALIGNMENT


@functools.lru_cache(maxsize=32)
def note_words(vocab_size: int) -> int:
    """64-bit words of a row's note."""
    return int(size_of_note.py_func(vocab_size)) // 8


class Memory:
    """The job of a call, and what its workers compute in. Calls give it back: fresh pages would cost a row's time."""

    idle: ClassVar[list[Memory]] = []

    def __init__(self, size: int):
        self.size, self.pages = size, np.empty(size + _ALIGNMENT, dtype=np.uint8)
        self.address = -(-self.pages.ctypes.data // _ALIGNMENT) * _ALIGNMENT
        self.job = np.empty(_JOB.size // 8, dtype=np.int64)
        self.job_address = self.job.ctypes.data

    @classmethod
    def take(cls, size: int) -> Memory:
        """Memory of at least so many bytes."""
        memory = cls.idle.pop() if cls.idle else None
        return memory if memory is not None and memory.size >= size else cls(size)


@functools.cache
def openmp():
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
