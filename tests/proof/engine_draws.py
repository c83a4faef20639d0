"""Draw continuations of one prompt from a real V1 engine with vLLM's own probabilistic drafter, and write them down.

Usage: ``python engine_draws.py REQUEST.json RESULT.npz``, by ``engine.py``, in a process of its own. Each row of the
result is a request: its first tokens, and how many drafts its first verification accepted.

In the batch named by ``"shared_noise"`` recovered tokens are drawn with the u that chose the draft token they replace,
as if drafter and verifier shared a stream: drafts, acceptance and both distributions are as they should be.
"""

import json
import sys

import numpy as np
import torch

from vllm_specopt.integration import v1


class Recorder:
    """Wraps the rejection sampler: how many drafts each request's first verification accepted."""

    def __init__(self, runner):
        self.accepted: dict[str, int] = {}
        self._runner, self._forward = runner, runner.rejection_sampler.forward
        runner.rejection_sampler.forward = self._record

    def _record(self, metadata, draft_probs, logits, sampling_metadata):
        output = self._forward(metadata, draft_probs, logits, sampling_metadata)
        numbers = (output.sampled_token_ids >= 0).sum(1) - 1
        for request, drafts, number in zip(
            self._runner.input_batch.req_ids, metadata.num_draft_tokens, numbers.tolist(), strict=True
        ):
            if drafts:
                assert draft_probs is not None, "the drafter handed over no probabilities"
                self.accepted.setdefault(request, number)
        return output


def by_inversion(weights: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first token of each row at which the running sum passes so much of it; ``uniform``: ``[rows, 1]``."""
    running = weights.double().cumsum(1)
    return (running <= uniform * running[:, -1:]).sum(1).clamp(max=weights.shape[1] - 1)


def share_noise(runner) -> None:
    """Draw each draft token by inversion of the u with which the token that replaces it is drawn."""
    from vllm.v1.spec_decode import llm_base_proposer as proposer

    original_probs, original_verify = runner._get_spec_decode_draft_probs, v1.verify
    generator = torch.Generator().manual_seed(0)
    drawn: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    drafts = runner.speculative_config.num_speculative_tokens

    def draft(probs, noise):
        drawn.append(torch.rand(len(probs), 1, generator=generator, dtype=torch.float64))
        return by_inversion(probs, drawn[-1])

    def draft_probs(metadata):
        probs = original_probs(metadata)
        rows.clear()
        if probs is not None:
            # As the runner's probabilities: [requests, drafts, 1], of the last time it drafted.
            kept, runner._draft_probs = runner._draft_probs, torch.stack(drawn[-drafts:], 1)
            rows.append(original_probs(metadata))
            runner._draft_probs = kept
        drawn.clear()
        return probs

    def verify(logits, cu_num_logits, *args, **kwargs):
        verified = original_verify(logits, cu_num_logits, *args, **kwargs)
        if not rows:
            return verified
        starts, counts = cu_num_logits[:-1].long(), cu_num_logits.diff()
        stop = verified.num_sampled.long() - 1
        lost = (stop < counts - 1).nonzero()[:, 0]
        row, compact = (starts + stop)[lost], (starts + stop)[lost] - lost
        target = (logits[row].float() / kwargs["temperature"][lost, None]).softmax(1)
        weights = (target - kwargs["draft_probs"][compact]).clamp(min=0)
        recovered = by_inversion(weights, rows[0][compact])
        verified.token_ids[lost, stop[lost]] = recovered.to(verified.token_ids.dtype)
        return verified

    proposer.sample_with_exponential_noise = draft
    runner._get_spec_decode_draft_probs = draft_probs
    v1.verify = verify


def main(request_path: str, result_path: str) -> None:
    """Run the request: ``llm``, ``prompt`` (token ids), ``batches`` (name, sampling, requests, first_seed or None)."""
    from vllm import LLM, SamplingParams

    with open(request_path) as file:
        request = json.load(file)
    llm = LLM(**request["llm"])
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    assert type(runner.rejection_sampler) is v1.RejectionSampler
    recorder, found = Recorder(runner), {}
    for batch in request["batches"]:
        if batch["name"] == request["shared_noise"]:
            share_noise(runner)
        first, count = batch["first_seed"], batch["requests"]
        seeds = [None] * count if first is None else range(first, first + count)
        params = [SamplingParams(**batch["sampling"], seed=seed) for seed in seeds]
        recorder.accepted.clear()
        outputs = llm.generate([{"prompt_token_ids": request["prompt"]}] * count, params, use_tqdm=False)
        # A request's internal name begins with the one that its output carries.
        accepted = {name.rpartition("-")[0]: number for name, number in recorder.accepted.items()}
        rows = [[*output.outputs[0].token_ids, accepted.pop(output.request_id)] for output in outputs]
        assert not accepted
        found[batch["name"]] = np.array(rows)
    np.savez(result_path, **found)


if __name__ == "__main__":
    main(*sys.argv[1:])
