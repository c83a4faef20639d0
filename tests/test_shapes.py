"""Launch tables: what is read, what is refused in one sentence, and that shapes change no token."""

import json
import warnings

import pytest
import torch

from vllm_specopt.kernels import launch, shapes
from vllm_specopt.kernels.shapes import DEFAULTS, Shapes, TableError
from vllm_specopt.testing import LOGITS, NO_DRAFT, assert_matches_reference, random_batch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAME = shapes.device_name(DEVICE)
OTHER = Shapes(512, 128, 2, 2, 4, 8, 64, 4, 4)


@pytest.fixture(autouse=True)
def fresh():
    shapes.shapes_of.cache_clear()
    yield
    shapes.shapes_of.cache_clear()


def test_no_table_means_the_defaults(monkeypatch, tmp_path):
    monkeypatch.delenv(shapes.VARIABLE, raising=False)
    monkeypatch.setattr(shapes, "TABLES", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert shapes.shapes_of(DEVICE) == DEFAULTS


@pytest.mark.parametrize("by_variable", [True, False])
def test_a_table_is_found_by_variable_or_by_name(monkeypatch, tmp_path, by_variable):
    path = tmp_path / ("any.json" if by_variable else shapes.file_name(NAME))
    shapes.write(path, NAME, OTHER, measured_us={"a case": 12.5})
    monkeypatch.setattr(shapes, "TABLES", tmp_path)
    monkeypatch.setenv(shapes.VARIABLE, str(path) if by_variable else "")
    assert shapes.shapes_of(DEVICE) == OTHER
    assert json.loads(path.read_text())["measured_us"] == {"a case": 12.5}


def test_what_a_table_leaves_out_is_the_default(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"device": "a card", "shapes": {"residual_warps": 8}}))
    assert shapes.read(path, "a card") == DEFAULTS._replace(residual_warps=8)
    assert shapes.file_name("NVIDIA H100 80GB HBM3") == "NVIDIA_H100_80GB_HBM3.json"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "cannot be read"),
        ("[]", "not of the form"),
        ('{"device": "a card"}', "not of the form"),
        ('{"device": "another", "shapes": {}}', "is for 'another', this device is 'a card'"),
        ('{"device": "a card", "shapes": {"tiles": 8}}', "unknown shape 'tiles'"),
        ('{"device": "a card", "shapes": {"tile": 1000}}', "tile 1000, expected a power of 2, 16 to 16384"),
        ('{"device": "a card", "shapes": {"tile": true}}', "tile True, expected a power of 2"),
        ('{"device": "a card", "shapes": {"decide_warps": 64}}', "expected a power of 2, 1 to 32"),
        # What gathers candidates reads 1,024 tokens at once.
        ('{"device": "a card", "shapes": {"filter_tile": 2048}}', "expected a power of 2, 16 to 1024"),
    ],
)
def test_a_broken_or_foreign_table_is_one_sentence_and_the_defaults(monkeypatch, tmp_path, text, message):
    path = tmp_path / "table.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(TableError) as raised:
        shapes.read(path, "a card")
    assert message in str(raised.value) and "\n" not in str(raised.value)
    monkeypatch.setenv(shapes.VARIABLE, str(path))
    monkeypatch.setattr(shapes, "device_name", lambda device: "a card")
    with pytest.warns(RuntimeWarning, match="the default launch shapes are used"):
        assert shapes.shapes_of(DEVICE) == DEFAULTS


@pytest.mark.parametrize(
    "chosen", [OTHER, Shapes(4096, 1024, 2, 4, 1, 1, 256, 16, 1)], ids=["small tiles", "large tiles"]
)
@pytest.mark.parametrize("draft", [NO_DRAFT, LOGITS])
def test_other_shapes_give_the_references_tokens(monkeypatch, draft, chosen):
    monkeypatch.setattr(launch, "shapes_of", lambda device: chosen)
    batch = random_batch(
        seed=3, num_drafts=[2, 0, 3], vocab_size=5000, dtype=torch.bfloat16, draft=draft, filters=("top_p",)
    )
    assert_matches_reference(batch, "triton", str(DEVICE))
