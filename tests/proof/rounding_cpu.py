"""The numbers with which the CPU backend draws from a row: sums of tiles, and weights of the tokens of each."""

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from numba import carray, types

from vllm_specopt.cpu.cache import compile_entry
from vllm_specopt.cpu.filters import apply_filters
from vllm_specopt.cpu.memory import BF16, FP32, INF, ZERO, jit, pointer, read_float, read_int
from vllm_specopt.cpu.plan import LOG2_E, scratch_at
from vllm_specopt.cpu.rows import TILE, Row, weigh_tile
from vllm_specopt.cpu.sweeps import sweep
from vllm_specopt.cpu.target import Target, draw_target

KINDS = {torch.float32: FP32, torch.bfloat16: BF16}


@jit
def _swept(job):
    words = carray(pointer(job, types.int64), 12)
    scratch, _ = scratch_at(words[4], words[2])
    scale = np.float32(LOG2_E / np.float64(read_float(words[3], 0)))
    row = Row(words[0], words[1], words[2], ZERO, np.int64(0))
    row, frame, mass = sweep(row, scale, scratch.left, scratch.tile)
    return Target(row, frame, mass, -INF, row, -INF, np.int64(-1)), scratch


@jit
def _write(job, target, scratch):
    words = carray(pointer(job, types.int64), 12)
    count = target.row.vocab
    sums = carray(pointer(words[5], types.float32), count)
    weights = carray(pointer(words[6], types.float32), count)
    kept = carray(pointer(words[7], types.int64), count)
    for start in range(0, count, TILE):
        sums[start // TILE] = read_float(scratch.left.sums, start // TILE)
        weigh_tile(target.row, target.frame, start, target.floor, scratch.tile, scratch.weights)
        for i in range(start, min(count, start + TILE)):
            weights[i] = read_float(scratch.weights, i - start)
            kept[i] = read_int(scratch.pool_tokens, i, True) if target.gathered >= 0 else i
    uniforms = carray(pointer(words[8], types.float64), words[10] + 1)
    tokens = carray(pointer(words[9], types.int64), words[10] + 1)
    for i in range(words[10]):
        tokens[i] = draw_target(target, uniforms[i], scratch)
    words[11] = count


def _probe(job):
    """Sweep a row; write down its numbers, and the tokens drawn for uniforms.

    job: address of logits, dtype, vocabulary, addresses of (temperature, top_p), memory, sums, weights, the tokens they
    are of, uniforms, and tokens; number of uniforms; and, written, how many tokens are left.
    """
    target, scratch = _swept(job)
    _write(job, target, scratch)


def _filtered_probe(job):
    """The same after top-p. A function of its own: filters take half a minute to compile."""
    target, scratch = _swept(job)
    top_p = np.float64(read_float(carray(pointer(job, types.int64), 12)[3], 1))
    _write(job, apply_filters(target.row, target.frame, target.mass, np.int64(0), top_p, 0.0, scratch), scratch)


@cache
def _compiled(filters: bool):
    return compile_entry(_filtered_probe if filters else _probe)


def read_row(
    row: torch.Tensor, temperature: float, top_p: float, device: str
) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray], int]:
    """As of ``rounding_triton``."""
    probe = _compiled(top_p < 1).ctypes
    vocab_size, logits = len(row), row.contiguous()
    parameters = np.array([temperature, top_p], np.float32)
    memory = np.empty(64 * vocab_size + (1 << 20), np.uint8)
    sums, weights = np.zeros(vocab_size, np.float32), np.zeros(vocab_size, np.float32)
    kept = np.zeros(vocab_size, np.int64)

    def run(uniforms: np.ndarray) -> tuple[int, np.ndarray]:
        tokens = np.zeros(len(uniforms) + 1, np.int64)
        arrays = (parameters, memory, sums, weights, kept, uniforms, tokens)
        words = [logits.data_ptr(), KINDS[row.dtype], vocab_size, *(array.ctypes.data for array in arrays)]
        job = np.array([*words, len(uniforms), 0], np.int64)
        probe(job.ctypes.data)
        return int(job[11]), tokens[:-1]

    count, _ = run(np.zeros(0))
    tiles = -(-count // TILE)
    fine = np.zeros(tiles * TILE)
    fine[:count] = weights[:count]
    running, masses = fine.reshape(tiles, TILE).cumsum(1), sums[:tiles, None].astype(np.float64)
    # A tile's last token of any weight ends where the tile's own sum does.
    last = TILE - 1 - (fine.reshape(tiles, TILE)[:, ::-1] > 0).argmax(1)
    ends = np.where(np.arange(TILE) >= last[:, None], masses, np.minimum(running, masses))
    probs = np.zeros(vocab_size)
    probs[kept[:count]] = np.diff(ends, prepend=0.0, axis=1).ravel()[:count] / masses.sum()
    return probs, lambda uniforms: run(uniforms)[1], TILE
