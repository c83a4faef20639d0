"""One row of logits in float64: its distribution after temperature and filters, and a token drawn from it."""

import math

import torch


def clean_ref(row: torch.Tensor) -> torch.Tensor:
    """A row as float64 ``[vocab]``: NaN counts as -inf; beside a +inf every other token is -inf."""
    row = row.double()
    row = torch.where(row.isnan(), -math.inf, row)
    if (row == math.inf).any():
        row = torch.where(row == math.inf, 0.0, -math.inf)
    return row


def filter_row_ref(scaled: torch.Tensor, top_k: int, top_p: float, min_p: float) -> tuple[torch.Tensor, float]:
    """Apply min-p, then top-k, then top-p to one row of logits after temperature; ties with a threshold are kept.

    min-p keeps probabilities >= min_p (1 at most) * the largest; top-k keeps values >= the k-th largest; top-p keeps a
    value while the mass of strictly larger ones is below top_p of what the first two kept.

    Returns:
        The row with removed tokens at -inf, and the margin of the closest decision.
    """
    vocab_size, margin = scaled.shape[0], math.inf
    if scaled.max() in (math.inf, -math.inf):
        return scaled, margin
    if min_p > 0:
        gap = scaled - scaled.max() - math.log(min(min_p, 1.0))
        margin = min([margin, *gap[scaled < scaled.max()].abs().tolist()])
        scaled = scaled.masked_fill(gap < 0, -math.inf)
    if 1 <= top_k < vocab_size:
        scaled = scaled.masked_fill(scaled < scaled.sort(descending=True).values[top_k - 1], -math.inf)
    if top_p < 1:
        values, order = scaled.sort(descending=True, stable=True)
        probs = scaled.softmax(0)[order]
        first_equal = torch.searchsorted(-values, -values)
        mass_above = (probs.cumsum(0) - probs)[first_equal]
        margin = min(margin, (mass_above[probs > 0] - top_p).abs().min().item())
        scaled = scaled.masked_fill(scaled < values[(mass_above < top_p) | (first_equal == 0)].min(), -math.inf)
    return scaled, margin


def target_row_ref(
    logits: torch.Tensor, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """One row of logits after temperature and filters.

    A row with +inf is one-hot on it (uniform over several). A row without a usable logit has probability 0 everywhere.

    Returns:
        Scaled and filtered logits, probabilities (both float64 ``[vocab]``), and the margin of the filters.
    """
    scaled, margin = filter_row_ref(clean_ref(logits) / temperature, top_k, top_p, min_p)
    probs = scaled.softmax(0) if scaled.max() > -math.inf else torch.zeros_like(scaled)
    return scaled, probs, margin


def draft_distribution_ref(row: torch.Tensor, temperature: float | None) -> torch.Tensor:
    """What a token was drafted from, float64 ``[vocab]``, given logits or, without a temperature, probabilities."""
    if temperature is not None:
        return target_row_ref(row, temperature)[1]
    return torch.where(row > 0, row, 0.0).double()


def draw_ref(weights: torch.Tensor, uniform: float) -> tuple[int, float]:
    """Draw by inversion: the first token at which the running sum of the weights passes ``uniform`` of their sum.

    Args:
        weights: ``[vocab]`` float64, in the order of the vocabulary.
        uniform: In (0, 1).

    Returns:
        The token, and the distance of ``uniform * sum`` from the nearest boundary between two tokens (infinite if there
        is only one). -1 if no weight is positive.
    """
    candidates = (weights > 0).nonzero()[:, 0]
    if len(candidates) == 0:
        return -1, math.inf
    running = weights[candidates].cumsum(0)
    goal = uniform * float(running[-1])
    index = min(int(torch.searchsorted(running, goal, right=True)), len(candidates) - 1)
    inner = running[max(index - 1, 0) : index + 1]
    inner = inner[inner < running[-1]]
    margin = float((inner - goal).abs().min()) if len(inner) else math.inf
    return int(candidates[index]), margin


def argmax_ref(row: torch.Tensor) -> int:
    """First token with the largest logit; NaN counts as -inf."""
    row = torch.where(row.isnan(), -math.inf, row.double())
    return int((row == row.max()).nonzero()[0])
