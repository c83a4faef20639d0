"""How tiles lie on ranks, what is exchanged, and what is refused."""

import pytest
import torch
from support.emulated_ranks import local_logits

from vllm_specopt.kernels.sharded.geometry import Parcel, Section, geometry_of
from vllm_specopt.sharded import Shard, shards_of, verify_sharded


@pytest.mark.parametrize(
    ("vocab_size", "padded", "tile"),
    [(1000, 256, 100), (1000, 300, 100), (1000, 500, 100), (90, 24, 100), (1000, 17 * 15, 16), (401, 101, 100)],
)
def test_every_token_is_on_one_rank_and_every_tile_is_whole_or_sent(vocab_size, padded, tile):
    widths = shards_of(vocab_size, 4, padded)[0].widths
    held = [geometry_of(widths, rank, vocab_size, tile, "cpu") for rank in range(4)]
    row = torch.arange(vocab_size)
    parts, whole = [], []
    for rank in held:
        local = row[rank.first : rank.first + rank.columns]
        columns = rank.part_columns
        filled = torch.full((rank.part_width,), -7)
        filled[columns >= 0] = local[columns[columns >= 0]]
        parts.append(filled)
        # No whole tile leaves the rank's columns.
        assert rank.first_tile == rank.end_tile or rank.first <= rank.first_tile * tile
        assert rank.first_tile == rank.end_tile or rank.end <= rank.first + rank.columns
        whole += [(rank.rank, tile_id) for tile_id in range(rank.first_tile, rank.end_tile)]
    parts = torch.cat(parts)
    cut = held[0].cut_tiles.tolist()
    assert sorted([*cut, *(tile_id for _, tile_id in whole)]) == list(range(held[0].num_tiles))
    for number, tile_id in enumerate(cut):
        places = held[0].part_places[number * tile : (number + 1) * tile]
        tokens = torch.arange(tile_id * tile, (tile_id + 1) * tile)
        assert torch.equal(places >= 0, tokens < vocab_size)
        assert torch.equal(parts[places[places >= 0]], tokens[tokens < vocab_size])
        assert held[0].places[tile_id] == -1 - number
    for rank, tile_id in whole:
        assert held[0].places[tile_id] == rank * held[0].most_whole + tile_id - held[rank].first_tile
    assert all(torch.equal(each.places, held[0].places) for each in held)


def test_a_boundary_on_a_tiles_border_cuts_nothing():
    held = geometry_of((200, 200, 200), 1, 600, 100, "cpu")
    assert (held.num_cut, held.part_width, held.first_tile, held.end_tile) == (0, 0, 2, 4)


def test_sections_of_a_parcel_do_not_overlap_and_arrive_as_sent():
    sections = (Section(3, 5), Section(0, 4), Section(3, 7, torch.bfloat16), Section(2, 3, torch.int32))
    ranks = [Parcel(torch.device("cpu"), *sections) for _ in range(2)]
    for rank, parcel in enumerate(ranks):
        for number in (0, 2, 3):
            parcel.section(number).fill_(10 * rank + number)
    received = torch.stack([parcel.buffer for parcel in ranks])
    for number in (0, 2, 3):
        found = ranks[0].section(number, received)
        assert found.shape == (2, *sections[number][:2])
        assert (found[0] == number).all() and (found[1] == 10 + number).all()
        assert found.data_ptr() % 16 == 0


def test_shards_of_a_padded_vocabulary():
    shards = shards_of(1000, 4, 384)
    assert [(shard.first, shard.columns) for shard in shards] == [(0, 384), (384, 384), (768, 232), (1000, 0)]
    assert all(shard.widths == (384, 384, 232, 0) and shard.vocab_size == 1000 for shard in shards)
    with pytest.raises(ValueError, match="2 ranks of 384 columns hold 768, expected 1000 or more"):
        shards_of(1000, 2, 384)


def call(shard: Shard, columns: int = 8, **kwargs):
    rows = torch.tensor([0, 1])
    return verify_sharded(torch.zeros(1, columns), rows, torch.zeros(0, dtype=torch.int64), 0, shard=shard, **kwargs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 2}, "shard has rank 2 of 2"),
        ({"first": 3}, "expected \\(8, 8, 16\\)"),
        ({"vocab_size": 17}, "expected \\(8, 8, 16\\)"),
        ({"widths": (8, 9)}, "expected \\(8, 9, 17\\)"),
    ],
)
def test_wrong_shards_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        call(shards_of(16, 2, 8)[1]._replace(**changes), gather=None)


def test_too_few_columns_are_refused():
    with pytest.raises(ValueError, match="logits has 7 columns, expected at least 8"):
        call(shards_of(16, 2, 8)[1], columns=7, gather=None)


def test_no_requests_exchange_nothing():
    shard = shards_of(16, 2, 8)[0]
    empty, rows = torch.zeros(0, dtype=torch.int64), torch.tensor([0])
    logits = local_logits(torch.zeros(0, 16), shard, 8)
    verified = verify_sharded(logits, rows, empty, 3, shard=shard, gather=None)
    assert verified.token_ids.shape == (0, 4)
