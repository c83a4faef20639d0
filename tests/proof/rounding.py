"""What single precision costs: the distribution that the kernels' own numbers imply, against float64.

A token is drawn by two running sums in fp64, over the masses of tiles and over the weights within one. Both are fp32
numbers that the kernels computed, so they say which distribution is drawn from: no sample is needed, and a distance of
1e-6 is seen that no sample would show. ``draw_token`` is then asked on both sides of many boundaries between tokens
whether it draws just there.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from vllm_specopt.kernels.constants import LOG2_E
from vllm_specopt.kernels.draw import draw_token, load_tiles, tile_masses
from vllm_specopt.kernels.filters import CAPACITY, filter_row
from vllm_specopt.kernels.launch import KEY_STEPS, STEPS, TILE
from vllm_specopt.kernels.load import Filters, Tiles, load_logits, weights
from vllm_specopt.kernels.reference.rows import target_row_ref
from vllm_specopt.kernels.statistics import sweep

BOUND = 1e-6
VOCAB = 151_936
# As single precision holds them.
TEMPERATURE, TOP_P = (float(np.float32(x)) for x in (0.7, 0.9))
ROWS = {"flat": 0.01, "normal": 2.5, "peaked": 10.0, "normal, top-p 0.9": 2.5}
"""Rows by name, and the standard deviation of their logits."""
DTYPES = (torch.float32, torch.bfloat16)
NARROW = 1e-9
"""Boundaries of tokens less likely than this are not probed."""


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


@dataclass(frozen=True)
class Implied:
    """One row. distance: total variation between what the kernels draw from and the row's distribution in float64, and
    a bound on what fp64 sums and the grid of u add to it. wrong: probes that drew another token."""

    distance: float
    probes: int
    wrong: int


def make_row(name: str, dtype: torch.dtype, vocab_size: int = VOCAB) -> torch.Tensor:
    """Logits of one of ROWS."""
    gen = torch.Generator().manual_seed(len(name))
    return (torch.randn(vocab_size, generator=gen) * ROWS[name]).to(dtype)


def sums_in_double(vocab_size: int, tiles: int) -> float:
    """Bound on the total variation that running sums in fp64 and a u of 52 bits cause.

    Every boundary between two tokens moves by at most n + 4 roundings of 2^-53, n the terms before it: of the row's
    mass for the sum over tiles, of the tile's for the sum within; and by 2^-53, half a step of u.
    """
    return (vocab_size * (tiles + 5) + TILE * (TILE + 4)) * 2.0**-53


def total_variation(probs: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(probs / probs.sum() - expected).sum() / 2)


def distributions(name: str, dtype: torch.dtype, vocab_size: int = VOCAB) -> tuple[torch.Tensor, np.ndarray]:
    """One of ROWS, and its distribution in float64."""
    row = make_row(name, dtype, vocab_size)
    options = {"top_p": TOP_P} if "top-p" in name else {}
    return row, target_row_ref(row, TEMPERATURE, **options)[1].numpy()


def implied(name: str, dtype: torch.dtype, device: str, probes: int = 100, vocab_size: int = VOCAB) -> Implied:
    """What the Triton kernels draw from for one row, and whether ``draw_token`` does at so many boundaries."""
    row, expected = distributions(name, dtype, vocab_size)
    row = row.to(device)
    count = triton.cdiv(vocab_size, TILE)
    tile = {"TILE": TILE, "PADDED_TILES": triton.next_power_of_2(count)}
    temp, top_p = (torch.tensor([x], dtype=torch.float32, device=device) for x in (TEMPERATURE, TOP_P))
    threshold = torch.full((1,), -math.inf, device=device)
    maxima, sums = torch.empty(count, device=device), torch.empty(count, device=device)
    _statistics_kernel[(triton.cdiv(count, STEPS),)](row, temp, maxima, sums, vocab_size, count, TILE=TILE, STEPS=STEPS)
    if "top-p" in name:
        tile_list = torch.empty(count, dtype=torch.int32, device=device)
        values = torch.empty(CAPACITY.value, device=device)
        _filter_kernel[(1,)](
            row, temp, top_p, maxima, sums, tile_list, values, threshold, vocab_size, count,
            KEY_STEP=KEY_STEPS[dtype], **tile,
        )  # fmt: skip
    masses = torch.empty(count, dtype=torch.float64, device=device)
    fine = torch.empty(count * TILE, device=device)
    _weights_kernel[(count,)](row, temp, threshold, maxima, sums, masses, fine, vocab_size, count, **tile)

    within = fine.double().cpu().numpy().reshape(count, TILE)
    within = within / np.maximum(within.sum(1, keepdims=True), 1e-300)
    masses = masses.cpu().numpy()
    probs = ((masses / masses.sum())[:, None] * within).ravel()[:vocab_size]

    cells = np.flatnonzero(probs > NARROW)
    running, step = probs.cumsum(), NARROW / 10
    chosen = np.random.default_rng(0).choice(len(cells) - 1, min(probes, len(cells) - 1), replace=False)
    left, right = cells[chosen], cells[chosen + 1]
    uniforms = torch.from_numpy(np.concatenate([running[left] - step, running[right] - probs[right] + step])).to(device)
    tokens = torch.empty(len(uniforms), dtype=torch.int32, device=device)
    _draw_kernel[(len(uniforms),)](
        row, temp, threshold, maxima, sums, uniforms, tokens, vocab_size, count, **tile
    )  # fmt: skip
    wrong = int((tokens.cpu().numpy() != np.concatenate([left, right])).sum())
    distance = total_variation(probs, expected) + sums_in_double(vocab_size, count)
    return Implied(distance, len(uniforms), wrong)


def in_single_precision(weights: np.ndarray) -> np.ndarray:
    """What a running sum over tokens in fp32 would draw from."""
    return np.diff(weights.astype(np.float32).cumsum(dtype=np.float32).astype(np.float64), prepend=0.0)


def of_23_bits(weights: np.ndarray) -> np.ndarray:
    """What a u of 23 bits would draw from."""
    running = weights.cumsum()
    return np.diff(np.floor(running / running[-1] * 2**23 + 0.5), prepend=0.0) * 2.0**-23


BIASED = {"a running sum over tokens in single precision": in_single_precision, "u of 23 bits": of_23_bits}
