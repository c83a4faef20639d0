"""Install the drop-in: the only module that assigns to vLLM's objects.

Two wrappers are there from the start and pass everything through unless the option is given: one where the
configuration is made (so that mistakes stop the start, before a model is loaded), one where a worker is made (which
installs the runner's hook in that process). Each original stays reachable as ``__wrapped__``.

- V2: ``ModelState.custom_sampler``, which exists for this purpose; a model's own override is respected.
- V1: the runner's ``sampler`` and ``rejection_sampler`` are replaced once they are built, and it gets the logits
  processors of an engine that does not speculate.

Without speculation the sampler alone is ours.

With the option there are two more, where requests are validated. One refuses a request whose own choice of method
cannot be honoured. The other comes with an engine that runs ours: vLLM refuses min-p and logit bias under speculation,
because its V1 would not apply them to draft tokens; ours does, so requests to that engine are let through.
"""

import copy
import functools
import sys
import weakref
from types import ModuleType

from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_specopt.integration import metrics
from vllm_specopt.integration.audit import Auditor
from vllm_specopt.integration.config import REQUEST_KEY
from vllm_specopt.integration.messages import log_active, log_not_replaced, log_unstable
from vllm_specopt.integration.validation import (
    active_config,
    check_logits_processors,
    check_request,
    stock_reason,
    unknown_vllm,
    validate,
)
from vllm_specopt.verify import backend_name

logger = init_logger("vllm.specopt")

_OURS = "_specopt_wrapper"
# Speculative configurations of the engines made in this process that apply every sampling parameter.
_applies_all: list[weakref.ref] = []


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


def _wrap(owner: type | ModuleType, name: str, make_wrapper) -> None:
    original = vars(owner)[name]
    if hasattr(original, _OURS):
        return
    wrapper = functools.wraps(original)(make_wrapper(original))
    setattr(wrapper, _OURS, True)
    setattr(owner, name, wrapper)


def _create_engine_config(original):
    def create_engine_config(self, *args, **kwargs):
        vllm_config = original(self, *args, **kwargs)
        if validate(vllm_config) and not unknown_vllm(vllm_config):
            from vllm.v1.engine.input_processor import InputProcessor

            _wrap(InputProcessor, "_validate_params", _validate_params)
        config = active_config(vllm_config)
        if vllm_config.speculative_config is not None and config is not None and config.verifies:
            from vllm.sampling_params import SamplingParams

            if not vllm_config.use_v2_model_runner:
                check_logits_processors(vllm_config.model_config)

            _wrap(SamplingParams, "_validate_spec_decode", _validate_spec_decode)
            _applies_all.append(weakref.ref(vllm_config.speculative_config))
        # Without vLLM's statistics an audit can still warn.
        if config is not None and (config.audit or not self.disable_log_stats):
            metrics.expose()
        return vllm_config

    return create_engine_config


def _validate_spec_decode(original):
    def _validate_spec_decode(self, speculative_config):
        # By identity: a request is checked against the very object its engine was configured with.
        if not any(applies() is speculative_config for applies in _applies_all if speculative_config is not None):
            original(self, speculative_config)

    return _validate_spec_decode


def _worker_init(original):
    def __init__(self, *args, **kwargs):
        vllm_config = kwargs["vllm_config"] if "vllm_config" in kwargs else args[0]
        _install_runner_hook(vllm_config)
        original(self, *args, **kwargs)
        if active_config(vllm_config):
            name = "compile_or_warm_up_model"
            _wrap(next(owner for owner in type(self).__mro__ if name in vars(owner)), name, _warm_up)

    return __init__


def _validate_params(original):
    def _validate_params(self, params, *args, **kwargs):
        extra_args = getattr(params, "extra_args", None)
        if extra_args and REQUEST_KEY in extra_args:
            check_request(self.vllm_config, extra_args)
        return original(self, params, *args, **kwargs)

    return _validate_params


