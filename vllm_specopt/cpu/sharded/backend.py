"""The Python side: what is exchanged when, and the compiled steps in between.

A sweep of a whole row takes its weights relative to a reference that follows the largest logit so far. So largest
logits are exchanged before sums: where a step samples, that is one exchange more than on a GPU.
"""

from collections.abc import Callable

import numpy as np
import torch

from vllm_specopt.cpu.backend import address_of, common_of, drafts_of, ints_of, run
from vllm_specopt.cpu.rows import TILE
from vllm_specopt.cpu.sharded.plan import Share
from vllm_specopt.cpu.sharded.requests import decide_rows, end_requests, recover, tell_residuals, tell_sums, tell_tops
from vllm_specopt.cpu.sharded.rows import FRAME
from vllm_specopt.kernels.sharded.geometry import Geometry, Parcel, Section, geometry_of


def verify_shard(
    logits: torch.Tensor,  # [num_rows, columns]: this rank's
    cu_num_logits: torch.Tensor,  # [num_reqs + 1]
    draft_token_ids: torch.Tensor,  # [num_rows] or [num_rows - num_reqs]
    *,
    widths: tuple[int, ...],
    rank: int,
    gather: Callable[[torch.Tensor], torch.Tensor],
    token_ids: torch.Tensor,  # [num_reqs, max_num_draft_tokens + 1]
    num_sampled: torch.Tensor,  # [num_reqs]
    temperature: torch.Tensor | None = None,  # [max_reqs]
    seeds: torch.Tensor | None = None,  # [max_reqs]
    positions: torch.Tensor | None = None,  # [num_rows]
    state_indices: torch.Tensor | None = None,  # [num_reqs]
    draft_probs: torch.Tensor | None = None,  # [num_rows - num_reqs, draft_vocab]
    draft_logits: torch.Tensor | None = None,  # [max_reqs, max_drafts, draft_vocab]
    bonus_token_ids: torch.Tensor | None = None,  # [num_reqs]
    bad_row_counter: torch.Tensor | None = None,  # [1]
    counters: torch.Tensor | None = None,  # [num_rules, 8]
) -> None:
    """Verify on the CPU; arguments and meaning as in :func:`vllm_specopt.sharded.verify_sharded`.

    ``widths``: columns of every rank. Writes every element of ``token_ids`` and ``num_sampled``.

    Raises:
        ValueError: ``cu_num_logits`` or ``state_indices`` of some request points outside the other arguments.
    """
    num_rows, num_reqs = logits.shape[0], cu_num_logits.shape[0] - 1
    draft = draft_probs if draft_probs is not None else draft_logits
    vocab_size = sum(widths) if draft is None else min(sum(widths), draft.shape[-1])
    held = geometry_of(widths, rank, vocab_size, TILE, "cpu")
    is_greedy, is_one_hot = temperature is None, temperature is None or draft is None
    more = {} if draft_logits is None else {"num_states": len(draft_logits)}
    common = common_of(
        logits, cu_num_logits, token_ids, num_sampled, vocab_size, 0, counters, None,
        temperature=temperature,
        seeds=seeds,
        positions=positions,
        state_indices=state_indices,
        **more,
    )  # fmt: skip
    own = (0, *drafts_of(draft_token_ids, num_rows, draft_probs, draft_logits), *ints_of(bonus_token_ids), 0)
    known: dict[str, int | torch.Tensor] = dict.fromkeys(Share._fields, 0)
    known |= {name: getattr(held, name) for name in Share._fields if name in Geometry._fields}
    known["frames"] = torch.empty(2, num_rows, FRAME, dtype=torch.float64)

    def take(step) -> int:
        words = [address_of(each) if isinstance(each, torch.Tensor) else each for each in known.values()]
        share = np.array(words, dtype=np.int64)
        return run(step, common, (*own, share.ctypes.data), "1 to max_num_draft_tokens + 1")

    per_tile = Section(num_rows, held.most_whole)
    per_draft_tile = Section(0 if draft_logits is None or is_one_hot else num_rows, held.most_whole)
    per_draft = Section(0 if draft is None else num_rows, 1)
    parts = Section(num_rows, held.part_width, logits.dtype)
    parcel = Parcel(logits.device, per_tile, per_draft_tile, per_draft, parts)
    known |= {"own_tops": parcel.section(0), "own_draft_tops": parcel.section(1), "logit": parcel.section(2)}
    take(tell_tops)
    parcel.section(3).copy_(logits.index_select(1, held.part_columns.clamp(min=0)))
    received = gather(parcel.buffer)
    known["tops"] = _whole_rows(parcel.section(0, received), held.places)
    known["draft_tops"] = _whole_rows(parcel.section(1, received), held.places)
    known["logit"] = parcel.section(2, received).amax(0)
    known["cut"] = _whole_rows(parcel.section(3, received), held.part_places)

    parcel = Parcel(logits.device, per_tile, per_draft_tile)
    known |= {"own_sums": parcel.section(0), "own_draft_sums": parcel.section(1)}
    # Cut tiles are added to whole rows before the others are known.
    known |= {"sums": torch.empty(num_rows, held.num_tiles), "draft_sums": torch.empty(num_rows, held.num_tiles)}
    take(tell_sums)
    if not is_greedy:
        received = gather(parcel.buffer)
        _fill(known["sums"], parcel.section(0, received), held.places)
        if per_draft_tile.rows:
            _fill(known["draft_sums"], parcel.section(1, received), held.places)

    outcome, pending = torch.empty(num_rows, dtype=torch.int32), torch.empty(num_reqs, dtype=torch.int32)
    known |= {"outcome": outcome, "pending": pending}
    take(decide_rows)
    known["outcome"] = _largest(outcome, gather)
    bad_rows = take(end_requests)
    if bad_rows and bad_row_counter is not None:
        bad_row_counter += bad_rows
    if is_one_hot:
        return

    parcel = Parcel(logits.device, Section(num_reqs, held.most_whole))
    known |= {"own_masses": parcel.section(0), "masses": torch.empty(num_reqs, held.num_tiles)}
    take(tell_residuals)
    _fill(known["masses"], parcel.section(0, gather(parcel.buffer)), held.places)
    found = torch.empty(num_reqs, dtype=torch.int32)
    known["found"] = found
    take(recover)
    recovered, place = _largest(found, gather), pending.clamp(min=0).long()[:, None]
    emitted = torch.where(pending >= 0, recovered.to(token_ids.dtype), token_ids.gather(1, place)[:, 0])
    token_ids.scatter_(1, place, emitted[:, None])


def _whole_rows(sent: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """``[rows, len(places)]``: for each place what was sent there, from ``[ranks, rows, width]``; anything below 0."""
    return sent.transpose(0, 1).flatten(1).index_select(1, places.clamp(min=0))


def _fill(rows: torch.Tensor, sent: torch.Tensor, places: torch.Tensor) -> None:
    """Write what was sent of whole tiles into rows that hold the cut ones."""
    whole = (places >= 0).nonzero()[:, 0]
    rows[:, whole] = _whole_rows(sent, places[whole])


def _largest(numbers: torch.Tensor, gather: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The largest of all ranks' int32 numbers."""
    return gather(numbers.view(torch.float32)).view(torch.int32).amax(0)
