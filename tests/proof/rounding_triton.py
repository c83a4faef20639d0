"""The numbers with which the Triton kernels draw from a row: masses of tiles, and weights of the tokens of each."""

import math
from collections.abc import Callable

import numpy as np
import torch
import triton
import triton.language as tl

from vllm_specopt.kernels.bounds import CAPACITY
from vllm_specopt.kernels.constants import LOG2_E
from vllm_specopt.kernels.draw import draw_token, load_tiles, tile_masses
from vllm_specopt.kernels.filters import filter_row
from vllm_specopt.kernels.launch import KEY_STEPS, STEPS, TILE
from vllm_specopt.kernels.load import Filters, Tiles, load_logits, weights
from vllm_specopt.kernels.statistics import sweep


@triton.jit
def _statistics_kernel(
    logits_ptr, temp_ptr, max_ptr, sum_ptr, vocab_size, count, TILE: tl.constexpr, STEPS: tl.constexpr
):
    scale = LOG2_E / tl.load(temp_ptr)
    sweep(logits_ptr, scale, max_ptr, sum_ptr, tl.program_id(0) * STEPS, count, vocab_size, False, TILE, STEPS)


@triton.jit
def _filter_kernel(
    logits_ptr, temp_ptr, top_p_ptr, max_ptr, sum_ptr, list_ptr, values_ptr, threshold_ptr, vocab_size, count,
    KEY_STEP: tl.constexpr, TILE: tl.constexpr, PADDED_TILES: tl.constexpr,
):  # fmt: skip
    scale = LOG2_E / tl.load(temp_ptr)
    filters = Filters(tl.full((), 0, tl.int32), tl.load(top_p_ptr), tl.full((), 0.0, tl.float32))
    row = tl.full((), 0, tl.int64)
    tiles = Tiles(max_ptr, sum_ptr, count)
    threshold = filter_row(
        logits_ptr, tiles, row, filters, scale, list_ptr, values_ptr, vocab_size, KEY_STEP, TILE, PADDED_TILES
    )
    tl.store(threshold_ptr, threshold)


@triton.jit
def _weights_kernel(
    logits_ptr, temp_ptr, threshold_ptr, max_ptr, sum_ptr, masses_ptr, weights_ptr, vocab_size, count,
    TILE: tl.constexpr, PADDED_TILES: tl.constexpr,
):  # fmt: skip
    """One program per tile: its mass in the row, and its tokens' weights, as a draw computes them."""
    scale, threshold = LOG2_E / tl.load(temp_ptr), tl.load(threshold_ptr)
    tile = tl.program_id(0)
    maxima, sums = load_tiles(Tiles(max_ptr, sum_ptr, count), 0, PADDED_TILES)
    _, masses = tile_masses(maxima, sums, scale, threshold)
    mass = tl.sum(tl.where(tl.arange(0, PADDED_TILES) == tile, masses, 0.0), axis=0)
    tl.store(masses_ptr + tile, mass)
    token_ids = tile * TILE + tl.arange(0, TILE)
    x = load_logits(logits_ptr, token_ids, token_ids < vocab_size)
    w = weights(x, scale, tl.load(max_ptr + tile) * scale)
    tl.store(weights_ptr + token_ids, tl.where(x >= threshold, w, 0.0))


@triton.jit
def _draw_kernel(
    logits_ptr, temp_ptr, threshold_ptr, max_ptr, sum_ptr, uniforms_ptr, tokens_ptr, vocab_size, count,
    TILE: tl.constexpr, PADDED_TILES: tl.constexpr,
):  # fmt: skip
    """One program per uniform."""
    scale, threshold = LOG2_E / tl.load(temp_ptr), tl.load(threshold_ptr)
    uniform, none = tl.load(uniforms_ptr + tl.program_id(0)), tl.full((), -1, tl.int32)
    tiles = Tiles(max_ptr, sum_ptr, count)
    token = draw_token(
        logits_ptr, tiles, 0, scale, threshold, none, uniform, vocab_size, TILE, PADDED_TILES, False
    )  # fmt: skip
    tl.store(tokens_ptr + tl.program_id(0), token)


def read_row(
    row: torch.Tensor, temperature: float, top_p: float, device: str
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray], int]:
    """Read a row of logits ``[vocab]`` as a verification does.

    Returns:
        Probabilities ``[vocab]`` that its numbers imply; a function that gives ``draw_token``'s tokens for uniforms;
        tokens of a tile.
    """
    vocab_size, row = len(row), row.to(device)
    count = triton.cdiv(vocab_size, TILE)
    tile = {"TILE": TILE, "PADDED_TILES": triton.next_power_of_2(count)}
    temp, limit = (torch.tensor([x], dtype=torch.float32, device=device) for x in (temperature, top_p))
    threshold = torch.full((1,), -math.inf, device=device)
    maxima, sums = torch.empty(count, device=device), torch.empty(count, device=device)
    _statistics_kernel[(triton.cdiv(count, STEPS),)](row, temp, maxima, sums, vocab_size, count, TILE=TILE, STEPS=STEPS)
    if top_p < 1:
        tile_list = torch.empty(count, dtype=torch.int32, device=device)
        values = torch.empty(CAPACITY.value, device=device)
        _filter_kernel[(1,)](
            row, temp, limit, maxima, sums, tile_list, values, threshold, vocab_size, count,
            KEY_STEP=KEY_STEPS[row.dtype], **tile,
        )  # fmt: skip
    masses = torch.empty(count, dtype=torch.float64, device=device)
    fine = torch.empty(count * TILE, device=device)
    _weights_kernel[(count,)](row, temp, threshold, maxima, sums, masses, fine, vocab_size, count, **tile)
    within = fine.double().cpu().numpy().reshape(count, TILE)
    within = within / np.maximum(within.sum(1, keepdims=True), 1e-300)
    masses = masses.cpu().numpy()

    def draw(uniforms: np.ndarray) -> np.ndarray:
        tokens = torch.empty(len(uniforms), dtype=torch.int32, device=device)
        _draw_kernel[(len(uniforms),)](
            row, temp, threshold, maxima, sums, torch.from_numpy(uniforms).to(device), tokens, vocab_size, count, **tile
        )
        return tokens.cpu().numpy()

    return ((masses / masses.sum())[:, None] * within).ravel()[:vocab_size], draw, TILE
