"""Gather what a pair of models says while it speculates: one vLLM engine in this process, verified exactly.

Usage: ``python -m vllm_specopt.cli.calibrate_gather REQUEST.json FOLDER``, started by ``specopt calibrate``. The rows
are taken where model runner V1 or V2 hands them to :func:`vllm_specopt.verify.verify`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

PART_KEYS = ("target", "draft", "tokens", "positions", "temperatures")


class Reservoir:
    """A uniform sample of the judged rows seen so far: at most ``size`` of them, in ``rows``.

    ``mass`` is the sum of the target's probabilities over all judged rows, float64 ``[vocab]``.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._random = np.random.default_rng(seed)
        self.seen = 0
        self.mass: np.ndarray | float = 0.0
        self.rows: list[tuple] = []

    def offer(self, probs: torch.Tensor, make_row) -> None:
        """Count a row's target probabilities; keep the row, made only if there is a place for it."""
        self.mass = self.mass + probs.double().cpu().numpy()
        self.seen += 1
        if len(self.rows) < self._size:
            self.rows.append(make_row())
        elif (place := int(self._random.integers(self.seen))) < self._size:
            self.rows[place] = make_row()


class DraftNormalisers:
    """The log-sum-exp of draft rows of which model runner V1 keeps the probabilities only.

    A row is known again by its largest probability and that token, which vLLM's own softmax has just computed.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, float], float] = {}

    def watch(self) -> None:
        """Listen to vLLM's draft sampling in this process."""
        from vllm.v1.spec_decode import llm_base_proposer as proposer

        original = proposer.compute_probs_and_sample_next_token

        def watched(logits, *args, **kwargs):
            token_ids, probs = original(logits, *args, **kwargs)
            largest, tokens = probs.max(dim=-1)
            # The original has divided the logits by the temperature in place.
            normalisers = logits.float().logsumexp(dim=-1)
            for key, value in zip(zip(tokens.tolist(), largest.tolist(), strict=True), normalisers, strict=True):
                self._known[key] = float(value)
            return token_ids, probs

        proposer.compute_probs_and_sample_next_token = watched

    def logits(self, probs: torch.Tensor) -> torch.Tensor | None:
        """The scaled logits ``[vocab]`` of a row of probabilities; None if the row was not seen."""
        largest, token = probs.max(dim=-1)
        normaliser = self._known.get((int(token), float(largest)))
        return None if normaliser is None else probs.float().log() + normaliser


def tap(module, normalisers: DraftNormalisers, reservoir_of) -> None:
    """Let every call of ``verify`` from a model runner's adapter offer its judged rows to a reservoir."""
    original = module.verify

    def verify(logits, cu_num_logits, draft_token_ids, max_num_draft_tokens, **kwargs):
        verified = original(logits, cu_num_logits, draft_token_ids, max_num_draft_tokens, **kwargs)
        reservoir, temperature = reservoir_of(), kwargs.get("temperature")
        if reservoir is None or temperature is None:
            return verified
        starts, judged = cu_num_logits.tolist(), verified.num_sampled.tolist()
        compact = draft_token_ids.shape[0] != logits.shape[0]
        states = kwargs.get("state_indices")
        states = range(len(judged)) if states is None else states.tolist()
        for request, state in enumerate(states):
            for position in range(min(judged[request], starts[request + 1] - starts[request] - 1)):
                row = starts[request] + position
                token = int(draft_token_ids[row - request if compact else row + 1])

                def make(row=row, request=request, state=state, position=position, token=token):
                    temp = float(temperature[state])
                    if kwargs.get("draft_logits") is not None:
                        draft = kwargs["draft_logits"][state, position].float() / temp
                    else:
                        draft = normalisers.logits(kwargs["draft_probs"][row - request])
                    draft = None if draft is None else draft.cpu().numpy()
                    return logits[row].float().cpu().numpy(), draft, token, position, temp

                reservoir.offer((logits[row].float() / float(temperature[state])).softmax(0), make)
        return verified

    module.verify = verify


def save(folder: Path, name: str, rows: list[tuple]) -> int:
    """Write the rows of one part; those whose draft row is not known are left out. Returns how many were written."""
    rows = [row for row in rows if row[1] is not None]
    width = min((len(row[1]) for row in rows), default=0)
    for key, values in zip(PART_KEYS, zip(*rows, strict=True), strict=False):
        values = [value[:width] for value in values] if key in ("target", "draft") else values
        np.save(folder / f"{name}.{key}.npy", np.stack([np.asarray(value) for value in values]))
    return len(rows)


def main(request_path: str, folder: str) -> None:
    """Build the engine of the request, run each part's prompts at each temperature, write the rows of each part."""
    request = json.loads(Path(request_path).read_text())
    normalisers, current = DraftNormalisers(), []
    normalisers.watch()
    from vllm import LLM, SamplingParams

    llm = LLM(**request["llm"])
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    sampler = type(runner.rejection_sampler)
    module = sys.modules[sampler.__module__]
    if not sampler.__module__.startswith("vllm_specopt."):
        raise SystemExit(f"the engine verifies with {sampler.__module__}, not with vllm-specopt: see the log")
    tap(module, normalisers, lambda: current[-1] if current else None)
    from vllm_specopt.calibration import describe

    config = llm.llm_engine.vllm_config
    max_rows = min(request["max_rows"], request["max_elements"] // config.model_config.get_vocab_size())
    written, temperatures = {}, request["temperatures"]
    for number, (name, prompts) in enumerate(request["parts"].items()):
        rows, seen, mass = [], 0, 0.0
        for index, temperature in enumerate(temperatures):
            current.append(Reservoir(max_rows // len(temperatures), seed=number * 1000 + index))
            params = SamplingParams(temperature=temperature, max_tokens=request["output_len"], ignore_eos=True)
            llm.generate(prompts, params, use_tqdm=False)
            rows, seen, mass = rows + current[-1].rows, seen + current[-1].seen, mass + current[-1].mass
            current[-1] = None
        written[name] = {"rows": save(Path(folder), name, rows), "judged": seen}
        np.save(Path(folder) / f"{name}.mass.npy", mass / max(seen, 1))
    written |= {
        "runner": module.__name__.rpartition(".")[2].upper(),
        "dtype": str(runner.model_config.dtype).removeprefix("torch."),
        "models": {
            "target": asdict(describe(config.model_config)),
            "draft": asdict(describe(config.speculative_config.draft_model_config)),
        },
    }
    (Path(folder) / "gathered.json").write_text(json.dumps(written))


if __name__ == "__main__":
    main(*sys.argv[1:])
