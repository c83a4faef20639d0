"""Model runner V1: what vLLM's logits processors do to the verified rows, which is what they do without speculation.

Rows are processed position by position: the first row of every request, then the second rows, and so on. Each time the
processors see what they see in a plain step, one row per request, with the draft tokens before it counted as output.
"""

import ast
import contextlib
import copy
import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor, LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import (
    LogitBiasLogitsProcessor,
    MinPLogitsProcessor,
    MinTokensLogitsProcessor,
    process_dict_updates,
)
from vllm.v1.sample.metadata import SamplingMetadata

from vllm_specopt.integration.v1_thinking import before_first_row, with_another_token

PLACEHOLDER = -1
DECLARED = "specopt_per_row"
"""A custom processor's class attribute; true: its state changes with the batch alone, not from token to token."""


class MinTokens(MinTokensLogitsProcessor):
    """vLLM's minimum lengths, but a request is forgotten when it has its minimum for certain.

    Under asynchronous scheduling a list of output tokens ends in a placeholder for every draft token until just before
    the next rows are processed, and vLLM's class, which is asked earlier, takes them all for accepted.
    """

    def __init__(self, stock: MinTokensLogitsProcessor):
        """Take over the state of vLLM's."""
        vars(self).update(vars(stock))

    def __bool__(self) -> bool:
        """Whether output tokens must be known."""
        return bool(self.min_toks)

    def update_state(self, batch_update) -> None:
        """Follow a change of the batch, if there is one."""
        process_dict_updates(self.min_toks, batch_update, self.add_request)
        for request, (minimum, output, *_) in list(self.min_toks.items()):
            length = len(output)
            while length and output[length - 1] == PLACEHOLDER:
                length -= 1
            if length >= minimum:
                del self.min_toks[request]

    def of_this_step(self) -> MinTokensLogitsProcessor:
        """vLLM's processor for the lengths as they are now."""
        own = MinTokensLogitsProcessor.__new__(MinTokensLogitsProcessor)
        vars(own).update(vars(self))
        # One that has its minimum: where it is dropped, vLLM lists anew what it masks.
        own.min_toks = {**self.min_toks, -1: (0, (), set(), False)}
        own.update_state(None)
        return own


BUILTIN = (MinTokensLogitsProcessor, MinTokens, LogitBiasLogitsProcessor, MinPLogitsProcessor)


def process(
    sampler,
    rows: torch.Tensor,
    num_draft_tokens: list[int],
    sampling_metadata: SamplingMetadata,
    finish: Callable[[torch.Tensor], torch.Tensor] | None = None,
    with_bonus: bool = True,
) -> None:
    """Run vLLM's logits processors on the rows of a step, in place.

    Args:
        sampler: vLLM's sampler, whose ``apply_logits_processors`` does a plain step's work.
        rows: ``[num_tokens + batch, vocab]`` fp32, request by request, each one's bonus row last.
        num_draft_tokens: Draft tokens per request.
        sampling_metadata: Sampling parameters per request.
        finish: What else to do to a row of every request, ``[batch, vocab]``; it may work in place.
        with_bonus: Whether bonus rows are processed, too.
    """
    counts = np.asarray(num_draft_tokens)
    ends = np.cumsum(counts + 1)
    num_rows = counts + with_bonus
    drafts = _drafts(num_draft_tokens, sampling_metadata.spec_token_ids or [])
    holder = sampling_metadata.thinking_budget_state_holder
    thinking = None
    if holder is not None and holder.has_tracked_requests():
        thinking = before_first_row(holder, sampling_metadata.output_token_ids)
    here = replace(
        sampling_metadata,
        thinking_budget_state_holder=None,
        logitsprocs=_of_this_step(sampling_metadata.logitsprocs),
    )
    with _extended(sampling_metadata, len(counts)) as outputs:
        for position in range(num_rows.max(initial=0)):
            if position:
                _extend(outputs, drafts, position)
                for processor in here.logitsprocs.non_argmax_invariant:
                    if type(processor) is MinTokensLogitsProcessor:
                        processor.update_state(None)
                if thinking is not None:
                    with_another_token(thinking, sampling_metadata.output_token_ids, drafts, position)
            at = async_tensor_h2d(ends - 1 - np.maximum(counts - position, 0), device=rows.device)
            part = sampler.apply_logits_processors(rows[at], here, predict_bonus_token=False)
            if thinking is not None:
                part = thinking.apply_to_logits(part, False, None)
            if finish is not None:
                part = finish(part)
            if (num_rows > position).all():
                rows[at] = part
            else:
                active = async_tensor_h2d(np.flatnonzero(num_rows > position), device=rows.device)
                rows[at[active]] = part[active]


def _drafts(num_draft_tokens: list[int], spec_token_ids: list[list[int]]) -> list[list[int]]:
    """Draft tokens per request, with a placeholder for each that the host does not know."""
    known = [*spec_token_ids, *[[]] * (len(num_draft_tokens) - len(spec_token_ids))]
    return [
        [*ids[:number], *[PLACEHOLDER] * (number - len(ids))]
        for number, ids in zip(num_draft_tokens, known, strict=False)
    ]


