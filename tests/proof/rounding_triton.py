"""The numbers with which the Triton kernels draw from a row: masses of tiles, and weights of the tokens of each.

Of a row whose filters keep little: the weights of the candidates.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import triton
import triton.language as tl

from vllm_specopt.kernels.bounds import CAPACITY
from vllm_specopt.kernels.candidates import Candidates, draw_row, load_candidates
from vllm_specopt.kernels.constants import LOG2_E
from vllm_specopt.kernels.draw import load_tiles, tile_masses
from vllm_specopt.kernels.filters import filter_row
from vllm_specopt.kernels.launch import KEY_BITS, row_tiling
from vllm_specopt.kernels.load import Filters, Tiles, load_logits, scaled, weights
from vllm_specopt.kernels.shapes import DEFAULTS
from vllm_specopt.kernels.statistics import sweep


@triton.jit
def _statistics_kernel(
    logits_ptr, temp_ptr, max_ptr, sum_ptr, vocab_size, count, TILE: tl.constexpr, STEPS: tl.constexpr
):
    scale = LOG2_E / tl.load(temp_ptr)
    first = tl.program_id(0) * STEPS
    sweep(logits_ptr, scale, max_ptr, sum_ptr, None, first, count, vocab_size, False, TILE, STEPS)


@triton.jit
def _filter_kernel(
    logits_ptr, temp_ptr, top_p_ptr, max_ptr, sum_ptr, list_ptr, values_ptr, threshold_ptr, num_candidates_ptr,
    vocab_size, count, KEY_BITS: tl.constexpr, TILE: tl.constexpr, PADDED_TILES: tl.constexpr,
):  # fmt: skip
    scale = LOG2_E / tl.load(temp_ptr)
    filters = Filters(tl.full((), 0, tl.int32), tl.load(top_p_ptr), tl.full((), 0.0, tl.float32))
    row = tl.full((), 0, tl.int64)
    tiles = Tiles(max_ptr, sum_ptr, None, count)
    threshold, num_candidates = filter_row(
        logits_ptr, tiles, row, filters, scale, list_ptr, values_ptr, vocab_size, KEY_BITS, TILE, PADDED_TILES
    )
    tl.store(threshold_ptr, threshold)
    tl.store(num_candidates_ptr, num_candidates)


@triton.jit
def _candidate_weights_kernel(temp_ptr, threshold_ptr, values_ptr, ids_ptr, num_candidates, weights_ptr):
    """Weights of the candidates, as a draw computes them."""
    scale, threshold = LOG2_E / tl.load(temp_ptr), tl.load(threshold_ptr)
    x = load_candidates(Candidates(values_ptr, ids_ptr, num_candidates))
    w = weights(x, scale, scaled(tl.max(x, axis=0), scale))
    tl.store(weights_ptr + tl.arange(0, CAPACITY), tl.where(x >= threshold, w, 0.0))


@triton.jit
def _weights_kernel(
    logits_ptr, temp_ptr, threshold_ptr, max_ptr, sum_ptr, masses_ptr, weights_ptr, vocab_size, count,
    TILE: tl.constexpr, PADDED_TILES: tl.constexpr,
):  # fmt: skip
    """One program per tile: its mass in the row, and its tokens' weights, as a draw computes them."""
    scale, threshold = LOG2_E / tl.load(temp_ptr), tl.load(threshold_ptr)
    tile = tl.program_id(0)
    maxima, sums = load_tiles(Tiles(max_ptr, sum_ptr, None, count), 0, PADDED_TILES)
    _, masses = tile_masses(maxima, sums, scale, threshold)
    mass = tl.sum(tl.where(tl.arange(0, PADDED_TILES) == tile, masses, 0.0), axis=0)
    tl.store(masses_ptr + tile, mass)
    token_ids = tile * TILE + tl.arange(0, TILE)
    x = load_logits(logits_ptr, token_ids, token_ids < vocab_size)
    w = weights(x, scale, scaled(tl.load(max_ptr + tile), scale))
    tl.store(weights_ptr + token_ids, tl.where(x >= threshold, w, 0.0))


