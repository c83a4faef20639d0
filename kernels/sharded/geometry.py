"""How the tiles of a row lie on the ranks: most are whole on one of them, a few are cut by a boundary.

The partition of a row into tiles is that of a single rank. A whole tile's statistics are made by the rank that holds
it; the logits of a cut tile travel, so that every rank makes its statistics, from the whole tile.
"""

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch

ALIGNMENT = 8
"""Elements of which the parts of a row are a multiple: 16 bytes of the narrowest dtype."""


class Geometry(NamedTuple):
    """The tiles of a row of ``vocab_size`` tokens, as one rank sees them.

    first, columns: The rank's tokens. first_tile, end_tile: Its whole tiles. most_whole: Those of the rank that has
        most, at least 1. num_cut: Cut tiles of the row. begun_tile, end_begun: The cut tiles that begin with the rank's
        tokens, behind its whole ones; -1 and 0 if none do. part_width: Elements that each rank sends of the cut tiles.
    places: ``[at least num_tiles]`` int32. rank x most_whole + (number among that rank's whole tiles), or -1 - (number
        among the cut tiles).
    cut_tiles: ``[num_cut]`` int32, their numbers in the row; the last may lie behind it.
    part_columns: ``[part_width]`` int32, the columns of the rank's own logits that lie in cut tiles, then -1.
    part_places: ``[num_cut * tile]`` int32, rank x part_width + place of each token of the cut tiles among what the
        ranks send; -1 beyond the vocabulary.
    """

    tile: int
    num_tiles: int
    vocab_size: int
    ranks: int
    rank: int
    first: int
    columns: int
    first_tile: int
    end_tile: int
    most_whole: int
    num_cut: int
    begun_tile: int
    end_begun: int
    part_width: int
    places: torch.Tensor
    cut_tiles: torch.Tensor
    part_columns: torch.Tensor
    part_places: torch.Tensor

    @property
    def end(self) -> int:
        """The token behind the rank's last whole tile."""
        return min(self.end_tile * self.tile, self.vocab_size)


@lru_cache(maxsize=64)
def geometry_of(
    widths: tuple[int, ...], rank: int, vocab_size: int, tile: int, device: torch.device | str, part_tile: int = 0
) -> Geometry:
    """The tiles of a row; kept, so that only a first call copies to the device.

    Args:
        widths: Columns of every rank, in the order of the vocabulary.
        vocab_size: Tokens that count; columns beyond them are nobody's.
        tile: Tokens of a tile.
        part_tile: A multiple of it: the tiles of all such spans that a boundary cuts are cut. Geometries of one
            ``part_tile`` have the same cut tokens, in the same places. 0: ``tile``.
    """
    bounds = [min(bound, vocab_size) for bound in (0, *accumulate(widths))]
    owners = torch.bucketize(torch.arange(vocab_size), torch.tensor(bounds[1:]), right=True)
    num_tiles, per_part = -(-vocab_size // tile), max(part_tile, tile) // tile
    whole: list[list[int]] = [[] for _ in widths]
    cut: list[int] = []
    places = []
    begun_tile, end_begun = -1, 0
    for start in range(0, num_tiles, per_part):
        tiles = range(start, start + per_part)
        low, high = owners[start * tile], owners[min(tiles.stop * tile, vocab_size) - 1]
        if low == high:
            places += [(int(low), len(whole[low]) + number) for number in range(per_part)]
            whole[low] += tiles[: num_tiles - start]
        else:
            places += [(-1, len(cut) + number) for number in range(per_part)]
            cut += tiles
            if low == rank:
                begun_tile, end_begun = start, tiles.stop
    most_whole = max(1, *map(len, whole))
    cut_tokens = (torch.tensor(cut, dtype=torch.int64)[:, None] * tile + torch.arange(tile)).flatten()
    holders = torch.where(cut_tokens < vocab_size, owners[cut_tokens.clamp(max=vocab_size - 1)], -1)
    part_width = max(int((holders == each).sum()) for each in range(len(widths)))
    part_width = -(-part_width // ALIGNMENT) * ALIGNMENT
    part_places = torch.full_like(cut_tokens, -1)
    for each in range(len(widths)):
        part_places[holders == each] = each * part_width + torch.arange(int((holders == each).sum()))
    part_columns = torch.full((part_width,), -1, dtype=torch.int64)
    held = cut_tokens[holders == rank] - bounds[rank]
    part_columns[: len(held)] = held

    def ints(values) -> torch.Tensor:
        return torch.as_tensor(values, dtype=torch.int32).to(device)

    own = whole[rank] or [0]
    return Geometry(
        tile=tile,
        num_tiles=num_tiles,
        vocab_size=vocab_size,
        ranks=len(widths),
        rank=rank,
        first=bounds[rank],
        columns=bounds[rank + 1] - bounds[rank],
        first_tile=own[0],
        end_tile=own[0] + len(whole[rank]),
        most_whole=most_whole,
        num_cut=len(cut),
        begun_tile=begun_tile,
        end_begun=end_begun,
        part_width=part_width,
        places=ints([holder * most_whole + place if holder >= 0 else -1 - place for holder, place in places]),
        cut_tiles=ints(cut),
        part_columns=ints(part_columns),
        part_places=ints(part_places),
    )


class Section(NamedTuple):
    """A part of what a rank sends: ``[rows, width]`` numbers of a dtype."""

    rows: int
    width: int
    dtype: torch.dtype = torch.float32


class Parcel:
    """One buffer that a rank sends, in sections that begin at multiples of 16 bytes.

    Exchanged as fp32, whatever a section holds: all that carries it has that dtype, and must not look at the numbers.
    """

    def __init__(self, device: torch.device, *sections: Section):
        self._sections, self._begins, end = sections, [], 0
        for rows, width, dtype in sections:
            self._begins.append(end)
            end += -(-rows * width * dtype.itemsize // 16) * 4
        self.buffer = torch.empty(end, dtype=torch.float32, device=device)

    def section(self, number: int, received: torch.Tensor | None = None) -> torch.Tensor:
        """A section ``[rows, width]`` of this rank's buffer, or ``[ranks, rows, width]`` of all ranks' ``received``."""
        rows, width, dtype = self._sections[number]
        begin, words = self._begins[number], -(-rows * width * dtype.itemsize // 16) * 4
        if received is None:
            return self.buffer[begin : begin + words].view(dtype)[: rows * width].view(rows, width)
        mine = received[:, begin : begin + words].view(dtype)[:, : rows * width]
        return mine.unflatten(1, (rows, width))
