"""The definition of correct: exact verification in float64, one token at a time, with the kernels' random numbers.

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


def _draw_ref(weights: torch.Tensor, exponential: torch.Tensor) -> tuple[int, float]:
    """Exponential race: the token with the largest weight / exponential, first one on a tie; and the winning margin."""
    score = weights.log() - exponential.log()
    best = score.max()
    others = score[score < best]
    margin = (best - others.max()).item() if len(others) else math.inf
    return int((score == best).nonzero()[0]), margin


def _argmax_ref(row: torch.Tensor) -> int:
    row = torch.where(row.isnan(), -math.inf, row.double())
    return int((row == row.max()).nonzero()[0])


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
) -> Reference:
    """Exact verification; arguments and meaning as in ``vllm_specopt.verify.verify``."""
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
