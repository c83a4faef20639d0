"""Install the drop-in: the only module that assigns to vLLM's objects.

Two wrappers are there from the start and pass everything through unless the option is given: one where the
configuration is made (so that mistakes stop the start, before a model is loaded), one where a worker is made (which
installs the runner's hook in that process). Each original stays reachable as ``__wrapped__``.

- V2: ``ModelState.custom_sampler``, which exists for this purpose; a model's own override is respected.
- V1: the runner's ``rejection_sampler`` is replaced once it is built.
"""

import functools
import sys
from pathlib import Path

import vllm
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_specopt import compat, metrics
from vllm_specopt.config import SpecoptConfig, parse
from vllm_specopt.verify import MAX_DRAFT_TOKENS, backend_name

logger = init_logger("vllm.specopt")

_OURS = "_specopt_wrapper"


def register() -> None:
    """Wrap the two places; calling it again changes nothing."""
    main = getattr(sys.modules.get("__main__"), "__spec__", None)
    if main is not None and main.name == "vllm.model_executor.models.registry":
        # vLLM inspects models in a process of its own, which builds neither configuration nor worker.
        return
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.worker_base import WorkerBase

    _wrap(EngineArgs, "create_engine_config", _create_engine_config)
    _wrap(WorkerBase, "__init__", _worker_init)


def validate(vllm_config) -> SpecoptConfig | None:
    """Check the option against a finished configuration.

    Args:
        vllm_config: vLLM's configuration.

    Returns:
        The option; None if it is not given.

    Raises:
        ValueError: The option is malformed, speculative decoding is off, the platform is neither CUDA nor CPU, or this
            vLLM is unknown and the option does not allow for that.
    """
    config = parse(vllm_config.additional_config)
    if config is None:
        return None
    if vllm_config.speculative_config is None:
        raise ValueError("specopt is given without --speculative-config; add one, or remove the option")
    if not (current_platform.is_cuda() or current_platform.is_cpu()):
        raise ValueError(
            f"specopt runs on CUDA GPUs and CPUs, not on {current_platform.device_name}; remove the option"
        )
    unknown = _unknown_vllm(vllm_config)
    if unknown and config.on_unknown_vllm == "error":
        raise ValueError(
            f"specopt: {unknown}; install a vllm-specopt that knows this vLLM, or set "
            '"on_unknown_vllm": "stock" beside "method" to run vLLM\'s own sampler'
        )
    return config


def stock_reason(vllm_config, config: SpecoptConfig) -> str | None:
    """Why vLLM's own sampler stays in place under this configuration, whatever the batches; None if it does not."""
    speculative, model = vllm_config.speculative_config, vllm_config.model_config
    if config.on_unknown_vllm == "stock" and (unknown := _unknown_vllm(vllm_config)):
        return unknown
    if speculative.rejection_sample_method != "standard":
        return f"rejection_sample_method is {speculative.rejection_sample_method!r}"
    if speculative.enable_adaptive_verification:
        return "adaptive verification is on"
    if speculative.num_speculative_tokens > MAX_DRAFT_TOKENS:
        return f"num_speculative_tokens is above {MAX_DRAFT_TOKENS}"
    if getattr(vllm_config, "watermark_config", None) is not None:
        return "watermarking is on"
    for flag in ("return_sampling_mask", "use_fp64_gumbel"):
        if getattr(model, flag, False):
            return f"{flag} is set"
    return None


def _unknown_vllm(vllm_config) -> str | None:
    runner = "V2" if vllm_config.use_v2_model_runner else "V1"
    return compat.problem(runner, vllm.__version__, Path(vllm.__file__).parent)


def _wrap(owner: type, name: str, make_wrapper) -> None:
    original = vars(owner)[name]
    if hasattr(original, _OURS):
        return
    wrapper = functools.wraps(original)(make_wrapper(original))
    setattr(wrapper, _OURS, True)
    setattr(owner, name, wrapper)


