"""Logits that stay on their tensor-parallel ranks: in which steps, and how these are verified.

vLLM's ``LogitsProcessor`` makes each rank's part of the logits and gathers all of them on every rank. In a step whose
requests need no whole rows the gather is left out, and :func:`vllm_specopt.sharded.verify_sharded` verifies. Whether a
step is one of these is decided on the host, by what all ranks know alike.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import torch
from vllm import envs
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from vllm_specopt.integration.metrics import Account
from vllm_specopt.sharded import Shard, shards_of, verify_sharded
from vllm_specopt.verify import Verified, backend_name, verify

PROBE_ROWS = 2
# Of the target model's logits processors.
_shardings: weakref.WeakKeyDictionary[LogitsProcessor, "Sharding"] = weakref.WeakKeyDictionary()
# What verify() takes and a sharded step does not have.
WHOLE_ROWS = ("rule", "rule_requests", "notes")


class Sharding:
    """One worker's part of the vocabulary, whose logits may stay there.

    Attributes:
        shard: This rank's columns.
        steps: How many batches were verified sharded.
    """

    def __init__(self, runner):
        """Find out which columns this rank holds, and that all ranks' are vLLM's rows; a collective.

        Args:
            runner: vLLM's model runner, V1 or V2, with its model loaded.

        Raises:
            ValueError: The model makes its logits in another way, or the runner's sampler is not ours.
        """
        model = runner.model
        if not hasattr(runner.sampler, "account"):
            raise ValueError(
                "specopt.sharded is true, but the model or another plugin brings its own "
                f"{type(runner.sampler).__qualname__}, which needs whole rows; leave it out"
            )
        self.steps = 0
        self._decide: Callable[[], bool] | None = None
        self._group = get_tp_group()
        _shardings.update({module: self for module in model.modules() if isinstance(module, LogitsProcessor)})
        try:
            shard = self._probed(model, runner.model_config, runner.device)
        except Exception as error:
            raise ValueError(_refused(model)) from error
        if shard is None:
            raise ValueError(_refused(model))
        self.shard: Shard = shard

    def _probed(self, model, config, device) -> Shard | None:
        """This rank's columns, of two random hidden states; None where all ranks' are not what the model gives."""
        hidden = torch.randn(PROBE_ROWS, config.get_hidden_size(), generator=torch.Generator().manual_seed(0))
        hidden = hidden.to(device, config.dtype)
        with torch.inference_mode():
            whole = model.compute_logits(hidden)
            with self.open(lambda: True):
                part = model.compute_logits(hidden)
        columns, vocab_size, ranks = part.shape[1], whole.shape[1], self._group.world_size
        if not columns < vocab_size <= columns * ranks:
            return None
        gathered = self.gather(part.contiguous()).transpose(0, 1).flatten(1)[:, :vocab_size]
        return shards_of(vocab_size, ranks, columns)[self._group.rank_in_group] if gathered.equal(whole) else None

    @contextlib.contextmanager
    def open(self, decide: Callable[[], bool]) -> Iterator[None]:
        """Within it logits stay on their ranks if ``decide`` says so when they are made; elsewhere they never do."""
        self._decide = decide
        try:
            yield
        finally:
            self._decide = None

    def stays(self) -> bool:
        """Whether logits that are made now stay on their ranks."""
        return self._decide is not None and self._decide()

    def gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """All ranks' tensors, ``[ranks, ...]``; a collective."""
        return self._group.all_gather(tensor, dim=0).view(self._group.world_size, *tensor.shape)

    def verify(self, logits: torch.Tensor, *args, **kwargs) -> Verified:
        """:func:`vllm_specopt.verify.verify` of this rank's columns; a collective."""
        self.steps += 1
        for name in WHOLE_ROWS:
            kwargs.pop(name, None)
        return verify_sharded(logits, *args, shard=self.shard, gather=self.gather, **kwargs)


def stays(processor: LogitsProcessor) -> bool:
    """Whether logits that this part of a model makes now stay on their ranks."""
    sharding = _shardings.get(processor)
    return sharding is not None and sharding.stays()


def _refused(model: torch.nn.Module) -> str:
    return (
        f"specopt.sharded is true, but {type(model).__name__} does not make its logits by vLLM's LogitsProcessor "
        "alone; leave it out"
    )


def opened(runner, decide: Callable[[], bool]) -> contextlib.AbstractContextManager[None]:
    """:meth:`Sharding.open` of a runner's samplers, where they have one."""
    sharding = sharding_of(runner)
    return contextlib.nullcontext() if sharding is None else sharding.open(decide)


def sharding_of(runner) -> Sharding | None:
    """What a runner's samplers have of it."""
    account = getattr(runner.sampler, "account", None)
    return None if account is None else account.sharding


def verification(
    account: Account, logits: torch.Tensor, whole: Callable[..., Verified] = verify
) -> Callable[..., Verified]:
    """What verifies rows of logits: ``whole``, or if they are one rank's part of the columns its sharding."""
    sharding = account.sharding
    return sharding.verify if sharding is not None and is_part(account, logits) else whole


def is_part(account: Account, logits: torch.Tensor) -> bool:
    """Whether rows of logits are one rank's part of the columns: as the model made them, in every such step."""
    return account.sharding is not None and logits.shape[1] != account.sharding.shard.vocab_size


def filters_stay(device: torch.device) -> bool:
    """Whether logits of steps in which a request filters can stay on their ranks; not with the CPU backend."""
    return backend_name(device) == "triton"


def _saves(num_draft_tokens: int, num_reqs: int) -> bool:
    """Whether a step in which a request filters may stay: one row per request may have to travel."""
    return num_draft_tokens >= num_reqs


def v2_stays(runner, input_batch, grammar_output) -> bool:
    """Whether a step of model runner V2 needs no whole rows of logits."""
    from vllm_specopt.integration.v2_sampler import FILTERED, PROCESSED, RANDOM

    slots, sampler = input_batch.idx_mapping_np, runner.sampler
    if grammar_output is not None or sampler.compute_nans or not len(slots):
        return False
    needed = int(np.bitwise_or.reduce(sampler.needs[slots]))
    if needed & PROCESSED or sampler.get_logprobs_dims(slots) is not None:
        return False
    if needed & RANDOM and needed & FILTERED:
        return _saves(input_batch.num_draft_tokens, len(slots))
    return True


def v1_stays(runner, scheduler_output) -> bool:
    """Whether a step of model runner V1 needs no whole rows of logits."""
    from vllm_specopt.integration.v1_sampler import (
        is_filtered,
        needs_processors,
        wants_logprobs,
        works_on_probabilities,
    )

    metadata = runner.input_batch.sampling_metadata
    if not metadata.all_greedy and is_filtered(metadata):
        num_draft_tokens = sum(map(len, scheduler_output.scheduled_spec_decode_tokens.values()))
        if not (filters_stay(runner.device) and _saves(num_draft_tokens, runner.input_batch.num_reqs)):
            return False
    return not (
        scheduler_output.has_structured_output_requests
        or envs.VLLM_COMPUTE_NANS_IN_LOGITS
        or wants_logprobs(metadata)
        or needs_processors(metadata)
        or (not metadata.all_greedy and works_on_probabilities(metadata))
    )
