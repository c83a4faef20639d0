"""The audit's contract: do emitted tokens follow the distributions that they should have been drawn from?

One function, :func:`audit`, looks at the tokens of a step after they were emitted, by whatever sampler. Each has a
place in its row's distribution, v = P(tokens strictly more probable) + U P(tokens exactly as probable, itself
included), with U uniform and independent of the draw. If tokens follow their distributions, the places are independent
and uniform on (0, 1), whatever the prompts, parameters and drafts; they are counted in bins. What the counts say is
worked out by :mod:`vllm_specopt.evidence`.
"""

import functools
from collections.abc import Callable

import torch

from vllm_specopt.checks import INDEX_DTYPES, LOGIT_DTYPES, check_tensor
from vllm_specopt.evidence import COLUMNS
from vllm_specopt.verify import Notes, backend_name

NOT_AUDITED = -1.0
"""A temperature that leaves a request out: its tokens are counted as skipped."""


def new_counts(num_methods: int, device: torch.device | str) -> torch.Tensor:
    """Zeroed counts ``[num_methods, COLUMNS]`` int64: bins, impossible tokens, skipped tokens."""
    return torch.zeros(num_methods, COLUMNS, dtype=torch.int64, device=device)


def audit(
    logits: torch.Tensor,  # [num_rows, vocab]
    cu_num_logits: torch.Tensor,  # [num_reqs + 1], leading 0
    token_ids: torch.Tensor,  # [num_reqs, width]
    counts: torch.Tensor,  # [num_methods, COLUMNS]
    *,
    temperature: torch.Tensor,  # [max_reqs]
    seeds: torch.Tensor,  # [max_reqs]
    method: int = 0,
    num_sampled: torch.Tensor | None = None,  # [num_reqs]
    positions: torch.Tensor | None = None,  # [num_rows]
    state_indices: torch.Tensor | None = None,  # [num_reqs]
    top_k: torch.Tensor | None = None,  # [max_reqs]
    top_p: torch.Tensor | None = None,  # [max_reqs]
    min_p: torch.Tensor | None = None,  # [max_reqs]
    rule_requests: torch.Tensor | None = None,  # [max_reqs]
    notes: Notes | None = None,
    places: torch.Tensor | None = None,  # [num_reqs, width]
    backend: str | None = None,
) -> None:
    """Add the places of a step's tokens to the counts; no synchronisation on a GPU.

    Args:
        logits: Rows that tokens were to be drawn from, after logits processors and before temperature, as
            :func:`vllm_specopt.verify.verify` takes them; not modified.
        cu_num_logits: First row of each request, then the number of rows; int32 or int64.
        token_ids: What was emitted, int32 or int64: token i of a request was emitted at its row i.
        counts: int64, contiguous; see :func:`new_counts`. A token that its row's parameters forbid has the place 1: it
            is counted in the last bin, and as impossible. A row without a usable logit is counted as skipped.
        temperature: fp32. Greedy requests (below 1e-5, NaN) are not audited and not counted. Below 0: a request that
            samples and is to be left out, such as one with a seed of its own (two with the same seed draw alike, so
            that their places are not independent); its tokens are counted as skipped.
        seeds: int64; with the position what U is a function of. They may be the seeds of the draw.
        method: The row of the counts.
        num_sampled: int32 or int64, tokens of each request. None: -1 marks where there is none.
        positions, state_indices, top_k, top_p, min_p: As in ``verify``.
        rule_requests: bool, or fp32 above 0, for which entries ``method`` is the row of the counts; it is 0 for the
            others. None: for all.
        notes: As :func:`vllm_specopt.verify.verify` filled them in, for the same rows and parameters (temperatures may
            be below 0 here). None: the rows are swept anew.
        places: fp32 contiguous, set to the places, NaN where there is none. For tests.
        backend: As in ``verify``.

    Raises:
        ValueError: A shape, dtype, device or stride is wrong; the message names the argument, what it is and what it
            should be.
    """
    num_reqs = cu_num_logits.shape[0] - 1
    _check(**{name: value for name, value in locals().items() if name not in ("backend", "notes")})
    if num_reqs:
        given = {name: value for name, value in locals().items() if name not in ("backend", "num_reqs")}
        given["notes"] = None if notes is None else notes.left
        _backend(backend_name(logits.device, backend))(**given)


def _check(
    *, logits, cu_num_logits, token_ids, counts, method, num_reqs, state_indices, positions, places, **per_state
) -> None:
    check = functools.partial(check_tensor, logits.device)
    check("logits", logits, 2, LOGIT_DTYPES)
    check("cu_num_logits", cu_num_logits, 1, INDEX_DTYPES)
    check("token_ids", token_ids, 2, INDEX_DTYPES, num_reqs)
    check("num_sampled", per_state.pop("num_sampled"), 1, INDEX_DTYPES, num_reqs)
    check("state_indices", state_indices, 1, INDEX_DTYPES, num_reqs)
    check("positions", positions, 1, INDEX_DTYPES, logits.shape[0])
    check("counts", counts, 2, (torch.int64,))
    if counts.shape[1] != COLUMNS:
        raise ValueError(f"counts has {counts.shape[1]} columns, expected {COLUMNS}")
    if not 0 <= method < counts.shape[0]:
        raise ValueError(f"method is {method}, expected 0 to {counts.shape[0] - 1}")
    for name in ("temperature", "seeds"):
        if per_state[name] is None:
            raise ValueError(f"{name} is None, expected a tensor")
    size = None if state_indices is not None else num_reqs
    dtypes = {"seeds": (torch.int64,), "top_k": INDEX_DTYPES, "rule_requests": (torch.bool, torch.float32)}
    for name, tensor in per_state.items():
        check(name, tensor, 1, dtypes.get(name, (torch.float32,)), size)
    if places is not None:
        check("places", places, 2, (torch.float32,), num_reqs)
        if places.shape != token_ids.shape or not places.is_contiguous():
            raise ValueError(f"places has shape {tuple(places.shape)}, expected {tuple(token_ids.shape)}, contiguous")


@functools.cache
def _backend(name: str) -> Callable[..., None]:
    if name == "cpu":
        from vllm_specopt.cpu import audit as cpu

        return cpu.audit_batch
    from vllm_specopt.kernels import audit as kernels

    return kernels.audit_batch
