"""Which tokens top-k, top-p and min-p keep, on either backend: those beside the threshold, asked one by one.

A draft token whose draft probability is next to nothing survives exactly where its row's filters keep it.
"""

import itertools

import pytest
import torch

from vllm_specopt.kernels.reference.rows import clean_ref, filter_row_ref
from vllm_specopt.verify import verify

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# More tokens than the Triton kernels resolve at once, in five of their tiles.
VOCAB = 5000
SLACK = 1e-5
FILTERS = [
    {"top_k": 3},
    {"top_k": 50},
    {"top_k": 2500},
    {"top_p": 1e-6},
    {"top_p": 0.3},
    {"top_p": 0.9},
    {"top_p": 0.9999},
    {"min_p": 0.02},
    {"top_k": 50, "top_p": 0.9},
    {"top_k": 2500, "top_p": 0.5, "min_p": 0.5},
]


def rows() -> dict[str, torch.Tensor]:
    """fp32 rows ``[vocab]`` by what is special about them."""
    normal = torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))
    ids = torch.arange(VOCAB)
    spoiled = torch.where(ids % 7 == 0, float("nan"), torch.where(ids % 5 == 0, -float("inf"), normal * 2))
    return {
        "peaked": normal * 3,
        "flat": normal * 0.2,
        "far from zero": normal * 2 - 400,
        "constant": torch.full((VOCAB,), -1.25),
        "zeros of both signs": torch.where(ids % 2 == 0, -0.0, 0.0),
        "two values": torch.where(ids % 3 == 0, 1.0, 0.0),
        "a dozen values": (normal * 2).round() / 8,
        "NaN and -inf among them": spoiled,
    }


def kept_ref(row: torch.Tensor, temp: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0):
    """Tokens that must stay and tokens that must go, ``[vocab]`` bool each; neither is what rounding may decide."""
    scaled = clean_ref(row) / temp
    shifts = itertools.product((-SLACK, SLACK) if top_p < 1 else (0,), (-SLACK, SLACK) if min_p else (0,))
    found = [filter_row_ref(scaled, top_k, top_p + p, min_p * (1 + m))[0] > -float("inf") for p, m in shifts]
    return torch.stack(found).all(0), ~torch.stack(found).any(0)


def beside_the_threshold(row: torch.Tensor, kept: torch.Tensor, removed: torch.Tensor) -> list[int]:
    """First and last of the smallest that stay, first and last of the largest that go."""
    tokens = []
    for which, value in ((kept, row[kept].min()), (removed, row[removed].max() if removed.any() else None)):
        found = (which & (row == value)).nonzero()[:, 0].tolist() if value is not None else []
        tokens += sorted({*found[:1], *found[-1:]})
    return tokens


def assert_keeps(row: torch.Tensor, temp: float, filters: dict, backend: str) -> None:
    """Ask :func:`verify` about the tokens beside the threshold."""
    kept, removed = kept_ref(row, temp, **filters)
    removed &= row > -float("inf")
    tokens = beside_the_threshold(row.float(), kept, removed)
    n, device = len(tokens), DEVICE if backend == "triton" else "cpu"
    dtypes = {"top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32}
    verified = verify(
        row.to(device).expand(2 * n, -1),
        2 * torch.arange(n + 1, device=device),
        torch.tensor(tokens, device=device),
        1,
        temperature=torch.full((n,), temp, device=device),
        seeds=torch.arange(n, device=device),
        draft_probs=torch.full((1, len(row)), 1e-30, device=device).expand(n, -1),
        bonus_token_ids=torch.zeros(n, dtype=torch.int64, device=device),
        backend=backend,
        **{name: torch.full((n,), value, dtype=dtypes[name], device=device) for name, value in filters.items()},
    )
    survived = dict(zip(tokens, (verified.num_sampled == 2).tolist(), strict=True))
    assert survived == {token: bool(kept[token]) for token in tokens}, filters
    recovered = verified.token_ids[verified.num_sampled == 1, 0].cpu()
    assert not removed[recovered].any(), filters


@pytest.mark.parametrize("backend", ["triton", "cpu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", rows())
def test_thresholds(name, dtype, backend):
    row = rows()[name].to(dtype)
    # In the interpreter, one filter in three of each row and dtype, so that each row meets all of them.
    part = slice(None) if backend == "cpu" or DEVICE == "cuda" else slice(DTYPES.index(dtype), None, 3)
    for filters in FILTERS[part]:
        assert_keeps(row, 0.7, filters, backend)


@pytest.mark.parametrize("backend", ["triton", "cpu"])
@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"top_k": 50}, {"top_k": 1000, "top_p": 0.5}], ids=str)
def test_thresholds_of_a_realistic_row(filters, backend):
    row = torch.randn(151936, generator=torch.Generator().manual_seed(2)) * 2.5
    assert_keeps(row.bfloat16(), 0.8, filters, backend)


@pytest.mark.parametrize("backend", ["triton", "cpu"])
@pytest.mark.parametrize("neutral", [{"top_k": 0}, {"top_k": VOCAB}, {"top_p": 1.0}, {"min_p": 0.0}], ids=str)
def test_neutral_values_keep_everything(neutral, backend):
    assert_keeps(rows()["flat"], 1.0, neutral, backend)
