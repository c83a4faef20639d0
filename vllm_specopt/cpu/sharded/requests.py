"""The steps of a sharded verification between exchanges, request by request: entry points of the compiled code."""

import numpy as np

from vllm_specopt.cpu.cache import compile_entry
from vllm_specopt.cpu.draw import find_in_tile, find_tile
from vllm_specopt.cpu.inputs import draft_of, position_of, request_of, token_of
from vllm_specopt.cpu.job import JOB_BAD_ROWS, join, next_request, tell_misfit
from vllm_specopt.cpu.memory import (
    INF,
    fetch_add,
    jit,
    read,
    read_double,
    read_float,
    read_int,
    write_double,
    write_float,
    write_int,
)
from vllm_specopt.cpu.noise import DRAW, RESIDUAL, draw_uniform
from vllm_specopt.cpu.plan import EXACT, LOGITS, ONE_HOT
from vllm_specopt.cpu.requests import end_request, out_of
from vllm_specopt.cpu.rows import TILE, relative, weight_of
from vllm_specopt.cpu.rules.exact import Draft, draft_probability, passes, rest_of, sum_residual, weigh_residual
from vllm_specopt.cpu.sharded.plan import (
    BAD_ROW,
    NEEDS_RESIDUAL,
    NOT_HELD,
    Pieces,
    is_held,
    place_of_tile,
    share_of,
    source_of,
    target_pieces,
)
from vllm_specopt.cpu.sharded.rows import (
    FRAME,
    find_cut_tops,
    find_tops,
    framed,
    largest_of_row,
    mass_of,
    sum_tiles,
    tiles_of,
)
from vllm_specopt.cpu.sweeps import first_in_tile
from vllm_specopt.cpu.target import Target, place_in_tile


@jit
def _note(plan, share, index, of_draft):
    """Address of a row's frame."""
    return share.frames + 8 * FRAME * (index + plan.num_rows * of_draft)


@jit
def _num_needed(plan, num_rows):
    """How many rows of a request are looked at: the bonus row is not where bonus tokens are given."""
    return num_rows - 1 if plan.bonus else num_rows


@jit
def _has_draft_sweep(plan, request, index, is_bonus, is_greedy):
    """Whether a row's draft logits are swept."""
    return plan.mode == LOGITS and not is_bonus and not is_greedy and token_of(plan, request, index) >= 0


@jit
def _own(address, share, index):
    return address + 4 * index * share.most_whole