@triton.jit
def _draw_kernel(
    logits_ptr, temp_ptr, threshold_ptr, max_ptr, sum_ptr, values_ptr, ids_ptr, num_candidates, uniforms_ptr,
    tokens_ptr, vocab_size, count, TILE: tl.constexpr, PADDED_TILES: tl.constexpr,
):  # fmt: skip
    """One program per uniform."""
    scale, threshold = LOG2_E / tl.load(temp_ptr), tl.load(threshold_ptr)
    uniform, none = tl.load(uniforms_ptr + tl.program_id(0)), tl.full((), -1, tl.int32)
    tiles = Tiles(max_ptr, sum_ptr, None, count)
    candidates = Candidates(values_ptr, ids_ptr, num_candidates)
    token = draw_row(
        logits_ptr, tiles, candidates, 0, scale, threshold, none, uniform, vocab_size, TILE, PADDED_TILES, False
    )
    tl.store(tokens_ptr + tl.program_id(0), token)


def read_row(
    row: torch.Tensor, temperature: float, top_p: float, device: str
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray], int]:
    """Read a row of logits ``[vocab]`` as a verification does.

    Returns:
        Probabilities ``[vocab]`` that its numbers imply; a function that gives the kernels' tokens for uniforms;
        tokens of a tile.
    """
    vocab_size, row = len(row), row.to(device)
    tile, steps, count, num_groups, padded = row_tiling(vocab_size, DEFAULTS, top_p < 1)
    shape = {"TILE": tile, "PADDED_TILES": padded}
    temp, limit = (torch.tensor([x], dtype=torch.float32, device=device) for x in (temperature, top_p))
    threshold = torch.full((1,), -math.inf, device=device)
    maxima, sums = torch.empty(count, device=device), torch.empty(count, device=device)
    _statistics_kernel[(num_groups,)](row, temp, maxima, sums, vocab_size, count, TILE=tile, STEPS=steps)
    lists = torch.empty(count + CAPACITY.value, dtype=torch.int32, device=device)
    values, num_candidates = torch.empty(CAPACITY.value, device=device), CAPACITY.value + 1
    if top_p < 1:
        found = torch.empty(1, dtype=torch.int32, device=device)
        _filter_kernel[(1,)](
            row, temp, limit, maxima, sums, lists, values, threshold, found, vocab_size, count,
            KEY_BITS=KEY_BITS[row.dtype], **shape,
        )  # fmt: skip
        num_candidates = int(found)
    ids = lists[count:]
    if num_candidates <= CAPACITY.value:
        within = torch.empty(CAPACITY.value, device=device)
        _candidate_weights_kernel[(1,)](temp, threshold, values, ids, num_candidates, within)
        probs = np.zeros(vocab_size)
        probs[ids[:num_candidates].cpu().numpy()] = within[:num_candidates].double().cpu().numpy()
    else:
        masses = torch.empty(count, dtype=torch.float64, device=device)
        fine = torch.empty(count * tile, device=device)
        _weights_kernel[(count,)](row, temp, threshold, maxima, sums, masses, fine, vocab_size, count, **shape)
        within = fine.double().cpu().numpy().reshape(count, tile)
        within = within / np.maximum(within.sum(1, keepdims=True), 1e-300)
        probs = (masses.cpu().numpy()[:, None] * within).ravel()[:vocab_size]

    def draw(uniforms: np.ndarray) -> np.ndarray:
        tokens = torch.empty(len(uniforms), dtype=torch.int32, device=device)
        _draw_kernel[(len(uniforms),)](
            row, temp, threshold, maxima, sums, values, ids, num_candidates, torch.from_numpy(uniforms).to(device),
            tokens, vocab_size, count, **shape,
        )  # fmt: skip
        return tokens.cpu().numpy()

    return probs / probs.sum(), draw, tile
