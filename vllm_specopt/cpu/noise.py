"""Random numbers as a pure function of (request seed, absolute position, purpose).

Philox4x32-10 (Salmon et al., SC'11) with the seed as key and (purpose, position) as counter.
"""

import numpy as np

from vllm_specopt.cpu.memory import jit

DRAW, ACCEPTANCE, RESIDUAL, AUDIT, PREFIX = 0, 1, 2, 3, 16
STREAM = np.uint64(0x53504543)
MASK32 = np.uint64(0xFFFFFFFF)


@jit
def _philox(seed, position, purpose):
    """The first two of four words."""
    key0, key1 = np.uint64(seed) & MASK32, (np.uint64(seed) >> np.uint64(32)) & MASK32
    c0, c1 = np.uint64(purpose), np.uint64(position) & MASK32
    c2, c3 = (np.uint64(position) >> np.uint64(32)) & MASK32, STREAM
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (
            (b >> np.uint64(32)) ^ c1 ^ key0,
            b & MASK32,
            (a >> np.uint64(32)) ^ c3 ^ key1,
            a & MASK32,
        )
        key0 = (key0 + np.uint64(0x9E3779B9)) & MASK32
        key1 = (key1 + np.uint64(0xBB67AE85)) & MASK32
    return c0, c1


@jit
def _coarse_uniform(seed, position, purpose):
    """23 bits centred in their cells, in (0, 1)."""
    high, _ = _philox(seed, position, purpose)
    return (np.float64(high >> np.uint64(9)) + 0.5) * 2.0**-23


@jit
def acceptance_uniform(seed, position):
    """The u of the test of a sampled draft."""
    return _coarse_uniform(seed, position, ACCEPTANCE)


@jit
def prefix_uniform(seed, position, length):
    """The u of the test of a prefix; position: where the block begins."""
    return _coarse_uniform(seed, position, PREFIX + length)


@jit
def draw_uniform(seed, position, purpose):
    """The u of a draw: 52 bits centred in their cells, in (0, 1)."""
    high, low = _philox(seed, position, purpose)
    return (np.float64(high >> np.uint64(6)) * 2.0**26 + np.float64(low >> np.uint64(6)) + 0.5) * 2.0**-52
