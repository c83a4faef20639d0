"""The verification contract: which draft tokens survive, and which token follows them.

One function, :func:`verify`, stands between vLLM's model runners and the backends. It checks its arguments, allocates
the outputs and picks the backend by device: Triton kernels on a GPU (and under Triton's interpreter), compiled loops on
a CPU. Nothing of size ``[rows, vocab]`` is allocated here or below.

Rules (``vllm_specopt.rules``): exact and block keep the target's distribution; sigmoid (arXiv 2406.11016), typical and
budget do not.

A request with ``K_r`` draft tokens owns ``K_r + 1`` consecutive rows of target logits (``K_r = 0`` is allowed: one
token is drawn): row ``i`` verifies draft token ``i``, the last row gives the bonus token.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm_specopt.checks import BACKENDS, check_arguments
from vllm_specopt.rules import BlockConstants, BudgetConstants, Constants, SigmoidConstants, TypicalConstants, place_of


class Verified(NamedTuple):
    """What one verification step decided.

    token_ids: ``[num_reqs, max_num_draft_tokens + 1]``, accepted draft tokens, one recovered or bonus token, then -1.
    num_sampled: ``[num_reqs]`` int32, accepted draft tokens + 1.
    """

    token_ids: torch.Tensor
    num_sampled: torch.Tensor


@dataclass
class Notes:
    """What a verification knows of its rows beside their tokens: it fills this in for the audit of the same step.

    wanted: Whether to fill it in.
    left: In the backend's own form; None where there is nothing that an audit could use, which then sweeps the rows.
    """

    wanted: bool = True
    left: Any = None


def verify(
    logits: torch.Tensor,  # [num_rows, vocab]
    cu_num_logits: torch.Tensor,  # [num_reqs + 1], leading 0
    draft_token_ids: torch.Tensor,  # [num_rows] or [num_rows - num_reqs]
    max_num_draft_tokens: int,
    *,
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
    rule: Constants | None = None,
    rule_requests: torch.Tensor | None = None,  # [max_reqs]
    counters: torch.Tensor | None = None,  # [num_rules, 8]
    notes: Notes | None = None,
    token_dtype: torch.dtype = torch.int64,
    backend: str | None = None,
) -> Verified:
    """Verify draft tokens, exactly unless another ``rule`` is given.

    Exact: each row has a token, drawn by inversion from its distribution after temperature, min-p, top-k and top-p (in
    this order; every token equal to a threshold value is kept), with a random number that is a function of (seed,
    absolute position) alone. A one-hot draft survives where it equals the row's token; at the first row where it does
    not, that token is emitted. So what is emitted at a position depends neither on the drafts nor on their number.
    A sampled draft x (``draft_probs`` or ``draft_logits``) survives when ``u_i <= target_prob_i(x) / draft_prob_i(x)``
    (Leviathan et al. 2211.17192, Chen et al. 2302.01318); at the first rejection one recovered token is drawn from the
    normalised ``max(target_prob_i - draft_prob_i, 0)``. If all survive, the last row's token is the bonus token. With
    temperature 0 a row's token is its argmax. The emitted tokens follow the target's distribution.

    Sigmoid (Wagner et al. 2406.11016): the element-wise ``score(z) = sigmoid((z / T - alpha) / (beta - alpha))`` takes
    the place of both probabilities, so that testing a draft token reads two numbers and no row. The token that follows
    a rejection is drawn from the normalised ``max(target_score_i - draft_score_i, 0)``, or from the target's
    distribution where that is empty. The emitted tokens do NOT follow the target's distribution.

    Block (Sun et al. 2403.10444): sampled drafts are judged as a whole, which keeps longer prefixes on average and the
    target's distribution. One-hot drafts are verified exactly: nothing can be gained there.

    Typical (Cai et al. 2401.10774): a draft token also survives where its probability exceeds
    ``min(epsilon, delta exp(-H))``, H the entropy of its row, both after temperature and before filters; else its row's
    own token decides, as for one-hot drafts. What a token was drafted from is not read. NOT the target's distribution.

    Budget: a one-hot draft of probability p survives with the largest probability h for which
    ``KL(Bernoulli(h), Bernoulli(p)) <= delta``; else the row's token that is not the draft is emitted. NOT the target's
    distribution, but each verified token's differs from it by at most ``delta`` nats of KL divergence.

    Args:
        logits: Raw target logits, bf16, fp16 or fp32; unit stride along the vocabulary, any row stride. Not modified.
        cu_num_logits: First row of each request, then the number of rows; int32 or int64.
        draft_token_ids: int32 or int64. Either ``[num_rows - num_reqs]``, the draft tokens alone, or ``[num_rows]``,
            the token fed to the target at each row, so that row i verifies entry i + 1. A negative or out-of-range id
            is a placeholder: it is rejected and the token that follows comes from the full target row.
        max_num_draft_tokens: Upper bound of K_r, 0..128; fixes the width of the output.
        temperature: fp32, 0 (or anything below 1e-5, or NaN) = greedy; above 1e30 and infinite: 1e30, at which every
            usable token is alike. None: all requests are greedy.
        seeds: int64, one per request; required unless all requests are greedy.
        positions: Absolute position of each row, int64 or int32. Random numbers are a pure function of (seed, position,
            purpose). None: the row's index within its request.
        state_indices: Where each request's entry is in ``temperature``, ``seeds``, ``top_k``, ``top_p``, ``min_p`` and
            ``draft_logits``; int32 or int64. None: request r is entry r.
        draft_probs: Distribution each draft token was drawn from, fp32, bf16 or fp16.
        draft_logits: The same as logits before temperature; entry ``[state index, i]`` belongs to row i.
            With neither, the draft distribution is one-hot. A draft vocabulary narrower than the target's narrows both.
        top_k: int32 or int64; values < 1 or >= vocab keep everything. None: not used in this batch.
        top_p: fp32; values >= 1 and NaN keep everything, values <= 0 what equals the largest. None: not used in this
            batch.
        min_p: fp32; values <= 0 and NaN keep everything, values >= 1 what equals the largest. None: not used in this
            batch.
        bonus_token_ids: If given, used in place of a drawn bonus token.
        bad_row_counter: int64, increased by the number of emitting rows without a usable logit (all NaN or -inf; such
            a row emits token 0). NaN counts as -inf; a +inf logit takes all probability of its row.
        rule: Constants of another rule (``vllm_specopt.rules``), which requests then follow instead of the exact one.
            None: all requests are exact. These stay as they are: temperature 0; placeholders, of which the first ends a
            block; min-p, top-k and top-p (a draft token they remove is rejected, and the token that follows is one they
            keep); and the bonus token, drawn from the target's distribution. Sigmoid: a token with logit -inf or NaN,
            or probability 0, scores 0, and a draft token that scores 0 on either side is rejected. With ``draft_probs``
            their logarithm stands in for z / T. With one-hot drafts, a case the paper does not have, the draft token's
            own score is 1: it survives with probability ``target_score(x)``, and the token that follows a rejection has
            the target's distribution without x.
        rule_requests: bool, which entries follow the rule. None: all. Needs ``rule``. For the budget also fp32: each
            entry's own delta, 0 being exact.
        counters: int64, a row for each rule of the registry (greedy requests are exact ones, and so are those with
            one-hot drafts under the block rule), increased by the number of draft tokens accepted, of recovered tokens,
            of bonus tokens (of requests with draft tokens), of rows read in full, of rows that were not, and of
            divergence spent by the budget rule (in units of 2^-20 nats). Contiguous.
        notes: Filled in for :func:`vllm_specopt.audit.audit` of the same rows with the same parameters, which then need
            not sweep them again.
        token_dtype: int32 or int64, of the returned ids.
        backend: ``triton`` or ``cpu``. None: by device. Triton on a CPU device needs its interpreter (the V2
            runner on a CPU runs that way).

    Raises:
        ValueError: A shape, dtype, device or stride is wrong; the message names the argument, what it is and what it
            should be.

    Example:
        Two requests, greedy: the first has its draft token accepted and gets a bonus token, the second has its draft
        token rejected.

        >>> import torch
        >>> logits = torch.zeros(4, 5)  # two rows each: one for the draft token, one for the bonus token
        >>> logits[[0, 1, 2, 3], [1, 2, 3, 4]] = 40.0
        >>> rows, drafts = torch.tensor([0, 2, 4]), torch.tensor([1, 0])
        >>> verify(logits, rows, drafts, 1)
        Verified(token_ids=tensor([[ 1,  2],
                [ 3, -1]]), num_sampled=tensor([2, 1], dtype=torch.int32))

        At a temperature every request has a seed; these rows leave chance no room.

        >>> verify(logits, rows, drafts, 1, temperature=torch.ones(2), seeds=torch.tensor([7, 8])).token_ids
        tensor([[ 1,  2],
                [ 3, -1]])
    """
    num_reqs = check_arguments(**locals())
    is_one_hot = draft_probs is None and draft_logits is None
    if temperature is None or (isinstance(rule, BlockConstants) and is_one_hot):
        rule = rule_requests = None
    token_ids = torch.empty(num_reqs, max_num_draft_tokens + 1, dtype=token_dtype, device=logits.device)
    num_sampled = torch.empty(num_reqs, dtype=torch.int32, device=logits.device)
    if num_reqs:
        left = _backend(backend_name(logits.device, backend))(
            logits=logits,
            cu_num_logits=cu_num_logits,
            draft_token_ids=draft_token_ids,
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
            rule=place_of(rule),
            constants=_packed(rule, draft_probs is not None, logits.device),
            rule_requests=rule_requests,
            counters=counters,
            token_ids=token_ids,
            num_sampled=num_sampled,
            takes_notes=notes is not None and notes.wanted,
        )
        if notes is not None:
            draft = draft_probs if draft_probs is not None else draft_logits
            # A draft vocabulary that narrows the rows makes other rows of them.
            is_narrowed = draft is not None and draft.shape[-1] < logits.shape[1]
            notes.left = None if is_narrowed else left
    return Verified(token_ids, num_sampled)


@functools.cache
def backend_name(device: torch.device, backend: str | None = None) -> str:
    """Name of the backend that serves a device, ``triton`` or ``cpu``; ``backend`` overrides the choice by device.

    Raises:
        ValueError: No backend serves this device.
    """
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"logits are on {device.type}, expected cuda or cpu")
    if device.type == "cuda" and backend == "cpu":
        raise ValueError("backend is 'cpu', expected 'triton' (logits are on cuda)")
    return backend or ("triton" if device.type == "cuda" else "cpu")


@functools.cache
def _backend(name: str) -> Callable[..., Any]:
    if name == "cpu":
        from vllm_specopt import cpu

        return cpu.verify_batch
    from vllm_specopt.kernels import launch

    return launch.verify_batch


@functools.lru_cache(maxsize=32)
def _packed(constants: Constants | None, draft_is_probs: bool, device: torch.device) -> torch.Tensor | None:
    """A rule's constants as the backends take them, fp32; kept, so that only a first call copies to the device.

    Typical: epsilon, delta. Budget: delta. Sigmoid: see below.

    Raises:
        ValueError: A constant is out of range.
    """
    if isinstance(constants, SigmoidConstants):
        values = _sigmoid_values(constants, draft_is_probs)
    elif isinstance(constants, TypicalConstants):
        if not (0 <= constants.epsilon <= 1 and 0 <= constants.delta < math.inf):
            raise ValueError(f"rule is {constants}, expected epsilon from 0 to 1 and a finite delta of at least 0")
        values = [constants.epsilon, constants.delta]
    elif isinstance(constants, BudgetConstants):
        if not 0 <= constants.delta < math.inf:
            raise ValueError(f"rule is {constants}, expected a finite delta of at least 0")
        values = [constants.delta]
    else:
        return None
    return torch.tensor(values, dtype=torch.float64).to(torch.float32).to(device)


def _sigmoid_values(constants: SigmoidConstants, draft_is_probs: bool) -> list[float]:
    """What scores are computed with.

    Target scale, shift, lower and upper limit; the same for the draft; draft scale - target scale, and the same for
    the shifts. A score is sigmoid(z / T * scale + shift); limits are compared with z / T, or with draft probabilities.
    """
    sides = []
    for side in ("target", "draft"):
        alpha, beta = getattr(constants, f"{side}_alpha"), getattr(constants, f"{side}_beta")
        if not (math.isfinite(alpha) and math.isfinite(beta) and alpha < beta):
            raise ValueError(f"rule has {side}_alpha {alpha} and {side}_beta {beta}, expected finite, alpha < beta")
        limits = torch.tensor([alpha, beta] if constants.clip else [-math.inf, math.inf], dtype=torch.float64)
        if side == "draft" and draft_is_probs:
            limits = limits.exp()
        sides.append([1 / (beta - alpha), -alpha / (beta - alpha), *limits.tolist()])
    target, draft = sides
    return [*target, *draft, draft[0] - target[0], draft[1] - target[1]]
