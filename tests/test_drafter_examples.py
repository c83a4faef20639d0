"""The drafters of one's own in examples/drafters, without an engine: which rows they take, and what they make of them.

In engines: ``test_drafters.py``.
"""

import importlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("vllm")

ROOT = Path(__file__).parents[1]
NUMBER, SIZE, VOCAB = 3, 320, 512


@pytest.fixture
def module(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "drafters"))
    return importlib.import_module


def config(**more):
    return SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=NUMBER),
        model_config=SimpleNamespace(dtype=torch.float32, get_hidden_size=lambda: SIZE),
        additional_config=more,
    )


def target(layers: int = 1) -> nn.Module:
    """A model with so many layers that make logits, which return what they get."""
    from vllm.model_executor.layers.logits_processor import LogitsProcessor

    class Logits(LogitsProcessor):
        def __init__(self):
            nn.Module.__init__(self)

        def forward(self, head, hidden_states):
            return hidden_states

    return nn.Sequential(nn.Linear(1, 1), *(Logits() for _ in range(layers)))


def propose(drafter, texts: list[list[int]], emitted: list[list[int]]) -> list[list[int]]:
    held = np.zeros((len(texts), 256), np.int32)
    for row, text in zip(held, texts, strict=True):
        row[: len(text)] = text
    return drafter.propose(emitted, np.array([len(text) for text in texts], np.int32), held)


@pytest.fixture
def recorder(module):
    """A drafter that drafts a request's last token over and over, and keeps the steps that it was asked about."""
    base = module("target_rows")

    class Recorder(base.TargetRows):
        def draft(self, steps, rows):
            self.steps, self.seen = steps, rows
            for step in steps:
                step.memory["steps"] = step.memory.get("steps", 0) + 1
            return [[step.emitted[-1]] * self.number for step in steps]

    drafter = Recorder(config())
    model = target()
    drafter.load_model(model)
    return drafter, lambda rows: model[1](None, torch.arange(float(rows))[:, None])


def test_rows_are_those_of_the_request_and_its_drafts(recorder):
    drafter, compute_logits = recorder
    compute_logits(3)
    # The prompt of the second request is not read yet.
    assert propose(drafter, [[5, 6, 1], [7, 7], [8, 2]], [[1], [], [2]]) == [[1] * 3, [], [2] * 3]
    assert [step.first for step in drafter.steps] == [0, 2]
    compute_logits(1 + NUMBER + 1 + 1 + NUMBER)
    # vLLM has moved the last request to the first place.
    texts = [[8, 2, 2, 9], [7, 7, 3], [5, 6, 1, 4]]
    assert propose(drafter, texts, [[2, 9], [3], [4]]) == [[9] * 3, [3] * 3, [4] * 3]
    assert [step.first for step in drafter.steps] == [0, 1 + NUMBER, 2 + NUMBER]
    assert [step.drafts for step in drafter.steps] == [[2] * 3, [], [1] * 3]
    assert [step.memory["steps"] for step in drafter.steps] == [2, 1, 2]
    assert drafter.seen.flatten().tolist() == list(range(2 * NUMBER + 3))


def test_a_step_whose_rows_do_not_add_up_goes_without_drafts_and_the_next_has_them_again(recorder):
    drafter, compute_logits = recorder
    compute_logits(2)
    propose(drafter, [[1, 2], [3, 4]], [[2], [4]])
    compute_logits(NUMBER + 1)
    # The scheduler has cut the drafts of the second.
    assert propose(drafter, [[1, 2, 5], [3, 4, 6]], [[5], [6]]) == [[], []]
    assert propose(drafter, [[1, 2, 5, 7], [3, 4, 6, 8]], [[7], [8]]) == [[], []]
    compute_logits(2)
    assert propose(drafter, [[1, 2, 5, 7, 1], [3, 4, 6, 8, 2]], [[1], [2]]) == [[1] * 3, [2] * 3]


def test_a_target_whose_logits_are_made_elsewhere_is_refused(module):
    drafter = module("target_rows").TargetRows(config())
    with pytest.raises(ValueError, match="has 2 layers that make logits, expected one"):
        drafter.load_model(target(layers=2))


@pytest.mark.parametrize("period", [1, 4, 7])
def test_lookahead_learns_what_repeats_from_the_targets_own_guesses(module, period):
    drafter, model = module("lookahead").Lookahead(config()), target()
    drafter.load_model(model)
    text, drafts, lengths = [99, 10], [], []
    following = {10 + i: 10 + (i + 1) % period for i in range(period)}
    for _ in range(30):
        guesses = [following.get(token, 0) for token in [text[-1], *drafts]]
        model[1](None, torch.eye(VOCAB)[guesses])
        accepted = next((i for i, draft in enumerate(drafts) if draft != guesses[i]), len(drafts))
        emitted = guesses[: accepted + 1]
        text += emitted
        lengths.append(len(emitted))
        [drafts] = propose(drafter, [text], [emitted])
        assert len(drafts) == NUMBER
    assert lengths[0] == 1
    # Once round, then every draft is right.
    assert set(lengths[period + 3 :]) == {NUMBER + 1}


@pytest.mark.parametrize(
    ("name", "weights", "heads", "message"),
    [
        ("Hydra", None, "", 'no key "heads"'),
        ("Hydra", {"blocks.0.layers.0.weight": (SIZE, SIZE)}, "given", "holds no weight 'blocks.0.down.weight'"),
        ("Hydra", {"blocks.0.down.weight": (8, 1280)}, "given", "made for a hidden size of 640, the target's is 320"),
        ("Medusa", {"blocks.0.layers.0.weight": (256, 256)}, "given", "hidden size of 256, the target's is 320"),
        ("Medusa", {"blocks.0.layers.0.weight": (SIZE, SIZE)}, "given", "holds 1 heads, num_speculative_tokens is 3"),
    ],
)
def test_heads_that_do_not_fit_are_refused(module, tmp_path, name, weights, heads, message):
    from safetensors.torch import save_file

    if weights:
        save_file({key: torch.zeros(shape) for key, shape in weights.items()}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        more = {"heads": str(tmp_path)} if heads else {}
        getattr(module("medusa_hydra"), name)(config(**more)).load_model(target())
