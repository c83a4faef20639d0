"""The definition of correct: exact and sigmoid verification in float64, one token at a time, with the kernels' noise.

Every backend must return the token ids that :func:`exact_verify_ref` returns, except where its ``margin`` says that two
outcomes lie closer together than single precision can tell apart. Imported by tests and benchmarks only.

Randomness is counter-based. Philox4x32-10 (Salmon et al., SC'11) with the request's seed as key and (purpose, position)
as counter gives four 32-bit words a row: acceptance uses the first word; for a token draw the first two key a hash of
the token id, so that each token's noise is a pure function of (seed, position, purpose, token id).
"""

import math
from typing import NamedTuple

import torch

ACCEPTANCE, RECOVERED, BONUS = 0, 1, 2
STREAM = 0x53504543
GREEDY_BELOW = 1e-5
MASK32 = 0xFFFFFFFF


class Reference(NamedTuple):
    """Outputs of the reference.

    token_ids: ``[num_reqs, K + 1]`` int64, -1 padded. num_sampled: ``[num_reqs]`` int32.
    margin: per request, distance of its closest decision from going the other way (relative to the quantities
        compared; infinite where nothing was close). bad_rows: number of emitting rows without a usable logit.
    """

    token_ids: torch.Tensor
    num_sampled: torch.Tensor
    margin: list[float]
    bad_rows: int


