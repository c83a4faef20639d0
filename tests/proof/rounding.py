"""What single precision costs: the distribution that a backend's own numbers imply, against float64.

A token is drawn by two running sums in fp64, over the masses of tiles and over the weights within one. These are fp32
numbers that the backend computed, so they say which distribution is drawn from: no sample is needed, and a distance of
1e-6 is seen that no sample would show. The backend is then asked on both sides of many boundaries between tokens
whether it draws just there.
"""

from dataclasses import dataclass
from importlib import import_module

import numpy as np
import torch

from vllm_specopt.kernels.reference.rows import target_row_ref

BOUND = 1e-6
VOCAB = 151_936
# As single precision holds them.
TEMPERATURE, TOP_P = (float(np.float32(x)) for x in (0.7, 0.9))
ROWS = {"flat": 0.01, "normal": 2.5, "peaked": 10.0, "flat, top-p 0.9": 0.01, "normal, top-p 0.9": 2.5}
"""Rows by name, and the standard deviation of their logits."""
DTYPES = (torch.float32, torch.bfloat16)
NARROW = 1e-9
"""Boundaries of tokens less likely than this are not probed."""


@dataclass(frozen=True)
class Implied:
    """One row. distance: total variation between what a backend draws from and the row's distribution in float64, and
    a bound on what fp64 sums and the grid of u add to it. wrong: probes that drew another token."""

    distance: float
    probes: int
    wrong: int


def top_p_of(name: str) -> float:
    return TOP_P if "top-p" in name else 1.0


def distributions(name: str, dtype: torch.dtype, vocab_size: int = VOCAB) -> tuple[torch.Tensor, np.ndarray]:
    """One of ROWS, and its distribution in float64."""
    gen = torch.Generator().manual_seed(len(name))
    row = (torch.randn(vocab_size, generator=gen) * ROWS[name]).to(dtype)
    return row, target_row_ref(row, TEMPERATURE, top_p=top_p_of(name))[1].numpy()


def sums_in_double(vocab_size: int, tile: int) -> float:
    """Bound on the total variation that running sums in fp64 and a u of 52 bits cause.

    Every boundary between two tokens moves by at most n + 4 roundings of 2^-53, n the terms before it: of the row's
    mass for the sum over tiles, of the tile's for the sum within; and by 2^-53, half a step of u.
    """
    return (vocab_size * (-(-vocab_size // tile) + 5) + tile * (tile + 4)) * 2.0**-53


def total_variation(probs: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(probs / probs.sum() - expected).sum() / 2)


def implied(name: str, dtype: torch.dtype, backend: str, device: str, probes: int = 100) -> Implied:
    """What a backend draws from for one row, and whether it draws so at that many boundaries."""
    row, expected = distributions(name, dtype)
    read_row = import_module(f"proof.rounding_{backend}").read_row
    probs, draw, tile = read_row(row, TEMPERATURE, top_p_of(name), device)
    cells = np.flatnonzero(probs > NARROW)
    running, step = probs.cumsum(), NARROW / 10
    chosen = np.random.default_rng(0).choice(len(cells) - 1, min(probes, len(cells) - 1), replace=False)
    left, right = cells[chosen], cells[chosen + 1]
    tokens = draw(np.concatenate([running[left] - step, running[right] - probs[right] + step]))
    wrong = int((tokens != np.concatenate([left, right])).sum())
    return Implied(total_variation(probs, expected) + sums_in_double(len(row), tile), len(tokens), wrong)


def in_single_precision(weights: np.ndarray) -> np.ndarray:
    """What a running sum over tokens in fp32 would draw from."""
    return np.diff(weights.astype(np.float32).cumsum(dtype=np.float32).astype(np.float64), prepend=0.0)


def of_23_bits(weights: np.ndarray) -> np.ndarray:
    """What a u of 23 bits would draw from."""
    running = weights.cumsum()
    return np.diff(np.floor(running / running[-1] * 2**23 + 0.5), prepend=0.0) * 2.0**-23


BIASED = {"a running sum over tokens in single precision": in_single_precision, "u of 23 bits": of_23_bits}
