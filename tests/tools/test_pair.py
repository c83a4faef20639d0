"""A pair with an extended vocabulary keeps what it computes, and the number type follows the CPU."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

from vllm_specopt.benchmarks import host

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "models"
PROMPTS = [json.loads(line)["prompt"] for line in (MODELS / "prompts.jsonl").read_text().splitlines()[:16]]
WIDE, TAIL_MASS = 600, 0.01


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A pair extended to 600 tokens, and what was measured on it."""
    pytest.importorskip("transformers")
    from vllm_specopt.benchmarks.serve.wide_pair import make_pair

    def make(name: str, **options) -> tuple[Path, dict]:
        out = tmp_path_factory.mktemp(name)
        arguments = (MODELS / "specopt-target", MODELS / "specopt-draft", PROMPTS, out)
        return out, make_pair(*arguments, vocab_size=WIDE, tail_mass=TAIL_MASS, **options)

    return make("pair"), make("deep", extra_target_layers=2, width=4)


def load(folder: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("role", ["target", "draft"])
def test_original_tokens_keep_their_logits_and_the_tail_holds_the_mass(pair, role):
    import torch

    (folder, info), _ = pair
    original, tokenizer = load(MODELS / f"specopt-{role}")
    wide, wide_tokenizer = load(folder / role)
    tail = []
    for prompt in PROMPTS[8:]:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        assert torch.equal(wide_tokenizer(prompt, return_tensors="pt")["input_ids"], ids)
        with torch.inference_mode():
            before, after = original(ids).logits[0].float(), wide(ids).logits[0].float()
        assert after.shape[-1] == WIDE and torch.isfinite(after).all()
        # Products of other widths may be summed in another order: a unit in the last place of bf16.
        torch.testing.assert_close(after[:, :512], before, rtol=2**-7, atol=2**-5)
        tail.append(after.softmax(-1)[:, 512:].sum(dim=1))
    assert torch.cat(tail).mean().item() == pytest.approx(info["models"][role]["tail_mass"]["mean"], rel=0.1)
    assert TAIL_MASS / 3 < info["models"][role]["tail_mass"]["mean"] < 3 * TAIL_MASS
    tails = sum(model["tail_mass"]["mean"] for model in info["models"].values())
    assert info["overlap"]["after"] == pytest.approx(info["overlap"]["before"], abs=tails)


def test_extended_pair_is_deterministic_and_its_ids_are_consistent(pair):
    import torch
    from safetensors.torch import load_file

    (folder, _), (again, _) = pair
    for role in ("target", "draft"):
        model, other = (load_file(out / role / "model.safetensors") for out in (folder, again))
        assert model.keys() <= other.keys()
        for name in model:
            where = tuple(slice(size) for size in model[name].shape)
            halved = model[name] / 2 if model[name].dim() == 1 else model[name]
            assert torch.equal(halved, other[name][where]), name
        embedding = model["model.embed_tokens.weight"]
        assert torch.equal(embedding[512:], embedding[: WIDE - 512])
    _, tokenizer = load(folder / "draft")
    assert len(tokenizer) == WIDE
    assert tokenizer.decode([512, 599]) == "<extra_512><extra_599>"


def test_extra_layers_and_widths_change_nothing(pair):
    import torch

    (folder, before), (large, info) = pair
    ids = torch.arange(40).unsqueeze(0)
    for role, layers in (("target", 2), ("draft", 0)):
        # In double precision, so that sums over more zeros differ by their order alone.
        (plain, _), (larger, _) = load(folder / role), load(large / role)
        assert len(larger.model.layers) == len(plain.model.layers) + layers == info["models"][role]["layers"]
        assert larger.config.hidden_size == 4 * plain.config.hidden_size == info["models"][role]["hidden_size"]
        assert larger.config.num_attention_heads == 4 * plain.config.num_attention_heads
        assert info["models"][role]["parameters"] > 8 * before["models"][role]["parameters"] / 2
        with torch.inference_mode():
            expected, found = plain.double()(ids).logits, larger.double()(ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_target_alone_gets_the_same_vocabulary(pair, tmp_path):
    from vllm_specopt.benchmarks.serve.wide_pair import make_pair

    info = make_pair(MODELS / "specopt-target", None, PROMPTS, tmp_path, vocab_size=WIDE, tail_mass=TAIL_MASS)
    assert list(info["models"]) == ["target"] and "overlap" not in info and not (tmp_path / "draft").exists()
    made, beside = (folder / "target" / "model.safetensors" for folder in (tmp_path, pair[0][0]))
    assert made.read_bytes() == beside.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab_size": 100}, "at least 512"),
        ({"width": 2}, "a power of 4"),
        ({"tail_mass": 1.5}, "between 0 and 1"),
        ({"prompts": ["a"]}, "at least 2"),
    ],
)
def test_bad_arguments_of_a_pair(tmp_path, options, message):
    pytest.importorskip("transformers")
    from vllm_specopt.benchmarks.serve.wide_pair import make_pair

    arguments = {"prompts": PROMPTS, "vocab_size": WIDE} | options
    with pytest.raises(ValueError, match=message):
        make_pair(MODELS / "specopt-target", MODELS / "specopt-draft", out=tmp_path, **arguments)


@pytest.mark.parametrize(
    ("cpuinfo", "name", "dtype"),
    [
        ("model name\t: A CPU\nflags\t\t: fpu avx2 avx512f\n", "A CPU", "bfloat16"),
        ("model name\t: An older CPU\nflags\t\t: fpu avx avx2\n", "An older CPU", "float32"),
        ("Features\t: asimd bf16\n", platform.machine(), "bfloat16"),
    ],
)
def test_the_number_type_follows_the_cpu(tmp_path, monkeypatch, cpuinfo, name, dtype):
    monkeypatch.setattr(host, "CPUINFO", tmp_path / "cpuinfo")
    assert (host.cpu_name(), host.small_model_dtype()) == (platform.machine(), "bfloat16")
    host.CPUINFO.write_text(cpuinfo)
    assert (host.cpu_name(), host.small_model_dtype()) == (name, dtype)
