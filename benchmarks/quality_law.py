"""How far the law of the first emitted token leaves the target's, in an engine that serves: whole rows, in float64.

The rows are those that the engine itself judges, taken where the model runner hands them to
:func:`vllm_specopt.verify.verify`; nothing is sampled (see ``cli/calibrate_law.py``).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np

from vllm_specopt.calibration import Calibration
from vllm_specopt.cli.calibrate_curve import Checked, constants, estimated
from vllm_specopt.cli.calibrate_fit import Features, Rows, block_tokens
from vllm_specopt.cli.calibrate_gather import DraftNormalisers, Reservoir, tap
from vllm_specopt.cli.calibrate_law import plain_rule, total_variation
from vllm_specopt.config import SpecoptConfig

FORMS = {"vllm_specopt.v1": "probs", "vllm_specopt.v2": "logits"}
MAX_ROWS, MAX_ELEMENTS = 400, 10_000_000
LOWEST = -1e4
"""Stands for a logit that is ruled out, so that no difference is undefined."""


@contextmanager
def judged_rows(sampler: type, vocab_size: int, seed: int) -> Iterator[Reservoir]:
    """Sample judged rows of the engine in this process while in this context; it is slower meanwhile.

    ``sampler`` is the class of the engine's rejection sampler, one of ours.
    """
    from vllm.v1.spec_decode import llm_base_proposer as proposer

    adapter, normalisers = sys.modules[sampler.__module__], DraftNormalisers()
    verify, draw = adapter.verify, proposer.compute_probs_and_sample_next_token
    reservoir = Reservoir(max(20, min(MAX_ROWS, MAX_ELEMENTS // vocab_size)), seed)
    normalisers.watch()
    tap(adapter, normalisers, lambda: reservoir)
    try:
        yield reservoir
    finally:
        adapter.verify, proposer.compute_probs_and_sample_next_token = verify, draw


def law(reservoir: Reservoir, sampler: type, config: SpecoptConfig) -> dict | None:
    """Means over the rows, each from 0 to 1; None without rows.

    ``tv``: total variation distance of the emitted law from the target's; ``draft_tv``: the draft's own;
    ``acceptance``: the chance that the first draft token is accepted; ``exact_acceptance``: by the exact method.
    """
    form = FORMS[sampler.__module__]
    kept = [row for row in reservoir.rows if row[1] is not None]
    if not kept:
        return None
    checked = Checked(_rows(kept))
    outcome = rule(config, form, checked)
    found = np.array([outcome(i) for i in range(len(kept))])
    own = np.array([total_variation(checked.draft(i), checked.target(i)) for i in range(len(kept))])
    return {
        "tv": float(found[:, 0].mean()),
        "draft_tv": float(own.mean()),
        "acceptance": float(found[:, 1].mean()),
        "exact_acceptance": float(1 - own.mean()),
        "rows": len(kept),
    }


def rule(config: SpecoptConfig, form: str, checked: Checked) -> Callable[[int], tuple[float, float]]:
    """The (TV, acceptance) of a row under a method and its constants."""
    if config.method == "exact":
        return lambda i: plain_rule(checked.target(i), checked.draft(i), checked.target(i), checked.draft(i))
    chosen = config.sigmoid
    if isinstance(chosen, Calibration):
        tokens = block_tokens(chosen.read_blocks(form), chosen.block_size, chosen.vocab_size)
        features = Features(form, checked.rows, tokens)
        return estimated(form, checked, features, chosen.estimators(form), chosen.tail)
    alphas = (chosen.target_alpha, chosen.draft_alpha)
    return constants(form, checked, lambda i: alphas, chosen.target_beta - chosen.target_alpha, chosen.clip)


def _rows(kept: list[tuple]) -> Rows:
    target, draft, tokens, positions, temperatures = zip(*kept, strict=True)
    # The two models' vocabularies may be padded to different sizes.
    width = min(len(row) for row in draft)
    temperatures = np.array(temperatures)
    scaled = np.stack([row[:width] for row in target]).astype(np.float64) / temperatures[:, None]
    sides = (scaled, np.stack([row[:width] for row in draft]).astype(np.float64))
    sides = [np.clip(np.nan_to_num(side, nan=LOWEST), LOWEST, -LOWEST) for side in sides]
    return Rows(*sides, np.array(tokens), np.array(positions), temperatures)