@jit
def _whole(plan, address, index):
    return address + 4 * index * ((plan.vocab + TILE - 1) // TILE)


@compile_entry
def tell_tops(job):
    """Write the largest logits of this rank's whole tiles, and the target logits of its draft tokens."""
    plan, scratch = join(job)
    share = share_of(plan)
    request = next_request(job)
    while request < plan.num_reqs:
        start, num_rows, state, is_greedy, _, _, _, _ = request_of(plan, request)
        if num_rows < 1:
            tell_misfit(job, request)
        for place in range(_num_needed(plan, num_rows)):
            index, is_bonus = start + place, place == num_rows - 1
            pieces = target_pieces(plan, share, index)
            find_tops(share, pieces, _own(share.own_tops, share, index), scratch.tile)
            if _has_draft_sweep(plan, request, index, is_bonus, is_greedy):
                draft = Pieces(draft_of(plan, request, index, state, place), np.int64(0))
                find_tops(share, draft, _own(share.own_draft_tops, share, index), scratch.draft_tile)
            if plan.mode != ONE_HOT:
                token = np.int64(-1) if is_bonus else token_of(plan, request, index)
                is_mine = share.first <= token < share.first + share.columns
                value = read(pieces.row.address, plan.kind, token) if is_mine else -INF
                write_float(share.logit, index, value)
        request = next_request(job)


@compile_entry
def tell_sums(job):
    """Write the sums of this rank's whole tiles, and the largest logits and sums of cut tiles."""
    plan, scratch = join(job)
    share = share_of(plan)
    request = next_request(job)
    while request < plan.num_reqs:
        start, num_rows, state, is_greedy, _, scale, _, _ = request_of(plan, request)
        for place in range(_num_needed(plan, num_rows)):
            index, is_bonus = start + place, place == num_rows - 1
            pieces, tops = target_pieces(plan, share, index), _whole(plan, share.tops, index)
            find_cut_tops(share, pieces, tops, scratch.tile)
            if not is_greedy:
                own_sums, sums = _own(share.own_sums, share, index), _whole(plan, share.sums, index)
                note = _note(plan, share, index, 0)
                sum_tiles(share, pieces, scale, tops, own_sums, sums, note, scratch.left, scratch.tile)
            if _has_draft_sweep(plan, request, index, is_bonus, is_greedy):
                draft = Pieces(draft_of(plan, request, index, state, place), np.int64(0))
                tops = _whole(plan, share.draft_tops, index)
                find_cut_tops(share, draft, tops, scratch.draft_tile)
                own_sums, sums = _own(share.own_draft_sums, share, index), _whole(plan, share.draft_sums, index)
                note = _note(plan, share, index, 1)
                sum_tiles(share, draft, scale, tops, own_sums, sums, note, scratch.left, scratch.draft_tile)
        request = next_request(job)


@jit
def _target(pieces, frame, mass):
    """A row without filters, as ``target.py`` has it."""
    return Target(pieces.row, frame, mass, -INF, pieces.row, -INF, np.int64(-1))


@jit
def _draw(plan, share, pieces, frame, mass, index, uniform, scratch):
    """A token of a row, by inversion; NOT_HELD where its tile is another rank's."""
    goal = uniform * mass
    tile, before = find_tile(_whole(plan, share.sums, index), tiles_of(pieces.row), goal)
    if not is_held(share, tile):
        return NOT_HELD
    source = Pieces(source_of(share, pieces, tile), np.int64(0))
    return place_in_tile(_target(source, frame, mass), tile, goal - before, scratch)


@jit
def _draft(plan, share, request, index, state, place, scale, frame):
    """A row's draft; its mass is that of its sums."""
    row = draft_of(plan, request, index, state, place)
    if plan.mode != LOGITS:
        return Draft(plan.mode, row, frame, 1.0)
    pieces, draft_frame = framed(Pieces(row, np.int64(0)), scale, _note(plan, share, index, 1))
    mass = mass_of(_whole(plan, share.draft_sums, index), tiles_of(row))
    return Draft(plan.mode, pieces.row, draft_frame, mass)


@jit
def _outcome(plan, share, request, index, place, token, state, is_greedy, scale, seed, scratch):
    """What a row found: a token, or that this rank cannot tell, that a residual is needed, that no logit is usable."""
    pieces = target_pieces(plan, share, index)
    if is_greedy:
        top, tile = largest_of_row(_whole(plan, share.tops, index), tiles_of(pieces.row))
        if top == -INF:
            return np.int64(0) if token == 0 else BAD_ROW
        if not is_held(share, tile):
            return NOT_HELD
        return first_in_tile(source_of(share, pieces, tile), tile * TILE, top, scratch.tile)
    note = _note(plan, share, index, 0)
    pieces, frame = framed(pieces, scale, note)
    mass = mass_of(_whole(plan, share.sums, index), tiles_of(pieces.row))
    write_double(note, 3, mass)
    if not mass > 0.0:
        return BAD_ROW
    position = position_of(plan, index, place)
    if plan.mode == ONE_HOT or token < 0:
        return _draw(plan, share, pieces, frame, mass, index, draw_uniform(seed, position, DRAW), scratch)
    draft = _draft(plan, share, request, index, state, place, scale, frame)
    target_prob = np.float64(weight_of(relative(pieces.row, read_float(share.logit, index)), frame)) / mass
    survives = passes(target_prob, draft_probability(draft, token), seed, position)
    return token if survives else NEEDS_RESIDUAL


@compile_entry
def decide_rows(job):
    """Write what each row found."""
    plan, scratch = join(job)
    share = share_of(plan)
    request = next_request(job)
    while request < plan.num_reqs:
        start, num_rows, state, is_greedy, _, scale, seed, _ = request_of(plan, request)
        for place in range(_num_needed(plan, num_rows)):
            index = start + place
            token = np.int64(-1) if place == num_rows - 1 else token_of(plan, request, index)
            outcome = _outcome(plan, share, request, index, place, token, state, is_greedy, scale, seed, scratch)
            write_int(share.outcome, index, False, outcome)
        request = next_request(job)


@compile_entry
def end_requests(job):
    """Write and count the tokens of each request, and where its residual is needed."""
    plan, _ = join(job)
    share = share_of(plan)
    request = next_request(job)
    while request < plan.num_reqs:
        start, num_rows, _, _, _, _, _, _ = request_of(plan, request)
        place, num_drafts, out = np.int64(0), num_rows - 1, out_of(plan, request)
        while place < num_drafts:
            token = token_of(plan, request, start + place)
            if token < 0 or read_int(share.outcome, start + place, False) != token:
                break
            write_int(out, place, plan.wide_token_ids, token)
            place += 1
        if plan.bonus and place == num_drafts:
            emitted, num_read = read_int(plan.bonus, request, plan.wide_bonus), num_drafts
        else:
            emitted = read_int(share.outcome, start + place, False)
            num_read = _num_needed(plan, num_rows)
            if emitted == BAD_ROW:
                fetch_add(job + 8 * JOB_BAD_ROWS, np.int64(1))
        write_int(share.pending, request, False, place if emitted == NEEDS_RESIDUAL else np.int64(-1))
        end_request(plan, request, EXACT, place, emitted, num_drafts, num_read, 0.0)
        request = next_request(job)


@jit
def _rejected(plan, share, request, place):
    """Of a request's rejected row: its number, its pieces, the target and what the residual is computed from."""
    start, _, state, _, _, scale, seed, _ = request_of(plan, request)
    index = start + place
    note = _note(plan, share, index, 0)
    pieces, frame = framed(target_pieces(plan, share, index), scale, note)
    mass = read_double(note, 3)
    draft = _draft(plan, share, request, index, state, place, scale, frame)
    uniform = draw_uniform(seed, position_of(plan, index, place), RESIDUAL)
    return index, pieces, frame, mass, draft, uniform


@compile_entry
def tell_residuals(job):
    """Write the residual masses of the tiles of rejected rows that this rank can read."""
    plan, scratch = join(job)
    share = share_of(plan)
    request = next_request(job)
    while request < plan.num_reqs:
        place = read_int(share.pending, request, False)
        if place >= 0:
            _, pieces, frame, mass, draft, _ = _rejected(plan, share, request, place)
            rest = rest_of(_target(pieces, frame, mass), draft, 1.0, scratch)
            for tile in range(tiles_of(pieces.row)):
                if is_held(share, tile):
                    source = Pieces(source_of(share, pieces, tile), np.int64(0))
                    tile_sum = sum_residual(_target(source, frame, mass), rest, tile * TILE, scratch)
                    if place_of_tile(share, tile) < 0:
                        write_float(_whole(plan, share.masses, request), tile, tile_sum)
                    else:
                        write_float(_own(share.own_masses, share, request), tile - share.first_tile, tile_sum)
        request = next_request(job)


@compile_entry
def recover(job):
    """Write the tokens that replace rejected ones, where their tiles are ones that this rank can read."""
    plan, scratch = join(job)
    share = share_of(plan)
    request = next_request(job)
    while request < plan.num_reqs:
        place, token = read_int(share.pending, request, False), NOT_HELD
        if place >= 0:
            index, pieces, frame, mass, draft, uniform = _rejected(plan, share, request, place)
            masses = _whole(plan, share.masses, request)
            total = mass_of(masses, tiles_of(pieces.row))
            if not total > 0.0:
                token = _draw(plan, share, pieces, frame, mass, index, uniform, scratch)
            else:
                goal = uniform * total
                tile, before = find_tile(masses, tiles_of(pieces.row), goal)
                if is_held(share, tile):
                    target = _target(Pieces(source_of(share, pieces, tile), np.int64(0)), frame, mass)
                    weigh_residual(target, rest_of(target, draft, 1.0, scratch), tile * TILE, scratch)
                    token = tile * TILE + find_in_tile(scratch.weights, goal - before)
        write_int(share.found, request, False, token)
        request = next_request(job)
