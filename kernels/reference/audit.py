"""The audit in float64: where an emitted token lies in the distribution that it should have been drawn from.

A token's place is v = P(tokens strictly more probable) + U P(tokens exactly as probable, itself included), with the
distribution P after temperature and filters and U uniform, independent of the draw. If tokens follow P, their places
are independent and uniform on (0, 1), whatever P is.
"""

import itertools
import math
from typing import NamedTuple

import torch

from vllm_specopt.kernels.reference.noise import AUDIT, draw_uniform_ref
from vllm_specopt.kernels.reference.rows import clean_ref, target_row_ref
from vllm_specopt.kernels.reference.verify import GREEDY_BELOW, WARMEST


class Audited(NamedTuple):
    """Outputs of the reference.

    places: ``[num_reqs, width]`` float64; NaN for what is not audited, 1 for a token that cannot have been drawn.
    margins: ``[num_reqs, width]`` float64, how far a row's closest filter decision is from going the other way.
    impossible, skipped: how many tokens could not have been drawn, and how many were drawn but not audited.
    """

    places: torch.Tensor
    margins: torch.Tensor
    impossible: int
    skipped: int


def is_possible_ref(kept: torch.Tensor, token: int) -> bool:
    """Whether a token is in the vocabulary and has a logit in ``kept``, a row after filters."""
    return 0 <= token < len(kept) and bool(kept[token] > -math.inf)


def place_ref(row: torch.Tensor, probs: torch.Tensor, token: int, uniform: float) -> float:
    """The place of a possible token.

    Args:
        row: ``[vocab]`` logits, which say what is as probable as what.
        probs: ``[vocab]`` float64, their distribution after temperature and filters.
        token: The emitted token.
        uniform: U, in (0, 1).
    """
    row = clean_ref(row)
    above, equal = (float(probs[chosen].sum()) for chosen in (row > row[token], row == row[token]))
    return min(above + uniform * equal, 1.0)


def audit_ref(
    logits: torch.Tensor,  # [num_rows, vocab]
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    token_ids: torch.Tensor,  # [num_reqs, width]
    *,
    temperature: torch.Tensor,  # [max_reqs]
    seeds: torch.Tensor,  # [max_reqs]
    num_sampled: torch.Tensor | None = None,  # [num_reqs]
    positions: torch.Tensor | None = None,  # [num_rows]
    state_indices: torch.Tensor | None = None,  # [num_reqs]
    top_k: torch.Tensor | None = None,  # [max_reqs]
    top_p: torch.Tensor | None = None,  # [max_reqs]
    min_p: torch.Tensor | None = None,  # [max_reqs]
) -> Audited:
    """Audit the tokens of a batch one by one; arguments as in ``vllm_specopt.audit.audit``."""
    places = torch.full(token_ids.shape, math.nan, dtype=torch.float64)
    margins = torch.full(token_ids.shape, math.inf, dtype=torch.float64)
    impossible = skipped = 0
    starts = cu_num_logits.tolist()
    for req, (start, end) in enumerate(itertools.pairwise(starts)):
        state = req if state_indices is None else int(state_indices[req])
        temp = float(temperature[state])
        filters = (
            0 if top_k is None else int(top_k[state]),
            1.0 if top_p is None else float(top_p[state]),
            0.0 if min_p is None else float(min_p[state]),
        )
        for i, token in enumerate(token_ids[req, : end - start].tolist()):
            if token == -1 if num_sampled is None else i >= num_sampled[req]:
                continue
            if temp < 0:
                skipped += 1
            elif temp >= GREEDY_BELOW:
                row = logits[start + i].cpu()
                kept, probs, margins[req, i] = target_row_ref(row, min(temp, WARMEST), *filters)
                if not probs.any():
                    skipped += 1
                    continue
                position = i if positions is None else int(positions[start + i])
                uniform = draw_uniform_ref(int(seeds[state]), position, AUDIT)
                is_possible = is_possible_ref(kept, token)
                places[req, i] = place_ref(row, probs, token, uniform) if is_possible else 1.0
                impossible += not is_possible
    return Audited(places, margins, impossible, skipped)
