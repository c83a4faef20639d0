"""Verification of a batch in float64; arguments and meaning as in ``vllm_specopt.verify.verify``."""

import math
from typing import NamedTuple

import torch

from vllm_specopt.kernels.reference.block import block_ref
from vllm_specopt.kernels.reference.budget import budget_test_ref
from vllm_specopt.kernels.reference.exact import match_ref, ratio_test_ref
from vllm_specopt.kernels.reference.rows import argmax_ref, draft_distribution_ref, target_row_ref
from vllm_specopt.kernels.reference.sigmoid import sigmoid_test_ref
from vllm_specopt.kernels.reference.typical import typical_test_ref

GREEDY_BELOW, WARMEST = 1e-5, 1e30


class Reference(NamedTuple):
    """Outputs of the reference.

    token_ids: ``[num_reqs, K + 1]`` int64, -1 padded. num_sampled: ``[num_reqs]`` int32.
    margin: per request, how far its closest decision is from going the other way (infinite where nothing was close).
        For a draw it is the distance from the nearest boundary of the running sum, for a test a relative difference.
    bad_rows: number of emitting rows without a usable logit.
    """

    token_ids: torch.Tensor
    num_sampled: torch.Tensor
    margin: list[float]
    bad_rows: int


def verify_ref(
    logits: torch.Tensor,  # [num_rows, vocab]
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
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
    rule=None,
    rule_requests: torch.Tensor | None = None,  # [max_reqs]
) -> Reference:
    """Verify a batch, request by request and row by row."""
    num_reqs, starts = cu_num_logits.shape[0] - 1, cu_num_logits.tolist()
    num_rows, vocab_size = logits.shape
    draft = draft_probs if draft_probs is not None else draft_logits
    if draft is not None:
        vocab_size = min(vocab_size, draft.shape[-1])
    compact = draft_token_ids.shape[0] != num_rows
    token_ids = torch.full((num_reqs, max_num_draft_tokens + 1), -1, dtype=torch.int64)
    num_sampled = torch.zeros(num_reqs, dtype=torch.int32)
    margins, bad_rows = [], 0
    emitted: int | None

    for req in range(num_reqs):
        state = req if state_indices is None else int(state_indices[req])
        num_drafts = starts[req + 1] - starts[req] - 1
        temp = 0.0 if temperature is None else float(temperature[state])
        temp = min(temp, WARMEST) if temp >= GREEDY_BELOW else 0.0
        filters = (
            0 if top_k is None else int(top_k[state]),
            1.0 if top_p is None else float(top_p[state]),
            0.0 if min_p is None else float(min_p[state]),
        )
        is_filtered = 1 <= filters[0] < vocab_size or filters[1] < 1 or filters[2] > 0
        name = rule.NAME if rule is not None and (rule_requests is None or bool(rule_requests[state])) else "exact"
        margin = math.inf
        if name == "block" and draft is not None and seeds is not None and temp >= GREEDY_BELOW:
            rows = range(starts[req], starts[req + 1])
            tokens = [int(draft_token_ids[row - req if compact else row + 1]) for row in rows[:-1]]
            length = next((i for i, token in enumerate(tokens) if not 0 <= token < vocab_size), num_drafts)
            found = [target_row_ref(logits[row, :vocab_size].cpu(), temp, *filters) for row in rows[: length + 1]]
            drafted = draft[rows[0] - req :] if draft is draft_probs else draft[state]
            accepted, emitted, margin = block_ref(
                [probs for _, probs, _ in found],
                [
                    draft_distribution_ref(row[:vocab_size].cpu(), None if draft_probs is not None else temp)
                    for row in drafted[:length]
                ],
                tokens[:length],
                int(seeds[state]),
                list(range(length + 1)) if positions is None else positions[rows[0] : rows[length] + 1].tolist(),
            )
            token_ids[req, :accepted] = torch.tensor(tokens[:accepted])
            if accepted == num_drafts and bonus_token_ids is not None:
                emitted = int(bonus_token_ids[req])
            bad_rows += int(emitted < 0)
            token_ids[req, accepted] = max(emitted, 0)
            num_sampled[req] = accepted + 1
            margins.append(min(margin, *[row_margin for _, _, row_margin in found]))
            continue
        for i in range(num_drafts + 1):
            row = starts[req] + i
            token = -1
            if i < num_drafts:
                token = int(draft_token_ids[row - req if compact else row + 1])
                token = token if 0 <= token < vocab_size else -1
            elif bonus_token_ids is not None:
                emitted = int(bonus_token_ids[req])
                break
            target_row = logits[row, :vocab_size].cpu()
            if temp < GREEDY_BELOW:
                emitted = argmax_ref(target_row)
                if token != emitted:
                    bad_rows += int(not (target_row.double() > -math.inf).any())
                    break
                token_ids[req, i] = token
                continue

            assert seeds is not None, "requests at a temperature have seeds"
            seed, position = int(seeds[state]), i if positions is None else int(positions[row])
            _, target_probs, row_margin = target_row_ref(target_row, temp, *filters)
            draft_row = None
            if draft_probs is not None and token >= 0:
                draft_row = draft_probs[row - req, :vocab_size].cpu()
            elif draft_logits is not None and token >= 0:
                draft_row = draft_logits[state, i, :vocab_size].cpu()
            if name == "sigmoid" and token >= 0:
                is_probs = draft_probs is not None
                emitted, token_margin = sigmoid_test_ref(
                    target_row, target_probs, temp, is_filtered, draft_row, is_probs, token, seed, position, rule
                )
                row_margin = row_margin if is_filtered else math.inf
            elif name == "typical" and token >= 0:
                plain_probs = target_row_ref(target_row, temp)[1]
                emitted, token_margin = typical_test_ref(plain_probs, target_probs, token, seed, position, rule)
            elif name == "budget" and token >= 0:
                delta = rule.delta if rule_requests is None or rule_requests.dtype == torch.bool else (
                    float(rule_requests[state])
                )  # fmt: skip
                emitted, token_margin = budget_test_ref(target_probs, token, seed, position, delta)
            elif draft_row is None:
                emitted, token_margin = match_ref(target_probs, token, seed, position)
            else:
                draft_row = draft_distribution_ref(draft_row, None if draft_probs is not None else temp)
                emitted, token_margin = ratio_test_ref(target_probs, draft_row, token, seed, position)
            margin = min(margin, row_margin, token_margin)
            if emitted is not None:
                bad_rows += int(emitted < 0)
                emitted = max(emitted, 0)
                break
            token_ids[req, i] = token
        assert emitted is not None, "the last row always emits"
        token_ids[req, i] = emitted
        num_sampled[req] = i + 1
        margins.append(margin)
    return Reference(token_ids, num_sampled, margins, bad_rows)
