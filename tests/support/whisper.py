"""A Whisper of random weights, and what vLLM does with it: one engine in this process.

Usage: ``python whisper.py FOLDER REQUEST``, the request a JSON object with vLLM's ``speculative_config`` and
``additional_config`` (or null) and a ``temperature``. Prints one line of JSON: tokens, sampler and vLLM's counts.
"""

import json
import sys
from pathlib import Path

import numpy as np

SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>", "<|translate|>",
           "<|startofprev|>", "<|nospeech|>"]  # fmt: skip
RATE, SECONDS, CLIPS, TOKENS = 16_000, 3, 4, 48


def make(folder: Path, layers: int, seed: int) -> Path:
    """Save a model whose text depends on what it hears, with tokenizer and feature extractor."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        GenerationConfig,
        PreTrainedTokenizerFast,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
    )

    torch.manual_seed(seed)
    vocab = {piece: number for number, piece in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    pieces = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    pieces.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pieces.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=pieces, bos_token=SPECIAL[0], eos_token=SPECIAL[0], additional_special_tokens=SPECIAL[1:]
    )
    sizes = {f"{side}_{size}": value for side in ("encoder", "decoder")
             for size, value in (("layers", layers), ("attention_heads", 2), ("ffn_dim", 128))}  # fmt: skip
    config = WhisperConfig(
        vocab_size=288, d_model=64, pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None, **sizes,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed_positions" not in name:
            torch.nn.init.normal_(weight, std=0.05 if "embed_tokens" in name else 0.6)
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, decoder_start_token_id=1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    changes = (
        ("tokenizer_config", "tokenizer_class", "Tokenizer"),
        ("preprocessor_config", "processor_class", "Processor"),
    )
    for name, key, kind in changes:
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: f"Whisper{kind}"}))
    return folder


def main(folder: str, request: str) -> None:
    """Write down clips of noise."""
    from vllm import LLM, SamplingParams

    asked = json.loads(request)
    temperature = asked.pop("temperature")
    llm = LLM(
        folder, dtype="float32", enforce_eager=True, max_model_len=200, max_num_seqs=CLIPS, max_num_batched_tokens=4096,
        disable_log_stats=False, enable_prefix_caching=False, **{key: value for key, value in asked.items() if value},
    )  # fmt: skip
    noise = np.random.default_rng(0).normal(size=(CLIPS, SECONDS * RATE)).astype(np.float32)
    prompt = "".join(SPECIAL[1:5])
    outputs = llm.generate(
        [{"prompt": prompt, "multi_modal_data": {"audio": (clip, RATE)}} for clip in noise],
        [SamplingParams(temperature=temperature, max_tokens=TOKENS, seed=i, ignore_eos=True) for i in range(CLIPS)],
        use_tqdm=False,
    )
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    found = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "sampler": type(getattr(runner, "rejection_sampler", None)).__module__,
        "counts": {metric.name: metric.value for metric in llm.get_metrics() if "spec_decode_num" in metric.name
                   and hasattr(metric, "value")},
    }  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
