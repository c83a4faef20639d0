"""Compile, at start-up, every kernel variant that serving can launch.

On a GPU Triton compiles a kernel once for each combination of argument types, absent arguments and alignments, and
keeps the result on disk. vLLM's own warm-up reaches some of the combinations; the first request that needs another one
would wait for the compiler. The adapters list them (``warm_up`` of either ``RejectionSampler``); this module calls
them with rows laid out as the model lays them out.
"""

import time

import torch
from vllm.logger import init_logger

from vllm_specopt.integration.sharded import opened, sharding_of

logger = init_logger("vllm.specopt")

ROWS = 3
# What vLLM pads a vocabulary to unless a model says otherwise: the distance of rows of logits.
PADDING = 64


@torch.inference_mode()
def warm_up(runner) -> None:
    """Launch all variants on a model runner's device; on every tensor-parallel rank at the same time.

    Args:
        runner: vLLM's model runner, V1 or V2, with samplers of ours and its model loaded.
    """
    start = time.perf_counter()
    _warm_up(runner, example_logits(runner))
    if sharding_of(runner) is not None:
        warm_up_parts(runner)
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)
    logger.info("specopt: warmed up in %.1f s", time.perf_counter() - start)


@torch.inference_mode()
def warm_up_parts(runner) -> None:
    """Launch the variants for steps whose logits stay on their ranks; a collective."""
    with opened(runner, lambda: True):
        part = example_logits(runner)
    _warm_up(runner, part)


def _warm_up(runner, logits: torch.Tensor) -> None:
    """The same for logits that are laid out alike."""
    speculative, v2 = runner.speculative_config, runner.vllm_config.use_v2_model_runner
    # With speculation V1 sends steps without drafts to the rejection sampler, too.
    if (v2 or speculative is None) and hasattr(runner.sampler, "warm_up"):
        runner.sampler.warm_up(logits)
    if speculative is not None and v2:
        runner.rejection_sampler.warm_up(logits, runner.speculator.draft_logits)
    elif speculative is not None:
        probabilistic = speculative.draft_sample_method == "probabilistic"
        runner.rejection_sampler.warm_up(logits, speculative.num_speculative_tokens, probabilistic)


def example_logits(runner) -> torch.Tensor:
    """Rows of logits as the target model gives them, ``[3, vocab]``: dtype and strides matter, values do not."""
    config = runner.model_config
    logits = None
    # An adapter's head works on the requests of a batch, of which there are none here.
    if runner.lora_config is None:
        try:
            hidden_states = torch.zeros(ROWS, config.get_hidden_size(), dtype=config.dtype, device=runner.device)
            logits = runner.model.compute_logits(hidden_states)
        except Exception as error:
            logger.info("specopt: warming up for rows of logits as vLLM's own models lay them out: %s", error)
    if logits is None:
        vocab_size = config.get_vocab_size()
        padded = -(-vocab_size // PADDING) * PADDING
        logits = torch.zeros(ROWS, padded, dtype=config.dtype, device=runner.device)[:, :vocab_size]
    return logits
