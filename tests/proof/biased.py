"""Rules that look right and are not, and one that is: the test of the test.

The rules run on arrays in double precision with an independent generator. The shared-noise drafter instead leaves the
verifier alone: it draws its drafts with the very noise that the verifier later draws recovered tokens with, an error
that a verifier cannot see.
"""

import numpy as np

from proof.cases import Case
from proof.draws import Step, Verifier
from vllm_specopt.kernels.reference import MASK32, RECOVERED, STREAM


def _pick(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One index per row, in proportion to the weights."""
    cumulative = weights.cumsum(1)
    return (cumulative <= (rng.random(len(weights)) * cumulative[:, -1])[:, None]).sum(1)


def rule_verifier(name: str, seed: int) -> Verifier:
    """The rule on arrays: ``correct``, or one of the biased ones in RULES."""
    rng = np.random.default_rng([2, seed])

    def run(step: Step) -> tuple[np.ndarray, np.ndarray]:
        case, num_reqs = step.case, len(step.drafts)
        token_ids = np.full((num_reqs, case.num_drafts + 1), -1)
        num_sampled = np.zeros(num_reqs, np.int64)
        active = np.arange(num_reqs)
        first_uniform = rng.random(num_reqs)
        for i in range(case.num_drafts + 1):
            target = case.target_probs[step.offset + i, step.classes[active, i]]
            if i == case.num_drafts:
                token_ids[active, i], num_sampled[active] = _pick(target, rng), i + 1
                break
            draft = case.draft_probs[min(step.offset + i, case.num_drafts), step.classes[active, i]]
            tokens = step.drafts[active, i]
            here = np.arange(len(active))
            ratio = target[here, tokens] / draft[here, tokens]
            if name == "accepts by the square root of the ratio":
                ratio = np.sqrt(ratio)
            uniform = first_uniform[active] if name == "one uniform for all positions" else rng.random(len(active))
            accepted = uniform <= ratio
            token_ids[active[accepted], i] = tokens[accepted]
            weights = target if name == "recovers from the target" else np.clip(target - draft, 0, None)
            lost = active[~accepted]
            token_ids[lost, i] = _pick(weights[~accepted], rng)
            num_sampled[lost] = i + 1
            active = active[accepted]
        return token_ids, num_sampled

    return run


RULES = (
    "recovers from the target",
    "accepts by the square root of the ratio",
    "one uniform for all positions",
)


def philox_words(seeds: np.ndarray, positions: np.ndarray, purpose: int) -> tuple[np.ndarray, np.ndarray]:
    """First two words of the kernels' Philox4x32-10 for arrays of seeds and positions."""
    mask, shift = np.uint64(MASK32), np.uint64(32)
    seeds, positions = seeds.astype(np.uint64), positions.astype(np.uint64)
    key0, key1 = seeds & mask, seeds >> shift
    c0, c1 = np.full(len(seeds), purpose, np.uint64), positions & mask
    c2, c3 = positions >> shift, np.full(len(seeds), STREAM, np.uint64)
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> shift) ^ c1 ^ key0, b & mask, (a >> shift) ^ c3 ^ key1, a & mask
        key0, key1 = (key0 + np.uint64(0x9E3779B9)) & mask, (key1 + np.uint64(0xBB67AE85)) & mask
    return c0, c1


def _mix32(x: np.ndarray) -> np.ndarray:
    mask = np.uint64(MASK32)
    x = ((x ^ (x >> np.uint64(16))) * np.uint64(0x7FEB352D)) & mask
    x = ((x ^ (x >> np.uint64(15))) * np.uint64(0x846CA68B)) & mask
    return x ^ (x >> np.uint64(16))


def recovery_noise(seeds: np.ndarray, positions: np.ndarray, vocab_size: int) -> np.ndarray:
    """The exponential noise with which recovered tokens are drawn, ``[requests, vocab]``."""
    key0, key1 = philox_words(seeds, positions, RECOVERED)
    mask = np.uint64(MASK32)
    bits = _mix32(_mix32((np.arange(vocab_size, dtype=np.uint64) + key0[:, None]) & mask) ^ key1[:, None])
    # Rounded as the kernels hold it.
    v = ((bits.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-32)).clip(max=np.float32(1 - 2.0**-24))
    return -np.log1p(-v.astype(np.float64))


def shared_noise_drafter(case: Case, offset, classes, seeds, positions, rng) -> np.ndarray:
    """Draft tokens of the right law whose noise is that of the verifier's recovered tokens."""
    return (case.draft_probs[offset, classes] / recovery_noise(seeds, positions, case.vocab_size)).argmax(1)
