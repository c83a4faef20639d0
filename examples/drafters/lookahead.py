"""Lookahead decoding (2402.02057) in one chain: Jacobi guesses and a pool of n-grams, no draft model.

    PYTHONPATH=examples/drafters vllm serve TARGET \\
        --speculative-config '{"method": "custom_class", "model": "lookahead.Lookahead",
                               "num_speculative_tokens": 4}' \\
        --additional-config '{"specopt": "exact"}'

The paper runs two branches beside each other in one forward pass: a window of guesses that is refined by Jacobi
iteration, and candidates from a pool of the n-grams that came out of it. vLLM verifies one chain of draft tokens a
request, so both share it here: n-grams from the pool come first, guesses fill the rest. The rows behind a rejection,
which verification does not need, are the next Jacobi iteration: no row is computed for it alone, and the window is no
longer than the drafts. ``target_rows.py`` says how a drafter sees these rows; it costs the likeliest token of each.
"""

from __future__ import annotations

import torch
from target_rows import Step, TargetRows

NGRAM = 3
"""Tokens of an n-gram in the pool; the first of them is what it is found by."""


class Lookahead(TargetRows):
    """Each request has its own pool; what the target guesses is its likeliest token, whatever the temperature."""

    def kept(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """The likeliest token [rows] at each row."""
        return logits.argmax(dim=-1)

    def draft(self, steps: list[Step], rows: torch.Tensor) -> list[list[int]]:
        """Draft for each request."""
        guesses = rows.tolist()
        return [self._one(step, guesses[step.first : step.first + len(step.drafts) + 1]) for step in steps]

    def _one(self, step: Step, guesses: list[int]) -> list[int]:
        """Take in the target's guess behind each of a request's tokens, and draft.

        ``pool`` maps a token to what followed it, the latest only. ``chain`` holds an n-gram for each row, its last
        token the row's; each of its tokens was guessed, or emitted, behind the one before.
        """
        pool: dict[int, list[int]] = step.memory.setdefault("pool", {})
        chain: list[list[int]] = step.memory.get("chain", [])
        if len(chain) != len(guesses):
            chain = [step.text[: -len(step.emitted)][-NGRAM:].tolist()]
        grown = [[*ngram, guess][-NGRAM:] for ngram, guess in zip(chain, guesses, strict=True)]
        for ngram in grown:
            if len(ngram) == NGRAM:
                pool[ngram[0]] = ngram[1:]
        # Rows before the last emitted token's are behind us; the others have guessed what follows it, place by place.
        window = grown[len(step.emitted) :]
        chain = [step.text[-NGRAM:].tolist()]
        while len(chain) <= self.number:
            at = len(chain) - 1
            if found := pool.get(chain[-1][-1]):
                for token in found:
                    chain.append([*chain[-1], token][-NGRAM:])
            elif at < len(window):
                chain.append(window[at])
            else:
                # Nothing is known of this place: any token starts a guess.
                chain.append([int(step.text[-1 - at % len(step.text)])])
        step.memory["chain"] = chain[: self.number + 1]
        return [ngram[-1] for ngram in step.memory["chain"][1:]]