def is_min_tokens(processor: object) -> TypeGuard[MinTokensLogitsProcessor]:
    """Whether it is vLLM's own class or the one above; a class derived from either may do something else."""
    return type(processor) in (MinTokensLogitsProcessor, MinTokens)


def _of_this_step(processors: LogitsProcessors) -> LogitsProcessors:
    """The processors; those that note when a request has its minimum length are copies, which may be told of drafts."""
    own = copy.copy(processors)
    own.non_argmax_invariant = []
    for processor in processors.non_argmax_invariant:
        if is_min_tokens(processor):
            processor = MinTokens(processor).of_this_step()
        own.non_argmax_invariant.append(processor)
    return own


@contextlib.contextmanager
def _extended(sampling_metadata: SamplingMetadata, num_reqs: int) -> Iterator[list[tuple[int, list[int]]]]:
    """The lists of output tokens that processors refer to, each with its request; cut to their length afterwards."""
    refer = list(enumerate(sampling_metadata.output_token_ids[:num_reqs]))
    for processor in sampling_metadata.logitsprocs.non_argmax_invariant:
        if is_min_tokens(processor):
            # vLLM calls them sequences; they are the lists of the requests.
            lists = [(request, cast(list[int], output)) for request, (_, output, *_) in processor.min_toks.items()]
            refer += [(request, output) for request, output in lists if request < num_reqs]
    outputs = list({id(output): (request, output) for request, output in refer}.values())
    lengths = [len(output) for _, output in outputs]
    try:
        yield outputs
    finally:
        for (_, output), length in zip(outputs, lengths, strict=True):
            del output[length:]


def _extend(outputs: list[tuple[int, list[int]]], drafts: list[list[int]], position: int) -> None:
    for request, output in outputs:
        if position <= len(drafts[request]):
            output.append(drafts[request][position - 1])


def cannot_process_rows(processor: Any) -> str | None:
    """Why a custom logits processor cannot work on draft tokens' rows; None if it can.

    It can if what it does to a row follows from the batch (its members' parameters) and, by the lists it was handed,
    from the tokens so far: an :class:`AdapterLogitsProcessor`, or one whose ``update_state`` does nothing in steps
    without a change of the batch and whose ``apply`` assigns to none of its attributes. Others can declare themselves.

    Args:
        processor: A subclass of vLLM's ``LogitsProcessor``.
    """
    if processor in BUILTIN or getattr(processor, DECLARED, False):
        return None
    cure = f"if it does not, declare {DECLARED} = True in the class"
    if processor.update_state is not AdapterLogitsProcessor.update_state and not _ignores_none(processor.update_state):
        return f"{processor.__qualname__}.update_state may change its state with every token; {cure}"
    if processor.apply is not AdapterLogitsProcessor.apply and _assigns_to_itself(processor.apply):
        return f"{processor.__qualname__}.apply may change its state with every row; {cure}"
    return None


def _ignores_none(method) -> bool:
    """Whether a method ``(self, batch_update)`` evidently does nothing where the second argument is None."""
    function = _definition(method)
    if function is None or len(function.args.args) != 2:
        return False
    update = function.args.args[1].arg
    body = [node for node in function.body if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant))]
    if not body:
        return True
    first, rest = body[0], body[1:]
    if isinstance(first, ast.If) and ast.unparse(first.test) in (f"not {update}", f"{update} is None"):
        return len(first.body) == 1 and isinstance(first.body[0], ast.Return)
    # vLLM's helper for dictionaries by request says whether it changed something, and nothing changes for None.
    if not isinstance(first, ast.Expr | ast.Assign):
        return False
    called = first.value
    if not (isinstance(called, ast.Call) and ast.unparse(called.func).split(".")[-1] == "process_dict_updates"):
        return False
    if isinstance(first, ast.Expr):
        return not rest
    changed = ast.unparse(first.targets[0])
    return all(isinstance(node, ast.If) and ast.unparse(node.test) == changed and not node.orelse for node in rest)


def _assigns_to_itself(method) -> bool:
    """Whether a method assigns to one of its object's attributes, or may, because its source is not there."""
    function = _definition(method)
    if function is None:
        return True
    targets: list[ast.AST] = []
    for node in ast.walk(function):
        targets += node.targets if isinstance(node, ast.Assign | ast.Delete) else []
        targets += [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign | ast.For) else []
    while targets:
        target = targets.pop()
        targets += getattr(target, "elts", [])
        while isinstance(target, ast.Attribute | ast.Subscript | ast.Starred):
            target = target.value
            if isinstance(target, ast.Name) and target.id == function.args.args[0].arg:
                return True
    return False


def _definition(method) -> ast.FunctionDef | None:
    try:
        node = ast.parse(textwrap.dedent(inspect.getsource(method))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    return node if isinstance(node, ast.FunctionDef) else None
