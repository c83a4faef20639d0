"""The shipped target/draft pair: sizes, prompts, tokenizer and the numbers that its README states."""

import importlib.util
import json
import math
import platform
import struct
from pathlib import Path

import pytest

MODELS = Path(__file__).parents[1] / "models"
ROLES = ("target", "draft")
PARAMETER_LIMITS = {"target": (5_000_000, 8_000_000), "draft": (100_000, 1_000_000)}


def read_json(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def header(role: str) -> dict:
    """Read the header of a safetensors file: eight bytes of length, then JSON."""
    with (MODELS / f"specopt-{role}" / "model.safetensors").open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        found = json.loads(file.read(length))
    found.pop("__metadata__", None)
    return found


@pytest.fixture(scope="module")
def corpus():
    spec = importlib.util.spec_from_file_location("specopt_models_corpus", MODELS / "corpus.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def prompts() -> list[dict]:
    lines = (MODELS / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def metrics() -> dict:
    return read_json(MODELS / "metrics.json")


@pytest.fixture(scope="module")
def readme() -> str:
    return (MODELS / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("role", ROLES)
def test_parameters_are_bf16_and_within_the_limits(role, metrics):
    tensors = header(role)
    assert {tensor["dtype"] for tensor in tensors.values()} == {"BF16"}
    count = sum(math.prod(tensor["shape"]) for tensor in tensors.values())
    low, high = PARAMETER_LIMITS[role]
    assert low <= count <= high
    assert count == metrics["parameters"][role]


def test_both_models_share_one_vocabulary():
    configs = {role: read_json(MODELS / f"specopt-{role}" / "config.json") for role in ROLES}
    tokenizers = [(MODELS / f"specopt-{role}" / "tokenizer.json").read_bytes() for role in ROLES]
    assert tokenizers[0] == tokenizers[1]
    assert configs["target"]["vocab_size"] == configs["draft"]["vocab_size"]
    assert len(json.loads(tokenizers[0])["model"]["vocab"]) == configs["target"]["vocab_size"]
    for config in configs.values():
        assert config["architectures"] == ["LlamaForCausalLM"]
        assert config["head_dim"] in (32, 64)
        assert config["max_position_embeddings"] == 1024
        assert config["hidden_size"] == config["head_dim"] * config["num_attention_heads"]


def test_generation_config_leaves_sampling_to_the_user():
    for path in MODELS.glob("specopt-*/generation_config.json"):
        assert not {"temperature", "top_k", "top_p", "do_sample", "repetition_penalty"} & set(read_json(path))


def test_folder_is_small():
    files = [path for path in MODELS.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 26_000_000


def test_written_json_holds_no_path_of_the_machine():
    paths = [MODELS / "metrics.json", *MODELS.glob("specopt-*/*config.json")]
    assert len(paths) >= 5
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert not any(f'"/{part}' in text or f" /{part}" in text for part in ("root", "home", "tmp", "usr", "work"))


def test_prompts_have_the_keys_of_the_benchmark(prompts):
    assert len(prompts) >= 64
    assert len({prompt["prompt"] for prompt in prompts}) == len(prompts)
    assert len({prompt["source"] for prompt in prompts}) >= 32
    for prompt in prompts:
        assert set(prompt) == {"prompt", "output_tokens", "source"}
        assert prompt["prompt"] == prompt["prompt"].rstrip() != ""
        assert prompt["output_tokens"] > 0


def test_prompts_come_from_held_out_files_only(corpus, prompts):
    assert all(corpus.is_held_out(prompt["source"]) for prompt in prompts)
    train, held_out = corpus.split(corpus.collect())
    assert train and held_out and not set(train) & set(held_out)
    text = "\0".join(train.values())
    assert not [prompt["source"] for prompt in prompts if prompt["prompt"] in text]


def test_prompts_are_cut_from_their_source(corpus, prompts, metrics):
    if platform.python_version() != metrics["versions"]["python"]:
        pytest.skip("the prompts were cut from another Python version's files")
    files = corpus.collect()
    assert all(prompt["prompt"] in files[prompt["source"]] for prompt in prompts)


def test_tokenizer_round_trips_the_prompts(prompts):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer.from_file(str(MODELS / "specopt-target" / "tokenizer.json"))
    for prompt in prompts:
        ids = tokenizer.encode(prompt["prompt"]).ids
        assert 60 <= len(ids) <= 200
        assert tokenizer.decode(ids, skip_special_tokens=False) == prompt["prompt"]
    odd = "naïve — λx.x \t\r\n  漢字 \U0001f40d"
    assert tokenizer.decode(tokenizer.encode(odd).ids) == odd


def test_metrics_agree_with_themselves_and_with_the_readme(metrics, readme):
    for role in ROLES:
        perplexity = metrics["perplexity"][role]
        bits = math.log2(perplexity) * metrics["held_out_tokens"] / metrics["held_out_bytes"]
        assert bits == pytest.approx(metrics["bits_per_byte"][role], abs=2e-3)
        row = next(line for line in readme.splitlines() if line.startswith(f"| {role} "))
        cells = [cell.strip() for cell in row.split("|")]
        assert f"{metrics['parameters'][role]:,}" in cells
        assert f"{perplexity:.2f}" in cells
        assert f"{metrics['bits_per_byte'][role]:.3f}" in cells
    assert metrics["perplexity"]["target"] < metrics["perplexity"]["draft"]


def test_readme_states_the_measured_acceptance(metrics, readme):
    rows = metrics["vllm_acceptance"]
    assert {(row["draft_sample_method"], row["temperature"]) for row in rows} >= {
        ("greedy", 0.0),
        ("greedy", 1.0),
        ("probabilistic", 1.0),
    }
    for row in rows:
        assert row["accepted_tokens"] / row["draft_tokens"] == pytest.approx(row["acceptance_rate"], abs=1e-4)
        stated = f"| {row['draft_sample_method']} | {row['temperature']:g} | {row['acceptance_rate']:.3f} |"
        assert stated in readme


def test_target_predicts_the_prompts_better_than_the_draft(prompts):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(MODELS / "specopt-target")
    losses = {}
    for role in ROLES:
        model = transformers.LlamaForCausalLM.from_pretrained(MODELS / f"specopt-{role}", dtype=torch.float32).eval()
        nats = tokens = 0
        with torch.no_grad():
            for prompt in prompts[:32]:
                ids = tokenizer(prompt["prompt"], return_tensors="pt")["input_ids"]
                nats += model(input_ids=ids, labels=ids).loss.item() * (ids.numel() - 1)
                tokens += ids.numel() - 1
        losses[role] = nats / tokens
    assert losses["target"] < losses["draft"] < math.log(len(tokenizer))