def _create_engine_config(original):
    def create_engine_config(self, *args, **kwargs):
        vllm_config = original(self, *args, **kwargs)
        validate(vllm_config)
        if not self.disable_log_stats and _active_config(vllm_config):
            metrics.expose()
        return vllm_config

    return create_engine_config


def _worker_init(original):
    def __init__(self, *args, **kwargs):
        vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        _install_runner_hook(vllm_config)
        original(self, *args, **kwargs)
        if metrics.is_exposed() and _active_config(vllm_config):
            name = "compile_or_warm_up_model"
            _wrap(next(owner for owner in type(self).__mro__ if name in vars(owner)), name, _warm_up)

    return __init__


def _warm_up(original):
    def compile_or_warm_up_model(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        config = _active_config(self.vllm_config)
        sampler = getattr(self.model_runner, "rejection_sampler", None)
        if config and metrics.is_exposed() and hasattr(sampler, "recorder"):
            # Not earlier: the steps of the warm-up are no requests.
            metrics.record(sampler, self.vllm_config, config.method)
        return result

    return compile_or_warm_up_model


def _install_runner_hook(vllm_config) -> None:
    config = validate(vllm_config)
    if config is None:
        return
    if reason := stock_reason(vllm_config, config):
        logger.warning("specopt: not active: %s", reason)
    elif vllm_config.use_v2_model_runner:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner
        from vllm.v1.worker.gpu.model_states.interface import ModelState

        _wrap(ModelState, "custom_sampler", _custom_sampler)
        _wrap(GPUModelRunner, "load_model", _v2_load_model)
    else:
        from vllm.v1.worker.gpu_model_runner import GPUModelRunner

        _wrap(GPUModelRunner, "__init__", _v1_init)


def _active_config(vllm_config) -> SpecoptConfig | None:
    """The option if it is given and nothing in the configuration stands against it.

    Asked per runner: a process may hold several engines, and not all of them need to use the drop-in.
    """
    config = parse(vllm_config.additional_config)
    if config is None or vllm_config.speculative_config is None or stock_reason(vllm_config, config):
        return None
    return config


def _custom_sampler(original):
    def custom_sampler(self, sampler):
        custom = original(self, sampler)
        if custom or not _active_config(self.vllm_config):
            return custom
        from vllm_specopt.v2 import RejectionSampler

        return sampler, RejectionSampler(sampler, self.vllm_config.speculative_config, self.device)

    return custom_sampler


def _v2_load_model(original):
    def load_model(self, *args, **kwargs):
        original(self, *args, **kwargs)
        config = _active_config(self.vllm_config)
        if config is None:
            return
        from vllm_specopt.v2 import BACKEND, RejectionSampler

        if not isinstance(self.rejection_sampler, RejectionSampler):
            _log_not_replaced(self.rejection_sampler)
            return
        _log_active("V2", config, self.device, BACKEND)

    return load_model


def _v1_init(original):
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        config = _active_config(self.vllm_config)
        if config is None:
            return
        from vllm.v1.sample.rejection_sampler import RejectionSampler as Stock

        from vllm_specopt.v1 import RejectionSampler

        current = getattr(self, "rejection_sampler", None)
        if type(current) is not Stock:
            _log_not_replaced(current)
            return
        self.rejection_sampler = RejectionSampler(
            self.sampler, self.speculative_config, self.device, runner=self, seed=self.model_config.seed or 0
        )
        backend = backend_name(self.device)
        if backend == "cpu":
            from vllm_specopt.cpu import warm_up

            warm_up(self.model_config.dtype)
        _log_active("V1", config, self.device, backend)

    return __init__


def _log_active(runner: str, config: SpecoptConfig, device, backend: str) -> None:
    logger.info("specopt: active: runner=%s method=%s backend=%s device=%s", runner, config.method, backend, device)


def _log_not_replaced(current) -> None:
    if current is None:
        logger.info("specopt: not active: this worker does not sample")
    else:
        logger.warning("specopt: not active: the model or another plugin brings its own %s", type(current).__qualname__)
