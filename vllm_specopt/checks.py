"""What ``verify`` accepts: shapes, dtypes, devices and strides, told with both values where they are wrong."""

import functools

import torch

from vllm_specopt.rules import RULES, BudgetConstants

MAX_DRAFT_TOKENS = 128
BACKENDS = ("triton", "cpu")
LOGIT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INDEX_DTYPES = (torch.int32, torch.int64)


def names(dtypes) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def check_tensor(device, name, tensor, ndim, dtypes, size=None) -> None:
    """Raise ValueError unless a tensor, if there is one, has these dimensions, dtypes, device and length."""
    if tensor is None:
        return
    if tensor.ndim != ndim:
        raise ValueError(f"{name} has {tensor.ndim} dimensions, expected {ndim}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {names([tensor.dtype])}, expected one of {names(dtypes)}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device} (the device of logits)")
    if size is not None and tensor.shape[0] != size:
        raise ValueError(f"{name} has length {tensor.shape[0]}, expected {size}")
    if tensor.stride(-1) != 1 and tensor.numel() and tensor.shape[-1] > 1:
        raise ValueError(f"{name} has stride {tensor.stride(-1)} along its last dimension, expected 1")


def check_arguments(
    *,
    logits,
    cu_num_logits,
    draft_token_ids,
    max_num_draft_tokens,
    temperature,
    seeds,
    positions,
    state_indices,
    draft_probs,
    draft_logits,
    top_k,
    top_p,
    min_p,
    bonus_token_ids,
    bad_row_counter,
    rule,
    rule_requests,
    counters,
    notes,
    token_dtype,
    backend,
) -> int:
    """Raise ValueError on the first argument that breaks the contract; return the number of requests.

    Takes what ``verify`` takes; neither ``notes`` and ``backend`` nor what ``rule`` holds is checked here.
    """
    check = functools.partial(check_tensor, logits.device)
    check("logits", logits, 2, LOGIT_DTYPES)
    num_rows, vocab_size = logits.shape
    check("cu_num_logits", cu_num_logits, 1, INDEX_DTYPES)
    num_reqs = cu_num_logits.shape[0] - 1
    if num_reqs < 0:
        raise ValueError("cu_num_logits has length 0, expected at least 1 (a leading 0)")
    if not 0 <= max_num_draft_tokens <= MAX_DRAFT_TOKENS:
        raise ValueError(f"max_num_draft_tokens is {max_num_draft_tokens}, expected 0 to {MAX_DRAFT_TOKENS}")
    if not num_reqs <= num_rows <= num_reqs * (max_num_draft_tokens + 1):
        raise ValueError(
            f"logits has {num_rows} rows, expected {num_reqs} to {num_reqs * (max_num_draft_tokens + 1)} "
            f"({num_reqs} requests with at most {max_num_draft_tokens} draft tokens each)"
        )
    if vocab_size < 1:
        raise ValueError("logits has a vocabulary of 0 tokens, expected at least 1")
    check("draft_token_ids", draft_token_ids, 1, INDEX_DTYPES)
    num_tokens = num_rows - num_reqs
    if draft_token_ids.shape[0] not in (num_rows, num_tokens):
        raise ValueError(
            f"draft_token_ids has length {draft_token_ids.shape[0]}, expected {num_tokens} (draft tokens) "
            f"or {num_rows} (rows)"
        )
    check("state_indices", state_indices, 1, INDEX_DTYPES, num_reqs)
    check("positions", positions, 1, INDEX_DTYPES, num_rows)
    check("bonus_token_ids", bonus_token_ids, 1, INDEX_DTYPES, num_reqs)
    check("bad_row_counter", bad_row_counter, 1, (torch.int64,), 1)
    check("counters", counters, 2, (torch.int64,))
    if counters is not None and counters.shape[1] != 8:
        raise ValueError(f"counters has {counters.shape[1]} columns, expected 8")
    if counters is not None and counters.shape[0] < len(RULES):
        raise ValueError(f"counters has {counters.shape[0]} rows, expected at least {len(RULES)}")
    per_request = None if state_indices is not None else num_reqs
    check("temperature", temperature, 1, (torch.float32,), per_request)
    check("seeds", seeds, 1, (torch.int64,), per_request)
    check("top_k", top_k, 1, INDEX_DTYPES, per_request)
    check("top_p", top_p, 1, (torch.float32,), per_request)
    check("min_p", min_p, 1, (torch.float32,), per_request)
    is_budget = isinstance(rule, BudgetConstants)
    check("rule_requests", rule_requests, 1, (torch.bool, torch.float32) if is_budget else (torch.bool,), per_request)
    if temperature is not None and seeds is None:
        raise ValueError("seeds is None, expected a tensor (temperature is given)")
    if draft_probs is not None and draft_logits is not None:
        raise ValueError("draft_probs and draft_logits are both given, expected at most one")
    check("draft_probs", draft_probs, 2, LOGIT_DTYPES, num_tokens)
    check("draft_logits", draft_logits, 3, LOGIT_DTYPES, per_request)
    if draft_logits is not None and draft_logits.shape[1] < max_num_draft_tokens:
        raise ValueError(
            f"draft_logits has {draft_logits.shape[1]} positions, expected at least {max_num_draft_tokens}"
        )
    if rule is None and rule_requests is not None:
        raise ValueError("rule is None, expected a rule's constants (rule_requests is given)")
    if is_budget and temperature is not None and not (draft_probs is None and draft_logits is None):
        given = "draft_logits" if draft_probs is None else "draft_probs"
        raise ValueError(f"{given} is given, expected None (the budget rule bounds its price for one-hot drafts only)")
    if token_dtype not in INDEX_DTYPES:
        raise ValueError(f"token_dtype is {token_dtype}, expected one of {names(INDEX_DTYPES)}")
    return num_reqs
