"""Whether the drop-in runs: the option against vLLM's configuration, and a request's wishes against both.

Mistakes stop the start, before a model is loaded; what is merely not supported leaves vLLM's own sampler in place.
"""

from dataclasses import replace
from pathlib import Path

import vllm
from vllm.exceptions import VLLMValidationError
from vllm.platforms import current_platform

from vllm_specopt.checks import MAX_DRAFT_TOKENS
from vllm_specopt.integration import compat
from vllm_specopt.integration.config import STOCK, Requested, SpecoptConfig, contradiction, parse, refusal, requested
from vllm_specopt.integration.heads import foreign_head
from vllm_specopt.rules import BlockConstants


def validate(vllm_config) -> SpecoptConfig | None:
    """Check the option against a finished configuration.

    Args:
        vllm_config: vLLM's configuration.

    Returns:
        The option; None if it is not given.

    Raises:
        ValueError: The option is malformed, contradicts the speculative configuration, or has another method than exact
            where speculative decoding is off; the platform is neither CUDA nor CPU; there are more draft tokens than
            model runner V1 takes; the head that drafts was made for another target; or this vLLM is unknown and the
            option does not allow for that.
    """
    config = parse(vllm_config.additional_config)
    if config is None:
        return None
    allowed = ("exact", STOCK)
    if vllm_config.speculative_config is None and (config.method not in allowed or config.allow_per_request):
        raise ValueError(
            "specopt.method 'exact' alone, and no other for single requests, works without --speculative-config, as "
            "there are no draft tokens to verify; add one, or change the option"
        )
    if not (current_platform.is_cuda() or current_platform.is_cpu()):
        raise ValueError(
            f"specopt runs on CUDA GPUs and CPUs, not on {current_platform.device_name}; remove the option"
        )
    if reason := contradiction(config, vllm_config.speculative_config):
        raise ValueError(reason)
    if config.sharded and (reason := needs_whole_rows(vllm_config)):
        raise ValueError(f"specopt.sharded is true, but {reason}; leave it out")
    drafts = getattr(vllm_config.speculative_config, "num_speculative_tokens", 0)
    if drafts > MAX_DRAFT_TOKENS and not vllm_config.use_v2_model_runner:
        raise ValueError(
            f"specopt: num_speculative_tokens is {drafts}, expected at most {MAX_DRAFT_TOKENS} on model runner V1, "
            "whose own sampler stops at the first request with more"
        )
    if reason := foreign_head(vllm_config.speculative_config, vllm_config.model_config):
        raise ValueError(f"specopt: {reason}")
    unknown = unknown_vllm(vllm_config)
    if unknown and config.on_unknown_vllm == "error":
        raise ValueError(
            f"specopt: {unknown}; install a vllm-specopt that knows this vLLM, or set "
            '"on_unknown_vllm": "stock" beside "method" to run vLLM\'s own sampler'
        )
    return config


def stock_reason(vllm_config, config: SpecoptConfig) -> str | None:
    """Why vLLM's own sampler stays in place under this configuration, whatever the batches; None if it does not."""
    speculative, model = vllm_config.speculative_config, vllm_config.model_config
    if config.on_unknown_vllm == "stock" and (unknown := unknown_vllm(vllm_config)):
        return unknown
    if speculative is not None:
        if config.verifies and speculative.rejection_sample_method not in ("standard", "block"):
            return f"rejection_sample_method is {speculative.rejection_sample_method!r}"
        if speculative.enable_adaptive_verification:
            return "adaptive verification is on"
        if speculative.num_speculative_tokens > MAX_DRAFT_TOKENS:
            return f"num_speculative_tokens is above {MAX_DRAFT_TOKENS}"
    if getattr(vllm_config, "watermark_config", None) is not None:
        return "watermarking is on"
    for flag in ("return_sampling_mask", "use_fp64_gumbel"):
        if config.verifies and getattr(model, flag, False):
            return f"{flag} is set"
    return None


def needs_whole_rows(vllm_config) -> str | None:
    """Why the logits of this engine cannot stay on tensor-parallel ranks, whatever the batches; None if they can."""
    parallel = vllm_config.parallel_config
    if parallel.tensor_parallel_size == 1:
        return "there is one tensor-parallel rank"
    if getattr(parallel, "enable_batch_sharded_sampling", False):
        return "batch-sharded sampling is on, which gives each rank whole rows of its own requests"
    if vllm_config.lora_config is not None:
        return "LoRA is on, which works on whole rows"
    if parallel.pipeline_parallel_size > 1 and not vllm_config.use_v2_model_runner:
        return "model runner V1 hands logits from one pipeline stage to others"
    speculative = vllm_config.speculative_config
    if getattr(speculative, "rejection_sample_method", "standard") == "block":
        return "rejection_sample_method is 'block', which works on whole rows"
    return None


def unknown_vllm(vllm_config) -> str | None:
    """Why this vLLM is not known to work with the drop-in; None if it is."""
    runner = "V2" if vllm_config.use_v2_model_runner else "V1"
    return compat.problem(runner, vllm.__version__, Path(vllm.__file__).parent)


def active_config(vllm_config) -> SpecoptConfig | None:
    """The option if it is given and nothing in the configuration stands against it.

    Asked per runner: a process may hold several engines, and not all of them need to use the drop-in.
    """
    config = parse(vllm_config.additional_config)
    if config is None or stock_reason(vllm_config, config):
        return None
    if (
        config.verifies
        and config.rule is None
        and getattr(vllm_config.speculative_config, "rejection_sample_method", "") == "block"
    ):
        return replace(config, method="block", rule=BlockConstants())
    return config


def check_logits_processors(model_config) -> None:
    """Raise ValueError for a custom logits processor that cannot work on the rows of draft tokens."""
    from vllm.v1.sample.logits_processor import cached_load_custom_logitsprocs

    from vllm_specopt.integration.v1_rows import cannot_process_rows

    named = model_config.logits_processors
    for processor in cached_load_custom_logitsprocs(None if named is None else tuple(named)):
        if reason := cannot_process_rows(processor):
            raise ValueError(f"specopt: logits processors see draft tokens here, and {reason}")


def check_request(vllm_config, extra_args) -> None:
    """Check a request's own choice of method against the engine's configuration.

    Args:
        vllm_config: vLLM's configuration.
        extra_args: The request's ``SamplingParams.extra_args`` (``vllm_xargs`` in the OpenAI API).

    Raises:
        VLLMValidationError: The choice is malformed, the engine does not verify with this drop-in, or its option does
            not let requests choose. A server answers it with HTTP 400.
    """
    try:
        choice = requested(extra_args)
    except ValueError as error:
        raise VLLMValidationError(str(error), parameter="extra_args") from error
    config = active_config(vllm_config)
    if choice == Requested():
        return
    reason = "specopt is not active here" if config is None else refusal(config, choice)
    if reason:
        asked = f"the method {choice.method!r}" if choice.method else f"a delta of {choice.delta}"
        raise VLLMValidationError(f"the request asks specopt for {asked}, but {reason}", parameter="extra_args")
