"""Launches of compiled variants: what Triton would compile anew never goes by a key that is known already."""

import itertools
import os
from functools import partial

import pytest
import torch

pytest.importorskip("triton")

from support.launch_keys import recorded

from vllm_specopt.kernels import launch, variants
from vllm_specopt.kernels.sharded import launch as shard_launch
from vllm_specopt.rules import PAPER, RULES
from vllm_specopt.sharded import shards_of, verify_sharded
from vllm_specopt.testing import LOGITS, NO_DRAFT, PROBS, random_batch
from vllm_specopt.verify import verify

FILTERS = ("top_k", "top_p", "min_p")
NUM_DRAFTS = [2, 0, 3]


def laid_out(like, *strides, offset=0):
    """Zeros of the same shape and dtype, with these strides along all dimensions but the last."""
    return torch.zeros(8192, dtype=like.dtype).as_strided(like.shape, (*strides, 1), offset)


def changed(batch):
    """Changes to a batch's arguments, each of which another caller may come with."""
    logits, reqs = batch.logits, batch.num_reqs
    yield {}
    yield {"logits": laid_out(logits, 124, offset=1)}
    yield {"logits": laid_out(logits, 128)}
    yield {"logits": logits[:, :96]}
    yield {"cu_num_logits": batch.cu_num_logits.long()}
    yield {"temperature": None}
    yield {"positions": None}
    yield {"positions": batch.kwargs["positions"].int()}
    yield {"state_indices": torch.zeros(reqs, dtype=torch.int32)}
    yield {"state_indices": torch.zeros(reqs, dtype=torch.int64)}
    yield {"bonus_token_ids": torch.zeros(reqs, dtype=torch.int32)}
    yield {"bonus_token_ids": torch.zeros(reqs, dtype=torch.int64)}
    yield {"bad_row_counter": torch.zeros(1, dtype=torch.int64)}
    yield {"counters": torch.zeros(len(RULES), 8, dtype=torch.int64)}
    yield {"rule": PAPER}
    yield {"rule": PAPER, "rule_requests": torch.zeros(reqs, dtype=torch.bool)}
    yield {"token_dtype": torch.int32}
    for name in FILTERS:
        if name in batch.kwargs:
            yield {name: None}
    if "top_k" in batch.kwargs:
        yield {"top_k": batch.kwargs["top_k"].long()}
    if "draft_logits" not in batch.kwargs:
        yield {"max_num_draft_tokens": 8}
    drafts = {"draft_probs": [(100,), (112,)], "draft_logits": [(340, 100), (340, 112), (352, 100)]}
    for name, layouts in drafts.items():
        if name in batch.kwargs:
            draft = batch.kwargs[name]
            yield {name: draft.half()}
            yield {name: draft[..., :96]}
            yield {name: laid_out(draft, *layouts[0], offset=1)}
            for strides in layouts:
                yield {name: laid_out(draft, *strides)}


SHARDS = shards_of(100, 3, 40)
CALLERS = {
    "one rank": (launch, verify),
    # The first rank has no cut tile of its own to begin with, the last one fewer columns than the others.
    **{
        f"rank {rank} of 3": (
            shard_launch,
            partial(verify_sharded, shard=SHARDS[rank], gather=lambda sent: sent.expand(3, -1).contiguous()),
        )
        for rank in range(3)
    },
}


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="launches are recorded in the interpreter")
@pytest.mark.parametrize("caller", CALLERS)
def test_a_variant_is_compiled_once(caller, monkeypatch):
    compiled: dict[tuple, set] = {}
    taken, launches = [], 0
    module, call = CALLERS[caller]

    def variant_of(*args):
        taken.append(variants.variant_of(*args))
        return taken[-1]

    monkeypatch.setattr(module, "variant_of", variant_of)
    kinds = itertools.product((NO_DRAFT, PROBS, LOGITS), (torch.float32, torch.bfloat16), ((), FILTERS), (False, True))
    # The second seed brings other values, more requests, and draft tokens of another type.
    for (draft, dtype, filters, by_row), seed in itertools.product(kinds, (1, 2)):
        batch = random_batch(
            seed=seed,
            num_drafts=NUM_DRAFTS * seed,
            vocab_size=100,
            dtype=dtype,
            draft=draft,
            filters=filters,
            rows_layout=by_row,
            shuffled_state=False,
        )
        names = ("logits", "cu_num_logits", "draft_token_ids", "max_num_draft_tokens")
        arguments = dict(zip(names, batch.args(), strict=True)) | batch.kwargs
        for change in changed(batch):
            changed_arguments = arguments | change
            if module is shard_launch and not is_for_ranks(changed_arguments):
                continue
            with recorded(run=False) as keys:
                call(**changed_arguments, backend="triton")
            assert compiled.setdefault(taken[-1], keys) == keys, (draft, dtype, filters, by_row, change.keys())
            launches += 1
    assert len(taken) == launches and len(compiled) < launches


def is_for_ranks(arguments):
    """Ranks verify exactly, without bonus tokens beside filters."""
    is_filtered = any(arguments.get(name) is not None for name in FILTERS)
    return "rule" not in arguments and not (is_filtered and "bonus_token_ids" in arguments)


@pytest.mark.parametrize("grid", [(6,), (6, 2), (6, 2, 3)])
def test_a_compiled_variant_is_launched_as_it_is(grid):
    said = []

    class Compiled:
        def __getitem__(self, sizes):
            return lambda *args: said.append(("compiled", (sizes[0], sizes[1], sizes[2]), args))

    class Kernel:
        def __getitem__(self, sizes):
            return lambda *args, **options: said.append(("kernel", sizes, args, options)) or Compiled()

    launcher = variants.Launcher(Kernel())
    for variant in ("a", "a", "b"):
        launcher(variant, grid, {"num_warps": 4}, 1, None, TILE=8, STEPS=2)
    first = ("kernel", grid, (1, None), {"TILE": 8, "STEPS": 2, "num_warps": 4})
    # Compiled kernels take three sizes, whatever the grid's dimensions.
    assert said == [first, ("compiled", (*grid, 1, 1)[:3], (1, None, 8, 2)), first]