def _warm_up(original):
    def compile_or_warm_up_model(self, *args, **kwargs):
        config = active_config(self.vllm_config)
        sampler = getattr(self.model_runner, "rejection_sampler", None) or getattr(self.model_runner, "sampler", None)
        if config and config.sharded and sampler is not None and hasattr(sampler, "account"):
            from vllm_specopt.integration.sharded import Sharding

            sampler.account.sharding = Sharding(self.model_runner)
        if config and current_platform.is_cuda() and hasattr(sampler, "warm_up"):
            from vllm_specopt.integration.warm_up import warm_up

            # Before vLLM's own, at whose end it starts to watch for compilation in flight.
            warm_up(self.model_runner)
        result = original(self, *args, **kwargs)
        if config and metrics.is_exposed() and sampler is not None and hasattr(sampler, "account"):
            from vllm.distributed.parallel_state import get_tp_group

            # Not earlier: the steps of the warm-up are no requests.
            first = get_tp_group().rank_in_group == 0
            metrics.record(sampler.account, self.vllm_config, config.method, first)
        elif config and config.audit:
            logger.warning("specopt: no audit here: this worker cannot reach the server's SPECOPT_METRICS_DIR")
            if sampler is not None and hasattr(sampler, "account"):
                sampler.account.auditor = None
        return result

    return compile_or_warm_up_model


def _install_runner_hook(vllm_config) -> None:
    config = validate(vllm_config)
    if config is None:
        return
    if reason := stock_reason(vllm_config, config):
        logger.warning("specopt: not active: %s", reason)
        return
    if config.sharded:
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        _wrap(LogitsProcessor, "_gather_logits", _gather_logits)
    if vllm_config.use_v2_model_runner:
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner
        from vllm.v1.worker.gpu.model_states.interface import ModelState

        _wrap(ModelState, "custom_sampler", _custom_sampler)
        _wrap(GPUModelRunner, "load_model", _v2_load_model)
        if config.sharded:
            _wrap(GPUModelRunner, "sample", _v2_sample)
    else:
        from vllm.v1.worker import gpu_model_runner

        _wrap(gpu_model_runner, "build_logitsprocs", _build_logitsprocs)
        _wrap(gpu_model_runner.GPUModelRunner, "__init__", _v1_init)
        _wrap(gpu_model_runner.GPUModelRunner, "_calc_spec_decode_metadata", _calc_spec_decode_metadata)
        if config.sharded:
            _wrap(gpu_model_runner.GPUModelRunner, "execute_model", _v1_execute_model)


def _gather_logits(original):
    def _gather_logits(self, logits):
        from vllm_specopt.integration.sharded import stays

        return logits if stays(self) else original(self, logits)

    return _gather_logits


def _v2_sample(original):
    def sample(self, hidden_states, input_batch, grammar_output, *args, **kwargs):
        from vllm_specopt.integration.sharded import opened, v2_stays

        with opened(self, lambda: v2_stays(self, input_batch, grammar_output)):
            return original(self, hidden_states, input_batch, grammar_output, *args, **kwargs)

    return sample


def _v1_execute_model(original):
    def execute_model(self, scheduler_output, *args, **kwargs):
        from vllm_specopt.integration.sharded import opened, v1_stays

        # The step's batch is known once its logits are made.
        with opened(self, lambda: v1_stays(self, scheduler_output)):
            return original(self, scheduler_output, *args, **kwargs)

    return execute_model


def _custom_sampler(original):
    def custom_sampler(self, sampler):
        custom = original(self, sampler)
        config = active_config(self.vllm_config)
        if custom or config is None:
            return custom
        from vllm.v1.worker.gpu.sample.sampler import Sampler as Stock

        from vllm_specopt.integration.metrics import Account
        from vllm_specopt.integration.v2 import RejectionSampler
        from vllm_specopt.integration.v2_sampler import BACKEND, Sampler
        from vllm_specopt.integration.v2_watch import WatchedRejectionSampler, WatchedSampler

        speculative = self.vllm_config.speculative_config
        if type(sampler) is Stock:
            account = Account(self.device)
            account.auditor = Auditor(config, self.device, BACKEND) if config.audit else None
            sampler = Sampler(sampler, account) if config.verifies else WatchedSampler(sampler, account)
        elif not config.verifies:
            return custom
        if speculative is None:
            return sampler, None
        if not config.verifies:
            return sampler, WatchedRejectionSampler(sampler, speculative, self.device)
        return sampler, RejectionSampler(sampler, speculative, self.device, config)

    return custom_sampler


