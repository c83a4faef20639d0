"""Every wrong argument of verify() raises a ValueError that names it, what it is and what it should be."""

import doctest
import sys

import pytest
import torch

from vllm_specopt.testing import LOGITS, PROBS, random_batch
from vllm_specopt.verify import verify


def batch(draft=PROBS):
    return random_batch(seed=1, num_drafts=[2, 3], vocab_size=20, draft=draft, shuffled_state=False)


def strided(tensor):
    return torch.stack([tensor, tensor], dim=-1)[..., 0]


CASES = {
    "logits has 3 dimensions, expected 2": {"logits": lambda t: t[None]},
    "logits has dtype float64, expected one of bfloat16, float16, float32": {"logits": lambda t: t.double()},
    "logits has stride 2 along its last dimension, expected 1": {"logits": strided},
    "logits has a vocabulary of 0 tokens, expected at least 1": {"logits": lambda t: t[:, :0]},
    "logits has 7 rows, expected 2 to 4": {"max_num_draft_tokens": lambda _: 1},
    "max_num_draft_tokens is 129, expected 0 to 128": {"max_num_draft_tokens": lambda _: 129},
    "cu_num_logits has dtype float32, expected one of int32, int64": {"cu_num_logits": lambda t: t.float()},
    "cu_num_logits has length 0, expected at least 1": {"cu_num_logits": lambda t: t[:0]},
    r"draft_token_ids has length 4, expected 5 \(draft tokens\) or 7 \(rows\)": {"draft_token_ids": lambda t: t[:4]},
    "draft_token_ids has stride 2": {"draft_token_ids": strided},
    "temperature has length 3, expected 2": {"temperature": lambda t: torch.ones(3)},
    "temperature has dtype float64, expected one of float32": {"temperature": lambda t: t.double()},
    "temperature is on meta, expected cpu": {"temperature": lambda t: t.to("meta")},
    "seeds is None, expected a tensor": {"seeds": lambda _: None},
    "seeds has dtype int32, expected one of int64": {"seeds": lambda t: t.int()},
    "positions has length 5, expected 7": {"positions": lambda t: t[:5]},
    "state_indices has length 3, expected 2": {"state_indices": lambda _: torch.zeros(3, dtype=torch.int32)},
    "draft_probs has length 4, expected 5": {"draft_probs": lambda t: t[:4]},
    "draft_probs has dtype float64": {"draft_probs": lambda t: t.double()},
    "draft_probs has stride 2": {"draft_probs": strided},
    "draft_probs and draft_logits are both given": {"draft_logits": lambda _: torch.zeros(2, 3, 20)},
    "top_k has dtype float32, expected one of int32, int64": {"top_k": lambda _: torch.ones(2)},
    "top_p has length 1, expected 2": {"top_p": lambda _: torch.ones(1)},
    "min_p has 2 dimensions, expected 1": {"min_p": lambda _: torch.ones(2, 1)},
    "bonus_token_ids has length 1, expected 2": {"bonus_token_ids": lambda _: torch.ones(1, dtype=torch.int32)},
    "bad_row_counter has dtype int32": {"bad_row_counter": lambda _: torch.zeros(1, dtype=torch.int32)},
    "token_dtype is torch.int16, expected one of int32, int64": {"token_dtype": lambda _: torch.int16},
    "backend is 'gpu', expected one of triton, cpu": {"backend": lambda _: "gpu"},
}


@pytest.mark.parametrize("message", CASES)
def test_wrong_argument(message):
    good = batch()
    names = ("logits", "cu_num_logits", "draft_token_ids", "max_num_draft_tokens")
    arguments = dict(zip(names, good.args(), strict=True)) | good.kwargs
    for name, spoil in CASES[message].items():
        arguments[name] = spoil(arguments.get(name))
    with pytest.raises(ValueError, match=message):
        verify(**arguments)


def test_draft_logits_with_too_few_positions():
    good = batch(LOGITS)
    good.kwargs["draft_logits"] = good.kwargs["draft_logits"][:, :2]
    with pytest.raises(ValueError, match="draft_logits has 2 positions, expected at least 3"):
        verify(*good.args(), **good.kwargs)


def test_device_without_a_backend():
    meta = batch().to("meta")
    with pytest.raises(ValueError, match="logits are on meta, expected cuda or cpu"):
        verify(*meta.args(), **meta.kwargs)


def test_empty_batch():
    verified = verify(torch.zeros(0, 9), torch.zeros(1, dtype=torch.int32), torch.zeros(0, dtype=torch.int32), 3)
    assert verified.token_ids.shape == (0, 4)
    assert verified.num_sampled.shape == (0,)


def test_an_empty_tensor_has_no_stride_to_object_to():
    # NumPy gives an empty array a stride of 0 along every dimension.
    empty = torch.empty_strided((0, 8), (0, 0))
    tokens, _ = verify(torch.zeros(1, 8), torch.tensor([0, 1]), torch.zeros(0, dtype=torch.int64), 0, draft_probs=empty)
    assert tokens.tolist() == [[0]]


def test_more_requests_than_a_grid_can_count():
    pytest.importorskip("triton")
    reqs = 65536
    with pytest.raises(ValueError, match="the batch has 65536 requests, expected at most 65535"):
        verify(torch.zeros(reqs, 1), torch.arange(reqs + 1), torch.zeros(reqs).int(), 0, backend="triton")


def test_the_example_of_the_docstring():
    found = doctest.testmod(sys.modules[verify.__module__])
    assert found.attempted >= 5 and found.failed == 0
