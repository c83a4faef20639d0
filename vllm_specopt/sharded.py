"""Verification where the logits are split over tensor-parallel ranks: what :func:`verify` decides, without a gather.

Each rank reads its own columns; a few numbers per row are exchanged, and every rank returns the same tokens, those that
:func:`vllm_specopt.verify.verify` returns for the whole logits: the partition of a row into tiles, the order of every
sum and the random numbers do not depend on the number of ranks.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from vllm_specopt.checks import check_arguments
from vllm_specopt.verify import Verified, backend_name


class Shard(NamedTuple):
    """A rank's part of the vocabulary.

    first: The first token it holds. columns: Tokens it holds, possibly none; its logits may have more columns, which
        are not looked at. vocab_size: Of the whole. widths: ``columns`` of every rank, in the order of the vocabulary.
    """

    first: int
    columns: int
    vocab_size: int
    rank: int
    ranks: int
    widths: tuple[int, ...]


@functools.lru_cache(maxsize=32)
def shards_of(vocab_size: int, ranks: int, padded_per_rank: int) -> tuple[Shard, ...]:
    """Shards of all ranks, where rank r holds the tokens from r ``padded_per_rank`` on; the last ranks may be empty.

    Args:
        vocab_size: Tokens, without padding.
        padded_per_rank: Columns of each rank, with padding.

    Raises:
        ValueError: The ranks hold fewer columns than there are tokens.
    """
    if ranks * padded_per_rank < vocab_size:
        raise ValueError(
            f"{ranks} ranks of {padded_per_rank} columns hold {ranks * padded_per_rank}, expected {vocab_size} or more"
        )
    firsts = [min(rank * padded_per_rank, vocab_size) for rank in range(ranks + 1)]
    widths = tuple(end - first for first, end in itertools.pairwise(firsts))
    return tuple(Shard(firsts[r], widths[r], vocab_size, r, ranks, widths) for r in range(ranks))


def verify_sharded(
    logits: torch.Tensor,  # [num_rows, at least shard.columns, and 1]
    cu_num_logits: torch.Tensor,  # [num_reqs + 1], leading 0
    draft_token_ids: torch.Tensor,  # [num_rows] or [num_rows - num_reqs]
    max_num_draft_tokens: int,
    *,
    shard: Shard,
    gather: Callable[[torch.Tensor], torch.Tensor],
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
    counters: torch.Tensor | None = None,  # [num_rules, 8]
    token_dtype: torch.dtype = torch.int64,
    backend: str | None = None,
) -> Verified:
    """Verify draft tokens exactly, on every rank alike.

    Filters are for the Triton backend, and bonus tokens must not be given beside them. Where more than one of a
    request's rows is flat, more tokens passing the filters than ranks exchange, the request may end before the second
    of them: with fewer tokens than :func:`vllm_specopt.verify.verify` returns, and the same ones.

    All arguments but ``logits`` and ``shard`` must be the same on all ranks, and all ranks must call. Those not named
    here are as in :func:`vllm_specopt.verify.verify`; draft rows are whole on every rank.

    Args:
        logits: Raw target logits of this rank's columns; what lies behind ``shard.columns`` is not read.
        shard: Which those are.
        gather: Called with one contiguous fp32 tensor of one dimension, of the same length on all ranks; returns the
            tensors of all ranks, ``[ranks, length]``, contiguous. Their bits count, as not all of them are numbers. At
            most two calls with one-hot drafts and four with sampled ones, one more with filters; one or two more on a
            CPU.
        counters: As in ``verify``. Rows read are all rows, on a CPU as well.

    Raises:
        ValueError: A shape, dtype, device or stride is wrong, or a shard, or filters stand where they cannot; the
            message names the argument.
    """
    num_reqs = check_arguments(
        logits=logits,
        cu_num_logits=cu_num_logits,
        draft_token_ids=draft_token_ids,
        max_num_draft_tokens=max_num_draft_tokens,
        temperature=temperature,
        seeds=seeds,
        positions=positions,
        state_indices=state_indices,
        draft_probs=draft_probs,
        draft_logits=draft_logits,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        bonus_token_ids=bonus_token_ids,
        bad_row_counter=bad_row_counter,
        rule=None,
        rule_requests=None,
        counters=counters,
        notes=None,
        token_dtype=token_dtype,
        backend=backend,
    )
    _check_shard(logits, shard)
    chosen, filters = backend_name(logits.device, backend), {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    given = {name: each for name, each in filters.items() if each is not None}
    if given:
        _check_filters(next(iter(given)), chosen, bonus_token_ids)
    token_ids = torch.empty(num_reqs, max_num_draft_tokens + 1, dtype=token_dtype, device=logits.device)
    num_sampled = torch.empty(num_reqs, dtype=torch.int32, device=logits.device)
    if num_reqs:
        _backend(chosen)(
            logits,
            cu_num_logits,
            draft_token_ids,
            widths=shard.widths,
            rank=shard.rank,
            gather=gather,
            token_ids=token_ids,
            num_sampled=num_sampled,
            temperature=temperature,
            seeds=seeds,
            positions=positions,
            state_indices=state_indices,
            draft_probs=draft_probs,
            draft_logits=draft_logits,
            bonus_token_ids=bonus_token_ids,
            bad_row_counter=bad_row_counter,
            counters=counters,
            **given,
        )
    return Verified(token_ids, num_sampled)


def _check_shard(logits: torch.Tensor, shard: Shard) -> None:
    """Raise ValueError unless a shard is one of its vocabulary's, and the logits have its columns."""
    if len(shard.widths) != shard.ranks or not 0 <= shard.rank < shard.ranks:
        raise ValueError(f"shard has rank {shard.rank} of {shard.ranks}, with {len(shard.widths)} widths")
    expected = (sum(shard.widths[: shard.rank]), shard.widths[shard.rank], sum(shard.widths))
    if shard[:3] != expected:
        raise ValueError(f"shard has first, columns, vocab_size {shard[:3]}, expected {expected} (by its widths)")
    if logits.shape[1] < shard.columns:
        raise ValueError(f"logits has {logits.shape[1]} columns, expected at least {shard.columns} (shard.columns)")


def _check_filters(name: str, backend: str, bonus_token_ids: torch.Tensor | None) -> None:
    """Raise ValueError where a filter is given beside something that is not verified sharded with it."""
    reasons = {
        "the cpu backend": backend == "cpu",
        "bonus_token_ids": bonus_token_ids is not None,
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"{name} is given beside {reason}: filtered rows are not verified sharded there")


@functools.cache
def _backend(name: str) -> Callable[..., Any]:
    if name == "cpu":
        from vllm_specopt.cpu.sharded import backend

        return backend.verify_shard
    from vllm_specopt.kernels.sharded import launch

    return launch.verify_shard