def philox_ref(seed: int, position: int, purpose: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 with key = seed (low word first) and counter = (purpose, position low, position high, STREAM)."""
    key = [seed & MASK32, (seed >> 32) & MASK32]
    c = [purpose, position & MASK32, (position >> 32) & MASK32, STREAM]
    for _ in range(10):
        high_a, low_a = divmod(0xD2511F53 * c[0], 1 << 32)
        high_b, low_b = divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [high_b ^ c[1] ^ key[0], low_b, high_a ^ c[3] ^ key[1], low_a]
        key = [(key[0] + 0x9E3779B9) & MASK32, (key[1] + 0xBB67AE85) & MASK32]
    return tuple(c)


def acceptance_uniform_ref(seed: int, position: int) -> float:
    """The u of the acceptance test: 23 bits centred in their cells, so in (0, 1) and exact in single precision."""
    return ((philox_ref(seed, position, ACCEPTANCE)[0] >> 9) + 0.5) * 2.0**-23


def _mix32(x: torch.Tensor) -> torch.Tensor:
    """The 32-bit finaliser "lowbias32" of C. Wellons' hash-prospector, on int64 tensors that hold 32-bit values."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK32
    return x ^ (x >> 16)


def exponential_ref(seed: int, position: int, purpose: int, vocab_size: int) -> torch.Tensor:
    """Standard exponential noise of every token id, ``[vocab]`` float64: -log(1 - v), v from 32 hashed bits."""
    key0, key1, _, _ = philox_ref(seed, position, purpose)
    bits = _mix32(_mix32((torch.arange(vocab_size) + key0) & MASK32) ^ key1)
    # v is rounded to single precision, as the kernels hold it, and kept below 1.
    v = ((bits.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24).double()
    return -torch.log1p(-v)


def filter_row_ref(scaled: torch.Tensor, top_k: int, top_p: float, min_p: float) -> tuple[torch.Tensor, float]:
    """Apply min-p, then top-k, then top-p to one row of logits after temperature; ties with a threshold are kept.

    min-p keeps probabilities >= min_p * the largest; top-k keeps values >= the k-th largest; top-p keeps a value while
    the mass of strictly larger ones is below top_p of what the first two kept.

    Returns the row with removed tokens at -inf, and the margin of the closest decision.
    """
    vocab_size, margin = scaled.shape[0], math.inf
    if scaled.max() in (math.inf, -math.inf):
        return scaled, margin
    if min_p > 0:
        gap = scaled - scaled.max() - math.log(min_p)
        margin = min([margin, *gap[scaled < scaled.max()].abs().tolist()])
        scaled = scaled.masked_fill(gap < 0, -math.inf)
    if 1 <= top_k < vocab_size:
        scaled = scaled.masked_fill(scaled < scaled.sort(descending=True).values[top_k - 1], -math.inf)
    if top_p < 1:
        probs, order = scaled.softmax(0).sort(descending=True, stable=True)
        values = scaled[order]
        first_equal = torch.searchsorted(-values, -values)
        mass_above = (probs.cumsum(0) - probs)[first_equal]
        margin = min(margin, (mass_above[probs > 0] - top_p).abs().min().item())
        scaled = scaled.masked_fill(scaled < values[(mass_above < top_p) | (first_equal == 0)].min(), -math.inf)
    return scaled, margin


def target_row_ref(logits: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float):
    """One row of target logits -> (scaled and filtered logits float64, probabilities float64, margin).

    NaN counts as -inf. A row with +inf is one-hot on it (uniform over several). A row without a finite value has
    probability 0 everywhere.
    """
    row = logits.double()
    row = torch.where(row.isnan(), -math.inf, row)
    if (row == math.inf).any():
        row = torch.where(row == math.inf, 0.0, -math.inf)
    scaled, margin = filter_row_ref(row / temperature, top_k, top_p, min_p)
    probs = scaled.softmax(0) if scaled.max() > -math.inf else torch.zeros_like(scaled)
    return scaled, probs, margin


def acceptance_probability_ref(target_prob: float, draft_prob: float) -> float:
    """Probability that a draft token survives: min(1, target_prob / draft_prob); 0 where draft_prob is 0."""
    return min(1.0, float(target_prob / draft_prob)) if draft_prob > 0 else 0.0


def residual_ref(target_probs: torch.Tensor, draft_probs: torch.Tensor) -> torch.Tensor:
    """Weights of the recovered token, ``[vocab]``: max(target - draft, 0); the target's where nothing is left."""
    weights = (target_probs - draft_probs).clamp(min=0)
    return weights if (weights > 0).any() else target_probs


def sigmoid_score_ref(
    values: torch.Tensor, temperature: float | None, alpha: float, beta: float, clip: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Score sigmoid((z / T - alpha) / (beta - alpha)) of arXiv 2406.11016, which takes the place of a probability.

    Args:
        values: Logits z, or probabilities (whose logarithm stands in for z / T) where ``temperature`` is None.
        temperature: T, or None.
        alpha, beta: The constants of this side.
        clip: Scores are 0 where z / T < alpha and 1 where z / T > beta, as in the released code. Decided in single
            precision as z < alpha * T (or probability < exp(alpha)), so that every backend decides alike.

    Returns:
        Scores and the sigmoid's arguments, float64. NaN, -inf and probability 0 have score 0; +inf has score 1.
    """
    values = torch.where(values.isnan(), -math.inf if temperature is not None else 0.0, values)
    if temperature is None:
        values = values.clamp(min=0)
        scaled, limits = values.double().log(), torch.tensor([alpha, beta]).double().exp().float()
    else:
        scaled, limits = values.double() / temperature, torch.tensor([alpha, beta]) * torch.tensor(temperature)
    arguments = (scaled - alpha) / (beta - alpha)
    scores = arguments.sigmoid()
    if clip:
        scores = torch.where(values.float() < limits[0], 0.0, torch.where(values.float() > limits[1], 1.0, scores))
    return torch.where(scaled == math.inf, 1.0, scores), arguments


def _draw_ref(
    weights: torch.Tensor, exponential: torch.Tensor, cancels: torch.Tensor | None = None
) -> tuple[int, float]:
    """Exponential race: the token with the largest weight / exponential, first one on a tie; and the winning margin.

    cancels: By how much the rounding of each weight exceeds its own precision, at least 1; lowers the margin.
    """
    score = weights.log() - exponential.log()
    best = score.max()
    winner = int((score == best).nonzero()[0])
    lead = best - score
    if cancels is not None:
        lead = lead / torch.maximum(cancels, cancels[winner])
    others = lead[score < best]
    return winner, others.min().item() if len(others) else math.inf


def _argmax_ref(row: torch.Tensor) -> int:
    row = torch.where(row.isnan(), -math.inf, row.double())
    return int((row == row.max()).nonzero()[0])


def _sigmoid_row_ref(target_row, temp, filters, draft_row, draft_temp, token, seed, pos, constants):
    """Judge one draft token by its scores: (margin, None if it survives, else the recovered token or -1 for a bad row).

    draft_row: Draft logits (with their temperature) or probabilities (``draft_temp`` None); None for a one-hot draft.
    token: The draft token, -1 if it is a placeholder.
    """
    target_constants = constants.target_alpha, constants.target_beta, constants.clip
    draft_constants = constants.draft_alpha, constants.draft_beta, constants.clip
    vocab_size = target_row.shape[0]
    scaled, probs, filter_margin = target_row_ref(target_row, temp, *filters)
    margin, allowed = math.inf, torch.ones(vocab_size, dtype=torch.bool)
    if 1 <= filters[0] < vocab_size or filters[1] < 1 or filters[2] > 0:
        margin, allowed = filter_margin, scaled > -math.inf
    target_score, target_argument = sigmoid_score_ref(target_row, temp, *target_constants)
    target_score = target_score.where(allowed, 0.0)
    draft_score, draft_argument = torch.ones(vocab_size, dtype=torch.float64), None
    if draft_row is not None:
        draft_score, draft_argument = sigmoid_score_ref(draft_row, draft_temp, *draft_constants)

    if token >= 0 and draft_score[token] > 0:
        u, ratio = acceptance_uniform_ref(seed, pos), float(target_score[token] / draft_score[token])
        margin = min(margin, abs(u - ratio) / u)
        if target_score[token] > 0 and u <= ratio:
            return margin, None

    # The emitting row is read as a whole, so +inf takes all of its score too.
    if (target_row == math.inf).any():
        target_score = target_score.where(target_row == math.inf, 0.0)
    weights, cancels = probs, None
    if token >= 0 and draft_row is None:
        weights = probs.clone()
        weights[token] = 0.0
    elif token >= 0:
        weights = (target_score - draft_score).clamp(min=0)
        if draft_temp is None or target_constants != draft_constants:
            shifts = [c[0] / (c[1] - c[0]) for c in (target_constants, draft_constants)]
            size = (target_argument + shifts[0]).abs() + (draft_argument + shifts[1]).abs()
            size = size + abs(shifts[0] - shifts[1]) + 1 / (target_constants[1] - target_constants[0])
            cancels = (size / (target_argument - draft_argument).abs()).nan_to_num(1.0, 1.0, 1.0).clamp(min=1)
        # Single precision runs out of range here, and backends of exponents.
        margin = min(margin, math.inf if weights.max() > 1e-30 or weights.max() == 0 else 0.0)
    if not (weights > 0).any():
        weights, cancels = probs, None
    if not (weights > 0).any():
        return margin, -1
    recovered, draw_margin = _draw_ref(weights, exponential_ref(seed, pos, RECOVERED, vocab_size), cancels)
    return min(margin, draw_margin), recovered


def exact_verify_ref(
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
    sigmoid=None,
    sigmoid_requests: torch.Tensor | None = None,  # [max_reqs]
) -> Reference:
    """Exact or sigmoid verification; arguments and meaning as in ``vllm_specopt.verify.verify``."""
    num_reqs = cu_num_logits.shape[0] - 1
    starts = cu_num_logits.tolist()
    num_rows, vocab_size = logits.shape
    draft = draft_probs if draft_probs is not None else draft_logits
    if draft is not None:
        vocab_size = min(vocab_size, draft.shape[-1])
    compact = draft_token_ids.shape[0] != num_rows
    token_ids = torch.full((num_reqs, max_num_draft_tokens + 1), -1, dtype=torch.int64)
    num_sampled = torch.zeros(num_reqs, dtype=torch.int32)
    margins, bad_rows = [], 0

    for req in range(num_reqs):
        state = req if state_indices is None else int(state_indices[req])
        start, num_drafts = starts[req], starts[req + 1] - starts[req] - 1
        temp = 0.0 if temperature is None else float(temperature[state])
        filters = (
            0 if top_k is None else int(top_k[state]),
            1.0 if top_p is None else float(top_p[state]),
            0.0 if min_p is None else float(min_p[state]),
        )
        margin, emitted = math.inf, None
        for i in range(num_drafts):
            row = start + i
            token = int(draft_token_ids[row - req if compact else row + 1])
            valid = 0 <= token < vocab_size
            target_row = logits[row, :vocab_size].cpu()
            if temp < GREEDY_BELOW:
                best = _argmax_ref(target_row)
                if token != best:
                    emitted = best
                    bad_rows += int(not (target_row.double() > -math.inf).any())
                    break
                token_ids[req, i] = token
                continue
            seed, pos = int(seeds[state]), i if positions is None else int(positions[row])
            if sigmoid is not None and (sigmoid_requests is None or bool(sigmoid_requests[state])):
                draft_row, draft_temp = None, None
                if draft_probs is not None:
                    draft_row = draft_probs[row - req, :vocab_size].cpu()
                elif draft_logits is not None:
                    draft_row, draft_temp = draft_logits[state, i, :vocab_size].cpu(), temp
                token_margin, recovered = _sigmoid_row_ref(
                    target_row, temp, filters, draft_row, draft_temp, token if valid else -1, seed, pos, sigmoid
                )
                margin = min(margin, token_margin)
                if recovered is None:
                    token_ids[req, i] = token
                    continue
                emitted, bad_rows = max(recovered, 0), bad_rows + int(recovered < 0)
                break
            _, target_probs, row_margin = target_row_ref(target_row, temp, *filters)
            margin = min(margin, row_margin)
            if draft_probs is not None:
                draft_row = draft_probs[row - req, :vocab_size].double().cpu()
                draft_row = torch.where(draft_row > 0, draft_row, 0.0)
            elif draft_logits is not None:
                draft_row = target_row_ref(draft_logits[state, i, :vocab_size].cpu(), temp, 0, 1.0, 0.0)[1]
            else:
                draft_row = torch.zeros(vocab_size, dtype=torch.float64)
                if valid:
                    draft_row[token] = 1.0
            accepted = False
            if valid:
                u = acceptance_uniform_ref(seed, pos)
                accepted = u <= acceptance_probability_ref(target_probs[token], draft_row[token])
                if draft_row[token] > 0:
                    margin = min(margin, abs(float(u - target_probs[token] / draft_row[token])) / u)
            if accepted:
                token_ids[req, i] = token
                continue
            weights = residual_ref(target_probs, draft_row) if valid else target_probs
            if not (weights > 0).any():
                emitted, bad_rows = 0, bad_rows + 1
            else:
                emitted, draw_margin = _draw_ref(weights, exponential_ref(seed, pos, RECOVERED, vocab_size))
                # Single precision cancels in target - draft: what is lost counts against the margin.
                kept = float(weights[emitted] / target_probs[emitted])
                margin = min(margin, draw_margin * kept, float(weights.sum()))
            break
        else:
            i, row = num_drafts, start + num_drafts
            target_row = logits[row, :vocab_size].cpu()
            if bonus_token_ids is not None:
                emitted = int(bonus_token_ids[req])
            elif temp < GREEDY_BELOW:
                emitted = _argmax_ref(target_row)
                bad_rows += int(not (target_row.double() > -math.inf).any())
            else:
                seed, pos = int(seeds[state]), i if positions is None else int(positions[row])
                _, target_probs, row_margin = target_row_ref(target_row, temp, *filters)
                margin = min(margin, row_margin)
                if not (target_probs > 0).any():
                    emitted, bad_rows = 0, bad_rows + 1
                else:
                    emitted, draw_margin = _draw_ref(target_probs, exponential_ref(seed, pos, BONUS, vocab_size))
                    margin = min(margin, draw_margin)
        token_ids[req, i] = emitted
        num_sampled[req] = i + 1
        margins.append(margin)
    return Reference(token_ids, num_sampled, margins, bad_rows)
