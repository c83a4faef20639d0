"""Block verification (Sun et al. 2403.10444): the longest prefix that may stand, judged as a whole. Lossless.

c_0 = 1, c_i = min(1, c_{i-1} target_i(x_i) / draft_i(x_i)). A prefix of i of k tokens may stand where u_i <= h_i, with
h_k = c_k and h_i = Z_i / (Z_i + 1 - c_i) before it, Z_i the sum of the weights (c_i target_{i+1} - draft_{i+1})+ that
the token after it would have. As h_i <= c_i, and h_i = 1 where c_i = 1, most Z_i need not be known: only rows behind
the last certain prefix, whose u_i <= c_i, are read again.
"""

import triton
import triton.language as tl

from ..constants import CARRY, PREFIX, ROW_COLUMNS
from ..load import load_position
from ..noise import acceptance_uniform


@triton.jit
def prefix_uniform(noise, request, length):
    """u_i of a prefix of ``length`` tokens, a scalar or a block; 0 for the empty one.

    It belongs to the position where the block begins: a prefix that fails must not be tested by the same number again
    in the next step, which begins later.
    """
    first = load_position(noise, request, tl.zeros_like(request.num_drafts))
    position = tl.zeros_like(length).to(tl.int64) + first
    uniform = acceptance_uniform(tl.load(noise.seeds_ptr + request.state), position, PREFIX + length)
    return tl.where(length > 0, uniform, 0.0)


@triton.jit
def settle(noise, request, row_ptr, drafts, vocab_size, BLOCK_K: tl.constexpr):
    """What the ratios alone decide about a block.

    row_ptr: rows' columns; CARRY holds target / draft of each draft token, and becomes c_i of the rows whose Z_i must
    be known, else 0. drafts: draft tokens, ``[BLOCK_K]``; the first that is none ends the block. Returns the number of
    tokens kept if it is known (else the last certain prefix), and the number of rows to read again (0 if it is known).
    """
    lengths = tl.arange(0, BLOCK_K)
    columns = (request.start_row + lengths) * ROW_COLUMNS + CARRY
    ends = (lengths >= request.num_drafts) | (drafts < 0) | (drafts >= vocab_size)
    length = tl.min(tl.where(ends, lengths, request.num_drafts), axis=0)
    ratios = tl.load(row_ptr + columns, mask=lengths < length, other=0.0)
    carries = tl.where(lengths == 0, 1.0, 0.0)
    carry = tl.full((), 1.0, tl.float32)
    for i in range(length):
        carry = tl.minimum(carry * tl.sum(tl.where(lengths == i, ratios, 0.0), axis=0), 1.0)
        carries = tl.where(lengths == i + 1, carry, carries)
    passes = prefix_uniform(noise, request, lengths) <= carries
    passes = passes & (lengths <= length)
    is_certain = passes & ((carries >= 1.0) | (lengths == length))
    kept = tl.max(tl.where(is_certain, lengths, 0), axis=0)
    unsettled = passes & (lengths >= kept) & (kept < length)
    tl.debug_barrier()
    tl.store(row_ptr + columns, tl.where(unsettled, carries, 0.0), mask=lengths <= request.num_drafts)
    return kept, tl.sum(unsettled.to(tl.int32), axis=0)


@triton.jit
def may_stand(carry, mass, uniform):
    """u_i <= h_i; ``mass`` is Z_i."""
    rest = mass + (1.0 - carry)
    return (carry >= 1.0) | (uniform * rest <= mass)
