"""What a verification notes of its rows, so that an audit of the same step need not sweep them again.

Of a row: its mass, threshold and frame, and the largest logit of each tile, a hundredth of the row's bytes.
"""

from typing import NamedTuple

import numpy as np

from vllm_specopt.cpu.filters import tops_of_tiles
from vllm_specopt.cpu.lanes import WIDTH, load_fp32, store
from vllm_specopt.cpu.memory import jit, read_double, read_float, read_int, write_double, write_float, write_int
from vllm_specopt.cpu.rows import TILE, Frame, Row, frame_at

# Bytes: whether there is a note, mass, reference (fp64), whether the row is shifted, origin and threshold (fp32).
HEAD = 64


class Noted(NamedTuple):
    """A row after temperature and filters.

    row, frame, mass: The row before filters; weights are those of its logits in the frame, and the mass is their sum
        over what the filters keep.
    threshold: The smallest logit that is kept.
    tops: Address of a number per tile that no logit of it exceeds.
    """

    row: Row
    frame: Frame
    mass: float
    threshold: np.float32
    tops: int


@jit
def noted(target, is_filtered, scratch):
    """What there is to note of a row that was just swept; the numbers of its tiles lie in ``scratch``."""
    row = target.source
    if not is_filtered:
        tops_of_tiles((row.vocab + TILE - 1) // TILE, scratch)
    return Noted(row, target.frame, target.mass, target.threshold, scratch.tile_tops)


@jit
def size_of_note(vocab):
    """Bytes of a row's note."""
    return HEAD + 4 * WIDTH * ((vocab + TILE * WIDTH - 1) // (TILE * WIDTH))


@jit
def note_at(plan, index):
    """Address of a row's note; 0 if none is taken."""
    return plan.notes + index * size_of_note(plan.vocab) if plan.notes else np.int64(0)


@jit
def clear_notes(plan, start, num_rows):
    """Mark rows as not noted."""
    for index in range(start, start + num_rows):
        write_int(note_at(plan, index), 0, True, np.int64(0))


@jit
def write_note(address, noted):
    """Note a row."""
    row = noted.row
    write_int(address, 0, True, np.int64(1))
    write_double(address, 1, noted.mass)
    write_double(address, 2, noted.frame.reference)
    write_int(address, 3, True, np.int64(row.is_shifted))
    write_float(address, 8, row.origin)
    write_float(address, 9, noted.threshold)
    for i in range(0, (row.vocab + TILE - 1) // TILE, WIDTH):
        store(address + HEAD + 4 * i, load_fp32(noted.tops + 4 * i))


@jit
def has_note(address):
    """Whether there is a note of a row."""
    return address != 0 and read_int(address, 0, True) != 0


@jit
def read_note(address, row, scale):
    """The note of a row, of which address, dtype and length are known."""
    row = Row(row.address, row.kind, row.vocab, read_float(address, 8), read_int(address, 3, True))
    frame = frame_at(scale, read_double(address, 2))
    return Noted(row, frame, read_double(address, 1), read_float(address, 9), address + HEAD)
