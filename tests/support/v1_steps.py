"""Hand-built steps of the V1 runner, as vLLM's own classes take them, and our samplers for them."""

from types import SimpleNamespace

import torch
from vllm.v1.sample.logits_processor import LogitsProcessors
from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor, MinTokensLogitsProcessor
from vllm.v1.sample.metadata import SamplingMetadata
from vllm.v1.sample.sampler import Sampler as Stock
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from vllm_specopt.integration.v1 import RejectionSampler
from vllm_specopt.integration.v1_sampler import Draws, Sampler

CPU = torch.device("cpu")


class Runner:
    """As much of a model runner as the adapter reads."""

    def __init__(self, positions):
        self.positions = positions


def spec_metadata(num_drafts, draft_token_ids):
    counts = torch.tensor(num_drafts, dtype=torch.int32)
    ends = (counts + 1).cumsum(0).to(torch.int32)
    rows = torch.arange(int(ends[-1]), dtype=torch.int32)
    is_bonus = torch.zeros(len(rows), dtype=torch.bool)
    is_bonus[ends.long() - 1] = True
    return SpecDecodeMetadata(
        draft_token_ids=draft_token_ids.to(torch.int32),
        num_draft_tokens=list(num_drafts),
        cu_num_draft_tokens=counts.cumsum(0).to(torch.int32),
        cu_num_sampled_tokens=ends,
        target_logits_indices=rows[~is_bonus],
        bonus_logits_indices=rows[is_bonus],
        logits_indices=rows.flip(0),
    )


def sampling(temperature=None, generators=None, **changes):
    """Sampling metadata; no temperature means that all requests are greedy."""
    size = changes.pop("size", None) or len(temperature)
    zeros = torch.zeros(size)
    values = {
        "temperature": temperature,
        "all_greedy": temperature is None,
        "all_random": temperature is not None and bool((temperature > 0).all()),
        "top_p": None,
        "top_k": None,
        "generators": generators or {},
        "max_num_logprobs": None,
        "no_penalties": True,
        "prompt_token_ids": None,
        "frequency_penalties": zeros,
        "presence_penalties": zeros,
        "repetition_penalties": zeros + 1,
        "output_token_ids": [[] for _ in range(size)],
        "spec_token_ids": [[] for _ in range(size)],
        "allowed_token_ids_mask": None,
        "bad_words_token_ids": {},
        "logitsprocs": LogitsProcessors(),
    }
    return SamplingMetadata(**(values | changes))


def min_p_processor(values):
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=len(values)))
    processor = MinPLogitsProcessor(config, CPU, is_pin_memory=False)
    processor.min_p_count, processor.min_p = int((values > 0).sum()), values.unsqueeze(1)
    return LogitsProcessors([processor])


def generators_of(seeds):
    return {index: torch.Generator().manual_seed(int(seed)) for index, seed in enumerate(seeds)}


def adapter(positions=None, seed=0, mode="raw_logprobs", sampler=None):
    runner = Runner(positions) if positions is not None else None
    built = RejectionSampler(sampler or Stock(mode), None, CPU, runner=runner, seed=seed)
    built.kept_alive = SimpleNamespace(runner=runner)
    return built


def plain_sampler(positions=None, seed=0, mode="raw_logprobs"):
    """A sampler of ours whose runner schedules 1, 2, 3, ... tokens for its requests, of which the last one is drawn."""
    runner = None
    if positions is not None:
        ends = torch.arange(len(positions) + 1).cumsum(0)
        runner = Runner(torch.full((int(ends[-1]),), -7).index_copy(0, ends[1:] - 1, positions))
        runner.query_start_loc = SimpleNamespace(gpu=ends.int())
    built = Sampler(Stock(mode), Draws(CPU, runner, seed))
    built.kept_alive = SimpleNamespace(runner=runner)
    return built


def min_tokens(stop_of_request):
    processor = MinTokensLogitsProcessor(None, CPU, False)
    processor.min_toks = {r: (10, [], stop, False) for r, stop in stop_of_request.items()}
    pairs = [(r, token) for r, stop in stop_of_request.items() for token in stop]
    processor.logits_slice = tuple(torch.tensor(x, dtype=torch.int32) for x in zip(*pairs, strict=True))
    return LogitsProcessors([processor])


# What vLLM's own processors are asked to do; best holds the argmax of every row, request by request.
CHANGES = {
    "penalties": lambda best: {
        "no_penalties": False,
        "prompt_token_ids": torch.randint(60, (4, 9)),
        "frequency_penalties": torch.tensor([0.0, 1.5, 0.0, 0.7]),
        "presence_penalties": torch.tensor([0.0, 0.0, 2.0, 0.5]),
        "repetition_penalties": torch.tensor([1.0, 1.6, 1.0, 1.3]),
        "output_token_ids": [[1, 2], best[1], [4, 4, 4], best[3]],
    },
    "bad_words": lambda best: {
        "bad_words_token_ids": {1: [[best[1][0]]], 3: [[best[3][0]], [best[3][0], best[3][1]]]},
        "output_token_ids": [[], [3], [], [1]],
    },
    "allowed": lambda best: {"allowed_token_ids_mask": torch.rand(4, 60) < 0.5},
    "min_tokens": lambda best: {"logitsprocs": min_tokens({0: set(best[0]), 2: set(range(20))})},
}
