"""Random numbers as a pure function of (request seed, absolute position, purpose), in plain integers.

Philox4x32-10 (Salmon et al., SC'11) with the seed as key and (purpose, position) as counter gives four 32-bit words.
"""

DRAW, ACCEPTANCE, RESIDUAL, AUDIT, PREFIX = 0, 1, 2, 3, 16
"""Purposes: the token drawn from a row, the test of a sampled draft, the token that replaces a rejected one, the place
of an audited token among those as probable; and, plus its length, the test of a prefix, at the position where the block
begins: a prefix that fails must not be tested by the same number again in the next step, which begins later."""

STREAM = 0x53504543
MASK32 = 0xFFFFFFFF


def philox_ref(seed: int, position: int, purpose: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 with key = seed (low word first) and counter = (purpose, position low, position high, STREAM)."""
    key = [seed & MASK32, (seed >> 32) & MASK32]
    c = [purpose, position & MASK32, (position >> 32) & MASK32, STREAM]
    for _ in range(10):
        high_a, low_a = divmod(0xD2511F53 * c[0], 1 << 32)
        high_b, low_b = divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [high_b ^ c[1] ^ key[0], low_b, high_a ^ c[3] ^ key[1], low_a]
        key = [(key[0] + 0x9E3779B9) & MASK32, (key[1] + 0xBB67AE85) & MASK32]
    return c[0], c[1], c[2], c[3]


def acceptance_uniform_ref(seed: int, position: int, purpose: int = ACCEPTANCE) -> float:
    """The u of the acceptance test: 23 bits centred in their cells, so in (0, 1) and exact in single precision."""
    return ((philox_ref(seed, position, purpose)[0] >> 9) + 0.5) * 2.0**-23


def draw_uniform_ref(seed: int, position: int, purpose: int) -> float:
    """The u of a draw by inversion: 52 bits of two words, centred in their cells, so in (0, 1) and exact."""
    high, low, _, _ = philox_ref(seed, position, purpose)
    return ((high >> 6) * 2.0**26 + (low >> 6) + 0.5) * 2.0**-52
