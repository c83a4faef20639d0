"""Which models and samplers may leave their logits on the ranks: found out once a model is loaded."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm")

from vllm.model_executor.layers.logits_processor import LogitsProcessor

from vllm_specopt.integration import sharded

HIDDEN, VOCAB, COLUMNS = 8, 100, 64


class Processor(LogitsProcessor):
    """vLLM's, as far as it gathers; the plugin wraps that method in the same way."""

    def __init__(self, weights):
        torch.nn.Module.__init__(self)
        self.weights = weights

    def forward(self, hidden):
        part = hidden @ self.weights[:COLUMNS].T
        return part if sharded.stays(self) else hidden @ self.weights[:VOCAB].T


class Model(torch.nn.Module):
    """A target model; ``forbids`` a token after its logits are made."""

    def __init__(self, processor, forbids=None):
        super().__init__()
        self.processor, self.forbids = processor, forbids

    def compute_logits(self, hidden):
        logits = self.processor(hidden)
        if self.forbids is not None:
            logits[:, self.forbids] = -torch.inf
        return logits


class Elsewhere(torch.nn.Module):
    """Makes its logits without vLLM's part."""

    def compute_logits(self, hidden):
        return hidden.new_zeros(len(hidden), VOCAB)


@pytest.fixture
def weights(monkeypatch):
    """Of the head, and a group of two ranks of which this is the first; the other's part is made here, too."""
    weights = torch.randn(2 * COLUMNS, HIDDEN)
    hidden = torch.randn(sharded.PROBE_ROWS, HIDDEN, generator=torch.Generator().manual_seed(0))

    def all_gather(tensor, dim):
        other = hidden @ weights[COLUMNS:].T
        return torch.cat([tensor, torch.where(tensor == -torch.inf, tensor, other)], dim)

    group = SimpleNamespace(world_size=2, rank_in_group=0, all_gather=all_gather)
    monkeypatch.setattr(sharded, "get_tp_group", lambda: group)
    return weights


def runner(model, sampler=None):
    config = SimpleNamespace(get_hidden_size=lambda: HIDDEN, dtype=torch.float32)
    ours = SimpleNamespace(account=SimpleNamespace(sharding=None))
    return SimpleNamespace(model=model, model_config=config, device="cpu", sampler=sampler or ours)


def test_a_rank_finds_its_columns(weights):
    model = Model(Processor(weights))
    found = sharded.Sharding(runner(model))
    assert found.shard[:5] == (0, COLUMNS, VOCAB, 0, 2)
    assert not sharded.stays(model.processor)
    with found.open(lambda: False):
        assert not sharded.stays(model.processor)
    with found.open(lambda: True):
        assert sharded.stays(model.processor)


@pytest.mark.parametrize("kind", ["forbids a token", "elsewhere", "another hidden size"])
def test_a_model_that_makes_its_logits_otherwise_is_refused(kind, weights):
    models = {
        "forbids a token": Model(Processor(weights), forbids=5),
        "elsewhere": Elsewhere(),
        "another hidden size": Model(Processor(weights[:, :3])),
    }
    said = r"specopt\.sharded is true, but (Model|Elsewhere) does not make its logits by vLLM's LogitsProcessor alone"
    with pytest.raises(ValueError, match=said):
        sharded.Sharding(runner(models[kind]))


def test_another_plugins_sampler_is_refused(weights):
    with pytest.raises(ValueError, match=r"brings its own Elsewhere, which needs whole rows; leave it out"):
        sharded.Sharding(runner(Model(Processor(weights)), Elsewhere()))