def _v2_load_model(original):
    def load_model(self, *args, **kwargs):
        original(self, *args, **kwargs)
        config = active_config(self.vllm_config)
        if config is None:
            return
        from vllm_specopt.integration.v2 import RejectionSampler
        from vllm_specopt.integration.v2_sampler import BACKEND, Sampler
        from vllm_specopt.integration.v2_watch import WatchedRejectionSampler, WatchedSampler

        replaced = self.sampler if self.speculative_config is None else self.rejection_sampler
        if not isinstance(replaced, Sampler | RejectionSampler | WatchedSampler | WatchedRejectionSampler):
            log_not_replaced(replaced)
            return
        log_active("V2", config, self.device, BACKEND, self.speculative_config)
        if config.verifies and not isinstance(self.sampler, Sampler):
            log_unstable(self.sampler, config.audit > 0)

    return load_model


def _build_logitsprocs(original):
    def build_logitsprocs(vllm_config, *args, **kwargs):
        config = None if vllm_config.speculative_config is None else active_config(vllm_config)
        if config is None or not config.verifies:
            return original(vllm_config, *args, **kwargs)
        from vllm_specopt.integration.v1_rows import MinTokens, is_min_tokens

        plain = copy.copy(vllm_config)
        plain.speculative_config = None
        processors = original(plain, *args, **kwargs)
        processors.non_argmax_invariant = [
            MinTokens(each) if is_min_tokens(each) and type(each) is not MinTokens else each
            for each in processors.non_argmax_invariant
        ]
        return processors

    return build_logitsprocs


def _v1_init(original):
    def __init__(self, *args, **kwargs):
        original(self, *args, **kwargs)
        config = active_config(self.vllm_config)
        if config is None:
            return
        from vllm.distributed.parallel_state import get_pp_group
        from vllm.v1.sample.rejection_sampler import RejectionSampler as Stock

        from vllm_specopt.integration.v1 import RejectionSampler
        from vllm_specopt.integration.v1_rows import BUILTIN, MinTokens
        from vllm_specopt.integration.v1_sampler import Draws, Sampler, is_stock

        samples = get_pp_group().is_last_rank and not self.is_pooling_model
        speculative, own = self.speculative_config, is_stock(self.sampler)
        current = self.sampler if speculative is None else getattr(self, "rejection_sampler", None)
        if not samples or not (own if speculative is None else type(current) is Stock):
            log_not_replaced(current if samples else None)
            return
        seed = self.model_config.seed or 0
        if not config.verifies and not own:
            log_not_replaced(self.sampler)
            return
        if own:
            draws = Draws(self.device, self, seed)
            draws.account.auditor = Auditor(config, self.device) if config.audit else None
        if not config.verifies:
            from vllm_specopt.integration.v1_watch import WatchedRejectionSampler, WatchedSampler

            self.sampler = WatchedSampler(self.sampler, draws)
            if speculative is not None:
                self.rejection_sampler = WatchedRejectionSampler(self.sampler, speculative, self.device)
            log_active("V1", config, self.device, backend_name(self.device), speculative)
            return
        # vLLM brings the lists of output tokens up to date only for processors that the engine's arguments name.
        batch = self.input_batch
        if any(type(each) not in BUILTIN for each in batch.logitsprocs.all):
            batch.logitsprocs_need_output_token_ids = True
        elif self.use_async_scheduling and not batch.logitsprocs_need_output_token_ids:
            lengths = [each for each in batch.logitsprocs.all if type(each) is MinTokens]
            batch.logitsprocs_need_output_token_ids = lengths[0] if lengths else False
        if own:
            self.sampler = Sampler(self.sampler, draws)
        if speculative is not None:
            self.rejection_sampler = RejectionSampler(
                self.sampler, speculative, self.device, runner=self, seed=seed, config=config
            )
        backend = backend_name(self.device)
        if backend == "cpu":
            from vllm_specopt.cpu import warm_up

            warm_up(self.model_config.dtype)
        log_active("V1", config, self.device, backend, speculative)
        if not own:
            log_unstable(self.sampler, config.audit > 0)

    return __init__


def _calc_spec_decode_metadata(original):
    def _calc_spec_decode_metadata(self, *args, **kwargs):
        from vllm_specopt.integration.v1 import BY_REQUEST

        metadata = original(self, *args, **kwargs)
        setattr(metadata, BY_REQUEST, True)
        return metadata

    return _calc_spec_decode_metadata
